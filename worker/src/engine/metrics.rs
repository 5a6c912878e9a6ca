//! What an engine tells Prometheus.

use std::sync::LazyLock;

use prometheus::{
    HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, register_histogram_vec,
    register_int_counter_vec, register_int_gauge_vec,
};

/// All families, with the label `model` and, where there is one, a fixed second label; one with `tenant`.
pub struct Metrics {
    pub step_seconds: HistogramVec,
    pub step_rows: HistogramVec,
    pub tokens: IntCounterVec,
    pub sequences: IntGaugeVec,
    pub kv_blocks: IntGaugeVec,
    pub preemptions: IntCounterVec,
    pub evictions: IntCounterVec,
    pub tenant_tokens: IntCounterVec,
    pub queue_seconds: HistogramVec,
    pub requests: IntCounterVec,
    pub drafts: IntCounterVec,
}

/// Registered in Prometheus' default registry on first use. `None` only if another part took one of the names.
pub static METRICS: LazyLock<Option<Metrics>> = LazyLock::new(|| register().ok());

fn register() -> prometheus::Result<Metrics> {
    // A step takes 2 ms for one sequence on a GPU, and seconds for a full chunk of prompt on a slow processor.
    let seconds = vec![0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0];
    let rows = vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];
    Ok(Metrics {
        step_seconds: register_histogram_vec!(
            HistogramOpts::new(
                "verbund_engine_step_seconds",
                "Duration of one step of all ranks."
            )
            .buckets(seconds),
            &["model"]
        )?,
        step_rows: register_histogram_vec!(
            HistogramOpts::new(
                "verbund_engine_step_rows",
                "Rows (token positions) in one step."
            )
            .buckets(rows),
            &["model"]
        )?,
        tokens: register_int_counter_vec!(
            Opts::new(
                "verbund_engine_tokens_total",
                "Tokens: of prompts computed, of answers generated."
            ),
            &["model", "kind"]
        )?,
        sequences: register_int_gauge_vec!(
            Opts::new(
                "verbund_engine_sequences",
                "Sequences in the engine, running or waiting."
            ),
            &["model", "state"]
        )?,
        kv_blocks: register_int_gauge_vec!(
            Opts::new(
                "verbund_engine_kv_blocks",
                "KV cache blocks: used by sequences, cached for later ones, total."
            ),
            &["model", "state"]
        )?,
        preemptions: register_int_counter_vec!(
            Opts::new(
                "verbund_engine_preemptions_total",
                "Sequences that gave their KV blocks back to another one."
            ),
            &["model"]
        )?,
        evictions: register_int_counter_vec!(
            Opts::new(
                "verbund_engine_evictions_total",
                "Cached KV blocks that were taken for something else."
            ),
            &["model"]
        )?,
        tenant_tokens: register_int_counter_vec!(
            Opts::new(
                "verbund_engine_tenant_tokens_total",
                "Tokens a tenant was served: of prompts computed or found cached, of answers."
            ),
            &["model", "tenant", "kind"]
        )?,
        queue_seconds: register_histogram_vec!(
            HistogramOpts::new(
                "verbund_engine_queue_seconds",
                "Time that a request waited for its place."
            )
            .buckets(vec![
                0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0
            ]),
            &["model"]
        )?,
        requests: register_int_counter_vec!(
            Opts::new("verbund_engine_requests_total", "Generations by their end."),
            &["model", "code"]
        )?,
        drafts: register_int_counter_vec!(
            Opts::new(
                "verbund_engine_drafts_total",
                "Guessed tokens that steps verified, right or wrong."
            ),
            &["model", "outcome"]
        )?,
    })
}

//! What a gateway counts, in the process's default registry. Labels come from fixed sets: routes from the route table,
//! tenants and models from the control state.

use std::sync::LazyLock;
use std::time::Duration;

use coordinator::ids::TenantId;
use prometheus::{
    HistogramOpts, HistogramVec, IntCounterVec, IntGauge, Opts, register_histogram_vec,
    register_int_counter_vec, register_int_gauge,
};

/// Upper bounds in seconds; the first ones for JSON routes, the last ones for long answers.
const SECONDS: [f64; 13] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0,
];

struct Metrics {
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    in_flight: IntGauge,
    tokens: IntCounterVec,
    first_token_seconds: HistogramVec,
    retrievals: IntCounterVec,
}

static METRICS: LazyLock<Option<Metrics>> = LazyLock::new(|| match Metrics::register() {
    Ok(metrics) => Some(metrics),
    Err(error) => {
        tracing::error!(%error, "the gateway's metrics could not be registered and are not counted");
        None
    }
});

impl Metrics {
    fn register() -> Result<Self, prometheus::Error> {
        let histogram = |name: &str, help: &str, labels: &[&str]| {
            register_histogram_vec!(
                HistogramOpts::new(name, help).buckets(SECONDS.to_vec()),
                labels
            )
        };
        Ok(Self {
            requests: register_int_counter_vec!(
                Opts::new(
                    "verbund_http_requests_total",
                    "HTTP requests answered, by route and status code."
                ),
                &["route", "code"]
            )?,
            request_seconds: histogram(
                "verbund_http_request_seconds",
                "Seconds until the answer's head was sent, by route.",
                &["route"],
            )?,
            in_flight: register_int_gauge!(
                "verbund_http_requests_in_flight",
                "HTTP requests whose answer is not complete."
            )?,
            tokens: register_int_counter_vec!(
                Opts::new(
                    "verbund_tokens_total",
                    "Tokens computed for a tenant: kind is prompt, completion or embedding."
                ),
                &["tenant", "kind"]
            )?,
            first_token_seconds: histogram(
                "verbund_first_token_seconds",
                "Seconds from the arrival of a request to its first token, retrieval included.",
                &["model"],
            )?,
            retrievals: register_int_counter_vec!(
                Opts::new(
                    "verbund_grounded_answers_total",
                    "Questions to collections: outcome is found or nothing_found."
                ),
                &["tenant", "outcome"]
            )?,
        })
    }
}

/// A request begins. The guard ends it.
pub fn begin() -> InFlight {
    if let Some(metrics) = &*METRICS {
        metrics.in_flight.inc();
    }
    InFlight(())
}

/// Counts one request as in flight until it is dropped.
pub struct InFlight(());

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Some(metrics) = &*METRICS {
            metrics.in_flight.dec();
        }
    }
}

/// An answer's head was sent.
pub fn answered(route: &str, code: u16, after: Duration) {
    if let Some(metrics) = &*METRICS {
        metrics
            .requests
            .with_label_values(&[route, &code.to_string()])
            .inc();
        metrics
            .request_seconds
            .with_label_values(&[route])
            .observe(after.as_secs_f64());
    }
}

/// Tokens of one kind: `prompt`, `completion` or `embedding`.
pub fn tokens(tenant: &TenantId, kind: &'static str, count: u64) {
    if let Some(metrics) = &*METRICS {
        metrics
            .tokens
            .with_label_values(&[tenant.as_str(), kind])
            .inc_by(count);
    }
}

/// The first token of an answer of `model` came.
pub fn first_token(model: &str, after: Duration) {
    if let Some(metrics) = &*METRICS {
        metrics
            .first_token_seconds
            .with_label_values(&[model])
            .observe(after.as_secs_f64());
    }
}

/// A question to collections found sources, or nothing.
pub fn grounded(tenant: &TenantId, found: bool) {
    if let Some(metrics) = &*METRICS {
        let outcome = if found { "found" } else { "nothing_found" };
        metrics
            .retrievals
            .with_label_values(&[tenant.as_str(), outcome])
            .inc();
    }
}

/// Everything that this process counts, in Prometheus' text form.
pub fn render() -> Result<String, prometheus::Error> {
    prometheus::TextEncoder::new().encode_to_string(&prometheus::gather())
}

//! One rank of several threads beside several ranks of one thread each, in turn, so that what disturbs one disturbs all.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use worker::bench::{BenchOptions, BenchReport, Ranks};
use worker::collective::Wire;

#[derive(Args)]
pub struct Options {
    /// A GGUF file
    #[arg(long)]
    model: PathBuf,
    /// Of all ranks together
    #[arg(long, default_value_t = 2)]
    threads: usize,
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Prompt tokens
    #[arg(short, long, default_value_t = 512)]
    prefill: usize,
    /// Tokens to decode
    #[arg(short = 'n', long, default_value_t = 64)]
    decode: usize,
    /// Each side is measured this often, in turn; the best counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How sums travel over TCP: exact, f32, bf16 or int8
    #[arg(long, default_value_t)]
    wire: Wire,
    /// Let ranks over TCP wait for each sum, to see what overlapping gains
    #[arg(long)]
    no_overlap: bool,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// One side, and what it reaches of the one rank's.
#[derive(Serialize)]
struct Side {
    name: &'static str,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    prefill_share: f64,
    decode_share: f64,
}

pub fn run(options: &Options) -> Result<()> {
    let measure = |count: usize, tcp: bool| -> Result<BenchReport> {
        Ok(worker::bench::run(&BenchOptions {
            model: options.model.clone(),
            threads: options.threads,
            ranks: Ranks {
                count,
                tcp,
                wire: options.wire,
                overlap: !options.no_overlap,
            },
            kv_format: Default::default(),
            prefill: options.prefill,
            decode: options.decode,
            batch: 1,
            perplexity: None,
            context: options.prefill.max(options.decode + 1),
        })?)
    };
    let kinds = [
        ("one", 1, false),
        ("shm", options.ranks, false),
        ("tcp", options.ranks, true),
    ];
    let mut best = [(0.0f64, 0.0f64); 3];
    for round in 0..options.rounds {
        for ((prefill, decode), (name, count, tcp)) in best.iter_mut().zip(kinds) {
            let report = measure(count, tcp)?;
            let rate = |rate: Option<f64>| rate.unwrap_or(f64::NAN);
            let of = (
                rate(report.prefill_tokens_per_s),
                rate(report.decode_tokens_per_s),
            );
            if !options.json {
                println!(
                    "round {round} {name}: prefill {:.1} decode {:.1} tokens/s",
                    of.0, of.1
                );
            }
            (*prefill, *decode) = (prefill.max(of.0), decode.max(of.1));
        }
    }
    let sides = best
        .iter()
        .zip(kinds)
        .map(|(&(prefill, decode), (name, ..))| Side {
            name,
            prefill_tokens_per_s: prefill,
            decode_tokens_per_s: decode,
            prefill_share: prefill / best[0].0,
            decode_share: decode / best[0].1,
        });
    let sides: Vec<Side> = sides.collect();
    if options.json {
        println!("{}", serde_json::to_string_pretty(&sides)?);
        return Ok(());
    }
    for side in &sides {
        println!(
            "best {}: prefill {:.1} (×{:.3}) decode {:.1} (×{:.3})",
            side.name,
            side.prefill_tokens_per_s,
            side.prefill_share,
            side.decode_tokens_per_s,
            side.decode_share
        );
    }
    Ok(())
}

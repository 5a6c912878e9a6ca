//! One process of two threads beside two ranks of one thread each.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use worker::bench::{BenchOptions, BenchReport, Ranks};
use worker::collective::Wire;

#[derive(Args)]
pub struct Options {
    /// A GGUF file.
    #[arg(long)]
    model: PathBuf,
    /// Of all ranks together.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Prompt tokens.
    #[arg(short, long, default_value_t = 512)]
    prefill: usize,
    /// Tokens to decode.
    #[arg(short = 'n', long, default_value_t = 64)]
    decode: usize,
    /// Each side is measured this often, in turn.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

pub fn run(options: &Options) -> Result<()> {
    let measure = |count: usize, tcp: bool| -> Result<BenchReport> {
        Ok(worker::bench::run(&BenchOptions {
            model: options.model.clone(),
            threads: options.threads,
            ranks: Ranks {
                count,
                tcp,
                wire: Wire::Exact,
            },
            prefill: options.prefill,
            decode: options.decode,
            batch: 1,
            perplexity: None,
            context: options.prefill.max(options.decode + 1),
        })?)
    };
    for round in 0..options.rounds {
        for (name, count, tcp) in [
            ("one", 1, false),
            ("shm", options.ranks, false),
            ("tcp", options.ranks, true),
        ] {
            let report = measure(count, tcp)?;
            println!(
                "round {round} {name}: prefill {:.1} decode {:.1} tokens/s",
                report.prefill_tokens_per_s.unwrap_or(f64::NAN),
                report.decode_tokens_per_s.unwrap_or(f64::NAN)
            );
        }
    }
    Ok(())
}

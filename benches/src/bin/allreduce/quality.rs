//! What the formats of sums on the wire, or of the KV cache, do to a model's predictions.

use std::fmt::Display;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use worker::bench::{FormatOptions, FormatQuality, kv_formats, wire_formats};

#[derive(Args)]
pub struct Options {
    /// A GGUF file
    #[arg(long)]
    model: PathBuf,
    /// Text to predict
    #[arg(long)]
    text: PathBuf,
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// Of all ranks together
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Positions of a chunk; the second half of each is scored
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Most chunks taken from the text
    #[arg(long, default_value_t = 8)]
    chunks: usize,
    /// Compare the formats of the KV cache instead of those of the wire
    #[arg(long)]
    kv: bool,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(options: &Options) -> Result<()> {
    let formats = FormatOptions {
        model: options.model.clone(),
        text: options.text.clone(),
        ranks: options.ranks,
        threads: options.threads,
        context: options.context,
        chunks: options.chunks,
    };
    if options.kv {
        report(&kv_formats(&formats)?, options.json)
    } else {
        report(&wire_formats(&formats)?, options.json)
    }
}

fn report<F: Display + Serialize>(measured: &[FormatQuality<F>], json: bool) -> Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(measured)?);
        return Ok(());
    }
    println!("| format | perplexity | against the first | same likeliest token |");
    println!("| --- | ---: | ---: | ---: |");
    for one in measured {
        println!(
            "| {} | {:.4} | {:+.3} % | {:.2} % of {} |",
            one.format,
            one.perplexity.value,
            100.0 * (one.perplexity_ratio - 1.0),
            100.0 * one.top1_agreement,
            one.perplexity.scored
        );
    }
    Ok(())
}

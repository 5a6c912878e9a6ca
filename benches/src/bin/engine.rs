//! The engine beside candle's quantised Llama, on the same file and threads in one run.
//!
//! `cargo run --locked --workspace --features benches/candle --bin engine -- --model F --threads 2`

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use serde::{Deserialize, Serialize};
use worker::bench::{BenchOptions, BenchReport};

#[derive(Parser)]
struct Options {
    /// A GGUF file.
    #[arg(long)]
    model: PathBuf,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Prompt tokens.
    #[arg(short, long, default_value_t = 512)]
    prefill: usize,
    /// Tokens to decode.
    #[arg(short = 'n', long, default_value_t = 64)]
    decode: usize,
    /// Sequences that decode at once (this engine only).
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Measures the peer only; the bench calls itself so, because the peer reads its thread count from the environment once.
    #[arg(long, hide = true)]
    peer: bool,
}

#[derive(Serialize)]
struct Comparison {
    ours: BenchReport,
    candle: Option<Rates>,
    /// Ours over candle's; above 1 is faster.
    prefill_ratio: Option<f64>,
    decode_ratio: Option<f64>,
}

#[derive(Serialize, Deserialize)]
struct Rates {
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if options.peer {
        println!("{}", serde_json::to_string(&peer::rates(&options)?)?);
        return Ok(());
    }
    let candle = if cfg!(feature = "candle") {
        Some(call_peer(&options)?)
    } else {
        None
    };
    let ours = worker::bench::run(&BenchOptions {
        model: options.model,
        threads: options.threads,
        ranks: Default::default(),
        kv_format: Default::default(),
        prefill: options.prefill,
        decode: options.decode,
        batch: options.batch,
        perplexity: None,
        context: options.prefill.max(options.decode + 1),
    })?;
    let ratio = |ours: Option<f64>, peer: fn(&Rates) -> f64| Some(ours? / peer(candle.as_ref()?));
    let comparison = Comparison {
        prefill_ratio: ratio(ours.prefill_tokens_per_s, |r| r.prefill_tokens_per_s),
        decode_ratio: ratio(ours.decode_tokens_per_s, |r| r.decode_tokens_per_s),
        candle,
        ours,
    };
    println!("{}", serde_json::to_string_pretty(&comparison)?);
    Ok(())
}

fn call_peer(options: &Options) -> Result<Rates> {
    let output = std::process::Command::new(std::env::current_exe()?)
        .env("RAYON_NUM_THREADS", options.threads.to_string())
        .arg("--peer")
        .args([
            "--prefill",
            &options.prefill.to_string(),
            "--decode",
            &options.decode.to_string(),
            "--model",
        ])
        .arg(&options.model)
        .stderr(std::process::Stdio::inherit())
        .output()?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

#[cfg(feature = "candle")]
mod peer {
    use std::time::Instant;

    use anyhow::Result;
    use candle_core::quantized::gguf_file;
    use candle_core::{Device, Tensor};
    use candle_transformers::models::quantized_llama::ModelWeights;

    use super::{Options, Rates};

    const REPEATS: usize = 3;

    /// The best of several runs, as for our engine.
    pub fn rates(options: &Options) -> Result<Rates> {
        let mut file = std::fs::File::open(&options.model)?;
        let content = gguf_file::Content::read(&mut file)?;
        let mut model = ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
        let mut rates = Rates {
            prefill_tokens_per_s: 0.0,
            decode_tokens_per_s: 0.0,
        };
        for _ in 0..REPEATS {
            let start = Instant::now();
            ask(&mut model, options.prefill, 0)?;
            rates.prefill_tokens_per_s = rates
                .prefill_tokens_per_s
                .max(options.prefill as f64 / start.elapsed().as_secs_f64());
            // From an empty context, as ours decodes.
            ask(&mut model, 1, 0)?;
            let start = Instant::now();
            for position in 1..=options.decode {
                ask(&mut model, 1, position)?;
            }
            rates.decode_tokens_per_s = rates
                .decode_tokens_per_s
                .max(options.decode as f64 / start.elapsed().as_secs_f64());
        }
        Ok(rates)
    }

    /// One forward pass and its logits.
    fn ask(model: &mut ModelWeights, tokens: usize, position: usize) -> Result<()> {
        let ids: Vec<u32> = (0..tokens as u32)
            .map(|i| (i * 7919 + position as u32 * 31) % 30_000)
            .collect();
        let logits = model.forward(
            &Tensor::new(ids.as_slice(), &Device::Cpu)?.unsqueeze(0)?,
            position,
        )?;
        std::hint::black_box(logits.flatten_all()?.to_vec1::<f32>()?);
        Ok(())
    }
}

#[cfg(not(feature = "candle"))]
mod peer {
    use super::{Options, Rates};

    /// Explains how to get the peer.
    pub fn rates(_options: &Options) -> anyhow::Result<Rates> {
        anyhow::bail!("built without the peer; add --features candle")
    }
}

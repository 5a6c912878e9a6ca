//! Runs the benchmarks and writes `docs/benchmarks.md`: what `make bench` calls.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use benches::report::{
    self, Provenance, Setting, collectives, constrained, engine, fairness, isolation, page,
    serving, soak,
};
use clap::Parser;
use serde::Serialize;

#[derive(Parser)]
struct Options {
    /// Parts to run, separated by commas; all but the soak when absent
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Tiny sizes, into a folder of its own: whether everything runs, not how fast
    #[arg(long)]
    quick: bool,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// How often ours and the peer are measured, in turn
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    #[arg(long, default_value_t = 900)]
    soak_s: u64,
    /// The repository
    #[arg(long, default_value = ".")]
    root: PathBuf,
    /// Python with llama-cpp-python
    #[arg(long, env = "VERBUND_PEER", default_value = "no-peer")]
    peer: PathBuf,
    /// llama.cpp's server
    #[arg(long, env = "VERBUND_PEER_SERVER", default_value = "no-peer")]
    peer_server: PathBuf,
    /// The program `engine`, built with the feature `candle`
    #[arg(long)]
    candle: Option<PathBuf>,
    #[arg(long, env = "VERBUND_SHAPES")]
    shapes: PathBuf,
    #[arg(long, env = "VERBUND_MODELS")]
    models: PathBuf,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let options = Options::parse();
    let names = page::SECTIONS.map(|(name, ..)| name);
    for part in &options.only {
        ensure!(
            names.contains(&part.as_str()),
            "unknown part {part}; expected some of {names:?}"
        );
    }
    let docs = options.root.join("docs");
    let tried = tempfile::tempdir()?;
    let (page, results) = if options.quick {
        (tried.path().join("benchmarks.md"), tried.path().to_owned())
    } else {
        (docs.join("benchmarks.md"), docs.join("benchmarks"))
    };
    std::fs::create_dir_all(&results)?;
    let setting = Setting {
        verbund: std::env::current_exe()?.with_file_name("verbund"),
        peer_python: options.peer,
        peer_server: options.peer_server,
        candle: options.candle,
        root: options.root,
        shapes: options.shapes,
        models: options.models,
        results,
        threads: options.threads,
        quick: options.quick,
        rounds: if options.quick { 1 } else { options.rounds },
    };
    for part in names {
        let wanted = match options.only.as_slice() {
            [] => part != "soak",
            only => only.iter().any(|p| p == part),
        };
        if !wanted {
            continue;
        }
        eprintln!("== {part}");
        // A part that fails keeps its last result and lets the others run.
        if let Err(error) = run(part, &setting, options.soak_s).await {
            eprintln!("{part} was not measured: {error:#}");
        }
    }
    page::write(&page, &setting.results)?;
    if options.quick {
        println!("{}", std::fs::read_to_string(&page)?);
    }
    Ok(())
}

async fn run(part: &str, setting: &Setting, soak_s: u64) -> Result<()> {
    let from = Provenance::now(&setting.root, setting.threads);
    match part {
        "engine" => keep(setting, part, from, engine::run(setting)),
        "serving" => keep(setting, part, from, serving::run(setting).await?),
        "collectives" => keep(setting, part, from, collectives::run(setting)?),
        "fairness" => keep(setting, part, from, fairness::run(setting).await?),
        "isolation" => keep(setting, part, from, isolation::run(setting).await?),
        "constrained" => keep(setting, part, from, constrained::run(setting).await?),
        "soak" => {
            let seconds = if setting.quick { 20 } else { soak_s };
            let result = soak::run(setting, seconds).await?;
            let picture = soak::picture(&result)?;
            std::fs::write(setting.results.join("soak.svg"), picture)?;
            keep(setting, part, from, result)
        }
        other => unreachable!("{other} was checked"),
    }
}

fn keep<T: Serialize>(setting: &Setting, part: &str, from: Provenance, result: T) -> Result<()> {
    report::keep(&setting.results, part, from, result).context("the result cannot be kept")
}

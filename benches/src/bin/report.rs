//! Runs the benchmarks and writes `docs/benchmarks.md`: what `make bench` calls.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use benches::report::{
    self, Provenance, Setting, collectives, constrained, engine, fairness, isolation, page,
    serving, soak, speculation,
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
    let names = page::SECTIONS.map(|section| section.name);
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
    let wanted = |part: &str| match options.only.as_slice() {
        [] => part != page::SOAK,
        only => only.iter().any(|p| p == part),
    };
    let parts = page::SECTIONS
        .into_iter()
        .filter(|section| wanted(section.name));
    let parts: Vec<_> = parts
        .map(|section| (section.name, section.minutes(&docs.join("benchmarks"))))
        .collect();
    if !options.quick {
        let each: Vec<String> = parts
            .iter()
            .map(|(part, minutes)| format!("{part} {minutes:.0}"))
            .collect();
        let all: f64 = parts.iter().map(|(_, minutes)| minutes).sum();
        eprintln!("About {all:.0} minutes: {}", each.join(", "));
    }
    for (part, _) in parts {
        eprintln!("== {part}");
        let start = Instant::now();
        // A part that fails keeps its last result and lets the others run.
        match run(part, &setting, options.soak_s).await {
            Ok(()) => eprintln!(
                "{part}: {:.1} minutes",
                start.elapsed().as_secs_f64() / 60.0
            ),
            Err(error) => eprintln!(
                "{part} was not measured, after {:.1} minutes: {error:#}",
                start.elapsed().as_secs_f64() / 60.0
            ),
        }
        // After each, so that a run that is cut short leaves what it measured.
        page::write(&page, &setting.results)?;
    }
    page::write(&page, &setting.results)?;
    if options.quick {
        println!("{}", std::fs::read_to_string(&page)?);
    }
    Ok(())
}

async fn run(part: &str, setting: &Setting, soak_s: u64) -> Result<()> {
    let (from, start) = (
        Provenance::now(&setting.root, setting.threads),
        Instant::now(),
    );
    let run = Run {
        setting,
        part,
        from,
        start,
    };
    match part {
        "engine" => run.keep(engine::run(setting)),
        "serving" => run.keep(serving::run(setting).await?),
        "collectives" => run.keep(collectives::run(setting)?),
        "fairness" => run.keep(fairness::run(setting).await?),
        "isolation" => run.keep(isolation::run(setting).await?),
        "constrained" => run.keep(constrained::run(setting)?),
        "speculation" => run.keep(speculation::run(setting)?),
        page::SOAK => {
            let seconds = if setting.quick { 20 } else { soak_s };
            let result = soak::run(setting, seconds).await?;
            let picture = soak::picture(&result)?;
            std::fs::write(setting.results.join("soak.svg"), picture)?;
            run.keep(result)
        }
        other => unreachable!("{other} was checked"),
    }
}

/// A part that runs.
struct Run<'a> {
    setting: &'a Setting,
    part: &'a str,
    from: Provenance,
    start: Instant,
}

impl Run<'_> {
    fn keep<T: Serialize>(mut self, result: T) -> Result<()> {
        self.from.seconds = self.start.elapsed().as_secs_f64();
        report::keep(&self.setting.results, self.part, self.from, result)
            .context("the result cannot be kept")
    }
}

//! `docs/benchmarks.md`, made of the results that are kept. Every figure on it comes from here.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;

use super::engine::{self, Engine};
use super::{collectives, constrained, fairness, isolation, kept, serving, soak, speculation};

/// A part.
pub struct Section {
    /// On the command line, and of its result's file.
    pub name: &'static str,
    heading: &'static str,
    /// What it takes on two cores, until a run on this machine tells better.
    minutes: f64,
    /// The table of the result that is kept.
    table: fn(&Path) -> Option<String>,
}

/// Every part, in the order in which they are run and shown.
pub const SECTIONS: [Section; 8] = [
    Section {
        name: "engine",
        heading: "One process beside llama.cpp",
        minutes: 14.0,
        table: |f| {
            section(f, "engine", |e: &Engine| {
                format!("{}\n{}", engine::limits(e), engine::table(e))
            })
        },
    },
    Section {
        name: "serving",
        heading: "Streaming clients beside llama.cpp's server",
        minutes: 3.0,
        table: |f| section(f, "serving", serving::table),
    },
    Section {
        name: "collectives",
        heading: "Several ranks",
        minutes: 7.0,
        table: |f| section(f, "collectives", collectives::table),
    },
    Section {
        name: "fairness",
        heading: "One tenant floods",
        minutes: 6.0,
        table: |f| section(f, "fairness", fairness::table),
    },
    Section {
        name: "isolation",
        heading: "What one tenant can tell of another",
        minutes: 4.0,
        table: |f| section(f, "isolation", isolation::table),
    },
    Section {
        name: "constrained",
        heading: "Answers held to a form",
        minutes: 2.0,
        table: |f| section(f, "constrained", constrained::table),
    },
    Section {
        name: "speculation",
        heading: "Guessing ahead",
        minutes: 5.0,
        table: |f| section(f, "speculation", speculation::table),
    },
    Section {
        name: SOAK,
        heading: "A quarter of an hour at saturation",
        minutes: 16.0,
        table: |f| section(f, SOAK, soak::table),
    },
];

/// The part that runs only where it is asked for.
pub const SOAK: &str = "soak";

impl Section {
    /// Minutes that it will take: what its last run in `folder` took.
    pub fn minutes(&self, folder: &Path) -> f64 {
        kept::<serde::de::IgnoredAny>(folder, self.name)
            .map(|kept| kept.provenance.seconds / 60.0)
            .filter(|&minutes| minutes > 0.0)
            .unwrap_or(self.minutes)
    }
}

fn section<T: DeserializeOwned>(
    folder: &Path,
    part: &str,
    table: impl Fn(&T) -> String,
) -> Option<String> {
    let kept = kept::<T>(folder, part)?;
    Some(format!(
        "{}\n{}\n",
        table(&kept.result),
        kept.provenance.line()
    ))
}

const INTRODUCTION: &str = "\
# Benchmarks

*Written by `make bench`; change the program (`benches/`), not this page.*

Every figure stands beside its floor or a peer, measured in the same run on the same file and threads, ours and the peer in
turn, the best of each. The limits are this machine's own: prefill cannot be faster than the 8-bit products of its weights,
decode of one sequence not faster than one read of all weights a step. The peer is llama.cpp out of `llama-cpp-python` 0.3.36,
compiled for this processor. \"1B\" and \"8B\" are random weights in the shapes of Llama 3.2 1B and Llama 3.1 8B, in llama.cpp's own
mixtures of formats. ✓ and ✗ say whether a goal of the project was met in this run.

## How to measure

    make bench                                  # everything but the soak, about 45 minutes of an otherwise idle machine
    make bench ONLY=engine,serving              # some parts; the others keep their last result
    make bench ONLY=soak                        # a quarter of an hour
    verbund bench --model F --threads 2 -p 512 -n 64 --json
    cargo bench --locked --workspace            # single kernels, attention, sampling, tokenizer, a step's plan

Candle chooses its kernels when it is compiled, so its program needs `RUSTFLAGS=-Ctarget-cpu=native` and a target directory of
its own: `cargo build --locked --workspace --features benches/candle --bin engine`, then `make bench CANDLE=path/to/engine`.
";

/// Writes the page from all results in `folder`.
pub fn write(page: &Path, folder: &Path) -> Result<()> {
    let mut text = INTRODUCTION.to_owned();
    for part in SECTIONS {
        writeln!(text, "\n## {}\n", part.heading)?;
        match (part.table)(folder) {
            Some(table) => text.push_str(&table),
            None => writeln!(text, "Not measured yet; `make bench ONLY={}`.", part.name)?,
        }
    }
    std::fs::write(page, text).with_context(|| format!("{}", page.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::constrained::{Constrained, Kind};
    use crate::report::{Provenance, keep};

    #[test]
    fn a_page_holds_what_was_measured_and_says_what_was_not() {
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("benchmarks.md");
        let result = Constrained {
            vocabulary_tokens: 49_152,
            vocabulary_ms: 80.0,
            free_ms_per_token: 4.0,
            tokens: 200,
            turns: 9,
            kinds: vec![Kind {
                name: "records".into(),
                compile_ms: 3.0,
                ms_per_token: 4.1,
                overhead_percent: 2.5,
            }],
        };
        let provenance = Provenance {
            cpu: "a processor".into(),
            cores: 2,
            load_before: 9.0,
            seconds: 90.0,
            ..Provenance::default()
        };
        keep(folder.path(), "constrained", provenance, result).unwrap();
        std::fs::write(
            folder.path().join("soak.json"),
            "{\"of\": \"another form\"}",
        )
        .unwrap();
        write(&page, folder.path()).unwrap();
        let text = std::fs::read_to_string(&page).unwrap();
        assert!(text.contains("| records | 3.0 ms | 4.10 ms | 2.5 % | ≤ 5 % ✓ |"));
        assert!(text.contains("a processor, 2 cores") && text.contains("was busy"));
        assert!(text.contains("make bench ONLY=soak`"));
        let minutes = |name| {
            let mut all = SECTIONS.into_iter();
            all.find(|s| s.name == name).unwrap().minutes(folder.path())
        };
        assert_eq!(minutes("constrained"), 1.5);
        assert_eq!(minutes("soak"), 16.0);
    }
}

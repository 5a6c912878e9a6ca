//! `docs/benchmarks.md`, made of the results that are kept. Every figure on it comes from here.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;

use super::collectives::{self, Collectives};
use super::constrained::{self, Constrained};
use super::engine::{self, Engine};
use super::fairness::{self, Fairness};
use super::isolation::{self, Isolation};
use super::kept;
use super::serving::{self, Serving};
use super::soak::{self, Soak};

/// A part: its name on the command line, the heading above its table, and the table of a result.
type Section = (&'static str, &'static str, fn(&Path) -> Option<String>);

/// Every part, in the order in which they are run and shown.
pub const SECTIONS: [Section; 7] = [
    ("engine", "One process beside llama.cpp", |f| {
        section(f, "engine", |e: &Engine| {
            format!("{}\n{}", engine::limits(e), engine::table(e))
        })
    }),
    (
        "serving",
        "Streaming clients beside llama.cpp's server",
        |f| section(f, "serving", |s: &Serving| serving::table(s)),
    ),
    ("collectives", "Several ranks", |f| {
        section(f, "collectives", |c: &Collectives| collectives::table(c))
    }),
    ("fairness", "One tenant floods", |f| {
        section(f, "fairness", |x: &Fairness| fairness::table(x))
    }),
    ("isolation", "What one tenant can tell of another", |f| {
        section(f, "isolation", |i: &Isolation| isolation::table(i))
    }),
    ("constrained", "JSON under a schema", |f| {
        section(f, "constrained", |c: &Constrained| constrained::table(c))
    }),
    ("soak", "A quarter of an hour at saturation", |f| {
        section(f, "soak", |s: &Soak| soak::table(s))
    }),
];

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

    make bench                                  # everything but the soak, on an otherwise idle machine
    make bench ONLY=engine,serving              # some parts; the others keep their last result
    make bench ONLY=soak                        # a quarter of an hour
    verbund bench --model F --threads 2 -p 512 -n 64 --json
    cargo bench --locked --workspace            # single kernels, attention, sampling, tokenizer, scheduler

Candle chooses its kernels when it is compiled, so its program needs `RUSTFLAGS=-Ctarget-cpu=native` and a target directory of
its own: `cargo build --locked --workspace --features benches/candle --bin engine`, then `make bench CANDLE=path/to/engine`.
";

/// Writes the page from all results in `folder`.
pub fn write(page: &Path, folder: &Path) -> Result<()> {
    let mut text = INTRODUCTION.to_owned();
    for (part, heading, table) in SECTIONS {
        writeln!(text, "\n## {heading}\n")?;
        match table(folder) {
            Some(table) => text.push_str(&table),
            None => writeln!(text, "Not measured yet; `make bench ONLY={part}`.")?,
        }
    }
    std::fs::write(page, text).with_context(|| format!("{}", page.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Provenance, keep};

    #[test]
    fn a_page_holds_what_was_measured_and_says_what_was_not() {
        let folder = tempfile::tempdir().unwrap();
        let page = folder.path().join("benchmarks.md");
        let result = Constrained {
            model: "small".into(),
            free_ms: 10.0,
            schema_ms: 10.2,
            tokens: 50,
        };
        let provenance = Provenance {
            cpu: "a processor".into(),
            cores: 2,
            load_before: 9.0,
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
        assert!(text.contains("| 10.00 ms a token | 10.20 ms a token | 2.0 % | ≤ 5 % ✓ |"));
        assert!(text.contains("a processor, 2 cores") && text.contains("was busy"));
        assert!(text.contains("make bench ONLY=soak`"));
    }
}

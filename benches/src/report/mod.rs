//! `make bench`: the parts that are measured, their results as JSON, and `docs/benchmarks.md` made of them.
//!
//! Belongs here: what is run, in which order, and how it is written down; a file a part. Each part keeps its result with
//! machine, commit and load in a JSON file of its own, so that one part can be run again without losing the others'. What
//! cannot run (no peer, no model) says why in its table and stops nothing else.

pub mod collectives;
pub mod constrained;
pub mod engine;
pub mod fairness;
pub mod isolation;
pub mod machine;
pub mod page;
pub mod serving;
pub mod soak;
pub mod speculation;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use machine::Provenance;

/// Where everything is.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The `verbund` binary.
    pub verbund: PathBuf,
    /// Python with llama-cpp-python.
    pub peer_python: PathBuf,
    /// llama.cpp's server.
    pub peer_server: PathBuf,
    /// The engine bench with candle in it, if it was built.
    pub candle: Option<PathBuf>,
    /// The repository.
    pub root: PathBuf,
    /// Folder of the random-weight models.
    pub shapes: PathBuf,
    /// Folder of the default models.
    pub models: PathBuf,
    /// Folder for results and pictures.
    pub results: PathBuf,
    pub threads: usize,
    /// Tiny sizes, to try the program itself; never written into the page.
    pub quick: bool,
    /// How often each measurement is taken, ours and the peer's in turn.
    pub rounds: usize,
}

impl Setting {
    /// A model of random weights, by its file's name.
    pub fn shape(&self, name: &str) -> PathBuf {
        self.shapes.join(name)
    }

    /// The small default model.
    pub fn default_model(&self) -> PathBuf {
        self.models.join("SmolLM2-135M-Instruct.Q4_1.gguf")
    }
}

/// A result beside where it comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept<T> {
    pub provenance: Provenance,
    pub result: T,
}

/// Keeps a part's result under its name.
pub fn keep<T: Serialize>(
    folder: &Path,
    part: &str,
    provenance: Provenance,
    result: T,
) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let path = folder.join(format!("{part}.json"));
    let text = serde_json::to_string_pretty(&Kept { provenance, result })?;
    std::fs::write(&path, text + "\n").with_context(|| format!("{}", path.display()))
}

/// A part's last result; `None` if there is none. A result of another form is one that has to be taken again.
pub fn kept<T: DeserializeOwned>(folder: &Path, part: &str) -> Option<Kept<T>> {
    let text = std::fs::read(folder.join(format!("{part}.json"))).ok()?;
    serde_json::from_slice(&text)
        .inspect_err(|e| eprintln!("{part}: the last result cannot be read: {e}"))
        .ok()
}

//! Model files: what is on disk, read through a memory map and believed about nothing.
//!
//! Belongs here: GGUF and safetensors parsing, the model's configuration, tensors by name. Does not belong here: which part
//! of a tensor a rank takes (`load`), and what is computed with it (`model`).
//!
//! Every length, count and offset in a file is checked against the bytes that are really there before it is used.

mod config;
mod folder;
mod gguf;
mod tensor;
mod weights;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::Format;
use memmap2::Mmap;

pub use config::{ModelConfig, RopeScaling, WeightSizes};
pub use gguf::{Metadata, Value};
pub use tensor::Tensor;
pub use weights::{LAYER_WEIGHTS, LayerWeight, Weight};

/// What can be wrong with a model file; each variant says what was expected, what came and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: cannot be opened: {source}; check the path and that this user may read it")]
    Open {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{path}: not a model; expected a .gguf file, or a folder with config.json and *.safetensors, got {got}"
    )]
    NotAModel { path: PathBuf, got: String },
    #[error(
        "{path}: GGUF version {got} is not supported; expected 2 or 3 in little-endian order; convert the file again"
    )]
    Version { path: PathBuf, got: u32 },
    #[error(
        "{path}: ends in the middle of {what}: expected {need} more bytes at offset {at}, got {have}; the file is incomplete, fetch it again"
    )]
    Truncated {
        path: PathBuf,
        what: String,
        at: u64,
        need: u64,
        have: u64,
    },
    #[error(
        "{path}: {what} is {got}, expected at most {max}; the file is damaged or not what it claims to be"
    )]
    TooMany {
        path: PathBuf,
        what: String,
        got: u64,
        max: u64,
    },
    #[error("{path}: {what} occurs twice; expected it once; convert the file again")]
    Duplicate { path: PathBuf, what: String },
    #[error("{path}: {what}: expected {expected}, got {got}; {remedy}")]
    Invalid {
        path: PathBuf,
        what: String,
        expected: String,
        got: String,
        remedy: &'static str,
    },
    #[error(
        "{path}: {what} is missing; expected it in a llama model; convert the model again with a current converter"
    )]
    Missing { path: PathBuf, what: String },
    #[error(
        "{path}: tensor {tensor} has shape {got:?}, expected {expected:?}; file and configuration do not belong together"
    )]
    Shape {
        path: PathBuf,
        tensor: String,
        expected: Vec<usize>,
        got: Vec<usize>,
    },
    #[error(
        "{path}: tensor {tensor} contains values that are not finite numbers (first in row {row}); the file is damaged, fetch it again"
    )]
    NotFinite {
        path: PathBuf,
        tensor: String,
        row: usize,
    },
}

/// Which program's conventions a file follows; it decides tensor names and how rotary pairs lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// One GGUF file; q and k rows are permuted so that rotary pairs are neighbours.
    Gguf,
    /// A Hugging Face folder; rotary pairs lie half a head apart.
    Safetensors,
}

/// An opened model: configuration, metadata, and tensors that are read only when asked for. Cheap to clone.
#[derive(Clone)]
pub struct ModelFile {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    dialect: Dialect,
    maps: Vec<Mmap>,
    tensors: HashMap<String, Entry>,
    metadata: Metadata,
    /// config.json of a folder.
    hf_config: Option<serde_json::Value>,
}

/// Where a tensor lies. `offset + bytes` was checked against the map's length when the file was opened.
#[derive(Debug, Clone)]
struct Entry {
    map: usize,
    offset: usize,
    bytes: usize,
    format: Format,
    /// Slowest dimension first, as in PyTorch.
    shape: Vec<usize>,
}

impl ModelFile {
    /// Opens a `.gguf` file or a folder with `config.json` and safetensors. Reads headers only.
    pub fn open(path: impl AsRef<Path>) -> Result<ModelFile, Error> {
        let path = path.as_ref();
        let about = std::fs::metadata(path).map_err(|source| Error::Open {
            path: path.into(),
            source,
        })?;
        let inner = if about.is_dir() {
            folder::open(path)?
        } else {
            gguf::open(path)?
        };
        Ok(ModelFile {
            inner: Arc::new(inner),
        })
    }

    /// The path it was opened with.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// GGUF or safetensors.
    pub fn dialect(&self) -> Dialect {
        self.inner.dialect
    }

    /// The llama configuration, every tensor's presence and shape checked. Errors for other architectures.
    pub fn config(&self) -> Result<ModelConfig, Error> {
        config::read(self)
    }

    /// GGUF metadata (empty for a folder): tokenizer arrays, chat template, …
    pub fn metadata(&self) -> &Metadata {
        &self.inner.metadata
    }

    /// A folder's `config.json`; `None` for GGUF.
    pub fn hf_config(&self) -> Option<&serde_json::Value> {
        self.inner.hf_config.as_ref()
    }

    /// Text of another file in a safetensors folder (`tokenizer.json`, `tokenizer_config.json`, …); `None` if there is none.
    pub fn sibling(&self, name: &str) -> Option<Vec<u8>> {
        let folder = match self.inner.dialect {
            Dialect::Safetensors => self.inner.path.as_path(),
            Dialect::Gguf => self.inner.path.parent()?,
        };
        std::fs::read(folder.join(name)).ok()
    }

    /// Names of all tensors, in no order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.inner.tensors.keys().map(String::as_str)
    }

    /// A tensor by the name it has in the file.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, entry) = self.inner.tensors.get_key_value(name)?;
        let map = self.inner.maps.get(entry.map)?;
        let data = map.get(entry.offset..entry.offset.checked_add(entry.bytes)?)?;
        Some(Tensor::new(
            &self.inner.path,
            name,
            entry.format,
            &entry.shape,
            data,
        ))
    }

    /// A tensor by the name it has in the file, or the error that says it is missing.
    pub fn require(&self, name: &str) -> Result<Tensor<'_>, Error> {
        self.tensor(name).ok_or_else(|| Error::Missing {
            path: self.inner.path.clone(),
            what: format!("tensor {name}"),
        })
    }

    /// Tells the kernel that the pages of `data` are no longer needed, so that what was packed is not held twice. Does nothing unless
    /// `data` is a part of this file: only there are pages read again when touched.
    pub fn release(&self, data: &[u8]) {
        let wanted = data.as_ptr_range();
        let holds = |map: &Mmap| {
            let held = map.as_ptr_range();
            held.start <= wanted.start && wanted.end <= held.end
        };
        if self.inner.maps.iter().any(holds) {
            tensor::release(data);
        }
    }
}

/// Maps a file read-only.
fn map(path: &Path) -> Result<Mmap, Error> {
    let file = std::fs::File::open(path).map_err(|source| Error::Open {
        path: path.into(),
        source,
    })?;
    // SAFETY: the map is read-only and nobody here writes the file. As with every mapped file, someone who shortens it in place
    // while it is in use ends this process with SIGBUS; a model is replaced by renaming another file over it.
    unsafe { Mmap::map(&file) }.map_err(|source| Error::Open {
        path: path.into(),
        source,
    })
}

#[cfg(test)]
mod tests;

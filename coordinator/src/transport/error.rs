//! What can go wrong between two nodes.

use std::io;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::MAX_FRAME_BYTES;
use crate::identity;

/// Named for what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Listening failed: another process holds the port, or the address is not this machine's.
    #[error(
        "cannot listen on {addr}: {why}; choose a free port of this machine or stop the program that holds it"
    )]
    Bind { addr: SocketAddr, why: io::Error },
    /// The node's own certificate or key is unusable.
    #[error(transparent)]
    Identity(#[from] identity::Error),
    /// No connection to the address; trying later or elsewhere may help.
    #[error("{addr} is unreachable: {why}")]
    Unreachable { addr: SocketAddr, why: String },
    /// The time given ran out; the request may still take effect.
    #[error("no reply within the time given")]
    Timeout,
    /// The far side answered with an error.
    #[error(transparent)]
    Refused(#[from] RemoteError),
    /// A frame is larger than the protocol allows.
    #[error(
        "a frame of {bytes} bytes exceeds the limit of {}; send it in pieces",
        MAX_FRAME_BYTES
    )]
    FrameTooLarge { bytes: usize },
    /// The stream ended before it was finished: the far side died, or broke off. The request may have taken effect.
    #[error("the connection was closed before the reply was complete")]
    Closed,
}

impl Error {
    /// The remote error's code, if the far side answered with one.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Error::Refused(remote) => Some(remote.code),
            _ => None,
        }
    }
}

/// An error that a handler answers with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct RemoteError {
    pub code: ErrorCode,
    pub message: String,
}

impl RemoteError {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// What kind of error a handler answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ErrorCode {
    /// The node offers no such service.
    UnknownService,
    /// The request cannot be decoded or breaks a rule.
    BadRequest,
    NotFound,
    /// The request contradicts the present state (exists already, stale epoch).
    Conflict,
    /// The caller may not do this.
    Forbidden,
    /// Another node leads; the message names it where known.
    NotLeader,
    /// Not now; trying again later may help.
    Unavailable,
    /// Too much work is waiting; try again later.
    Overloaded,
    TooLarge,
    /// The disk is full or broken.
    Storage,
    Internal,
}

/// The caller went away; whatever is computed for it is no longer wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the caller went away")]
pub struct Closed;

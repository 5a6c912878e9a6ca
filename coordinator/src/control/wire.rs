//! The control services' messages. Enums grow at the end only: peers of the previous version read what they know.

use std::net::SocketAddr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::command::{Command, Outcome, Rejection};
use super::state::ControlState;
use crate::ids::NodeId;

/// Proposes one command; `id` makes retries apply once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Proposal {
    pub id: [u8; 16],
    pub command: Command,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum ProposeReply {
    Applied(Result<Outcome, Rejection>),
    /// Ask there instead.
    NotLeader {
        leader: Option<SocketAddr>,
    },
    /// The caller's certificate does not allow it.
    Denied {
        why: String,
    },
    /// Nothing was applied, or it is unknown whether it was; the same proposal id may be sent again.
    Unavailable {
        why: String,
    },
}

#[derive(Debug, Serialize, Deserialize)]
pub enum ReadReply {
    State(Box<ControlState>),
    Unavailable { why: String },
    Denied { why: String },
}

/// Asks for the state whenever it is newer than `revision`.
#[derive(Debug, Serialize, Deserialize)]
pub struct WatchRequest {
    pub revision: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum WatchFrame {
    State(Box<ControlState>),
    /// Nothing changed; sent every second while the coordinator knows a leader.
    Alive {
        leader: Option<SocketAddr>,
    },
}

/// How the control group's replica on one coordinator stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlStatus {
    pub leader: Option<NodeId>,
    pub term: u64,
    pub commit: u64,
    pub applied: u64,
    pub voters: Vec<NodeId>,
    pub learners: Vec<NodeId>,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum HeartbeatReply {
    Heard,
    NotLeader {
        leader: Option<SocketAddr>,
    },
    /// The state does not know this process; it must register (again).
    Unregistered,
}

/// Serialises a message; control messages always can be.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, String> {
    postcard::to_stdvec(message).map_err(|e| format!("cannot encode a control message: {e}"))
}

/// Reads a message that a peer sent.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    postcard::from_bytes(bytes).map_err(|e| {
        format!(
            "cannot read a control message of {} bytes: {e}",
            bytes.len()
        )
    })
}

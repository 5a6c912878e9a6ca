//! Identity: who a node is. The cluster's certificate authority, the nodes' certificates, and how a new node gets one.
//!
//! Here belong keys, certificates, join tokens and the join handshake's messages. Not here: who may join (control
//! decides, through [`JoinAuthority`]), connections (room `transport`), API keys of people (control).
//!
//! A node's number stands in its certificate as the name `node-<id>.verbund`; every node's certificate also carries
//! [`SERVER_NAME`], under which any node can be dialled before it is known which one answers.

mod ca;
mod files;
mod join;
mod join_client;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

pub use ca::{Ca, PendingIdentity, node_id_of};
pub use files::Identity;
pub use join::{JoinAuthority, JoinReply, JoinRequest, JoinToken};
pub use join_client::join;
#[cfg(test)]
pub(crate) use join_client::stranger_config;

/// The name that every node's certificate carries.
pub const SERVER_NAME: &str = "node.verbund";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A certificate, key or request cannot be read or was not made for this cluster.
    #[error("{what} is not usable: {why}")]
    Invalid { what: &'static str, why: String },
    #[error("cannot read or write {path}: {why}")]
    File { path: PathBuf, why: std::io::Error },
    /// Not a join token, or not a whole one.
    #[error(
        "this is not a join token ({why}); copy the whole line that `verbund token` printed, beginning with vbj1-"
    )]
    Token { why: &'static str },
    /// The cluster answered no.
    #[error("the cluster refused the join: {why}")]
    JoinRefused { why: String },
    /// No node of the cluster could be reached for the join.
    #[error("cannot join through {addr}: {why}")]
    JoinUnreachable {
        addr: std::net::SocketAddr,
        why: String,
    },
}

impl Error {
    fn invalid(what: &'static str, why: impl ToString) -> Self {
        Error::Invalid {
            what,
            why: why.to_string(),
        }
    }
}

//! What can go wrong with a replica.

use std::path::PathBuf;

use super::MAX_COMMAND_BYTES;
use crate::ids::NodeId;

/// Named for what the caller can do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Ask the leader; nothing was proposed.
    #[error("this replica does not lead; the leader is {}", .leader.map_or_else(|| "not known yet".to_owned(), |n| format!("node {n}")))]
    NotLeader { leader: Option<NodeId> },
    /// The disk refuses writes or holds broken data. The replica stands aside until writes work again.
    #[error(
        "the replica's disk fails: {why}; free space or mend the disk, the replica then goes on by itself"
    )]
    Storage { why: String },
    /// The directory was written by another version of the program.
    #[error("{dir} has data format {found:?}, this program reads {expected:?}; {remedy}")]
    Format {
        dir: PathBuf,
        found: String,
        expected: String,
        remedy: &'static str,
    },
    /// Another process uses the directory.
    #[error(
        "{dir} is in use by another process; stop that one, or give this one a directory of its own"
    )]
    Locked { dir: PathBuf },
    /// The directory belongs to another node or Raft group.
    #[error(
        "{dir} holds the data of {found}, expected {expected}; start with that node's own directory"
    )]
    Foreign {
        dir: PathBuf,
        found: String,
        expected: String,
    },
    /// The configuration cannot work.
    #[error("replica configuration: {why}")]
    Config { why: String },
    #[error(
        "a command of {bytes} bytes exceeds the limit of {}; split it",
        MAX_COMMAND_BYTES
    )]
    TooLarge { bytes: usize },
    /// Too many proposals are waiting; nothing was proposed.
    #[error("too many proposals are waiting; try again later")]
    Overloaded,
    /// Leadership or connection was lost on the way; the command may or may not take effect.
    #[error(
        "leadership changed before the command was known to be committed; it may still take effect"
    )]
    Interrupted,
    /// No majority answered in time; a proposed command may still take effect.
    #[error("no majority answered in time; check that most members are up")]
    Timeout,
    /// The replica was shut down.
    #[error("the replica was shut down")]
    Closed,
}

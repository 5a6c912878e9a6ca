//! Replication: Raft groups on RocksDB. A caller gives a deterministic [`StateMachine`] and gets a [`Replica`] whose
//! proposals are committed by a majority, survive crashes, and are applied in the same order on every member.
//!
//! Here belong the log, elections, snapshots, membership changes and the directory on disk. Not here: what a command
//! means (control, rag-store), finding the leader and trying again (their clients), and encryption of values (rag-store).
//!
//! Two threads serve a replica. The Raft thread (`core`) owns consensus: it writes the log, one synced write for all
//! that came in the meantime, and sends and receives messages. The apply thread (`apply`) takes committed entries
//! through the state machine. When a write fails, both end, and the replica starts again from what is on disk, as
//! after a crash; so nothing that only memory knew can be acknowledged.

mod apply;
mod core;
mod directory;
mod erase;
mod error;
mod log;
mod machine;
mod members;
mod metrics;
mod replica;
mod run;
mod snapshot;
mod store;
#[cfg(test)]
mod tests;
mod view;

pub use error::Error;
pub use machine::{StateMachine, Txn};
pub use replica::{AddressBook, Replica, ReplicaConfig, ReplicaStatus};
pub use view::{Scan, View};

/// Largest command: one document's chunks and vectors fit, and four fit in a transport frame.
pub const MAX_COMMAND_BYTES: usize = 4 * 1024 * 1024;

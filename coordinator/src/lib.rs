//! What a cluster is: who its nodes are, how they talk, and what they agree on.
//!
//! - [`ids`]: the newtypes that cross crate boundaries
//! - [`identity`]: cluster CA, node certificates, join tokens and the join handshake
//! - [`transport`]: mutually authenticated QUIC; one stream a request, frames, cancellation by dropping
//! - [`replication`]: Raft groups on RocksDB under a caller's state machine
//! - [`control`]: the replicated control state, its rules and services, and every node's handle to it
//!
//! Invariants: nothing here knows models, documents or HTTP; no peer is spoken to before its certificate is checked
//! against the cluster's CA (the join handshake, on its own protocol name, is the one exception); no caller's bytes are logged.

pub mod clock;
pub mod control;
pub mod identity;
pub mod ids;
pub mod redacted;
pub mod replication;
pub mod transport;

pub use redacted::Redacted;

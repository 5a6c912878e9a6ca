//! Control: what the whole cluster agrees on, and how every node learns it.
//!
//! Here belong the replicated control state (nodes, tenants, keys, deployments, groups and their epochs), the pure
//! rules that change it ([`ControlState::apply`]), the pure decision which groups to form ([`Formation`]), the services
//! that a coordinator offers, and [`ControlHandle`], through which every node reads and proposes.
//! Not here: how commands are replicated (room `replication`), what a rank computes (crate `worker`).
//!
//! Invariants: the state changes only by a committed [`Command`]; `revision` grows with each change; a group's epoch
//! only grows, also over removal and re-creation of its deployment; no secret of a key or token is stored, only its SHA-256.

mod command;
mod coordinator;
mod formation;
mod handle;
mod health;
mod join;
mod keys;
mod machine;
mod rules;
mod service;
mod state;
mod wire;

pub use command::{AdmitRequest, Command, Outcome, Rejection, Subject};
pub use coordinator::{Coordinator, CoordinatorConfig};
pub use formation::Formation;
pub use handle::{ControlHandle, Error};
pub use health::{
    GroupHealth, HEARTBEAT_INTERVAL_MS, HEARTBEAT_TTL_MS, Heartbeat, Liveness, Presence,
};
pub use join::{Admission, new_join_token};
pub use keys::{API_KEY_PREFIX, NewApiKey, api_key, api_key_from, random_secret, sha256};
pub use machine::ControlMachine;
pub use state::{
    ApiKey, Cluster, ControlState, Deployment, Group, GroupState, JoinTokenRecord, ModelKind, Node,
    RankAssignment, ShardReport, StoreGroup, Tenant,
};
pub use wire::ControlStatus;

pub use crate::ids::{Device, DeviceKind, Role};

/// Service names on the transport.
pub const SERVICE_PROPOSE: &str = "control.propose";
pub const SERVICE_READ: &str = "control.read";
pub const SERVICE_WATCH: &str = "control.watch";
pub const SERVICE_HEARTBEAT: &str = "control.heartbeat";
pub const SERVICE_STATUS: &str = "control.status";

/// The node id in an operator's certificate: it may do everything and runs nothing.
pub const OPERATOR: crate::ids::NodeId = crate::ids::NodeId(u64::MAX);

//! The commands that change the control state, what they give back, and why they are rejected.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::state::{
    ApiKey, Cluster, Deployment, JoinTokenRecord, Node, RankAssignment, ShardReport, StoreGroup,
};
use crate::ids::{Device, Epoch, GroupId, NodeId, Rank, Role, TenantId};

/// A change to the control state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Names the cluster; once.
    NameCluster(Cluster),
    /// A node with a certificate (again) says who and where it is. Sets `up`.
    RegisterNode(Node),
    /// Uses a join token and gives out a node id. Replies [`Outcome::Admitted`].
    AdmitNode(AdmitRequest),
    /// The control leader hears the node's heartbeats, or does not any more.
    SetNodeUp {
        node: NodeId,
        incarnation: u64,
        up: bool,
    },
    /// Removes a node for good and refuses its certificate.
    RemoveNode {
        node: NodeId,
    },
    CreateJoinToken {
        secret_sha256: [u8; 32],
        record: JoinTokenRecord,
    },
    /// Forgets tokens that expired before `now_ms`.
    ExpireJoinTokens {
        now_ms: u64,
    },
    CreateTenant {
        id: TenantId,
        name: String,
        now_ms: u64,
    },
    /// Removes the tenant and all its keys.
    RemoveTenant {
        id: TenantId,
    },
    CreateApiKey {
        sha256: [u8; 32],
        key: ApiKey,
    },
    /// Revokes by the key's public id; `tenant` must own it.
    RevokeApiKey {
        tenant: TenantId,
        id: String,
    },
    /// Creates or changes what the cluster serves under a model id.
    SetDeployment(Deployment),
    /// Stops serving a model and dissolves its group.
    RemoveDeployment {
        model: String,
    },
    /// Forms or re-forms the group of a deployment. `expect` is the epoch that the decision was based on (0 for none);
    /// the new epoch is larger than any before. Replies [`Outcome::Formed`].
    FormGroup {
        model: String,
        expect: Epoch,
        ranks: Vec<RankAssignment>,
        key: [u8; 32],
    },
    /// A rank has loaded its shard; when all have, the group is ready.
    RankReady {
        group: GroupId,
        epoch: Epoch,
        rank: Rank,
        report: ShardReport,
    },
    /// A rank cannot load its shard; the group fails with the reason.
    RankFailed {
        group: GroupId,
        epoch: Epoch,
        rank: Rank,
        reason: String,
    },
    /// Creates a Raft group of the store. Its members stay: nothing moves the data of one that leaves.
    CreateStoreGroup(StoreGroup),
}

/// What a joining node asks for, without its secrets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdmitRequest {
    pub secret_sha256: [u8; 32],
    pub name: String,
    pub addr: SocketAddr,
    pub roles: BTreeSet<Role>,
    pub data_addr: Option<SocketAddr>,
    pub devices: Vec<Device>,
    pub version: String,
    pub now_ms: u64,
}

/// What an accepted command gives back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Applied; the state's revision after it.
    Done {
        revision: u64,
    },
    Admitted {
        node: NodeId,
    },
    Formed {
        group: GroupId,
        epoch: Epoch,
    },
}

/// Why a command was not applied. The state is as before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Rejection {
    #[error("stale epoch: expected {expected:?}, got {got:?}; read the control state again")]
    StaleEpoch { expected: Epoch, got: Epoch },
    #[error("unknown {what} {id:?}; `verbund status` lists what exists")]
    Unknown { what: Subject, id: String },
    #[error("{what} {id:?} exists already")]
    Exists { what: Subject, id: String },
    #[error("the join token is unknown or was used; make a new one with `verbund token`")]
    TokenUnknown,
    #[error("the join token has expired; make a new one with `verbund token`")]
    TokenExpired,
    #[error("the join token does not allow the role {role}; allowed: {allowed}")]
    RoleNotAllowed { role: Role, allowed: String },
    #[error("node {} was removed from the cluster; it must join again with a new token", node.0)]
    Revoked { node: NodeId },
    #[error("{what}: expected {expected}, got {got}")]
    Invalid {
        what: String,
        expected: String,
        got: String,
    },
    #[error("too many {what}s: the limit is {limit}; remove what is no longer needed")]
    Limit { what: Subject, limit: usize },
}

/// What a [`Rejection`] speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Subject {
    Cluster,
    Node,
    Tenant,
    ApiKey,
    JoinToken,
    Model,
    Group,
    Rank,
    StoreGroup,
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Subject::Cluster => "cluster",
            Subject::Node => "node",
            Subject::Tenant => "tenant",
            Subject::ApiKey => "API key",
            Subject::JoinToken => "join token",
            Subject::Model => "model",
            Subject::Group => "group",
            Subject::Rank => "rank",
            Subject::StoreGroup => "store group",
        })
    }
}

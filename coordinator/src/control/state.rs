//! The replicated control state: one value, serialised as a whole.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::ids::{
    CONTROL_GROUP, Device, Epoch, GroupId, NodeId, RaftGroupId, Rank, Role, TenantId,
};

/// Everything that the cluster agrees on. Small (tens of kilobytes): it travels whole to every node on each change.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ControlState {
    /// Grows by one with each accepted command.
    pub revision: u64,
    pub cluster: Cluster,
    pub nodes: BTreeMap<NodeId, Node>,
    /// Nodes that were removed; their certificates are refused from then on.
    pub revoked: BTreeSet<NodeId>,
    pub tenants: BTreeMap<TenantId, Tenant>,
    /// By the SHA-256 of the key; the key itself is nowhere kept.
    pub api_keys: BTreeMap<[u8; 32], ApiKey>,
    /// By the SHA-256 of the token's secret.
    pub join_tokens: BTreeMap<[u8; 32], JoinTokenRecord>,
    /// By model id.
    pub deployments: BTreeMap<String, Deployment>,
    pub groups: BTreeMap<GroupId, Group>,
    pub store_groups: Vec<StoreGroup>,
    /// The highest node id ever given out.
    pub last_node: u64,
    /// The highest group id ever given out.
    pub last_group: u64,
    /// The highest epoch ever given to any group, so that an epoch never comes back.
    pub last_epoch: u64,
}

/// Name and identity of the cluster, set once.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    pub name: String,
    /// Hexadecimal fingerprint of the cluster's CA; empty until the first leader has set it.
    pub id: String,
}

/// One server process that runs `verbund node`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    /// Where its QUIC transport listens.
    pub addr: SocketAddr,
    /// Where its collectives listen; workers only.
    pub data_addr: Option<SocketAddr>,
    pub roles: BTreeSet<Role>,
    pub devices: Vec<Device>,
    /// Whether the control leader hears its heartbeats.
    pub up: bool,
    pub version: String,
    /// Changes with each start of the process, so that a quick restart is noticed.
    pub incarnation: u64,
}

/// A municipality.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    pub id: TenantId,
    pub name: String,
    /// The Raft group that keeps its documents; fixed at creation.
    pub store_group: RaftGroupId,
    pub created_ms: u64,
}

/// What an API key stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKey {
    /// Public name of the key (`key_` and 12 hexadecimal digits), by which it is listed and revoked.
    pub id: String,
    pub tenant: TenantId,
    pub name: String,
    /// Whether the key may administer its tenant.
    pub admin: bool,
    pub created_ms: u64,
}

/// A join token that has not been used yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenRecord {
    /// Roles that a node which joins with it may take.
    pub roles: BTreeSet<Role>,
    pub expires_ms: u64,
}

/// A model that the cluster shall serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    /// Its id in `/v1/models`.
    pub model: String,
    pub kind: ModelKind,
    /// File or folder, the same on every worker.
    pub path: String,
    /// Wished number of ranks; fewer serve while workers are missing.
    pub ranks: u32,
    /// Longest sequence, in tokens; 0 takes the model's own.
    pub context_tokens: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelKind {
    Generate,
    Embed,
}

/// The ranks that hold one model together.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    pub id: GroupId,
    pub model: String,
    pub kind: ModelKind,
    pub path: String,
    pub context_tokens: u32,
    pub epoch: Epoch,
    /// In rank order; rank 0 leads.
    pub ranks: Vec<RankAssignment>,
    pub state: GroupState,
    /// Encrypts the collectives of this epoch. Zero in what a node sees that hosts no rank of the group.
    pub key: [u8; 32],
    /// Why the last forming failed, kept until a forming succeeds.
    pub last_failure: Option<String>,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("id", &self.id)
            .field("model", &self.model)
            .field("epoch", &self.epoch)
            .field("ranks", &self.ranks)
            .field("state", &self.state)
            .field("last_failure", &self.last_failure)
            .finish_non_exhaustive()
    }
}

impl Group {
    /// The rank that runs the scheduler and takes requests.
    pub fn leader(&self) -> Option<&RankAssignment> {
        self.ranks.first()
    }

    /// The rank that `node` hosts, if any.
    pub fn rank_on(&self, node: NodeId) -> Option<&RankAssignment> {
        self.ranks.iter().find(|r| r.node == node)
    }
}

/// One rank of a group: where it runs and, once loaded, what it holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankAssignment {
    pub rank: Rank,
    pub node: NodeId,
    /// The node's process at the time of forming; another incarnation has lost this rank.
    pub incarnation: u64,
    pub data_addr: SocketAddr,
    pub device: Device,
    /// `Some` once the rank is loaded.
    pub report: Option<ShardReport>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupState {
    Forming,
    Ready,
    Failed { reason: String },
}

/// What a rank holds. Ranges are half-open.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardReport {
    pub query_heads: (u32, u32),
    pub kv_heads: (u32, u32),
    pub ffn_columns: (u32, u32),
    pub vocab_rows: (u32, u32),
    pub layers: u32,
    /// Packed weights in memory.
    pub weight_bytes: u64,
    /// Bytes of the model file that this rank touched.
    pub mapped_bytes: u64,
    pub kv_bytes: u64,
    pub context_tokens: u32,
}

/// A Raft group of the store and its voters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreGroup {
    pub id: RaftGroupId,
    pub members: Vec<NodeId>,
}

impl ControlState {
    /// The group that serves `model`, if one was formed.
    pub fn group_of(&self, model: &str) -> Option<&Group> {
        self.groups.values().find(|g| g.model == model)
    }

    /// The Raft group that keeps the documents of `tenant`.
    pub fn store_group_of(&self, tenant: &TenantId) -> Option<&StoreGroup> {
        let id = self.tenants.get(tenant)?.store_group;
        self.store_groups.iter().find(|g| g.id == id)
    }

    /// Whether `node` may speak as a member of Raft group `group`: coordinators in the control group, a store group's
    /// members in that one. A removed node is no node any more.
    pub fn is_peer(&self, group: RaftGroupId, node: NodeId) -> bool {
        let Some(known) = self.nodes.get(&node) else {
            return false;
        };
        if group == CONTROL_GROUP {
            return known.roles.contains(&Role::Coordinator);
        }
        self.store_groups
            .iter()
            .any(|g| g.id == group && g.members.contains(&node))
    }

    /// Nodes that have `role`, in id order.
    pub fn nodes_with(&self, role: Role) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(move |n| n.roles.contains(&role))
    }

    /// The state as `node` may see it: group keys only of groups that it hosts a rank of.
    pub fn seen_by(&self, node: NodeId) -> ControlState {
        let mut state = self.clone();
        for group in state.groups.values_mut() {
            if group.rank_on(node).is_none() {
                group.key = [0; 32];
            }
        }
        state
    }
}

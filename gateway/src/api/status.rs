//! `GET /api/status`: the cluster as the gateway sees it, for the operator.

use axum::Json as Reply;
use axum::extract::State;
use coordinator::control::{ControlState, Group, GroupState, ModelKind, Node, RankAssignment};
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::health::Lack;
use crate::http::auth::Admin;

/// The cluster's state. No key, token or content is in it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    pub cluster: String,
    /// Grows with each change.
    pub revision: u64,
    pub nodes: Vec<NodeStatus>,
    pub groups: Vec<GroupStatus>,
    /// The store's Raft groups and the nodes that keep them.
    pub store_groups: Vec<StoreGroupStatus>,
    pub tenants: usize,
    /// What the cluster lacks for answering, with the details that `GET /ready` keeps back; empty when it is ready.
    pub problems: Vec<String>,
}

/// A server process.
#[derive(Debug, Serialize, ToSchema)]
pub struct NodeStatus {
    pub id: u64,
    pub name: String,
    pub addr: String,
    pub roles: Vec<String>,
    /// Whether the coordinators hear it.
    pub up: bool,
    pub version: String,
}

/// The ranks that hold one model.
#[derive(Debug, Serialize, ToSchema)]
pub struct GroupStatus {
    pub id: u64,
    pub model: String,
    /// `generate` or `embed`.
    pub kind: &'static str,
    /// Grows with each forming.
    pub epoch: u64,
    /// `forming`, `ready` or `failed`.
    pub state: &'static str,
    /// Why it failed, or why the last forming did.
    pub reason: Option<String>,
    pub ranks: Vec<RankStatus>,
}

/// One shard of a model. Ranges are half-open.
#[derive(Debug, Serialize, ToSchema)]
pub struct RankStatus {
    pub rank: u32,
    pub node: u64,
    pub device: String,
    /// Null until it is loaded.
    pub query_heads: Option<[u32; 2]>,
    pub kv_heads: Option<[u32; 2]>,
    pub ffn_columns: Option<[u32; 2]>,
    pub vocab_rows: Option<[u32; 2]>,
    pub weight_bytes: Option<u64>,
    pub mapped_bytes: Option<u64>,
    pub kv_bytes: Option<u64>,
}

/// A Raft group of the store.
#[derive(Debug, Serialize, ToSchema)]
pub struct StoreGroupStatus {
    pub id: u64,
    pub members: Vec<u64>,
}

impl From<&Node> for NodeStatus {
    fn from(node: &Node) -> Self {
        Self {
            id: node.id.0,
            name: node.name.clone(),
            addr: node.addr.to_string(),
            roles: node.roles.iter().map(ToString::to_string).collect(),
            up: node.up,
            version: node.version.clone(),
        }
    }
}

impl From<&Group> for GroupStatus {
    fn from(group: &Group) -> Self {
        let (state, reason) = match &group.state {
            GroupState::Forming => ("forming", group.last_failure.clone()),
            GroupState::Ready => ("ready", group.last_failure.clone()),
            GroupState::Failed { reason } => ("failed", Some(reason.clone())),
        };
        Self {
            id: group.id.0,
            model: group.model.clone(),
            kind: match group.kind {
                ModelKind::Generate => "generate",
                ModelKind::Embed => "embed",
            },
            epoch: group.epoch.0,
            state,
            reason,
            ranks: group.ranks.iter().map(RankStatus::from).collect(),
        }
    }
}

impl From<&RankAssignment> for RankStatus {
    fn from(rank: &RankAssignment) -> Self {
        let report = rank.report.as_ref();
        let range = |(from, to): (u32, u32)| [from, to];
        Self {
            rank: rank.rank.0,
            node: rank.node.0,
            device: rank.device.name.clone(),
            query_heads: report.map(|report| range(report.query_heads)),
            kv_heads: report.map(|report| range(report.kv_heads)),
            ffn_columns: report.map(|report| range(report.ffn_columns)),
            vocab_rows: report.map(|report| range(report.vocab_rows)),
            weight_bytes: report.map(|report| report.weight_bytes),
            mapped_bytes: report.map(|report| report.mapped_bytes),
            kv_bytes: report.map(|report| report.kv_bytes),
        }
    }
}

impl Status {
    fn new(state: &ControlState, problems: &[Lack]) -> Self {
        let store_group = |group: &coordinator::control::StoreGroup| StoreGroupStatus {
            id: group.id.0,
            members: group.members.iter().map(|node| node.0).collect(),
        };
        Self {
            cluster: state.cluster.name.clone(),
            revision: state.revision,
            nodes: state.nodes.values().map(NodeStatus::from).collect(),
            groups: state.groups.values().map(GroupStatus::from).collect(),
            store_groups: state.store_groups.iter().map(store_group).collect(),
            tenants: state.tenants.len(),
            problems: problems.iter().map(Lack::to_string).collect(),
        }
    }
}

/// Nodes, model groups with their shards, and the store's groups. Needs an operator's key.
#[utoipa::path(
    get, path = "/api/status", tag = "administration",
    responses(
        (status = 200, body = Status),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 403, description = "Not an operator's key", body = ErrorBody)
    )
)]
pub async fn get(State(app): State<App>, admin: Admin) -> Result<Reply<Status>, ApiError> {
    admin.require_operator()?;
    let problems = app.readiness.get(&app).await;
    Ok(Reply(Status::new(&app.control.state(), &problems)))
}

//! `verbund status`: members, leader, epochs, and what each rank holds.

use anyhow::Result;
use coordinator::control::{ControlState, ControlStatus, Group, GroupState, RankAssignment};
use serde_json::{Value, json};

use super::{Operator, bytes, print_json, print_table};

/// Prints the cluster's state, linearizable.
pub async fn status(operator: &Operator, as_json: bool) -> Result<()> {
    let state = operator.control.read().await?;
    let raft = operator.control.control_status().await?;
    if as_json {
        print_json(&to_json(&state, &raft))
    } else {
        print(&state, &raft)
    }
}

fn to_json(state: &ControlState, raft: &ControlStatus) -> Value {
    let nodes: Vec<_> = state.nodes.values().map(|n| json!({
        "id": n.id, "name": n.name, "addr": n.addr, "data_addr": n.data_addr, "roles": n.roles, "up": n.up,
        "version": n.version, "devices": n.devices, "leader": Some(n.id) == raft.leader,
        "voter": raft.voters.contains(&n.id),
    })).collect();
    let groups: Vec<_> = state.groups.values().map(group_json).collect();
    let waiting: Vec<_> = state
        .deployments
        .values()
        .filter(|d| state.group_of(&d.model).is_none())
        .collect();
    let stores: Vec<_> = state
        .store_groups
        .iter()
        .map(|g| json!({"id": g.id, "members": g.members}))
        .collect();
    json!({
        "cluster": state.cluster, "revision": state.revision, "leader": raft.leader, "term": raft.term,
        "commit": raft.commit, "applied": raft.applied, "voters": raft.voters, "nodes": nodes,
        "deployments": state.deployments.values().collect::<Vec<_>>(), "groups": groups,
        "waiting_for_workers": waiting.iter().map(|d| &d.model).collect::<Vec<_>>(), "store_groups": stores,
        "tenants": state.tenants.len(), "api_keys": state.api_keys.len(), "join_tokens": state.join_tokens.len(),
    })
}

fn group_json(group: &Group) -> Value {
    let ranks: Vec<_> = group.ranks.iter().map(rank_json).collect();
    let (name, reason) = state_name(&group.state);
    json!({
        "id": group.id, "model": group.model, "kind": group.kind, "path": group.path, "epoch": group.epoch,
        "state": name, "reason": reason, "last_failure": group.last_failure, "ranks": ranks,
    })
}

/// The report's fields stand beside the assignment's, and are absent until the rank has loaded.
fn rank_json(rank: &RankAssignment) -> Value {
    let mut value = json!({
        "rank": rank.rank, "node": rank.node, "data_addr": rank.data_addr, "device": rank.device,
        "ready": rank.report.is_some(),
    });
    let report = rank
        .report
        .as_ref()
        .and_then(|r| serde_json::to_value(r).ok());
    if let (Some(Value::Object(report)), Value::Object(fields)) = (report, &mut value) {
        fields.extend(report);
    }
    value
}

fn state_name(state: &GroupState) -> (&'static str, Option<&str>) {
    match state {
        GroupState::Forming => ("forming", None),
        GroupState::Ready => ("ready", None),
        GroupState::Failed { reason } => ("failed", Some(reason)),
    }
}

fn print(state: &ControlState, raft: &ControlStatus) -> Result<()> {
    let name = |id| {
        state
            .nodes
            .get(&id)
            .map_or_else(|| format!("node {id}"), |n| n.name.clone())
    };
    let leader = raft.leader.map_or_else(|| "none".to_owned(), name);
    println!(
        "Cluster {} · leader {leader} · term {} · revision {}",
        state.cluster.name, raft.term, state.revision
    );
    println!();
    let rows: Vec<_> = state
        .nodes
        .values()
        .map(|n| {
            let roles: Vec<_> = n.roles.iter().map(ToString::to_string).collect();
            let memory: u64 = n.devices.iter().map(|d| d.memory_bytes).sum();
            vec![
                n.id.to_string(),
                n.name.clone(),
                if n.up { "up" } else { "down" }.to_owned(),
                roles.join(","),
                n.addr.to_string(),
                if n.devices.is_empty() {
                    String::new()
                } else {
                    bytes(memory)
                },
                n.version.clone(),
            ]
        })
        .collect();
    print_table(
        &[
            "ID", "NODE", "STATE", "ROLES", "ADDRESS", "MEMORY", "VERSION",
        ],
        &rows,
    );
    for group in state.groups.values() {
        println!();
        let (text, reason) = state_name(&group.state);
        let reason = reason
            .or(group.last_failure.as_deref())
            .map(|r| format!(": {r}"))
            .unwrap_or_default();
        println!(
            "{} · group {} · epoch {} · {text}{reason}",
            group.model, group.id, group.epoch
        );
        let rows: Vec<_> = group
            .ranks
            .iter()
            .map(|rank| rank_row(rank, name(rank.node)))
            .collect();
        let head = [
            "RANK",
            "NODE",
            "HEADS",
            "KV HEADS",
            "FFN COLUMNS",
            "VOCABULARY",
            "WEIGHTS",
            "MAPPED",
            "KV CACHE",
        ];
        print_table(&head, &rows);
    }
    for deployment in state
        .deployments
        .values()
        .filter(|d| state.group_of(&d.model).is_none())
    {
        println!(
            "\n{} · waits for workers; start one with the role worker",
            deployment.model
        );
    }
    for group in &state.store_groups {
        let members: Vec<_> = group.members.iter().map(|id| name(*id)).collect();
        println!("\nStore group {} on {}", group.id, members.join(", "));
    }
    Ok(())
}

fn rank_row(rank: &RankAssignment, node: String) -> Vec<String> {
    let range = |(from, to): (u32, u32)| format!("{from}..{to} ({})", to.saturating_sub(from));
    let mut row = vec![rank.rank.to_string(), node];
    match &rank.report {
        Some(r) => row.extend([
            range(r.query_heads),
            range(r.kv_heads),
            range(r.ffn_columns),
            range(r.vocab_rows),
            bytes(r.weight_bytes),
            bytes(r.mapped_bytes),
            bytes(r.kv_bytes),
        ]),
        None => row.push("loading".to_owned()),
    }
    row
}

use coordinator::control::{Deployment, Group, Node, StoreGroup};
use coordinator::ids::{Epoch, GroupId, NodeId, RaftGroupId};

use super::*;

fn group(id: u64, kind: ModelKind, state: GroupState) -> Group {
    Group {
        id: GroupId(id),
        model: format!("model-{id}"),
        kind,
        path: String::new(),
        context_tokens: 512,
        epoch: Epoch(1),
        ranks: Vec::new(),
        state,
        key: [0; 32],
        last_failure: None,
    }
}

fn node(id: u64, up: bool) -> Node {
    Node {
        id: NodeId(id),
        name: format!("node-{id}"),
        addr: "127.0.0.1:1".parse().unwrap(),
        data_addr: None,
        roles: Default::default(),
        devices: Vec::new(),
        up,
        version: String::new(),
        incarnation: 1,
    }
}

fn deployment(model: &str, kind: ModelKind) -> Deployment {
    Deployment {
        model: model.to_owned(),
        kind,
        path: String::new(),
        ranks: 1,
        context_tokens: 0,
    }
}

/// A cluster that lacks nothing.
fn whole() -> ControlState {
    let mut state = ControlState {
        revision: 9,
        ..ControlState::default()
    };
    for id in 1..=3 {
        state.nodes.insert(NodeId(id), node(id, true));
    }
    state.store_groups.push(StoreGroup {
        id: RaftGroupId(1),
        members: vec![NodeId(1), NodeId(2), NodeId(3)],
    });
    for (id, kind) in [(1, ModelKind::Generate), (2, ModelKind::Embed)] {
        let group = group(id, kind, GroupState::Ready);
        let model = group.model.clone();
        state
            .deployments
            .insert(model.clone(), deployment(&model, kind));
        state.groups.insert(GroupId(id), group);
    }
    state
}

#[test]
fn a_whole_cluster_lacks_nothing_also_with_one_store_node_down() {
    let mut state = whole();
    assert_eq!(missing(&state), []);
    state.nodes.insert(NodeId(3), node(3, false));
    assert_eq!(missing(&state), []);
}

#[test]
fn what_is_missing_is_said() {
    type Change = fn(&mut ControlState);
    let cases: Vec<(&str, Change)> = vec![
        ("no coordinator", |state| *state = ControlState::default()),
        ("no chat model", |state| {
            drop(state.groups.remove(&GroupId(1)))
        }),
        ("no embedding model", |state| {
            drop(state.groups.remove(&GroupId(2)))
        }),
        ("the chat model is being loaded: model-1", |state| {
            state.groups.insert(
                GroupId(1),
                group(1, ModelKind::Generate, GroupState::Forming),
            );
        }),
        ("could not be loaded: model-1: too large", |state| {
            let failed = GroupState::Failed {
                reason: "too large".into(),
            };
            state
                .groups
                .insert(GroupId(1), group(1, ModelKind::Generate, failed));
        }),
        ("the store has no group", |state| state.store_groups.clear()),
        ("1 of 3 members up", |state| {
            state.nodes.insert(NodeId(2), node(2, false));
            state.nodes.insert(NodeId(3), node(3, false));
        }),
    ];
    for (part, change) in cases {
        let mut state = whole();
        change(&mut state);
        let lacks: Vec<String> = missing(&state).iter().map(Lack::to_string).collect();
        assert!(
            lacks.len() == 1 && lacks[0].contains(part),
            "{part}: {lacks:?}"
        );
    }
}

#[test]
fn an_embedding_model_is_needed_only_where_one_is_deployed() {
    let mut state = whole();
    state.groups.remove(&GroupId(2));
    assert_eq!(missing(&state).len(), 1);
    state.deployments.remove("model-2");
    assert_eq!(missing(&state), []);
}

#[test]
fn what_everybody_may_read_names_no_model_and_no_reason() {
    let mut state = whole();
    let failed = GroupState::Failed {
        reason: "the file of Stadt Musterstadt".into(),
    };
    state
        .groups
        .insert(GroupId(1), group(1, ModelKind::Generate, failed));
    let lacks = missing(&state);
    assert_eq!(lacks[0].what, "the chat model could not be loaded");
    assert!(
        lacks[0].to_string().contains("model-1") && lacks[0].to_string().contains("Musterstadt")
    );
}

#[test]
fn one_ready_group_of_a_kind_is_enough() {
    let mut state = whole();
    state.groups.insert(
        GroupId(3),
        group(3, ModelKind::Generate, GroupState::Forming),
    );
    assert_eq!(missing(&state), []);
}

#[test]
fn only_this_machine_itself_is_local() {
    let local: IpAddr = "127.0.0.1".parse().unwrap();
    let mapped: IpAddr = "::ffff:127.0.0.1".parse().unwrap();
    let other: IpAddr = "192.0.2.7".parse().unwrap();
    let none = HeaderMap::new();
    assert!(is_local(Some(local), &none) && is_local(Some(mapped), &none));
    assert!(!is_local(Some(other), &none) && !is_local(None, &none));
    let mut proxied = HeaderMap::new();
    proxied.insert("x-forwarded-for", "198.51.100.1".parse().unwrap());
    assert!(!is_local(Some(local), &proxied));
}

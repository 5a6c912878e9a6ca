//! What the services take from whom, as pure decisions.

use super::*;
use crate::control::{
    GroupHealth, GroupState, ModelKind, RankAssignment, StoreGroup, state::Group, state::Node,
};
use crate::ids::{CONTROL_GROUP, Device, DeviceKind, Epoch, GroupId, RaftGroupId, Rank};

fn node(id: u64, role: Role) -> Node {
    Node {
        id: NodeId(id),
        name: format!("node{id}"),
        addr: ([127, 0, 0, 1], 4000).into(),
        data_addr: None,
        roles: [role].into(),
        devices: Vec::new(),
        up: true,
        version: "1".into(),
        incarnation: 1,
    }
}

/// Coordinator 1, store nodes 2 and 3 of which 2 is in group 1, workers 11 and 12 with ranks 0 and 1 of group 7.
fn state() -> ControlState {
    let mut state = ControlState::default();
    let nodes = [
        node(1, Role::Coordinator),
        node(2, Role::Store),
        node(3, Role::Store),
        node(11, Role::Worker),
        node(12, Role::Worker),
    ];
    state.nodes.extend(nodes.map(|n| (n.id, n)));
    state.store_groups.push(StoreGroup {
        id: RaftGroupId(1),
        members: vec![NodeId(2)],
    });
    let rank = |at: u32, host: u64| RankAssignment {
        rank: Rank(at),
        node: NodeId(host),
        incarnation: 1,
        data_addr: ([127, 0, 0, 1], 5000).into(),
        device: Device {
            kind: DeviceKind::Cpu,
            name: "cpu".into(),
            memory_bytes: 1,
            read_bytes_per_s: 1,
            threads: 1,
        },
        report: None,
    };
    state.groups.insert(
        GroupId(7),
        Group {
            id: GroupId(7),
            model: "m".into(),
            kind: ModelKind::Generate,
            path: "/m".into(),
            context_tokens: 0,
            epoch: Epoch(5),
            ranks: vec![rank(0, 11), rank(1, 12)],
            state: GroupState::Ready,
            key: [0; 32],
            last_failure: None,
        },
    );
    state
}

#[test]
fn a_heartbeat_speaks_only_of_the_ranks_that_its_node_hosts() {
    let health = |group: u64, epoch: u64, rank: u32| GroupHealth {
        group: GroupId(group),
        epoch: Epoch(epoch),
        rank: Rank(rank),
        active_requests: 0,
        broken: Some("it broke".into()),
    };
    let cases = [
        (11, health(7, 5, 0), true, "its own rank"),
        (12, health(7, 5, 1), true, "its own rank"),
        (12, health(7, 5, 0), false, "another node's rank"),
        (11, health(7, 4, 0), false, "an epoch that is gone"),
        (11, health(8, 5, 0), false, "no such group"),
        (2, health(7, 5, 0), false, "a node that hosts nothing"),
    ];
    for (from, health, kept, why) in cases {
        let mut heartbeat = Heartbeat {
            node: NodeId(from),
            incarnation: 1,
            revision: 1,
            groups: vec![health],
        };
        only_own_ranks(&mut heartbeat, &state());
        assert_eq!(heartbeat.groups.len() == 1, kept, "{why}");
    }
}

#[test]
fn raft_peers_are_the_coordinators_and_each_store_groups_members() {
    let mut state = state();
    let peers = |state: &ControlState, group: RaftGroupId| -> Vec<u64> {
        (0..20)
            .filter(|id| state.is_peer(group, NodeId(*id)))
            .collect()
    };
    assert_eq!(peers(&state, CONTROL_GROUP), [1]);
    assert_eq!(peers(&state, RaftGroupId(1)), [2]);
    assert!(peers(&state, RaftGroupId(2)).is_empty());
    state
        .apply(Command::RemoveNode { node: NodeId(2) })
        .expect("removed");
    assert!(peers(&state, RaftGroupId(1)).is_empty());
}

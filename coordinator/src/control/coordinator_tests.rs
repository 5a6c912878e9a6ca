//! Who should vote, as a pure decision.

use super::*;
use crate::control::Node;

fn ids(ids: &[u64]) -> BTreeSet<NodeId> {
    ids.iter().copied().map(NodeId).collect()
}

fn state(coordinators_up: &[u64], down: &[u64], revoked: &[u64]) -> ControlState {
    let mut state = ControlState {
        revoked: ids(revoked),
        ..ControlState::default()
    };
    for id in coordinators_up.iter().chain(down) {
        let node = Node {
            id: NodeId(*id),
            name: "node".into(),
            addr: ([127, 0, 0, 1], 4000).into(),
            data_addr: None,
            roles: [Role::Coordinator].into(),
            devices: Vec::new(),
            up: coordinators_up.contains(id),
            version: "1".into(),
            incarnation: 1,
        };
        state.nodes.insert(node.id, node);
    }
    state
}

#[test]
fn newcomers_become_voters_one_by_one_and_removed_ones_leave() {
    let voting = |voters: &[u64], learners: &[u64]| ReplicaStatus {
        voters: ids(voters),
        learners: ids(learners),
        ..ReplicaStatus::default()
    };
    let cases = [
        (voting(&[1, 2, 3], &[]), state(&[1, 2, 3], &[], &[]), None),
        (voting(&[1, 2, 3], &[]), state(&[1, 2], &[3], &[]), None),
        (voting(&[1, 2, 3], &[]), state(&[1, 2, 3], &[4], &[]), None),
        (
            voting(&[1, 2, 3], &[]),
            state(&[1, 2, 3, 4, 5], &[], &[]),
            Some(ids(&[1, 2, 3, 4])),
        ),
        (
            voting(&[1, 2, 3], &[]),
            state(&[1, 2], &[], &[3]),
            Some(ids(&[1, 2])),
        ),
        (
            voting(&[1, 2, 3], &[]),
            state(&[1, 2, 4], &[], &[3]),
            Some(ids(&[1, 2, 4])),
        ),
        (
            voting(&[1, 2, 3], &[4]),
            state(&[1, 2, 3], &[], &[4]),
            Some(ids(&[1, 2, 3])),
        ),
        (
            voting(&[1, 2, 3, 4, 5, 6, 7], &[]),
            state(&[1, 2, 3, 4, 5, 6, 7, 8], &[], &[]),
            None,
        ),
        // The last voter cannot leave.
        (voting(&[1], &[]), state(&[], &[], &[1]), None),
    ];
    for (number, (status, state, wanted)) in cases.into_iter().enumerate() {
        assert_eq!(wanted_voters(&status, &state), wanted, "case {number}");
    }
}

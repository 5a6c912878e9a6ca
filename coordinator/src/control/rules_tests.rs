//! The rules of the control state, as a table of histories: given these accepted commands, this one has this result.

use super::*;
use crate::control::{ModelKind, api_key_from, sha256};
use crate::ids::{Device, DeviceKind};

fn tenant(id: &str) -> TenantId {
    TenantId::new(id).expect("a valid tenant id")
}

fn device() -> Device {
    Device {
        kind: DeviceKind::Cpu,
        name: "cpu".into(),
        memory_bytes: 1 << 30,
        read_bytes_per_s: 1 << 30,
        threads: 1,
    }
}

fn node(id: u64, roles: &[Role]) -> Node {
    Node {
        id: NodeId(id),
        name: format!("node{id}"),
        addr: ([127, 0, 0, 1], 4000 + (id % 1000) as u16).into(),
        data_addr: Some(([127, 0, 0, 1], 5000 + (id % 1000) as u16).into()),
        roles: roles.iter().copied().collect(),
        devices: vec![device()],
        up: false,
        version: "1".into(),
        incarnation: 1,
    }
}

fn rank(at: u32, node: u64) -> RankAssignment {
    let data_addr = ([127, 0, 0, 1], 5000 + node as u16).into();
    RankAssignment {
        rank: Rank(at),
        node: NodeId(node),
        incarnation: 1,
        data_addr,
        device: device(),
        report: None,
    }
}

fn deployment(model: &str, ranks: u32) -> Command {
    let path = "/models/m.gguf".to_owned();
    Command::SetDeployment(Deployment {
        model: model.into(),
        kind: ModelKind::Generate,
        path,
        ranks,
        context_tokens: 0,
    })
}

fn form(expect: u64, nodes: &[u64]) -> Command {
    let ranks = nodes
        .iter()
        .enumerate()
        .map(|(at, n)| rank(at as u32, *n))
        .collect();
    Command::FormGroup {
        model: "m".into(),
        expect: Epoch(expect),
        ranks,
        key: [7; 32],
    }
}

fn ready(epoch: u64, at: u32) -> Command {
    Command::RankReady {
        group: GroupId(1),
        epoch: Epoch(epoch),
        rank: Rank(at),
        report: ShardReport::default(),
    }
}

fn failed(epoch: u64, at: u32, reason: &str) -> Command {
    Command::RankFailed {
        group: GroupId(1),
        epoch: Epoch(epoch),
        rank: Rank(at),
        reason: reason.into(),
    }
}

fn token(expires_ms: u64, roles: &[Role]) -> Command {
    let record = JoinTokenRecord {
        roles: roles.iter().copied().collect(),
        expires_ms,
    };
    Command::CreateJoinToken {
        secret_sha256: [1; 32],
        record,
    }
}

fn admit(now_ms: u64, roles: &[Role]) -> Command {
    let node = node(0, roles);
    Command::AdmitNode(AdmitRequest {
        secret_sha256: [1; 32],
        name: "new".into(),
        addr: node.addr,
        roles: node.roles,
        data_addr: None,
        devices: Vec::new(),
        version: "1".into(),
        now_ms,
    })
}

fn key(secret: &str, of: &str) -> Command {
    let new = api_key_from(secret.to_owned(), tenant(of), "portal", false, 1);
    Command::CreateApiKey {
        sha256: new.sha256,
        key: new.key,
    }
}

fn create(id: &str) -> Command {
    Command::CreateTenant {
        id: tenant(id),
        name: id.to_owned(),
        now_ms: 1,
    }
}

fn register(id: u64, roles: &[Role]) -> Command {
    Command::RegisterNode(node(id, roles))
}

/// Two workers and a deployment of two ranks.
fn workers() -> Vec<Command> {
    vec![
        register(1, &[Role::Worker]),
        register(2, &[Role::Worker]),
        deployment("m", 2),
    ]
}

fn after(history: &[Command]) -> ControlState {
    let mut state = ControlState::default();
    for command in history {
        state
            .apply(command.clone())
            .unwrap_or_else(|e| panic!("{command:?} in the history was rejected: {e}"));
    }
    state
}

fn with(mut history: Vec<Command>, more: impl IntoIterator<Item = Command>) -> Vec<Command> {
    history.extend(more);
    history
}

#[test]
fn every_rejection_says_why_and_changes_nothing() {
    let stale = |expected, got| Rejection::StaleEpoch {
        expected: Epoch(expected),
        got: Epoch(got),
    };
    let unknown = |what, id: &str| Rejection::Unknown {
        what,
        id: id.to_owned(),
    };
    let exists = |what, id: &str| Rejection::Exists {
        what,
        id: id.to_owned(),
    };
    let formed = || with(workers(), [form(0, &[1, 2])]);
    let cases: Vec<(&str, Vec<Command>, Command, Rejection)> = vec![
        (
            "a decision on an epoch that is gone",
            formed(),
            form(0, &[1]),
            stale(1, 0),
        ),
        (
            "a decision on an epoch that never was",
            formed(),
            form(2, &[1]),
            stale(1, 2),
        ),
        (
            "a report of an earlier epoch",
            with(formed(), [form(1, &[1])]),
            ready(1, 0),
            stale(2, 1),
        ),
        (
            "a failure of an earlier epoch",
            with(formed(), [form(1, &[1])]),
            failed(1, 0, "x"),
            stale(2, 1),
        ),
        (
            "a report of a later epoch",
            formed(),
            ready(9, 0),
            stale(1, 9),
        ),
        (
            "a report of a rank that is none",
            formed(),
            ready(1, 2),
            unknown(Subject::Rank, "2"),
        ),
        (
            "a report of no group",
            workers(),
            ready(1, 0),
            unknown(Subject::Group, "1"),
        ),
        (
            "a group on an unknown node",
            workers(),
            form(0, &[1, 9]),
            unknown(Subject::Node, "9"),
        ),
        (
            "a group of no deployment",
            vec![],
            form(0, &[1]),
            unknown(Subject::Model, "m"),
        ),
        (
            "an unknown token",
            vec![],
            admit(5, &[Role::Worker]),
            Rejection::TokenUnknown,
        ),
        (
            "an expired token",
            vec![token(4, &[Role::Worker])],
            admit(5, &[Role::Worker]),
            Rejection::TokenExpired,
        ),
        (
            "a token that was used",
            vec![token(9, &[Role::Worker]), admit(5, &[Role::Worker])],
            admit(5, &[Role::Worker]),
            Rejection::TokenUnknown,
        ),
        (
            "a role that the token does not give",
            vec![token(9, &[Role::Worker])],
            admit(5, &[Role::Coordinator]),
            Rejection::RoleNotAllowed {
                role: Role::Coordinator,
                allowed: "worker".into(),
            },
        ),
        (
            "a tenant twice",
            vec![create("a")],
            create("a"),
            exists(Subject::Tenant, "a"),
        ),
        (
            "a key of no tenant",
            vec![],
            key("vb-1", "a"),
            unknown(Subject::Tenant, "a"),
        ),
        (
            "another tenant's key",
            vec![create("a"), create("b"), key("vb-1", "a")],
            Command::RevokeApiKey {
                tenant: tenant("b"),
                id: format!("key_{}", hex::encode(&sha256(b"vb-1")[..6])),
            },
            unknown(
                Subject::ApiKey,
                &format!("key_{}", hex::encode(&sha256(b"vb-1")[..6])),
            ),
        ),
        (
            "a removed node",
            vec![
                register(1, &[Role::Worker]),
                Command::RemoveNode { node: NodeId(1) },
            ],
            register(1, &[Role::Worker]),
            Rejection::Revoked { node: NodeId(1) },
        ),
        (
            "a store group on a node without a store",
            vec![register(1, &[Role::Worker])],
            Command::CreateStoreGroup(StoreGroup {
                id: RaftGroupId(1),
                members: vec![NodeId(1)],
            }),
            unknown(Subject::Node, "1"),
        ),
    ];
    for (what, history, command, expected) in cases {
        let mut state = after(&history);
        let before = state.clone();
        assert_eq!(state.apply(command), Err(expected), "{what}");
        assert_eq!(state, before, "{what}: a rejection changes nothing");
    }
}

#[test]
fn a_node_keeps_to_its_roles_but_a_coordinator_chooses_its_own() {
    let mut state = after(&[
        register(1, &[Role::Worker, Role::Gateway]),
        register(2, &[Role::Coordinator]),
    ]);
    let fewer = state.apply(register(1, &[Role::Worker]));
    assert!(fewer.is_ok(), "{fewer:?}");
    let more = state.apply(register(1, &[Role::Worker, Role::Store]));
    assert!(
        matches!(&more, Err(Rejection::Invalid { got, .. }) if got == "store, worker"),
        "{more:?}"
    );
    let more = state.apply(register(2, &[Role::Coordinator, Role::Store]));
    assert!(more.is_ok(), "{more:?}");
}

#[test]
fn ids_ranks_and_names_that_make_no_sense_are_invalid() {
    let with_devices = |devices: Vec<Device>, version: usize| {
        let mut node = node(1, &[Role::Worker]);
        (node.devices, node.version) = (devices, "x".repeat(version));
        Command::RegisterNode(node)
    };
    let named = |bytes: usize| Device {
        name: "x".repeat(bytes),
        ..device()
    };
    let most = with_devices(vec![named(200); 16], 200);
    assert!(after(&workers()).apply(most).is_ok());
    let Command::AdmitNode(mut greedy) = admit(5, &[Role::Worker]) else {
        panic!("an admission");
    };
    greedy.devices = vec![device(); 17];
    let cases = vec![
        with_devices(vec![device(); 17], 1),
        with_devices(vec![named(201)], 1),
        with_devices(Vec::new(), 201),
        Command::AdmitNode(greedy),
        register(0, &[Role::Worker]),
        register(OPERATOR.0, &[Role::Worker]),
        register(1, &[]),
        deployment("m", 0),
        deployment("", 1),
        deployment("a\nb", 1),
        form(0, &[]),
        form(0, &[1, 1]),
    ];
    for command in cases {
        let got = after(&workers()).apply(command.clone());
        assert!(
            matches!(got, Err(Rejection::Invalid { .. })),
            "{command:?}: {got:?}"
        );
    }
}

#[test]
fn a_group_is_ready_when_its_last_rank_is() {
    let state = after(&with(workers(), [form(0, &[1, 2]), ready(1, 1)]));
    assert_eq!(state.groups[&GroupId(1)].state, GroupState::Forming);
    let state = after(&with(
        workers(),
        [form(0, &[1, 2]), ready(1, 1), ready(1, 0)],
    ));
    assert_eq!(state.groups[&GroupId(1)].state, GroupState::Ready);
}

#[test]
fn the_first_reason_of_a_failure_stays_until_a_forming_succeeds() {
    let broken = with(
        workers(),
        [
            form(0, &[1, 2]),
            failed(1, 1, "too large"),
            failed(1, 0, "peer left"),
            ready(1, 1),
        ],
    );
    let group = &after(&broken).groups[&GroupId(1)];
    assert_eq!(
        group.state,
        GroupState::Failed {
            reason: "too large".into()
        }
    );
    let again = with(broken, [form(1, &[1, 2])]);
    assert_eq!(
        after(&again).groups[&GroupId(1)].last_failure.as_deref(),
        Some("too large")
    );
    let healed = with(again, [ready(2, 0), ready(2, 1)]);
    assert_eq!(after(&healed).groups[&GroupId(1)].last_failure, None);
}

#[test]
fn a_failure_reason_of_any_length_and_alphabet_is_kept_short() {
    let state = after(&with(
        workers(),
        [form(0, &[1]), failed(1, 0, &"ü".repeat(MAX_TEXT_BYTES))],
    ));
    let reason = state.groups[&GroupId(1)]
        .last_failure
        .clone()
        .expect("a reason");
    assert!(reason.len() <= MAX_TEXT_BYTES && reason.ends_with('ü'));
}

#[test]
fn epochs_grow_over_removal_and_return_of_a_model() {
    let removed = with(
        workers(),
        [
            form(0, &[1, 2]),
            form(1, &[1]),
            Command::RemoveDeployment { model: "m".into() },
        ],
    );
    let mut state = after(&with(removed, [deployment("m", 2)]));
    let outcome = state.apply(form(0, &[1, 2])).expect("formed");
    assert_eq!(
        outcome,
        Outcome::Formed {
            group: GroupId(2),
            epoch: Epoch(3)
        }
    );
}

#[test]
fn a_token_admits_one_node_under_a_new_id() {
    let mut state = after(&[
        register(7, &[Role::Coordinator]),
        token(9, &[Role::Worker, Role::Store]),
    ]);
    assert_eq!(
        state.apply(admit(9, &[Role::Worker])),
        Ok(Outcome::Admitted { node: NodeId(8) })
    );
    assert!(
        !state.nodes[&NodeId(8)].up,
        "a node is up once it registers with its certificate"
    );
}

#[test]
fn a_verdict_on_an_earlier_process_leaves_its_successor_up() {
    let mut state = after(&workers());
    let late = Command::SetNodeUp {
        node: NodeId(1),
        incarnation: 0,
        up: false,
    };
    assert!(state.apply(late).is_err());
    assert!(state.nodes[&NodeId(1)].up);
}

#[test]
fn a_key_opens_its_tenant_until_it_is_revoked_and_removal_of_a_tenant_takes_its_keys() {
    let mut state = after(&[create("a"), create("b"), key("vb-1", "a"), key("vb-2", "b")]);
    assert_eq!(
        state.authenticate("vb-1").map(|k| k.tenant.as_str()),
        Some("a")
    );
    for wrong in [
        "",
        "vb-",
        "vb-3",
        "VB-1",
        "vb-1 ",
        "vb-11",
        "1",
        &"vb-1".repeat(100),
    ] {
        assert_eq!(state.authenticate(wrong), None, "{wrong:?}");
    }
    let id = state.authenticate("vb-1").expect("valid").id.clone();
    state
        .apply(Command::RevokeApiKey {
            tenant: tenant("a"),
            id,
        })
        .expect("revoked");
    assert_eq!(state.authenticate("vb-1"), None);
    state
        .apply(Command::RemoveTenant { id: tenant("b") })
        .expect("removed");
    assert_eq!(state.authenticate("vb-2"), None);
}

#[test]
fn tenants_are_spread_over_store_groups() {
    let store = |id| {
        Command::CreateStoreGroup(StoreGroup {
            id: RaftGroupId(id),
            members: vec![NodeId(1)],
        })
    };
    let history = [
        register(1, &[Role::Store]),
        store(1),
        store(2),
        create("a"),
        create("b"),
        create("c"),
    ];
    let state = after(&history);
    let groups: Vec<_> = state.tenants.values().map(|t| t.store_group.0).collect();
    assert_eq!(groups, [1, 2, 1]);
    assert_eq!(
        state.store_group_of(&tenant("b")).map(|g| g.id),
        Some(RaftGroupId(2))
    );
}

#[test]
fn only_members_of_a_group_see_its_key() {
    let state = after(&with(workers(), [form(0, &[1])]));
    assert_eq!(state.seen_by(NodeId(1)).groups[&GroupId(1)].key, [7; 32]);
    assert_eq!(state.seen_by(NodeId(2)).groups[&GroupId(1)].key, [0; 32]);
    assert!(
        !format!("{state:?}").contains("key: [7"),
        "a key is not printed"
    );
}

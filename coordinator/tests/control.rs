//! Three real coordinators on loopback: what is accepted survives the leader, every node learns it, and joining works.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use coordinator::Redacted;
use coordinator::clock::now_ms;
use coordinator::control::{
    Command, ControlHandle, Coordinator, CoordinatorConfig, Deployment, Error, GroupHealth,
    GroupState, ModelKind, Node, OPERATOR, Outcome, Rejection, ShardReport, api_key,
    new_join_token,
};
use coordinator::identity::{self, Ca, Identity, JoinRequest, PendingIdentity};
use coordinator::ids::{Device, DeviceKind, Epoch, NodeId, Role, TenantId};
use coordinator::transport::Transport;
use tempfile::TempDir;
use tokio::task::JoinHandle;

/// Bound against hanging; nothing here measures time.
const PATIENCE: Duration = Duration::from_secs(30);

struct World {
    ca: Arc<Ca>,
    dir: TempDir,
    addrs: BTreeMap<NodeId, SocketAddr>,
    running: BTreeMap<NodeId, Running>,
}

struct Running {
    coordinator: Coordinator,
    transport: Transport,
    member: JoinHandle<Result<(), Error>>,
}

impl World {
    async fn start() -> World {
        let ca = Arc::new(Ca::create("Test").expect("CA"));
        let addrs = (1..=3).map(|id| (NodeId(id), free_addr())).collect();
        let dir = tempfile::tempdir().expect("directory");
        let mut world = World {
            ca,
            dir,
            addrs,
            running: BTreeMap::new(),
        };
        for id in world.addrs.clone().into_keys() {
            world.run(id);
        }
        world
    }

    fn run(&mut self, id: NodeId) {
        let identity = self.ca.issue(id, &format!("node{id}")).expect("identity");
        let transport = Transport::bind(&identity, self.addrs[&id]).expect("transport");
        let control = ControlHandle::connect(transport.clone(), self.seeds());
        let config = CoordinatorConfig {
            node: id,
            dir: self.dir.path().join(format!("node{id}")),
            cluster_name: "Test".into(),
            bootstrap: Some(self.addrs.clone()),
            ca: self.ca.clone(),
            cluster_key: Redacted::new([9; 32]),
        };
        let coordinator =
            Coordinator::start(config, transport.clone(), control.clone()).expect("coordinator");
        let node = node(id, self.addrs[&id], &[Role::Coordinator]);
        let member = tokio::spawn(async move { control.run_member(node).await });
        self.running.insert(
            id,
            Running {
                coordinator,
                transport,
                member,
            },
        );
    }

    async fn stop(&mut self, id: NodeId) {
        let running = self.running.remove(&id).expect("running");
        running.member.abort();
        running.transport.shutdown().await;
        running.coordinator.shutdown().await;
    }

    fn seeds(&self) -> Vec<SocketAddr> {
        self.addrs.values().copied().collect()
    }

    fn handle(&self, identity: &Identity) -> ControlHandle {
        let transport = Transport::bind(identity, free_addr()).expect("transport");
        ControlHandle::connect(transport, self.seeds())
    }

    fn operator(&self) -> ControlHandle {
        self.handle(&self.ca.issue(OPERATOR, "operator").expect("identity"))
    }

    /// A worker that loads whatever it is assigned.
    fn worker(&self, id: u64) -> (ControlHandle, JoinHandle<Result<(), Error>>) {
        let identity = self
            .ca
            .issue(NodeId(id), &format!("worker{id}"))
            .expect("identity");
        let control = self.handle(&identity);
        let member = control.clone();
        let node = node(
            NodeId(id),
            control.transport().local_addr(),
            &[Role::Worker],
        );
        (
            control,
            tokio::spawn(async move { member.run_member(node).await }),
        )
    }
}

fn free_addr() -> SocketAddr {
    std::net::UdpSocket::bind("127.0.0.1:0")
        .and_then(|s| s.local_addr())
        .expect("a free port")
}

fn node(id: NodeId, addr: SocketAddr, roles: &[Role]) -> Node {
    let device = Device {
        kind: DeviceKind::Cpu,
        name: "cpu".into(),
        memory_bytes: 1 << 30,
        read_bytes_per_s: 1 << 30,
        threads: 1,
    };
    Node {
        id,
        name: format!("node{id}"),
        addr,
        data_addr: roles.contains(&Role::Worker).then_some(addr),
        roles: roles.iter().copied().collect(),
        devices: vec![device],
        up: true,
        version: "test".into(),
        incarnation: now_ms(),
    }
}

fn tenant(id: &str) -> TenantId {
    TenantId::new(id).expect("tenant id")
}

fn create(id: &str) -> Command {
    Command::CreateTenant {
        id: tenant(id),
        name: id.into(),
        now_ms: now_ms(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_accepted_survives_the_leader_and_reaches_every_node() {
    let mut world = World::start().await;
    let operator = world.operator();
    let watcher = world.operator();
    operator.propose(create("a")).await.expect("created");
    let again = operator.propose(create("a")).await;
    assert!(
        matches!(again, Err(Error::Rejected(Rejection::Exists { .. }))),
        "{again:?}"
    );
    let key = api_key(tenant("a"), "portal", false, now_ms());
    operator
        .propose(Command::CreateApiKey {
            sha256: key.sha256,
            key: key.key.clone(),
        })
        .await
        .expect("key");

    for round in 0..2 {
        let leader = operator
            .control_status()
            .await
            .expect("status")
            .leader
            .expect("a leader");
        world.stop(leader).await;
        operator
            .propose(create(&format!("after-{round}")))
            .await
            .expect("a new leader took it");
        let state = operator.read().await.expect("read");
        assert!(
            state.tenants.contains_key(&tenant("a"))
                && state
                    .tenants
                    .contains_key(&tenant(&format!("after-{round}")))
        );
        watcher
            .wait_for(PATIENCE, |s| {
                s.tenants.contains_key(&tenant(&format!("after-{round}")))
            })
            .await
            .expect("the watcher learns it");
        assert_eq!(
            watcher.authenticate(&key.secret).map(|k| k.id),
            Some(key.key.id.clone())
        );
        watcher
            .wait_for(PATIENCE, |s| s.nodes.get(&leader).is_some_and(|n| !n.up))
            .await
            .expect("the dead node is noticed");
        world.run(leader);
        watcher
            .wait_for(PATIENCE, |s| s.nodes.get(&leader).is_some_and(|n| n.up))
            .await
            .expect("and its return");
    }
    operator
        .propose(Command::RevokeApiKey {
            tenant: tenant("a"),
            id: key.key.id.clone(),
        })
        .await
        .expect("revoked");
    watcher
        .wait_for(PATIENCE, |s| s.api_keys.is_empty())
        .await
        .expect("learned");
    assert_eq!(watcher.authenticate(&key.secret), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_follows_its_workers_and_refuses_those_of_yesterday() {
    let world = World::start().await;
    let operator = world.operator();
    let (first, _first_member) = world.worker(11);
    let (second, second_member) = world.worker(12);
    let deployment = Deployment {
        model: "m".into(),
        kind: ModelKind::Generate,
        path: "/m.gguf".into(),
        ranks: 2,
        context_tokens: 0,
    };
    operator
        .propose(Command::SetDeployment(deployment))
        .await
        .expect("deployed");
    let formed = |ranks: usize| {
        move |s: &coordinator::control::ControlState| {
            s.group_of("m").is_some_and(|g| g.ranks.len() == ranks)
        }
    };
    let state = operator
        .wait_for(PATIENCE, formed(2))
        .await
        .expect("formed");
    let group = state.group_of("m").expect("group").clone();
    for rank in &group.ranks {
        let from = if rank.node == NodeId(11) {
            &first
        } else {
            &second
        };
        let ready = Command::RankReady {
            group: group.id,
            epoch: group.epoch,
            rank: rank.rank,
            report: ShardReport::default(),
        };
        let other = if rank.node == NodeId(11) {
            &second
        } else {
            &first
        };
        let foreign = other.propose(ready.clone()).await;
        assert!(
            matches!(foreign, Err(Error::Denied { .. })),
            "only the host may report: {foreign:?}"
        );
        from.propose(ready).await.expect("reported");
    }
    operator
        .wait_for(PATIENCE, |s| {
            s.group_of("m")
                .is_some_and(|g| g.state == GroupState::Ready)
        })
        .await
        .expect("ready");
    let seen = first
        .wait_for(PATIENCE, |s| s.group_of("m").is_some())
        .await
        .expect("seen");
    assert_ne!(
        seen.group_of("m").expect("group").key,
        [0; 32],
        "a member sees the group's key"
    );

    // Worker 12 dies; worker 11 notices first.
    second_member.abort();
    first.publish_health(vec![GroupHealth {
        group: group.id,
        epoch: group.epoch,
        rank: group.rank_on(NodeId(11)).expect("rank").rank,
        active_requests: 1,
        broken: Some("connection reset".into()),
    }]);
    let state = operator
        .wait_for(PATIENCE, formed(1))
        .await
        .expect("re-formed");
    let smaller = state.group_of("m").expect("group");
    assert!(smaller.epoch > group.epoch);
    let late = second
        .propose(Command::RankReady {
            group: group.id,
            epoch: group.epoch,
            rank: group.ranks[0].rank,
            report: ShardReport::default(),
        })
        .await;
    let stale = Rejection::StaleEpoch {
        expected: smaller.epoch,
        got: group.epoch,
    };
    match late {
        Err(Error::Rejected(rejection)) => assert_eq!(rejection, stale),
        // The rank's place is now another node's.
        Err(Error::Denied { .. }) => {}
        other => panic!("a late report was taken: {other:?}"),
    }
    let form = Command::FormGroup {
        model: "m".into(),
        expect: Epoch(0),
        ranks: group.ranks.clone(),
        key: [1; 32],
    };
    let denied = first.propose(form).await;
    assert!(
        matches!(denied, Err(Error::Denied { .. })),
        "a worker forms no groups: {denied:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_lets_one_node_in_and_a_removed_node_stays_out() {
    let world = World::start().await;
    let operator = world.operator();
    operator
        .wait_for(PATIENCE, |s| !s.cluster.id.is_empty())
        .await
        .expect("named");
    let roles = BTreeSet::from([Role::Worker, Role::Store]);
    let (token, command) = new_join_token(
        world.ca.fingerprint(),
        world.seeds(),
        roles,
        now_ms() + 600_000,
    );
    operator.propose(command).await.expect("token made");

    let pending = PendingIdentity::new("neu").expect("key");
    let request = |roles: &[Role]| JoinRequest {
        secret: token.secret,
        csr_pem: pending.csr_pem().to_owned(),
        name: "neu".into(),
        roles: roles.iter().copied().collect(),
        addr: free_addr(),
        data_addr: None,
        devices: Vec::new(),
        version: "test".into(),
    };
    let greedy = identity::join(token.addrs[0], &token, request(&[Role::Coordinator])).await;
    assert!(
        greedy.is_err_and(|e| e.to_string().contains("role")),
        "a token gives no more than its roles"
    );
    let reply = identity::join(token.addrs[1], &token, request(&[Role::Store]))
        .await
        .expect("admitted");
    assert_eq!(reply.cluster_key.map(Redacted::into_inner), Some([9; 32]));
    assert!(reply.ca_key_pem.is_none(), "a store does not sign");
    let twice = identity::join(token.addrs[2], &token, request(&[Role::Store])).await;
    assert!(
        twice.is_err_and(|e| e.to_string().contains("used")),
        "a token is for one node"
    );

    let identity = pending
        .complete(reply.node_id, &reply.cert_pem, &reply.ca_pem)
        .expect("identity");
    let control = world.handle(&identity);
    let joined = node(
        reply.node_id,
        control.transport().local_addr(),
        &[Role::Store],
    );
    control
        .propose(Command::RegisterNode(joined.clone()))
        .await
        .expect("registered");
    let more = Node {
        roles: BTreeSet::from([Role::Coordinator]),
        ..joined.clone()
    };
    let more = control.propose(Command::RegisterNode(more)).await;
    assert!(
        matches!(more, Err(Error::Denied { .. })),
        "roles are what was admitted: {more:?}"
    );

    let removed = operator
        .propose(Command::RemoveNode {
            node: reply.node_id,
        })
        .await
        .expect("removed");
    assert!(matches!(removed, Outcome::Done { .. }));
    let out = control.propose(Command::RegisterNode(joined)).await;
    assert!(out.is_err(), "a removed node is out: {out:?}");
}

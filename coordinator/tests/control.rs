//! Three real coordinators on loopback: what is accepted survives the leader, every node learns it, and joining works.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use coordinator::Redacted;
use coordinator::clock::now_ms;
use coordinator::control::{
    Command, ControlHandle, ControlState, ControlStatus, Coordinator, CoordinatorConfig,
    Deployment, Error, GroupHealth, GroupState, ModelKind, Node, OPERATOR, Rejection, ShardReport,
    api_key, new_join_token,
};
use coordinator::identity::{
    self, Ca, Identity, JoinReply, JoinRequest, JoinToken, PendingIdentity,
};
use coordinator::ids::{Device, DeviceKind, Epoch, NodeId, Role, TenantId};
use coordinator::transport::{self, Transport};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

/// Bound against hanging; nothing here measures time, and a loaded machine may need many elections.
const PATIENCE: Duration = Duration::from_secs(120);

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
        // All are bound before the first starts, so that each knows where all are.
        let transports: Vec<_> = (1..=3)
            .map(|id| Transport::bind(&issue(&ca, NodeId(id)), loopback()).expect("transport"))
            .collect();
        let mut world = World {
            ca,
            dir: tempfile::tempdir().expect("directory"),
            addrs: transports
                .iter()
                .map(|t| (t.node_id(), t.local_addr()))
                .collect(),
            running: BTreeMap::new(),
        };
        for transport in transports {
            world.run_on(transport, Some(world.addrs.clone()));
        }
        world
    }

    /// Starts a coordinator again, where it was.
    async fn run(&mut self, id: NodeId) {
        let (identity, addr) = (issue(&self.ca, id), self.addrs[&id]);
        let bound = async {
            loop {
                // The old endpoint gives its port back only when its driver has ended.
                match Transport::bind(&identity, addr) {
                    Ok(transport) => return transport,
                    Err(transport::Error::Bind { .. }) => sleep(Duration::from_millis(10)).await,
                    Err(other) => panic!("{other}"),
                }
            }
        };
        let transport = timeout(PATIENCE, bound).await.expect("its old port");
        self.run_on(transport, Some(self.addrs.clone()));
    }

    fn run_on(&mut self, transport: Transport, bootstrap: Option<BTreeMap<NodeId, SocketAddr>>) {
        let (id, addr) = (transport.node_id(), transport.local_addr());
        let control = ControlHandle::connect(transport.clone(), self.seeds());
        let config = self.config(id, bootstrap);
        let coordinator =
            Coordinator::start(config, transport.clone(), control.clone()).expect("coordinator");
        let node = node(id, addr, &[Role::Coordinator]);
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

    fn config(
        &self,
        node: NodeId,
        bootstrap: Option<BTreeMap<NodeId, SocketAddr>>,
    ) -> CoordinatorConfig {
        CoordinatorConfig {
            node,
            dir: self.dir.path().join(format!("node{node}")),
            cluster_name: "Test".into(),
            bootstrap,
            ca: self.ca.clone(),
            cluster_key: Redacted::new([9; 32]),
        }
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
        let transport = Transport::bind(identity, loopback()).expect("transport");
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

/// Any free port.
fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn issue(ca: &Ca, id: NodeId) -> Identity {
    ca.issue(id, &format!("node{id}")).expect("identity")
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

/// Has `command` accepted, as a patient client does: a loaded machine may be without a leader for longer than one
/// proposal waits. What an attempt without an answer may have done already counts as done.
async fn accepted(control: &ControlHandle, command: Command) {
    let (attempts, answer) = attempts(control, command).await;
    let done_before = matches!(
        answer,
        Err(Error::Rejected(
            Rejection::Exists { .. } | Rejection::Unknown { .. }
        ))
    );
    assert!(
        answer.is_ok() || (attempts > 1 && done_before),
        "{answer:?}"
    );
}

/// As [`accepted`], for commands that shall be refused.
async fn propose(control: &ControlHandle, command: Command) -> Result<(), Error> {
    attempts(control, command).await.1
}

async fn attempts(control: &ControlHandle, command: Command) -> (usize, Result<(), Error>) {
    let attempts = async {
        let mut number = 1;
        loop {
            match control.propose(command.clone()).await {
                Err(Error::Unavailable { .. }) => number += 1,
                answer => return (number, answer.map(drop)),
            }
        }
    };
    timeout(PATIENCE, attempts).await.expect("a leader")
}

/// Reads the state, as patiently.
async fn read(control: &ControlHandle) -> Arc<ControlState> {
    let attempts = async {
        loop {
            match control.read().await {
                Ok(state) => return state,
                Err(Error::Unavailable { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
    };
    timeout(PATIENCE, attempts).await.expect("a leader")
}

/// How the control group stands, as patiently.
async fn status(control: &ControlHandle) -> ControlStatus {
    let attempts = async {
        loop {
            match control.control_status().await {
                Ok(status) => return status,
                Err(Error::Unavailable { .. }) => {}
                Err(other) => panic!("{other}"),
            }
        }
    };
    timeout(PATIENCE, attempts).await.expect("a leader")
}

/// Asks to join, again while nobody answers.
async fn join(
    at: usize,
    token: &JoinToken,
    request: impl Fn() -> JoinRequest,
) -> Result<JoinReply, identity::Error> {
    let attempts = async {
        loop {
            match identity::join(token.addrs[at], token, request()).await {
                Err(identity::Error::JoinUnreachable { .. }) => {}
                Err(identity::Error::JoinRefused { why })
                    if why.contains("no coordinator answered") => {}
                answer => return answer,
            }
        }
    };
    timeout(PATIENCE, attempts).await.expect("an answer")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_accepted_survives_the_leader_and_reaches_every_node() {
    let mut world = World::start().await;
    let operator = world.operator();
    let watcher = world.operator();
    accepted(&operator, create("a")).await;
    let again = propose(&operator, create("a")).await;
    assert!(
        matches!(again, Err(Error::Rejected(Rejection::Exists { .. }))),
        "{again:?}"
    );
    let key = api_key(tenant("a"), "portal", false, now_ms());
    accepted(
        &operator,
        Command::CreateApiKey {
            sha256: key.sha256,
            key: key.key.clone(),
        },
    )
    .await;

    for round in 0..2 {
        let leader = status(&operator).await.leader.expect("a leader");
        // One that is stopped before it has registered is missed by nobody.
        watcher
            .wait_for(PATIENCE, |s| s.nodes.get(&leader).is_some_and(|n| n.up))
            .await
            .expect("the leader is a member");
        world.stop(leader).await;
        accepted(&operator, create(&format!("after-{round}"))).await;
        let state = read(&operator).await;
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
        world.run(leader).await;
        watcher
            .wait_for(PATIENCE, |s| s.nodes.get(&leader).is_some_and(|n| n.up))
            .await
            .expect("and its return");
    }
    accepted(
        &operator,
        Command::RevokeApiKey {
            tenant: tenant("a"),
            id: key.key.id.clone(),
        },
    )
    .await;
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
    accepted(&operator, Command::SetDeployment(deployment)).await;
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
        let foreign = propose(other, ready.clone()).await;
        assert!(
            matches!(foreign, Err(Error::Denied { .. })),
            "only the host may report: {foreign:?}"
        );
        accepted(from, ready).await;
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
    let late = Command::RankReady {
        group: group.id,
        epoch: group.epoch,
        rank: group.ranks[0].rank,
        report: ShardReport::default(),
    };
    let denied = propose(&second, late.clone()).await;
    assert!(
        matches!(denied, Err(Error::Denied { .. })),
        "the rank's place is now another node's: {denied:?}"
    );
    // Whoever may speak for the rank is held to its epoch, which grows at most once more while the group changes.
    let late = propose(&operator, late).await;
    assert!(
        matches!(
            &late,
            Err(Error::Rejected(Rejection::StaleEpoch { expected, got }))
                if *expected >= smaller.epoch && *got == group.epoch
        ),
        "{late:?}"
    );
    let form = Command::FormGroup {
        model: "m".into(),
        expect: Epoch(0),
        ranks: group.ranks.clone(),
        key: [1; 32],
    };
    let denied = propose(&first, form).await;
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
        .wait_for(PATIENCE, |s| {
            // A coordinator passes joins on only once it is a member itself.
            !s.cluster.id.is_empty() && (1..=3).all(|id| s.nodes.contains_key(&NodeId(id)))
        })
        .await
        .expect("named, and its coordinators are members");
    let roles = BTreeSet::from([Role::Worker, Role::Store]);
    let (token, command) = new_join_token(
        world.ca.fingerprint(),
        world.seeds(),
        roles,
        now_ms() + 600_000,
    );
    accepted(&operator, command).await;

    let pending = PendingIdentity::new("neu").expect("key");
    let request = |roles: &[Role]| JoinRequest {
        secret: token.secret,
        csr_pem: pending.csr_pem().to_owned(),
        name: "neu".into(),
        roles: roles.iter().copied().collect(),
        addr: ([127, 0, 0, 1], 9).into(),
        data_addr: None,
        devices: Vec::new(),
        version: "test".into(),
    };
    let greedy = join(0, &token, || request(&[Role::Coordinator])).await;
    let why = greedy.map(|_| ()).expect_err("refused").to_string();
    assert!(
        why.contains("role"),
        "a token gives no more than its roles: {why}"
    );
    let reply = join(1, &token, || request(&[Role::Store]))
        .await
        .expect("admitted");
    assert_eq!(reply.cluster_key.map(Redacted::into_inner), Some([9; 32]));
    assert!(reply.ca_key_pem.is_none(), "a store does not sign");
    let twice = join(2, &token, || request(&[Role::Store])).await;
    let why = twice.map(|_| ()).expect_err("refused").to_string();
    assert!(why.contains("used"), "a token is for one node: {why}");

    let identity = pending
        .complete(reply.node_id, &reply.cert_pem, &reply.ca_pem)
        .expect("identity");
    let control = world.handle(&identity);
    let joined = node(
        reply.node_id,
        control.transport().local_addr(),
        &[Role::Store],
    );
    accepted(&control, Command::RegisterNode(joined.clone())).await;
    let more = Node {
        roles: BTreeSet::from([Role::Coordinator]),
        ..joined.clone()
    };
    let more = propose(&control, Command::RegisterNode(more)).await;
    assert!(
        matches!(more, Err(Error::Denied { .. })),
        "roles are what was admitted: {more:?}"
    );

    let remove = Command::RemoveNode {
        node: reply.node_id,
    };
    accepted(&operator, remove).await;
    let out = control.propose(Command::RegisterNode(joined)).await;
    assert!(out.is_err(), "a removed node is out: {out:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_knows_nothing_denies_nothing() {
    let world = World::start().await;
    let operator = world.operator();
    let gateway = issue(&world.ca, NodeId(21));
    let registered = world.handle(&gateway);
    accepted(
        &registered,
        Command::RegisterNode(node(
            NodeId(21),
            registered.transport().local_addr(),
            &[Role::Gateway],
        )),
    )
    .await;

    // A coordinator with an empty directory that nobody has let join: it has never heard of the gateway.
    let transport = Transport::bind(&issue(&world.ca, NodeId(9)), loopback()).expect("transport");
    let alone = ControlHandle::connect(transport.clone(), Vec::new());
    let stranger = Coordinator::start(world.config(NodeId(9), None), transport.clone(), alone)
        .expect("coordinator");
    let seeds = [vec![transport.local_addr()], world.seeds()].concat();
    let identity = issue(&world.ca, NodeId(21));
    let own = Transport::bind(&identity, loopback()).expect("transport");
    // Asked first, before the handle has learned of any other.
    let asking = ControlHandle::connect(own, seeds);
    accepted(&asking, create("a")).await;
    let state = read(&operator).await;
    assert!(state.tenants.contains_key(&tenant("a")));
    transport.shutdown().await;
    stranger.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_joins_later_votes_and_one_that_is_removed_does_not() {
    let mut world = World::start().await;
    let operator = world.operator();
    accepted(&operator, create("before")).await;
    let transport = Transport::bind(&issue(&world.ca, NodeId(4)), loopback()).expect("transport");
    world.run_on(transport, None);
    voters_become(&operator, &[1, 2, 3, 4]).await;
    let mut states = world.running[&NodeId(4)].coordinator.states();
    let learned = states.wait_for(|s| s.tenants.contains_key(&tenant("before")));
    drop(timeout(PATIENCE, learned).await.expect("it has the state"));

    let group = status(&operator).await;
    let follower = (1..=3)
        .map(NodeId)
        .find(|id| Some(*id) != group.leader)
        .expect("a follower");
    accepted(&operator, Command::RemoveNode { node: follower }).await;
    let rest: Vec<u64> = (1..=4).filter(|id| *id != follower.0).collect();
    voters_become(&operator, &rest).await;
    // Of three voters one is the newcomer: without one of the others its vote counts.
    world.stop(follower).await;
    let leader = (1..=3)
        .map(NodeId)
        .find(|id| *id != follower)
        .expect("another");
    world.stop(leader).await;
    accepted(&operator, create("after")).await;
}

async fn voters_become(operator: &ControlHandle, wanted: &[u64]) {
    let wanted: Vec<_> = wanted.iter().copied().map(NodeId).collect();
    let reached = async {
        loop {
            let group = status(operator).await;
            if group.voters == wanted && group.learners.is_empty() {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, reached).await.expect("the voters change");
}

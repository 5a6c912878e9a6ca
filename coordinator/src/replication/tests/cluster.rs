//! The harness: nodes with transports and directories, a network that can be cut, and a small state machine.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use tempfile::TempDir;

use crate::clock::{Duration, Instant, monotonic};
use crate::identity::Ca;
use crate::ids::{NodeId, RaftGroupId};
use crate::replication::{AddressBook, Error, Replica, ReplicaConfig, StateMachine, Txn, View};
use crate::transport::Transport;

/// No test waits longer for anything.
pub(super) const LONG: Duration = Duration::from_secs(60);

/// Commands: `set KEY VALUE`, `del PREFIX`, `add KEY` (counts up); replies with the value before.
#[derive(Default)]
pub(super) struct Register {
    /// Derived data: how many keys there are, kept up by `applied` and `reloaded`.
    pub(super) keys: AtomicU64,
    pub(super) reloads: AtomicU64,
    pub(super) applied: Mutex<Vec<u64>>,
}

pub(super) fn set(key: &str, value: &[u8]) -> Vec<u8> {
    [b"set ", key.as_bytes(), b" ", value].concat()
}

pub(super) fn count(view: &View) -> u64 {
    rows(view).len() as u64
}

impl StateMachine for Register {
    fn apply(&self, _index: u64, command: &[u8], txn: &mut Txn<'_>) -> Vec<u8> {
        let mut words = command.splitn(3, |byte| *byte == b' ');
        let (verb, key) = (
            words.next().unwrap_or_default(),
            words.next().unwrap_or_default(),
        );
        let before = txn.get(key).unwrap_or_default();
        match verb {
            b"set" => txn.put(key, words.next().unwrap_or_default()),
            b"del" => txn.delete_prefix(key),
            b"add" => {
                let number: u64 = std::str::from_utf8(&before)
                    .ok()
                    .and_then(|text| text.parse().ok())
                    .unwrap_or(0);
                txn.put(key, (number + 1).to_string().as_bytes());
            }
            _ => return b"unknown".to_vec(),
        }
        before
    }

    fn applied(&self, index: u64, _command: &[u8], view: &View) {
        self.applied.lock().expect("no panic").push(index);
        self.keys.store(count(view), Ordering::SeqCst);
    }

    fn reloaded(&self, view: &View) {
        self.reloads.fetch_add(1, Ordering::SeqCst);
        self.keys.store(count(view), Ordering::SeqCst);
    }
}

/// Which nodes hear each other.
#[derive(Default)]
struct Network {
    addrs: RwLock<HashMap<NodeId, SocketAddr>>,
    cut: RwLock<HashSet<(NodeId, NodeId)>>,
}

/// What one node sees of the network.
struct Seen {
    by: NodeId,
    network: Arc<Network>,
}

impl AddressBook for Seen {
    fn addr(&self, node: NodeId) -> Option<SocketAddr> {
        let cut = self
            .network
            .cut
            .read()
            .expect("no panic")
            .contains(&(self.by, node));
        if cut {
            None
        } else {
            self.network
                .addrs
                .read()
                .expect("no panic")
                .get(&node)
                .copied()
        }
    }
}

pub(super) struct Node {
    pub(super) transport: Transport,
    pub(super) replica: Replica,
    pub(super) machine: Arc<Register>,
}

pub(super) struct Cluster {
    ca: Ca,
    network: Arc<Network>,
    pub(super) nodes: BTreeMap<u64, Node>,
    dirs: BTreeMap<u64, PathBuf>,
    root: TempDir,
    first: Vec<NodeId>,
    pub(super) tune: fn(&mut ReplicaConfig),
}

impl Cluster {
    /// A group of nodes 1 to `size`, started.
    pub(super) fn start(size: u64, tune: fn(&mut ReplicaConfig)) -> Self {
        let mut cluster = Self {
            ca: Ca::create("test").expect("a CA"),
            network: Arc::default(),
            nodes: BTreeMap::new(),
            dirs: BTreeMap::new(),
            root: TempDir::new().expect("a directory"),
            first: (1..=size).map(NodeId).collect(),
            tune,
        };
        for id in 1..=size {
            cluster.start_node(id);
        }
        cluster
    }

    pub(super) fn set_dir(&mut self, id: u64, dir: PathBuf) {
        self.dirs.insert(id, dir);
    }

    pub(super) fn config(&self, id: u64) -> ReplicaConfig {
        let dir = self
            .dirs
            .get(&id)
            .cloned()
            .unwrap_or_else(|| self.root.path().join(id.to_string()));
        let member = self.first.contains(&NodeId(id));
        let mut config = ReplicaConfig::new(
            RaftGroupId(0),
            NodeId(id),
            dir,
            member.then(|| self.first.clone()),
        );
        (self.tune)(&mut config);
        config
    }

    pub(super) fn start_node(&mut self, id: u64) {
        let identity = self.ca.issue(NodeId(id), "node").expect("an identity");
        let transport =
            Transport::bind(&identity, (Ipv4Addr::LOCALHOST, 0).into()).expect("a transport");
        self.network
            .addrs
            .write()
            .expect("no panic")
            .insert(NodeId(id), transport.local_addr());
        let machine = Arc::new(Register::default());
        let seen = Arc::new(Seen {
            by: NodeId(id),
            network: self.network.clone(),
        });
        let replica = Replica::start(self.config(id), transport.clone(), seen, machine.clone())
            .expect("a replica");
        self.nodes.insert(
            id,
            Node {
                transport,
                replica,
                machine,
            },
        );
    }

    /// A transport with a certificate of the cluster that belongs to no member.
    pub(super) fn outsider(&self, id: u64) -> Transport {
        let identity = self.ca.issue(NodeId(id), "outsider").expect("an identity");
        Transport::bind(&identity, (Ipv4Addr::LOCALHOST, 0).into()).expect("a transport")
    }

    pub(super) async fn stop_node(&mut self, id: u64) {
        let node = self.nodes.remove(&id).expect("a running node");
        node.replica.shutdown().await;
        node.transport.shutdown().await;
    }

    /// Nobody in `part` hears anybody else, and nobody hears them.
    pub(super) fn cut_off(&self, part: &[u64]) {
        let mut cut = self.network.cut.write().expect("no panic");
        for one in self.nodes.keys() {
            for other in self.nodes.keys() {
                if part.contains(one) != part.contains(other) {
                    cut.insert((NodeId(*one), NodeId(*other)));
                }
            }
        }
    }

    pub(super) fn heal(&self) {
        self.network.cut.write().expect("no panic").clear();
    }

    pub(super) fn replica(&self, id: u64) -> &Replica {
        &self.nodes[&id].replica
    }

    /// The leader among `among`, once there is one that they agree on.
    pub(super) async fn leader_among(&self, among: &[u64]) -> u64 {
        let found = eventually(|| {
            let statuses: Vec<_> = among.iter().map(|id| self.replica(*id).status()).collect();
            let leader = statuses.iter().find(|status| status.is_leader)?;
            statuses
                .iter()
                .all(|s| s.leader == leader.leader && s.term == leader.term)
                .then_some(leader.leader?.0)
        });
        found.await
    }

    pub(super) async fn leader(&self) -> u64 {
        let all: Vec<_> = self.nodes.keys().copied().collect();
        self.leader_among(&all).await
    }

    /// Proposes as a client does: finds the leader, and tries again while there is none.
    pub(super) async fn propose(&self, command: Vec<u8>) -> Vec<u8> {
        let deadline = monotonic() + LONG;
        loop {
            for node in self.nodes.values() {
                match node.replica.propose(command.clone()).await {
                    Ok(reply) => return reply,
                    Err(
                        Error::NotLeader { .. }
                        | Error::Interrupted
                        | Error::Timeout
                        | Error::Storage { .. },
                    ) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            assert!(monotonic() < deadline, "no leader took the command");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Reads at a node, which a loaded machine may need more than one attempt for.
    pub(super) async fn read(&self, id: u64) -> View {
        let deadline = monotonic() + LONG;
        loop {
            match self.replica(id).read_index().await {
                Ok(view) => return view,
                Err(error) => assert!(monotonic() < deadline, "no majority answered: {error}"),
            }
        }
    }

    /// Waits until all running nodes have applied what the leader has, and checks that their states are the same.
    pub(super) async fn converge(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let leader = self.leader().await;
        let goal = self.read(leader).await.applied();
        for id in self.nodes.keys() {
            self.caught_up(*id, goal).await;
        }
        let states: BTreeSet<_> = self
            .nodes
            .values()
            .map(|node| rows(&node.replica.local_view()))
            .collect();
        assert_eq!(states.len(), 1, "the replicas differ");
        states
            .into_iter()
            .next()
            .expect("one state")
            .into_iter()
            .collect()
    }

    pub(super) async fn caught_up(&self, id: u64, goal: u64) {
        eventually(|| (self.replica(id).status().applied >= goal).then_some(())).await;
    }
}

pub(super) fn rows(view: &View) -> Vec<(Vec<u8>, Vec<u8>)> {
    view.scan_prefix(&[])
        .map(|row| row.expect("readable"))
        .collect()
}

/// Looks again and again until there is something.
pub(super) async fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let begin: Instant = monotonic();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < LONG, "it did not happen within {LONG:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

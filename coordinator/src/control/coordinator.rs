//! A coordinator: one replica of the control group, its services, and the work that only the leader does.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rand::RngCore;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use super::command::{Command, Outcome, Rejection};
use super::formation::{Formation, STORE_REPLICAS, STORES_PATIENCE_MS};
use super::handle::ControlHandle;
use super::health::LOOK_FOR_MS;
use super::join::Admission;
use super::keys::random_secret;
use super::machine::ControlMachine;
use super::service::{Beats, Services};
use super::state::{Cluster, ControlState};
use super::wire::{self, Proposal};
use crate::Redacted;
use crate::clock::now_ms;
use crate::identity::Ca;
use crate::ids::{CONTROL_GROUP, NodeId, RaftGroupId, Role};
use crate::replication::{self, AddressBook, Replica, ReplicaConfig, ReplicaStatus};
use crate::transport::Transport;

/// The leader looks at heartbeats and groups this often; a quarter of a heartbeat's interval adds little delay.
const LEADER_TICK: Duration = Duration::from_millis(60);
/// A silent worker is looked for this often.
const LOOK_FOR_PAUSE_MS: u64 = 250;
/// A connection inside a region is there or refused in milliseconds.
const LOOK_FOR_WITHIN: Duration = Duration::from_millis(200);
/// Expired join tokens are forgotten this often.
const TOKEN_SWEEP: Duration = Duration::from_secs(60);
/// Most coordinators that vote: more make every commit slower without surviving more that happens.
const MAX_VOTERS: usize = 7;
/// A change of voters that failed is tried again after this time.
const VOTERS_PAUSE: Duration = Duration::from_secs(1);

/// How to run a coordinator.
pub struct CoordinatorConfig {
    pub node: NodeId,
    /// Directory of the control group's replica.
    pub dir: PathBuf,
    pub cluster_name: String,
    /// The first coordinators and their addresses, the same on each of them; `None` on one that joins later.
    pub bootstrap: Option<BTreeMap<NodeId, SocketAddr>>,
    /// Lets this coordinator take joins.
    pub ca: Arc<Ca>,
    /// Wraps the tenants' keys; handed to nodes that join as store or coordinator.
    pub cluster_key: Redacted<[u8; 32]>,
}

/// A running coordinator.
pub struct Coordinator {
    replica: Replica,
    states: watch::Receiver<Arc<ControlState>>,
    stop: CancellationToken,
    leading: JoinHandle<()>,
}

impl Coordinator {
    /// Starts the control replica, offers the services, takes joins, and leads when elected. `control` is this node's
    /// own handle; it reaches whoever leads.
    ///
    /// # Errors
    /// When the replica's directory is in use, of another version, or unreadable.
    pub fn start(
        config: CoordinatorConfig,
        transport: Transport,
        control: ControlHandle,
    ) -> Result<Coordinator, replication::Error> {
        let machine = Arc::new(ControlMachine::new());
        let states = machine.states();
        let addresses: Arc<dyn AddressBook> = Arc::new(Addresses {
            fixed: config.bootstrap.clone().unwrap_or_default(),
            states: states.clone(),
            control: control.clone(),
        });
        let voters = config
            .bootstrap
            .as_ref()
            .map(|b| b.keys().copied().collect());
        let replica_config = ReplicaConfig::new(CONTROL_GROUP, config.node, config.dir, voters);
        let replica = Replica::start(
            replica_config,
            transport.clone(),
            addresses.clone(),
            machine,
        )?;
        let beats = Arc::new(Beats::new());
        let services = Services {
            replica: replica.clone(),
            states: states.clone(),
            addresses,
            beats: beats.clone(),
        };
        services.register(&transport);
        let cluster = Cluster {
            name: config.cluster_name,
            id: hex::encode(config.ca.fingerprint()),
        };
        transport.serve_join(Arc::new(Admission::new(
            config.ca,
            control,
            config.cluster_key,
        )));
        let stop = CancellationToken::new();
        let leader = Leader {
            replica: replica.clone(),
            states: states.clone(),
            beats,
            cluster,
            transport,
        };
        let leading = tokio::spawn(leader.run(stop.clone()));
        Ok(Coordinator {
            replica,
            states,
            stop,
            leading,
        })
    }

    /// The control group's replica.
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// The state as applied here.
    pub fn states(&self) -> watch::Receiver<Arc<ControlState>> {
        self.states.clone()
    }

    /// Stops leading and replicating.
    pub async fn shutdown(self) {
        self.stop.cancel();
        let _ = self.leading.await;
        self.replica.shutdown().await;
    }
}

/// Where the coordinators are: the configured addresses first, since they hold before any state is known. A coordinator
/// that joins has no state of its own before the leader has reached it; until then it knows the others from watching them.
struct Addresses {
    fixed: BTreeMap<NodeId, SocketAddr>,
    states: watch::Receiver<Arc<ControlState>>,
    control: ControlHandle,
}

impl AddressBook for Addresses {
    fn addr(&self, node: NodeId) -> Option<SocketAddr> {
        let fixed = self.fixed.get(&node).copied();
        fixed
            .or_else(|| self.states.borrow().nodes.get(&node).map(|n| n.addr))
            .or_else(|| self.control.addr(node))
    }

    fn is_peer(&self, group: RaftGroupId, node: NodeId) -> bool {
        // Revoked nodes are refused before this is asked.
        self.fixed.contains_key(&node)
            || self.states.borrow().is_peer(group, node)
            || self.control.is_peer(group, node)
    }
}

/// The work of the control leader.
struct Leader {
    replica: Replica,
    states: watch::Receiver<Arc<ControlState>>,
    beats: Arc<Beats>,
    cluster: Cluster,
    transport: Transport,
}

impl Leader {
    /// Nothing here must end before a shutdown: what was proposed is decided again by the next leader.
    async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.lead()).await;
    }

    async fn lead(&self) {
        let mut tick = interval(LEADER_TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sweep = interval(TOKEN_SWEEP);
        let mut formation: Option<Formation> = None;
        let mut revoked = BTreeSet::new();
        let mut voter_change = None;
        let mut told_waiting = false;
        let mut looked_for = BTreeMap::new();
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = self.beats.urgent.notified() => {}
                _ = sweep.tick() => {
                    if formation.is_some() {
                        self.expire_tokens().await;
                    }
                }
            }
            self.beats.look();
            let state = self.states.borrow().clone();
            if state.revoked != revoked {
                revoked = state.revoked.clone();
                self.transport.revoke(revoked.iter().copied());
            }
            if !self.replica.status().is_leader {
                formation = None;
                voter_change = None;
                continue;
            }
            if formation.is_none() {
                info!("leading control");
                self.beats.reset();
                told_waiting = false;
            }
            let formation = formation.get_or_insert_default();
            if state.cluster.id.is_empty() {
                self.propose(Command::NameCluster(self.cluster.clone()))
                    .await;
                continue;
            }
            let now_ms = self.beats.now_ms();
            let commands = self.beats.with(|liveness| {
                liveness.retain(&state);
                formation.decide(now_ms, &state, liveness, &mut random_secret)
            });
            if formation.waits_for_stores(now_ms) && !told_waiting {
                told_waiting = true;
                warn!(
                    patience_ms = STORES_PATIENCE_MS,
                    "fewer than {STORE_REPLICAS} store nodes are up: the store's group waits for more, then begins \
                     with those that there are"
                );
            }
            self.look_for_silent(now_ms, &state, &mut looked_for);
            let propose = async {
                for command in commands {
                    self.propose(command).await;
                }
            };
            self.beats.looking(propose).await;
            self.adjust_voters(&state, &mut voter_change);
        }
    }

    /// Knocks at the data port of each worker that is silent. Its kernel answers for it while it is starved; when the process
    /// or the machine is gone, nobody does.
    fn look_for_silent(
        &self,
        now_ms: u64,
        state: &ControlState,
        looked_for: &mut BTreeMap<NodeId, u64>,
    ) {
        looked_for.retain(|_, at_ms| now_ms < *at_ms + LOOK_FOR_PAUSE_MS);
        for node in state.nodes_with(Role::Worker) {
            let Some(addr) = node.data_addr else { continue };
            let silent_ms = self.beats.with(|l| l.silent_ms(now_ms, node.id));
            if node.incarnation == 0 || silent_ms < LOOK_FOR_MS || looked_for.contains_key(&node.id)
            {
                continue;
            }
            looked_for.insert(node.id, now_ms);
            let (beats, id) = (self.beats.clone(), node.id);
            tokio::spawn(async move {
                if let Ok(Ok(_)) = timeout(LOOK_FOR_WITHIN, TcpStream::connect(addr)).await {
                    let now_ms = beats.now_ms();
                    beats.with(|liveness| liveness.vouched(now_ms, id));
                    debug!(node = id.0, silent_ms, "silent, but its port answers");
                }
            });
        }
    }

    async fn expire_tokens(&self) {
        let now_ms = now_ms();
        if self
            .states
            .borrow()
            .join_tokens
            .values()
            .any(|t| t.expires_ms < now_ms)
        {
            self.propose(Command::ExpireJoinTokens { now_ms }).await;
        }
    }

    /// Proposes on this replica; a failure is seen again, and decided again, at the next tick.
    async fn propose(&self, command: Command) {
        log(&command);
        let mut id = [0; 16];
        rand::rng().fill_bytes(&mut id);
        let Ok(bytes) = wire::encode(&Proposal { id, command }) else {
            return;
        };
        match self
            .replica
            .propose(bytes)
            .await
            .map(|reply| wire::decode::<Result<Outcome, Rejection>>(&reply))
        {
            Ok(Ok(Ok(_))) => {}
            Ok(Ok(Err(rejection))) => debug!(%rejection, "the leader's own proposal came too late"),
            Ok(Err(why)) => warn!(%why, "the leader's own proposal"),
            Err(error) => debug!(%error, "the leader's own proposal"),
        }
    }

    /// Makes registered coordinators voters, and removed ones not. A newcomer may take minutes to catch up, so the
    /// change runs aside, one at a time; a newer wish replaces it.
    fn adjust_voters(&self, state: &ControlState, change: &mut Option<VoterChange>) {
        if change.as_ref().is_some_and(|c| c.task.is_finished()) {
            *change = None;
        }
        let Some(voters) = wanted_voters(&self.replica.status(), state) else {
            return;
        };
        if change.as_ref().is_some_and(|c| c.voters == voters) {
            return;
        }
        info!(?voters, "changing the control group's voters");
        let (replica, wanted) = (self.replica.clone(), voters.clone());
        let task = tokio::spawn(async move {
            if let Err(error) = replica.change_members(wanted, BTreeSet::new()).await {
                warn!(%error, "cannot change the control group's voters yet");
                tokio::time::sleep(VOTERS_PAUSE).await;
            }
        });
        *change = Some(VoterChange {
            voters,
            task: AbortOnDropHandle::new(task),
        });
    }
}

/// A change of the control group's voters under way; dropping it gives it up.
struct VoterChange {
    voters: BTreeSet<NodeId>,
    task: AbortOnDropHandle<()>,
}

/// Who should vote in the control group; `None` when it is so already. One newcomer at a time.
fn wanted_voters(status: &ReplicaStatus, state: &ControlState) -> Option<BTreeSet<NodeId>> {
    let mut voters: BTreeSet<_> = status.voters.difference(&state.revoked).copied().collect();
    let joining = state
        .nodes_with(Role::Coordinator)
        .filter(|n| n.up && n.incarnation != 0)
        .map(|n| n.id);
    let room = MAX_VOTERS.saturating_sub(voters.len()).min(1);
    voters.extend(joining.filter(|id| !status.voters.contains(id)).take(room));
    let settled = voters == status.voters && status.learners.is_disjoint(&state.revoked);
    (!settled && !voters.is_empty()).then_some(voters)
}

/// What the leader decides by itself is worth a line each.
fn log(command: &Command) {
    match command {
        Command::SetNodeUp { node, up, .. } => info!(node = node.0, up, "node liveness"),
        Command::FormGroup {
            model,
            expect,
            ranks,
            ..
        } => {
            let nodes: Vec<_> = ranks.iter().map(|r| r.node.0).collect();
            info!(%model, after_epoch = expect.0, ?nodes, "forming group");
        }
        Command::RankFailed {
            group,
            epoch,
            reason,
            ..
        } => {
            warn!(group = group.0, epoch = epoch.0, %reason, "group failed");
        }
        Command::CreateStoreGroup(group) if group.members.len() < STORE_REPLICAS => warn!(
            members = ?group.members,
            "creating the store's group with fewer than {STORE_REPLICAS} copies: what these nodes lose is lost, and \
             members are not added later. For {STORE_REPLICAS} copies start again with {STORE_REPLICAS} store nodes"
        ),
        Command::CreateStoreGroup(group) => {
            info!(members = ?group.members, "creating the store's group")
        }
        _ => {}
    }
}

#[cfg(test)]
#[path = "coordinator_tests.rs"]
mod tests;

//! A worker node's part in the cluster: it takes up the ranks that the control state assigns to it, reports how they are,
//! and answers `infer.*` requests for the groups that it leads.
//!
//! Belongs here: the agent that follows the control state, and the handlers. How a group is formed is control's decision,
//! how a step is computed the engine's.

mod handlers;
mod host;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coordinator::control::{ControlHandle, ControlState, Group, GroupHealth, RankAssignment};
use coordinator::ids::{Epoch, GroupId, NodeId, TenantId};
use coordinator::transport::Transport;
use kernels::KvFormat;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::collective::{self, Hub, Wire};
use crate::scheduler::Limits;
use host::{Hosted, Serving};

/// How often a rank's state is looked at for the heartbeats.
const HEALTH_INTERVAL: Duration = Duration::from_millis(100);

/// What a worker node is told at its start.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// This start of the process, as it registers itself; ranks assigned to an earlier one are not taken up.
    pub incarnation: u64,
    /// Where the collectives of its ranks listen; port 0 takes a free one.
    pub data_listen: SocketAddr,
    /// Threads of a rank on the processor; 0 takes what the rank's device says.
    pub threads: usize,
    /// Sequences that one group decodes at once.
    pub max_sequences: usize,
    /// Requests that may wait in one group; one tenant's take half of what is left of them at most.
    pub max_waiting: usize,
    /// Requests of one tenant that one group decodes at once.
    pub tenant_running: usize,
    /// Requests of one tenant that may wait in one group.
    pub tenant_waiting: usize,
    /// Shares of tenants whose share is not 1, in groups that this node leads.
    pub tenant_weights: BTreeMap<TenantId, u32>,
    /// Rows of one step: how much of a prompt is computed between two tokens of the other answers.
    pub step_rows: usize,
    /// Rows of prompts and guesses in a step in which answers go on.
    pub mixed_rows: usize,
    /// Whether groups that this node leads guess tokens ahead where that pays; answers are the same.
    pub speculate: bool,
    /// How sums travel in groups that this node leads, if its ranks are not all on one host.
    pub wire: Wire,
    /// How keys and values are kept in groups that this node leads.
    pub kv_format: KvFormat,
}

impl WorkerConfig {
    /// The defaults for a listening address: the scheduler's own limits, speculation, exact sums, keys and values in f16.
    pub fn new(incarnation: u64, data_listen: SocketAddr) -> Self {
        let limits = Limits::default();
        Self {
            incarnation,
            data_listen,
            threads: 0,
            max_sequences: limits.max_sequences,
            max_waiting: limits.max_waiting,
            tenant_running: limits.tenant_running,
            tenant_waiting: limits.tenant_waiting,
            tenant_weights: BTreeMap::new(),
            step_rows: limits.step_rows,
            mixed_rows: limits.mixed_rows,
            speculate: true,
            wire: Wire::default(),
            kv_format: KvFormat::default(),
        }
    }
}

/// Why a worker node cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "the collectives cannot listen on {addr}: {source}; choose another data address or end the program that uses it"
    )]
    Listen {
        addr: SocketAddr,
        source: collective::Error,
    },
}

/// A running worker node. Dropping it leaves all groups; [`WorkerNode::shutdown`] also waits for their threads.
pub struct WorkerNode {
    shared: Arc<Shared>,
    agent: JoinHandle<()>,
    stop: watch::Sender<bool>,
    data_addr: SocketAddr,
}

/// What the agent and the handlers both see.
struct Shared {
    node: NodeId,
    config: WorkerConfig,
    control: ControlHandle,
    hub: Hub,
    hosted: Mutex<HashMap<GroupId, Arc<Hosted>>>,
}

impl Shared {
    fn hosted(&self) -> std::sync::MutexGuard<'_, HashMap<GroupId, Arc<Hosted>>> {
        self.hosted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rank of a group that this node hosts in exactly this epoch.
    fn find(&self, group: GroupId, epoch: Epoch) -> Option<Arc<Hosted>> {
        self.hosted()
            .get(&group)
            .filter(|h| h.epoch == epoch)
            .cloned()
    }
}

impl Shared {
    fn forget(&self, tenant: &TenantId) {
        for host in self.hosted().values() {
            if let Ok(Serving::Engine(engine)) = host.serving() {
                engine.forget(tenant);
            }
        }
    }
}

impl WorkerNode {
    /// Binds the data address, registers the services and begins to follow the control state. Needs a Tokio runtime.
    ///
    /// # Errors
    /// [`Error::Listen`].
    pub fn start(
        config: WorkerConfig,
        transport: Transport,
        control: ControlHandle,
    ) -> Result<Self, Error> {
        let addr = config.data_listen;
        let hub = Hub::bind(addr).map_err(|source| Error::Listen { addr, source })?;
        let data_addr = hub.local_addr();
        let shared = Arc::new(Shared {
            node: transport.node_id(),
            config,
            control,
            hub,
            hosted: Mutex::new(HashMap::new()),
        });
        handlers::register(&transport, &shared);
        let (stop, stopped) = watch::channel(false);
        let agent = tokio::spawn(follow_control(shared.clone(), stopped));
        Ok(Self {
            shared,
            agent,
            stop,
            data_addr,
        })
    }

    /// Where its collectives listen; what the node registers as its `data_addr`.
    pub fn data_addr(&self) -> SocketAddr {
        self.data_addr
    }

    /// Leaves all groups and waits until their threads have ended.
    pub async fn shutdown(mut self) {
        let _ = self.stop.send(true);
        let _ = (&mut self.agent).await;
        let hosted = self.leave();
        let _ = tokio::task::spawn_blocking(move || hosted.iter().for_each(|h| h.join())).await;
    }

    fn leave(&self) -> Vec<Arc<Hosted>> {
        let hosted: Vec<Arc<Hosted>> = self.shared.hosted().drain().map(|(_, h)| h).collect();
        hosted.iter().for_each(|h| h.leave());
        hosted
    }
}

impl Drop for WorkerNode {
    fn drop(&mut self) {
        self.agent.abort();
        self.leave();
    }
}

/// Compares the control state with what is hosted, on every change and for the heartbeats.
async fn follow_control(shared: Arc<Shared>, mut stopped: watch::Receiver<bool>) {
    let mut states = shared.control.watch();
    let mut ticks = tokio::time::interval(HEALTH_INTERVAL);
    let mut before = Arc::new(ControlState::default());
    loop {
        let state = states.borrow_and_update().clone();
        reconcile(&shared, &state);
        let gone = |tenant: &&TenantId| !state.tenants.contains_key(*tenant);
        for tenant in before.tenants.keys().filter(gone) {
            shared.forget(tenant);
        }
        before = state;
        loop {
            publish_health(&shared);
            tokio::select! {
                _ = stopped.changed() => return,
                changed = states.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    break;
                }
                _ = ticks.tick() => {}
            }
        }
    }
}

fn reconcile(shared: &Arc<Shared>, state: &ControlState) {
    let mine = |group: &&Group| assignment(shared, group).is_some();
    let wanted: HashMap<GroupId, &Group> = state
        .groups
        .values()
        .filter(mine)
        .map(|g| (g.id, g))
        .collect();
    let mut hosted = shared.hosted();
    // Ranks of groups that are gone or formed again: a thread that is still loading or computing is told to end.
    let stale =
        |(id, h): &(&GroupId, &Arc<Hosted>)| wanted.get(id).is_none_or(|g| g.epoch != h.epoch);
    let stale: Vec<GroupId> = hosted.iter().filter(stale).map(|(&id, _)| id).collect();
    let mut before: HashMap<GroupId, Arc<Hosted>> = HashMap::new();
    for id in stale {
        if let Some(host) = hosted.remove(&id) {
            tracing::info!(group = %id, epoch = %host.epoch, "leaving the group");
            host.leave();
            before.insert(id, host);
        }
    }
    for (id, group) in wanted {
        if hosted.contains_key(&id) {
            continue;
        }
        let Some(assignment) = assignment(shared, group) else {
            continue;
        };
        tracing::info!(group = %id, epoch = %group.epoch, rank = %assignment.rank, model = %group.model, "joining the group");
        let host = Hosted::start(
            shared.clone(),
            group.clone(),
            assignment.clone(),
            before.remove(&id),
        );
        hosted.insert(id, host);
    }
}

/// The rank of this very process in a group.
fn assignment<'a>(shared: &Shared, group: &'a Group) -> Option<&'a RankAssignment> {
    group
        .rank_on(shared.node)
        .filter(|r| r.incarnation == shared.config.incarnation)
}

fn publish_health(shared: &Shared) {
    let mut groups: Vec<GroupHealth> = shared.hosted().values().map(|h| h.health()).collect();
    groups.sort_by_key(|h| h.group);
    shared.control.publish_health(groups);
}

#[cfg(test)]
mod tests;

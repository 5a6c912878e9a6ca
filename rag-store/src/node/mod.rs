//! A store node: the replicas of the store groups that live on this node, with their services, indexes and ingestion.

pub(crate) mod group;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use coordinator::Redacted;
use coordinator::clock::{Instant, monotonic};
use coordinator::control::ControlHandle;
use coordinator::ids::{NodeId, RaftGroupId, TenantId};
use coordinator::replication::{AddressBook, Replica, ReplicaConfig};
use coordinator::transport::Transport;
use futures::future::BoxFuture;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::crypto::Key;
use crate::ingest::Ingest;
use crate::service::{self, Groups};
use crate::store::{Error, keys};
use group::{Group, GroupMachine};

/// Free space that uploads leave for logs, compaction and ingestion, in bytes.
pub const MIN_FREE_BYTES: u64 = 256 * 1024 * 1024;

/// When a key table is compacted after keys in it were destroyed. First soon, but so that several deletions share it. Then again:
/// a compaction keeps what any view still shows, and a view lives as long as a request, a list at most
/// [`service::LIST_LIMIT`]. What this process does not live to do is done at the next start.
pub(crate) const COMPACT_AFTER: [Duration; 3] = [
    Duration::from_secs(2),
    Duration::from_secs(60),
    Duration::from_secs(15 * 60),
];

/// How long [`StoreNode::shutdown`] waits for ingestion and compaction to end.
const STOP_WAIT: Duration = Duration::from_secs(10);

/// Pause before a group that could not be started is tried again.
const START_AGAIN: Duration = Duration::from_secs(5);

/// What a text is embedded for; e5 and its kin tell them apart by a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbedKind {
    Query,
    Passage,
}

/// Gives texts their vectors. The binary wires the inference client into it.
pub trait Embedder: Send + Sync {
    /// One vector a text, all of the same length. `Err` says why no model answers at the moment; the store then waits and asks
    /// again, it never fails a document for it.
    fn embed(
        &self,
        tenant: &TenantId,
        kind: EmbedKind,
        texts: Vec<Redacted<String>>,
    ) -> BoxFuture<'static, Result<Vec<Vec<f32>>, String>>;
}

/// How a store node is set up.
#[derive(Clone)]
pub struct StoreConfig {
    /// This node's own folder for the store; each group gets a folder inside.
    pub dir: PathBuf,
    pub node: NodeId,
    /// The cluster key, 32 bytes: wraps the tenants' keys. The same on every store node.
    pub cluster_key: [u8; 32],
    /// The program that runs the extraction child (`PROGRAM extract`); `None`: this very program.
    pub extract_program: Option<PathBuf>,
    /// Uploads are refused when they would leave less than this free; usually [`MIN_FREE_BYTES`].
    pub min_free_bytes: u64,
}

impl StoreConfig {
    /// The usual configuration.
    pub fn new(dir: PathBuf, node: NodeId, cluster_key: [u8; 32]) -> Self {
        Self {
            dir,
            node,
            cluster_key,
            extract_program: None,
            min_free_bytes: MIN_FREE_BYTES,
        }
    }
}

/// A running store node; dropping it does not stop it, [`StoreNode::shutdown`] does.
pub struct StoreNode {
    inner: Arc<Inner>,
    control: Option<ControlHandle>,
}

struct Inner {
    config: StoreConfig,
    program: PathBuf,
    transport: Transport,
    addresses: Arc<dyn AddressBook>,
    embedder: Arc<dyn Embedder>,
    groups: Groups,
    /// What runs until `stop`.
    tasks: Mutex<Vec<JoinHandle<()>>>,
    stop: CancellationToken,
}

impl StoreNode {
    /// Starts the replicas that this node's folder holds, and those of all store groups of which it is or becomes a member.
    /// [`StoreNode::ready`] tells when they answer.
    ///
    /// # Errors
    /// `Unavailable` when the folder cannot be used: not writable, held by another process, of another version.
    pub async fn start(
        config: StoreConfig,
        transport: Transport,
        control: ControlHandle,
        embedder: Arc<dyn Embedder>,
    ) -> Result<StoreNode, Error> {
        let inner = Inner::open(config, transport, Arc::new(control.clone()), embedder)?;
        inner.spawn(follow_control(inner.clone(), control.clone()));
        Ok(StoreNode {
            inner,
            control: Some(control),
        })
    }

    /// As [`StoreNode::start`] with fixed groups, for tests of the store alone.
    #[cfg(test)]
    pub(crate) fn start_fixed(
        config: StoreConfig,
        transport: Transport,
        addresses: Arc<dyn AddressBook>,
        embedder: Arc<dyn Embedder>,
        groups: &[(RaftGroupId, Vec<NodeId>)],
    ) -> Result<StoreNode, Error> {
        let inner = Inner::open(config, transport, addresses, embedder)?;
        for (id, members) in groups {
            inner.start_group(*id, members)?;
        }
        Ok(StoreNode {
            inner,
            control: None,
        })
    }

    /// Whether every group of this node runs here, knows its leader and has its indexes built.
    pub fn ready(&self) -> bool {
        let groups = self
            .inner
            .groups
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let up = |group: &Group| {
            group.replica.status().leader.is_some() && group.machine.follower.is_caught_up()
        };
        let complete = self.control.as_ref().is_none_or(|control| {
            let state = control.state();
            let mine = |members: &[NodeId]| members.contains(&self.inner.config.node);
            state.revision > 0
                && state
                    .store_groups
                    .iter()
                    .all(|g| !mine(&g.members) || groups.contains_key(&g.id))
        });
        complete && groups.values().all(|group| up(group))
    }

    /// Ends ingestion and compaction, closes the replicas, and ends the indexes' threads. Bounded: what hangs is left behind
    /// and said so.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        let tasks = std::mem::take(
            &mut *self
                .inner
                .tasks
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        let ended = tokio::time::timeout(STOP_WAIT, futures::future::join_all(tasks)).await;
        if ended.is_err() {
            tracing::warn!("ingestion or compaction did not end within {STOP_WAIT:?}");
        }
        let groups: Vec<Arc<Group>> = std::mem::take(
            &mut *self
                .inner
                .groups
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        )
        .into_values()
        .collect();
        for group in groups {
            group.replica.shutdown().await;
            group.machine.follower.close().await;
        }
    }

    #[cfg(test)]
    pub(crate) fn group(&self, id: RaftGroupId) -> Option<Arc<Group>> {
        self.inner
            .groups
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&id)
            .cloned()
    }
}

impl Inner {
    fn open(
        config: StoreConfig,
        transport: Transport,
        addresses: Arc<dyn AddressBook>,
        embedder: Arc<dyn Embedder>,
    ) -> Result<Arc<Self>, Error> {
        let program = match &config.extract_program {
            Some(program) => program.clone(),
            None => std::env::current_exe()
                .map_err(|e| Error::unavailable(format!("this program's path: {e}")))?,
        };
        std::fs::create_dir_all(&config.dir).map_err(|e| unusable(&config.dir, &e))?;
        let groups = Groups::default();
        service::register(&transport, &groups, &embedder);
        let stop = CancellationToken::new();
        let inner = Arc::new(Self {
            config,
            program,
            transport,
            addresses,
            embedder,
            groups,
            tasks: Mutex::default(),
            stop,
        });
        for (id, members) in groups_on_disk(&inner.config.dir)? {
            inner.start_group(id, &members)?;
        }
        Ok(inner)
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.push(tokio::spawn(task));
    }

    fn holds(&self, id: RaftGroupId) -> bool {
        self.groups
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(&id)
    }

    /// Starts a group unless it runs already, e.g. because its folder was there.
    fn start_group(self: &Arc<Self>, id: RaftGroupId, members: &[NodeId]) -> Result<(), Error> {
        if self.holds(id) {
            return Ok(());
        }
        let dir = self.config.dir.join(format!("group-{id}"));
        std::fs::create_dir_all(&dir).map_err(|e| unusable(&dir, &e))?;
        keep_members(&dir, members)?;
        let root = Key::root(&self.config.cluster_key);
        let machine = GroupMachine::new(root.clone()).map_err(|e| unusable(&dir, &e))?;
        let machine = Arc::new(machine);
        let config = ReplicaConfig::new(
            id,
            self.config.node,
            dir.join("raft"),
            Some(members.to_vec()),
        );
        let replica = Replica::start(
            config,
            self.transport.clone(),
            self.addresses.clone(),
            machine.clone(),
        )
        .map_err(|error| Error::unavailable(error.to_string()))?;
        let node = self.config.node;
        let min_free_bytes = AtomicU64::new(self.config.min_free_bytes);
        let group = Arc::new(Group {
            replica,
            machine,
            root,
            node,
            dir,
            min_free_bytes,
        });
        let ingest = Ingest {
            group: group.clone(),
            embedder: self.embedder.clone(),
            program: self.program.clone(),
        };
        self.spawn(ingest.run(self.stop.clone()));
        self.spawn(compact(group.clone(), self.stop.clone()));
        self.groups
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, group);
        tracing::info!(group = id.0, members = members.len(), "store group started");
        Ok(())
    }
}

fn unusable(dir: &Path, error: &std::io::Error) -> Error {
    Error::unavailable(format!("{} cannot be used: {error}", dir.display()))
}

/// Who was first in a group is needed again when a node dies before its replica wrote anything.
fn keep_members(dir: &Path, members: &[NodeId]) -> Result<(), Error> {
    let file = dir.join("members");
    if file.exists() {
        return Ok(());
    }
    let list: Vec<String> = members.iter().map(ToString::to_string).collect();
    let fresh = dir.join("members.new");
    let written =
        std::fs::write(&fresh, list.join(" ")).and_then(|()| std::fs::rename(&fresh, &file));
    written.map_err(|e| unusable(dir, &e))
}

fn groups_on_disk(dir: &Path) -> Result<BTreeMap<RaftGroupId, Vec<NodeId>>, Error> {
    let mut groups = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(|e| unusable(dir, &e))? {
        let path = entry.map_err(|e| unusable(dir, &e))?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix("group-"));
        let Some(Ok(id)) = name.map(str::parse::<RaftGroupId>) else {
            continue;
        };
        let Ok(members) = std::fs::read_to_string(path.join("members")) else {
            continue;
        };
        let members: Vec<NodeId> = members
            .split_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect();
        if !members.is_empty() {
            groups.insert(id, members);
        }
    }
    Ok(groups)
}

/// Starts groups of which this node becomes a member.
async fn follow_control(inner: Arc<Inner>, control: ControlHandle) {
    let mut states = control.watch();
    loop {
        let state = states.borrow_and_update().clone();
        let mut failed = false;
        for wanted in state
            .store_groups
            .iter()
            .filter(|g| g.members.contains(&inner.config.node))
        {
            if let Err(error) = inner.start_group(wanted.id, &wanted.members) {
                tracing::error!(group = wanted.id.0, %error, "store group does not start; trying again");
                failed = true;
            }
        }
        let again = if failed {
            START_AGAIN
        } else {
            Duration::from_secs(3600)
        };
        tokio::select! {
            () = inner.stop.cancelled() => return,
            changed = states.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(again) => {}
        }
    }
}

/// Destroyed keys leave the state's files only when those are rewritten; the key table is small. The Raft log keeps the entry
/// that brought a key until it is truncated.
async fn compact(group: Arc<Group>, stop: CancellationToken) {
    // When which tenant's table is due, and how many compactions it has had since its newest erasure.
    let mut due: BTreeMap<TenantId, (Instant, usize)> = BTreeMap::new();
    loop {
        let next = due.values().map(|(at, _)| *at).min();
        let wait = next.map_or(Duration::MAX, |at| {
            at.saturating_duration_since(monotonic())
        });
        tokio::select! {
            () = stop.cancelled() => return,
            () = group.machine.erased.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
        for (tenant, in_this_run) in group.machine.take_erased() {
            let first = monotonic() + COMPACT_AFTER[0];
            // No view outlives its process: after a start once is enough.
            let last = COMPACT_AFTER.len() - 1;
            let (at, done) = due.entry(tenant).or_insert((first, last));
            // One that is due sooner is not put off, or a busy tenant's table would never be compacted.
            *at = (*at).min(first);
            if in_this_run {
                *done = 0;
            }
        }
        let now = monotonic();
        let ready: Vec<TenantId> = due
            .iter()
            .filter(|(_, (at, _))| *at <= now)
            .map(|(tenant, _)| tenant.clone())
            .collect();
        for tenant in ready {
            if stop.is_cancelled() {
                return;
            }
            let compacted = group
                .replica
                .compact_prefix(&keys::data_keys(&tenant))
                .await;
            let Some((at, done)) = due.get_mut(&tenant) else {
                continue;
            };
            match compacted {
                Ok(()) => *done += 1,
                Err(error) => {
                    tracing::warn!(%tenant, %error, "destroyed keys are not compacted away yet");
                }
            }
            match COMPACT_AFTER.get(*done) {
                Some(pause) => *at = monotonic() + *pause,
                None => drop(due.remove(&tenant)),
            }
        }
    }
}

#[cfg(test)]
mod tests;

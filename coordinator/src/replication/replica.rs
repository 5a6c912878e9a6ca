//! The handle that callers hold, and what it shares with the replica's threads.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, mpsc};
use std::thread::JoinHandle;

use bytes::Bytes;
use futures::future::BoxFuture;
use protobuf::Message as _;
use raft::eraftpb::{Message, MessageType};
use tokio::runtime::Handle as Runtime;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::timeout;

use super::apply::Pending;
use super::core::Event;
use super::directory::Directory;
use super::store::Store;
use super::{Error, MAX_COMMAND_BYTES, StateMachine, View, erase, members, metrics, run, snapshot};
use crate::clock::Duration;
use crate::ids::{NodeId, RaftGroupId};
use crate::transport::{ErrorCode, RemoteError, Reply, Transport};

/// A commit takes some ten milliseconds; a failover about a second.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
const READ_TIMEOUT: Duration = Duration::from_secs(2);
/// A leader that shuts down gives its heir this long.
const HAND_OVER_TIMEOUT: Duration = Duration::from_millis(500);
/// Proposals that wait, in [`PROPOSAL_UNIT_BYTES`]: 64 MiB, or as many thousand small ones.
const MAX_PROPOSAL_UNITS: usize = 64 * 1024;
const PROPOSAL_UNIT_BYTES: usize = 1024;
/// Raft messages that wait for the Raft thread; beyond, they are dropped, which Raft repairs.
const MAX_INBOX_BYTES: usize = 64 * 1024 * 1024;

/// Where nodes listen now.
pub trait AddressBook: Send + Sync {
    /// The transport address of a node; `None` while it is not known.
    fn addr(&self, node: NodeId) -> Option<SocketAddr>;

    /// Whether a node that the group's membership, as far as it is applied here, does not name may speak as a member:
    /// those that were added lately, and all when this replica has only joined. Everybody else's messages are dropped.
    /// A book that has only members' addresses need not say more.
    fn is_peer(&self, group: RaftGroupId, node: NodeId) -> bool {
        let _ = group;
        self.addr(node).is_some()
    }
}

/// What makes one replica.
#[derive(Clone, Debug)]
pub struct ReplicaConfig {
    pub group: RaftGroupId,
    pub node: NodeId,
    /// Directory of this replica alone.
    pub dir: PathBuf,
    /// The group's first voters, the same on each of them, for a new group. `None` for a node that joins a running
    /// group; it waits for a snapshot. Ignored once the directory holds data.
    pub bootstrap: Option<Vec<NodeId>>,
    /// Unit of Raft's timers: heartbeats every 2, elections after 10 to 20 ticks without one.
    pub tick_ms: u64,
    /// Log entries kept for members that lag; beyond, they get a snapshot.
    pub max_log_entries: u64,
    /// Bytes of log kept for members that lag.
    pub max_log_bytes: u64,
}

impl ReplicaConfig {
    /// The usual timers and limits.
    pub fn new(
        group: RaftGroupId,
        node: NodeId,
        dir: impl AsRef<Path>,
        bootstrap: Option<Vec<NodeId>>,
    ) -> Self {
        Self {
            group,
            node,
            dir: dir.as_ref().to_owned(),
            bootstrap,
            tick_ms: 50,
            max_log_entries: 10_000,
            max_log_bytes: 64 * 1024 * 1024,
        }
    }
}

/// How a replica stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReplicaStatus {
    pub leader: Option<NodeId>,
    pub is_leader: bool,
    pub term: u64,
    /// Index up to which a majority holds the log, as far as known here.
    pub commit: u64,
    /// Index up to which the state machine here has come, derived data included.
    pub applied: u64,
    pub first_log_index: u64,
    pub last_log_index: u64,
    pub voters: BTreeSet<NodeId>,
    /// The voters before, while a membership change is under way.
    pub voters_outgoing: BTreeSet<NodeId>,
    pub learners: BTreeSet<NodeId>,
    /// A membership change is under way.
    pub changing: bool,
    /// Why the replica stands aside; `None` while it works.
    pub failure: Option<String>,
}

/// One member of one Raft group. Cheap to clone; lives until [`Replica::shutdown`], or until the last clone is dropped.
#[derive(Clone)]
pub struct Replica {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.leave();
    }
}

/// What the handle, the threads and the services of a replica share.
pub(super) struct Shared {
    pub(super) config: ReplicaConfig,
    pub(super) transport: Transport,
    pub(super) address_book: Arc<dyn AddressBook>,
    pub(super) machine: Arc<dyn StateMachine>,
    pub(super) runtime: Runtime,
    pub(super) raft_service: String,
    pub(super) snapshot_service: String,
    pub(super) pending: Arc<Pending>,
    pub(super) applied: watch::Sender<u64>,
    /// The open store, or why there is none.
    pub(super) store: RwLock<Result<Arc<Store>, Error>>,
    pub(super) inbox_bytes: AtomicUsize,
    events: mpsc::Sender<Event>,
    status: watch::Sender<ReplicaStatus>,
    leadership: watch::Sender<Option<NodeId>>,
    proposals: Semaphore,
}

impl Replica {
    /// Opens the directory and takes part in the group. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Format`], [`Error::Locked`], [`Error::Foreign`], [`Error::Storage`] about the directory,
    /// [`Error::Config`] about the rest.
    pub fn start<M: StateMachine>(
        config: ReplicaConfig,
        transport: Transport,
        address_book: Arc<dyn AddressBook>,
        machine: Arc<M>,
    ) -> Result<Replica, Error> {
        if config.node.0 == 0
            || config
                .bootstrap
                .as_ref()
                .is_some_and(|voters| voters.iter().any(|n| n.0 == 0))
        {
            return Err(Error::Config {
                why: "node 0 cannot be a member".to_owned(),
            });
        }
        if config.bootstrap.as_ref().is_some_and(Vec::is_empty) {
            return Err(Error::Config {
                why: "a new group needs at least one voter".to_owned(),
            });
        }
        let directory = Arc::new(Directory::open(&config.dir, config.group, config.node)?);
        let store = Store::open(directory.clone(), config.bootstrap.as_deref())?;
        let (events, inbox) = mpsc::channel();
        let shared = Arc::new(Shared {
            raft_service: format!("raft/{}", config.group),
            snapshot_service: format!("raft.snapshot/{}", config.group),
            transport,
            address_book,
            machine,
            runtime: Runtime::current(),
            pending: Arc::default(),
            applied: watch::Sender::new(0),
            store: RwLock::new(Err(Error::Closed)),
            inbox_bytes: AtomicUsize::new(0),
            events,
            status: watch::Sender::new(ReplicaStatus::default()),
            leadership: watch::Sender::new(None),
            proposals: Semaphore::new(MAX_PROPOSAL_UNITS),
            config,
        });
        let store = Arc::new(store);
        *shared.store.write().unwrap_or_else(PoisonError::into_inner) = Ok(store.clone());
        let thread = std::thread::Builder::new()
            .name(format!("raft-{}", shared.config.group))
            .spawn({
                let shared = shared.clone();
                move || run::supervise(&shared, &directory, store, &inbox)
            })
            .map_err(|e| Error::Config {
                why: format!("no thread could be started: {e}"),
            })?;
        shared.serve();
        Ok(Replica {
            handle: Arc::new(Handle {
                shared,
                thread: Mutex::new(Some(thread)),
            }),
        })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    /// Proposes a command (at most [`MAX_COMMAND_BYTES`]) and returns the state machine's reply, once a majority holds
    /// the command and it is applied here.
    ///
    /// # Errors
    /// [`Error::NotLeader`], [`Error::TooLarge`] and [`Error::Overloaded`]: nothing happened. [`Error::Interrupted`],
    /// [`Error::Timeout`], [`Error::Storage`]: it may still take effect, so commands should bear repetition.
    pub async fn propose(&self, command: Vec<u8>) -> Result<Vec<u8>, Error> {
        let answer = self.propose_uncounted(command).await;
        if let Err(error) = &answer {
            metrics::proposal_failed(self.shared().config.group, error);
        }
        answer
    }

    async fn propose_uncounted(&self, command: Vec<u8>) -> Result<Vec<u8>, Error> {
        if command.len() > MAX_COMMAND_BYTES {
            return Err(Error::TooLarge {
                bytes: command.len(),
            });
        }
        let units = u32::try_from(command.len() / PROPOSAL_UNIT_BYTES + 1).unwrap_or(u32::MAX);
        let place = timeout(PROPOSE_TIMEOUT, self.shared().proposals.acquire_many(units)).await;
        let _place = place
            .map_err(|_| Error::Overloaded)?
            .map_err(|_| Error::Closed)?;
        let (reply, answer) = oneshot::channel();
        self.shared().tell(Event::Propose { command, reply });
        match timeout(PROPOSE_TIMEOUT, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(self.shared().failure()),
            Err(_) => Err(Error::Timeout),
        }
    }

    /// A view that shows at least everything that was acknowledged anywhere before the call. Works on any member.
    ///
    /// # Errors
    /// [`Error::Timeout`] or [`Error::NotLeader`] when no majority answers.
    pub async fn read_index(&self) -> Result<View, Error> {
        let shared = self.shared();
        let read = async {
            let (reply, answer) = oneshot::channel();
            shared.tell(Event::Read(reply));
            let index = answer.await.map_err(|_| shared.failure())?;
            let mut applied = shared.applied.subscribe();
            applied
                .wait_for(|applied| *applied >= index)
                .await
                .map_err(|_| shared.failure())?;
            shared.store()?.view()
        };
        match timeout(READ_TIMEOUT, read).await {
            Ok(view) => view,
            Err(_) if self.status().leader.is_none() => Err(Error::NotLeader { leader: None }),
            Err(_) => Err(Error::Timeout),
        }
    }

    /// What this replica has now, maybe behind the others. While the disk fails, reads of it return [`Error::Storage`].
    pub fn local_view(&self) -> View {
        self.shared()
            .store()
            .and_then(|store| store.view())
            .unwrap_or_else(View::failed)
    }

    pub fn status(&self) -> ReplicaStatus {
        self.shared().status.borrow().clone()
    }

    /// The status as it changes.
    pub fn watch_status(&self) -> watch::Receiver<ReplicaStatus> {
        self.shared().status.subscribe()
    }

    /// The leader as known here, from the newest term that this replica knows.
    pub fn leadership(&self) -> watch::Receiver<Option<NodeId>> {
        self.shared().leadership.subscribe()
    }

    /// Makes these the members (on the leader only): new ones learn the state first, then all changes at once (joint
    /// consensus). Returns when the change is complete.
    ///
    /// # Errors
    /// [`Error::NotLeader`]; [`Error::Config`] when no voter would be left, or another change is under way;
    /// [`Error::Timeout`] when a new member does not catch up.
    pub async fn change_members(
        &self,
        voters: BTreeSet<NodeId>,
        learners: BTreeSet<NodeId>,
    ) -> Result<(), Error> {
        members::change(self, voters, learners).await
    }

    /// Asks the Raft thread.
    pub(super) async fn ask<T>(
        &self,
        event: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Event,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.shared().tell(event(reply));
        answer
            .await
            .unwrap_or_else(|_| Err(self.shared().failure()))
    }

    /// Rewrites the files that hold keys with this prefix, so that values of the state that were deleted before the call
    /// leave the disk. They may still stand in the log: see [`Replica::forget_log`].
    ///
    /// # Errors
    /// [`Error::Storage`]; [`Error::Timeout`] when a [`View`] from before the call is held for too long. Call again later.
    pub async fn compact_prefix(&self, prefix: &[u8]) -> Result<(), Error> {
        erase::compact_prefix(self.shared().store()?, prefix).await
    }

    /// Takes commands that were applied here before the call off this replica's disk: they stand in its log, and in the
    /// database's own write-ahead log. Every member has to do it for itself. A member that lags too far behind gets a
    /// snapshot instead of the entries that are gone.
    ///
    /// # Errors
    /// As [`Replica::compact_prefix`].
    pub async fn forget_log(&self) -> Result<(), Error> {
        erase::forget_log(self).await
    }

    /// Hands leadership over where possible, writes everything out and closes the directory.
    pub async fn shutdown(&self) {
        let shared = self.shared();
        if self.status().is_leader && self.status().voters.len() > 1 {
            shared.tell(Event::HandOver);
            let mut status = shared.status.subscribe();
            let _ = timeout(
                HAND_OVER_TIMEOUT,
                status.wait_for(|status| !status.is_leader),
            )
            .await;
        }
        shared.leave();
        let thread = self
            .handle
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // A panic of the thread was logged where it happened.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

impl Shared {
    pub(super) fn tell(&self, event: Event) {
        // Fails only after the end, when nobody waits for its effect.
        let _ = self.events.send(event);
    }

    pub(super) fn store(&self) -> Result<Arc<Store>, Error> {
        self.store
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn failure(&self) -> Error {
        self.store().err().unwrap_or(Error::Closed)
    }

    pub(super) fn publish(&self, status: ReplicaStatus) {
        let leader = status.leader;
        if *self.status.borrow() != status {
            metrics::status(self.config.group, &status);
        }
        self.status.send_if_modified(|known| {
            let changed = *known != status;
            *known = status;
            changed
        });
        self.leadership
            .send_if_modified(|known| std::mem::replace(known, leader) != leader);
    }

    pub(super) fn publish_failure(&self, error: &Error) {
        let mut status = self.status.borrow().clone();
        status.leader = None;
        status.is_leader = false;
        status.failure = Some(error.to_string());
        self.publish(status);
    }

    fn leave(&self) {
        self.transport.unregister(&self.raft_service);
        self.transport.unregister(&self.snapshot_service);
        self.tell(Event::Stop);
    }

    /// Offers the group's two services.
    fn serve(self: &Arc<Self>) {
        let shared = self.clone();
        let take = move |from: NodeId, bytes: Bytes, _: Reply| -> BoxFuture<'static, ()> {
            shared.take_message(from, &bytes);
            Box::pin(std::future::ready(()))
        };
        self.transport
            .register_named(self.raft_service.clone(), Arc::new(take));
        let shared = self.clone();
        let give = move |from: NodeId, _: Bytes, reply: Reply| -> BoxFuture<'static, ()> {
            Box::pin(shared.clone().give_snapshot(from, reply))
        };
        self.transport
            .register_named(self.snapshot_service.clone(), Arc::new(give));
    }

    pub(super) fn take_message(&self, from: NodeId, bytes: &[u8]) {
        let Ok(message) = Message::parse_from_bytes(bytes) else {
            return tracing::warn!(group = %self.config.group, %from, "a Raft message cannot be read");
        };
        if message.from != from.0 || message.to != self.config.node.0 {
            return tracing::warn!(group = %self.config.group, %from, "a Raft message bears another node's name");
        }
        if !self.may_speak(from) {
            return tracing::debug!(group = %self.config.group, %from, "a Raft message of a node that is no member was dropped");
        }
        if !is_sound(&message) {
            return tracing::warn!(group = %self.config.group, %from, "a Raft message that no member sends was dropped");
        }
        if self.inbox_bytes.fetch_add(bytes.len(), Ordering::Relaxed) > MAX_INBOX_BYTES {
            self.inbox_bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
            return tracing::debug!(group = %self.config.group, %from, "a Raft message was dropped, too many wait");
        }
        self.tell(Event::Message {
            message,
            bytes: bytes.len(),
        });
    }

    /// A node's certificate says who it is, not that it belongs to this group.
    fn may_speak(&self, from: NodeId) -> bool {
        if self.transport.is_revoked(from) {
            return false;
        }
        let is_member = {
            let status = self.status.borrow();
            [&status.voters, &status.voters_outgoing, &status.learners]
                .iter()
                .any(|members| members.contains(&from))
        };
        is_member || self.address_book.is_peer(self.config.group, from)
    }

    async fn give_snapshot(self: Arc<Self>, to: NodeId, reply: Reply) {
        let is_member = {
            let status = self.status.borrow();
            status.voters.contains(&to) || status.learners.contains(&to)
        };
        if !is_member {
            let text = format!("node {to} is no member of group {}", self.config.group);
            return reply
                .fail(RemoteError::new(ErrorCode::Forbidden, text))
                .await;
        }
        let view = match self.store().and_then(|store| store.view()) {
            Ok(view) => view,
            Err(error) => {
                return reply
                    .fail(RemoteError::new(ErrorCode::Storage, error.to_string()))
                    .await;
            }
        };
        let alive = {
            let shared = self.clone();
            move || shared.tell(Event::SnapshotServed { to, outcome: None })
        };
        let complete = snapshot::serve(view, reply, alive).await;
        self.tell(Event::SnapshotServed {
            to,
            outcome: Some(complete),
        });
    }
}

/// Whether the core may see it: it takes the one entry of a read for granted, and callers propose and hand over on the
/// leader only, so no member forwards either.
fn is_sound(message: &Message) -> bool {
    match message.get_msg_type() {
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => message.entries.len() == 1,
        MessageType::MsgPropose | MessageType::MsgTransferLeader => false,
        _ => true,
    }
}

//! How any node takes part in control: it watches the state, proposes commands and sends heartbeats, wherever the
//! leader is at the moment.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rand::RngCore;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use super::command::{Command, Outcome, Rejection};
use super::health::{GroupHealth, HEARTBEAT_INTERVAL_MS, Heartbeat};
use super::state::{ApiKey, ControlState, Node};
use super::wire::{
    self, ControlStatus, HeartbeatReply, Proposal, ProposeReply, ReadReply, WatchFrame,
    WatchRequest,
};
use super::{SERVICE_HEARTBEAT, SERVICE_PROPOSE, SERVICE_READ, SERVICE_STATUS, SERVICE_WATCH};
use crate::ids::{NodeId, RaftGroupId, Role};
use crate::replication::AddressBook;
use crate::transport::{self, Transport};

/// Longest time that a proposal or a read looks for a leader: an election takes about one second, twice at worst.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Longest time that what was committed is waited for to be seen here: a new leader is there by then.
const CATCH_UP: Duration = Duration::from_secs(2);
/// One attempt at one coordinator.
const ATTEMPT: Duration = Duration::from_millis(1_000);
/// A heartbeat that takes longer than two intervals is late anyway.
const HEARTBEAT_ATTEMPT: Duration = Duration::from_millis(500);
/// Coordinators that one heartbeat asks for the leader: as many as vote at most.
const BEAT_CANDIDATES: usize = 7;
/// A watched coordinator says something every second; after this silence another one is asked.
const WATCH_SILENCE: Duration = Duration::from_secs(3);
/// A coordinator that did not answer is asked last for so long: an election and a restart are over by then.
const SILENT_FOR: Duration = Duration::from_secs(2);
/// How often a watch looks whether its coordinator was found silent by others.
const WATCH_SLICE: Duration = Duration::from_millis(200);
/// Pause after every known coordinator was asked in vain.
const ROUND_PAUSE: Duration = Duration::from_millis(50);

/// Why control did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Rejected(#[from] Rejection),
    #[error("not allowed: {why}")]
    Denied { why: String },
    #[error(
        "no coordinator answered within {waited_ms} ms: {why}; is a majority of the coordinators running?"
    )]
    Unavailable { waited_ms: u64, why: String },
    #[error("{why}; do all nodes run the same version?")]
    Protocol { why: String },
}

/// A node's access to control. Cheap to clone; when the last clone is dropped, watching ends.
#[derive(Clone)]
pub struct ControlHandle {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Transport,
    seeds: Vec<SocketAddr>,
    state: watch::Sender<Arc<ControlState>>,
    whereabouts: Mutex<Whereabouts>,
    health: watch::Sender<Vec<GroupHealth>>,
}

impl ControlHandle {
    /// Watches control through the coordinators at `seeds` and those that the state names later. Needs a tokio runtime;
    /// returns at once, with an empty state until the first coordinator has answered.
    pub fn connect(transport: Transport, seeds: Vec<SocketAddr>) -> ControlHandle {
        let inner = Arc::new(Inner {
            transport,
            seeds,
            state: watch::Sender::new(Arc::new(ControlState::default())),
            whereabouts: Mutex::default(),
            health: watch::Sender::new(Vec::new()),
        });
        tokio::spawn(watch_for_ever(Arc::downgrade(&inner)));
        ControlHandle { inner }
    }

    /// The latest state that this node has heard of.
    pub fn state(&self) -> Arc<ControlState> {
        self.inner.state.borrow().clone()
    }

    /// Follows the state; revisions only grow.
    pub fn watch(&self) -> watch::Receiver<Arc<ControlState>> {
        self.inner.state.subscribe()
    }

    /// The transport that this handle speaks through.
    pub fn transport(&self) -> &Transport {
        &self.inner.transport
    }

    /// Waits until the watched state fulfils `condition`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when it does not within `patience`.
    pub async fn wait_for(
        &self,
        patience: Duration,
        mut condition: impl FnMut(&ControlState) -> bool,
    ) -> Result<Arc<ControlState>, Error> {
        let mut states = self.watch();
        let waited = timeout(patience, states.wait_for(|s| condition(s))).await;
        match waited {
            Ok(Ok(state)) => Ok(state.clone()),
            _ => Err(unavailable(
                patience,
                "the awaited control state did not come about",
            )),
        }
    }

    /// Has `command` committed by the cluster, exactly once, and returns when this is so and [`Self::state`] shows it (unless no
    /// coordinator shows its state within [`CATCH_UP`] after the commit; then the watch brings it).
    ///
    /// # Errors
    /// [`Error::Rejected`] when the rules forbid it, [`Error::Denied`] when this node may not, [`Error::Unavailable`]
    /// when no leader was found within [`PATIENCE`] (the command may then still take effect).
    pub async fn propose(&self, command: Command) -> Result<Outcome, Error> {
        let mut id = [0; 16];
        rand::rng().fill_bytes(&mut id);
        let request = encode(&Proposal { id, command })?;
        let outcome = self
            .ask(SERVICE_PROPOSE, request, |bytes| {
                match decode::<ProposeReply>(&bytes)? {
                    ProposeReply::Applied(result) => Ok(Answer::Final(result?)),
                    ProposeReply::NotLeader { leader } => Ok(Answer::Elsewhere(leader)),
                    ProposeReply::Denied { why } => Err(Error::Denied { why }),
                    ProposeReply::Unavailable { why } => Ok(Answer::Again(why)),
                }
            })
            .await?;
        // The watch may follow another coordinator, which has not applied yet what the leader has.
        if let Outcome::Done { revision } = outcome
            && self.state().revision < revision
            && !matches!(timeout(CATCH_UP, self.read()).await, Ok(Ok(_)))
        {
            debug!(revision, "what was committed is not to be seen here yet");
        }
        Ok(outcome)
    }

    /// The state with everything that was committed before the call (linearizable).
    ///
    /// # Errors
    /// [`Error::Unavailable`] when no leader was found within [`PATIENCE`].
    pub async fn read(&self) -> Result<Arc<ControlState>, Error> {
        let state = self
            .ask(SERVICE_READ, Bytes::new(), |bytes| {
                match decode::<ReadReply>(&bytes)? {
                    ReadReply::State(state) => Ok(Answer::Final(Arc::new(*state))),
                    ReadReply::Denied { why } => Err(Error::Denied { why }),
                    ReadReply::Unavailable { why } => Ok(Answer::Again(why)),
                }
            })
            .await?;
        self.inner.publish(state.clone());
        Ok(state)
    }

    /// How the control group stands, as seen by a coordinator that knows a leader.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when none does within [`PATIENCE`].
    pub async fn control_status(&self) -> Result<ControlStatus, Error> {
        self.ask(SERVICE_STATUS, Bytes::new(), |bytes| {
            let status = decode::<ControlStatus>(&bytes)?;
            if status.leader.is_some() {
                Ok(Answer::Final(status))
            } else {
                Ok(Answer::Again("no leader".to_owned()))
            }
        })
        .await
    }

    /// What an API key stands for, by the latest watched state. Constant time over the stored keys.
    pub fn authenticate(&self, key: &str) -> Option<ApiKey> {
        self.inner.state.borrow().authenticate(key).cloned()
    }

    /// Tells the heartbeats how this node's groups are; a break is sent at once.
    pub fn publish_health(&self, groups: Vec<GroupHealth>) {
        self.inner.health.send_replace(groups);
    }

    /// Registers this node and sends its heartbeats until the task is dropped. Registers again whenever the leader does
    /// not know this process, and gives up only when the node was removed from the cluster.
    ///
    /// # Errors
    /// [`Error::Rejected`] or [`Error::Denied`] when the cluster refuses the node for good.
    pub async fn run_member(&self, node: Node) -> Result<(), Error> {
        let mut health = self.inner.health.subscribe();
        loop {
            match self.propose(Command::RegisterNode(node.clone())).await {
                Ok(_) => info!(node = node.id.0, name = %node.name, "registered"),
                Err(Error::Unavailable { why, .. }) => {
                    warn!(%why, "cannot register yet, trying again");
                    continue;
                }
                Err(refused) => return Err(refused),
            }
            let mut next = Instant::now();
            loop {
                let groups = health.borrow_and_update().clone();
                let broken = groups.iter().any(|g| g.broken.is_some());
                let heartbeat = Heartbeat {
                    node: node.id,
                    incarnation: node.incarnation,
                    revision: self.state().revision,
                    groups,
                };
                if !self.beat(&heartbeat).await {
                    break;
                }
                next = (next + Duration::from_millis(HEARTBEAT_INTERVAL_MS)).max(Instant::now());
                // A break that is news does not wait for the next beat.
                let news = async {
                    while health.changed().await.is_ok() {
                        if !broken && health.borrow().iter().any(|g| g.broken.is_some()) {
                            return;
                        }
                    }
                };
                let _ = timeout(next.saturating_duration_since(Instant::now()), news).await;
            }
        }
    }

    /// Sends one heartbeat; false when the leader does not know this process. First to where the leader was; when that one
    /// knows no better or is late, to all others at once, so that one slow coordinator costs no beat.
    async fn beat(&self, heartbeat: &Heartbeat) -> bool {
        let Ok(request) = encode(heartbeat) else {
            return true;
        };
        let send = |to: SocketAddr| {
            let request = request.clone();
            async move {
                let transport = &self.inner.transport;
                let reply = transport.call(to, SERVICE_HEARTBEAT, request, HEARTBEAT_ATTEMPT);
                (to, reply.await)
            }
        };
        let mut others = self.inner.candidates();
        others.truncate(BEAT_CANDIDATES);
        let mut asked = FuturesUnordered::new();
        let mut tried = Vec::new();
        if !others.is_empty() {
            tried.push(others.remove(0));
            asked.extend(tried.iter().copied().map(&send));
        }
        let mut late = std::pin::pin!(sleep(Duration::from_millis(HEARTBEAT_INTERVAL_MS)));
        loop {
            let (to, reply) = tokio::select! {
                Some(answer) = asked.next() => answer,
                () = &mut late, if !others.is_empty() => {
                    tried.extend(&others);
                    asked.extend(others.drain(..).map(&send));
                    continue;
                }
                else => return true,
            };
            if reply.is_ok() {
                self.inner.answered(to);
            }
            match reply.map(|bytes| wire::decode(&bytes)) {
                Ok(Ok(HeartbeatReply::Heard)) => {
                    self.inner.set_leader(Some(to));
                    return true;
                }
                Ok(Ok(HeartbeatReply::Unregistered)) => return false,
                Ok(Ok(HeartbeatReply::NotLeader {
                    leader: Some(leader),
                })) if leader != to => {
                    self.inner.set_leader(Some(leader));
                    if !tried.contains(&leader) {
                        others.retain(|other| *other != leader);
                        tried.push(leader);
                        asked.push(send(leader));
                        continue;
                    }
                }
                // It knows no better; another one may.
                Ok(Ok(HeartbeatReply::NotLeader { .. })) => {
                    self.inner.whereabouts().does_not_lead(to);
                }
                Ok(Err(why)) => {
                    warn!(%why, "heartbeat");
                    return true;
                }
                Err(error) => {
                    debug!(%error, %to, "heartbeat not delivered");
                    self.inner.forget(to);
                }
            }
            tried.extend(&others);
            asked.extend(others.drain(..).map(&send));
        }
    }

    /// Asks coordinators in turn, the leader first, until one gives a final answer.
    async fn ask<T>(
        &self,
        service: &'static str,
        request: impl Into<Bytes>,
        mut read: impl FnMut(Bytes) -> Result<Answer<T>, Error>,
    ) -> Result<T, Error> {
        let request = request.into();
        let deadline = Instant::now() + PATIENCE;
        let mut why = String::from("no coordinator is configured");
        loop {
            let mut redirected = None;
            for to in self.inner.candidates() {
                let to = redirected.take().unwrap_or(to);
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(unavailable(PATIENCE, &why));
                }
                match self
                    .inner
                    .transport
                    .call(to, service, request.clone(), ATTEMPT.min(left))
                    .await
                {
                    Ok(bytes) => match read(bytes)? {
                        Answer::Final(answer) => {
                            return Ok(answer);
                        }
                        Answer::Elsewhere(leader) => {
                            why = format!("{to} is not the leader");
                            self.inner.set_leader(leader);
                            redirected = self.inner.whereabouts().leader.filter(|l| *l != to);
                        }
                        Answer::Again(reason) => why = reason,
                    },
                    Err(transport::Error::Refused(refused)) => why = refused.to_string(),
                    Err(error) => {
                        why = error.to_string();
                        self.inner.forget(to);
                    }
                }
            }
            if Instant::now() >= deadline {
                return Err(unavailable(PATIENCE, &why));
            }
            sleep(ROUND_PAUSE).await;
        }
    }
}

impl AddressBook for ControlHandle {
    fn addr(&self, node: NodeId) -> Option<SocketAddr> {
        self.inner.state.borrow().nodes.get(&node).map(|n| n.addr)
    }

    fn is_peer(&self, group: RaftGroupId, node: NodeId) -> bool {
        self.inner.state.borrow().is_peer(group, node)
    }
}

/// What asking has taught about the coordinators.
#[derive(Default)]
struct Whereabouts {
    /// Where the leader was last.
    leader: Option<SocketAddr>,
    /// Who did not answer, and when.
    silent: Vec<(SocketAddr, Instant)>,
}

impl Whereabouts {
    fn is_silent(&self, addr: SocketAddr) -> bool {
        self.silent
            .iter()
            .any(|(silent, since)| *silent == addr && since.elapsed() < SILENT_FOR)
    }

    fn does_not_lead(&mut self, addr: SocketAddr) {
        if self.leader == Some(addr) {
            self.leader = None;
        }
    }
}

/// What a coordinator's reply means for the asking.
enum Answer<T> {
    Final(T),
    Elsewhere(Option<SocketAddr>),
    Again(String),
}

impl Inner {
    fn whereabouts(&self) -> MutexGuard<'_, Whereabouts> {
        self.whereabouts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Coordinators to ask: the last known leader, those that are up, the seeds; in the end those that were silent just
    /// now, whatever others still believe of them.
    fn candidates(&self) -> Vec<SocketAddr> {
        let state = self.state.borrow().clone();
        let mut known: Vec<_> = state
            .nodes_with(Role::Coordinator)
            .map(|n| (!n.up, n.addr))
            .collect();
        known.sort_by_key(|(down, _)| *down);
        let whereabouts = self.whereabouts();
        let mut all: Vec<SocketAddr> = whereabouts.leader.into_iter().collect();
        for addr in known
            .into_iter()
            .map(|(_, addr)| addr)
            .chain(self.seeds.iter().copied())
        {
            if !all.contains(&addr) {
                all.push(addr);
            }
        }
        all.sort_by_key(|addr| whereabouts.is_silent(*addr));
        all
    }

    /// Takes somebody's word for where the leader is, unless that one was silent just now.
    fn set_leader(&self, leader: Option<SocketAddr>) {
        let mut whereabouts = self.whereabouts();
        whereabouts.leader = leader.filter(|addr| !whereabouts.is_silent(*addr));
    }

    fn answered(&self, addr: SocketAddr) {
        self.whereabouts()
            .silent
            .retain(|(silent, _)| *silent != addr);
    }

    /// Does not begin with `addr` the next time.
    fn forget(&self, addr: SocketAddr) {
        let mut whereabouts = self.whereabouts();
        whereabouts.does_not_lead(addr);
        whereabouts.silent.retain(|(silent, _)| *silent != addr);
        whereabouts.silent.push((addr, Instant::now()));
    }

    fn publish(&self, state: Arc<ControlState>) {
        // Before anybody acts on the state: whoever was removed from the cluster is spoken to no more by this node either.
        self.transport.revoke(state.revoked.iter().copied());
        self.state.send_if_modified(|current| {
            let newer = state.revision > current.revision;
            if newer {
                *current = state;
            }
            newer
        });
    }
}

/// Keeps one watch stream open to some coordinator until the last handle is gone.
async fn watch_for_ever(inner: Weak<Inner>) {
    loop {
        let Some(strong) = inner.upgrade() else {
            return;
        };
        let Some(to) = strong.candidates().into_iter().next() else {
            return;
        };
        let transport = strong.transport.clone();
        let request = WatchRequest {
            revision: strong.state.borrow().revision,
        };
        drop(strong);
        let ended = watch_one(&inner, &transport, to, &request).await;
        debug!(%to, why = %ended, "control watch ended");
        if let Some(strong) = inner.upgrade() {
            strong.forget(to);
        }
        sleep(ROUND_PAUSE).await;
    }
}

/// Watches one coordinator until it falls silent; says why it ended.
async fn watch_one(
    inner: &Weak<Inner>,
    transport: &Transport,
    to: SocketAddr,
    request: &WatchRequest,
) -> String {
    let request = match wire::encode(request) {
        Ok(request) => request,
        Err(why) => return why,
    };
    let mut frames = match transport.open(to, SERVICE_WATCH, request.into()).await {
        Ok(frames) => frames,
        Err(error) => return error.to_string(),
    };
    loop {
        let mut next = std::pin::pin!(frames.next());
        let asked = Instant::now();
        let frame = loop {
            match timeout(WATCH_SLICE, &mut next).await {
                Ok(frame) => break frame,
                Err(_) => {
                    let Some(inner) = inner.upgrade() else {
                        return "no longer needed".to_owned();
                    };
                    if asked.elapsed() > WATCH_SILENCE || inner.whereabouts().is_silent(to) {
                        return "silent".to_owned();
                    }
                }
            }
        };
        let frame = match frame {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => return error.to_string(),
            None => return "closed".to_owned(),
        };
        let Some(inner) = inner.upgrade() else {
            return "no longer needed".to_owned();
        };
        match wire::decode(&frame) {
            Ok(WatchFrame::State(state)) => inner.publish(Arc::new(*state)),
            Ok(WatchFrame::Alive { leader }) => {
                if leader.is_some() {
                    inner.set_leader(leader);
                }
            }
            Err(why) => return why,
        }
    }
}

fn unavailable(waited: Duration, why: &str) -> Error {
    Error::Unavailable {
        waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
        why: why.to_owned(),
    }
}

fn encode<T: serde::Serialize>(message: &T) -> Result<Bytes, Error> {
    wire::encode(message)
        .map(Bytes::from)
        .map_err(|why| Error::Protocol { why })
}

fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    wire::decode(bytes).map_err(|why| Error::Protocol { why })
}

#[cfg(test)]
#[path = "handle_tests.rs"]
mod tests;

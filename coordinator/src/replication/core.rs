//! The Raft thread: feeds events to the consensus core, writes what must be durable, and only then lets it speak.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};

use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, ConfState, Entry, EntryType, Message, MessageType};
use raft::{Config, RawNode, SnapshotStatus, StateRole};
use rand::RngCore;
use slog::o;
use tokio::sync::oneshot;

use super::Error;
use super::apply::{Applier, COMMAND, ProposalReply};
use super::log::Log;
use super::replica::{ReplicaStatus, Shared};
use super::snapshot::{self, Header};
use super::store::{Position, Store};
use crate::clock::{Duration, Instant, monotonic};
use crate::ids::NodeId;

/// Entries of one append message, or one entry that is larger: so a message stays below 5 MiB.
const MAX_APPEND_BYTES: u64 = 512 * 1024;
/// Append messages to one member that are not answered yet.
const MAX_APPENDS: usize = 16;
/// Proposals that are not committed yet, as the core counts them.
const MAX_UNCOMMITTED_BYTES: u64 = 96 * 1024 * 1024;
const MAX_COMMITTED_BYTES_PER_READY: u64 = 8 * 1024 * 1024;
/// Events taken before the log is written: they share one synced write.
const MAX_EVENTS_PER_WRITE: usize = 512;
/// A read that no majority has confirmed after this time is asked again.
const READ_AGAIN: Duration = Duration::from_millis(100);
/// A member that fetches no snapshot frame for this long has failed.
const SNAPSHOT_IDLE: Duration = Duration::from_secs(5);
/// Proposals of a leader that lost its office are given up after this time, if no new leader has decided about them.
const GIVE_UP_AFTER: Duration = Duration::from_secs(1);

/// What happens to a replica.
pub(super) enum Event {
    Message {
        message: Message,
        bytes: usize,
    },
    Propose {
        command: Vec<u8>,
        reply: ProposalReply,
    },
    Read(oneshot::Sender<u64>),
    Change {
        change: ConfChangeV2,
        reply: oneshot::Sender<Result<(), Error>>,
    },
    /// How far each member's log agrees with the leader's.
    Progress(oneshot::Sender<Result<BTreeMap<NodeId, u64>, Error>>),
    /// Drops the log up to an index, as far as it is applied.
    ForgetLog {
        upto: u64,
        reply: oneshot::Sender<Result<(), Error>>,
    },
    Applied(u64),
    /// The apply thread ended with an error.
    Broken(Error),
    SnapshotArrived {
        run: u64,
        message: Message,
        header: Header,
        generation: u64,
    },
    SnapshotFailed {
        run: u64,
    },
    /// A member fetches a snapshot from here: still at it, or done (and how).
    SnapshotServed {
        to: NodeId,
        outcome: Option<bool>,
    },
    HandOver,
    Stop,
}

/// Why a run ended.
pub(super) enum Exit {
    Stopped,
    Failed(Error),
}

/// One run of a replica, from opening the store to a failure or the end.
pub(super) struct Core<'a> {
    shared: &'a Arc<Shared>,
    store: Arc<Store>,
    applier: Arc<Applier>,
    node: RawNode<Log>,
    run: u64,
    next_read: u64,
    unsent_reads: Vec<oneshot::Sender<u64>>,
    reads: BTreeMap<u64, (Instant, Vec<oneshot::Sender<u64>>)>,
    /// A snapshot is on its way here.
    fetching: bool,
    /// A snapshot that has come, until the core takes it over.
    arrived: Option<(Header, u64)>,
    /// Members that need a snapshot, and when they last showed that they fetch it.
    serving: HashMap<NodeId, Instant>,
    lost_office: Option<Instant>,
}

impl<'a> Core<'a> {
    pub(super) fn new(
        shared: &'a Arc<Shared>,
        store: Arc<Store>,
        applier: Arc<Applier>,
        run: u64,
    ) -> Result<Self, Error> {
        let me = shared.config.node.0;
        let config = Config {
            id: me,
            election_tick: 10,
            heartbeat_tick: 2,
            min_election_tick: 10,
            max_election_tick: 20,
            applied: store.applied()?.index,
            max_size_per_msg: MAX_APPEND_BYTES,
            max_inflight_msgs: MAX_APPENDS,
            check_quorum: true,
            pre_vote: true,
            // Batching ignores `max_size_per_msg`: a message could outgrow a transport frame. Lanes batch the writes anyway.
            batch_append: false,
            max_uncommitted_size: MAX_UNCOMMITTED_BYTES,
            max_committed_size_per_ready: MAX_COMMITTED_BYTES_PER_READY,
            ..Config::default()
        };
        // Raft's own log lines print whole entries, which are callers' data.
        let silent = slog::Logger::root(slog::Discard, o!());
        let log = Log::open(store.clone())?;
        let fresh = log.last() == 1;
        let mut node = RawNode::new(&config, log, &silent).map_err(core_error)?;
        let voters = node.raft.prs().conf().to_conf_state().voters;
        // Nobody leads a new group, and nobody else could lead a group of one: no need to wait.
        if voters == [me] || (fresh && voters.iter().min() == Some(&me)) {
            node.campaign().map_err(core_error)?;
        }
        Ok(Self {
            shared,
            store,
            applier,
            node,
            run,
            // An answer that is late by a whole run must not pass for one of this run's, whose index may be higher. Half of
            // the range, so that numbers keep growing.
            next_read: rand::rng().next_u64() >> 1,
            unsent_reads: Vec::new(),
            reads: BTreeMap::new(),
            fetching: false,
            arrived: None,
            serving: HashMap::new(),
            lost_office: None,
        })
    }

    pub(super) fn run(&mut self, events: &Receiver<Event>) -> Exit {
        match self.serve(events) {
            Ok(()) => Exit::Stopped,
            Err(error) => Exit::Failed(error),
        }
    }

    fn serve(&mut self, events: &Receiver<Event>) -> Result<(), Error> {
        let tick = Duration::from_millis(self.shared.config.tick_ms.max(1));
        // Members are known by it, whose answers to the first messages come soon.
        self.publish();
        let mut next_tick = monotonic() + tick;
        loop {
            self.write_and_speak()?;
            self.publish();
            let wait = next_tick.saturating_duration_since(monotonic());
            let mut next = match events.recv_timeout(wait) {
                Ok(event) => Some(event),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            let mut taken = 0;
            while let Some(event) = next {
                if matches!(event, Event::Stop) {
                    return self.store.sync();
                }
                self.handle(event)?;
                taken += 1;
                next = if taken < MAX_EVENTS_PER_WRITE {
                    events.try_recv().ok()
                } else {
                    None
                };
            }
            let now = monotonic();
            if now >= next_tick {
                // After a stall one tick only: the messages that wait say whether a leader lives.
                next_tick = now + tick;
                self.node.tick();
                self.tick(now)?;
            }
            self.ask_reads(now);
        }
    }

    fn is_leader(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    fn leader(&self) -> Option<NodeId> {
        Some(self.node.raft.leader_id)
            .filter(|id| *id != 0)
            .map(NodeId)
    }

    fn handle(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Message { message, bytes } => {
                self.shared.inbox_bytes.fetch_sub(bytes, Ordering::Relaxed);
                self.receive(message);
            }
            Event::Propose { command, reply } => self.propose(command, reply),
            Event::Read(reply) => self.unsent_reads.push(reply),
            Event::Change { change, reply } => drop(reply.send(self.change(&change))),
            Event::Progress(reply) => {
                let members = self
                    .node
                    .raft
                    .prs()
                    .iter()
                    .map(|(id, member)| (NodeId(*id), member.matched))
                    .collect();
                let answer = if self.is_leader() {
                    Ok(members)
                } else {
                    Err(self.not_leader())
                };
                let _ = reply.send(answer);
            }
            Event::ForgetLog { upto, reply } => {
                let upto = upto.min(self.node.raft.raft_log.applied);
                let forgotten = self.node.mut_store().truncate(upto, 0, 0);
                let _ = reply.send(forgotten.clone());
                forgotten?;
            }
            Event::Applied(index) => self.applied(index)?,
            Event::Broken(error) => return Err(error),
            // What an earlier run began is gone with its store.
            Event::SnapshotArrived { run, .. } | Event::SnapshotFailed { run }
                if run != self.run => {}
            Event::SnapshotArrived {
                message,
                header,
                generation,
                ..
            } => self.arrived(message, header, generation),
            Event::SnapshotFailed { .. } => self.fetching = false,
            Event::SnapshotServed { to, outcome } => match outcome {
                Some(false) => self.snapshot_failed(to),
                Some(true) | None => drop(self.serving.insert(to, monotonic())),
            },
            Event::HandOver => self.hand_over(),
            Event::Stop => {}
        }
        Ok(())
    }

    fn not_leader(&self) -> Error {
        Error::NotLeader {
            leader: self
                .leader()
                .filter(|leader| *leader != self.shared.config.node),
        }
    }

    fn propose(&mut self, command: Vec<u8>, reply: ProposalReply) {
        if !self.is_leader() {
            return drop(reply.send(Err(self.not_leader())));
        }
        match self.node.propose(COMMAND.to_vec(), command) {
            Ok(()) => {
                let at = Position {
                    index: self.node.raft.raft_log.last_index(),
                    term: self.node.raft.term,
                };
                self.shared.pending.insert(at, reply);
            }
            Err(_) => drop(reply.send(Err(self.not_taken()))),
        }
    }

    fn change(&mut self, change: &ConfChangeV2) -> Result<(), Error> {
        if !self.is_leader() {
            return Err(self.not_leader());
        }
        if self.node.raft.has_pending_conf()
            || !self
                .node
                .raft
                .prs()
                .conf()
                .to_conf_state()
                .voters_outgoing
                .is_empty()
        {
            return Err(Error::Config {
                why: "another membership change is under way; try again later".to_owned(),
            });
        }
        self.node
            .propose_conf_change(Vec::new(), change.clone())
            .map_err(|_| self.not_taken())
    }

    /// Why the core of a leader does not take a proposal: it hands over, or too much waits.
    fn not_taken(&self) -> Error {
        if self.node.raft.lead_transferee.is_some() {
            self.not_leader()
        } else {
            Error::Overloaded
        }
    }

    fn receive(&mut self, message: Message) {
        let raft = &self.node.raft;
        match message.get_msg_type() {
            MessageType::MsgSnapshot => {
                let index = message.get_snapshot().get_metadata().index;
                if message.term >= raft.term && index > raft.raft_log.committed {
                    return self.fetch(message);
                }
            }
            MessageType::MsgHeartbeat if message.commit > raft.raft_log.last_index() => {
                // Only a member that has lost its directory hears this.
                return tracing::error!(
                    group = %self.shared.config.group,
                    commit = message.commit,
                    last = raft.raft_log.last_index(),
                    "the leader knows more of this replica's log than the replica itself; its directory was replaced. \
                     Remove this node from the group and let it join again"
                );
            }
            _ => {}
        }
        if let Err(error) = self.node.step(message) {
            tracing::debug!(group = %self.shared.config.group, %error, "a Raft message was not taken");
        }
    }

    /// Fetches the state that the leader wants this member to have.
    fn fetch(&mut self, message: Message) {
        let from = NodeId(message.from);
        let Some(addr) = self.shared.address_book.addr(from) else {
            return;
        };
        if std::mem::replace(&mut self.fetching, true) {
            return;
        }
        let (shared, store, run) = (self.shared.clone(), self.store.clone(), self.run);
        self.shared.runtime.spawn(async move {
            match snapshot::fetch(&shared.transport, addr, &shared.snapshot_service, &store).await {
                Ok((header, generation)) => {
                    drop(store);
                    shared.tell(Event::SnapshotArrived { run, message, header, generation });
                }
                Err(why) => {
                    tracing::warn!(group = %shared.config.group, %from, %why, "a snapshot did not arrive");
                    drop(store);
                    shared.tell(Event::SnapshotFailed { run });
                }
            }
        });
    }

    /// Lets the core decide about a snapshot that has come; it may be newer than the one Raft spoke of.
    fn arrived(&mut self, mut message: Message, header: Header, generation: u64) {
        self.fetching = false;
        let meta = message.mut_snapshot().mut_metadata();
        meta.set_index(header.position.index);
        meta.set_term(header.position.term);
        meta.set_conf_state(header.conf());
        if let Err(error) = self.node.step(message) {
            tracing::debug!(%error, "a snapshot was not taken");
        }
        if self
            .node
            .snap()
            .is_some_and(|taken| taken.get_metadata().index == header.position.index)
        {
            self.arrived = Some((header, generation));
        } else {
            self.store.drop_generation(generation);
        }
    }

    fn applied(&mut self, index: u64) -> Result<(), Error> {
        if index > self.node.raft.raft_log.applied {
            self.node.advance_apply_to(index);
        }
        let config = &self.shared.config;
        self.node
            .mut_store()
            .truncate(index, config.max_log_entries, config.max_log_bytes)?;
        let conf = self.node.raft.prs().conf().to_conf_state();
        let stays = conf.voters.contains(&config.node.0) || !conf.voters_outgoing.is_empty();
        if self.is_leader() && !stays && index >= self.node.store().newest_conf_index {
            // The core would lead on without being a member.
            let term = self.node.raft.term;
            self.node.raft.become_follower(term, raft::INVALID_ID);
        }
        Ok(())
    }

    fn tick(&mut self, now: Instant) -> Result<(), Error> {
        let late: Vec<_> = self
            .serving
            .iter()
            .filter(|(_, seen)| now.duration_since(**seen) > SNAPSHOT_IDLE)
            .map(|(to, _)| *to)
            .collect();
        for to in late {
            self.snapshot_failed(to);
        }
        if self.is_leader() {
            self.lost_office = None;
        } else if self
            .lost_office
            .is_some_and(|when| now.duration_since(when) > GIVE_UP_AFTER)
        {
            self.lost_office = None;
            self.shared.pending.fail_all(&Error::Interrupted);
        }
        Ok(())
    }

    /// Lets Raft try again with this member.
    fn snapshot_failed(&mut self, to: NodeId) {
        if self.serving.remove(&to).is_some() {
            self.node.report_snapshot(to.0, SnapshotStatus::Failure);
        }
    }

    /// Asks for all waiting reads at once, and again for those that got no answer.
    fn ask_reads(&mut self, now: Instant) {
        while let Some(first) = self.reads.first_entry()
            && now.duration_since(first.get().0) > READ_AGAIN
        {
            self.unsent_reads.extend(first.remove().1);
        }
        self.unsent_reads.retain(|reply| !reply.is_closed());
        if self.unsent_reads.is_empty() {
            return;
        }
        self.next_read += 1;
        let mut context = self.shared.config.node.0.to_be_bytes().to_vec();
        context.extend_from_slice(&self.next_read.to_be_bytes());
        self.node.read_index(context);
        self.reads.insert(
            self.next_read,
            (now, std::mem::take(&mut self.unsent_reads)),
        );
    }

    fn hand_over(&mut self) {
        let me = self.shared.config.node.0;
        if !self.is_leader() {
            return;
        }
        let conf = self.node.raft.prs().conf().to_conf_state();
        let heir = self
            .node
            .raft
            .prs()
            .iter()
            .filter(|(id, member)| **id != me && conf.voters.contains(*id) && member.recent_active)
            .max_by_key(|(_, member)| member.matched)
            .map(|(id, _)| *id);
        if let Some(heir) = heir {
            self.node.transfer_leader(heir);
        }
    }

    /// Writes what the core wants durable, and sends what may be said before and after.
    fn write_and_speak(&mut self) -> Result<(), Error> {
        while self.node.has_ready() {
            let mut ready = self.node.ready();
            if ready
                .ss()
                .is_some_and(|soft| soft.raft_state != StateRole::Leader)
                && self.lost_office.is_none()
            {
                self.lost_office = Some(monotonic());
            }
            self.send(ready.take_messages());
            for read in ready.take_read_states() {
                let context = read
                    .request_ctx
                    .get(8..)
                    .and_then(|bytes| bytes.try_into().ok())
                    .map(u64::from_be_bytes);
                if let Some((_, waiting)) = context.and_then(|context| self.reads.remove(&context))
                {
                    for reply in waiting {
                        let _ = reply.send(read.index);
                    }
                }
            }
            if !ready.snapshot().is_empty() {
                self.install(ready.snapshot().get_metadata().index)?;
            }
            self.committed(ready.take_committed_entries());
            let hard_state = ready.hs().cloned();
            if !ready.entries().is_empty() || hard_state.is_some() {
                let sync = ready.must_sync();
                self.node
                    .mut_store()
                    .append(ready.entries(), hard_state.as_ref(), sync)?;
            }
            self.send(ready.take_persisted_messages());
            let mut light = self.node.advance_append(ready);
            self.send(light.take_messages());
            self.committed(light.take_committed_entries());
        }
        Ok(())
    }

    fn install(&mut self, index: u64) -> Result<(), Error> {
        let Some((header, generation)) = self
            .arrived
            .take()
            .filter(|(header, _)| header.position.index == index)
        else {
            return Err(Error::Storage {
                why: "the core took over a snapshot that did not arrive".to_owned(),
            });
        };
        let mut hard_state = self.node.raft.hard_state();
        hard_state.set_commit(hard_state.commit.max(index));
        tracing::info!(group = %self.shared.config.group, index, "takes over a snapshot");
        let applier = self.applier.clone();
        let log = self.node.mut_store();
        applier.replace(index, || {
            log.install(generation, header.position, &header.conf(), &hard_state)
        })
    }

    /// Hands committed entries to the apply thread; membership changes take effect here at once.
    fn committed(&mut self, entries: Vec<Entry>) {
        let mut confs = Vec::new();
        for entry in &entries {
            if let Some(conf) = self.change_membership(entry) {
                self.node.mut_store().newest_conf_index = entry.index;
                confs.push((entry.index, conf));
            }
        }
        self.applier.commit(entries, confs);
    }

    fn change_membership(&mut self, entry: &Entry) -> Option<ConfState> {
        let parse = |error: protobuf::ProtobufError| core_error(error);
        let applied = match entry.get_entry_type() {
            EntryType::EntryNormal => return None,
            EntryType::EntryConfChange => ConfChange::parse_from_bytes(&entry.data)
                .map_err(parse)
                .and_then(|change| self.node.apply_conf_change(&change).map_err(core_error)),
            EntryType::EntryConfChangeV2 => ConfChangeV2::parse_from_bytes(&entry.data)
                .map_err(parse)
                .and_then(|change| self.node.apply_conf_change(&change).map_err(core_error)),
        };
        match applied {
            Ok(conf) => Some(conf),
            // The same on every member, since all see the same entry and the same membership.
            Err(error) => {
                tracing::error!(group = %self.shared.config.group, index = entry.index, %error, "a membership change is void");
                None
            }
        }
    }

    fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            let to = NodeId(message.to);
            let sent = self
                .shared
                .address_book
                .addr(to)
                .zip(message.write_to_bytes().ok());
            let snapshot = message.get_msg_type() == MessageType::MsgSnapshot;
            match sent {
                Some((addr, bytes)) => {
                    if snapshot {
                        self.serving.insert(to, monotonic());
                    }
                    self.shared
                        .transport
                        .send(addr, &self.shared.raft_service, bytes.into());
                }
                None => {
                    tracing::debug!(%to, "a member's address is not known");
                    self.node.report_unreachable(to.0);
                    if snapshot {
                        self.node.report_snapshot(to.0, SnapshotStatus::Failure);
                    }
                }
            }
        }
    }

    fn publish(&self) {
        let raft = &self.node.raft;
        let conf = raft.prs().conf().to_conf_state();
        let ids = |ids: &[u64]| ids.iter().copied().map(NodeId).collect();
        let mut learners: std::collections::BTreeSet<_> = ids(&conf.learners);
        learners.extend(conf.learners_next.iter().copied().map(NodeId));
        let status = ReplicaStatus {
            leader: self.leader(),
            is_leader: self.is_leader(),
            term: raft.term,
            commit: raft.raft_log.committed,
            applied: raft.raft_log.applied,
            first_log_index: self.node.store().first(),
            last_log_index: raft.raft_log.last_index(),
            voters: ids(&conf.voters),
            voters_outgoing: ids(&conf.voters_outgoing),
            learners,
            changing: !conf.voters_outgoing.is_empty() || raft.has_pending_conf(),
            failure: None,
        };
        self.shared.publish(status);
    }
}

fn core_error(error: impl std::fmt::Display) -> Error {
    Error::Storage {
        why: error.to_string(),
    }
}

//! The apply thread: takes committed entries through the state machine, in batches of one write.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use raft::eraftpb::{ConfState, Entry, EntryType};
use tokio::sync::{oneshot, watch};

use super::Error;
use super::machine::{StateMachine, Txn};
use super::store::{Position, Store};

/// Entries of one write: enough to share the write's cost, few enough that replies do not wait long.
const BATCH_ENTRIES: usize = 256;
const BATCH_BYTES: u64 = 8 * 1024 * 1024;

/// Committed entries kept in memory for the apply thread; beyond, it reads them from the log.
const QUEUE_BYTES: u64 = 16 * 1024 * 1024;

/// Marks a proposal, in the entry's context, since Raft's own entries are normal ones with empty data.
pub(super) const COMMAND: &[u8] = b"c";

pub(super) type ProposalReply = oneshot::Sender<Result<Vec<u8>, Error>>;

/// Proposals whose entry is in the log but not yet applied, by its index.
#[derive(Default)]
pub(super) struct Pending(Mutex<BTreeMap<u64, (u64, ProposalReply)>>);

impl Pending {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, (u64, ProposalReply)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, at: Position, reply: ProposalReply) {
        if let Some((_, lost)) = self.lock().insert(at.index, (at.term, reply)) {
            // The entry of that index was replaced by this one, so it was never committed.
            let _ = lost.send(Err(Error::NotLeader { leader: None }));
        }
    }

    /// Answers the proposal of this entry, and those that lost their place to it.
    fn resolve(&self, at: Position, result: Vec<u8>) {
        let mut pending = self.lock();
        while let Some(first) = pending.first_entry()
            && *first.key() < at.index
        {
            let (_, reply) = first.remove();
            let _ = reply.send(Err(Error::NotLeader { leader: None }));
        }
        if let Some((term, reply)) = pending.remove(&at.index) {
            let answer = if term == at.term {
                Ok(result)
            } else {
                Err(Error::NotLeader { leader: None })
            };
            let _ = reply.send(answer);
        }
    }

    fn interrupt_up_to(&self, index: u64) {
        let mut pending = self.lock();
        let later = pending.split_off(&(index + 1));
        for (_, (_, reply)) in std::mem::replace(&mut *pending, later) {
            let _ = reply.send(Err(Error::Interrupted));
        }
    }

    pub(super) fn fail_all(&self, error: &Error) {
        for (_, (_, reply)) in std::mem::take(&mut *self.lock()) {
            let _ = reply.send(Err(error.clone()));
        }
    }
}

/// What the Raft thread hands to the apply thread.
#[derive(Default)]
struct Queue {
    /// Everything up to here is committed.
    target: u64,
    /// Some of it, in order, without gaps.
    entries: VecDeque<Entry>,
    bytes: u64,
    /// The membership after the change at each index.
    confs: BTreeMap<u64, ConfState>,
    /// The state was replaced.
    reload: bool,
    stop: bool,
}

/// One run of the apply thread, shared with the Raft thread.
pub(super) struct Applier {
    store: Arc<Store>,
    machine: Arc<dyn StateMachine>,
    pending: Arc<Pending>,
    applied: watch::Sender<u64>,
    queue: Mutex<Queue>,
    wake: Condvar,
    /// Held while the state changes.
    busy: Mutex<()>,
}

impl Applier {
    pub(super) fn new(
        store: Arc<Store>,
        machine: Arc<dyn StateMachine>,
        pending: Arc<Pending>,
        applied: watch::Sender<u64>,
    ) -> Self {
        let queue = Mutex::new(Queue {
            reload: true,
            ..Queue::default()
        });
        Self {
            store,
            machine,
            pending,
            applied,
            queue,
            wake: Condvar::new(),
            busy: Mutex::new(()),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over committed entries, which follow those handed over before.
    pub(super) fn commit(&self, entries: Vec<Entry>, confs: Vec<(u64, ConfState)>) {
        let Some(last) = entries.last() else { return };
        let mut queue = self.queue();
        queue.target = last.index;
        queue.confs.extend(confs);
        let contiguous = queue
            .entries
            .back()
            .is_none_or(|back| entries.first().is_some_and(|e| e.index == back.index + 1));
        let bytes: u64 = entries.iter().map(|entry| entry.data.len() as u64).sum();
        if contiguous && queue.bytes + bytes <= QUEUE_BYTES {
            queue.bytes += bytes;
            queue.entries.extend(entries);
        }
        drop(queue);
        self.wake.notify_one();
    }

    /// Replaces the state under the apply thread's feet, between two batches.
    pub(super) fn replace(
        &self,
        at: u64,
        install: impl FnOnce() -> Result<(), Error>,
    ) -> Result<(), Error> {
        let _busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        install()?;
        *self.queue() = Queue {
            target: at,
            reload: true,
            ..Queue::default()
        };
        self.wake.notify_one();
        Ok(())
    }

    pub(super) fn stop(&self) {
        self.queue().stop = true;
        self.wake.notify_one();
    }

    /// Runs until [`Applier::stop`]. `progress` hears of every index reached.
    pub(super) fn run(&self, progress: &dyn Fn(u64)) -> Result<(), Error> {
        let mut position = self.store.applied()?;
        loop {
            {
                let mut queue = self.queue();
                while !queue.stop && !queue.reload && queue.target <= position.index {
                    queue = self
                        .wake
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                if queue.stop {
                    return Ok(());
                }
            }
            let _busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            if std::mem::take(&mut self.queue().reload) {
                position = self.store.applied()?;
                self.machine.reloaded(&self.store.view()?);
                // Proposals that a snapshot skipped: whether they are in it is not known here.
                self.pending.interrupt_up_to(position.index);
            } else {
                position = self.apply_batch(position)?;
            }
            self.applied.send_replace(position.index);
            progress(position.index);
        }
    }

    /// The entries after `from`, from memory or else from the log.
    fn next(&self, from: Position) -> Result<(Vec<Entry>, BTreeMap<u64, ConfState>), Error> {
        let mut queue = self.queue();
        let queue = &mut *queue;
        while queue
            .entries
            .front()
            .is_some_and(|entry| entry.index <= from.index)
        {
            queue.bytes -= queue
                .entries
                .pop_front()
                .map_or(0, |entry| entry.data.len() as u64);
        }
        let front = queue.entries.front().map(|entry| entry.index);
        let mut entries = Vec::new();
        if front == Some(from.index + 1) {
            let mut bytes = 0;
            while entries.len() < BATCH_ENTRIES
                && bytes < BATCH_BYTES
                && let Some(entry) = queue.entries.pop_front()
            {
                bytes += entry.data.len() as u64;
                entries.push(entry);
            }
            queue.bytes -= bytes;
        } else {
            let end = front
                .map_or(queue.target, |front| front - 1)
                .min(from.index + BATCH_ENTRIES as u64);
            entries = self.store.entries(from.index + 1, end + 1, BATCH_BYTES)?;
        }
        let last = entries.last().map_or(from.index, |entry| entry.index);
        let later = queue.confs.split_off(&(last + 1));
        Ok((entries, std::mem::replace(&mut queue.confs, later)))
    }

    fn apply_batch(&self, from: Position) -> Result<Position, Error> {
        let (entries, confs) = self.next(from)?;
        let Some(last) = entries.last() else {
            return Ok(from);
        };
        let to = Position {
            index: last.index,
            term: last.term,
        };
        let mut txn = Txn::new(self.store.db(), self.store.state()?);
        let is_command = |entry: &Entry| {
            entry.get_entry_type() == EntryType::EntryNormal && *entry.context == *COMMAND
        };
        let replies: Vec<_> = entries
            .iter()
            .map(|entry| {
                if is_command(entry) {
                    self.machine.apply(entry.index, &entry.data, &mut txn)
                } else {
                    Vec::new()
                }
            })
            .collect();
        self.store
            .write_applied(txn.into_batch()?, to, confs.values().next_back())?;
        let view = self.store.view()?;
        for entry in entries.iter().filter(|entry| is_command(entry)) {
            self.machine.applied(entry.index, &entry.data, &view);
        }
        // Published before the replies, so that whoever has a reply finds its effect.
        self.applied.send_replace(to.index);
        for (entry, reply) in entries.iter().zip(replies) {
            self.pending.resolve(
                Position {
                    index: entry.index,
                    term: entry.term,
                },
                reply,
            );
        }
        Ok(to)
    }
}

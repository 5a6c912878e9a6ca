//! The log as Raft sees it: terms and sizes in memory, entries on disk.

use std::collections::VecDeque;
use std::sync::Arc;

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{Error as RaftError, GetEntriesContext, RaftState, StorageError};

use super::Error;
use super::store::{Append, Position, Store};

pub(super) struct Log {
    pub(super) store: Arc<Store>,
    /// The last entry that is no longer in the log.
    truncated: Position,
    /// Term and size of each entry after it.
    shape: VecDeque<(u64, u32)>,
    bytes: u64,
    /// As found at the start; the core keeps its own from then on.
    found: RaftState,
    /// Index of the newest membership change that was committed; a snapshot must not be older.
    pub(super) newest_conf_index: u64,
}

impl Log {
    pub(super) fn open(store: Arc<Store>) -> Result<Self, Error> {
        let truncated = store.truncated()?;
        let shape: VecDeque<_> = store.log_shape(truncated.index)?.into();
        let mut hard_state = store.hard_state()?;
        // What was applied was committed, though the newest commit index may have been lost in a crash.
        hard_state.commit = hard_state.commit.max(store.applied()?.index);
        let last = truncated.index + shape.len() as u64;
        if hard_state.commit > last {
            let why = format!(
                "the log ends at {last}, but {} was committed",
                hard_state.commit
            );
            return Err(Error::Storage { why });
        }
        Ok(Self {
            truncated,
            bytes: shape.iter().map(|(_, bytes)| u64::from(*bytes)).sum(),
            shape,
            found: RaftState::new(hard_state, store.conf_state()?),
            store,
            newest_conf_index: 0,
        })
    }

    pub(super) fn first(&self) -> u64 {
        self.truncated.index + 1
    }

    pub(super) fn last(&self) -> u64 {
        self.truncated.index + self.shape.len() as u64
    }

    fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.truncated.index {
            return Some(self.truncated.term);
        }
        let offset = index.checked_sub(self.first())?;
        self.shape
            .get(usize::try_from(offset).ok()?)
            .map(|(term, _)| *term)
    }

    /// Appends, replacing what conflicts, and keeps the hard state.
    pub(super) fn append(
        &mut self,
        entries: &[Entry],
        hard_state: Option<&HardState>,
        sync: bool,
    ) -> Result<(), Error> {
        let sizes = self.store.append(&Append {
            entries,
            hard_state,
            last_index: self.last(),
            sync,
        })?;
        if let Some(first) = entries.first() {
            while self.last() >= first.index {
                let Some((_, bytes)) = self.shape.pop_back() else {
                    break;
                };
                self.bytes -= u64::from(bytes);
            }
            for (entry, bytes) in entries.iter().zip(sizes) {
                self.shape.push_back((entry.term, bytes));
                self.bytes += u64::from(bytes);
            }
        }
        Ok(())
    }

    /// Drops the older half once the log exceeds a limit, but nothing that is not applied.
    pub(super) fn truncate(
        &mut self,
        applied: u64,
        max_entries: u64,
        max_bytes: u64,
    ) -> Result<(), Error> {
        if self.shape.len() as u64 <= max_entries && self.bytes <= max_bytes {
            return Ok(());
        }
        let from = self.first();
        let (mut index, mut term, mut kept, mut bytes) =
            (self.truncated.index, 0, self.shape.len() as u64, self.bytes);
        for (entry_term, size) in &self.shape {
            if index + 1 > applied || (kept <= max_entries / 2 && bytes <= max_bytes / 2) {
                break;
            }
            index += 1;
            term = *entry_term;
            kept -= 1;
            bytes -= u64::from(*size);
        }
        if index == self.truncated.index {
            return Ok(());
        }
        let to = Position { index, term };
        self.store.truncate(from, to)?;
        self.shape
            .drain(..usize::try_from(index + 1 - from).unwrap_or(usize::MAX));
        self.truncated = to;
        self.bytes = bytes;
        Ok(())
    }

    /// Takes over a received snapshot.
    pub(super) fn install(
        &mut self,
        generation: u64,
        position: Position,
        conf: &ConfState,
        hard_state: &HardState,
    ) -> Result<(), Error> {
        self.store.install(generation, position, conf, hard_state)?;
        self.truncated = position;
        self.shape.clear();
        self.bytes = 0;
        self.newest_conf_index = position.index;
        Ok(())
    }
}

fn failed(error: Error) -> RaftError {
    RaftError::Store(StorageError::Other(Box::new(error)))
}

impl raft::Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(self.found.clone())
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low < self.first() {
            return Err(RaftError::Store(StorageError::Compacted));
        }
        if high > self.last() + 1 {
            return Err(RaftError::Store(StorageError::Unavailable));
        }
        self.store
            .entries(low, high, max_size.into().unwrap_or(u64::MAX))
            .map_err(failed)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.truncated.index {
            return Err(RaftError::Store(StorageError::Compacted));
        }
        self.term_of(index)
            .ok_or(RaftError::Store(StorageError::Unavailable))
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    /// Only says which snapshot there would be; its content travels apart (room `snapshot`).
    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let view = self.store.view().map_err(failed)?;
        let applied = view.position();
        if applied.index < request_index.max(self.newest_conf_index).max(1) {
            return Err(RaftError::Store(
                StorageError::SnapshotTemporarilyUnavailable,
            ));
        }
        let mut snapshot = Snapshot::default();
        let meta = snapshot.mut_metadata();
        meta.set_index(applied.index);
        meta.set_term(applied.term);
        meta.set_conf_state(view.conf().clone());
        Ok(snapshot)
    }
}

//! What a caller implements, and how its commands write.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use rocksdb::{IteratorMode, PrefixRange, ReadOptions, WriteBatch};

use super::Error;
use super::store::{Column, Db};
use super::view::View;

/// A caller's replicated state. It lives in the replica's key space; the machine itself holds only derived data.
pub trait StateMachine: Send + Sync + 'static {
    /// Applies one command. Must be deterministic: it sees nothing but its arguments. Writes go through `txn` and are
    /// committed atomically with the applied index. Returns the reply for the proposer.
    fn apply(&self, index: u64, command: &[u8], txn: &mut Txn<'_>) -> Vec<u8>;

    /// After a batch of commands was applied: updates derived data. Called in log order with the same commands, before
    /// the proposer gets its reply; `view` shows the state after the whole batch.
    fn applied(&self, _index: u64, _command: &[u8], _view: &View) {}

    /// The whole state was replaced (start, snapshot received): rebuilds derived data.
    fn reloaded(&self, view: &View);
}

/// The writes of a command, on top of the state before it. Errors of the disk are kept: the whole batch is then
/// discarded and applied again later, so a machine need not handle them.
pub struct Txn<'a> {
    db: &'a Db,
    state: Column<'a>,
    /// Applied before `writes`.
    deleted_prefixes: Vec<Vec<u8>>,
    /// `None` deletes.
    writes: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    fault: OnceCell<Error>,
}

impl<'a> Txn<'a> {
    pub(super) fn new(db: &'a Db, state: Column<'a>) -> Self {
        Self {
            db,
            state,
            deleted_prefixes: Vec::new(),
            writes: BTreeMap::new(),
            fault: OnceCell::new(),
        }
    }

    /// The value, with the command's own writes.
    pub fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        if let Some(write) = self.writes.get(key) {
            return write.clone();
        }
        if self.is_deleted(key) {
            return None;
        }
        self.db.get_cf(&self.state, key).unwrap_or_else(|error| {
            self.note(error);
            None
        })
    }

    pub fn put(&mut self, key: &[u8], value: &[u8]) {
        self.writes.insert(key.to_vec(), Some(value.to_vec()));
    }

    pub fn delete(&mut self, key: &[u8]) {
        self.writes.insert(key.to_vec(), None);
    }

    /// Deletes every key that begins with `prefix`, at a cost that does not grow with their number.
    pub fn delete_prefix(&mut self, prefix: &[u8]) {
        let covered: Vec<_> = self
            .writes
            .range(prefix.to_vec()..)
            .map(|(key, _)| key)
            .take_while(|key| key.starts_with(prefix))
            .cloned()
            .collect();
        for key in covered {
            self.writes.remove(&key);
        }
        if !self.is_deleted(prefix) {
            self.deleted_prefixes.push(prefix.to_vec());
        }
    }

    /// Keys and values that begin with `prefix`, in key order, with the command's own writes.
    pub fn scan_prefix(&self, prefix: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut rows = BTreeMap::new();
        if !self.is_deleted(prefix) {
            let mut options = ReadOptions::default();
            options.set_iterate_range(PrefixRange(prefix));
            for row in self
                .db
                .iterator_cf_opt(&self.state, options, IteratorMode::Start)
            {
                match row {
                    Ok((key, _)) if self.is_deleted(&key) => {}
                    Ok((key, value)) => drop(rows.insert(key.into_vec(), value.into_vec())),
                    Err(error) => self.note(error),
                }
            }
        }
        for (key, write) in self
            .writes
            .range(prefix.to_vec()..)
            .take_while(|(key, _)| key.starts_with(prefix))
        {
            match write {
                Some(value) => rows.insert(key.clone(), value.clone()),
                None => rows.remove(key),
            };
        }
        rows.into_iter().collect()
    }

    fn is_deleted(&self, key: &[u8]) -> bool {
        self.deleted_prefixes
            .iter()
            .any(|prefix| key.starts_with(prefix))
    }

    /// The first error counts; what follows from it is discarded anyway.
    fn note(&self, error: rocksdb::Error) {
        self.fault.get_or_init(|| error.into());
    }

    /// All writes so far as one batch.
    pub(super) fn into_batch(self) -> Result<WriteBatch, Error> {
        if let Some(fault) = self.fault.into_inner() {
            return Err(fault);
        }
        let mut batch = WriteBatch::default();
        for prefix in &self.deleted_prefixes {
            match successor(prefix) {
                Some(end) => batch.delete_range_cf(&self.state, prefix.clone(), end),
                // No key follows the prefix, so there is no end to name.
                None => {
                    let mut options = ReadOptions::default();
                    options.set_iterate_range(prefix.clone()..);
                    for row in self
                        .db
                        .iterator_cf_opt(&self.state, options, IteratorMode::Start)
                    {
                        batch.delete_cf(&self.state, row?.0);
                    }
                }
            }
        }
        for (key, write) in &self.writes {
            match write {
                Some(value) => batch.put_cf(&self.state, key, value),
                None => batch.delete_cf(&self.state, key),
            }
        }
        Ok(batch)
    }
}

/// The first key after all that begin with `prefix`.
pub(super) fn successor(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

//! Erasure: deleted values leave the disk only when every file that held them is rewritten or removed. That is the state's
//! files, the log's, and the database's write-ahead log; and nothing goes while a view from before still shows it.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;

use rocksdb::properties::BACKGROUND_ERRORS;
use rocksdb::{BottommostLevelCompaction, CompactOptions, FlushOptions};
use tokio::time::{sleep, timeout};

use super::core::Event;
use super::machine::successor;
use super::store::{Column, Store};
use super::{Error, Replica};
use crate::clock::{Duration, monotonic};

/// The core hears within microseconds, unless its disk is stuck.
const CORE_PATIENCE: Duration = Duration::from_secs(5);
/// The leader keeps what members lack for so long, since a whole snapshot costs them more than a few entries.
const FOLLOWERS_PATIENCE: Duration = Duration::from_secs(5);
/// Views are held for milliseconds, or while a member fetches a snapshot.
const VIEWS_PATIENCE: Duration = Duration::from_secs(30);
/// RocksDB removes files in the background, within milliseconds.
const FILES_PATIENCE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(20);

/// Moves the state's values out of files with deleted ones among them.
pub(super) async fn compact_prefix(store: Arc<Store>, prefix: &[u8]) -> Result<(), Error> {
    let (from, to) = (prefix.to_vec(), successor(prefix));
    views_gone(&store).await?;
    blocking(move || rewrite(&store, &store.state()?, Some(from), to)).await
}

/// Drops the log up to what is applied here, and the files that held it.
pub(super) async fn forget_log(replica: &Replica) -> Result<(), Error> {
    let upto = replica.shared().store()?.applied()?.index;
    core_knows(replica, upto).await?;
    members_have(replica, upto).await;
    replica
        .ask(|reply| Event::ForgetLog { upto, reply })
        .await?;
    let store = replica.shared().store()?;
    views_gone(&store).await?;
    blocking(move || {
        let ahead = write_ahead_logs(&store)?;
        // A write-ahead log is removed once every column family that has something in it is written out. The state goes
        // first, so that it never depends on entries whose removal is durable already.
        store.sync()?;
        for column in store.columns()? {
            flush(&store, &column)?;
        }
        rewrite(&store, &store.log()?, None, None)?;
        let begin = monotonic();
        while !ahead.is_disjoint(&write_ahead_logs(&store)?) {
            // Held up by a snapshot that arrives in a column family of its own.
            if begin.elapsed() > FILES_PATIENCE {
                return Err(Error::Timeout);
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    })
    .await
}

/// The write-ahead logs with something in them.
fn write_ahead_logs(store: &Store) -> Result<HashSet<PathBuf>, Error> {
    let list = || -> std::io::Result<HashSet<PathBuf>> {
        let mut logs = HashSet::new();
        for file in std::fs::read_dir(store.db().path())? {
            let path = file?.path();
            let is_log = path.extension().is_some_and(|extension| extension == "log");
            // One that has just been removed is none.
            if is_log && std::fs::metadata(&path).is_ok_and(|about| about.len() > 0) {
                logs.insert(path);
            }
        }
        Ok(logs)
    };
    list().map_err(|e| Error::Storage { why: e.to_string() })
}

/// Waits until the core has heard that entries up to `upto` are applied: it is told after those that wait for them.
async fn core_knows(replica: &Replica, upto: u64) -> Result<(), Error> {
    let mut status = replica.watch_status();
    let known = status.wait_for(|status| status.failure.is_some() || status.applied >= upto);
    let status = timeout(CORE_PATIENCE, known)
        .await
        .map_err(|_| Error::Timeout)?
        .map_err(|_| Error::Closed)?;
    match &status.failure {
        Some(why) => Err(Error::Storage { why: why.clone() }),
        None => Ok(()),
    }
}

/// Waits until no member needs entries up to `upto` from here, or has taken too long; only a leader sends any.
async fn members_have(replica: &Replica, upto: u64) {
    let begin = monotonic();
    while let Ok(progress) = replica.ask(Event::Progress).await
        && progress.values().any(|matched| *matched < upto)
        && begin.elapsed() < FOLLOWERS_PATIENCE
    {
        sleep(POLL).await;
    }
}

/// Waits until no view shows the database as it was before the call.
async fn views_gone(store: &Store) -> Result<(), Error> {
    let now = store.db().latest_sequence_number();
    let begin = monotonic();
    loop {
        // 0 when there is no snapshot.
        let oldest = store
            .db()
            .property_int_value("rocksdb.oldest-snapshot-sequence")?
            .unwrap_or(0);
        if oldest == 0 || oldest >= now {
            return Ok(());
        }
        if begin.elapsed() > VIEWS_PATIENCE {
            return Err(Error::Timeout);
        }
        sleep(POLL).await;
    }
}

async fn blocking(work: impl FnOnce() -> Result<(), Error> + Send + 'static) -> Result<(), Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(Error::Closed))
}

fn flush(store: &Store, column: &Column<'_>) -> Result<(), Error> {
    let mut options = FlushOptions::default();
    options.set_wait(true);
    Ok(store.db().flush_cf_opt(column, &options)?)
}

/// Writes a range anew without what was deleted in it. RocksDB's own call says nothing about failure, its count of errors
/// does: one too many is only a reason to do it again.
fn rewrite(
    store: &Store,
    column: &Column<'_>,
    from: Option<Vec<u8>>,
    to: Option<Vec<u8>>,
) -> Result<(), Error> {
    let errors = || store.db().property_int_value(BACKGROUND_ERRORS);
    let before = errors()?;
    flush(store, column)?;
    let mut options = CompactOptions::default();
    options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
    store.db().compact_range_cf_opt(column, from, to, &options);
    if errors()? == before {
        Ok(())
    } else {
        Err(Error::Storage {
            why: "files with deleted values could not be rewritten".to_owned(),
        })
    }
}

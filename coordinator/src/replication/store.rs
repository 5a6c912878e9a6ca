//! One RocksDB per replica: the log, Raft's few facts, and the state machine's keys.
//!
//! The state lives in a column family of a numbered generation. A received snapshot is written into the next generation
//! and taken over in one write, so that a crash leaves either the old state or the new one.

use std::sync::{Arc, PoisonError, RwLock};

use raft::eraftpb::{ConfState, Entry, HardState};
use rocksdb::{
    BlockBasedOptions, BoundColumnFamily, Cache, ColumnFamilyDescriptor, DBCompressionType,
    DBRecoveryMode, DBWithThreadMode, IteratorMode, LogLevel, MultiThreaded, Options, ReadOptions,
    WriteBatch, WriteOptions,
};
use serde::{Deserialize, Serialize};

use super::Error;
use super::directory::Directory;
use super::view::View;
use crate::ids::NodeId;

pub(super) type Db = DBWithThreadMode<MultiThreaded>;
pub(super) type Column<'a> = Arc<BoundColumnFamily<'a>>;

/// Per column family; small, since a node hosts several groups and the whole demo cluster fits in 1.5 GiB.
const WRITE_BUFFER_BYTES: usize = 8 * 1024 * 1024;
/// All column families of one replica together.
const ALL_WRITE_BUFFERS_BYTES: usize = 16 * 1024 * 1024;
const BLOCK_CACHE_BYTES: usize = 8 * 1024 * 1024;
/// Old write-ahead logs are given up beyond this.
const MAX_WAL_BYTES: u64 = 64 * 1024 * 1024;
const MAX_OPEN_FILES: i32 = 256;
const PROBE_BYTES: usize = 256 * 1024;

const LOG: &str = "log";
const META: &str = "meta";
const STATE_PREFIX: &str = "state-";

const HARD_STATE: &[u8] = b"hard_state";
const CONF_STATE: &[u8] = b"conf_state";
const APPLIED: &[u8] = b"applied";
const TRUNCATED: &[u8] = b"truncated";
const GENERATION: &[u8] = b"generation";

/// A place in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Position {
    pub(super) index: u64,
    pub(super) term: u64,
}

pub(super) struct Store {
    db: Arc<Db>,
    /// Written only while a snapshot takes the state over, so that a view never mixes two generations.
    generation: RwLock<u64>,
    /// Dropped after the database, so that nobody else opens the directory before.
    _directory: Arc<Directory>,
}

/// What a batch of log entries adds or replaces.
pub(super) struct Append<'a> {
    pub(super) entries: &'a [Entry],
    pub(super) hard_state: Option<&'a HardState>,
    /// The last index the log had before.
    pub(super) last_index: u64,
    pub(super) sync: bool,
}

impl Store {
    pub(super) fn open(
        directory: Arc<Directory>,
        bootstrap: Option<&[NodeId]>,
    ) -> Result<Self, Error> {
        let path = directory.db();
        let mut options = Options::default();
        options.create_if_missing(true);
        options.set_max_open_files(MAX_OPEN_FILES);
        options.set_db_write_buffer_size(ALL_WRITE_BUFFERS_BYTES);
        options.set_max_total_wal_size(MAX_WAL_BYTES);
        options.set_keep_log_file_num(2);
        options.set_log_level(LogLevel::Warn);
        // Ends at the first broken record. In the tail that was not synced, the disk may have kept later pages and lost
        // earlier ones; nothing there was acknowledged. A record that rots in the synced part takes what follows with it:
        // the log is then shorter than its commit index, which `Log::open` or the leader's next heartbeat finds.
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        let mut names = match path.join("CURRENT").exists() {
            true => Db::list_cf(&options, &path)?,
            false => vec!["default".to_owned()],
        };
        for name in [LOG, META] {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        options.create_missing_column_families(true);
        let columns = names
            .iter()
            .map(|name| ColumnFamilyDescriptor::new(name, column_options()));
        let db = Arc::new(Db::open_cf_descriptors(&options, &path, columns)?);
        let store = Self {
            db,
            generation: RwLock::new(0),
            _directory: directory,
        };
        let generation = match store.meta(GENERATION)? {
            Some(bytes) => decode(&bytes)?,
            None => store.initialise(bootstrap)?,
        };
        // What an interrupted snapshot left behind.
        for name in names
            .iter()
            .filter(|name| name.starts_with(STATE_PREFIX) && **name != state_name(generation))
        {
            store.db.drop_cf(name)?;
        }
        *store
            .generation
            .write()
            .unwrap_or_else(PoisonError::into_inner) = generation;
        store.column(&state_name(generation))?;
        Ok(store)
    }

    /// First start. The first members begin as if they had received a snapshot at index 1 that names the voters: then a
    /// node that joins later, at index 0, always gets a snapshot, and never applies a membership change to a membership
    /// it does not know.
    fn initialise(&self, bootstrap: Option<&[NodeId]>) -> Result<u64, Error> {
        let generation = 0u64;
        let name = state_name(generation);
        if self.db.cf_handle(&name).is_none() {
            self.db.create_cf(&name, &column_options())?;
        }
        let mut batch = WriteBatch::default();
        let meta = self.column(META)?;
        if let Some(voters) = bootstrap {
            let first = Position { index: 1, term: 1 };
            let mut hard_state = HardState::default();
            hard_state.set_term(first.term);
            hard_state.set_commit(first.index);
            let conf = ConfState::from((voters.iter().map(|n| n.0), []));
            batch.put_cf(&meta, HARD_STATE, write(&hard_state)?);
            batch.put_cf(&meta, CONF_STATE, write(&conf)?);
            batch.put_cf(&meta, APPLIED, encode(&first)?);
            batch.put_cf(&meta, TRUNCATED, encode(&first)?);
        }
        batch.put_cf(&meta, GENERATION, encode(&generation)?);
        self.write(batch, true)?;
        Ok(generation)
    }

    pub(super) fn db(&self) -> &Arc<Db> {
        &self.db
    }

    fn column(&self, name: &str) -> Result<Column<'_>, Error> {
        self.db.cf_handle(name).ok_or_else(|| Error::Storage {
            why: format!("the column family {name} is missing"),
        })
    }

    /// The column family of the log.
    pub(super) fn log(&self) -> Result<Column<'_>, Error> {
        self.column(LOG)
    }

    /// All column families that are written, the state's first.
    pub(super) fn columns(&self) -> Result<[Column<'_>; 3], Error> {
        Ok([self.state()?, self.column(META)?, self.log()?])
    }

    /// The column family of the present state. The caller holds off snapshots.
    pub(super) fn state(&self) -> Result<Column<'_>, Error> {
        let generation = *self
            .generation
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        self.column(&state_name(generation))
    }

    pub(super) fn view(&self) -> Result<View, Error> {
        let generation = self
            .generation
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        View::new(&self.db, &state_name(*generation), META)
    }

    fn meta(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.db.get_cf(&self.column(META)?, key)?)
    }

    pub(super) fn hard_state(&self) -> Result<HardState, Error> {
        self.meta(HARD_STATE)?
            .map_or_else(|| Ok(HardState::default()), |bytes| read(&bytes))
    }

    /// The membership as of the applied index.
    pub(super) fn conf_state(&self) -> Result<ConfState, Error> {
        self.meta(CONF_STATE)?
            .map_or_else(|| Ok(ConfState::default()), |bytes| read(&bytes))
    }

    pub(super) fn applied(&self) -> Result<Position, Error> {
        self.meta(APPLIED)?
            .map_or_else(|| Ok(Position::default()), |bytes| decode(&bytes))
    }

    /// The last entry that is no longer in the log.
    pub(super) fn truncated(&self) -> Result<Position, Error> {
        self.meta(TRUNCATED)?
            .map_or_else(|| Ok(Position::default()), |bytes| decode(&bytes))
    }

    /// Entries from `low` to below `high`, the first always, then while they fit in `max_bytes`.
    pub(super) fn entries(&self, low: u64, high: u64, max_bytes: u64) -> Result<Vec<Entry>, Error> {
        let log = self.column(LOG)?;
        let mut entries = Vec::new();
        let mut bytes = 0u64;
        let mut expected = low;
        let mut options = ReadOptions::default();
        options.set_iterate_range(low.to_be_bytes().to_vec()..high.to_be_bytes().to_vec());
        for item in self.db.iterator_cf_opt(&log, options, IteratorMode::Start) {
            let (key, value) = item?;
            if *key != expected.to_be_bytes() {
                break;
            }
            bytes += value.len() as u64;
            if !entries.is_empty() && bytes > max_bytes {
                return Ok(entries);
            }
            entries.push(read(&value)?);
            expected += 1;
        }
        if expected == high {
            Ok(entries)
        } else {
            Err(Error::Storage {
                why: format!("log entry {expected} is missing"),
            })
        }
    }

    /// Term and size of each entry after `truncated`.
    pub(super) fn log_shape(&self, truncated: u64) -> Result<Vec<(u64, u32)>, Error> {
        let log = self.column(LOG)?;
        let mut shape = Vec::new();
        let mut options = ReadOptions::default();
        options.set_iterate_range((truncated + 1).to_be_bytes().to_vec()..);
        for item in self.db.iterator_cf_opt(&log, options, IteratorMode::Start) {
            let (key, value) = item?;
            let expected = truncated + 1 + shape.len() as u64;
            if *key != expected.to_be_bytes() {
                return Err(Error::Storage {
                    why: format!("log entry {expected} is missing"),
                });
            }
            let entry: Entry = read(&value)?;
            shape.push((entry.term, u32::try_from(value.len()).unwrap_or(u32::MAX)));
        }
        Ok(shape)
    }

    /// Writes entries and hard state in one write. Returns the entries' sizes.
    pub(super) fn append(&self, append: &Append<'_>) -> Result<Vec<u32>, Error> {
        let mut batch = WriteBatch::default();
        let mut sizes = Vec::with_capacity(append.entries.len());
        let log = self.column(LOG)?;
        for entry in append.entries {
            let bytes = write(entry)?;
            sizes.push(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
            batch.put_cf(&log, entry.index.to_be_bytes(), bytes);
        }
        if let Some(last) = append.entries.last() {
            // A new leader's shorter log replaces what an old one left.
            for index in last.index + 1..=append.last_index {
                batch.delete_cf(&log, index.to_be_bytes());
            }
        }
        if let Some(hard_state) = append.hard_state {
            batch.put_cf(&self.column(META)?, HARD_STATE, write(hard_state)?);
        }
        self.write(batch, append.sync)?;
        Ok(sizes)
    }

    /// Removes the log up to and including `to`.
    pub(super) fn truncate(&self, from: u64, to: Position) -> Result<(), Error> {
        let mut batch = WriteBatch::default();
        batch.delete_range_cf(
            &self.column(LOG)?,
            from.to_be_bytes(),
            (to.index + 1).to_be_bytes(),
        );
        batch.put_cf(&self.column(META)?, TRUNCATED, encode(&to)?);
        self.write(batch, false)
    }

    /// Writes a batch of state changes with the index they bring the state to. Needs no sync: the log has them.
    pub(super) fn write_applied(
        &self,
        mut batch: WriteBatch,
        applied: Position,
        conf: Option<&ConfState>,
    ) -> Result<(), Error> {
        let meta = self.column(META)?;
        batch.put_cf(&meta, APPLIED, encode(&applied)?);
        if let Some(conf) = conf {
            batch.put_cf(&meta, CONF_STATE, write(conf)?);
        }
        self.write(batch, false)
    }

    /// An empty column family for a snapshot that is about to arrive.
    pub(super) fn begin_generation(&self) -> Result<u64, Error> {
        let mut generation = *self
            .generation
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            generation += 1;
            let name = state_name(generation);
            if self.db.cf_handle(&name).is_none() {
                self.db.create_cf(&name, &column_options())?;
                return Ok(generation);
            }
        }
    }

    /// Writes a piece of an arriving snapshot.
    pub(super) fn fill_generation(
        &self,
        generation: u64,
        pairs: &[(&[u8], &[u8])],
    ) -> Result<(), Error> {
        let column = self.column(&state_name(generation))?;
        let mut batch = WriteBatch::default();
        for (key, value) in pairs {
            batch.put_cf(&column, key, value);
        }
        // Durable by the flush at the end.
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        Ok(self.db.write_opt(batch, &options)?)
    }

    /// Makes an arrived snapshot durable.
    pub(super) fn flush_generation(&self, generation: u64) -> Result<(), Error> {
        Ok(self.db.flush_cf(&self.column(&state_name(generation))?)?)
    }

    pub(super) fn drop_generation(&self, generation: u64) {
        if let Err(error) = self.db.drop_cf(&state_name(generation)) {
            tracing::warn!(%error, "an unused snapshot could not be removed; the next start does it");
        }
    }

    /// Takes over a snapshot: state, membership and position change in one synced write, and the log begins after it.
    pub(super) fn install(
        &self,
        generation: u64,
        position: Position,
        conf: &ConfState,
        hard_state: &HardState,
    ) -> Result<(), Error> {
        let mut current = self
            .generation
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let mut batch = WriteBatch::default();
        let meta = self.column(META)?;
        batch.delete_range_cf(
            &self.column(LOG)?,
            0u64.to_be_bytes(),
            u64::MAX.to_be_bytes(),
        );
        batch.put_cf(&meta, HARD_STATE, write(hard_state)?);
        batch.put_cf(&meta, CONF_STATE, write(conf)?);
        batch.put_cf(&meta, APPLIED, encode(&position)?);
        batch.put_cf(&meta, TRUNCATED, encode(&position)?);
        batch.put_cf(&meta, GENERATION, encode(&generation)?);
        self.write(batch, true)?;
        let old = std::mem::replace(&mut *current, generation);
        drop(current);
        self.drop_generation(old);
        Ok(())
    }

    fn write(&self, batch: WriteBatch, sync: bool) -> Result<(), Error> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        Ok(self.db.write_opt(batch, &options)?)
    }

    /// Whether a synced write works.
    pub(super) fn probe(&self) -> Result<(), Error> {
        let mut batch = WriteBatch::default();
        // As large as a usual append, so that a nearly full disk is not taken for a healthy one.
        batch.put_cf(&self.column(META)?, b"probe", vec![0u8; PROBE_BYTES]);
        self.write(batch, true)?;
        let mut batch = WriteBatch::default();
        batch.delete_cf(&self.column(META)?, b"probe");
        self.write(batch, false)
    }

    /// Everything written so far survives a power cut.
    pub(super) fn sync(&self) -> Result<(), Error> {
        Ok(self.db.flush_wal(true)?)
    }
}

/// What a snapshot of the database says about membership and position.
pub(super) fn read_meta(
    get: impl Fn(&[u8]) -> Result<Option<Vec<u8>>, Error>,
) -> Result<(Position, ConfState), Error> {
    let applied = get(APPLIED)?.map_or_else(|| Ok(Position::default()), |bytes| decode(&bytes))?;
    let conf = get(CONF_STATE)?.map_or_else(|| Ok(ConfState::default()), |bytes| read(&bytes))?;
    Ok((applied, conf))
}

fn state_name(generation: u64) -> String {
    format!("{STATE_PREFIX}{generation}")
}

fn column_options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_BYTES));
    table.set_cache_index_and_filter_blocks(true);
    table.set_bloom_filter(10.0, false);
    let mut options = Options::default();
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_write_buffer_number(2);
    options.set_compression_type(DBCompressionType::Lz4);
    options.set_block_based_table_factory(&table);
    options
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    postcard::to_stdvec(value).map_err(|e| Error::Storage { why: e.to_string() })
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Error> {
    postcard::from_bytes(bytes).map_err(|e| Error::Storage {
        why: format!("a record of the replica is broken: {e}"),
    })
}

fn write<M: protobuf::Message>(message: &M) -> Result<Vec<u8>, Error> {
    message
        .write_to_bytes()
        .map_err(|e| Error::Storage { why: e.to_string() })
}

fn read<M: protobuf::Message>(bytes: &[u8]) -> Result<M, Error> {
    M::parse_from_bytes(bytes).map_err(|e| Error::Storage {
        why: format!("a record of the log is broken: {e}"),
    })
}

impl From<rocksdb::Error> for Error {
    fn from(error: rocksdb::Error) -> Self {
        Error::Storage {
            why: error.into_string(),
        }
    }
}

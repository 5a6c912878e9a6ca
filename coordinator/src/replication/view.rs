//! Reading the state at one moment.

use std::sync::Arc;

use raft::eraftpb::ConfState;
use rocksdb::{
    DBIteratorWithThreadMode, IteratorMode, PrefixRange, ReadOptions, SnapshotWithThreadMode,
};
use self_cell::self_cell;

use super::Error;
use super::store::{Column, Db, Position, read_meta};

/// A snapshot and the column family it reads. The handle keeps the family's data while a newer state replaces it.
struct Moment<'a> {
    snapshot: SnapshotWithThreadMode<'a, Db>,
    state: Column<'a>,
}

self_cell!(
    /// A moment together with the database that it borrows.
    struct Frozen {
        owner: Arc<Db>,
        #[covariant]
        dependent: Moment,
    }
);

/// The state at one moment. Cheap to clone; hold it briefly, since it keeps old data on disk.
#[derive(Clone)]
pub struct View {
    frozen: Result<Arc<Frozen>, Error>,
    position: Position,
    conf: ConfState,
}

impl View {
    pub(super) fn new(db: &Arc<Db>, state: &str, meta: &str) -> Result<Self, Error> {
        let missing = || Error::Storage {
            why: "a column family is missing".to_owned(),
        };
        let frozen = Frozen::try_new(db.clone(), |db| {
            let state = db.cf_handle(state).ok_or_else(missing)?;
            Ok::<_, Error>(Moment {
                snapshot: db.snapshot(),
                state,
            })
        })?;
        let meta = db.cf_handle(meta).ok_or_else(missing)?;
        let (position, conf) =
            read_meta(|key| Ok(frozen.borrow_dependent().snapshot.get_cf(&meta, key)?))?;
        Ok(Self {
            frozen: Ok(Arc::new(frozen)),
            position,
            conf,
        })
    }

    /// A view of a replica whose disk fails: every read says so.
    pub(super) fn failed(error: Error) -> Self {
        Self {
            frozen: Err(error),
            position: Position::default(),
            conf: ConfState::default(),
        }
    }

    fn moment(&self) -> Result<&Moment<'_>, Error> {
        match &self.frozen {
            Ok(frozen) => Ok(frozen.borrow_dependent()),
            Err(error) => Err(error.clone()),
        }
    }

    /// # Errors
    /// [`Error::Storage`] when the disk cannot be read.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let moment = self.moment()?;
        Ok(moment.snapshot.get_cf(&moment.state, key)?)
    }

    /// Keys and values that begin with `prefix`, in key order.
    pub fn scan_prefix(&self, prefix: &[u8]) -> Scan<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_range(PrefixRange(prefix));
        self.scan(options)
    }

    /// Keys and values from `from` (included) to `to` (excluded), in key order.
    pub fn scan_range(&self, from: &[u8], to: &[u8]) -> Scan<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_range(from.to_vec()..to.to_vec());
        self.scan(options)
    }

    fn scan(&self, options: ReadOptions) -> Scan<'_> {
        Scan {
            rows: self
                .moment()
                .map(|moment| {
                    moment
                        .snapshot
                        .iterator_cf_opt(&moment.state, options, IteratorMode::Start)
                })
                .map_err(Some),
        }
    }

    /// Index of the last command that this view shows.
    pub fn applied(&self) -> u64 {
        self.position.index
    }

    pub(super) fn position(&self) -> Position {
        self.position
    }

    pub(super) fn conf(&self) -> &ConfState {
        &self.conf
    }
}

/// Keys and values in key order; [`Error::Storage`] ends it.
pub struct Scan<'a> {
    /// Or the error that is still to be told.
    rows: Result<DBIteratorWithThreadMode<'a, Db>, Option<Error>>,
}

impl Iterator for Scan<'_> {
    type Item = Result<(Vec<u8>, Vec<u8>), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.rows {
            Ok(rows) => match rows.next()? {
                Ok((key, value)) => Some(Ok((key.into_vec(), value.into_vec()))),
                Err(error) => Some(Err(error.into())),
            },
            Err(error) => {
                let error = error.take()?;
                Some(Err(error))
            }
        }
    }
}

//! Keeps the indexes in step with the state: a thread of its own, since indexing a large document takes longer than an election
//! and must not hold up the log. Whoever needs what was applied so far waits for [`Follower::caught_up`].
//!
//! A change that cannot be brought in, be it an error or a panic, never leaves indexes that silently lack something: they are
//! emptied and built anew from the newest view, and nobody searches them meanwhile.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use coordinator::clock::monotonic;
use coordinator::ids::TenantId;
use coordinator::replication::View;
use tokio::sync::watch;

use super::{IndexedDocument, Indexes};
use crate::crypto::Key;
use crate::store::reader::{ReadError, Reader};
use crate::store::{CollectionId, DocumentId, Stage};

/// Changes looked at together: an index commit costs some milliseconds however much it holds.
const BATCH: usize = 256;
/// Chunks brought into an index at once; bounds the memory that their text takes meanwhile.
const CHUNKS_AT_ONCE: usize = 2_000;
/// Pause before the indexes are built anew after a failure, and the longest it grows to.
const REBUILD_PAUSE: Duration = Duration::from_millis(500);
const REBUILD_PAUSE_MOST: Duration = Duration::from_secs(30);
/// How long [`Follower::close`] waits for the thread; it looks at the end after each document.
const CLOSE_WAIT: Duration = Duration::from_secs(10);

/// What happened to the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Everything may be different.
    Reloaded,
    Ready {
        tenant: TenantId,
        document: DocumentId,
    },
    Deleted {
        tenant: TenantId,
        document: DocumentId,
    },
    CollectionDeleted {
        tenant: TenantId,
        collection: CollectionId,
    },
}

impl Change {
    fn tenant(&self) -> Option<&TenantId> {
        match self {
            Self::Reloaded => None,
            Self::Ready { tenant, .. }
            | Self::Deleted { tenant, .. }
            | Self::CollectionDeleted { tenant, .. } => Some(tenant),
        }
    }
}

/// Why a batch could not be brought in.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the full-text index failed: {0}")]
    Text(#[from] tantivy::TantivyError),
    #[error("{0}")]
    Read(ReadError),
    #[error("indexing panicked")]
    Panic,
    /// The node goes; nothing is missing.
    #[error("the node stops")]
    Stopped,
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

struct Queue {
    /// `None` once closed.
    changes: Option<mpsc::Sender<(Change, View)>>,
    numbers: Numbers,
}

/// Changes are numbered from 1 as they are queued.
#[derive(Default)]
struct Numbers {
    /// The newest.
    queued: u64,
    /// Each tenant's newest.
    latest: HashMap<TenantId, u64>,
    /// The newest [`Change::Reloaded`], which is everybody's.
    reloaded: u64,
}

impl Numbers {
    fn note(&mut self, tenant: Option<TenantId>) {
        self.queued += 1;
        match tenant {
            Some(tenant) => drop(self.latest.insert(tenant, self.queued)),
            None => {
                self.latest.clear();
                self.reloaded = self.queued;
            }
        }
    }

    /// The newest that concerns a tenant.
    fn of(&self, tenant: &TenantId) -> u64 {
        self.latest.get(tenant).copied().unwrap_or(self.reloaded)
    }
}

/// The thread's handle; the thread ends when it is dropped or closed.
pub struct Follower {
    indexes: Arc<Indexes>,
    queue: Mutex<Queue>,
    done: watch::Receiver<u64>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// The indexes are complete up to what is done.
    built: AtomicBool,
    stop: AtomicBool,
}

impl Follower {
    /// Starts the thread.
    pub fn start(root: Key) -> std::io::Result<Self> {
        let indexes = Arc::new(Indexes::default());
        let (queue, changes) = mpsc::channel();
        let (progress, done) = watch::channel(0);
        let state = Arc::new(State::default());
        let follow = Follow {
            indexes: indexes.clone(),
            root,
            state: state.clone(),
        };
        std::thread::Builder::new()
            .name("store-index".into())
            .spawn(move || follow.run(&changes, &progress))?;
        Ok(Self {
            indexes,
            queue: Mutex::new(Queue {
                changes: Some(queue),
                numbers: Numbers::default(),
            }),
            done,
            state,
        })
    }

    /// The indexes that are kept in step.
    pub fn indexes(&self) -> &Arc<Indexes> {
        &self.indexes
    }

    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a change; `view` shows the state after it.
    pub fn push(&self, change: Change, view: &View) {
        let mut queue = self.queue();
        let tenant = change.tenant().cloned();
        let sent = match &queue.changes {
            Some(changes) => changes.send((change, view.clone())).is_ok(),
            None => false,
        };
        if sent {
            queue.numbers.note(tenant);
        }
    }

    /// Returns when everything queued before the call is in the indexes.
    pub async fn caught_up(&self) {
        let target = self.queue().numbers.queued;
        self.done_with(target).await;
    }

    /// As [`Follower::caught_up`] for what concerns one tenant: nobody waits for another one's thousand documents.
    pub async fn caught_up_for(&self, tenant: &TenantId) {
        let target = self.queue().numbers.of(tenant);
        self.done_with(target).await;
    }

    async fn done_with(&self, target: u64) {
        let mut done = self.done.clone();
        // An error means that the thread ended, and then nothing more will come.
        let _ = done.wait_for(|done| *done >= target).await;
    }

    /// Whether the first state was indexed and nothing waits.
    pub fn is_caught_up(&self) -> bool {
        let queued = self.queue().numbers.queued;
        queued > 0 && *self.done.borrow() >= queued
    }

    /// Whether the indexes hold a whole state, be it a moment old; not while they are built (again).
    pub fn is_built(&self) -> bool {
        self.state.built.load(Ordering::SeqCst)
    }

    /// Ends the thread and waits for it, for at most [`CLOSE_WAIT`].
    pub async fn close(&self) {
        self.state.stop.store(true, Ordering::SeqCst);
        self.queue().changes = None;
        let mut done = self.done.clone();
        // The thread's end drops the sender, which is the error waited for.
        let ended = tokio::time::timeout(CLOSE_WAIT, done.wait_for(|_| false)).await;
        if ended.is_err() {
            tracing::warn!("the index thread did not end within {CLOSE_WAIT:?}");
        }
    }
}

struct Follow {
    indexes: Arc<Indexes>,
    root: Key,
    state: Arc<State>,
}

impl Follow {
    fn run(&self, changes: &mpsc::Receiver<(Change, View)>, progress: &watch::Sender<u64>) {
        while let Ok((first, mut view)) = changes.recv() {
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Ok((change, later)) = changes.try_recv()
            {
                batch.push(change);
                view = later;
            }
            let mut count = batch.len() as u64;
            let mut brought_in = self.caught(|| self.bring_in(batch, &view));
            let mut pause = REBUILD_PAUSE;
            while let Err(failure) = brought_in {
                if matches!(failure, Failure::Stopped) {
                    return;
                }
                tracing::error!(%failure, "the indexes are emptied and will be built again in {pause:?}");
                self.state.built.store(false, Ordering::SeqCst);
                self.indexes.clear();
                let again = monotonic() + pause;
                pause = (pause * 2).min(REBUILD_PAUSE_MOST);
                loop {
                    let left = again.saturating_duration_since(monotonic());
                    match changes.recv_timeout(left) {
                        // A newer state holds what the change did; the change itself is not needed any more.
                        Ok((_, later)) => {
                            view = later;
                            count += 1;
                        }
                        Err(mpsc::RecvTimeoutError::Timeout) => break,
                        Err(mpsc::RecvTimeoutError::Disconnected) => return,
                    }
                }
                brought_in = self.caught(|| self.build(&view));
            }
            progress.send_modify(|done| *done += count);
        }
    }

    fn caught(&self, work: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or(Err(Failure::Panic))
    }

    /// Builds everything from the view.
    fn build(&self, view: &View) -> Result<(), Failure> {
        self.state.built.store(false, Ordering::SeqCst);
        self.indexes.clear();
        let reader = Reader::new(view, &self.root);
        for tenant in reader.tenants()? {
            let documents = reader.document_ids(&tenant)?.into_iter().collect();
            self.update(&tenant, &BTreeSet::new(), &documents, view)?;
        }
        self.state.built.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Brings the changes into the indexes; `view` is the state after the last of them.
    fn bring_in(&self, batch: Vec<Change>, view: &View) -> Result<(), Failure> {
        if batch.contains(&Change::Reloaded) {
            return self.build(view);
        }
        let mut tenants: BTreeMap<TenantId, (BTreeSet<DocumentId>, BTreeSet<DocumentId>)> =
            BTreeMap::new();
        for change in batch {
            match change {
                Change::Reloaded => {}
                Change::Ready { tenant, document } => {
                    tenants.entry(tenant).or_default().1.insert(document);
                }
                Change::Deleted { tenant, document } => {
                    tenants.entry(tenant).or_default().0.insert(document);
                }
                Change::CollectionDeleted { tenant, collection } => {
                    let documents = self.indexes.documents(&tenant, Some(collection));
                    tenants.entry(tenant).or_default().0.extend(documents);
                }
            }
        }
        for (tenant, (removed, added)) in tenants {
            self.update(&tenant, &removed, &added, view)?;
        }
        Ok(())
    }

    /// Adds only what is there and ready in the view: what was deleted later in the same batch is simply not.
    fn update(
        &self,
        tenant: &TenantId,
        removed: &BTreeSet<DocumentId>,
        added: &BTreeSet<DocumentId>,
        view: &View,
    ) -> Result<(), Failure> {
        let removed: Vec<DocumentId> = removed.iter().copied().collect();
        self.indexes.update(tenant, &removed, &[])?;
        let mut documents = Vec::new();
        let mut chunks = 0;
        for id in added {
            if self.state.stop.load(Ordering::SeqCst) {
                return Err(Failure::Stopped);
            }
            match self.read(tenant, *id, view) {
                Ok(Some(document)) => {
                    chunks += document.chunks.len();
                    documents.push(document);
                }
                Ok(None) | Err(ReadError::NotFound) => {}
                // Reading it again would not help, and the others shall be found.
                Err(ReadError::Unreadable(why)) => {
                    tracing::error!(document = %id, why, "a document cannot be read and is not indexed");
                }
                Err(error) => return Err(error.into()),
            }
            if chunks >= CHUNKS_AT_ONCE {
                self.indexes.update(tenant, &[], &documents)?;
                documents.clear();
                chunks = 0;
            }
        }
        self.indexes.update(tenant, &[], &documents)?;
        Ok(())
    }

    fn read(
        &self,
        tenant: &TenantId,
        id: DocumentId,
        view: &View,
    ) -> Result<Option<IndexedDocument>, ReadError> {
        let reader = Reader::new(view, &self.root);
        let open = reader.open(tenant, id)?;
        if open.record.stage != Stage::Ready {
            return Ok(None);
        }
        let name = reader.about(tenant, &open)?.name;
        let chunks = reader.chunks(tenant, &open)?;
        Ok(Some(IndexedDocument {
            id,
            collection: open.record.collection,
            name,
            chunks,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_waits_for_its_own_newest_change_and_for_a_reload_but_not_for_others() {
        let (a, b): (TenantId, TenantId) = ("a".parse().unwrap(), "b".parse().unwrap());
        let mut numbers = Numbers::default();
        assert_eq!(numbers.of(&a), 0);
        for (tenant, of_a, of_b) in [
            (None, 1, 1),
            (Some(&a), 2, 1),
            (Some(&b), 2, 3),
            (Some(&b), 2, 4),
            (None, 5, 5),
            (Some(&a), 6, 5),
        ] {
            numbers.note(tenant.cloned());
            assert_eq!((numbers.of(&a), numbers.of(&b)), (of_a, of_b));
        }
    }

    #[test]
    fn a_panic_while_indexing_is_a_failure_like_any_other() {
        let follow = Follow {
            indexes: Arc::default(),
            root: Key::generate(),
            state: Arc::default(),
        };
        assert!(matches!(
            follow.caught(|| panic!("as a bug would")),
            Err(Failure::Panic)
        ));
    }
}

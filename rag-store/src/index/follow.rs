//! Keeps the indexes in step with the state: a thread of its own, since indexing a large document takes longer than an election
//! and must not hold up the log. Whoever needs what was applied so far waits for [`Follower::caught_up`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};

use coordinator::ids::TenantId;
use coordinator::replication::View;
use tokio::sync::watch;

use super::{IndexedDocument, Indexes};
use crate::crypto::Key;
use crate::store::reader::Reader;
use crate::store::{CollectionId, DocumentId, Error, Stage};

/// Changes looked at together: an index commit costs some milliseconds however much it holds.
const BATCH: usize = 256;
/// Chunks brought into an index at once; bounds the memory that their text takes meanwhile.
const CHUNKS_AT_ONCE: usize = 2_000;

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

/// The thread's handle; the thread ends when it is dropped.
pub struct Follower {
    indexes: Arc<Indexes>,
    queue: Mutex<mpsc::Sender<(Change, View)>>,
    queued: AtomicU64,
    done: watch::Receiver<u64>,
}

impl Follower {
    /// Starts the thread.
    pub fn start(root: Key) -> std::io::Result<Self> {
        let indexes = Arc::new(Indexes::default());
        let (queue, changes) = mpsc::channel();
        let (progress, done) = watch::channel(0);
        let follow = Follow {
            indexes: indexes.clone(),
            root,
        };
        std::thread::Builder::new()
            .name("store-index".into())
            .spawn(move || follow.run(&changes, &progress))?;
        Ok(Self {
            indexes,
            queue: Mutex::new(queue),
            queued: AtomicU64::new(0),
            done,
        })
    }

    /// The indexes that are kept in step.
    pub fn indexes(&self) -> &Arc<Indexes> {
        &self.indexes
    }

    /// Queues a change; `view` shows the state after it.
    pub fn push(&self, change: Change, view: &View) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.send((change, view.clone())).is_ok() {
            self.queued.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Returns when everything queued before the call is in the indexes.
    pub async fn caught_up(&self) {
        let target = self.queued.load(Ordering::SeqCst);
        let mut done = self.done.clone();
        // An error means that the thread ended, and then nothing more will come.
        let _ = done.wait_for(|done| *done >= target).await;
    }

    /// Whether the first state was indexed and nothing waits.
    pub fn is_caught_up(&self) -> bool {
        let queued = self.queued.load(Ordering::SeqCst);
        queued > 0 && *self.done.borrow() >= queued
    }
}

struct Follow {
    indexes: Arc<Indexes>,
    root: Key,
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
            let count = batch.len() as u64;
            if let Err(error) = self.bring_in(batch, &view) {
                tracing::error!(%error, "indexes lag behind the store; restart this node to build them again");
            }
            progress.send_modify(|done| *done += count);
        }
    }

    /// Brings the changes into the indexes; `view` is the state after the last of them.
    fn bring_in(&self, batch: Vec<Change>, view: &View) -> Result<(), Error> {
        if batch.contains(&Change::Reloaded) {
            self.indexes.clear();
            let reader = Reader::new(view, &self.root);
            for tenant in reader.tenants()? {
                let documents = reader.document_ids(&tenant)?.into_iter().collect();
                self.update(&tenant, &BTreeSet::new(), &documents, view)?;
            }
            return Ok(());
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
    ) -> Result<(), Error> {
        let failed = |error: tantivy::TantivyError| {
            Error::unavailable(format!("the full-text index failed: {error}"))
        };
        let removed: Vec<DocumentId> = removed.iter().copied().collect();
        self.indexes.update(tenant, &removed, &[]).map_err(failed)?;
        let mut documents = Vec::new();
        let mut chunks = 0;
        for id in added {
            match self.read(tenant, *id, view) {
                Ok(Some(document)) => {
                    chunks += document.chunks.len();
                    documents.push(document);
                }
                Ok(None) | Err(Error::NotFound) => {}
                Err(error) => {
                    tracing::error!(document = %id, %error, "a document cannot be read and is not indexed")
                }
            }
            if chunks >= CHUNKS_AT_ONCE {
                self.indexes
                    .update(tenant, &[], &documents)
                    .map_err(failed)?;
                documents.clear();
                chunks = 0;
            }
        }
        self.indexes.update(tenant, &[], &documents).map_err(failed)
    }

    fn read(
        &self,
        tenant: &TenantId,
        id: DocumentId,
        view: &View,
    ) -> Result<Option<IndexedDocument>, Error> {
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

//! Turns originals into chunks with vectors, on the leader of a store group. The queue is the replicated state itself: whatever is
//! neither ready nor failed is picked up again after a crash or by the next leader.

mod document;
mod sweep;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coordinator::ids::TenantId;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio_util::sync::CancellationToken;

use crate::node::Embedder;
use crate::node::group::{Group, Refusal};
use crate::store::reader::Reader;
use crate::store::{DocumentId, Stage};

/// Documents read at once: one waits for vectors while another is taken apart.
const WORKERS: usize = 2;
/// Pause while the group has no leader that answers.
const PAUSE: Duration = Duration::from_secs(1);
/// Pause after the store itself refused a document's entries, e.g. because its disk is full.
const PAUSE_AFTER_REFUSAL: Duration = Duration::from_secs(5);
/// The queue is looked at anew at least so often.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// What ingestion works with.
pub struct Ingest {
    pub group: Arc<Group>,
    pub embedder: Arc<dyn Embedder>,
    /// The program that reads originals (`PROGRAM extract`).
    pub program: PathBuf,
}

impl Ingest {
    /// Works whenever this node leads the group, until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let mut leadership = self.group.replica.leadership();
        let me = Some(self.group.node);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                led = leadership.wait_for(|leader| *leader == me) => if led.is_err() { return },
            }
            // Dropping the work on a change of leader kills a reading child and forgets what was not committed.
            tokio::select! {
                () = stop.cancelled() => return,
                led = leadership.wait_for(|leader| *leader != me) => if led.is_err() { return },
                () = self.work() => {}
                () = sweep::run(&self.group) => {}
            }
        }
    }

    async fn work(&self) {
        let mut running = FuturesUnordered::new();
        let mut busy: HashSet<DocumentId> = HashSet::new();
        let mut last: Option<TenantId> = None;
        loop {
            while running.len() < WORKERS {
                let Some((tenant, id)) = self.next(last.as_ref(), &busy).await else {
                    break;
                };
                busy.insert(id);
                last = Some(tenant.clone());
                running.push(async move {
                    if let Err(refusal) = self.ingest(&tenant, id).await {
                        tracing::warn!(document = %id, ?refusal, "ingestion is interrupted and will be tried again");
                        tokio::time::sleep(PAUSE_AFTER_REFUSAL).await;
                    }
                    id
                });
            }
            tokio::select! {
                Some(id) = running.next(), if !running.is_empty() => { busy.remove(&id); }
                () = self.group.machine.queued.notified() => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
    }

    /// The oldest waiting document of the tenant after the one served last, so that one tenant's thousand documents do not hold
    /// up another's one.
    async fn next(
        &self,
        last: Option<&TenantId>,
        busy: &HashSet<DocumentId>,
    ) -> Option<(TenantId, DocumentId)> {
        let waiting = async || -> Result<Vec<(TenantId, DocumentId)>, Refusal> {
            let view = self.group.fresh_view().await?;
            let reader = Reader::new(&view, &self.group.root);
            let mut heads = Vec::new();
            for tenant in reader.tenants()? {
                let oldest = reader
                    .unfinished(&tenant)?
                    .into_iter()
                    .find(|(id, record)| {
                        matches!(record.stage, Stage::Queued | Stage::Processing)
                            && !busy.contains(id)
                    });
                heads.extend(oldest.map(|(id, _)| (tenant, id)));
            }
            Ok(heads)
        };
        match waiting().await {
            Ok(heads) => {
                let after = heads
                    .iter()
                    .find(|(tenant, _)| last.is_some_and(|last| tenant > last));
                after.or_else(|| heads.first()).cloned()
            }
            Err(refusal) => {
                tracing::debug!(?refusal, "the queue cannot be read yet");
                tokio::time::sleep(PAUSE).await;
                None
            }
        }
    }
}

//! Turns originals into chunks with vectors, on the leader of a store group. The queue is the replicated state itself: whatever is
//! neither ready nor failed is picked up again after a crash or by the next leader.

mod document;
mod sweep;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coordinator::clock::{Instant, monotonic};
use coordinator::ids::TenantId;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio_util::sync::CancellationToken;

use crate::node::Embedder;
use crate::node::group::{Group, Refusal};
use crate::store::reader::Reader;
use crate::store::{DocumentId, Error, Stage};

/// Documents read at once: one waits for vectors while another is taken apart.
const WORKERS: usize = 2;
/// Pause while the group has no leader that answers.
const PAUSE: Duration = Duration::from_secs(1);
/// Pause before a document is tried again after the store refused its entries, and the longest it grows to. Meanwhile the
/// others have their turn.
const ASIDE: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 5_000 });
const ASIDE_MOST: Duration = Duration::from_secs(60);
/// What is known of a document that was not tried for so long is forgotten: it is gone, most likely.
const ASIDE_KEPT: Duration = Duration::from_secs(60 * 60);
/// So many refusals for the document's own sake end its ingestion: it would be refused for ever.
const REFUSALS: u32 = 5;
/// The queue is looked at anew at least so often.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// What ingestion works with.
pub struct Ingest {
    pub group: Arc<Group>,
    pub embedder: Arc<dyn Embedder>,
    /// The program that reads originals (`PROGRAM extract`).
    pub program: PathBuf,
}

/// A document that the store refused.
struct Aside {
    until: Instant,
    pause: Duration,
    /// Refusals that no other node and no later time will take back.
    refusals: u32,
}

impl Default for Aside {
    fn default() -> Self {
        Self {
            until: monotonic(),
            pause: ASIDE,
            refusals: 0,
        }
    }
}

impl Aside {
    fn refused(&mut self, refusal: &Refusal) {
        self.refusals += u32::from(is_its_own(refusal));
        self.until = monotonic() + self.pause;
        self.pause = (self.pause * 2).min(ASIDE_MOST);
    }
}

/// Whether the refusal is about the document, not about leadership, the disk or this replica.
fn is_its_own(refusal: &Refusal) -> bool {
    match refusal {
        Refusal::NotLeader { .. } | Refusal::Again { .. } | Refusal::Elsewhere { .. } => false,
        Refusal::Final(error) => !matches!(error, Error::DiskFull { .. }),
    }
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
        let mut aside: HashMap<DocumentId, Aside> = HashMap::new();
        let mut last: Option<TenantId> = None;
        loop {
            let now = monotonic();
            while running.len() < WORKERS {
                let resting = aside.iter().filter(|(_, a)| a.until > now);
                let passed: HashSet<DocumentId> = resting
                    .map(|(id, _)| *id)
                    .chain(busy.iter().copied())
                    .collect();
                let Some((tenant, id)) = self.next(last.as_ref(), &passed).await else {
                    break;
                };
                busy.insert(id);
                last = Some(tenant.clone());
                let refusals = aside.get(&id).map_or(0, |a| a.refusals);
                running.push(async move {
                    let done = if refusals < REFUSALS {
                        self.ingest(&tenant, id).await
                    } else {
                        self.give_up(&tenant, id).await
                    };
                    (id, done)
                });
            }
            // One whose pause is over waits for a worker, not for the clock.
            let wake = aside.values().map(|a| a.until).filter(|u| *u > now).min();
            let pause = wake.map_or(LOOK_AGAIN, |until| {
                until.saturating_duration_since(monotonic()).min(LOOK_AGAIN)
            });
            tokio::select! {
                Some((id, done)) = running.next(), if !running.is_empty() => {
                    busy.remove(&id);
                    match done {
                        Ok(()) => drop(aside.remove(&id)),
                        Err(refusal) => {
                            tracing::warn!(document = %id, ?refusal, "ingestion is interrupted and will be tried again");
                            aside.entry(id).or_default().refused(&refusal);
                        }
                    }
                }
                () = self.group.machine.queued.notified() => {}
                () = tokio::time::sleep(pause) => {
                    aside.retain(|_, a| a.until + ASIDE_KEPT > monotonic());
                }
            }
        }
    }

    /// The oldest waiting document of the tenant after the one served last, so that one tenant's thousand documents do not hold
    /// up another's one.
    async fn next(
        &self,
        last: Option<&TenantId>,
        passed: &HashSet<DocumentId>,
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
                            && !passed.contains(id)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_refusals_for_the_documents_own_sake_count_and_pauses_grow() {
        let full = Error::DiskFull { why: "x".into() };
        let large = Error::TooLarge { limit: 1, got: 2 };
        let mut aside = Aside::default();
        for (refusal, counted) in [
            (Refusal::NotLeader { leader: None }, 0),
            (Refusal::Again { why: "x".into() }, 0),
            (Refusal::elsewhere("x"), 0),
            (Refusal::Final(full), 0),
            (Refusal::Final(large), 1),
            (Refusal::Final(Error::unavailable("x")), 2),
        ] {
            aside.refused(&refusal);
            assert_eq!(aside.refusals, counted, "{refusal:?}");
        }
        assert_eq!(aside.pause, ASIDE * 64);
        for _ in 0..20 {
            aside.refused(&Refusal::elsewhere("x"));
        }
        assert_eq!(aside.pause, ASIDE_MOST);
    }
}

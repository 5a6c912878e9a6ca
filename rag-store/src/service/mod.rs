//! The QUIC services `store.*` of a store node. They check, seal and propose; reads are linearizable on any member.

mod ops;
pub mod wire;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use coordinator::ids::{NodeId, RaftGroupId};
use coordinator::transport::{ErrorCode, Handler, RemoteError, Reply, Transport};
use futures::future::BoxFuture;

use crate::node::Embedder;
use crate::node::group::{Group, Refusal};
use wire::{Answer, Outcome, Request, SERVICE_CALL, SERVICE_LIST};

/// A list reads one view, and a view keeps what was deleted since on the disk: destroyed keys wait for it
/// ([`crate::node::COMPACT_AFTER`]).
pub const LIST_LIMIT: Duration = Duration::from_secs(600);

/// The groups of this node; more come while it runs.
pub type Groups = Arc<RwLock<BTreeMap<RaftGroupId, Arc<Group>>>>;

/// Offers the services of these groups on the transport.
pub fn register(transport: &Transport, groups: &Groups, embedder: &Arc<dyn Embedder>) {
    let service = |list| {
        Arc::new(Service {
            groups: groups.clone(),
            embedder: embedder.clone(),
            list,
        })
    };
    transport.register(SERVICE_CALL, service(false));
    transport.register(SERVICE_LIST, service(true));
}

struct Service {
    groups: Groups,
    embedder: Arc<dyn Embedder>,
    list: bool,
}

impl Handler for Service {
    fn handle(&self, _from: NodeId, request: Bytes, reply: Reply) -> BoxFuture<'static, ()> {
        let Ok(request) = postcard::from_bytes::<Request>(&request) else {
            let error = RemoteError::new(
                ErrorCode::BadRequest,
                "not a store request; do all nodes run the same version?",
            );
            return Box::pin(reply.fail(error));
        };
        let group = self
            .groups
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&request.group)
            .cloned();
        let Some(group) = group else {
            let error = RemoteError::new(
                ErrorCode::Unavailable,
                "this node does not hold the tenant's store group yet",
            );
            return Box::pin(reply.fail(error));
        };
        let embedder = self.embedder.clone();
        if self.list {
            Box::pin(list(group, request, reply))
        } else {
            Box::pin(call(group, embedder, request, reply))
        }
    }
}

async fn call(group: Arc<Group>, embedder: Arc<dyn Embedder>, request: Request, mut reply: Reply) {
    let outcome =
        outcome(ops::answer(&group, embedder.as_ref(), &request.tenant, request.op).await);
    if send(&mut reply, &outcome).await {
        reply.finish().await;
    }
}

async fn list(group: Arc<Group>, request: Request, mut reply: Reply) {
    let sent = async {
        let mut frames = ops::list(&group, &request.tenant, request.op).await?;
        loop {
            // Reading and opening a frame takes milliseconds of a processor.
            let read = tokio::task::spawn_blocking(move || {
                let frame = frames.next();
                (frame, frames)
            })
            .await;
            let (frame, rest) = read.map_err(|_| Refusal::elsewhere("a list was broken off"))?;
            frames = rest;
            let Some(frame) = frame else {
                return Ok::<_, Refusal>(true);
            };
            if !send(&mut reply, &Outcome::Ok(frame?)).await {
                return Ok(false);
            }
        }
    };
    let complete = match tokio::time::timeout(LIST_LIMIT, sent).await {
        Ok(Ok(complete)) => complete,
        Ok(Err(refusal)) => send(&mut reply, &outcome(Err(refusal))).await,
        Err(_) => {
            let why = format!("the list was not taken within {LIST_LIMIT:?}");
            send(&mut reply, &Outcome::Again { why }).await
        }
    };
    if complete {
        reply.finish().await;
    }
}

fn outcome(result: Result<Answer, Refusal>) -> Outcome {
    match result {
        Ok(answer) => Outcome::Ok(answer),
        Err(Refusal::NotLeader { leader }) => Outcome::NotLeader { leader },
        Err(Refusal::Again { why }) => Outcome::Again { why },
        Err(Refusal::Elsewhere { why, disk_full }) => Outcome::Elsewhere { why, disk_full },
        Err(Refusal::Final(error)) => Outcome::Err(error),
    }
}

async fn send(reply: &mut Reply, outcome: &Outcome) -> bool {
    match postcard::to_stdvec(outcome) {
        Ok(bytes) => reply.send(bytes.into()).await.is_ok(),
        Err(error) => {
            tracing::error!(%error, "a reply of the store cannot be encoded");
            false
        }
    }
}

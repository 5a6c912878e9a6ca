//! The services `infer.*`. A request names group and epoch; any other epoch than the one hosted is refused.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use coordinator::Redacted;
use coordinator::ids::{Epoch, GroupId, NodeId, TenantId};
use coordinator::transport::{ErrorCode, RemoteError, Reply, Transport};
use futures::FutureExt;
use futures::future::BoxFuture;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Shared;
use super::host::Serving;
use crate::client::{
    Call, EmbedRequest, Embeddings, Event, Frame, GenerateRequest, InferError, SERVICE_EMBED,
    SERVICE_FORGET, SERVICE_GENERATE, SERVICE_TOKENIZE,
};
use crate::embed::Embedder;
use crate::text::Parse;

/// Texts embedded before another request gets its turn: a query waits for one slice of an ingestion, not for all of it.
const EMBED_SLICE: usize = 16;

/// Puts the services on the transport.
pub(super) fn register(transport: &Transport, shared: &Arc<Shared>) {
    let turns = Arc::new(Turns::default());
    let own = shared.clone();
    transport.register(
        SERVICE_GENERATE,
        Arc::new(
            move |_: NodeId, request: Bytes, reply: Reply| -> BoxFuture<'static, ()> {
                generate(own.clone(), request, reply).boxed()
            },
        ),
    );
    let own = shared.clone();
    transport.register(
        SERVICE_EMBED,
        Arc::new(
            move |_: NodeId, request: Bytes, reply: Reply| -> BoxFuture<'static, ()> {
                let (shared, turns) = (own.clone(), turns.clone());
                answer(request, reply, move |call: Call<EmbedRequest>| {
                    embed(shared, turns, call)
                })
                .boxed()
            },
        ),
    );
    let own = shared.clone();
    transport.register(
        SERVICE_FORGET,
        Arc::new(
            move |_: NodeId, request: Bytes, reply: Reply| -> BoxFuture<'static, ()> {
                forget(own.clone(), request, reply).boxed()
            },
        ),
    );
    let own = shared.clone();
    transport.register(
        SERVICE_TOKENIZE,
        Arc::new(
            move |_: NodeId, request: Bytes, reply: Reply| -> BoxFuture<'static, ()> {
                let shared = own.clone();
                answer(request, reply, move |call: Call<Redacted<String>>| {
                    tokenize(shared, call)
                })
                .boxed()
            },
        ),
    );
}

/// Has all groups that this node leads forget what they computed for a tenant.
async fn forget(shared: Arc<Shared>, request: Bytes, reply: Reply) {
    match postcard::from_bytes::<TenantId>(&request) {
        Ok(tenant) => {
            shared.forget(&tenant);
            reply.answer(Bytes::new()).await;
        }
        Err(error) => bad_request(reply, error).await,
    }
}

/// One queue for each embedding model on this node.
#[derive(Default)]
struct Turns(Mutex<HashMap<GroupId, Arc<tokio::sync::Mutex<()>>>>);

impl Turns {
    fn of(&self, group: GroupId) -> Arc<tokio::sync::Mutex<()>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(group)
            .or_default()
            .clone()
    }
}

async fn bad_request(reply: Reply, error: postcard::Error) {
    reply
        .fail(RemoteError::new(
            ErrorCode::BadRequest,
            format!("not a request of this version: {error}"),
        ))
        .await;
}

/// Decodes a request, computes its one answer, sends it.
async fn answer<Q, A, F>(request: Bytes, mut reply: Reply, compute: impl FnOnce(Q) -> F)
where
    Q: DeserializeOwned,
    A: Serialize,
    F: Future<Output = Result<A, InferError>>,
{
    let call = match postcard::from_bytes(&request) {
        Ok(call) => call,
        Err(error) => return bad_request(reply, error).await,
    };
    drop(request);
    let result = tokio::select! {
        result = compute(call) => result,
        () = reply.closed() => return,
    };
    if let Ok(bytes) = postcard::to_stdvec(&result)
        && reply.send(bytes.into()).await.is_ok()
    {
        reply.finish().await;
    }
}

fn serving(shared: &Shared, group: GroupId, epoch: Epoch) -> Result<Serving, InferError> {
    let host = shared
        .find(group, epoch)
        .ok_or_else(|| InferError::NotReady {
            why: format!("group {group} is not in epoch {epoch} on this node any more"),
        })?;
    host.serving().map_err(|why| InferError::NotReady { why })
}

async fn generate(shared: Arc<Shared>, request: Bytes, mut reply: Reply) {
    let call: Call<GenerateRequest> = match postcard::from_bytes(&request) {
        Ok(call) => call,
        Err(error) => return bad_request(reply, error).await,
    };
    drop(request);
    let begun = match serving(&shared, call.group, call.epoch) {
        Ok(Serving::Engine(engine)) => {
            // Tokenising a long prompt takes a while; not on the threads that carry everybody's streams.
            let begun = tokio::task::spawn_blocking(move || engine.generate(&call.request)).await;
            begun.unwrap_or_else(|_| {
                Err(InferError::Internal {
                    why: "the request could not be prepared".into(),
                })
            })
        }
        Ok(Serving::Embedder(_)) => Err(InferError::invalid(
            "model",
            "this model does not generate text".into(),
        )),
        Err(error) => Err(error),
    };
    let mut events = match begun {
        Ok(events) => events,
        Err(error) => {
            send(&mut reply, &Frame::Error(error)).await;
            return reply.finish().await;
        }
    };
    loop {
        // Dropping `events` on the way out cancels the generation.
        let event = tokio::select! {
            event = events.recv() => event,
            () = reply.closed() => return,
        };
        let frame = match event {
            Some(Ok(event)) => Frame::Event(event),
            Some(Err(error)) => Frame::Error(error),
            None => Frame::Error(InferError::Interrupted {
                why: "the engine has ended".into(),
            }),
        };
        let last = matches!(
            frame,
            Frame::Error(_) | Frame::Event(Event::Finished { .. })
        );
        if !send(&mut reply, &frame).await {
            return;
        }
        if last {
            return reply.finish().await;
        }
    }
}

/// False when the caller went away.
async fn send(reply: &mut Reply, frame: &Frame) -> bool {
    match postcard::to_stdvec(frame) {
        Ok(bytes) => reply.send(bytes.into()).await.is_ok(),
        Err(_) => false,
    }
}

async fn embed(
    shared: Arc<Shared>,
    turns: Arc<Turns>,
    call: Call<EmbedRequest>,
) -> Result<Embeddings, InferError> {
    let Serving::Embedder(embedder) = serving(&shared, call.group, call.epoch)? else {
        return Err(InferError::invalid(
            "model",
            "this model does not embed".into(),
        ));
    };
    let turn = turns.of(call.group);
    let EmbedRequest { input, kind, .. } = call.request;
    let mut embeddings = Embeddings {
        vectors: Vec::with_capacity(input.len()),
        prompt_tokens: 0,
    };
    let mut input = input.into_iter().map(Redacted::into_inner);
    loop {
        let slice: Vec<String> = input.by_ref().take(EMBED_SLICE).collect();
        if slice.is_empty() {
            return Ok(embeddings);
        }
        // The mutex is fair: who waits first comes first.
        let _turn = turn.lock().await;
        let own: Arc<Embedder> = embedder.clone();
        let done = tokio::task::spawn_blocking(move || own.embed(&slice, kind)).await;
        let (vectors, tokens) = done
            .map_err(|_| InferError::Internal {
                why: "the encoder failed".into(),
            })?
            .map_err(|e| InferError::Internal { why: e.to_string() })?;
        embeddings.vectors.extend(vectors);
        embeddings.prompt_tokens += tokens;
    }
}

async fn tokenize(
    shared: Arc<Shared>,
    call: Call<Redacted<String>>,
) -> Result<Vec<u32>, InferError> {
    let serving = serving(&shared, call.group, call.epoch)?;
    let text = call.request.into_inner();
    let encode = move || match serving {
        Serving::Engine(engine) => engine.tokenizer().encode(&text, Parse::Plain),
        Serving::Embedder(embedder) => embedder.tokenizer().encode(&text, Parse::Plain),
    };
    let ids = tokio::task::spawn_blocking(encode).await;
    ids.map_err(|_| InferError::Internal {
        why: "the tokenizer failed".into(),
    })?
    .map_err(|e| InferError::Internal { why: e.to_string() })
}

//! Asking the cluster's models: what the gateway and the store use.
//!
//! Belongs here: requests, events and errors, the choice of a group, the stream. How an answer is made does not.

mod request;
mod stream;
mod wire;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coordinator::Redacted;
use coordinator::control::{ControlHandle, ControlState, Group, GroupState};
use coordinator::ids::TenantId;
use coordinator::transport::{self, Transport};
use futures::future::try_join_all;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use request::*;
pub use stream::GenerateStream;
pub(crate) use wire::{
    Call, Frame, SERVICE_EMBED, SERVICE_FORGET, SERVICE_GENERATE, SERVICE_TOKENIZE,
};

/// Longest wait for vectors: a full batch of long texts on a slow node.
const EMBED_TIMEOUT: Duration = Duration::from_secs(300);
const FORGET_TIMEOUT: Duration = Duration::from_secs(5);
const TOKENIZE_TIMEOUT: Duration = Duration::from_secs(30);

/// Reaches whichever groups serve a model now. Cheap to clone.
#[derive(Clone)]
pub struct InferenceClient {
    transport: Transport,
    control: ControlHandle,
    /// Spreads requests over the groups and ranks that can take them.
    turn: Arc<AtomicUsize>,
}

/// Where a request goes.
struct Target {
    addr: SocketAddr,
    group: coordinator::ids::GroupId,
    epoch: coordinator::ids::Epoch,
}

impl InferenceClient {
    pub fn new(transport: Transport, control: ControlHandle) -> Self {
        Self {
            transport,
            control,
            turn: Arc::default(),
        }
    }

    /// Every deployed model, in order of its id.
    pub fn models(&self) -> Vec<ModelCard> {
        let state = self.control.state();
        let card = |(id, deployment): (&String, &coordinator::control::Deployment)| {
            let ready: Vec<&Group> = ready_groups(&state, id).collect();
            let reported = ready
                .iter()
                .flat_map(|g| &g.ranks)
                .filter_map(|r| r.report.as_ref())
                .map(|r| r.context_tokens)
                .min();
            ModelCard {
                id: id.clone(),
                kind: deployment.kind,
                context_tokens: reported
                    .filter(|&c| c > 0)
                    .unwrap_or(deployment.context_tokens),
                ready: !ready.is_empty(),
            }
        };
        state.deployments.iter().map(card).collect()
    }

    /// Begins a generation. The request was accepted when this returns: [`Event::Started`] is the stream's first event.
    /// Dropping the stream cancels the generation within a step.
    ///
    /// # Errors
    /// See [`InferError`]; nothing was generated then.
    pub async fn generate(&self, request: GenerateRequest) -> Result<GenerateStream, InferError> {
        request.validate()?;
        let target = self.target(&request.model, ModelKind::Generate)?;
        let call = encode(&Call {
            group: target.group,
            epoch: target.epoch,
            request,
        })?;
        let frames = self
            .transport
            .open(target.addr, SERVICE_GENERATE, call)
            .await
            .map_err(not_begun)?;
        GenerateStream::begin(frames).await
    }

    /// One vector for each text.
    ///
    /// # Errors
    /// See [`InferError`].
    pub async fn embed(&self, request: EmbedRequest) -> Result<Embeddings, InferError> {
        let bytes: usize = request.input.iter().map(|t| t.expose().len()).sum();
        if request.input.len() > MAX_EMBED_INPUTS {
            let why = format!(
                "must hold at most {MAX_EMBED_INPUTS} texts, got {}",
                request.input.len()
            );
            return Err(InferError::invalid("input", why));
        }
        if bytes > MAX_PROMPT_BYTES {
            return Err(InferError::invalid(
                "input",
                format!("must have at most {MAX_PROMPT_BYTES} bytes, got {bytes}"),
            ));
        }
        if request.input.is_empty() {
            return Ok(Embeddings {
                vectors: Vec::new(),
                prompt_tokens: 0,
            });
        }
        let model = match &request.model {
            Some(model) => model.clone(),
            None => self.first_embedder()?,
        };
        let target = self.target(&model, ModelKind::Embed)?;
        self.call(target, SERVICE_EMBED, request, EMBED_TIMEOUT)
            .await
    }

    /// A text's tokens by a model's tokenizer, with nothing added; control tokens count as text.
    ///
    /// # Errors
    /// See [`InferError`].
    pub async fn tokenize(
        &self,
        model: &str,
        text: Redacted<String>,
    ) -> Result<Vec<u32>, InferError> {
        let state = self.control.state();
        let kind = state
            .deployments
            .get(model)
            .map_or(ModelKind::Generate, |d| d.kind);
        let target = self.target(model, kind)?;
        self.call(target, SERVICE_TOKENIZE, text, TOKENIZE_TIMEOUT)
            .await
    }

    /// Has no later request of a tenant find what the groups computed for it: call it when texts that stood in prompts are
    /// deleted.
    ///
    /// # Errors
    /// A leader did not answer; its cache may hold them until they are pushed out.
    pub async fn forget(&self, tenant: &TenantId) -> Result<(), InferError> {
        let state = self.control.state();
        let leaders: BTreeSet<SocketAddr> = state
            .groups
            .values()
            .filter(|g| g.kind == ModelKind::Generate && g.state == GroupState::Ready)
            .filter_map(|g| Some(state.nodes.get(&g.leader()?.node)?.addr))
            .collect();
        let request = encode(tenant)?;
        let ask = |addr| {
            self.transport
                .call(addr, SERVICE_FORGET, request.clone(), FORGET_TIMEOUT)
        };
        try_join_all(leaders.into_iter().map(ask))
            .await
            .map_err(not_begun)?;
        Ok(())
    }

    async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        target: Target,
        service: &str,
        request: Q,
        timeout: Duration,
    ) -> Result<A, InferError> {
        let call = encode(&Call {
            group: target.group,
            epoch: target.epoch,
            request,
        })?;
        let reply = self
            .transport
            .call(target.addr, service, call, timeout)
            .await
            .map_err(not_begun)?;
        postcard::from_bytes::<Result<A, InferError>>(&reply)
            .map_err(|e| InferError::Internal { why: e.to_string() })?
    }

    fn first_embedder(&self) -> Result<String, InferError> {
        let state = self.control.state();
        let embedder = state
            .deployments
            .iter()
            .find(|(_, d)| d.kind == ModelKind::Embed)
            .map(|(id, _)| id.clone());
        embedder.ok_or_else(|| InferError::NotReady {
            why: "no embedding model is deployed".into(),
        })
    }

    /// The next ready group of a model in turn: its leader, or for an encoder any of its ranks, since each holds it whole.
    fn target(&self, model: &str, kind: ModelKind) -> Result<Target, InferError> {
        let state = self.control.state();
        match state.deployments.get(model) {
            None => {
                let known = state
                    .deployments
                    .iter()
                    .filter(|(_, d)| d.kind == kind)
                    .map(|(id, _)| id.clone())
                    .collect();
                return Err(InferError::UnknownModel {
                    model: model.into(),
                    known,
                });
            }
            Some(deployment) if deployment.kind != kind => {
                let does = if kind == ModelKind::Generate {
                    "does not generate text"
                } else {
                    "does not embed"
                };
                return Err(InferError::invalid("model", format!("{model} {does}")));
            }
            Some(_) => {}
        }
        let ranks = |g: &Group| {
            if kind == ModelKind::Generate {
                1
            } else {
                g.ranks.len()
            }
        };
        let choices: Vec<(&Group, usize)> = ready_groups(&state, model)
            .flat_map(|g| (0..ranks(g)).map(move |r| (g, r)))
            .collect();
        let Some(&(group, rank)) =
            choices.get(self.turn.fetch_add(1, Ordering::Relaxed) % choices.len().max(1))
        else {
            return Err(InferError::NotReady {
                why: why_not_ready(&state, model),
            });
        };
        let node = group.ranks.get(rank).and_then(|r| state.nodes.get(&r.node));
        let addr = node
            .ok_or_else(|| InferError::NotReady {
                why: "the leader's node is not known here yet".into(),
            })?
            .addr;
        Ok(Target {
            addr,
            group: group.id,
            epoch: group.epoch,
        })
    }
}

fn ready_groups<'a>(state: &'a ControlState, model: &'a str) -> impl Iterator<Item = &'a Group> {
    state
        .groups
        .values()
        .filter(move |g| g.model == model && g.state == GroupState::Ready && !g.ranks.is_empty())
}

fn why_not_ready(state: &ControlState, model: &str) -> String {
    match state.groups.values().find(|g| g.model == model) {
        None => format!("no worker has taken {model} yet"),
        Some(Group {
            state: GroupState::Failed { reason },
            ..
        }) => format!("{model} could not be loaded: {reason}"),
        Some(group) => {
            let loaded = group.ranks.iter().filter(|r| r.report.is_some()).count();
            format!(
                "{model} is loading, {loaded} of {} ranks are done",
                group.ranks.len()
            )
        }
    }
}

fn encode(call: &impl Serialize) -> Result<Bytes, InferError> {
    let bytes =
        postcard::to_stdvec(call).map_err(|e| InferError::Internal { why: e.to_string() })?;
    if bytes.len() > transport::MAX_FRAME_BYTES {
        let why = format!(
            "must have at most {} bytes, got {}",
            transport::MAX_FRAME_BYTES,
            bytes.len()
        );
        return Err(InferError::invalid("prompt", why));
    }
    Ok(bytes.into())
}

/// An error before the far side answered anything.
fn not_begun(error: transport::Error) -> InferError {
    match error {
        transport::Error::Closed | transport::Error::Timeout => InferError::Interrupted {
            why: error.to_string(),
        },
        transport::Error::FrameTooLarge { .. } => InferError::invalid("prompt", error.to_string()),
        transport::Error::Refused(remote) if remote.code == transport::ErrorCode::BadRequest => {
            InferError::Internal {
                why: format!("the worker runs another version: {remote}"),
            }
        }
        error => InferError::NotReady {
            why: error.to_string(),
        },
    }
}

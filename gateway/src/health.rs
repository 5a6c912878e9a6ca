//! For those who run the cluster: is the process alive, can it serve, what has it counted.

use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use coordinator::clock;
use coordinator::control::{ControlState, GroupState, ModelKind};
use coordinator::ids::TenantId;
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::http::auth::Caller;
use crate::http::server::Peer;
use crate::metrics;

/// An answer is good for so long: anybody may ask, and asking must not load the store.
const FRESH: Duration = Duration::from_millis(500);
/// The store must answer within this to count as reachable.
const STORE_PATIENCE: Duration = Duration::from_secs(2);

/// What was missing when last looked, and when that was.
#[derive(Debug, Default)]
pub struct Readiness(
    Mutex<Option<(clock::Instant, Vec<Lack>)>>,
    tokio::sync::Mutex<()>,
);

/// Whether the cluster can answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Ready {
    pub ready: bool,
    /// What is missing, in words that tell nothing of tenants, models and nodes; empty when ready. `GET /api/status` has the
    /// details.
    #[schema(value_type = Vec<String>)]
    pub reasons: Vec<&'static str>,
}

/// Something that the cluster needs for answering and has not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lack {
    /// For everybody.
    what: &'static str,
    /// For operators; may be empty.
    detail: String,
}

impl Lack {
    fn new(what: &'static str, detail: impl Into<String>) -> Self {
        Self {
            what,
            detail: detail.into(),
        }
    }
}

impl std::fmt::Display for Lack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.what)?;
        if !self.detail.is_empty() {
            write!(f, ": {}", self.detail)?;
        }
        Ok(())
    }
}

/// This process is alive.
#[utoipa::path(get, path = "/health", tag = "operation", security(()), responses((status = 200, description = "Alive")))]
pub async fn health() -> Json<serde_json::Value> {
    Json(serde_json::json!({ "status": "ok" }))
}

/// The cluster answers: a chat model is ready, an embedding model if one is deployed, and the store is reachable.
#[utoipa::path(
    get, path = "/ready", tag = "operation", security(()),
    responses(
        (status = 200, description = "Ready", body = Ready),
        (status = 503, description = "Not ready, and why", body = Ready)
    )
)]
pub async fn ready(State(app): State<App>) -> Response {
    let lacks = app.readiness.get(&app).await;
    let mut reasons: Vec<&'static str> = lacks.iter().map(|lack| lack.what).collect();
    reasons.dedup();
    let ready = Ready {
        ready: reasons.is_empty(),
        reasons,
    };
    let status = if ready.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(ready)).into_response()
}

impl Readiness {
    fn fresh(&self) -> Option<Vec<Lack>> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref()
            .filter(|(at, _)| at.elapsed() < FRESH)
            .map(|(_, lacks)| lacks.clone())
    }

    /// What the cluster lacks for answering; nothing when it is ready.
    pub async fn get(&self, app: &App) -> Vec<Lack> {
        if let Some(lacks) = self.fresh() {
            return lacks;
        }
        // One looks, the others wait for what it finds.
        let _one = self.1.lock().await;
        if let Some(lacks) = self.fresh() {
            return lacks;
        }
        let lacks = look(app).await;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((clock::monotonic(), lacks.clone()));
        lacks
    }
}

async fn look(app: &App) -> Vec<Lack> {
    let state = app.control.state();
    let mut lacks = missing(&state);
    // The store is asked as any tenant would ask it; the cheapest question will do.
    if let Some(tenant) = state.tenants.keys().next()
        && let Err(why) = ask_store(app, tenant).await
    {
        lacks.push(Lack::new("the store does not answer", why));
    }
    lacks
}

async fn ask_store(app: &App, tenant: &TenantId) -> Result<(), String> {
    match tokio::time::timeout(STORE_PATIENCE, app.store.collections(tenant)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", STORE_PATIENCE.as_secs())),
    }
}

/// How a kind of model is spoken of when it is missing.
struct KindWords {
    none: &'static str,
    forming: &'static str,
    failed: &'static str,
}

const CHAT: KindWords = KindWords {
    none: "no chat model has a group yet",
    forming: "the chat model is being loaded",
    failed: "the chat model could not be loaded",
};
const EMBEDDING: KindWords = KindWords {
    none: "no embedding model has a group yet",
    forming: "the embedding model is being loaded",
    failed: "the embedding model could not be loaded",
};

/// What the control state lacks for answering.
fn missing(state: &ControlState) -> Vec<Lack> {
    if state.revision == 0 {
        return vec![Lack::new("no coordinator has been reached yet", "")];
    }
    let mut lacks = lacking_models(state, ModelKind::Generate, &CHAT);
    // A cluster for chat alone has no embedding model, and needs none.
    let embeds = state
        .deployments
        .values()
        .any(|deployment| deployment.kind == ModelKind::Embed);
    if embeds {
        lacks.append(&mut lacking_models(state, ModelKind::Embed, &EMBEDDING));
    }
    if state.store_groups.is_empty() {
        lacks.push(Lack::new("the store has no group yet", ""));
    }
    for group in &state.store_groups {
        let up = group
            .members
            .iter()
            .filter(|node| state.nodes.get(node).is_some_and(|node| node.up))
            .count();
        if up * 2 <= group.members.len() {
            let detail = format!(
                "store group {} has {up} of {} members up",
                group.id,
                group.members.len()
            );
            lacks.push(Lack::new("the store has no majority", detail));
        }
    }
    lacks
}

/// Nothing when one group of the kind is ready; else what each waits for.
fn lacking_models(state: &ControlState, kind: ModelKind, words: &KindWords) -> Vec<Lack> {
    let mut lacks = Vec::new();
    for group in state.groups.values().filter(|group| group.kind == kind) {
        match &group.state {
            GroupState::Ready => return Vec::new(),
            GroupState::Forming => lacks.push(Lack::new(words.forming, group.model.clone())),
            GroupState::Failed { reason } => {
                lacks.push(Lack::new(
                    words.failed,
                    format!("{}: {reason}", group.model),
                ));
            }
        }
    }
    if lacks.is_empty() {
        lacks.push(Lack::new(words.none, ""));
    }
    lacks
}

/// What this process has counted, in Prometheus' text form. Read from this machine, or with an operator's key, or by anyone
/// when `metrics_public` is set: the numbers name tenants.
#[utoipa::path(
    get, path = "/metrics", tag = "operation", security((), ("api_key" = [])),
    responses(
        (status = 200, description = "Metrics", content_type = "text/plain", body = String),
        (status = 401, description = "From another machine and without a valid key", body = ErrorBody),
        (status = 403, description = "Not an operator's key", body = ErrorBody)
    )
)]
pub async fn metrics(State(app): State<App>, request: Request) -> Result<Response, ApiError> {
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0.ip());
    if !app.config.metrics_public && !is_local(peer, request.headers()) {
        let (mut parts, _) = request.into_parts();
        let caller = Caller::from_request_parts(&mut parts, &app).await?;
        if !caller.operator {
            return Err(ApiError::forbidden(
                "metrics from another machine need an operator's key, or metrics_public = true",
            ));
        }
    }
    let text =
        metrics::render().map_err(|error| ApiError::internal(format!("metrics: {error}")))?;
    Ok((
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        text,
    )
        .into_response())
}

/// Whether a request comes from this machine itself, not through a proxy on it.
fn is_local(peer: Option<IpAddr>, headers: &HeaderMap) -> bool {
    let through_proxy = ["forwarded", "x-forwarded-for", "x-real-ip", "via"]
        .iter()
        .any(|name| headers.contains_key(*name));
    peer.is_some_and(|ip| ip.to_canonical().is_loopback()) && !through_proxy
}

#[cfg(test)]
#[path = "health_tests.rs"]
mod tests;

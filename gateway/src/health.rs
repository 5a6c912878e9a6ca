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

/// The last answer and when it was found.
#[derive(Debug, Default)]
pub struct Readiness(
    Mutex<Option<(clock::Instant, Ready)>>,
    tokio::sync::Mutex<()>,
);

/// Whether the cluster can answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Ready {
    pub ready: bool,
    /// What is missing; empty when ready.
    pub reasons: Vec<String>,
}

/// This process is alive.
#[utoipa::path(get, path = "/health", tag = "operation", security(()), responses((status = 200, description = "Alive")))]
pub async fn health() -> Json<serde_json::Value> {
    Json(serde_json::json!({ "status": "ok" }))
}

/// The cluster answers: a chat model and an embedding model are ready and the store is reachable.
#[utoipa::path(
    get, path = "/ready", tag = "operation", security(()),
    responses(
        (status = 200, description = "Ready", body = Ready),
        (status = 503, description = "Not ready, and why", body = Ready)
    )
)]
pub async fn ready(State(app): State<App>) -> Response {
    let ready = app.readiness.get(&app).await;
    let status = if ready.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, Json(ready)).into_response()
}

impl Readiness {
    fn fresh(&self) -> Option<Ready> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref()
            .filter(|(at, _)| at.elapsed() < FRESH)
            .map(|(_, ready)| ready.clone())
    }

    async fn get(&self, app: &App) -> Ready {
        if let Some(ready) = self.fresh() {
            return ready;
        }
        // One looks, the others wait for what it finds.
        let _one = self.1.lock().await;
        if let Some(ready) = self.fresh() {
            return ready;
        }
        let ready = look(app).await;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((clock::monotonic(), ready.clone()));
        ready
    }
}

async fn look(app: &App) -> Ready {
    let state = app.control.state();
    let mut reasons = missing(&state);
    // The store is asked as any tenant would ask it; the cheapest question will do.
    if let Some(tenant) = state.tenants.keys().next()
        && let Err(why) = ask_store(app, tenant).await
    {
        reasons.push(format!("the store does not answer: {why}"));
    }
    Ready {
        ready: reasons.is_empty(),
        reasons,
    }
}

async fn ask_store(app: &App, tenant: &TenantId) -> Result<(), String> {
    match tokio::time::timeout(STORE_PATIENCE, app.store.collections(tenant)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", STORE_PATIENCE.as_secs())),
    }
}

/// What the control state lacks for answering.
fn missing(state: &ControlState) -> Vec<String> {
    if state.revision == 0 {
        return vec!["no coordinator has been reached yet".to_owned()];
    }
    let mut reasons = Vec::new();
    for (kind, name) in [
        (ModelKind::Generate, "chat"),
        (ModelKind::Embed, "embedding"),
    ] {
        let mut groups = state
            .groups
            .values()
            .filter(|group| group.kind == kind)
            .peekable();
        if groups.peek().is_none() {
            reasons.push(format!("no {name} model has a group yet"));
            continue;
        }
        let mut waiting = Vec::new();
        let mut any_ready = false;
        for group in groups {
            match &group.state {
                GroupState::Ready => any_ready = true,
                GroupState::Forming => {
                    waiting.push(format!("the {name} model {} is being loaded", group.model))
                }
                GroupState::Failed { reason } => {
                    waiting.push(format!(
                        "the {name} model {} could not be loaded: {reason}",
                        group.model
                    ));
                }
            }
        }
        if !any_ready {
            reasons.append(&mut waiting);
        }
    }
    if state.store_groups.is_empty() {
        reasons.push("the store has no group yet".to_owned());
    }
    for group in &state.store_groups {
        let up = group
            .members
            .iter()
            .filter(|node| state.nodes.get(node).is_some_and(|node| node.up))
            .count();
        if up * 2 <= group.members.len() {
            reasons.push(format!(
                "store group {} has {up} of {} members up, no majority",
                group.id,
                group.members.len()
            ));
        }
    }
    reasons
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

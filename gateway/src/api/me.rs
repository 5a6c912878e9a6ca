//! `GET /api/me`: who a key belongs to.

use axum::Json as Reply;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::App;
use crate::error::ErrorBody;
use crate::http::auth::Caller;
use crate::openai::request::MAX_COLLECTIONS;

/// What the sender's key stands for, and what the page needs to know before it asks.
#[derive(Debug, Serialize, ToSchema)]
pub struct Me {
    /// The tenant's id.
    #[schema(example = "musterstadt")]
    pub tenant: String,
    /// The tenant's name.
    #[schema(example = "Stadt Musterstadt")]
    pub name: String,
    /// The key's name.
    pub key: String,
    /// The key's public id.
    pub key_id: String,
    /// Whether the key may administer its tenant.
    pub admin: bool,
    /// Whether the key may make tenants and read the cluster's state.
    pub operator: bool,
    /// Largest document that may be uploaded, in bytes.
    pub max_upload_bytes: u64,
    /// Most collections of one question.
    pub max_collections: usize,
}

/// Tenant and rights of the key that asks.
#[utoipa::path(
    get, path = "/api/me", tag = "account",
    responses((status = 200, body = Me), (status = 401, description = "No valid key", body = ErrorBody))
)]
pub async fn get(State(app): State<App>, caller: Caller) -> Reply<Me> {
    let state = app.control.state();
    let tenant = caller.tenant();
    Reply(Me {
        tenant: tenant.to_string(),
        name: state
            .tenants
            .get(tenant)
            .map_or_else(|| tenant.to_string(), |tenant| tenant.name.clone()),
        key: caller.key.name.clone(),
        key_id: caller.key.id.clone(),
        admin: caller.key.admin,
        operator: caller.operator,
        max_upload_bytes: app.config.max_upload_bytes,
        max_collections: MAX_COLLECTIONS,
    })
}

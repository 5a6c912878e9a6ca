//! Our own API under `/api`: what the page and programs need beyond OpenAI's.
//!
//! Lists are `{"object": "list", "data": […]}`; what was deleted answers `{"id", "deleted": true}`. An id of another tenant answers
//! exactly as one that does not exist.

pub mod collections;
pub mod documents;
pub mod me;
pub mod retrieve;
pub mod status;
pub mod tenants;

use coordinator::ids::TenantId;
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::App;
use crate::error::ApiError;

/// Has the models find no earlier prompt of the tenant again, because passages of what was deleted may stand in some. The deletion
/// stands even if a model does not answer: what that one still holds can be found by this tenant alone, until it is pushed out.
async fn forget_prompts(app: &App, tenant: &TenantId) {
    if let Err(error) = app.inference.forget(tenant).await {
        tracing::warn!(%error, %tenant, "a model may still hold prompts with what was deleted");
    }
}

/// A whole list.
#[derive(Debug, Serialize, ToSchema)]
pub struct List<T> {
    /// `list`.
    pub object: &'static str,
    pub data: Vec<T>,
}

impl<T> List<T> {
    fn of(items: impl IntoIterator<Item = impl Into<T>>) -> Self {
        Self {
            object: "list",
            data: items.into_iter().map(Into::into).collect(),
        }
    }
}

/// What was deleted.
#[derive(Debug, Serialize, ToSchema)]
pub struct Deleted {
    pub id: String,
    /// `true`.
    pub deleted: bool,
}

impl Deleted {
    fn new(id: String) -> Self {
        Self { id, deleted: true }
    }
}

/// The id in a path; one of a wrong form cannot exist.
fn parse_id<T: std::str::FromStr>(what: &'static str, id: &str) -> Result<T, ApiError> {
    id.parse().map_err(|_| ApiError::not_found(what, id))
}

/// A store error, where `NotFound` can only mean the thing in the path.
fn missing(what: &'static str, id: &str) -> impl FnOnce(rag_store::Error) -> ApiError {
    move |error| match error {
        rag_store::Error::NotFound => ApiError::not_found(what, id),
        error => error.into(),
    }
}

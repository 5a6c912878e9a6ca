//! Collections: a tenant's knowledge bases.

use axum::Json as Reply;
use axum::extract::State;
use axum::http::StatusCode;
use rag_store::CollectionId;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Deleted, List, forget_prompts, missing, parse_id};
use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::http::auth::Caller;
use crate::http::body::{Id, Json};

/// A knowledge base.
#[derive(Debug, Serialize, ToSchema)]
pub struct Collection {
    #[schema(example = "col_0190c0de0190c0de0190c0de0190c0de")]
    pub id: String,
    #[schema(example = "Satzungen")]
    pub name: String,
    pub description: String,
    /// Milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Documents in it, whatever their status.
    pub documents: u64,
}

impl From<rag_store::Collection> for Collection {
    fn from(collection: rag_store::Collection) -> Self {
        Self {
            id: collection.id.to_string(),
            name: collection.name,
            description: collection.description,
            created_ms: collection.created_ms,
            documents: collection.documents,
        }
    }
}

/// A new collection.
#[derive(Debug, Deserialize, ToSchema)]
pub struct NewCollection {
    /// 1 to 200 characters; unique within the tenant.
    #[schema(example = "Satzungen")]
    pub name: String,
}

/// The tenant's collections, oldest first.
#[utoipa::path(
    get, path = "/api/collections", tag = "knowledge",
    responses(
        (status = 200, body = List<Collection>),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody)
    )
)]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
) -> Result<Reply<List<Collection>>, ApiError> {
    Ok(Reply(List::of(
        app.store.collections(caller.tenant()).await?,
    )))
}

/// Makes a collection.
#[utoipa::path(
    post, path = "/api/collections", tag = "knowledge", request_body = NewCollection,
    responses(
        (status = 201, body = Collection),
        (status = 400, description = "The name is empty or too long", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 409, description = "A collection of this name is there", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody),
        (status = 507, description = "The store's disk is full", body = ErrorBody)
    )
)]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    Json(new): Json<NewCollection>,
) -> Result<(StatusCode, Reply<Collection>), ApiError> {
    let name = new.name.trim();
    if name.is_empty() {
        return Err(ApiError::invalid(
            "name",
            "name: expected 1 to 200 characters, got an empty name",
        ));
    }
    let collection = app.store.create_collection(caller.tenant(), name).await?;
    Ok((StatusCode::CREATED, Reply(collection.into())))
}

/// One collection.
#[utoipa::path(
    get, path = "/api/collections/{id}", tag = "knowledge", params(("id" = String, Path, description = "col_…")),
    responses(
        (status = 200, body = Collection),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such collection", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody)
    )
)]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Reply<Collection>, ApiError> {
    let parsed: CollectionId = parse_id("collection", &id)?;
    let collection = app
        .store
        .collection(caller.tenant(), parsed)
        .await
        .map_err(missing("collection", &id))?;
    Ok(Reply(collection.into()))
}

/// Deletes a collection with all its documents.
#[utoipa::path(
    delete, path = "/api/collections/{id}", tag = "knowledge", params(("id" = String, Path, description = "col_…")),
    responses(
        (status = 200, body = Deleted),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such collection", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody)
    )
)]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Reply<Deleted>, ApiError> {
    let parsed: CollectionId = parse_id("collection", &id)?;
    app.store
        .delete_collection(caller.tenant(), parsed)
        .await
        .map_err(missing("collection", &id))?;
    forget_prompts(&app, caller.tenant()).await;
    Ok(Reply(Deleted::new(id)))
}

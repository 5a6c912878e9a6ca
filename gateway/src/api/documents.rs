//! Documents: uploaded, followed until they are ready, read, deleted.

use axum::Json as Reply;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use coordinator::Redacted;
use rag_store::{CollectionId, DocumentId, Status};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Deleted, List, forget_prompts, missing, parse_id};
use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::http::auth::Caller;
use crate::http::body::{Id, declared_length, drain, expects_continue};
use crate::http::form::{OVERHEAD_BYTES, read_file};
use crate::http::pace::BODY_IDLE;

/// A document and where it stands.
#[derive(Debug, Serialize, ToSchema)]
pub struct Document {
    #[schema(example = "doc_0190c0de0190c0de0190c0de0190c0de")]
    pub id: String,
    pub collection: String,
    /// File name as uploaded, without folders.
    #[schema(example = "Hundesteuersatzung.pdf")]
    pub name: String,
    #[schema(example = "application/pdf")]
    pub media_type: String,
    /// Size of the original.
    pub bytes: u64,
    /// Pages, where the format has pages and the reading has come that far.
    pub pages: Option<u32>,
    /// `queued`, `processing`, `ready` or `failed`.
    pub status: &'static str,
    /// 0 to 1.
    pub progress: f32,
    /// German, for the person who uploaded it; only when `failed`.
    pub error: Option<String>,
    /// Milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Passages that can be found; 0 until `ready`.
    pub chunks: u32,
}

impl From<rag_store::Document> for Document {
    fn from(document: rag_store::Document) -> Self {
        Self {
            id: document.id.to_string(),
            collection: document.collection.to_string(),
            name: document.name,
            media_type: document.media_type,
            bytes: document.bytes,
            pages: document.pages,
            status: match document.status {
                Status::Queued => "queued",
                Status::Processing => "processing",
                Status::Ready => "ready",
                Status::Failed => "failed",
            },
            progress: document.progress,
            error: document.error,
            created_ms: document.created_ms,
            chunks: document.chunks,
        }
    }
}

/// A passage of a document.
#[derive(Debug, Serialize, ToSchema)]
pub struct Chunk {
    /// 0-based place in the document; a citation's `chunk`.
    pub ordinal: u32,
    /// 1-based page it begins on, where the format has pages.
    pub page: Option<u32>,
    /// Headings above it; may be empty.
    pub heading: String,
    /// Literal text of the document.
    #[schema(value_type = String)]
    pub text: Redacted<String>,
}

impl From<rag_store::DocumentChunk> for Chunk {
    fn from(chunk: rag_store::DocumentChunk) -> Self {
        Self {
            ordinal: chunk.ordinal,
            page: chunk.page,
            heading: chunk.heading,
            text: chunk.text,
        }
    }
}

/// What a form with a file looks like.
#[derive(ToSchema)]
#[allow(dead_code)]
pub struct Upload {
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
}

/// The documents of a collection, oldest first.
#[utoipa::path(
    get, path = "/api/collections/{id}/documents", tag = "knowledge",
    params(("id" = String, Path, description = "col_…")),
    responses(
        (status = 200, body = List<Document>),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such collection", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody)
    )
)]
pub async fn list(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Reply<List<Document>>, ApiError> {
    let parsed: CollectionId = parse_id("collection", &id)?;
    let documents = app
        .store
        .documents(caller.tenant(), parsed)
        .await
        .map_err(missing("collection", &id))?;
    Ok(Reply(List::of(documents)))
}

/// Uploads a document. When this answers, the document is stored on several nodes; `GET /api/documents/{id}` tells when it can be
/// found.
#[utoipa::path(
    post, path = "/api/collections/{id}/documents", tag = "knowledge",
    params(("id" = String, Path, description = "col_…")),
    request_body(content = Upload, content_type = "multipart/form-data"),
    responses(
        (status = 201, body = Document),
        (status = 400, description = "No file, no file name, or an empty file", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such collection", body = ErrorBody),
        (status = 408, description = "The file stopped coming, or came too slowly", body = ErrorBody),
        (status = 413, description = "The file is too large", body = ErrorBody),
        (status = 429, description = "Too many uploads at once; Retry-After says when to try again", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody),
        (status = 507, description = "The store's disk is full", body = ErrorBody)
    )
)]
pub async fn upload(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
    request: Request,
) -> Result<(StatusCode, Reply<Document>), ApiError> {
    let limit = app.config.max_upload_bytes;
    let declared = declared_length(&request);
    if declared.is_some_and(|length| length > limit + OVERHEAD_BYTES) {
        if !expects_continue(&request) {
            drain(request.into_body().into_data_stream()).await;
        }
        return Err(ApiError::too_large("a document", limit, declared));
    }
    let parsed: CollectionId = parse_id("collection", &id)?;
    // Asked before the file is read: nobody should send 50 MB to learn that the collection is gone.
    app.store
        .collection(caller.tenant(), parsed)
        .await
        .map_err(missing("collection", &id))?;
    let slot = tokio::time::timeout(BODY_IDLE, app.uploads.acquire())
        .await
        .ok()
        .and_then(Result::ok)
        .ok_or_else(|| {
            ApiError::overloaded(
                "too many uploads at the same time; try again in a few seconds",
                5,
            )
        })?;
    // Held until the store has the file: the slots bound the memory that uploads take.
    let (file, _slot) = read_file(request, limit, slot).await?;
    let document = app
        .store
        .upload(
            caller.tenant(),
            parsed,
            &file.name,
            &file.media_type,
            file.bytes,
        )
        .await
        .map_err(missing("collection", &id))?;
    Ok((StatusCode::CREATED, Reply(document.into())))
}

/// One document: its status, progress and, when it could not be read, why.
#[utoipa::path(
    get, path = "/api/documents/{id}", tag = "knowledge", params(("id" = String, Path, description = "doc_…")),
    responses(
        (status = 200, body = Document),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such document", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody)
    )
)]
pub async fn get(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Reply<Document>, ApiError> {
    let parsed: DocumentId = parse_id("document", &id)?;
    let document = app
        .store
        .document(caller.tenant(), parsed)
        .await
        .map_err(missing("document", &id))?;
    Ok(Reply(document.into()))
}

/// Deletes a document, also one that is being read.
#[utoipa::path(
    delete, path = "/api/documents/{id}", tag = "knowledge", params(("id" = String, Path, description = "doc_…")),
    responses(
        (status = 200, body = Deleted),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such document", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody)
    )
)]
pub async fn delete(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Reply<Deleted>, ApiError> {
    let parsed: DocumentId = parse_id("document", &id)?;
    app.store
        .delete_document(caller.tenant(), parsed)
        .await
        .map_err(missing("document", &id))?;
    forget_prompts(&app, caller.tenant()).await;
    Ok(Reply(Deleted::new(id)))
}

/// The passages of a document in order; empty until it is ready.
#[utoipa::path(
    get, path = "/api/documents/{id}/chunks", tag = "knowledge", params(("id" = String, Path, description = "doc_…")),
    responses(
        (status = 200, body = List<Chunk>),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such document", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody)
    )
)]
pub async fn chunks(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Reply<List<Chunk>>, ApiError> {
    let parsed: DocumentId = parse_id("document", &id)?;
    let chunks = app
        .store
        .chunks(caller.tenant(), parsed)
        .await
        .map_err(missing("document", &id))?;
    Ok(Reply(List::of(chunks)))
}

/// The file as it was uploaded.
#[utoipa::path(
    get, path = "/api/documents/{id}/original", tag = "knowledge", params(("id" = String, Path, description = "doc_…")),
    responses(
        (status = 200, description = "The file", content_type = "application/octet-stream", body = Vec<u8>),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such document", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody)
    )
)]
pub async fn original(
    State(app): State<App>,
    caller: Caller,
    Id(id): Id,
) -> Result<Response, ApiError> {
    let parsed: DocumentId = parse_id("document", &id)?;
    let (document, bytes) = app
        .store
        .original(caller.tenant(), parsed)
        .await
        .map_err(missing("document", &id))?;
    let (media_type, disposition) = presentation(&document.media_type);
    let mut response = Response::new(Body::from(bytes));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    let disposition = format!(
        "{disposition}; filename*=UTF-8''{}",
        percent_encode(&document.name)
    );
    if let Ok(value) = HeaderValue::from_str(&disposition) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    Ok(response)
}

/// How an original is handed to a browser. What a browser would run (HTML, SVG) goes out as bytes only: an uploaded page
/// must not act in this origin.
fn presentation(media_type: &str) -> (&'static str, &'static str) {
    match media_type.split(';').next().unwrap_or_default().trim() {
        "application/pdf" => ("application/pdf", "inline"),
        "text/plain" | "text/markdown" => ("text/plain", "inline"),
        "application/vnd.openxmlformats-officedocument.wordprocessingml.document" => (
            "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
            "attachment",
        ),
        "application/vnd.oasis.opendocument.text" => {
            ("application/vnd.oasis.opendocument.text", "attachment")
        }
        _ => ("application/octet-stream", "attachment"),
    }
}

/// RFC 8187's `value-chars`.
fn percent_encode(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~!#$&+^`|".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
        encoded
    })
}

#[cfg(test)]
#[path = "documents_tests.rs"]
mod tests;

//! Documents: uploaded, followed until they are ready, read, deleted.

use axum::Json as Reply;
use axum::body::Body;
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest, Multipart, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use coordinator::Redacted;
use rag_store::{CollectionId, DocumentId, Status};
use serde::Serialize;
use utoipa::ToSchema;

use super::{Deleted, List, missing, parse_id};
use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::http::auth::Caller;
use crate::http::body::{BODY_IDLE, Id, declared_length, drain};

/// What multipart's boundaries and part headers may add to a file.
const MULTIPART_OVERHEAD_BYTES: u64 = 64 << 10;
/// Longest file name, in characters; file systems allow 255 bytes.
const MAX_NAME_CHARS: usize = 200;

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
        (status = 408, description = "The file stopped coming", body = ErrorBody),
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
    if declared.is_some_and(|length| length > limit + MULTIPART_OVERHEAD_BYTES) {
        if !request.headers().contains_key(header::EXPECT) {
            drain(&mut request.into_body()).await;
        }
        return Err(ApiError::too_large("a document", limit, declared));
    }
    let parsed: CollectionId = parse_id("collection", &id)?;
    // Asked before the file is read: nobody should send 50 MB to learn that the collection is gone.
    app.store
        .collection(caller.tenant(), parsed)
        .await
        .map_err(missing("collection", &id))?;
    let _slot = tokio::time::timeout(BODY_IDLE, app.uploads.acquire())
        .await
        .ok()
        .and_then(Result::ok)
        .ok_or_else(|| {
            ApiError::overloaded(
                "too many uploads at the same time; try again in a few seconds",
                5,
            )
        })?;
    let file = read_file(request, limit).await?;
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

struct File {
    name: String,
    media_type: String,
    bytes: Bytes,
}

/// The form's `file`, read piece by piece so that one that is too large is noticed at the limit.
async fn read_file(request: Request, limit: u64) -> Result<File, ApiError> {
    let mut form = Multipart::from_request(request, &())
        .await
        .map_err(|rejection| {
            let message = format!(
                "expected a form (multipart/form-data) with one part `file`: {}",
                rejection.body_text()
            );
            ApiError::malformed("invalid_form", message)
        })?;
    loop {
        let field = patient(form.next_field()).await?;
        let Some(mut field) = field else {
            return Err(ApiError::invalid(
                "file",
                "file: expected a form with one part `file`, got none",
            ));
        };
        if field.name() != Some("file") {
            // Other parts are allowed and thrown away.
            while patient(field.chunk()).await?.is_some() {}
            continue;
        }
        let name = file_name(&field)?;
        let media_type = media_type(&field, &name);
        let mut bytes = BytesMut::new();
        while let Some(piece) = patient(field.chunk()).await? {
            if (bytes.len() + piece.len()) as u64 > limit {
                let mut seen = bytes.len() as u64;
                drop(bytes);
                // Read on, so that the client, which still writes, gets to read the answer.
                while seen < crate::http::body::MAX_DRAIN_BYTES {
                    let Ok(Some(piece)) = patient(field.chunk()).await else {
                        break;
                    };
                    seen += piece.len() as u64;
                }
                return Err(ApiError::too_large("a document", limit, None));
            }
            bytes.extend_from_slice(&piece);
        }
        return Ok(File {
            name,
            media_type,
            bytes: bytes.freeze(),
        });
    }
}

async fn patient<T>(next: impl Future<Output = Result<T, MultipartError>>) -> Result<T, ApiError> {
    match tokio::time::timeout(BODY_IDLE, next).await {
        Err(_) => {
            let message = format!(
                "the file stopped coming for {} s; send it again",
                BODY_IDLE.as_secs()
            );
            Err(ApiError::timed_out(message))
        }
        Ok(Err(error)) => {
            let message = format!(
                "the form could not be read: {}; send it again",
                error.body_text()
            );
            Err(ApiError::malformed("invalid_form", message))
        }
        Ok(Ok(value)) => Ok(value),
    }
}

/// The last part of the file's name as the client sent it: some send whole paths, of either kind.
fn file_name(field: &Field<'_>) -> Result<String, ApiError> {
    clean_name(field.file_name().unwrap_or_default()).ok_or_else(|| {
        ApiError::invalid(
            "file",
            format!(
                "file: expected a file name of 1 to {MAX_NAME_CHARS} characters in the form's part"
            ),
        )
    })
}

fn clean_name(name: &str) -> Option<String> {
    let name = name.rsplit(['/', '\\']).next().unwrap_or_default().trim();
    let fits =
        !name.is_empty() && name != "." && name != ".." && name.chars().count() <= MAX_NAME_CHARS;
    (fits && !name.chars().any(char::is_control)).then(|| name.to_owned())
}

/// What the client says, unless it says nothing in particular; then what the name's ending says.
fn media_type(field: &Field<'_>, name: &str) -> String {
    match field.content_type() {
        Some(given) if given != "application/octet-stream" && given.len() <= 100 => {
            given.to_owned()
        }
        _ => mime_guess::from_path(name)
            .first_or_octet_stream()
            .essence_str()
            .to_owned(),
    }
}

#[cfg(test)]
#[path = "documents_tests.rs"]
mod tests;

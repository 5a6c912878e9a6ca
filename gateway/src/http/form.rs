//! A form with one file (`multipart/form-data`) into the file, with every byte of it bounded: in memory by the limit, in
//! time by [`Pace`].

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::{Body, BodyDataStream};
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, Request};
use axum::http::StatusCode;
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};

use crate::error::ApiError;
use crate::http::body::{drain, expects_continue};
use crate::http::pace::Pace;

/// What boundaries, part headers and other parts may add to the file.
pub const OVERHEAD_BYTES: u64 = 64 << 10;
/// Longest file name, in characters; file systems allow 255 bytes.
pub const MAX_NAME_CHARS: usize = 200;

/// The form's part `file`.
#[derive(Debug)]
pub struct File {
    /// Without folders and control characters.
    pub name: String,
    pub media_type: String,
    pub bytes: Bytes,
}

/// Reads the form's part `file`, of at most `limit` bytes, while `slot` is held; it comes back with the file, and is dropped
/// as soon as the form is refused. The rest of a refused form is read and thrown away, because a client that still writes would
/// see a reset connection and not the answer.
pub async fn read_file<G>(request: Request, limit: u64, slot: G) -> Result<(File, G), ApiError> {
    let expects_continue = expects_continue(&request);
    let (head, body) = request.into_parts();
    let source = Source::new(body.into_data_stream(), limit + OVERHEAD_BYTES);
    let mut request = Request::from_parts(head, Body::from_stream(source.clone()));
    // axum's own limit of 2 MiB is for bodies that nobody else counts; `Source` counts this one.
    DefaultBodyLimit::disable().apply(&mut request);
    match read_part(request, &source, limit).await {
        Ok(file) => Ok((file, slot)),
        Err(error) => {
            drop(slot);
            let is_late = error.status() == StatusCode::REQUEST_TIMEOUT;
            let is_waiting = expects_continue && source.state().pace.seen_bytes() == 0;
            if !is_late && !is_waiting {
                drain(source.unread()).await;
            }
            Err(error)
        }
    }
}

async fn read_part(request: Request, source: &Source, limit: u64) -> Result<File, ApiError> {
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
        let field = source.patient(limit, form.next_field()).await?;
        let Some(mut field) = field else {
            return Err(ApiError::invalid(
                "file",
                "file: expected a form with one part `file`, got none",
            ));
        };
        if field.name() != Some("file") {
            // Other parts are allowed and thrown away; `Source` ends those that are larger than a form with a file may be.
            while source.patient(limit, field.chunk()).await?.is_some() {}
            continue;
        }
        let name = file_name(&field)?;
        let media_type = media_type(&field, &name);
        let mut bytes = BytesMut::new();
        while let Some(piece) = source.patient(limit, field.chunk()).await? {
            if (bytes.len() + piece.len()) as u64 > limit {
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

/// The request's body as the form's parser reads it. The parser keeps what it has not taken apart yet in memory, so this ends
/// what is longer than any form may be; and it gives back what the parser left unread.
#[derive(Clone)]
struct Source(Arc<Mutex<State>>);

struct State {
    frames: BodyDataStream,
    pace: Pace,
    limit: u64,
}

/// More came than a form may have.
#[derive(Debug, thiserror::Error)]
#[error("the form is too large")]
struct TooLarge;

impl Source {
    fn new(frames: BodyDataStream, limit: u64) -> Self {
        Self(Arc::new(Mutex::new(State {
            frames,
            pace: Pace::start(),
            limit,
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the parser has not read.
    fn unread(&self) -> BodyDataStream {
        std::mem::replace(&mut self.state().frames, Body::empty().into_data_stream())
    }

    /// The parser's next piece, if it comes in time. `limit` is the file's, for the answer.
    async fn patient<T>(
        &self,
        limit: u64,
        next: impl Future<Output = Result<T, MultipartError>>,
    ) -> Result<T, ApiError> {
        let patience = self.state().pace.patience();
        match tokio::time::timeout(patience, next).await {
            Err(_) => Err(self.state().pace.late()),
            Ok(Err(_)) if self.state().is_over() => {
                Err(ApiError::too_large("a document", limit, None))
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
}

impl State {
    fn is_over(&self) -> bool {
        self.pace.seen_bytes() > self.limit
    }
}

impl Stream for Source {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.state();
        if state.is_over() {
            return Poll::Ready(Some(Err(axum::Error::new(TooLarge))));
        }
        let next = state.frames.poll_next_unpin(context);
        if let Poll::Ready(Some(Ok(bytes))) = &next {
            state.pace.saw(bytes.len());
        }
        next
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
#[path = "form_tests.rs"]
mod tests;

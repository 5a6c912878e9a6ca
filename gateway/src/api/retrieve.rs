//! `POST /api/retrieve`: the passages alone, without an answer.

use axum::Json as Reply;
use axum::extract::State;
use coordinator::Redacted;
use rag_store::{Hit, RetrieveRequest};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::http::auth::Caller;
use crate::http::body::Json;
use crate::openai::request::MAX_COLLECTIONS;
use crate::sources::{collection_ids, no_collection};

/// Passages when the request does not say how many.
const DEFAULT_TOP_K: usize = 5;
/// Most passages of one answer.
const MAX_TOP_K: usize = 100;

/// What to look up.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Retrieve {
    #[schema(value_type = String, example = "Wie hoch ist die Hundesteuer?")]
    pub query: Redacted<String>,
    /// Collections to search; all of the tenant's when absent or empty.
    #[serde(default)]
    pub collections: Option<Vec<String>>,
    /// 1 to 100; 5 when absent.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 100)]
    pub top_k: Option<usize>,
}

/// What was found, best first.
#[derive(Debug, Serialize, ToSchema)]
pub struct Results {
    pub results: Vec<Passage>,
}

/// A passage that was found.
#[derive(Debug, Serialize, ToSchema)]
pub struct Passage {
    pub document_id: String,
    /// The document's file name.
    pub document: String,
    /// 1-based, where the format has pages.
    pub page: Option<u32>,
    /// Headings above the passage; may be empty.
    pub heading: String,
    /// Literal text of the document.
    #[schema(value_type = String)]
    pub text: Redacted<String>,
    /// 0 to 1; comparable within one answer only.
    pub score: f32,
    /// Place of the passage in `GET /api/documents/{id}/chunks`.
    pub chunk: u32,
}

impl From<Hit> for Passage {
    fn from(hit: Hit) -> Self {
        Self {
            document_id: hit.document_id.to_string(),
            document: hit.document,
            page: hit.page,
            heading: hit.heading,
            text: hit.text,
            score: hit.score,
            chunk: hit.chunk_ordinal,
        }
    }
}

impl Retrieve {
    fn check(&self) -> Result<usize, ApiError> {
        if self.query.expose().trim().is_empty() {
            return Err(ApiError::invalid(
                "query",
                "query: expected a question, got an empty string",
            ));
        }
        let top_k = self.top_k.unwrap_or(DEFAULT_TOP_K);
        if !(1..=MAX_TOP_K).contains(&top_k) {
            return Err(ApiError::invalid(
                "top_k",
                format!("top_k: expected 1 to {MAX_TOP_K}, got {top_k}"),
            ));
        }
        let collections = self.collections.as_ref().map_or(0, Vec::len);
        if collections > MAX_COLLECTIONS {
            let message =
                format!("collections: expected at most {MAX_COLLECTIONS}, got {collections}");
            return Err(ApiError::invalid("collections", message));
        }
        Ok(top_k)
    }
}

/// Finds the passages that answer a question.
#[utoipa::path(
    post, path = "/api/retrieve", tag = "knowledge", request_body = Retrieve,
    responses(
        (status = 200, body = Results),
        (status = 400, description = "A parameter is wrong", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such collection", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 503, description = "The store is not available; ask again", body = ErrorBody)
    )
)]
pub async fn retrieve(
    State(app): State<App>,
    caller: Caller,
    Json(request): Json<Retrieve>,
) -> Result<Reply<Results>, ApiError> {
    let top_k = request.check()?;
    let names = request.collections.unwrap_or_default();
    let wanted = RetrieveRequest {
        query: request.query,
        collections: collection_ids(&names)?,
        top_k,
    };
    let hits = app
        .store
        .retrieve(caller.tenant(), wanted)
        .await
        .map_err(|error| no_collection(error, &names))?;
    Ok(Reply(Results {
        results: hits.into_iter().map(Passage::from).collect(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::body::parse;

    #[test]
    fn what_does_not_fit_is_named() {
        let cases = [
            (r#"{"collections":[]}"#, "query", "query"),
            (r#"{"query":" "}"#, "query", "query"),
            (r#"{"query":"x","top_k":0}"#, "top_k", "1 to 100, got 0"),
            (r#"{"query":"x","top_k":101}"#, "top_k", "1 to 100, got 101"),
            (
                r#"{"query":"x","collections":"col_1"}"#,
                "collections",
                "expected an array",
            ),
        ];
        for (body, param, part) in cases {
            let error = parse::<Retrieve>(body.as_bytes())
                .and_then(|r| r.check())
                .expect_err(body);
            assert_eq!(
                (error.status().as_u16(), error.param()),
                (400, Some(param)),
                "{body}"
            );
            assert!(
                error.message().contains(part),
                "{body}: {}",
                error.message()
            );
        }
        assert_eq!(
            parse::<Retrieve>(br#"{"query":"x"}"#)
                .unwrap()
                .check()
                .unwrap(),
            DEFAULT_TOP_K
        );
    }
}

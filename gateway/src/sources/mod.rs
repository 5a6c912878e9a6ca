//! Answers from documents: the question that is looked up, the passages that are found, the prompt that carries them, and
//! the citations that the answer shows. Pure, but for [`ground`], which asks the store and the tokenizer.
//!
//! Invariant: a citation's passage is the literal text of the document; only the prompt's copy of it is shortened or defused.

mod budget;
mod prompt;

use coordinator::Redacted;
use rag_store::{CollectionId, Hit, RetrieveRequest};
use serde::Serialize;
use utoipa::ToSchema;
use worker::client::Message;

use crate::app::App;
use crate::error::ApiError;
use crate::http::auth::Caller;
use crate::metrics;

pub use prompt::{NOTHING_FOUND, mark_cited, question};

/// Passages that an answer is made from.
const TOP_K: usize = 5;

/// A passage that an answer was made from.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Citation {
    /// Its number in the answer's text: `[1]` is the first.
    pub number: usize,
    #[schema(example = "doc_0190c0de0190c0de0190c0de0190c0de")]
    pub document_id: String,
    /// The document's file name.
    #[schema(example = "Hundesteuersatzung.pdf")]
    pub document: String,
    /// 1-based, where the format has pages.
    pub page: Option<u32>,
    /// Headings above the passage; may be empty.
    pub heading: String,
    /// Literal text of the document.
    #[schema(value_type = String)]
    pub passage: Redacted<String>,
    /// 0 to 1; comparable within one answer only.
    pub score: f32,
    /// Place of the passage in `GET /api/documents/{id}/chunks`.
    pub chunk: u32,
    /// Whether the answer's text refers to it; known at the end of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cited: Option<bool>,
}

/// What was found for a conversation.
pub enum Grounding {
    /// The conversation with the passages in it, and the passages.
    Found {
        messages: Vec<Message>,
        citations: Vec<Citation>,
    },
    /// Nothing in the collections answers.
    Nothing,
}

/// Looks the conversation's question up in the caller's collections.
pub async fn ground(
    app: &App,
    caller: &Caller,
    model: &str,
    context_tokens: u32,
    collections: &[String],
    messages: Vec<Message>,
) -> Result<Grounding, ApiError> {
    let Some(query) = question(&messages) else {
        return Err(ApiError::invalid(
            "messages",
            "messages: expected at least one user message with text, got none",
        ));
    };
    let ids = collection_ids(collections)?;
    let request = RetrieveRequest {
        query,
        collections: ids,
        top_k: TOP_K,
    };
    let hits = app
        .store
        .retrieve(caller.tenant(), request)
        .await
        .map_err(|error| no_collection(error, collections))?;
    metrics::grounded(caller.tenant(), !hits.is_empty());
    if hits.is_empty() {
        return Ok(Grounding::Nothing);
    }
    let texts: Vec<Redacted<String>> = hits
        .iter()
        .map(|hit| Redacted::new(prompt::defuse(hit.text.expose())))
        .collect();
    let counts = count_tokens(app, model, &texts).await;
    let shown = budget::fit(texts, &counts, budget::for_context(context_tokens));
    let messages = prompt::with_sources(messages, &hits, &shown);
    let citations = hits
        .into_iter()
        .enumerate()
        .map(|(i, hit)| Citation::new(i + 1, hit))
        .collect();
    Ok(Grounding::Found {
        messages,
        citations,
    })
}

/// The ids of a request's collections; one that no collection can have is answered as an unknown one.
pub fn collection_ids(collections: &[String]) -> Result<Vec<CollectionId>, ApiError> {
    collections
        .iter()
        .map(|id| {
            id.parse()
                .map_err(|_| ApiError::not_found("collection", id).with_param("collections"))
        })
        .collect()
}

/// The store says that some collection is missing, not which one.
pub fn no_collection(error: rag_store::Error, collections: &[String]) -> ApiError {
    match (error, collections) {
        (rag_store::Error::NotFound, [id]) => {
            ApiError::not_found("collection", id).with_param("collections")
        }
        (rag_store::Error::NotFound, ids) => {
            ApiError::not_found("collection", &ids.join(", ")).with_param("collections")
        }
        (error, _) => error.into(),
    }
}

/// Tokens of each text. Where the worker cannot say (its group is forming again), an estimate that is rather too high.
async fn count_tokens(app: &App, model: &str, texts: &[Redacted<String>]) -> Vec<usize> {
    let count = |text: &Redacted<String>| {
        let asked = app.inference.tokenize(model, text.clone());
        let estimate = budget::estimate(text.expose());
        async move { asked.await.map_or(estimate, |tokens| tokens.len()) }
    };
    futures::future::join_all(texts.iter().map(count)).await
}

impl Citation {
    fn new(number: usize, hit: Hit) -> Self {
        Self {
            number,
            document_id: hit.document_id.to_string(),
            document: hit.document,
            page: hit.page,
            heading: hit.heading,
            passage: hit.text,
            score: hit.score,
            chunk: hit.chunk_ordinal,
            cited: None,
        }
    }
}

//! `POST /v1/chat/completions`.

use axum::extract::State;
use axum::response::Response;
use coordinator::Redacted;
use coordinator::clock;
use uuid::Uuid;
use worker::client::{Event, FinishReason, ModelKind};

use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::http::auth::Caller;
use crate::http::body::Json;
use crate::openai::answer::{Answer, Form};
use crate::openai::body::{ChatChunk, ChatCompletion};
use crate::openai::generate::{Generations, json_response};
use crate::openai::request::ChatRequest;
use crate::openai::{models, sse};
use crate::sources::{self, Grounding};

/// Answers a conversation, with `collections` from the tenant's documents.
///
/// With `stream` the answer comes as server-sent events, each a chunk as JSON; the last is `[DONE]`. An error in the stream is
/// an event `{"error": …}` after which the stream ends without `[DONE]`.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "openai", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer, whole or as a stream of chunks", content(
            (ChatCompletion = "application/json"), (ChatChunk = "text/event-stream")
        )),
        (status = 400, description = "A parameter is wrong, or the prompt is longer than the context", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such model or collection", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 429, description = "No room; Retry-After says when to ask again", body = ErrorBody),
        (status = 500, description = "An error of the server", body = ErrorBody),
        (status = 503, description = "The model or the store is not ready; ask again", body = ErrorBody),
        (status = 504, description = "The answer was not whole within the request's timeout_ms", body = ErrorBody)
    )
)]
pub async fn complete(
    State(app): State<App>,
    caller: Caller,
    Json(request): Json<ChatRequest>,
) -> Result<Response, ApiError> {
    let started = clock::monotonic();
    let mut chat = request.check()?;
    let model = models::find(app.inference.models(), &chat.model, ModelKind::Generate)?;

    let mut answer = new_answer(&chat.model, chat.choices)
        .include_usage(chat.include_usage)
        .with_tools(&chat.tool_names);
    if !chat.collections.is_empty() {
        let messages = std::mem::take(&mut chat.messages);
        let context = model.context_tokens;
        match sources::ground(
            &app,
            &caller,
            &chat.model,
            context,
            &chat.collections,
            messages,
        )
        .await?
        {
            Grounding::Found {
                messages,
                citations,
            } => {
                chat.messages = messages;
                answer = answer.with_citations(Some(citations));
            }
            Grounding::Nothing => {
                return nothing_found(
                    answer.with_citations(Some(Vec::new())),
                    chat.choices,
                    chat.stream,
                );
            }
        }
    }

    let requests = chat.generations(caller.tenant());
    let generations = Generations::start(
        &app,
        caller.tenant(),
        &chat.model,
        requests,
        answer,
        started,
    )
    .await?;
    if chat.stream {
        Ok(sse::response(sse::live(generations)))
    } else {
        generations.into_response().await
    }
}

fn new_answer(model: &str, choices: usize) -> Answer {
    let id = format!("chatcmpl-{}", Uuid::now_v7().simple());
    Answer::new(Form::Chat, id, clock::now_ms() / 1000, model, choices)
}

/// The fixed answer without a source, in the form that was asked for.
fn nothing_found(mut answer: Answer, choices: usize, stream: bool) -> Result<Response, ApiError> {
    let mut chunks = answer.opening();
    for index in 0..choices {
        let text = Redacted::new(sources::NOTHING_FOUND.to_owned());
        chunks.extend(answer.take(
            index,
            Event::Text {
                text,
                tokens: Vec::new(),
                logprobs: Vec::new(),
            },
        )?);
        let finished = Event::Finished {
            reason: FinishReason::Stop,
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: 0,
        };
        chunks.extend(answer.take(index, finished)?);
    }
    if !stream {
        return Ok(json_response(answer.whole()));
    }
    chunks.extend(answer.closing());
    Ok(sse::response(sse::prepared(&chunks)))
}

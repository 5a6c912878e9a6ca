//! `POST /v1/completions`.

use axum::extract::State;
use axum::response::Response;
use coordinator::clock;
use uuid::Uuid;
use worker::client::ModelKind;

use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::http::auth::Caller;
use crate::http::body::Json;
use crate::openai::answer::{Answer, Form};
use crate::openai::body::TextCompletion;
use crate::openai::generate::Generations;
use crate::openai::request::CompletionRequest;
use crate::openai::{models, sse};

/// Continues a text as it stands, without a chat template.
#[utoipa::path(
    post, path = "/v1/completions", tag = "openai", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The continuation, whole or as a stream of pieces of the same form", content(
            (TextCompletion = "application/json"), (TextCompletion = "text/event-stream")
        )),
        (status = 400, description = "A parameter is wrong, or the prompt is longer than the context", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such model", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 429, description = "No room; Retry-After says when to ask again", body = ErrorBody),
        (status = 500, description = "An error of the server", body = ErrorBody),
        (status = 503, description = "The model is not ready; ask again", body = ErrorBody),
        (status = 504, description = "The answer was not whole within the request's timeout_ms", body = ErrorBody)
    )
)]
pub async fn complete(
    State(app): State<App>,
    caller: Caller,
    Json(request): Json<CompletionRequest>,
) -> Result<Response, ApiError> {
    let started = clock::monotonic();
    let completion = request.check()?;
    models::find(
        app.inference.models(),
        &completion.model,
        ModelKind::Generate,
    )?;
    let requests = completion.generations(caller.tenant());
    let id = format!("cmpl-{}", Uuid::now_v7().simple());
    let answer = Answer::new(
        Form::Completion,
        id,
        clock::now_ms() / 1000,
        &completion.model,
        requests.len(),
    )
    .per_prompt(completion.choices)
    .include_usage(completion.include_usage);
    let generations = Generations::start(
        &app,
        caller.tenant(),
        &completion.model,
        requests,
        answer,
        started,
    )
    .await
    .map_err(|error| {
        if error.code() == "context_length_exceeded" {
            error.with_param("prompt")
        } else {
            error
        }
    })?;
    if completion.stream {
        Ok(sse::response(sse::live(generations)))
    } else {
        generations.into_response().await
    }
}

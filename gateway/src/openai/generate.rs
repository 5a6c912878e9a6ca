//! Runs the generations of one request side by side and feeds their events into its answer.

use std::time::Duration;

use axum::http::{HeaderValue, header};
use axum::response::Response;
use coordinator::clock;
use coordinator::ids::TenantId;
use futures::StreamExt;
use futures::future::try_join_all;
use futures::stream::{BoxStream, SelectAll};
use worker::client::{Event, GenerateRequest, InferError};

use crate::app::App;
use crate::error::ApiError;
use crate::metrics;
use crate::openai::answer::Answer;

/// How long the first event of any choice is awaited before a stream's head goes out: an error within it becomes the HTTP
/// status; a later one, or one of another choice, becomes an event of the stream. A whole answer has its status from its end.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);
/// An answer of which nothing came for so long is given up: longer than any queue that the engine admits.
pub const SILENCE: Duration = Duration::from_secs(300);

type Events = SelectAll<BoxStream<'static, (usize, Result<Event, InferError>)>>;

/// Generations under way and the answer that they become.
pub struct Generations {
    pub answer: Answer,
    events: Events,
    /// The first event, read ahead.
    first: Option<(usize, Result<Event, InferError>)>,
    meter: Meter,
}

impl Generations {
    /// Starts all `requests`. Waits a moment for the first event: an `Err` of it becomes the answer's HTTP status.
    /// `started` is when the HTTP request came.
    pub async fn start(
        app: &App,
        tenant: &TenantId,
        model: &str,
        requests: Vec<GenerateRequest>,
        answer: Answer,
        started: clock::Instant,
    ) -> Result<Self, ApiError> {
        let streams = try_join_all(
            requests
                .into_iter()
                .map(|request| app.inference.generate(request)),
        )
        .await?;
        let mut events: Events = streams
            .into_iter()
            .enumerate()
            .map(|(index, stream)| {
                futures::stream::unfold(stream, move |mut stream| async move {
                    stream.next().await.map(|event| ((index, event), stream))
                })
                .boxed()
            })
            .collect();
        let first = match tokio::time::timeout(HEAD_PATIENCE, events.next()).await {
            Ok(Some((_, Err(error)))) => return Err(error.into()),
            Ok(Some(event)) => Some(event),
            Ok(None) => return Err(ended_early()),
            Err(_) => None,
        };
        let meter = Meter::new(tenant.clone(), model, started);
        Ok(Self {
            answer,
            events,
            first,
            meter,
        })
    }

    /// The chunks of the next event; may be none. `None` when the answer is complete.
    pub async fn next(&mut self) -> Option<Result<Vec<String>, ApiError>> {
        let event = match self.first.take() {
            Some(event) => Some(event),
            None => self.events.next().await,
        };
        let Some((index, event)) = event else {
            return if self.answer.is_complete() {
                None
            } else {
                Some(Err(ended_early()))
            };
        };
        let chunks = match event {
            Ok(event) => {
                if let Event::Text { tokens, .. } = &event
                    && !tokens.is_empty()
                {
                    self.meter.token();
                }
                self.answer.take(index, event)
            }
            Err(error) => Err(error.into()),
        };
        let usage = self.answer.usage();
        self.meter
            .count(usage.prompt_tokens, usage.completion_tokens);
        Some(chunks)
    }

    /// Ends what is still being generated.
    pub fn cancel(&mut self) {
        self.events.clear();
    }

    /// Waits for the end and answers with the whole.
    pub async fn into_response(mut self) -> Result<Response, ApiError> {
        loop {
            match tokio::time::timeout(SILENCE, self.next()).await {
                Ok(None) => break,
                Ok(Some(chunks)) => {
                    chunks?;
                }
                Err(_) => {
                    return Err(ApiError::unavailable(
                        "timeout",
                        "no token came for too long; send the request again",
                    ));
                }
            }
        }
        Ok(json_response(self.answer.whole()))
    }
}

#[cfg(test)]
impl Generations {
    /// One generation whose events are known.
    pub fn of(
        answer: Answer,
        events: impl futures::Stream<Item = Result<Event, InferError>> + Send + 'static,
    ) -> Self {
        let tenant = TenantId::new("test").expect("a tenant id");
        let events = [events.map(|event| (0, event)).boxed()]
            .into_iter()
            .collect();
        let meter = Meter::new(tenant, "test", clock::monotonic());
        Self {
            answer,
            events,
            first: None,
            meter,
        }
    }
}

/// Serialised JSON as an answer.
pub fn json_response(json: String) -> Response {
    let mut response = Response::new(axum::body::Body::from(json));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

fn ended_early() -> ApiError {
    ApiError::unavailable(
        "interrupted",
        "the answer ended before it was complete; send the request again",
    )
}

/// Counts tokens as they come, so that an answer that is broken off counts too.
struct Meter {
    tenant: TenantId,
    model: String,
    started: clock::Instant,
    seen_token: bool,
    /// Prompt and completion tokens counted so far.
    counted: (u64, u64),
}

impl Meter {
    fn new(tenant: TenantId, model: &str, started: clock::Instant) -> Self {
        Self {
            tenant,
            model: model.to_owned(),
            started,
            seen_token: false,
            counted: (0, 0),
        }
    }

    fn token(&mut self) {
        if !self.seen_token {
            self.seen_token = true;
            metrics::first_token(&self.model, self.started.elapsed());
        }
    }

    fn count(&mut self, prompt: u64, completion: u64) {
        metrics::tokens(
            &self.tenant,
            "prompt",
            prompt.saturating_sub(self.counted.0),
        );
        metrics::tokens(
            &self.tenant,
            "completion",
            completion.saturating_sub(self.counted.1),
        );
        self.counted = (prompt.max(self.counted.0), completion.max(self.counted.1));
    }
}

//! Server-sent events: chunks of an answer as they come, comments while nothing comes, and `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt;

use crate::error::ApiError;
use crate::openai::generate::{Generations, SILENCE};

/// Proxies close connections on which nothing moves; many of them after 60 s, some after 15.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// The events of an answer under way. Dropping them, as the server does when the client goes away, cancels the generations.
pub fn live(generations: Generations) -> impl futures::Stream<Item = Bytes> + Send + 'static {
    let pending = generations
        .answer
        .opening()
        .iter()
        .map(|chunk| data(chunk))
        .collect();
    let state = Stream {
        generations,
        pending,
        silent: Duration::ZERO,
        ended: false,
        span: tracing::Span::current(),
    };
    futures::stream::unfold(state, |mut state| async move {
        state.next().await.map(|bytes| (bytes, state))
    })
}

/// The events of an answer that is there already.
pub fn prepared(chunks: &[String]) -> impl futures::Stream<Item = Bytes> + Send + 'static {
    let events: Vec<Bytes> = chunks
        .iter()
        .map(|chunk| data(chunk))
        .chain([data("[DONE]")])
        .collect();
    futures::stream::iter(events)
}

/// Events as an answer.
pub fn response(events: impl futures::Stream<Item = Bytes> + Send + 'static) -> Response {
    let mut response = Response::new(Body::from_stream(events.map(Ok::<Bytes, Infallible>)));
    let headers = response.headers_mut();
    // Without the charset some clients read umlauts as Latin-1.
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    // nginx would otherwise hold back what streams.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Stream {
    generations: Generations,
    pending: VecDeque<Bytes>,
    silent: Duration,
    ended: bool,
    /// The request's; its id belongs to what is logged long after its route has returned.
    span: tracing::Span,
}

impl Stream {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.pending.pop_front() {
                return Some(bytes);
            }
            if self.ended {
                return None;
            }
            match tokio::time::timeout(KEEP_ALIVE, self.generations.next()).await {
                Ok(Some(Ok(chunks))) => {
                    self.silent = Duration::ZERO;
                    self.pending.extend(chunks.iter().map(|chunk| data(chunk)));
                }
                Ok(Some(Err(error))) => self.fail(&error),
                Ok(None) => {
                    self.pending.extend(
                        self.generations
                            .answer
                            .closing()
                            .iter()
                            .map(|chunk| data(chunk)),
                    );
                    self.pending.push_back(data("[DONE]"));
                    self.ended = true;
                }
                Err(_) => {
                    self.silent += KEEP_ALIVE;
                    if self.silent >= SILENCE {
                        self.fail(&ApiError::unavailable(
                            "timeout",
                            "no token came for too long; send the request again",
                        ));
                    } else {
                        return Some(Bytes::from_static(b": keep-alive\n\n"));
                    }
                }
            }
        }
    }

    /// An error event, and the end: without `[DONE]`, so that nobody takes the answer for complete.
    fn fail(&mut self, error: &ApiError) {
        self.span
            .in_scope(|| tracing::warn!(code = error.code(), "an answer broke off in its stream"));
        self.pending.push_back(data(
            &serde_json::to_string(&error.body()).unwrap_or_default(),
        ));
        self.generations.cancel();
        self.ended = true;
    }
}

/// One event. JSON in one line holds no line break, so one `data:` line is enough.
fn data(json: &str) -> Bytes {
    Bytes::from(format!("data: {json}\n\n"))
}

#[cfg(test)]
mod tests {
    use coordinator::Redacted;
    use worker::client::{Event, FinishReason, InferError};

    use super::*;
    use crate::openai::answer::{Answer, Form};

    fn answer() -> Answer {
        Answer::new(Form::Chat, "id-1".into(), 0, "m", 1)
    }

    fn text(text: &str) -> Result<Event, InferError> {
        Ok(Event::Text {
            text: Redacted::new(text.into()),
            tokens: vec![1],
            logprobs: Vec::new(),
        })
    }

    fn finished() -> Result<Event, InferError> {
        Ok(Event::Finished {
            reason: FinishReason::Stop,
            prompt_tokens: 3,
            cached_tokens: 0,
            completion_tokens: 1,
        })
    }

    async fn events(came: Vec<Result<Event, InferError>>) -> Vec<String> {
        let generations = Generations::of(answer(), futures::stream::iter(came));
        let bytes: Vec<Bytes> = live(generations).collect().await;
        bytes
            .iter()
            .map(|event| {
                let event = std::str::from_utf8(event).unwrap();
                let data = event.strip_prefix("data: ").unwrap();
                data.strip_suffix("\n\n").unwrap().to_owned()
            })
            .collect()
    }

    #[tokio::test]
    async fn a_complete_answer_ends_with_done() {
        let events = events(vec![text("Zeile 1\nZeile 2"), finished()]).await;
        assert_eq!(events.len(), 4);
        assert!(events[1].contains(r"Zeile 1\nZeile 2"), "{}", events[1]);
        assert!(
            events.iter().all(|event| !event.contains('\n')),
            "one line an event"
        );
        assert_eq!(events[3], "[DONE]");
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_ends_with_an_error_and_without_done() {
        let interrupted = Err(InferError::Interrupted {
            why: "rank 1 died".into(),
        });
        for came in [vec![text("Die"), interrupted], vec![text("Die")]] {
            let events = events(came).await;
            let last: serde_json::Value = serde_json::from_str(events.last().unwrap()).unwrap();
            assert_eq!(last["error"]["code"], "interrupted");
            assert_eq!(last["error"]["type"], "server_error");
            assert!(!events.iter().any(|event| event == "[DONE]"));
        }
    }

    #[tokio::test]
    async fn when_the_client_goes_away_the_generation_is_dropped() {
        struct Generation(std::sync::Arc<std::sync::atomic::AtomicBool>);
        impl Drop for Generation {
            fn drop(&mut self) {
                self.0.store(true, std::sync::atomic::Ordering::SeqCst);
            }
        }
        let dropped = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let generation = Generation(dropped.clone());
        let endless = futures::stream::unfold(generation, |generation| async {
            tokio::task::yield_now().await;
            Some((text("x"), generation))
        });
        let mut body = response(live(Generations::of(answer(), endless)))
            .into_body()
            .into_data_stream();
        for _ in 0..5 {
            body.next().await.unwrap().unwrap();
        }
        assert!(!dropped.load(std::sync::atomic::Ordering::SeqCst));
        drop(body);
        assert!(dropped.load(std::sync::atomic::Ordering::SeqCst));
    }
}

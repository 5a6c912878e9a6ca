//! Around every route: request id, access log without content, metrics, security headers, and the answer to a panic.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use coordinator::clock;
use coordinator::ids::TenantId;
use tracing::Instrument;
use uuid::Uuid;

use crate::error::ApiError;
use crate::metrics;

/// Longest request id that is taken over from a client.
const MAX_REQUEST_ID_BYTES: usize = 64;
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Scripts, styles and calls only from here; nothing may frame the page; blobs show a document's original.
const PAGE_POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; \
     connect-src 'self'; manifest-src 'self'; worker-src 'self'; frame-src 'self' blob:; base-uri 'none'; \
     form-action 'self'; frame-ancestors 'none'",
);
/// What an API answers is data: even opened in a browser it may load and run nothing.
const DATA_POLICY: HeaderValue =
    HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'; sandbox");

/// What is learnt about a request on its way, for the log.
#[derive(Debug, Clone)]
pub struct Trail(Arc<TrailInner>);

#[derive(Debug)]
struct TrailInner {
    request_id: String,
    tenant: OnceLock<TenantId>,
}

impl Trail {
    /// The tenant that the request's key belongs to.
    pub fn set_tenant(&self, tenant: &TenantId) {
        let _ = self.0.tenant.set(tenant.clone());
    }
}

/// Gives the request an id, counts it and writes one line about it when the head of its answer is known.
pub async fn follow(mut request: Request, next: Next) -> Response {
    let started = clock::monotonic();
    let in_flight = metrics::begin();
    let trail = Trail(Arc::new(TrailInner {
        request_id: request_id(&request),
        tenant: OnceLock::new(),
    }));
    let route = route_label(&request);
    let is_data = is_data(request.uri().path());
    let method = method_label(request.method());
    request.extensions_mut().insert(trail.clone());
    // Of the highest level, so that whatever is logged on the way carries the id.
    let span = tracing::error_span!("request", request_id = %trail.0.request_id);

    let mut response = next.run(request).instrument(span).await;

    let elapsed = started.elapsed();
    let status = response.status();
    metrics::answered(&route, status.as_u16(), elapsed);
    tracing::info!(
        request_id = %trail.0.request_id,
        tenant = trail.0.tenant.get().map_or("-", |tenant| tenant.as_str()),
        method,
        route = %route,
        status = status.as_u16(),
        ms = elapsed.as_millis() as u64,
        "request"
    );
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&trail.0.request_id) {
        headers.insert(REQUEST_ID, id);
    }
    secure(headers, is_data);
    // The request is in flight until the last byte of its answer was taken, or the client is gone.
    response.map(|body| {
        axum::body::Body::new(Guarded {
            body,
            _in_flight: in_flight,
        })
    })
}

/// The client's own id when it is harmless, else a new one.
fn request_id(request: &Request) -> String {
    let given = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|id| {
            (1..=MAX_REQUEST_ID_BYTES).contains(&id.len())
                && id
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        });
    given.map_or_else(|| format!("req_{}", Uuid::now_v7().simple()), str::to_owned)
}

/// The method, if it is one of HTTP's own: any other word is the client's, and the log is not its notebook.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// The route's pattern: ids in paths stay out of logs and labels.
fn route_label(request: &Request) -> String {
    match request.extensions().get::<MatchedPath>() {
        Some(path) => path.as_str().to_owned(),
        None if is_data(request.uri().path()) => "unknown".to_owned(),
        None => "page".to_owned(),
    }
}

/// Whether a path belongs to an API rather than to the page.
pub fn is_data(path: &str) -> bool {
    let first = path
        .trim_start_matches('/')
        .split('/')
        .next()
        .unwrap_or_default();
    matches!(
        first,
        "v1" | "api" | "health" | "ready" | "metrics" | "openapi.json"
    )
}

fn secure(headers: &mut axum::http::HeaderMap, is_data: bool) {
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    headers.insert(
        header::REFERRER_POLICY,
        HeaderValue::from_static("no-referrer"),
    );
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(
        HeaderName::from_static("cross-origin-opener-policy"),
        HeaderValue::from_static("same-origin"),
    );
    headers.insert(
        HeaderName::from_static("cross-origin-resource-policy"),
        HeaderValue::from_static("same-origin"),
    );
    headers.insert(
        HeaderName::from_static("permissions-policy"),
        HeaderValue::from_static("camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
    );
    if is_data {
        headers.insert(header::CONTENT_SECURITY_POLICY, DATA_POLICY);
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    } else {
        headers.insert(header::CONTENT_SECURITY_POLICY, PAGE_POLICY);
    }
}

/// A panic in a route is a bug of ours; the client learns so in the usual form. What the panic said may hold content
/// and is not repeated here.
pub fn panicked(_: Box<dyn Any + Send + 'static>) -> Response {
    tracing::error!("a route panicked; this is a bug");
    ApiError::internal(
        "an internal error; the server's log knows more under this answer's x-request-id",
    )
    .into_response()
}

/// A body that holds a guard until it is dropped.
struct Guarded {
    body: axum::body::Body,
    _in_flight: metrics::InFlight,
}

impl axum::body::HttpBody for Guarded {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<bytes::Bytes>, axum::Error>>> {
        std::pin::Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn with_id(id: &str) -> String {
        request_id(
            &Request::builder()
                .header("x-request-id", id)
                .body(Body::empty())
                .unwrap(),
        )
    }

    #[test]
    fn a_harmless_request_id_is_kept_and_another_replaced() {
        assert_eq!(with_id("abc-1.2_3"), "abc-1.2_3");
        for harmful in ["", "a b", "x\"y", &"a".repeat(65)] {
            let id = with_id(harmful);
            assert!(
                id.starts_with("req_") && id.len() == 36,
                "{harmful:?} gave {id}"
            );
        }
    }

    #[test]
    fn a_method_of_the_clients_own_making_is_not_logged() {
        assert_eq!(method_label(&Method::GET), "GET");
        let invented = Method::from_bytes(b"HUNDESTEUER").unwrap();
        assert_eq!(method_label(&invented), "other");
    }

    #[tokio::test]
    async fn a_panic_in_a_route_is_a_500_that_repeats_nothing_of_it() {
        async fn broken() -> &'static str {
            panic!("the prompt was: geheim")
        }
        let app = axum::Router::new()
            .route("/v1/broken", axum::routing::get(broken))
            .layer(tower_http::catch_panic::CatchPanicLayer::custom(panicked))
            .layer(axum::middleware::from_fn(follow));
        let request = Request::builder()
            .uri("/v1/broken")
            .body(Body::empty())
            .unwrap();
        let response = tower::ServiceExt::oneshot(app, request).await.unwrap();
        assert_eq!(response.status().as_u16(), 500);
        assert!(response.headers().contains_key("x-request-id"));
        let body = axum::body::to_bytes(response.into_body(), 10_000)
            .await
            .unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert!(
            text.contains("\"internal_error\"") && !text.contains("geheim"),
            "{text}"
        );
    }

    #[test]
    fn api_paths_are_data_and_all_others_the_page() {
        for path in [
            "/v1/models",
            "/api/collections",
            "/v1",
            "/health",
            "/metrics",
            "/openapi.json",
            "//v1/models",
        ] {
            assert!(is_data(path), "{path}");
        }
        for path in ["/", "/index.html", "/assets/app.js", "/apidocs", "/v10"] {
            assert!(!is_data(path), "{path}");
        }
    }
}

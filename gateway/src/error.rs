//! The one error of every route: an HTTP status and OpenAI's error object.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use worker::client::InferError;

/// Seconds after which a client should ask again when something is on its way: a group forms again within 5 s.
const RETRY_AFTER_S: u32 = 2;

/// What a route answers when it cannot do what was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    param: Option<String>,
    retry_after_s: Option<u32>,
}

/// The body of every error answer, as OpenAI's API defines it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub error: ErrorObject,
}

/// What went wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorObject {
    /// For people: what was expected, what came, what to do.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The parameter at fault, e.g. `messages[0].content`.
    pub param: Option<String>,
    /// For programs, e.g. `model_not_found`.
    pub code: Option<String>,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            param: None,
            retry_after_s: None,
        }
    }

    /// 400: the value of `param` is not what it must be.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::BAD_REQUEST, "invalid_value", message);
        error.param = Some(param.into());
        error
    }

    /// 400: the value is well-formed, but this server does not do that.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::invalid(param, message);
        error.code = "unsupported_value";
        error
    }

    /// 400: the body could not be read as what the route expects.
    pub fn malformed(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// 401: no key, or one that is not valid.
    pub fn unauthenticated(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    /// 403: the key is valid but lacks a right.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "insufficient_permissions", message)
    }

    /// 404 for an id that does not exist or is another tenant's: the answer is the same.
    pub fn not_found(what: &'static str, id: &str) -> Self {
        // The id comes from the request; what is longer than any id is not worth repeating.
        let id: String = id.chars().take(64).collect();
        Self::new(
            StatusCode::NOT_FOUND,
            "not_found",
            format!("no {what} with the id {id:?}"),
        )
    }

    /// 404 for a model that the cluster does not have.
    pub fn model_not_found(model: &str, known: &[String]) -> Self {
        let model: String = model.chars().take(200).collect();
        let known = if known.is_empty() {
            "none at the moment".to_owned()
        } else {
            known.join(", ")
        };
        let message = format!("the model {model:?} does not exist; this cluster has: {known}");
        let mut error = Self::new(StatusCode::NOT_FOUND, "model_not_found", message);
        error.param = Some("model".into());
        error
    }

    /// 404: no such route.
    pub fn no_route(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "unknown_url", message)
    }

    /// 405.
    pub fn method_not_allowed(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method_not_allowed",
            message,
        )
    }

    /// 408: the client stopped sending.
    pub fn timed_out(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "request_timeout", message)
    }

    /// 409: something of that name is there already.
    pub fn conflict(param: impl Into<String>, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::CONFLICT, "already_exists", message);
        error.param = Some(param.into());
        error
    }

    /// 413: more bytes than are taken. `limit` in bytes; `got` is `None` where the reading stopped at the limit.
    pub fn too_large(what: &str, limit: u64, got: Option<u64>) -> Self {
        let got = got.map_or("more".to_owned(), |bytes| format!("{bytes} bytes"));
        let message = format!(
            "{what} may have at most {limit} bytes ({}), got {got}; send a smaller one or divide it",
            mib(limit)
        );
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    /// 429.
    pub fn overloaded(message: impl Into<String>, retry_after_s: u32) -> Self {
        let mut error = Self::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limit_exceeded",
            message,
        );
        error.retry_after_s = Some(retry_after_s.max(1));
        error
    }

    /// 503: not now; the same request may succeed in a moment.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message);
        error.retry_after_s = Some(RETRY_AFTER_S);
        error
    }

    /// 500: our fault. `message` must not hold what users wrote.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// The same error, pointing at a parameter.
    #[must_use]
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// The HTTP status it answers with.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The fixed word for programs.
    pub fn code(&self) -> &'static str {
        self.code
    }

    /// The parameter at fault.
    pub fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// What people read.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The body that goes to the client, also inside of a stream.
    pub fn body(&self) -> ErrorBody {
        let kind = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ErrorBody {
            error: ErrorObject {
                message: self.message.clone(),
                kind: kind.into(),
                param: self.param.clone(),
                code: Some(self.code.into()),
            },
        }
    }
}

/// A byte count for people: `50 MiB`, `1.5 MiB`.
fn mib(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) / (1 << 20);
    if tenths.is_multiple_of(10) {
        format!("{} MiB", tenths / 10)
    } else {
        format!("{}.{} MiB", tenths / 10, tenths % 10)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<InferError> for ApiError {
    fn from(error: InferError) -> Self {
        let message = error.to_string();
        match error {
            InferError::UnknownModel { model, known } => Self::model_not_found(&model, &known),
            InferError::PromptTooLong { .. } => {
                Self::malformed("context_length_exceeded", message).with_param("messages")
            }
            InferError::NotReady { .. } => Self::unavailable("model_not_ready", message),
            InferError::Interrupted { .. } => Self::unavailable("interrupted", message),
            InferError::Overloaded { retry_after_s } => Self::overloaded(message, retry_after_s),
            InferError::TimedOut { .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
            }
            InferError::Invalid { param, .. } => Self::invalid(param, message),
            InferError::Internal { .. } => Self::internal(message),
        }
    }
}

impl From<rag_store::Error> for ApiError {
    fn from(error: rag_store::Error) -> Self {
        use rag_store::Error;
        let message = error.to_string();
        match error {
            // Routes that know the id say which; see `api::missing`.
            Error::NotFound => Self::new(StatusCode::NOT_FOUND, "not_found", message),
            Error::Exists { .. } => Self::conflict("name", message),
            Error::TooLarge { limit, got } => Self::too_large("a document", limit, Some(got)),
            Error::Unavailable { .. } => Self::unavailable("store_unavailable", message),
            Error::DiskFull { .. } => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "disk_full", message)
            }
            Error::Invalid { param, .. } => Self::invalid(param, message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_inference_error_has_its_status_code_and_parameter() {
        let cases = [
            (
                InferError::UnknownModel {
                    model: "gpt-4".into(),
                    known: vec!["smollm2".into()],
                },
                404,
                "model_not_found",
                Some("model"),
            ),
            (
                InferError::PromptTooLong {
                    tokens: 9000,
                    context: 8192,
                },
                400,
                "context_length_exceeded",
                Some("messages"),
            ),
            (
                InferError::NotReady {
                    why: "forming".into(),
                },
                503,
                "model_not_ready",
                None,
            ),
            (
                InferError::Interrupted {
                    why: "rank 1 died".into(),
                },
                503,
                "interrupted",
                None,
            ),
            (
                InferError::Overloaded { retry_after_s: 7 },
                429,
                "rate_limit_exceeded",
                None,
            ),
            (InferError::TimedOut { timeout_ms: 9 }, 504, "timeout", None),
            (
                InferError::Invalid {
                    param: "stop".into(),
                    why: "empty".into(),
                },
                400,
                "invalid_value",
                Some("stop"),
            ),
            (
                InferError::Internal { why: "x".into() },
                500,
                "internal_error",
                None,
            ),
        ];
        for (error, status, code, param) in cases {
            let got = ApiError::from(error.clone());
            assert_eq!(
                (got.status().as_u16(), got.code(), got.param()),
                (status, code, param),
                "{error:?}"
            );
        }
    }

    #[test]
    fn each_store_error_has_its_status() {
        use rag_store::Error;
        let cases = [
            (Error::NotFound, 404),
            (
                Error::Exists {
                    what: "collection".into(),
                },
                409,
            ),
            (
                Error::TooLarge {
                    limit: 1 << 20,
                    got: 2 << 20,
                },
                413,
            ),
            (
                Error::Unavailable {
                    why: "no leader".into(),
                },
                503,
            ),
            (
                Error::DiskFull {
                    why: "0 bytes free".into(),
                },
                507,
            ),
            (
                Error::Invalid {
                    param: "name".into(),
                    why: "empty".into(),
                },
                400,
            ),
        ];
        for (error, status) in cases {
            assert_eq!(
                ApiError::from(error.clone()).status().as_u16(),
                status,
                "{error:?}"
            );
        }
    }

    #[test]
    fn an_unknown_model_names_the_known_ones() {
        let error = ApiError::model_not_found("gpt-4", &["smollm2".into(), "e5".into()]);
        assert_eq!(
            error.message(),
            r#"the model "gpt-4" does not exist; this cluster has: smollm2, e5"#
        );
    }

    #[test]
    fn too_large_names_the_limit_and_what_came() {
        let error = ApiError::too_large("a document", 50 << 20, Some(104_857_600));
        assert!(
            error.message().contains("52428800 bytes (50 MiB)"),
            "{}",
            error.message()
        );
        assert!(
            error.message().contains("got 104857600 bytes"),
            "{}",
            error.message()
        );
        assert_eq!(mib(1_572_864), "1.5 MiB");
    }

    #[test]
    fn what_may_be_retried_says_after_how_long() {
        for error in [
            ApiError::overloaded("full", 0),
            ApiError::unavailable("x", "y"),
        ] {
            let response = error.into_response();
            let seconds: u32 = response.headers()[header::RETRY_AFTER]
                .to_str()
                .unwrap()
                .parse()
                .unwrap();
            assert!(seconds >= 1);
        }
    }
}

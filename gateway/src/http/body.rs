//! Requests' bodies, paths and queries into types; what does not fit becomes an error that names the parameter, what was
//! expected and what came.

use axum::body::BodyDataStream;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::header;
use axum::http::request::Parts;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_path_to_error::Segment;

use crate::error::ApiError;
use crate::http::pace::Pace;

/// Largest JSON body: a prompt of a 128k-token context with tool definitions fits several times.
pub const MAX_JSON_BYTES: usize = 8 << 20;
/// What a rejected body may still send before the answer goes out, so that an ordinary client reads the answer instead
/// of a broken connection.
pub const MAX_DRAIN_BYTES: u64 = 1 << 30;

/// A JSON body.
pub struct Json<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = read_limited(request, "a JSON body", MAX_JSON_BYTES as u64).await?;
        parse(&bytes).map(Self)
    }
}

/// Reads a whole body of at most `limit` bytes. What is over the limit is read and thrown away first, because a client
/// that still writes would see a reset connection and not the answer.
pub async fn read_limited(request: Request, what: &str, limit: u64) -> Result<Bytes, ApiError> {
    let declared = declared_length(&request);
    let expects_continue = expects_continue(&request);
    let mut frames = request.into_body().into_data_stream();
    if declared.is_some_and(|length| length > limit) {
        if !expects_continue {
            drain(frames).await;
        }
        return Err(ApiError::too_large(what, limit, declared));
    }
    let mut pace = Pace::start();
    let mut bytes = BytesMut::new();
    while let Some(frame) = next_frame(&mut frames, &mut pace).await? {
        if (bytes.len() + frame.len()) as u64 > limit {
            drop(bytes);
            drain(frames).await;
            return Err(ApiError::too_large(what, limit, None));
        }
        bytes.extend_from_slice(&frame);
    }
    Ok(bytes.freeze())
}

/// The body's length as its header says.
pub fn declared_length(request: &Request) -> Option<u64> {
    request
        .headers()
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

/// Whether the client sends the body only when it is asked to, so that refusing needs no reading.
pub fn expects_continue(request: &Request) -> bool {
    request.headers().contains_key(header::EXPECT)
}

/// Throws the rest of a body away, up to [`MAX_DRAIN_BYTES`] and as fast as any body must come.
pub async fn drain(mut frames: BodyDataStream) {
    let mut pace = Pace::start();
    while pace.seen_bytes() <= MAX_DRAIN_BYTES {
        let Ok(Some(_)) = next_frame(&mut frames, &mut pace).await else {
            return;
        };
    }
}

async fn next_frame(
    frames: &mut BodyDataStream,
    pace: &mut Pace,
) -> Result<Option<Bytes>, ApiError> {
    match tokio::time::timeout(pace.patience(), frames.next()).await {
        Err(_) => Err(pace.late()),
        Ok(None) => Ok(None),
        Ok(Some(Ok(frame))) => {
            pace.saw(frame.len());
            Ok(Some(frame))
        }
        Ok(Some(Err(_))) => Err(ApiError::malformed(
            "incomplete_body",
            "the request's body ended before its declared end",
        )),
    }
}

/// A JSON object into `T`.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| {
        let got = if bytes.is_empty() {
            "an empty body".to_owned()
        } else {
            error.to_string()
        };
        ApiError::malformed(
            "invalid_json",
            format!("expected a JSON object as the request's body, got {got}"),
        )
    })?;
    if !value.is_object() {
        let message = format!(
            "expected a JSON object as the request's body, got {}",
            kind(&value)
        );
        return Err(ApiError::malformed("invalid_json", message));
    }
    serde_path_to_error::deserialize(&value).map_err(|error| {
        let param = param_name(error.path());
        let inner = error.inner().to_string();
        if let Some(field) = missing_field(&inner) {
            let param = match param.as_str() {
                "" => field.to_owned(),
                parent => format!("{parent}.{field}"),
            };
            let message = format!("missing required parameter: {param}");
            return ApiError::malformed("missing_required_parameter", message).with_param(param);
        }
        let got = at(&value, error.path()).map_or("nothing", kind);
        let why = readable(&inner);
        let message = match (param.is_empty(), why.contains("got ")) {
            (true, _) => why,
            (false, true) => format!("{param}: {why}"),
            (false, false) => format!("{param}: {why}, got {got}"),
        };
        let error = ApiError::malformed("invalid_type", message);
        if param.is_empty() {
            error
        } else {
            error.with_param(param)
        }
    })
}

/// The field's name in serde's words for a field that is not there.
fn missing_field(message: &str) -> Option<&str> {
    message.strip_prefix("missing field `")?.split('`').next()
}

/// `messages[0].content` from a path.
fn param_name(path: &serde_path_to_error::Path) -> String {
    let mut name = String::new();
    for segment in path.iter() {
        match segment {
            Segment::Seq { index } => name.push_str(&format!("[{index}]")),
            Segment::Map { key } | Segment::Enum { variant: key } => {
                if !name.is_empty() {
                    name.push('.');
                }
                name.extend(key.chars().take(64));
            }
            Segment::Unknown => {}
        }
    }
    name
}

fn at<'v>(value: &'v Value, path: &serde_path_to_error::Path) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, segment| match segment {
        Segment::Seq { index } => value.get(index),
        Segment::Map { key } => value.get(key),
        Segment::Enum { .. } | Segment::Unknown => None,
    })
}

/// What a value is, for people; never its content.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// serde's words into the API's: `invalid type: string "x", expected u32` → `expected a non-negative integer, got string "x"`.
fn readable(message: &str) -> String {
    let names = [
        ("f32", "a number"),
        ("f64", "a number"),
        ("u8", "a small non-negative integer"),
        ("u16", "a small non-negative integer"),
        ("u32", "a non-negative integer"),
        ("u64", "a non-negative integer"),
        ("usize", "a non-negative integer"),
        ("i64", "an integer"),
        ("a sequence", "an array"),
        ("a map", "an object"),
    ];
    let rest = ["invalid type: ", "invalid value: "]
        .iter()
        .find_map(|prefix| message.strip_prefix(prefix));
    match rest.and_then(|rest| rest.rsplit_once(", expected ")) {
        Some((got, expected)) => {
            let expected = names
                .iter()
                .find(|(name, _)| *name == expected)
                .map_or(expected, |(_, words)| words);
            // A long string is the user's text; its beginning is enough to find it.
            let got: String = got.chars().take(80).collect();
            format!("expected {expected}, got {got}")
        }
        None => message.to_owned(),
    }
}

/// One path parameter.
pub struct Id(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(id)) => Ok(Self(id)),
            Err(_) => Err(ApiError::invalid(
                "id",
                "expected an id of UTF-8 text in the path",
            )),
        }
    }
}

/// Two path parameters.
pub struct Ids(pub String, pub String);

impl<S: Send + Sync> FromRequestParts<S> for Ids {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::<(String, String)>::from_request_parts(parts, state).await {
            Ok(Path((first, second))) => Ok(Self(first, second)),
            Err(_) => Err(ApiError::invalid(
                "id",
                "expected ids of UTF-8 text in the path",
            )),
        }
    }
}

/// The query string.
pub struct Params<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(rejection) => Err(ApiError::malformed(
                "invalid_query",
                format!("the query string: {}", rejection.body_text()),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[allow(dead_code)]
    struct Sample {
        model: String,
        #[serde(default)]
        max_tokens: Option<u32>,
        #[serde(default)]
        temperature: Option<f32>,
        #[serde(default)]
        stop: Option<Stop>,
        #[serde(default)]
        items: Vec<Item>,
    }

    #[derive(Debug, Deserialize)]
    #[allow(dead_code)]
    struct Item {
        n: u32,
    }

    #[derive(Debug, Deserialize)]
    #[serde(untagged, expecting = "expected a string or an array of strings")]
    #[allow(dead_code)]
    enum Stop {
        One(String),
        Many(Vec<String>),
    }

    #[test]
    fn what_does_not_fit_is_named_with_what_was_expected_and_what_came() {
        let cases: &[(&str, &str, Option<&str>, &str)] = &[
            ("", "invalid_json", None, "got an empty body"),
            ("{\"model\":", "invalid_json", None, "got EOF"),
            (
                "[1]",
                "invalid_json",
                None,
                "expected a JSON object as the request's body, got an array",
            ),
            (
                "{}",
                "missing_required_parameter",
                Some("model"),
                "missing required parameter: model",
            ),
            (
                r#"{"model":5}"#,
                "invalid_type",
                Some("model"),
                "model: expected a string, got integer `5`",
            ),
            (
                r#"{"model":"m","max_tokens":-1}"#,
                "invalid_type",
                Some("max_tokens"),
                "max_tokens: expected a non-negative integer, got integer `-1`",
            ),
            (
                r#"{"model":"m","temperature":"hot"}"#,
                "invalid_type",
                Some("temperature"),
                "temperature: expected a number, got string \"hot\"",
            ),
            (
                r#"{"model":"m","stop":7}"#,
                "invalid_type",
                Some("stop"),
                "stop: expected a string or an array of strings, got a number",
            ),
            (
                r#"{"model":"m","items":[{"n":1},{"n":1.5}]}"#,
                "invalid_type",
                Some("items[1].n"),
                "items[1].n: expected a non-negative integer, got floating point `1.5`",
            ),
            (
                r#"{"model":"m","items":3}"#,
                "invalid_type",
                Some("items"),
                "items: expected an array, got integer `3`",
            ),
        ];
        for (body, code, param, message) in cases {
            let error = parse::<Sample>(body.as_bytes()).expect_err(body);
            assert_eq!((error.code(), error.param()), (*code, *param), "{body}");
            assert!(
                error.message().contains(message),
                "{body}: {}",
                error.message()
            );
        }
    }

    #[test]
    fn a_long_string_in_the_wrong_place_is_not_repeated_whole() {
        let body = format!(r#"{{"model":"m","max_tokens":"{}"}}"#, "x".repeat(100_000));
        let error = parse::<Sample>(body.as_bytes()).expect_err("a string is no number");
        assert!(
            error.message().len() < 300,
            "{} bytes",
            error.message().len()
        );
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_stack_overflow() {
        let body = format!("{{\"model\":{}", "[".repeat(1_000_000));
        assert_eq!(
            parse::<Sample>(body.as_bytes())
                .expect_err("too deep")
                .code(),
            "invalid_json"
        );
    }

    #[tokio::test]
    async fn a_body_over_the_limit_is_refused_with_or_without_a_declared_length() {
        let request = Request::builder()
            .header("content-length", "11")
            .body(Body::from(vec![b'x'; 11]))
            .unwrap();
        let error = read_limited(request, "it", 10)
            .await
            .expect_err("11 bytes of 10");
        assert!(
            error.message().contains("got 11 bytes"),
            "{}",
            error.message()
        );

        let chunks = futures::stream::iter(
            (0..11).map(|_| Ok::<_, std::io::Error>(Bytes::from_static(b"x"))),
        );
        let request = Request::builder().body(Body::from_stream(chunks)).unwrap();
        assert_eq!(
            read_limited(request, "it", 10)
                .await
                .expect_err("11 bytes of 10")
                .code(),
            "too_large"
        );

        let request = Request::builder().body(Body::from(vec![b'x'; 10])).unwrap();
        assert_eq!(
            read_limited(request, "it", 10)
                .await
                .expect("10 bytes of 10")
                .len(),
            10
        );
    }

    #[tokio::test]
    async fn a_body_that_crawls_beyond_its_time_is_cut_off() {
        let never = futures::stream::pending::<Result<Bytes, std::io::Error>>();
        let mut frames = Body::from_stream(never).into_data_stream();
        let error = next_frame(&mut frames, &mut Pace::overdue())
            .await
            .expect_err("its time is over");
        assert_eq!(
            (error.status().as_u16(), error.code()),
            (408, "request_timeout")
        );
    }
}

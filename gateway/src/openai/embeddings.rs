//! `POST /v1/embeddings`.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use coordinator::Redacted;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use worker::client::{EmbedKind, EmbedRequest, MAX_EMBED_INPUTS, ModelKind};

use crate::app::App;
use crate::error::{ApiError, ErrorBody};
use crate::http::auth::Caller;
use crate::http::body::Json;
use crate::metrics;
use crate::openai::models;
use crate::openai::request::OneOrMany;

/// `POST /v1/embeddings`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct EmbeddingRequest {
    /// A model of `GET /v1/models` whose kind is `embed`.
    #[schema(example = "multilingual-e5-small")]
    pub model: String,
    /// Texts to embed; each must not be empty. Arrays of tokens are not taken.
    pub input: OneOrMany,
    /// `float` (default) or `base64`: 32-bit little-endian floats.
    #[serde(default)]
    pub encoding_format: Option<String>,
    /// `query` or `passage`: puts the prefix in front that the model was trained with. Without it texts are taken as they
    /// stand. Ours, not in OpenAI's API.
    #[serde(default)]
    pub input_type: Option<String>,
    /// Not offered: vectors have the model's own length.
    #[serde(default)]
    pub dimensions: Option<u32>,
}

/// Vectors of length 1, in the order of the texts.
#[derive(Debug, Serialize, ToSchema)]
pub struct EmbeddingList {
    /// `list`.
    pub object: &'static str,
    pub data: Vec<Embedding>,
    pub model: String,
    pub usage: EmbeddingUsage,
}

/// One text's vector.
#[derive(Debug, Serialize, ToSchema)]
pub struct Embedding {
    /// `embedding`.
    pub object: &'static str,
    pub index: usize,
    pub embedding: Vector,
}

/// A vector in the form that was asked for.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Vector {
    Floats(Vec<f32>),
    Base64(String),
}

/// Tokens that were computed.
#[derive(Debug, Serialize, ToSchema)]
pub struct EmbeddingUsage {
    pub prompt_tokens: u64,
    pub total_tokens: u64,
}

/// How vectors are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Encoding {
    Float,
    Base64,
}

impl EmbeddingRequest {
    fn check(self) -> Result<(Vec<Redacted<String>>, Encoding, EmbedKind), ApiError> {
        if let Some(dimensions) = self.dimensions {
            let message = format!(
                "dimensions: expected nothing, got {dimensions}; vectors have the model's own length, leave it out"
            );
            return Err(ApiError::unsupported("dimensions", message));
        }
        let encoding = match self.encoding_format.as_deref() {
            None | Some("float") => Encoding::Float,
            Some("base64") => Encoding::Base64,
            Some(other) => return Err(expected("encoding_format", "float or base64", other)),
        };
        let kind = match self.input_type.as_deref() {
            None => EmbedKind::Raw,
            Some("query") => EmbedKind::Query,
            Some("passage") => EmbedKind::Passage,
            Some(other) => return Err(expected("input_type", "query or passage", other)),
        };
        let input = self.input.into_vec();
        if input.is_empty() || input.len() > MAX_EMBED_INPUTS {
            let message = format!(
                "input: expected 1 to {MAX_EMBED_INPUTS} texts, got {}",
                input.len()
            );
            return Err(ApiError::invalid("input", message));
        }
        if let Some(at) = input.iter().position(|text| text.expose().is_empty()) {
            let param = format!("input[{at}]");
            return Err(ApiError::invalid(
                param.clone(),
                format!("{param}: expected a text, got an empty one"),
            ));
        }
        Ok((input, encoding, kind))
    }
}

fn expected(param: &str, what: &str, got: &str) -> ApiError {
    let got: String = got.chars().take(40).collect();
    ApiError::invalid(param, format!("{param}: expected {what}, got {got:?}"))
}

impl Vector {
    fn new(vector: Vec<f32>, encoding: Encoding) -> Self {
        match encoding {
            Encoding::Float => Self::Floats(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect();
                Self::Base64(STANDARD.encode(bytes))
            }
        }
    }
}

/// Sentence embeddings.
#[utoipa::path(
    post, path = "/v1/embeddings", tag = "openai", request_body = EmbeddingRequest,
    responses(
        (status = 200, body = EmbeddingList),
        (status = 400, description = "A parameter is wrong, or a text is too long", body = ErrorBody),
        (status = 401, description = "No valid key", body = ErrorBody),
        (status = 404, description = "No such model", body = ErrorBody),
        (status = 413, description = "The body is too large", body = ErrorBody),
        (status = 429, description = "No room; Retry-After says when to ask again", body = ErrorBody),
        (status = 500, description = "An error of the server", body = ErrorBody),
        (status = 503, description = "The model is not ready; ask again", body = ErrorBody)
    )
)]
pub async fn create(
    State(app): State<App>,
    caller: Caller,
    Json(request): Json<EmbeddingRequest>,
) -> Result<Response, ApiError> {
    let model = models::find(app.inference.models(), &request.model, ModelKind::Embed)?.id;
    let (input, encoding, kind) = request.check()?;
    let request = EmbedRequest {
        tenant: caller.tenant().clone(),
        model: Some(model.clone()),
        input,
        kind,
    };
    let embeddings = app.inference.embed(request).await.map_err(|error| {
        let error = ApiError::from(error);
        if error.code() == "context_length_exceeded" {
            error.with_param("input")
        } else {
            error
        }
    })?;
    let tokens = embeddings.prompt_tokens as u64;
    metrics::tokens(caller.tenant(), "embedding", tokens);
    let data = embeddings
        .vectors
        .into_iter()
        .enumerate()
        .map(|(index, vector)| Embedding {
            object: "embedding",
            index,
            embedding: Vector::new(vector, encoding),
        })
        .collect();
    let usage = EmbeddingUsage {
        prompt_tokens: tokens,
        total_tokens: tokens,
    };
    Ok(axum::Json(EmbeddingList {
        object: "list",
        data,
        model,
        usage,
    })
    .into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(body: &str) -> Result<(Vec<Redacted<String>>, Encoding, EmbedKind), ApiError> {
        crate::http::body::parse::<EmbeddingRequest>(body.as_bytes())?.check()
    }

    #[test]
    fn one_text_and_several_are_taken_in_both_encodings() {
        let (input, encoding, kind) = check(r#"{"model":"e5","input":"a"}"#).unwrap();
        assert_eq!(
            (input.len(), encoding, kind),
            (1, Encoding::Float, EmbedKind::Raw)
        );
        let body = r#"{"model":"e5","input":["a","b"],"encoding_format":"base64","input_type":"query","user":"x"}"#;
        let (input, encoding, kind) = check(body).unwrap();
        assert_eq!(
            (input.len(), encoding, kind),
            (2, Encoding::Base64, EmbedKind::Query)
        );
    }

    #[test]
    fn what_is_not_offered_is_refused_by_name() {
        let many = format!(
            r#"{{"model":"e5","input":[{}]}}"#,
            vec!["\"a\""; MAX_EMBED_INPUTS + 1].join(",")
        );
        let cases = [
            (
                r#"{"model":"e5","input":"a","dimensions":256}"#,
                "dimensions",
            ),
            (
                r#"{"model":"e5","input":"a","encoding_format":"hex"}"#,
                "encoding_format",
            ),
            (
                r#"{"model":"e5","input":"a","input_type":"both"}"#,
                "input_type",
            ),
            (r#"{"model":"e5","input":[]}"#, "input"),
            (r#"{"model":"e5","input":[1,2,3]}"#, "input"),
            (r#"{"model":"e5","input":[[1,2,3]]}"#, "input"),
            (r#"{"model":"e5","input":{"a":1}}"#, "input"),
            (r#"{"model":"e5","input":["a",""]}"#, "input[1]"),
            (many.as_str(), "input"),
        ];
        for (body, param) in cases {
            let error = check(body).expect_err(param);
            let shown = &body[..body.len().min(80)];
            assert_eq!(
                (error.status().as_u16(), error.param()),
                (400, Some(param)),
                "{shown}"
            );
            assert!(error.message().contains("expected"), "{}", error.message());
        }
    }

    #[test]
    fn base64_is_little_endian_floats() {
        let Vector::Base64(text) = Vector::new(vec![1.0, -0.5], Encoding::Base64) else {
            panic!("not base64")
        };
        assert_eq!(
            STANDARD.decode(text).unwrap(),
            [0, 0, 128, 63, 0, 0, 0, 191]
        );
        assert_eq!(
            Vector::new(vec![1.0], Encoding::Float),
            Vector::Floats(vec![1.0])
        );
    }
}

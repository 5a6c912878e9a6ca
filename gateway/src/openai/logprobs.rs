//! Probabilities of tokens in the two shapes of OpenAI's API. Pure.

use coordinator::Redacted;
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;
use worker::client::TokenLogprob;

/// What OpenAI writes for a token that cannot come; JSON has no infinity.
const NEVER: f32 = -9999.0;

/// Probabilities of a chat's tokens.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One a token, in order.
    pub content: Vec<ChatToken>,
    #[schema(value_type = Option<Object>)]
    pub refusal: Option<()>,
}

/// A token and those that might have come in its place.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatToken {
    /// Its text; broken characters are U+FFFD, see `bytes`.
    #[schema(value_type = String)]
    pub token: Redacted<String>,
    /// Natural logarithm of its probability.
    pub logprob: f32,
    #[schema(value_type = Vec<u8>)]
    pub bytes: Redacted<Vec<u8>>,
    /// The most probable ones, best first.
    pub top_logprobs: Vec<TopToken>,
}

/// A token that might have come.
#[derive(Debug, Serialize, ToSchema)]
pub struct TopToken {
    #[schema(value_type = String)]
    pub token: Redacted<String>,
    pub logprob: f32,
    #[schema(value_type = Vec<u8>)]
    pub bytes: Redacted<Vec<u8>>,
}

/// Probabilities of a text completion's tokens; all lists have one entry a token.
#[derive(Debug, Serialize, ToSchema)]
pub struct TextLogprobs {
    #[schema(value_type = Vec<String>)]
    pub tokens: Vec<Redacted<String>>,
    pub token_logprobs: Vec<f32>,
    /// The most probable tokens with their logarithms.
    #[schema(value_type = Vec<Object>)]
    pub top_logprobs: Vec<Redacted<Map<String, Value>>>,
    /// Where each token begins in the text, in characters.
    pub text_offset: Vec<usize>,
}

impl ChatLogprobs {
    /// `None` when there are none.
    pub fn of(tokens: &[TokenLogprob]) -> Option<Self> {
        let token = |token: &TokenLogprob| ChatToken {
            token: text(&token.bytes),
            logprob: token.logprob.max(NEVER),
            bytes: token.bytes.clone(),
            top_logprobs: token.top.iter().map(top).collect(),
        };
        (!tokens.is_empty()).then(|| Self {
            content: tokens.iter().map(token).collect(),
            refusal: None,
        })
    }
}

impl TextLogprobs {
    /// `None` when there are none. The first token begins at `offset`.
    pub fn of(tokens: &[TokenLogprob], mut offset: usize) -> Option<Self> {
        if tokens.is_empty() {
            return None;
        }
        let mut all = Self {
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
        };
        for token in tokens {
            let told = text(&token.bytes);
            all.text_offset.push(offset);
            offset += told.expose().chars().count();
            all.tokens.push(told);
            all.token_logprobs.push(token.logprob.max(NEVER));
            let others = token
                .top
                .iter()
                .map(|(bytes, logprob)| (text(bytes).into_inner(), json!(logprob.max(NEVER))));
            all.top_logprobs.push(Redacted::new(others.collect()));
        }
        Some(all)
    }
}

fn top((bytes, logprob): &(Redacted<Vec<u8>>, f32)) -> TopToken {
    TopToken {
        token: text(bytes),
        logprob: logprob.max(NEVER),
        bytes: bytes.clone(),
    }
}

fn text(bytes: &Redacted<Vec<u8>>) -> Redacted<String> {
    Redacted::new(String::from_utf8_lossy(bytes.expose()).into_owned())
}

//! Bodies of chat and text completions, and their way to generations. Pure.

mod chat;
mod completion;
mod form;

use coordinator::Redacted;
use serde::Deserialize;
use utoipa::ToSchema;
use worker::client::{Class, GenerateRequest, Sampling};

use crate::error::ApiError;

pub use chat::{Chat, ChatMessage, ChatRequest, Content, Part};
pub use completion::{Completion, CompletionRequest};

/// Most answers to one request: each takes a place in the engine's batch.
pub const MAX_CHOICES: usize = 8;
/// Most messages of one conversation; far more than a context holds.
pub const MAX_MESSAGES: usize = 2048;
/// Most tools of one request, as at OpenAI.
pub const MAX_TOOLS: usize = 128;
/// Most collections searched for one question.
pub const MAX_COLLECTIONS: usize = 32;

/// One string or several.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
#[schema(example = "text")]
pub enum OneOrMany {
    #[schema(value_type = String)]
    One(Redacted<String>),
    #[schema(value_type = Vec<String>)]
    Many(Vec<Redacted<String>>),
}

impl OneOrMany {
    /// The strings in order.
    pub fn into_vec(self) -> Vec<Redacted<String>> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

/// What a stream shall carry.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub struct StreamOptions {
    /// A last chunk without choices tells the numbers of tokens.
    #[serde(default)]
    pub include_usage: Option<bool>,
}

/// How urgent a request is. Not in OpenAI's API; a number is read as vLLM does, where the smaller goes first and 0 is usual.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected \"interactive\", \"background\" or a whole number"
)]
#[schema(example = "background")]
pub enum Priority {
    Name(PriorityName),
    Number(i64),
}

#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PriorityName {
    /// Somebody waits for the answer.
    Interactive,
    /// Takes what interactive requests leave, and a small share beside them.
    Background,
}

impl Priority {
    fn class(self) -> Class {
        match self {
            Self::Name(PriorityName::Background) | Self::Number(1..) => Class::Background,
            Self::Name(PriorityName::Interactive) | Self::Number(_) => Class::Interactive,
        }
    }
}

/// What decides how tokens are drawn, as it came; the same for chat and text completions.
struct Drawing {
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    seed: Option<i64>,
    logit_bias: Vec<(u32, f32)>,
}

impl Drawing {
    fn sampling(self, temperature: f32) -> Result<Sampling, ApiError> {
        let sampling = Sampling {
            temperature: self.temperature.unwrap_or(temperature),
            top_p: self.top_p.unwrap_or(1.0),
            top_k: self.top_k.unwrap_or(0),
            min_p: self.min_p.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty.unwrap_or(1.0),
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            // The bits matter, not the sign.
            seed: self.seed.map(i64::cast_unsigned),
            logit_bias: self.logit_bias,
        };
        sampling.validate()?;
        Ok(sampling)
    }
}

/// The same generation several times; with a seed, each its own, or all answers would be the same.
fn repeat(request: GenerateRequest, times: usize) -> Vec<GenerateRequest> {
    (0..times as u64)
        .map(|i| {
            let mut request = request.clone();
            request.sampling.seed = request.sampling.seed.map(|seed| seed.wrapping_add(i));
            request
        })
        .collect()
}

fn check_choices(n: Option<u32>) -> Result<usize, ApiError> {
    match n.unwrap_or(1) as usize {
        n @ 1..=MAX_CHOICES => Ok(n),
        n => Err(ApiError::invalid(
            "n",
            format!("n: expected 1 to {MAX_CHOICES} answers, got {n}"),
        )),
    }
}

fn check_max_tokens(max_tokens: Option<u32>, newer: Option<u32>) -> Result<Option<u32>, ApiError> {
    let (param, value) = match (newer, max_tokens) {
        (Some(value), _) => ("max_completion_tokens", value),
        (None, Some(value)) => ("max_tokens", value),
        (None, None) => return Ok(None),
    };
    if value == 0 {
        return Err(ApiError::invalid(
            param,
            format!("{param}: expected at least 1, got 0"),
        ));
    }
    Ok(Some(value))
}

fn check_timeout(timeout_ms: Option<u32>) -> Result<Option<u32>, ApiError> {
    match timeout_ms {
        Some(0) => Err(ApiError::invalid(
            "timeout_ms",
            "timeout_ms: expected at least 1, got 0",
        )),
        timeout_ms => Ok(timeout_ms),
    }
}

fn check_stop(stop: Option<OneOrMany>) -> Result<Vec<String>, ApiError> {
    use worker::client::{MAX_STOP_BYTES, MAX_STOP_STRINGS};
    let stop: Vec<String> = stop
        .map(OneOrMany::into_vec)
        .unwrap_or_default()
        .into_iter()
        .map(Redacted::into_inner)
        .collect();
    if stop.len() > MAX_STOP_STRINGS {
        let message = format!(
            "stop: expected at most {MAX_STOP_STRINGS} strings, got {}",
            stop.len()
        );
        return Err(ApiError::invalid("stop", message));
    }
    if let Some(wrong) = stop
        .iter()
        .find(|s| s.is_empty() || s.len() > MAX_STOP_BYTES)
    {
        let message = format!(
            "stop: expected strings of 1 to {MAX_STOP_BYTES} bytes, got one of {}",
            wrong.len()
        );
        return Err(ApiError::invalid("stop", message));
    }
    Ok(stop)
}

fn include_usage(stream: bool, options: Option<StreamOptions>) -> Result<bool, ApiError> {
    match options {
        Some(_) if !stream => Err(ApiError::invalid(
            "stream_options",
            "stream_options: expected only together with stream=true",
        )),
        options => Ok(options
            .and_then(|options| options.include_usage)
            .unwrap_or(false)),
    }
}

#[cfg(test)]
mod tests;

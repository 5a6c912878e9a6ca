//! A text completion's request.

use coordinator::Redacted;
use coordinator::ids::TenantId;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;
use worker::client::{Class, GenerateRequest, Prompt, Sampling};

use super::{
    Drawing, MAX_CHOICES, OneOrMany, Priority, StreamOptions, check_choices, check_max_tokens,
    check_stop, check_timeout, form, include_usage, repeat,
};
use crate::error::ApiError;

/// Length of a text completion whose request names none, as at OpenAI.
pub(super) const COMPLETION_TOKENS: u32 = 16;

/// Most of the most probable tokens told, as at OpenAI.
const MAX_LOGPROBS: u8 = 5;

/// `POST /v1/completions`.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct CompletionRequest {
    #[schema(example = "smollm2-135m-instruct")]
    pub model: String,
    /// Text to continue, as it stands; without a chat template.
    pub prompt: OneOrMany,
    #[serde(default)]
    pub stream: Option<bool>,
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// Most tokens of each answer; 16 when absent, as at OpenAI.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// Answers to each prompt; at most 8 in all.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 8)]
    pub n: Option<u32>,
    /// 0 (always the most probable token) to 2; 1 when absent.
    #[serde(default)]
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f32>,
    /// Only the most probable tokens that reach this probability together. Above 0, at most 1.
    #[serde(default)]
    #[schema(maximum = 1)]
    pub top_p: Option<f32>,
    /// Only so many of the most probable tokens; 0 is off. Not in OpenAI's API.
    #[serde(default)]
    pub top_k: Option<u32>,
    /// Only tokens at least this fraction as probable as the best; below 1. Not in OpenAI's API.
    #[serde(default)]
    #[schema(minimum = 0)]
    pub min_p: Option<f32>,
    /// Above 0, at most 2; 1 is off. Not in OpenAI's API.
    #[serde(default)]
    #[schema(maximum = 2)]
    pub repetition_penalty: Option<f32>,
    #[serde(default)]
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    #[serde(default)]
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// The same seed and request give the same answer.
    #[serde(default)]
    pub seed: Option<i64>,
    #[serde(default)]
    pub stop: Option<OneOrMany>,
    /// Send the prompt in front of the answer.
    #[serde(default)]
    pub echo: Option<bool>,
    #[serde(default)]
    pub best_of: Option<u32>,
    /// Tell how probable each token was, beside so many of the most probable ones; 0 to 5. Not together with `echo`.
    #[serde(default)]
    #[schema(maximum = 5)]
    pub logprobs: Option<u32>,
    /// Token ids (as strings) with what is added to their logits, -100 (never) to 100 (always); at most 300.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub logit_bias: Option<Value>,
    /// `interactive` when absent, or `background`. Not in OpenAI's API.
    #[serde(default)]
    pub priority: Option<Priority>,
    /// The answer must be whole so many milliseconds after the model took the request; else it ends with the error `timeout`
    /// (504). Not in OpenAI's API.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub timeout_ms: Option<u32>,
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub suffix: Option<Redacted<String>>,
}

/// A checked text completion.
#[derive(Debug)]
pub struct Completion {
    pub model: String,
    prompts: Vec<Redacted<String>>,
    /// Answers to each prompt.
    pub choices: usize,
    max_tokens: u32,
    sampling: Sampling,
    stop: Vec<String>,
    echo: bool,
    logprobs: Option<u8>,
    priority: Class,
    timeout_ms: Option<u32>,
    pub stream: bool,
    pub include_usage: bool,
}

impl CompletionRequest {
    /// Checks everything that can be judged without the cluster.
    pub fn check(self) -> Result<Completion, ApiError> {
        let logprobs = match self.logprobs {
            None => None,
            Some(n) => match u8::try_from(n) {
                Ok(n) if n <= MAX_LOGPROBS => Some(n),
                _ => {
                    let message = format!("logprobs: expected 0 to {MAX_LOGPROBS}, got {n}");
                    return Err(ApiError::invalid("logprobs", message));
                }
            },
        };
        if logprobs.is_some() && self.echo == Some(true) {
            return Err(ApiError::unsupported(
                "logprobs",
                "logprobs: expected nothing together with echo; this server does not tell the probabilities of a prompt's tokens",
            ));
        }
        if self
            .suffix
            .as_ref()
            .is_some_and(|suffix| !suffix.expose().is_empty())
        {
            return Err(ApiError::unsupported(
                "suffix",
                "suffix: expected nothing; the models here continue text, they do not fill in",
            ));
        }
        let choices = check_choices(self.n)?;
        if self.best_of.is_some_and(|best| best as usize != choices) {
            return Err(ApiError::unsupported(
                "best_of",
                "best_of: expected the value of n (or nothing); this server does not rank answers",
            ));
        }
        let prompts = self.prompt.into_vec();
        if prompts.is_empty() || prompts.len() * choices > MAX_CHOICES {
            let message = format!(
                "prompt: expected 1 to {MAX_CHOICES} prompts, counted n times, got {}",
                prompts.len().saturating_mul(choices)
            );
            return Err(ApiError::invalid("prompt", message));
        }
        let stream = self.stream.unwrap_or(false);
        Ok(Completion {
            model: self.model,
            prompts,
            choices,
            max_tokens: check_max_tokens(self.max_tokens, None)?.unwrap_or(COMPLETION_TOKENS),
            sampling: Drawing {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                presence_penalty: self.presence_penalty,
                frequency_penalty: self.frequency_penalty,
                seed: self.seed,
                logit_bias: form::logit_bias(self.logit_bias.as_ref())?,
            }
            .sampling(1.0)?,
            stop: check_stop(self.stop)?,
            echo: self.echo.unwrap_or(false),
            logprobs,
            priority: self.priority.map(Priority::class).unwrap_or_default(),
            timeout_ms: check_timeout(self.timeout_ms)?,
            stream,
            include_usage: include_usage(stream, self.stream_options)?,
        })
    }
}

impl Completion {
    /// The generations asked for: all answers to the first prompt, then those to the second, and so on.
    pub fn generations(&self, tenant: &TenantId) -> Vec<GenerateRequest> {
        let one = |prompt: &Redacted<String>| GenerateRequest {
            tenant: tenant.clone(),
            model: self.model.clone(),
            prompt: Prompt::Text(prompt.clone()),
            max_tokens: Some(self.max_tokens),
            sampling: self.sampling.clone(),
            stop: self.stop.clone(),
            echo: self.echo,
            constraint: None,
            logprobs: self.logprobs,
            priority: self.priority,
            timeout_ms: self.timeout_ms,
        };
        self.prompts
            .iter()
            .flat_map(|prompt| repeat(one(prompt), self.choices))
            .collect()
    }
}

//! What a caller asks of a model and what comes back: the types that travel between gateway and rank group.

use coordinator::Redacted;
pub use coordinator::control::ModelKind;
use coordinator::ids::TenantId;
use serde::{Deserialize, Serialize};

/// Largest number of stop strings a request may carry (OpenAI allows four; some clients send more).
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string in bytes: the text kept back while a match is still possible.
pub const MAX_STOP_BYTES: usize = 256;
/// Most texts in one embedding request.
pub const MAX_EMBED_INPUTS: usize = 2048;
/// Most tokens whose probability is told beside the chosen one's, as at OpenAI.
pub const MAX_TOP_LOGPROBS: u8 = 20;
/// Most tokens with a bias, as at OpenAI.
pub const MAX_LOGIT_BIASES: usize = 300;
/// Largest bias either way: beyond all differences between logits, so that it forbids or forces.
pub const MAX_LOGIT_BIAS: f32 = 100.0;
/// Most bytes of text in one request: far above any context that a model here has, and below one transport frame.
pub const MAX_PROMPT_BYTES: usize = 8 << 20;

/// One message of a conversation, as OpenAI's chat completions define it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or whatever the model's template knows.
    pub role: String,
    pub content: Redacted<String>,
    /// Name of the speaker or, for a tool result, of the function.
    pub name: Option<String>,
    /// An assistant's tool calls: a JSON array `[{"type":"function","id":…,"function":{"name":…,"arguments":…}}]`.
    pub tool_calls: Option<Redacted<String>>,
    /// The call that a `tool` message answers.
    pub tool_call_id: Option<String>,
}

impl Message {
    /// A message with a role and a text and nothing else.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: Redacted::new(content.into()),
            ..Self::default()
        }
    }
}

/// What the model shall continue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Prompt {
    /// Rendered by the model's own chat template. No text in it can become a control token.
    Chat {
        messages: Vec<Message>,
        /// The tools offered, as the JSON array of OpenAI's `tools`.
        tools: Option<Redacted<String>>,
    },
    /// Continued as it stands, with the model's beginning-of-text token in front. Control tokens in it are plain text.
    Text(Redacted<String>),
}

/// How the next token is drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 is greedy. Range 0 to 2.
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this. Range (0, 1]; 1 is off.
    pub top_p: f32,
    /// Only the k most probable tokens; 0 is off.
    pub top_k: u32,
    /// Only tokens at least this fraction as probable as the best. Range [0, 1); 0 is off.
    pub min_p: f32,
    /// Divides (or, when negative, multiplies) the logit of each token seen in prompt or answer. Range (0, 2]; 1 is off.
    pub repetition_penalty: f32,
    /// Taken off the logit of each token that the answer already holds. Range -2 to 2; 0 is off.
    pub presence_penalty: f32,
    /// Taken off the logit for each time the answer already holds the token. Range -2 to 2; 0 is off.
    pub frequency_penalty: f32,
    /// The same seed, prompt and model give the same answer. Without one the engine draws one.
    pub seed: Option<u64>,
    /// Added to the logits of these tokens before anything else. Range -100 (never) to 100 (always); each token once.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for Sampling {
    /// OpenAI's defaults: temperature 1 and nothing cut off.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            logit_bias: Vec::new(),
        }
    }
}

impl Sampling {
    /// Always the most probable token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks every range; the error names the parameter as OpenAI's API does.
    pub fn validate(&self) -> Result<(), InferError> {
        let within = |param: &str, value: f32, ok: bool, range: &str| {
            if ok && value.is_finite() {
                Ok(())
            } else {
                Err(InferError::invalid(
                    param,
                    format!("must be {range}, got {value}"),
                ))
            }
        };
        within(
            "temperature",
            self.temperature,
            (0.0..=2.0).contains(&self.temperature),
            "between 0 and 2",
        )?;
        within(
            "top_p",
            self.top_p,
            self.top_p > 0.0 && self.top_p <= 1.0,
            "above 0 and at most 1",
        )?;
        within(
            "min_p",
            self.min_p,
            (0.0..1.0).contains(&self.min_p),
            "at least 0 and below 1",
        )?;
        let repetition = self.repetition_penalty;
        within(
            "repetition_penalty",
            repetition,
            repetition > 0.0 && repetition <= 2.0,
            "above 0 and at most 2",
        )?;
        let presence = self.presence_penalty;
        within(
            "presence_penalty",
            presence,
            (-2.0..=2.0).contains(&presence),
            "between -2 and 2",
        )?;
        let frequency = self.frequency_penalty;
        within(
            "frequency_penalty",
            frequency,
            (-2.0..=2.0).contains(&frequency),
            "between -2 and 2",
        )?;
        if self.logit_bias.len() > MAX_LOGIT_BIASES {
            let why = format!(
                "must name at most {MAX_LOGIT_BIASES} tokens, got {}",
                self.logit_bias.len()
            );
            return Err(InferError::invalid("logit_bias", why));
        }
        self.logit_bias.iter().try_for_each(|&(_, bias)| {
            within(
                "logit_bias",
                bias,
                (-MAX_LOGIT_BIAS..=MAX_LOGIT_BIAS).contains(&bias),
                "between -100 and 100",
            )
        })
    }
}

/// What an answer must keep to, token by token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Constraint {
    /// The form of the whole answer, where it is no call.
    pub format: Option<Format>,
    /// Calls of the tools that the prompt offers.
    pub calls: Option<Calls>,
}

/// A form of text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Format {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema describes. Errors name `param`.
    Schema {
        schema: Redacted<String>,
        param: String,
    },
    /// A whole match of a regular expression, in the syntax of Rust's crate `regex` without anchors within and look-around.
    Regex {
        pattern: Redacted<String>,
        param: String,
    },
}

/// How tools may be called.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calls {
    pub choice: CallChoice,
    /// More than one call in an answer.
    pub parallel: bool,
}

/// OpenAI's `tool_choice`, where it is not `none`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CallChoice {
    /// Text or calls; what begins as a call keeps to the tool's schema.
    Auto,
    Required,
    /// This function and no other.
    Named(String),
}

/// How urgent a generation is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Class {
    /// Somebody waits for it.
    #[default]
    Interactive,
    /// Takes what interactive requests leave, and a small share beside them.
    Background,
}

/// One generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    pub tenant: TenantId,
    /// A model's id as `/v1/models` lists it.
    pub model: String,
    pub prompt: Prompt,
    /// Most tokens to generate; without it, whatever room the context leaves.
    pub max_tokens: Option<u32>,
    pub sampling: Sampling,
    /// The answer ends before the first of these; they are not part of it.
    pub stop: Vec<String>,
    /// Send the prompt's text first (`/v1/completions` with `echo`).
    pub echo: bool,
    pub constraint: Option<Constraint>,
    /// The probability of each token with those of so many others; at most [`MAX_TOP_LOGPROBS`].
    pub logprobs: Option<u8>,
    pub priority: Class,
    /// The answer must be whole so long after the engine took the request; without it, whenever it is done.
    pub timeout_ms: Option<u32>,
}

impl GenerateRequest {
    /// Everything about the request that can be judged without a model.
    pub fn validate(&self) -> Result<(), InferError> {
        self.sampling.validate()?;
        if self.stop.len() > MAX_STOP_STRINGS {
            let why = format!(
                "must hold at most {MAX_STOP_STRINGS} strings, got {}",
                self.stop.len()
            );
            return Err(InferError::invalid("stop", why));
        }
        if let Some(stop) = self
            .stop
            .iter()
            .find(|s| s.is_empty() || s.len() > MAX_STOP_BYTES)
        {
            let why = format!(
                "each string must have 1 to {MAX_STOP_BYTES} bytes, got {}",
                stop.len()
            );
            return Err(InferError::invalid("stop", why));
        }
        if self.logprobs.is_some_and(|n| n > MAX_TOP_LOGPROBS) {
            return Err(InferError::invalid(
                "top_logprobs",
                format!("must be at most {MAX_TOP_LOGPROBS}"),
            ));
        }
        if self.max_tokens == Some(0) {
            return Err(InferError::invalid(
                "max_tokens",
                "must be at least 1, got 0".into(),
            ));
        }
        let (param, bytes) = match &self.prompt {
            Prompt::Chat { messages, .. } if messages.is_empty() => {
                return Err(InferError::invalid(
                    "messages",
                    "must hold at least one message, got none".into(),
                ));
            }
            Prompt::Chat { messages, tools } => {
                let texts: usize = messages.iter().map(|m| m.content.expose().len()).sum();
                (
                    "messages",
                    texts + tools.as_ref().map_or(0, |t| t.expose().len()),
                )
            }
            Prompt::Text(text) => ("prompt", text.expose().len()),
        };
        if bytes > MAX_PROMPT_BYTES {
            return Err(InferError::invalid(
                param,
                format!("must have at most {MAX_PROMPT_BYTES} bytes, got {bytes}"),
            ));
        }
        Ok(())
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FinishReason {
    /// The model ended it, or a stop string came.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The caller went away.
    Cancelled,
}

/// What a generation streams, in this order: one `Started`, any number of `Text`, one `Finished`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    Started {
        prompt_tokens: u32,
    },
    /// Whole characters only. `tokens` are those taken since the last event; a text may lag behind its tokens.
    Text {
        text: Redacted<String>,
        tokens: Vec<u32>,
        /// One a token, if asked for.
        logprobs: Vec<TokenLogprob>,
    },
    Finished {
        reason: FinishReason,
        prompt_tokens: u32,
        /// Of the prompt, those that were found computed.
        cached_tokens: u32,
        completion_tokens: u32,
    },
}

/// How probable a token was, before temperature, bias and all else that changes the draw; natural logarithms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// What the token adds to the text, or its name if it is a control token.
    pub bytes: Redacted<Vec<u8>>,
    pub logprob: f32,
    /// The most probable tokens at this place, best first; under a constraint, of those that it allows.
    pub top: Vec<(Redacted<Vec<u8>>, f32)>,
}

/// What the embedder shall take a text for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EmbedKind {
    /// A question: e5's `query: ` goes in front.
    Query,
    /// A text to be found: e5's `passage: ` goes in front.
    Passage,
    /// As it stands.
    Raw,
}

/// A batch of texts to embed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EmbedRequest {
    pub tenant: TenantId,
    /// A model's id; without it, the cluster's first embedding model.
    pub model: Option<String>,
    pub input: Vec<Redacted<String>>,
    pub kind: EmbedKind,
}

/// One vector a text, each of length 1 (Euclidean), in the order of the request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Embeddings {
    pub vectors: Vec<Vec<f32>>,
    /// Tokens of all texts together, with prefixes and specials.
    pub prompt_tokens: usize,
}

/// A model that the cluster offers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    pub id: String,
    pub kind: ModelKind,
    /// Positions that prompt and answer share.
    pub context_tokens: u32,
    /// Some group of it can take a request now.
    pub ready: bool,
}

/// Why a request got no answer, named for what the caller can do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum InferError {
    #[error("unknown model {model:?}; this cluster has: {}", .known.join(", "))]
    UnknownModel { model: String, known: Vec<String> },
    #[error(
        "the prompt has {tokens} tokens and the model's context holds {context} including the answer; shorten the prompt"
    )]
    PromptTooLong { tokens: usize, context: usize },
    #[error("the model is not ready: {why}; try again in a moment")]
    NotReady { why: String },
    /// The answer broke off half way. Sending the request again may succeed.
    #[error("the answer was interrupted: {why}; send the request again")]
    Interrupted { why: String },
    #[error("the model has no room for another request; try again in {retry_after_s} s")]
    Overloaded { retry_after_s: u32 },
    /// The time that the request itself allowed is over.
    #[error(
        "the answer was not whole within the {timeout_ms} ms that the request allowed; allow more time or ask for fewer tokens"
    )]
    TimedOut { timeout_ms: u32 },
    #[error("{param}: {why}")]
    Invalid { param: String, why: String },
    #[error("internal error in the worker: {why}")]
    Internal { why: String },
}

impl InferError {
    pub(crate) fn invalid(param: &str, why: String) -> Self {
        Self::Invalid {
            param: param.into(),
            why,
        }
    }

    /// The same request, sent again later, may succeed.
    pub fn retryable(&self) -> bool {
        matches!(
            self,
            Self::NotReady { .. } | Self::Interrupted { .. } | Self::Overloaded { .. }
        )
    }
}

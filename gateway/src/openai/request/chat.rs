//! A chat request: what may stand in it, what is refused, what it asks of the model.

use coordinator::Redacted;
use coordinator::ids::TenantId;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;
use worker::client::{Class, Constraint, GenerateRequest, Message, Prompt, Sampling};

use super::{
    Drawing, MAX_COLLECTIONS, MAX_MESSAGES, OneOrMany, Priority, StreamOptions, check_choices,
    check_max_tokens, check_stop, check_timeout, form, include_usage, repeat,
};
use crate::error::ApiError;

/// Temperature of an answer from sources whose request names none: close to what the sources say.
pub(super) const GROUNDED_TEMPERATURE: f32 = 0.2;

/// `POST /v1/chat/completions`. Fields of OpenAI's API that are not listed are accepted and have no effect.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct ChatRequest {
    /// A model of `GET /v1/models` whose kind is `generate`.
    #[schema(example = "smollm2-135m-instruct")]
    pub model: String,
    #[schema(min_items = 1)]
    pub messages: Vec<ChatMessage>,
    /// Collections of the tenant to answer from; the answer then carries `citations`. Ours, not in OpenAI's API.
    #[serde(default)]
    pub collections: Option<Vec<String>>,
    #[serde(default)]
    pub stream: Option<bool>,
    #[serde(default)]
    pub stream_options: Option<StreamOptions>,
    /// Most tokens of the answer; without it, what the model's context leaves.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// OpenAI's newer name of `max_tokens`.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub max_completion_tokens: Option<u32>,
    /// Number of answers, 1 to 8.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 8)]
    pub n: Option<u32>,
    /// 0 (always the most probable token) to 2; 1 when absent, 0.2 for answers from collections.
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
    /// The answer ends before the first of these strings.
    #[serde(default)]
    pub stop: Option<OneOrMany>,
    /// Functions that the model may call: `{"type":"function","function":{"name","description","parameters","strict"}}`. With
    /// `strict`, a schema that cannot be kept to is an error; without, any object is taken as arguments then.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
    /// `auto`, `none`, `required`, or `{"type":"function","function":{"name":…}}`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub tool_choice: Option<Value>,
    /// Whether an answer may hold more than one call; true when absent.
    #[serde(default)]
    pub parallel_tool_calls: Option<bool>,
    /// What the answer keeps to, token by token: `{"type":"text"}`, `{"type":"json_object"}`,
    /// `{"type":"json_schema","json_schema":{"name":…,"schema":…}}`, or, not in OpenAI's API, `{"type":"regex","pattern":…}`.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub response_format: Option<Value>,
    /// Tell how probable each token was.
    #[serde(default)]
    pub logprobs: Option<bool>,
    /// With `logprobs`: the most probable tokens at each place, 0 to 20.
    #[serde(default)]
    #[schema(maximum = 20)]
    pub top_logprobs: Option<u32>,
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
    #[schema(value_type = Option<Vec<Object>>)]
    pub functions: Option<Vec<Value>>,
    #[serde(default)]
    pub modalities: Option<Vec<String>>,
}

/// One message of a conversation.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    #[schema(example = "user")]
    pub role: String,
    #[serde(default)]
    pub content: Option<Content>,
    #[serde(default)]
    pub name: Option<String>,
    /// Calls that the assistant made.
    #[serde(default)]
    #[schema(value_type = Option<Vec<Object>>)]
    pub tool_calls: Option<Vec<Value>>,
    /// The call that a `tool` message answers.
    #[serde(default)]
    pub tool_call_id: Option<String>,
}

/// A message's text, whole or in parts.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(
    untagged,
    expecting = "expected a string or an array of parts like {\"type\":\"text\",\"text\":…}"
)]
pub enum Content {
    #[schema(value_type = String)]
    Text(Redacted<String>),
    Parts(Vec<Part>),
}

/// A part of a message; only text is read.
#[derive(Debug, Clone, Deserialize, ToSchema)]
pub struct Part {
    /// `text`.
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub text: Option<Redacted<String>>,
}

/// A checked chat request.
#[derive(Debug)]
pub struct Chat {
    pub model: String,
    pub messages: Vec<Message>,
    /// The tools offered, as the JSON array that came.
    pub tools: Option<Redacted<String>>,
    /// Their names.
    pub tool_names: Vec<String>,
    pub constraint: Option<Constraint>,
    pub logprobs: Option<u8>,
    pub collections: Vec<String>,
    pub max_tokens: Option<u32>,
    pub choices: usize,
    pub sampling: Sampling,
    pub stop: Vec<String>,
    pub priority: Class,
    pub timeout_ms: Option<u32>,
    pub stream: bool,
    pub include_usage: bool,
}

impl ChatRequest {
    /// Checks everything that can be judged without the cluster.
    pub fn check(self) -> Result<Chat, ApiError> {
        self.refuse_what_is_not_offered()?;
        if self.messages.is_empty() || self.messages.len() > MAX_MESSAGES {
            let message = format!(
                "messages: expected 1 to {MAX_MESSAGES} messages, got {}",
                self.messages.len()
            );
            return Err(ApiError::invalid("messages", message));
        }
        let messages: Result<Vec<_>, _> = self
            .messages
            .into_iter()
            .enumerate()
            .map(|(i, message)| message.check(&format!("messages[{i}]")))
            .collect();
        let collections = self.collections.unwrap_or_default();
        if collections.len() > MAX_COLLECTIONS {
            let message = format!(
                "collections: expected at most {MAX_COLLECTIONS}, got {}",
                collections.len()
            );
            return Err(ApiError::invalid("collections", message));
        }
        let temperature = if collections.is_empty() {
            1.0
        } else {
            GROUNDED_TEMPERATURE
        };
        let stream = self.stream.unwrap_or(false);
        let tools = form::tools(
            self.tools,
            self.tool_choice.as_ref(),
            self.parallel_tool_calls,
        )?;
        let format = form::response_format(self.response_format.as_ref())?;
        let constraint = Constraint {
            format,
            calls: tools.calls,
        };
        let offered = tools.offered;
        let chat = Chat {
            messages: messages?,
            tools: (!offered.is_empty()).then(|| Redacted::new(Value::Array(offered).to_string())),
            tool_names: tools.names,
            constraint: (constraint != Constraint::default()).then_some(constraint),
            logprobs: form::logprobs(self.logprobs, self.top_logprobs)?,
            collections,
            max_tokens: check_max_tokens(self.max_tokens, self.max_completion_tokens)?,
            choices: check_choices(self.n)?,
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
            .sampling(temperature)?,
            stop: check_stop(self.stop)?,
            priority: self.priority.map(Priority::class).unwrap_or_default(),
            timeout_ms: check_timeout(self.timeout_ms)?,
            stream,
            include_usage: include_usage(stream, self.stream_options)?,
            model: self.model,
        };
        Ok(chat)
    }

    fn refuse_what_is_not_offered(&self) -> Result<(), ApiError> {
        if self
            .functions
            .as_ref()
            .is_some_and(|functions| !functions.is_empty())
        {
            return Err(ApiError::unsupported(
                "functions",
                "functions: expected nothing; send `tools` instead",
            ));
        }
        if self
            .modalities
            .as_ref()
            .is_some_and(|m| m.iter().any(|m| m != "text"))
        {
            return Err(ApiError::unsupported(
                "modalities",
                "modalities: expected [\"text\"]; this server writes text only",
            ));
        }
        Ok(())
    }
}

impl Chat {
    /// The generations that this chat asks for, one a choice.
    pub fn generations(&self, tenant: &TenantId) -> Vec<GenerateRequest> {
        let prompt = Prompt::Chat {
            messages: self.messages.clone(),
            tools: self.tools.clone(),
        };
        let request = GenerateRequest {
            tenant: tenant.clone(),
            model: self.model.clone(),
            prompt,
            max_tokens: self.max_tokens,
            sampling: self.sampling.clone(),
            stop: self.stop.clone(),
            echo: false,
            constraint: self.constraint.clone(),
            logprobs: self.logprobs,
            priority: self.priority,
            timeout_ms: self.timeout_ms,
        };
        repeat(request, self.choices)
    }
}

impl ChatMessage {
    fn check(self, at: &str) -> Result<Message, ApiError> {
        let role = match self.role.as_str() {
            // OpenAI's newer name; the models here know `system`.
            "developer" => "system",
            role @ ("system" | "user" | "assistant" | "tool") => role,
            _ => {
                let got: String = self.role.chars().take(40).collect();
                let message = format!(
                    "{at}.role: expected system, developer, user, assistant or tool, got {got:?}"
                );
                return Err(ApiError::invalid(format!("{at}.role"), message));
            }
        };
        let calls = self.tool_calls.filter(|calls| !calls.is_empty());
        if let Some(calls) = &calls {
            for (i, call) in calls.iter().enumerate() {
                if call
                    .pointer("/function/name")
                    .and_then(Value::as_str)
                    .is_none()
                {
                    let param = format!("{at}.tool_calls[{i}]");
                    let message = format!(
                        "{param}: expected {{\"id\",\"type\":\"function\",\"function\":{{\"name\",\"arguments\"}}}}"
                    );
                    return Err(ApiError::invalid(param, message));
                }
            }
        }
        let content = match self.content {
            Some(content) => content.text(at)?,
            None if role == "assistant" && calls.is_some() => Redacted::new(String::new()),
            None => {
                let message =
                    format!("{at}.content: expected a string or an array of parts, got nothing");
                return Err(ApiError::invalid(format!("{at}.content"), message));
            }
        };
        Ok(Message {
            role: role.to_owned(),
            content,
            name: self.name,
            tool_calls: calls.map(|calls| Redacted::new(Value::Array(calls).to_string())),
            tool_call_id: self.tool_call_id,
        })
    }
}

impl Content {
    fn text(self, at: &str) -> Result<Redacted<String>, ApiError> {
        let parts = match self {
            Self::Text(text) => return Ok(text),
            Self::Parts(parts) => parts,
        };
        let mut whole = String::new();
        for (i, part) in parts.into_iter().enumerate() {
            let param = format!("{at}.content[{i}]");
            if part.kind != "text" {
                let got: String = part.kind.chars().take(40).collect();
                let message = format!(
                    "{param}.type: expected \"text\", got {got:?}; the models here read text only"
                );
                return Err(ApiError::unsupported(format!("{param}.type"), message));
            }
            let Some(text) = part.text else {
                return Err(ApiError::invalid(
                    format!("{param}.text"),
                    format!("{param}.text: expected a string, got nothing"),
                ));
            };
            if !whole.is_empty() {
                whole.push('\n');
            }
            whole.push_str(text.expose());
        }
        Ok(Redacted::new(whole))
    }
}

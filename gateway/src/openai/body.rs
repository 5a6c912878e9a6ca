//! The bodies of answers and of chunks, as OpenAI's API defines them. Pure.

use coordinator::Redacted;
use serde::Serialize;
use utoipa::ToSchema;

use crate::openai::logprobs::{ChatLogprobs, TextLogprobs};
use crate::openai::tools::{ToolCall, ToolCallDelta};
use crate::sources::Citation;

/// Numbers of tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: PromptDetails,
    pub completion_tokens_details: CompletionDetails,
}

/// Of the prompt's tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptDetails {
    /// Taken from the prefix cache instead of computed.
    pub cached_tokens: u64,
}

/// Of the answer's tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct CompletionDetails {
    /// 0: no model here thinks apart from its answer.
    pub reasoning_tokens: u64,
}

/// A whole answer to a chat.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    #[schema(example = "chatcmpl-0190c0de")]
    pub id: String,
    /// `chat.completion`.
    pub object: &'static str,
    /// Seconds since the Unix epoch.
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    /// Present when the request named collections: the passages that the answer was made from, numbered as `[1]` in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub citations: Option<Vec<Citation>>,
}

/// One answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: usize,
    pub message: AssistantMessage,
    /// With `logprobs`: how probable each token was.
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    pub finish_reason: &'static str,
}

/// What the model wrote.
#[derive(Debug, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// `assistant`.
    pub role: &'static str,
    #[schema(value_type = Option<String>)]
    pub content: Option<Redacted<String>>,
    #[schema(value_type = Option<String>)]
    pub refusal: Option<()>,
    /// Tools that the model wants called; `content` is null then, unless it said something before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCall>>,
}

/// A whole answer to a text completion.
#[derive(Debug, Serialize, ToSchema)]
pub struct TextCompletion {
    pub id: String,
    /// `text_completion`.
    pub object: &'static str,
    /// Seconds since the Unix epoch.
    pub created: u64,
    pub model: String,
    pub choices: Vec<TextChoice>,
    /// In a stream only with `include_usage`: null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
}

/// One continuation.
#[derive(Debug, Serialize, ToSchema)]
pub struct TextChoice {
    pub index: usize,
    #[schema(value_type = String)]
    pub text: Redacted<String>,
    /// With `logprobs`: how probable each token was.
    pub logprobs: Option<TextLogprobs>,
    /// `stop` or `length`; null in a chunk that is not the choice's last.
    pub finish_reason: Option<&'static str>,
}

/// A piece of a streamed chat answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunk {
    pub id: String,
    /// `chat.completion.chunk`.
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    /// Empty in the chunk that carries the usage.
    pub choices: Vec<ChunkChoice>,
    /// With `include_usage`: null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Option<Usage>>,
    /// In the first chunk, so that `[1]` can be linked at once, and in the last before `[DONE]`, which also says which
    /// passages the answer refers to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub citations: Option<Vec<Citation>>,
}

/// A piece of one answer.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChunkChoice {
    pub index: usize,
    pub delta: Delta,
    /// With `logprobs`: of the tokens since the last chunk.
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
}

/// What a chunk adds.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub content: Option<Redacted<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<ToolCallDelta>>,
}

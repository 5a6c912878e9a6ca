//! Events of generations into OpenAI's answers: whole ones and chunks of a stream. Pure.

use coordinator::Redacted;
use serde::Serialize;
use utoipa::ToSchema;
use worker::client::{Event, FinishReason};

use crate::error::ApiError;
use crate::openai::tools::{self, ToolCall};
use crate::sources::Citation;

/// How an answer is dressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Chat,
    Completion,
}

/// Numbers of tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
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
    #[schema(value_type = Option<Object>)]
    pub logprobs: Option<()>,
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
    /// Tools that the model wants called; `content` is null then.
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
    #[schema(value_type = Option<Object>)]
    pub logprobs: Option<()>,
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
    #[schema(value_type = Option<Object>)]
    pub logprobs: Option<()>,
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
    pub tool_calls: Option<Vec<ToolCall>>,
}

/// Collects what came of each choice and dresses it, whole or piece by piece.
#[derive(Debug)]
pub struct Answer {
    form: Form,
    id: String,
    created: u64,
    model: String,
    choices: Vec<Choice>,
    /// Choices that share a prompt stand side by side, so many each.
    per_prompt: usize,
    include_usage: bool,
    /// Names of the tools that the model may call.
    tools: Vec<String>,
    /// `None`: the request named no collections.
    citations: Option<Vec<Citation>>,
}

#[derive(Debug, Default)]
struct Choice {
    text: String,
    /// Bytes of the text that were sent; the rest may be a call.
    sent: usize,
    calls: Vec<ToolCall>,
    prompt_tokens: u64,
    completion_tokens: u64,
    finish: Option<&'static str>,
}

impl Choice {
    /// The text that was not sent yet, which counts as sent from now on.
    fn unsent(&mut self) -> Option<Redacted<String>> {
        let text = self.text.get(self.sent..).filter(|text| !text.is_empty())?;
        let text = Redacted::new(text.to_owned());
        self.sent = self.text.len();
        Some(text)
    }
}

impl Answer {
    /// An answer with `choices` choices of which nothing has come. `created` in seconds since the Unix epoch.
    pub fn new(form: Form, id: String, created: u64, model: &str, choices: usize) -> Self {
        Self {
            form,
            id,
            created,
            model: model.to_owned(),
            choices: (0..choices).map(|_| Choice::default()).collect(),
            per_prompt: choices.max(1),
            include_usage: false,
            tools: Vec::new(),
            citations: None,
        }
    }

    /// With a new prompt after every `choices` choices.
    #[must_use]
    pub fn per_prompt(mut self, choices: usize) -> Self {
        self.per_prompt = choices.max(1);
        self
    }

    /// With a last chunk that carries the usage.
    #[must_use]
    pub fn include_usage(mut self, include: bool) -> Self {
        self.include_usage = include;
        self
    }

    /// For a model that may call tools of these names.
    #[must_use]
    pub fn with_tools(mut self, names: Vec<String>) -> Self {
        self.tools = names;
        self
    }

    /// With the passages that the answer is made from.
    #[must_use]
    pub fn with_citations(mut self, citations: Option<Vec<Citation>>) -> Self {
        self.citations = citations;
        self
    }

    /// Takes an event of choice `index`. An `Err` ends the whole answer.
    pub fn take(&mut self, index: usize, event: Event) -> Result<Vec<String>, ApiError> {
        let Some(choice) = self.choices.get_mut(index) else {
            return Err(ApiError::internal(
                "an event came for a choice that was not asked for",
            ));
        };
        match event {
            Event::Started { prompt_tokens } => {
                choice.prompt_tokens = u64::from(prompt_tokens);
                Ok(Vec::new())
            }
            Event::Text { text, tokens } => {
                choice.completion_tokens += tokens.len() as u64;
                choice.text.push_str(text.expose());
                let held = !self.tools.is_empty() && tools::may_be_calls(&choice.text);
                let fresh = if held { None } else { choice.unsent() };
                Ok(fresh
                    .map(|text| self.text_chunk(index, text))
                    .into_iter()
                    .collect())
            }
            Event::Finished {
                reason,
                prompt_tokens,
                completion_tokens,
            } => {
                choice.prompt_tokens = u64::from(prompt_tokens);
                choice.completion_tokens = u64::from(completion_tokens);
                let reason = match reason {
                    FinishReason::Stop => "stop",
                    FinishReason::Length => "length",
                    FinishReason::Cancelled => {
                        return Err(ApiError::unavailable(
                            "interrupted",
                            "the answer was ended by the server; send the request again",
                        ));
                    }
                };
                Ok(self.finish(index, reason))
            }
        }
    }

    /// A choice's last chunks: what was held back as text or as calls, and the reason.
    fn finish(&mut self, index: usize, reason: &'static str) -> Vec<String> {
        let id = format!("{}{index}", self.id.rsplit('-').next().unwrap_or_default());
        let Some(choice) = self.choices.get_mut(index) else {
            return Vec::new();
        };
        let calls = if self.tools.is_empty() || choice.sent > 0 {
            None
        } else {
            tools::parse(&choice.text, &self.tools, &id)
        };
        let mut chunks = Vec::new();
        let reason = if let Some(calls) = calls {
            choice.calls = calls;
            choice.finish = Some("tool_calls");
            chunks.push(self.calls_chunk(index));
            "tool_calls"
        } else {
            choice.finish = Some(reason);
            chunks.extend(choice.unsent().map(|text| self.text_chunk(index, text)));
            reason
        };
        chunks.push(self.finish_chunk(index, reason));
        chunks
    }

    /// Whether every choice has its end.
    pub fn is_complete(&self) -> bool {
        self.choices.iter().all(|choice| choice.finish.is_some())
    }

    /// The chunks that open a stream: a chat's say who speaks.
    pub fn opening(&self) -> Vec<String> {
        if self.form == Form::Completion {
            return Vec::new();
        }
        let choices = (0..self.choices.len()).map(|index| ChunkChoice {
            index,
            delta: Delta {
                role: Some("assistant"),
                content: Some(Redacted::new(String::new())),
                tool_calls: None,
            },
            logprobs: None,
            finish_reason: None,
        });
        choices
            .enumerate()
            .map(|(i, choice)| {
                let citations = if i == 0 { self.citations.clone() } else { None };
                self.chat_chunk(vec![choice], self.unknown_usage(), citations)
            })
            .collect()
    }

    /// The chunks after all choices have ended, without `[DONE]`.
    pub fn closing(&self) -> Vec<String> {
        // The last finish chunk carries the citations, unless the usage comes after it.
        if !self.include_usage {
            return Vec::new();
        }
        vec![match self.form {
            Form::Chat => {
                self.chat_chunk(Vec::new(), Some(Some(self.usage())), self.used_citations())
            }
            Form::Completion => json(&self.text_completion(Vec::new(), Some(Some(self.usage())))),
        }]
    }

    /// Tokens of all choices; a prompt counts once, however many answers it got.
    pub fn usage(&self) -> Usage {
        let prompts = self.choices.chunks(self.per_prompt);
        let prompt_tokens = prompts
            .map(|same| {
                same.iter()
                    .map(|choice| choice.prompt_tokens)
                    .max()
                    .unwrap_or(0)
            })
            .sum();
        let completion_tokens = self
            .choices
            .iter()
            .map(|choice| choice.completion_tokens)
            .sum();
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
        }
    }

    /// The whole answer as JSON.
    pub fn whole(self) -> String {
        let usage = self.usage();
        let citations = self.used_citations();
        match self.form {
            Form::Chat => json(&ChatCompletion {
                object: "chat.completion",
                choices: self
                    .choices
                    .into_iter()
                    .enumerate()
                    .map(|(index, choice)| ChatChoice {
                        index,
                        message: AssistantMessage {
                            role: "assistant",
                            content: choice.calls.is_empty().then(|| Redacted::new(choice.text)),
                            refusal: None,
                            tool_calls: (!choice.calls.is_empty()).then_some(choice.calls),
                        },
                        logprobs: None,
                        finish_reason: choice.finish.unwrap_or("stop"),
                    })
                    .collect(),
                id: self.id,
                created: self.created,
                model: self.model,
                usage,
                citations,
            }),
            Form::Completion => {
                let choices = self
                    .choices
                    .iter()
                    .enumerate()
                    .map(|(index, choice)| TextChoice {
                        index,
                        text: Redacted::new(choice.text.clone()),
                        logprobs: None,
                        finish_reason: choice.finish,
                    })
                    .collect();
                json(&self.text_completion(choices, Some(Some(usage))))
            }
        }
    }

    fn calls_chunk(&self, index: usize) -> String {
        let calls = self
            .choices
            .get(index)
            .map(|choice| choice.calls.as_slice())
            .unwrap_or_default();
        let numbered = calls.iter().cloned().enumerate().map(|(i, call)| ToolCall {
            index: Some(i),
            ..call
        });
        let delta = Delta {
            role: None,
            content: None,
            tool_calls: Some(numbered.collect()),
        };
        let choice = ChunkChoice {
            index,
            delta,
            logprobs: None,
            finish_reason: None,
        };
        self.chat_chunk(vec![choice], self.unknown_usage(), None)
    }

    fn text_chunk(&self, index: usize, text: Redacted<String>) -> String {
        match self.form {
            Form::Chat => {
                let delta = Delta {
                    role: None,
                    content: Some(text),
                    tool_calls: None,
                };
                let choice = ChunkChoice {
                    index,
                    delta,
                    logprobs: None,
                    finish_reason: None,
                };
                self.chat_chunk(vec![choice], self.unknown_usage(), None)
            }
            Form::Completion => {
                let choice = TextChoice {
                    index,
                    text,
                    logprobs: None,
                    finish_reason: None,
                };
                json(&self.text_completion(vec![choice], self.unknown_usage()))
            }
        }
    }

    fn finish_chunk(&self, index: usize, reason: &'static str) -> String {
        match self.form {
            Form::Chat => {
                let is_last = self.is_complete() && !self.include_usage;
                let choice = ChunkChoice {
                    index,
                    delta: Delta::default(),
                    logprobs: None,
                    finish_reason: Some(reason),
                };
                let citations = if is_last { self.used_citations() } else { None };
                self.chat_chunk(vec![choice], self.unknown_usage(), citations)
            }
            Form::Completion => {
                let text = Redacted::new(String::new());
                let choice = TextChoice {
                    index,
                    text,
                    logprobs: None,
                    finish_reason: Some(reason),
                };
                json(&self.text_completion(vec![choice], self.unknown_usage()))
            }
        }
    }

    fn chat_chunk(
        &self,
        choices: Vec<ChunkChoice>,
        usage: Option<Option<Usage>>,
        citations: Option<Vec<Citation>>,
    ) -> String {
        json(&ChatChunk {
            id: self.id.clone(),
            object: "chat.completion.chunk",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
            citations,
        })
    }

    fn text_completion(
        &self,
        choices: Vec<TextChoice>,
        usage: Option<Option<Usage>>,
    ) -> TextCompletion {
        TextCompletion {
            id: self.id.clone(),
            object: "text_completion",
            created: self.created,
            model: self.model.clone(),
            choices,
            usage,
        }
    }

    /// `usage: null` in the chunks before the one that carries it, as OpenAI's API says.
    fn unknown_usage(&self) -> Option<Option<Usage>> {
        self.include_usage.then_some(None)
    }

    fn used_citations(&self) -> Option<Vec<Citation>> {
        let mut citations = self.citations.clone()?;
        for choice in &self.choices {
            crate::sources::mark_cited(&mut citations, &choice.text);
        }
        Some(citations)
    }
}

/// Serialising these types cannot fail: no map with other keys than strings, no fallible `Serialize`.
fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| String::from("{}"))
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;

//! Events of generations into OpenAI's answers: whole ones and chunks of a stream. Pure.

use coordinator::Redacted;
use serde::Serialize;
use worker::client::{Event, FinishReason, TokenLogprob};

use crate::error::ApiError;
use crate::openai::body::{
    AssistantMessage, ChatChoice, ChatChunk, ChatCompletion, ChunkChoice, CompletionDetails, Delta,
    PromptDetails, TextChoice, TextCompletion, Usage,
};
use crate::openai::logprobs::{ChatLogprobs, TextLogprobs};
use crate::openai::tools::{FunctionCall, FunctionDelta, Piece, Reader, ToolCall, ToolCallDelta};
use crate::sources::Citation;

/// How an answer is dressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Chat,
    Completion,
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
    /// `None`: the request named no collections.
    citations: Option<Vec<Citation>>,
}

#[derive(Debug, Default)]
struct Choice {
    text: String,
    /// Tells calls from text, where tools were offered.
    reader: Option<Reader>,
    calls: Vec<ToolCall>,
    logprobs: Vec<TokenLogprob>,
    /// Of those, told in chunks.
    told: usize,
    prompt_tokens: u64,
    cached_tokens: u64,
    completion_tokens: u64,
    finish: Option<&'static str>,
}

impl Choice {
    /// The probabilities that no chunk has told yet.
    fn untold(&mut self) -> &[TokenLogprob] {
        let from = std::mem::replace(&mut self.told, self.logprobs.len());
        self.logprobs.get(from..).unwrap_or_default()
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
    pub fn with_tools(mut self, names: &[String]) -> Self {
        for choice in &mut self.choices {
            choice.reader = (!names.is_empty()).then(|| Reader::new(names.to_vec()));
        }
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
            Event::Text {
                text,
                tokens,
                logprobs,
            } => {
                choice.completion_tokens += tokens.len() as u64;
                choice.logprobs.extend(logprobs);
                let pieces = match &mut choice.reader {
                    Some(reader) => reader.push(text.expose()),
                    None if text.expose().is_empty() => Vec::new(),
                    None => vec![Piece::Text(text.into_inner())],
                };
                Ok(self.take_pieces(index, pieces))
            }
            Event::Finished {
                reason,
                prompt_tokens,
                cached_tokens,
                completion_tokens,
            } => {
                choice.prompt_tokens = u64::from(prompt_tokens);
                choice.cached_tokens = u64::from(cached_tokens);
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

    /// Adds pieces to a choice; their chunks.
    fn take_pieces(&mut self, index: usize, pieces: Vec<Piece>) -> Vec<String> {
        let id = self.id.rsplit('-').next().unwrap_or_default().to_owned();
        let mut chunks = Vec::new();
        for piece in pieces {
            let Some(choice) = self.choices.get_mut(index) else {
                break;
            };
            let delta = |call: ToolCallDelta| Delta {
                tool_calls: Some(vec![call]),
                ..Delta::default()
            };
            let delta = match piece {
                Piece::Text(text) => {
                    let offset = choice.text.chars().count();
                    choice.text.push_str(&text);
                    let text = Redacted::new(text);
                    chunks.push(self.text_chunk(index, text, offset));
                    continue;
                }
                Piece::Call(name) => {
                    let call = ToolCall {
                        id: format!("call_{id}{index}{}", choice.calls.len()),
                        kind: "function",
                        function: FunctionCall {
                            name: name.clone(),
                            arguments: Redacted::default(),
                        },
                    };
                    choice.calls.push(call.clone());
                    delta(ToolCallDelta {
                        index: choice.calls.len() - 1,
                        id: Some(call.id),
                        kind: Some(call.kind),
                        function: FunctionDelta {
                            name: Some(name),
                            arguments: Redacted::default(),
                        },
                    })
                }
                Piece::Arguments(text) => {
                    let at = choice.calls.len().saturating_sub(1);
                    let Some(call) = choice.calls.last_mut() else {
                        continue;
                    };
                    call.function.arguments.expose_mut().push_str(&text);
                    delta(ToolCallDelta {
                        index: at,
                        id: None,
                        kind: None,
                        function: FunctionDelta {
                            name: None,
                            arguments: Redacted::new(text),
                        },
                    })
                }
            };
            chunks.push(self.delta_chunk(index, delta));
        }
        chunks
    }

    /// A choice's last chunks: what was held back as text or as calls, and the reason.
    fn finish(&mut self, index: usize, reason: &'static str) -> Vec<String> {
        let held = self
            .choices
            .get_mut(index)
            .and_then(|choice| choice.reader.as_mut())
            .map(Reader::finish);
        let mut chunks = self.take_pieces(index, held.unwrap_or_default());
        let Some(choice) = self.choices.get_mut(index) else {
            return chunks;
        };
        let reason = if reason == "stop" && !choice.calls.is_empty() {
            "tool_calls"
        } else {
            reason
        };
        choice.finish = Some(reason);
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
                content: Some(Redacted::default()),
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
        let (mut prompt_tokens, mut cached_tokens) = (0, 0);
        for same in self.choices.chunks(self.per_prompt) {
            prompt_tokens += same.iter().map(|c| c.prompt_tokens).max().unwrap_or(0);
            // What the first answer had to compute the others find in the cache.
            cached_tokens += same.iter().map(|c| c.cached_tokens).min().unwrap_or(0);
        }
        let completion_tokens = self
            .choices
            .iter()
            .map(|choice| choice.completion_tokens)
            .sum();
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails { cached_tokens },
            completion_tokens_details: CompletionDetails::default(),
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
                            content: (choice.calls.is_empty() || !choice.text.is_empty())
                                .then(|| Redacted::new(choice.text)),
                            refusal: None,
                            tool_calls: (!choice.calls.is_empty()).then_some(choice.calls),
                        },
                        logprobs: ChatLogprobs::of(&choice.logprobs),
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
                        logprobs: TextLogprobs::of(&choice.logprobs, 0),
                        finish_reason: choice.finish,
                    })
                    .collect();
                json(&self.text_completion(choices, Some(Some(usage))))
            }
        }
    }

    fn delta_chunk(&mut self, index: usize, delta: Delta) -> String {
        let untold = self.choices.get_mut(index).map(Choice::untold);
        let choice = ChunkChoice {
            index,
            delta,
            logprobs: untold.and_then(ChatLogprobs::of),
            finish_reason: None,
        };
        self.chat_chunk(vec![choice], self.unknown_usage(), None)
    }

    /// `offset` is where the text stands in the choice's, in characters.
    fn text_chunk(&mut self, index: usize, text: Redacted<String>, offset: usize) -> String {
        if self.form == Form::Chat {
            let delta = Delta {
                content: Some(text),
                ..Delta::default()
            };
            return self.delta_chunk(index, delta);
        }
        let untold = self.choices.get_mut(index).map(Choice::untold);
        let choice = TextChoice {
            index,
            text,
            logprobs: untold.and_then(|untold| TextLogprobs::of(untold, offset)),
            finish_reason: None,
        };
        json(&self.text_completion(vec![choice], self.unknown_usage()))
    }

    fn finish_chunk(&mut self, index: usize, reason: &'static str) -> String {
        // Of tokens whose text did not come, as those of a stop string.
        let untold = match self.choices.get_mut(index) {
            Some(choice) => choice.untold().to_vec(),
            None => Vec::new(),
        };
        let offset = self
            .choices
            .get(index)
            .map_or(0, |choice| choice.text.chars().count());
        match self.form {
            Form::Chat => {
                let is_last = self.is_complete() && !self.include_usage;
                let choice = ChunkChoice {
                    index,
                    delta: Delta::default(),
                    logprobs: ChatLogprobs::of(&untold),
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
                    logprobs: TextLogprobs::of(&untold, offset),
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

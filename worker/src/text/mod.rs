//! Text and tokens: vocabularies, encoding, decoding while it streams, stop strings and chat templates.
//!
//! What a user wrote is never parsed for control tokens: [`Tokenizer::encode`] does it only when asked to, and
//! [`ChatTemplate`] marks users' strings so that the parsed parts are the template's own. Models, logits and
//! requests do not belong here.

mod bpe;
mod detokenize;
mod python_json;
mod sentencepiece;
mod source;
mod specials;
mod template;
mod tiktoken;
mod tokenizer;
mod unigram;
mod vocabulary;

pub use detokenize::{Detokenizer, StopMatcher, StopOutcome};
pub use source::{TextSide, load};
pub use specials::Parse;
pub use template::{CallForm, ChatInput, ChatTemplate, Rendered};
pub use tokenizer::Tokenizer;
pub use vocabulary::{TokenKind, Vocabulary};

/// Why a tokenizer or template cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "the model's tokenizer has no {key}: a byte-pair vocabulary needs its merges; convert the model again from its original files"
    )]
    NoMerges { key: String },
    #[error("tokenizer field {key}: expected {expected}, got {got}")]
    Broken {
        key: String,
        expected: String,
        got: String,
    },
    #[error("tokenizer kind {got:?} is not supported; supported: {}", .supported.join(", "))]
    Unsupported {
        got: String,
        supported: Vec<&'static str>,
    },
    #[error("the model has no chat template; send the prompt as plain text to /v1/completions")]
    NoTemplate,
    #[error("chat template: {0}")]
    Template(String),
    /// The template itself refused the messages (its `raise_exception`).
    #[error("the model's chat template does not accept these messages: {0}")]
    Refused(String),
    #[error("tokenizer: {0}")]
    Encode(String),
}

impl Error {
    pub(crate) fn broken(key: &str, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Broken {
            key: key.into(),
            expected: expected.into(),
            got: got.into(),
        }
    }
}

#[cfg(test)]
mod tests;

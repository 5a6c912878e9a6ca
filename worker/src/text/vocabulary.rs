//! A vocabulary as a model file states it, before anything is built from it.

use serde::Deserialize;

use super::Error;

/// Most tokens in a vocabulary: four times the largest in use, and small enough that a hostile file cannot exhaust memory.
pub const MAX_TOKENS: usize = 1 << 20;
/// Longest token in bytes; real ones stay below 300.
pub const MAX_TOKEN_BYTES: usize = 4096;

/// What a token is for, numbered as GGUF's `tokenizer.ggml.token_type` numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    Normal,
    Unknown,
    /// Steers the model (turn ends, headers, tools). Never made from a user's text.
    Control,
    /// An added token that is ordinary text.
    UserDefined,
    Unused,
    /// One raw byte (`<0x0A>`).
    Byte,
}

impl TokenKind {
    /// Kinds that GGUF does not define count as normal tokens.
    pub fn from_gguf(number: i64) -> Self {
        match number {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }

    /// The number that GGUF gives this kind.
    pub fn to_gguf(self) -> i32 {
        match self {
            Self::Normal => 1,
            Self::Unknown => 2,
            Self::Control => 3,
            Self::UserDefined => 4,
            Self::Unused => 5,
            Self::Byte => 6,
        }
    }
}

/// The tokenizer's metadata of a GGUF file; field names follow its keys `tokenizer.ggml.*`.
#[derive(Debug, Clone, Default)]
pub struct Vocabulary {
    /// `gpt2` (byte-level BPE), `llama` (SentencePiece BPE) or `t5` (SentencePiece unigram).
    pub model: String,
    /// Which pre-tokeniser splits the text before BPE.
    pub pre: Option<String>,
    pub tokens: Vec<String>,
    /// One a token, or empty.
    pub scores: Vec<f32>,
    /// One a token, or empty.
    pub kinds: Vec<TokenKind>,
    /// `left right`, best first.
    pub merges: Vec<String>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub eot: Option<u32>,
    pub unknown: Option<u32>,
    /// Absent means: as the model family does.
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    pub add_space_prefix: Option<bool>,
    /// SentencePiece's compiled normaliser.
    pub precompiled_charsmap: Vec<u8>,
    /// Our own normaliser for files without a charsmap: runs of `code point, count, replacement code points…`.
    pub normalizer_map: Vec<u32>,
}

impl Vocabulary {
    /// Checks sizes and ids, so that what is built from it may index freely.
    pub fn validate(&self) -> Result<(), Error> {
        let tokens = self.tokens.len();
        if tokens == 0 || tokens > MAX_TOKENS {
            return Err(Error::broken(
                "tokenizer.ggml.tokens",
                format!("1 to {MAX_TOKENS} tokens"),
                format!("{tokens}"),
            ));
        }
        for (key, got) in [
            ("scores", self.scores.len()),
            ("token_type", self.kinds.len()),
        ] {
            if got != 0 && got != tokens {
                let key = format!("tokenizer.ggml.{key}");
                return Err(Error::broken(
                    &key,
                    format!("one entry for each of {tokens} tokens"),
                    format!("{got}"),
                ));
            }
        }
        if let Some(token) = self.tokens.iter().find(|t| t.len() > MAX_TOKEN_BYTES) {
            let got = format!("one of {}", token.len());
            return Err(Error::broken(
                "tokenizer.ggml.tokens",
                format!("tokens of at most {MAX_TOKEN_BYTES} bytes"),
                got,
            ));
        }
        let ids = [
            ("bos", self.bos),
            ("eos", self.eos),
            ("eot", self.eot),
            ("unknown", self.unknown),
        ];
        for (name, id) in ids {
            if let Some(id) = id.filter(|&id| id as usize >= tokens) {
                let key = format!("tokenizer.ggml.{name}_token_id");
                return Err(Error::broken(
                    &key,
                    format!("an id below {tokens}"),
                    format!("{id}"),
                ));
            }
        }
        Ok(())
    }

    /// The kind of token `id`; normal where the file does not say.
    pub fn kind(&self, id: usize) -> TokenKind {
        self.kinds.get(id).copied().unwrap_or(TokenKind::Normal)
    }
}

/// A token that `tokenizer.json` lists beside its model.
#[derive(Debug, Clone, Deserialize)]
pub struct AddedToken {
    pub id: u32,
    pub content: String,
    #[serde(default)]
    pub special: bool,
}

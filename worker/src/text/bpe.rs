//! Byte-level BPE by the crate `tokenizers`, built from each source of a vocabulary.

use std::collections::HashSet;
use std::sync::LazyLock;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::Error;
use super::vocabulary::Vocabulary;

/// Llama 3's split, as its reference tokenizer states it.
pub(super) const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's split: Llama 3's with single digits.
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SUPPORTED_PRE: [&str; 5] = ["llama-bpe", "smollm", "gpt-2", "qwen2", "default"];

/// How a text is cut before BPE merges within each cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    Llama3,
    Qwen2,
    /// GPT-2's split with every digit alone.
    SmolLm,
    Gpt2,
}

impl PreTokenizer {
    /// By the name in `tokenizer.ggml.pre`. A file without one gets GPT-2's, as everywhere.
    pub(super) fn from_gguf(pre: Option<&str>) -> Result<Self, Error> {
        match pre {
            Some("llama-bpe" | "llama3" | "llama-v3" | "smaug-bpe" | "dbrx") => Ok(Self::Llama3),
            Some("qwen2" | "deepseek-r1-qwen") => Ok(Self::Qwen2),
            Some("smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone") => {
                Ok(Self::SmolLm)
            }
            None | Some("default" | "gpt-2" | "gpt2" | "mpt" | "olmo" | "phi-2" | "jina-v2-en") => {
                Ok(Self::Gpt2)
            }
            Some(other) => Err(Error::Unsupported {
                got: other.into(),
                supported: SUPPORTED_PRE.to_vec(),
            }),
        }
    }

    fn build(self) -> Result<PreTokenizerWrapper, Error> {
        let split = |pattern: &str| {
            Split::new(
                SplitPattern::Regex(pattern.into()),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .map_err(|e| Error::Encode(e.to_string()))
        };
        let bytes =
            |split: bool| PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, false, split));
        let steps = match self {
            Self::Llama3 => vec![split(LLAMA3_SPLIT)?.into(), bytes(false)],
            Self::Qwen2 => vec![split(QWEN2_SPLIT)?.into(), bytes(false)],
            Self::SmolLm => vec![Digits::new(true).into(), bytes(true)],
            Self::Gpt2 => vec![bytes(true)],
        };
        Ok(Sequence::new(steps).into())
    }
}

/// Llama 3's vocabulary holds words whole that its merges do not reach.
pub(super) fn from_vocabulary(vocabulary: &Vocabulary) -> Result<tokenizers::Tokenizer, Error> {
    if vocabulary.merges.is_empty() {
        return Err(Error::NoMerges {
            key: "tokenizer.ggml.merges".into(),
        });
    }
    let known: HashSet<&str> = vocabulary.tokens.iter().map(String::as_str).collect();
    let mut merges = Merges::with_capacity(vocabulary.merges.len());
    for merge in &vocabulary.merges {
        // The first character may itself be a space in vocabularies that do not map bytes to letters.
        let at = merge
            .char_indices()
            .skip(1)
            .find(|&(_, c)| c == ' ')
            .map(|(i, _)| i);
        let Some((left, right)) = at.map(|at| (&merge[..at], &merge[at + 1..])) else {
            let key = "tokenizer.ggml.merges";
            return Err(Error::broken(
                key,
                "two tokens with a space between in each entry",
                "an entry without",
            ));
        };
        if !known.contains(left)
            || !known.contains(right)
            || !known.contains(format!("{left}{right}").as_str())
        {
            let key = "tokenizer.ggml.merges";
            return Err(Error::broken(
                key,
                "merges of tokens in the vocabulary",
                format!("{merge:?}"),
            ));
        }
        merges.push((left.into(), right.into()));
    }
    let mut vocab = Vocab::default();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        // Of tokens with the same text the first counts.
        vocab.entry(token.clone()).or_insert(id as u32);
    }
    let pre = PreTokenizer::from_gguf(vocabulary.pre.as_deref())?;
    build(vocab, merges, pre)
}

/// A BPE tokenizer over byte-mapped tokens, with nothing added before or after.
pub(super) fn build(
    vocab: Vocab,
    merges: Merges,
    pre: PreTokenizer,
) -> Result<tokenizers::Tokenizer, Error> {
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(pre == PreTokenizer::Llama3)
        .build()
        .map_err(|e| {
            Error::broken(
                "tokenizer.ggml.merges",
                "merges of tokens in the vocabulary",
                e.to_string(),
            )
        })?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(pre.build()?));
    Ok(tokenizer)
}

/// GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for U+0100 and on in order.
static BYTE_LETTERS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut letters = ['\0'; 256];
    let mut next = 0x100;
    for (byte, letter) in letters.iter_mut().enumerate() {
        let own = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if own {
            byte as u32
        } else {
            next += 1;
            next - 1
        };
        *letter = char::from_u32(code).unwrap_or('\0');
    }
    letters
});

/// Bytes in GPT-2's letters.
pub(super) fn bytes_to_letters(bytes: &[u8]) -> String {
    bytes.iter().map(|&b| BYTE_LETTERS[b as usize]).collect()
}

/// The bytes that GPT-2's letters stand for; a character that is none of them stands for its own UTF-8.
pub(super) fn letters_to_bytes(token: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(token.len());
    for c in token.chars() {
        match c as u32 {
            code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => bytes.push(code as u8),
            code @ 0x100..=0x143 => match BYTE_LETTERS.iter().position(|&l| l as u32 == code) {
                Some(byte) => bytes.push(byte as u8),
                None => bytes.extend(c.encode_utf8(&mut [0; 4]).as_bytes()),
            },
            _ => bytes.extend(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_its_letter() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(letters_to_bytes(&bytes_to_letters(&all)), all);
        assert_eq!(bytes_to_letters(b" a\n"), "\u{120}a\u{10a}");
    }

    #[test]
    fn a_vocabulary_without_merges_is_refused_by_name() {
        let vocabulary = Vocabulary {
            model: "gpt2".into(),
            tokens: vec!["a".into()],
            ..Vocabulary::default()
        };
        let error = from_vocabulary(&vocabulary)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(error.contains("tokenizer.ggml.merges"), "{error}");
    }

    #[test]
    fn merges_of_unknown_tokens_are_refused() {
        let tokens = vec!["a".into(), "b".into()];
        for merge in ["a b", "a", "a c", "", " "] {
            let vocabulary = Vocabulary {
                model: "gpt2".into(),
                tokens: tokens.clone(),
                merges: vec![merge.into()],
                ..Vocabulary::default()
            };
            assert!(
                matches!(from_vocabulary(&vocabulary), Err(Error::Broken { .. })),
                "{merge:?}"
            );
        }
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_refused_with_the_known_ones() {
        let error = PreTokenizer::from_gguf(Some("klingon"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("klingon") && error.contains("llama-bpe"),
            "{error}"
        );
    }
}

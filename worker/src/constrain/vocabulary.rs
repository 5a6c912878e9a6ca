//! The model's vocabulary as the tree of bytes that grammars are matched against.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::api::ParserLimits;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{
    INVALID_TOKEN, InferenceCapabilities, TokRxInfo, TokTrie, TokenId, TokenizerEnv,
};

use crate::text::{TokenKind, Tokenizer};

/// Longer tokens are runs of spaces or of one sign; an answer that keeps to a grammar does without.
const MAX_WORD_BYTES: usize = 256;

struct Vocabulary {
    trie: TokTrie,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.greedy_tokenize(bytes)
    }

    /// The model chooses among all ways to write what a grammar allows.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// Text tokens by their bytes; control tokens stand apart and come only where an answer may end.
pub(super) fn factory(
    tokenizer: &Tokenizer,
    limits: ParserLimits,
) -> Result<ParserFactory, String> {
    let count = tokenizer.vocab_size() as u32;
    let ends: Vec<u32> = (0..count).filter(|&id| tokenizer.is_end(id)).collect();
    let word = |id: u32| {
        let text = matches!(
            tokenizer.kind(id),
            Some(TokenKind::Normal | TokenKind::UserDefined | TokenKind::Byte)
        );
        let bytes = tokenizer.token_bytes(id);
        // llguidance takes a word that begins with 0xFF for a special token; no UTF-8 text holds that byte.
        if text
            && bytes.len() <= MAX_WORD_BYTES
            && bytes.first() != Some(&0xff)
            && !ends.contains(&id)
        {
            bytes.to_vec()
        } else {
            Vec::new()
        }
    };
    let words: Vec<Vec<u8>> = (0..count).map(word).collect();
    if words.iter().all(Vec::is_empty) {
        return Err("no token has a text".into());
    }
    // A vocabulary comes with a model file, and the library asserts what it cannot hold.
    let build = || build(&words, &ends, limits);
    std::panic::catch_unwind(AssertUnwindSafe(build))
        .unwrap_or_else(|_| Err("its tokens are too many or too long".into()))
}

fn build(words: &[Vec<u8>], ends: &[u32], limits: ParserLimits) -> Result<ParserFactory, String> {
    let count = words.len() as u32;
    let info = TokRxInfo::new(count, ends.first().copied().unwrap_or(INVALID_TOKEN));
    let mut trie = TokTrie::from(&info, words);
    if !ends.is_empty() {
        trie = trie.with_eos_tokens(ends);
    }
    let env: llguidance::toktrie::TokEnv = Arc::new(Vocabulary { trie });
    let slices = SlicedBiasComputer::json_slices();
    let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
        .map_err(|e| e.to_string())?;
    factory.quiet();
    *factory.limits_mut() = limits;
    Ok(factory)
}

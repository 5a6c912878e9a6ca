//! Llama 3's own tokenizer file: one `base64 rank` a line, in tiktoken's form.

use std::collections::HashMap;

use tokenizers::models::bpe::{Merges, Vocab};

use super::Error;
use super::bpe::{self, PreTokenizer};
use super::vocabulary::{MAX_TOKEN_BYTES, MAX_TOKENS, TokenKind, Vocabulary};

/// Control tokens that Llama 3 appends to the ranks in the file, in this order; then reserved ones up to 256.
const LLAMA3_SPECIALS: [&str; 11] = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
];
const LLAMA3_SPECIAL_COUNT: usize = 256;

/// Reads the file; the vocabulary's tokens are in GPT-2's letters, with Llama 3's control tokens behind.
pub(super) fn read(file: &[u8]) -> Result<(tokenizers::Tokenizer, Vocabulary), Error> {
    let key = "tokenizer.model";
    let text = std::str::from_utf8(file)
        .map_err(|_| Error::broken(key, "lines of `base64 rank`", "other bytes"))?;
    let mut ranks: Vec<Vec<u8>> = Vec::new();
    for line in text.lines().filter(|l| !l.is_empty()) {
        let parsed = line
            .split_once(' ')
            .and_then(|(token, rank)| Some((decode_base64(token)?, rank.parse::<usize>().ok()?)));
        match parsed {
            Some((token, rank))
                if rank == ranks.len() && rank < MAX_TOKENS && token.len() <= MAX_TOKEN_BYTES =>
            {
                ranks.push(token);
            }
            _ => {
                let expected = format!("`base64 {}` on line {}", ranks.len(), ranks.len() + 1);
                return Err(Error::broken(key, expected, "another line"));
            }
        }
    }
    if ranks.is_empty() {
        return Err(Error::broken(
            key,
            "lines of `base64 rank`",
            "an empty file",
        ));
    }
    let by_bytes: HashMap<&[u8], usize> = ranks
        .iter()
        .enumerate()
        .map(|(rank, t)| (t.as_slice(), rank))
        .collect();

    // tiktoken joins the neighbours whose union has the lowest rank. As merges: every way to cut a token in two
    // tokens, in order of the union's rank, then of the parts'.
    let mut merges = Merges::new();
    let mut cuts = Vec::new();
    for token in &ranks {
        cuts.clear();
        for at in 1..token.len() {
            if let (Some(&left), Some(&right)) =
                (by_bytes.get(&token[..at]), by_bytes.get(&token[at..]))
            {
                cuts.push((left, right));
            }
        }
        cuts.sort_unstable();
        let letters = |rank: usize| bpe::bytes_to_letters(&ranks[rank]);
        merges.extend(
            cuts.iter()
                .map(|&(left, right)| (letters(left), letters(right))),
        );
    }

    let mut tokens: Vec<String> = ranks.iter().map(|t| bpe::bytes_to_letters(t)).collect();
    let vocab: Vocab = tokens
        .iter()
        .enumerate()
        .map(|(id, t)| (t.clone(), id as u32))
        .collect();
    let tokenizer = bpe::build(vocab, merges, PreTokenizer::Llama3)?;

    let base = tokens.len();
    let mut kinds = vec![TokenKind::Normal; base];
    tokens.extend(LLAMA3_SPECIALS.iter().map(|s| s.to_string()));
    let reserved = LLAMA3_SPECIAL_COUNT - LLAMA3_SPECIALS.len();
    tokens.extend((0..reserved).map(|i| format!("<|reserved_special_token_{}|>", i + 2)));
    kinds.resize(tokens.len(), TokenKind::Control);
    let vocabulary = Vocabulary {
        model: "gpt2".into(),
        pre: Some("llama-bpe".into()),
        tokens,
        kinds,
        bos: Some(base as u32),
        eos: Some(base as u32 + 1),
        eot: Some(base as u32 + 9),
        add_bos: Some(true),
        ..Vocabulary::default()
    };
    vocabulary.validate()?;
    Ok((tokenizer, vocabulary))
}

/// Standard base64 with padding.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut held) = (0u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six);
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
            bits &= (1 << held) - 1;
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_every_length() {
        for (text, bytes) in [
            ("", ""),
            ("YQ==", "a"),
            ("YWI=", "ab"),
            ("YWJj", "abc"),
            ("IQ==", "!"),
        ] {
            assert_eq!(decode_base64(text).as_deref(), Some(bytes.as_bytes()));
        }
        assert_eq!(decode_base64("Y!=="), None);
    }

    #[test]
    fn a_file_out_of_order_is_refused_with_its_line() {
        let error = read(b"IQ== 0\nIg== 2\n")
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(error.contains("line 2"), "{error}");
        assert!(read(&[0xff, 0xfe]).is_err());
        assert!(read(b"").is_err());
    }
}

//! SentencePiece's unigram model: the cut of a text with the greatest sum of scores, by Viterbi's algorithm.

use std::collections::HashMap;

use tokenizers::normalizers::precompiled::Precompiled;

use super::Error;
use super::sentencepiece::SPACE;
use super::vocabulary::{TokenKind, Vocabulary};

/// An unknown character costs this more than the worst piece (SentencePiece's `kUnkPenalty`).
const UNKNOWN_PENALTY: f32 = 10.0;
/// Most code points that one code point may be normalised to; U+FDFA needs 18.
const MAX_EXPANSION: u32 = 64;

pub(super) struct Unigram {
    /// Ids of the pieces that text may become, in the order of their bytes.
    sorted: Vec<u32>,
    /// Where in `sorted` the pieces with this first byte lie.
    first: [(u32, u32); 256],
    pieces: Vec<String>,
    scores: Vec<f32>,
    longest: usize,
    unknown: u32,
    unknown_score: f32,
    space_prefix: bool,
    normalizer: Normalizer,
}

enum Normalizer {
    None,
    Map(HashMap<char, String>),
    Compiled(Box<Precompiled>),
}

impl Unigram {
    pub(super) fn new(vocabulary: &Vocabulary) -> Result<Self, Error> {
        let count = vocabulary.tokens.len();
        if vocabulary.scores.len() != count {
            return Err(Error::broken(
                "tokenizer.ggml.scores",
                format!("{count} scores"),
                vocabulary.scores.len().to_string(),
            ));
        }
        let usable = |id: &u32| {
            let kind = vocabulary.kind(*id as usize);
            matches!(kind, TokenKind::Normal | TokenKind::UserDefined)
                && !vocabulary.tokens[*id as usize].is_empty()
        };
        let pieces = vocabulary.tokens.clone();
        let mut sorted: Vec<u32> = (0..count as u32).filter(usable).collect();
        sorted.sort_by(|&a, &b| {
            pieces[a as usize]
                .as_bytes()
                .cmp(pieces[b as usize].as_bytes())
                .then(a.cmp(&b))
        });
        let mut first = [(0, 0); 256];
        for (at, &id) in sorted.iter().enumerate() {
            let range = &mut first[pieces[id as usize].as_bytes()[0] as usize];
            if range.1 == 0 {
                range.0 = at as u32;
            }
            range.1 = at as u32 + 1;
        }
        let longest = sorted
            .iter()
            .map(|&id| pieces[id as usize].len())
            .max()
            .unwrap_or(0);
        let worst = vocabulary
            .scores
            .iter()
            .copied()
            .filter(|s| s.is_finite())
            .fold(f32::INFINITY, f32::min);
        let worst = if worst.is_finite() { worst } else { 0.0 };
        Ok(Self {
            sorted,
            first,
            pieces,
            scores: vocabulary.scores.clone(),
            longest,
            unknown: vocabulary.unknown.unwrap_or(0),
            unknown_score: worst - UNKNOWN_PENALTY,
            space_prefix: vocabulary.add_space_prefix.unwrap_or(true),
            normalizer: Normalizer::new(vocabulary)?,
        })
    }

    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) {
        let text = self.normalize(text);
        let bytes = text.as_bytes();
        // Best score of a cut that ends at each byte, its last piece and where that began.
        let mut best = vec![(f32::NEG_INFINITY, self.unknown, 0usize); bytes.len() + 1];
        best[0].0 = 0.0;
        for (start, c) in text.char_indices() {
            let so_far = best[start].0;
            if so_far == f32::NEG_INFINITY {
                continue;
            }
            self.each_prefix(&bytes[start..], |id, len| {
                let score = so_far + self.scores[id as usize];
                if score > best[start + len].0 {
                    best[start + len] = (score, id, start);
                }
            });
            let end = start + c.len_utf8();
            if so_far + self.unknown_score > best[end].0 {
                best[end] = (so_far + self.unknown_score, self.unknown, start);
            }
        }
        let from = out.len();
        let mut end = bytes.len();
        while end > 0 {
            let (_, id, start) = best[end];
            out.push(id);
            end = start;
        }
        out[from..].reverse();
    }

    /// Calls `found` with each piece that `text` starts with, and its length in bytes. Narrows the range of sorted
    /// pieces byte by byte, so a text that leaves the vocabulary costs no more.
    fn each_prefix(&self, text: &[u8], mut found: impl FnMut(u32, usize)) {
        let Some(&byte) = text.first() else { return };
        let (mut low, mut high) = (
            self.first[byte as usize].0 as usize,
            self.first[byte as usize].1 as usize,
        );
        let piece = |at: usize| self.pieces[self.sorted[at] as usize].as_bytes();
        let mut len = 1;
        while low < high {
            if piece(low).len() == len {
                found(self.sorted[low], len);
                // Of equal pieces only the first counts.
                while low < high && piece(low).len() == len {
                    low += 1;
                }
            }
            if len == text.len() || len >= self.longest {
                return;
            }
            let next = text[len];
            low += self.sorted[low..high]
                .partition_point(|&id| self.pieces[id as usize].as_bytes()[len] < next);
            high = low
                + self.sorted[low..high]
                    .partition_point(|&id| self.pieces[id as usize].as_bytes()[len] == next);
            len += 1;
        }
    }

    /// Normalised text with runs of spaces made one, a space in front and all spaces visible.
    fn normalize(&self, text: &str) -> String {
        let normal = self.normalizer.apply(text);
        let mut escaped = String::with_capacity(normal.len() + 8);
        if self.space_prefix && !normal.starts_with(' ') {
            escaped.push(SPACE);
        }
        let mut after_space = false;
        for c in normal.chars() {
            if c != ' ' {
                escaped.push(c);
            } else if !after_space {
                escaped.push(SPACE);
            }
            after_space = c == ' ';
        }
        escaped
    }
}

impl Normalizer {
    fn new(vocabulary: &Vocabulary) -> Result<Self, Error> {
        if !vocabulary.precompiled_charsmap.is_empty() {
            let compiled = Precompiled::from(&vocabulary.precompiled_charsmap).map_err(|e| {
                Error::broken(
                    "tokenizer.ggml.precompiled_charsmap",
                    "a SentencePiece normaliser",
                    format!("{e:?}"),
                )
            })?;
            return Ok(Self::Compiled(Box::new(compiled)));
        }
        if vocabulary.normalizer_map.is_empty() {
            return Ok(Self::None);
        }
        let key = "verbund.tokenizer.normalizer_map";
        let broken = || {
            Error::broken(
                key,
                "runs of code point, count, replacements",
                "a broken run",
            )
        };
        let mut map = HashMap::new();
        let mut rest = vocabulary.normalizer_map.as_slice();
        while let [from, count, tail @ ..] = rest {
            if *count > MAX_EXPANSION || *count as usize > tail.len() {
                return Err(broken());
            }
            let (to, after) = tail.split_at(*count as usize);
            let to: Option<String> = to.iter().map(|&code| char::from_u32(code)).collect();
            match (char::from_u32(*from), to) {
                (Some(from), Some(to)) => map.insert(from, to),
                _ => return Err(broken()),
            };
            rest = after;
        }
        if rest.is_empty() {
            Ok(Self::Map(map))
        } else {
            Err(broken())
        }
    }

    fn apply(&self, text: &str) -> String {
        match self {
            Self::None => text.into(),
            Self::Compiled(compiled) => compiled.normalize_string(text),
            Self::Map(map) => {
                let mut normal = String::with_capacity(text.len());
                for c in text.chars() {
                    match map.get(&c) {
                        Some(to) => normal.push_str(to),
                        None => normal.push(c),
                    }
                }
                normal
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unigram(pieces: &[(&str, f32)]) -> Unigram {
        let vocabulary = Vocabulary {
            model: "t5".into(),
            tokens: pieces.iter().map(|p| p.0.to_string()).collect(),
            scores: pieces.iter().map(|p| p.1).collect(),
            unknown: Some(0),
            kinds: std::iter::once(TokenKind::Unknown)
                .chain(pieces.iter().skip(1).map(|_| TokenKind::Normal))
                .collect(),
            normalizer_map: vec![u32::from('ﬁ'), 2, u32::from('f'), u32::from('i'), 0x200b, 0],
            ..Vocabulary::default()
        };
        Unigram::new(&vocabulary).unwrap()
    }

    fn encode(unigram: &Unigram, text: &str) -> Vec<u32> {
        let mut out = Vec::new();
        unigram.encode(text, &mut out);
        out
    }

    #[test]
    fn the_cut_with_the_greatest_sum_wins() {
        let u = unigram(&[
            ("<unk>", 0.0),
            ("▁", -1.0),
            ("a", -2.0),
            ("ab", -2.5),
            ("b", -2.0),
            ("abc", -9.0),
            ("c", -3.0),
        ]);
        assert_eq!(encode(&u, "abc"), [1, 3, 6]);
        assert_eq!(encode(&u, "ab  x"), [1, 3, 1, 0]);
        assert_eq!(encode(&u, ""), [1]);
    }

    #[test]
    fn the_normaliser_replaces_and_removes() {
        let u = unigram(&[
            ("<unk>", 0.0),
            ("▁fi", -1.0),
            ("▁", -3.0),
            ("f", -3.0),
            ("i", -3.0),
        ]);
        assert_eq!(encode(&u, "ﬁ\u{200b}"), [1]);
    }

    #[test]
    fn a_broken_map_is_refused() {
        for map in [vec![65], vec![65, 2, 66], vec![0xd800, 0], vec![65, 99]] {
            let vocabulary = Vocabulary {
                normalizer_map: map,
                ..Vocabulary::default()
            };
            assert!(Normalizer::new(&vocabulary).is_err());
        }
    }
}

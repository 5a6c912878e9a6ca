//! How large a text is for a reader (words) and for the embedding model (tokens, estimated from above).

use std::iter::Sum;
use std::ops::Add;

use super::{MAX_TOKENS, TARGET_WORDS};

/// Words and tokens of a text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Size {
    pub words: usize,
    pub tokens: usize,
}

impl Size {
    pub fn of(text: &str) -> Self {
        text.split_whitespace().fold(Self::default(), |size, word| {
            size + Self {
                words: 1,
                tokens: word_tokens(word),
            }
        })
    }

    /// How many pieces it takes at least.
    pub fn pieces(self) -> usize {
        self.words
            .div_ceil(TARGET_WORDS)
            .max(self.tokens.div_ceil(MAX_TOKENS))
            .max(1)
    }

    /// An even share with some slack, for cuts fall between sentences.
    pub fn shared_between(self, pieces: usize) -> Self {
        let share = |all: usize, most: usize| (all.div_ceil(pieces) * 9 / 8 + 8).min(most);
        Self {
            words: share(self.words, TARGET_WORDS),
            tokens: share(self.tokens, MAX_TOKENS),
        }
    }

    pub fn fits(self, target: Self) -> bool {
        self.words <= target.words && self.tokens <= target.tokens
    }

    pub fn is_allowed(self) -> bool {
        self.words <= TARGET_WORDS && self.tokens <= MAX_TOKENS
    }
}

impl Add for Size {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            words: self.words + other.words,
            tokens: self.tokens + other.tokens,
        }
    }
}

impl Sum for Size {
    fn sum<I: Iterator<Item = Self>>(sizes: I) -> Self {
        sizes.fold(Self::default(), Add::add)
    }
}

/// From above for the multilingual SentencePiece vocabulary: runs of Latin letters in pieces of four, everything else
/// character by character.
fn word_tokens(word: &str) -> usize {
    let mut tokens = 0;
    let mut run = 0usize;
    for c in word.chars() {
        if is_latin(c) {
            run += 1;
        } else {
            tokens += run.div_ceil(4) + 1;
            run = 0;
        }
    }
    tokens + run.div_ceil(4)
}

fn is_latin(c: char) -> bool {
    c.is_ascii_alphabetic() || ('\u{c0}'..='\u{17f}').contains(&c) && c.is_alphabetic()
}

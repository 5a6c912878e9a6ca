//! SentencePiece's BPE as Llama 1 and 2 use it: neighbours join while their union is a token, best score first.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::Error;
use super::vocabulary::{TokenKind, Vocabulary};

/// SentencePiece writes a space as this.
pub(super) const SPACE: char = '\u{2581}';

#[derive(Debug)]
pub(super) struct SentencePiece {
    /// Text to (id, score); only tokens that text may become.
    tokens: HashMap<String, (u32, f32)>,
    bytes: Vec<Option<u32>>,
    unknown: u32,
    space_prefix: bool,
}

struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

#[derive(PartialEq)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    bytes: usize,
}

impl Eq for Pair {}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl SentencePiece {
    pub(super) fn new(vocabulary: &Vocabulary) -> Result<Self, Error> {
        let count = vocabulary.tokens.len();
        if vocabulary.scores.len() != count {
            return Err(Error::broken(
                "tokenizer.ggml.scores",
                format!("{count} scores"),
                vocabulary.scores.len().to_string(),
            ));
        }
        let mut tokens = HashMap::with_capacity(count);
        let mut bytes = vec![None; 256];
        for (id, (token, &score)) in vocabulary.tokens.iter().zip(&vocabulary.scores).enumerate() {
            match vocabulary.kind(id) {
                TokenKind::Normal | TokenKind::UserDefined => {
                    tokens.entry(token.clone()).or_insert((id as u32, score));
                }
                TokenKind::Byte => {
                    if let Some(byte) = byte_of(token) {
                        bytes[byte as usize] = Some(id as u32);
                    }
                }
                _ => {}
            }
        }
        let unknown = vocabulary.unknown.unwrap_or(0);
        Ok(Self {
            tokens,
            bytes,
            unknown,
            space_prefix: vocabulary.add_space_prefix.unwrap_or(true),
        })
    }

    /// Whether the first token of a text begins with a space that is not the text's.
    pub(super) fn has_space_prefix(&self) -> bool {
        self.space_prefix
    }

    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) {
        let mut escaped = String::with_capacity(text.len() + 3);
        if self.space_prefix {
            escaped.push(SPACE);
        }
        escaped.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));

        let mut symbols: Vec<Symbol> = Vec::new();
        for (start, c) in escaped.char_indices() {
            let at = symbols.len();
            symbols.push(Symbol {
                start,
                end: start + c.len_utf8(),
                previous: at.checked_sub(1),
                next: Some(at + 1),
            });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }
        let mut pairs = BinaryHeap::new();
        for right in 1..symbols.len() {
            self.propose(&escaped, &symbols, right - 1, right, &mut pairs);
        }
        while let Some(pair) = pairs.pop() {
            let (left, right) = (&symbols[pair.left], &symbols[pair.right]);
            // Either side may have been joined since; an empty symbol is one that its left neighbour took.
            if left.end - left.start + right.end - right.start != pair.bytes
                || left.start == left.end
                || right.start == right.end
            {
                continue;
            }
            let (end, next) = (right.end, right.next);
            symbols[pair.left].end = end;
            symbols[pair.left].next = next;
            symbols[pair.right].end = symbols[pair.right].start;
            if let Some(next) = next {
                symbols[next].previous = Some(pair.left);
                self.propose(&escaped, &symbols, pair.left, next, &mut pairs);
            }
            if let Some(previous) = symbols[pair.left].previous {
                self.propose(&escaped, &symbols, previous, pair.left, &mut pairs);
            }
        }

        let mut at = (!symbols.is_empty()).then_some(0);
        while let Some(index) = at {
            let symbol = &symbols[index];
            let text = &escaped[symbol.start..symbol.end];
            match self.tokens.get(text) {
                Some(&(id, _)) => out.push(id),
                None => out.extend(
                    text.bytes()
                        .map(|b| self.bytes[b as usize].unwrap_or(self.unknown)),
                ),
            }
            at = symbol.next;
        }
    }

    fn propose(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: usize,
        right: usize,
        pairs: &mut BinaryHeap<Pair>,
    ) {
        let (start, end) = (symbols[left].start, symbols[right].end);
        if let Some(&(_, score)) = self.tokens.get(&text[start..end]) {
            pairs.push(Pair {
                score,
                left,
                right,
                bytes: end - start,
            });
        }
    }
}

/// The byte of a token like `<0x0A>`.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    u8::from_str_radix(token.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

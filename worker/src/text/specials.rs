//! Finding special tokens in text, and keeping them out of users' text.

use std::collections::HashMap;

/// Which special tokens a text may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parse {
    /// The text is the program's own: its control tokens count.
    Control,
    /// The text is a user's: what looks like a control token is plain text.
    Plain,
}

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    Text(&'a str),
    Token(u32),
}

/// Special tokens by their text; the longest at a place wins.
#[derive(Debug, Default)]
pub(super) struct Specials {
    /// By first byte: (text, id, is control), longest first.
    by_first: HashMap<u8, Vec<(String, u32, bool)>>,
}

impl Specials {
    pub(super) fn new(tokens: impl Iterator<Item = (String, u32, bool)>) -> Self {
        let mut by_first: HashMap<u8, Vec<_>> = HashMap::new();
        for (text, id, control) in tokens {
            if let Some(&first) = text.as_bytes().first() {
                by_first.entry(first).or_default().push((text, id, control));
            }
        }
        for tokens in by_first.values_mut() {
            tokens.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then(a.1.cmp(&b.1)));
        }
        Self { by_first }
    }

    /// A special token's text.
    pub(super) fn name(&self, id: u32) -> Option<&str> {
        let mut tokens = self.by_first.values().flatten();
        tokens.find(|t| t.1 == id).map(|t| t.0.as_str())
    }

    /// The longest special token that `text` starts with.
    fn at_start(&self, text: &str, parse: Parse) -> Option<(&str, u32)> {
        let tokens = self.by_first.get(text.as_bytes().first()?)?;
        let allowed = |control: bool| parse == Parse::Control || !control;
        tokens
            .iter()
            .find(|(t, _, control)| allowed(*control) && text.starts_with(t.as_str()))
            .map(|(t, id, _)| (t.as_str(), *id))
    }

    /// Cuts a text at its special tokens.
    pub(super) fn split<'a>(&self, text: &'a str, parse: Parse) -> Vec<Piece<'a>> {
        let mut pieces = Vec::new();
        let (mut start, mut at) = (0, 0);
        while at < text.len() {
            if !text.is_char_boundary(at) {
                at += 1;
                continue;
            }
            let Some((token, id)) = self.at_start(&text[at..], parse) else {
                at += 1;
                continue;
            };
            if start < at {
                pieces.push(Piece::Text(&text[start..at]));
            }
            pieces.push(Piece::Token(id));
            at += token.len();
            start = at;
        }
        if start < text.len() {
            pieces.push(Piece::Text(&text[start..]));
        }
        pieces
    }

    /// Puts `mark` behind the first character of everything in a user's text that is a control token, or that could
    /// become one together with the text after it, so that [`Self::split`] no longer sees it.
    pub(super) fn defuse(&self, text: &str, mark: char) -> String {
        let mut defused = String::with_capacity(text.len());
        for (at, c) in text.char_indices() {
            defused.push(c);
            let Some(tokens) = self.by_first.get(&text.as_bytes()[at]) else {
                continue;
            };
            let rest = &text[at..];
            if tokens.iter().any(|(t, _, control)| {
                *control && (rest.starts_with(t.as_str()) || t.starts_with(rest))
            }) {
                defused.push(mark);
            }
        }
        defused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specials() -> Specials {
        let tokens = [("<|a|>", 1, true), ("<|a|>b", 2, true), ("<u>", 3, false)];
        Specials::new(tokens.into_iter().map(|(t, id, c)| (t.to_string(), id, c)))
    }

    #[test]
    fn the_longest_token_wins_and_text_between_stays_whole() {
        let pieces = specials().split("ä<|a|>b<|a|>c<u>", Parse::Control);
        let want = [
            Piece::Text("ä"),
            Piece::Token(2),
            Piece::Token(1),
            Piece::Text("c"),
            Piece::Token(3),
        ];
        assert_eq!(pieces, want);
    }

    #[test]
    fn plain_parsing_sees_no_control_token() {
        let pieces = specials().split("x<|a|>y<u>", Parse::Plain);
        assert_eq!(pieces, [Piece::Text("x<|a|>y"), Piece::Token(3)]);
    }

    #[test]
    fn defused_text_holds_no_control_token_even_at_its_end() {
        let specials = specials();
        for text in ["<|a|>", "<<|a|>>", "x<|a", "<", "<|a|>b<|a|>"] {
            let defused = specials.defuse(text, '\u{fdd0}') + "|a|>b";
            let pieces = specials.split(&defused, Parse::Control);
            assert!(
                !pieces.iter().any(|p| matches!(p, Piece::Token(_))),
                "{text} gave {pieces:?}"
            );
            assert_eq!(defused.replace('\u{fdd0}', ""), format!("{text}|a|>b"));
        }
    }
}

//! Tokens to text while they come: whole characters only, and the end at a stop string.

/// Joins the bytes of tokens and gives out whole characters. Bytes that can never become one turn into U+FFFD.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// The beginning of a character, at most three bytes.
    held: Vec<u8>,
}

impl Detokenizer {
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the bytes of one token; returns what is certain by now.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.held.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(whole) => {
                    text.push_str(whole);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, tail) = rest.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    rest = tail;
                    match error.error_len() {
                        Some(broken) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &rest[broken..];
                        }
                        None => break,
                    }
                }
            }
        }
        self.held = rest.to_vec();
        text
    }

    /// What is left at the end of the answer: nothing, or one U+FFFD for a character that never came whole.
    pub fn finish(&mut self) -> String {
        let text = if self.held.is_empty() {
            String::new()
        } else {
            char::REPLACEMENT_CHARACTER.into()
        };
        self.held.clear();
        text
    }
}

/// What a piece of text did to a [`StopMatcher`].
#[derive(Debug, PartialEq, Eq)]
pub enum StopOutcome {
    /// Text that no stop string can reach any more; more may follow.
    Continue(String),
    /// The last text; a stop string follows it.
    Stopped(String),
}

/// Ends a text before the first stop string, also one that spans pieces. Keeps back only what may begin one.
#[derive(Debug)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// Empty stop strings are ignored.
    pub fn new(stops: &[String]) -> Self {
        Self {
            stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(),
            held: String::new(),
        }
    }

    pub fn push(&mut self, text: &str) -> StopOutcome {
        self.held.push_str(text);
        let first = self
            .stops
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min();
        if let Some(at) = first {
            self.held.truncate(at);
            return StopOutcome::Stopped(std::mem::take(&mut self.held));
        }
        let keep = self
            .stops
            .iter()
            .map(|stop| begun(&self.held, stop))
            .max()
            .unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - keep);
        StopOutcome::Continue(std::mem::replace(&mut self.held, kept))
    }

    /// The text kept back, when the answer ends without a stop string.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// The length of the longest end of `text` that is a beginning of `stop`.
fn begun(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest)
        .rev()
        .find(|&len| {
            stop.is_char_boundary(len) && text.as_bytes().ends_with(&stop.as_bytes()[..len])
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_character_comes_when_its_last_byte_comes() {
        let mut d = Detokenizer::new();
        let euro = "€".as_bytes();
        assert_eq!(d.push(&euro[..1]), "");
        assert_eq!(d.push(&euro[1..2]), "");
        assert_eq!(d.push(&euro[2..]), "€");
        assert_eq!(d.push(&[0xff, b'a', 0xe2]), "\u{fffd}a");
        assert_eq!(d.push(b"b"), "\u{fffd}b");
        assert_eq!(d.push(&[0xf0, 0x9f]), "");
        assert_eq!(d.finish(), "\u{fffd}");
        assert_eq!(d.finish(), "");
    }

    #[test]
    fn a_stop_string_over_three_pieces_ends_the_text_before_it() {
        let mut m = StopMatcher::new(&["END".into(), "\n\n".into()]);
        assert_eq!(m.push("one E"), StopOutcome::Continue("one ".into()));
        assert_eq!(m.push("N"), StopOutcome::Continue("".into()));
        assert_eq!(m.push("D two"), StopOutcome::Stopped("".into()));
        let mut m = StopMatcher::new(&["aab".into()]);
        assert_eq!(m.push("aa"), StopOutcome::Continue("".into()));
        assert_eq!(m.push("ab"), StopOutcome::Stopped("a".into()));
        let mut m = StopMatcher::new(&["äö".into()]);
        assert_eq!(m.push("xä"), StopOutcome::Continue("x".into()));
        assert_eq!(m.finish(), "ä");
    }

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_decodes_as_the_whole(bytes in proptest::collection::vec(any::<u8>(), 0..60), cut in 1usize..7) {
            let mut d = Detokenizer::new();
            let mut text: String = bytes.chunks(cut).map(|c| d.push(c)).collect();
            text += &d.finish();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }

        #[test]
        fn any_cut_stops_where_the_whole_stops(text in "[ab€]{0,24}", stop in "[ab€]{1,4}", cut in 1usize..5) {
            let chars: Vec<char> = text.chars().collect();
            let mut m = StopMatcher::new(std::slice::from_ref(&stop));
            let mut got = String::new();
            let mut stopped = false;
            for piece in chars.chunks(cut) {
                match m.push(&piece.iter().collect::<String>()) {
                    StopOutcome::Continue(t) => got += &t,
                    StopOutcome::Stopped(t) => { got += &t; stopped = true; break; }
                }
            }
            if !stopped { got += &m.finish(); }
            prop_assert_eq!(stopped, text.contains(&stop));
            prop_assert_eq!(got, text.split(&stop).next().unwrap_or_default());
        }
    }
}

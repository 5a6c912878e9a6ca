//! Where one answer stands within its grammar.

use std::sync::Arc;

use super::calls::OPEN;
use crate::text::Tokenizer;

/// Which tokens may come next: bit `i % 32` of word `i / 32` is token `i`; tokens beyond are not allowed.
pub type Mask = Vec<u32>;

/// The grammar cannot be followed further: a limit was hit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exceeded {
    /// The parameter that the grammar came in.
    pub param: String,
    pub why: String,
}

/// How a call is known by its beginning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Watch {
    /// The answer begins with one of these, white space apart.
    Beginnings(Vec<String>),
    /// [`OPEN`] stands anywhere.
    Tag,
}

/// The state of one answer. Tokens go in by [`Self::accept`] in order.
pub struct Matcher {
    state: State,
    grammar: llguidance::Matcher,
    param: String,
    tokenizer: Arc<Tokenizer>,
}

enum State {
    /// The grammar holds.
    Held,
    /// Text; a call may begin. The tokens that may be its beginning.
    Waiting(Watch, Vec<u32>),
    /// Text to the end.
    Free,
}

impl Matcher {
    pub(super) fn new(
        grammar: llguidance::Matcher,
        watch: Option<Watch>,
        param: String,
        tokenizer: Arc<Tokenizer>,
    ) -> Self {
        let state = match watch {
            Some(watch) => State::Waiting(watch, Vec::new()),
            None => State::Held,
        };
        Self {
            state,
            grammar,
            param,
            tokenizer,
        }
    }

    /// Whether the grammar decides the next token.
    pub fn is_held(&self) -> bool {
        matches!(self.state, State::Held)
    }

    /// Nothing may follow any more.
    pub fn is_over(&self) -> bool {
        self.is_held() && self.grammar.is_stopped() && !self.grammar.is_error()
    }

    /// What may follow now, and after each of `drafts` if they are taken: `1 + drafts.len()` masks, `None` where anything may,
    /// or where a draft before is not allowed.
    ///
    /// # Errors
    /// The grammar's limits are hit; the answer cannot go on.
    pub fn masks(&mut self, drafts: &[u32]) -> Result<Vec<Option<Mask>>, Exceeded> {
        let mut masks = vec![None; 1 + drafts.len()];
        if !self.is_held() {
            return Ok(masks);
        }
        let mut taken = 0;
        for (i, mask) in masks.iter_mut().enumerate() {
            let allowed = self
                .grammar
                .compute_mask()
                .map_err(|e| self.exceeded(&e.to_string()))?;
            *mask = Some(allowed.as_slice().to_vec());
            let Some(&draft) = drafts.get(i) else { break };
            let follows = (draft as usize) < allowed.len() && allowed.is_allowed(draft);
            if !follows || self.tokenizer.is_end(draft) {
                break;
            }
            self.consume(draft)?;
            taken += 1;
            if self.grammar.is_stopped() {
                break;
            }
        }
        self.grammar
            .rollback(taken)
            .map_err(|e| self.exceeded(&e.to_string()))?;
        Ok(masks)
    }

    /// Records a token of the answer, which is no end token.
    ///
    /// # Errors
    /// The grammar's limits are hit; the answer cannot go on.
    pub fn accept(&mut self, token: u32) -> Result<(), Exceeded> {
        match &mut self.state {
            State::Held => self.consume(token),
            State::Free => Ok(()),
            State::Waiting(watch, tokens) => {
                tokens.push(token);
                let (watch, tokens) = (watch.clone(), std::mem::take(tokens));
                self.state = self.look(watch, tokens);
                Ok(())
            }
        }
    }

    fn consume(&mut self, token: u32) -> Result<(), Exceeded> {
        self.grammar
            .consume_token(token)
            .map_err(|e| self.exceeded(&e.to_string()))
    }

    fn look(&mut self, watch: Watch, mut tokens: Vec<u32>) -> State {
        let bytes = |tokens: &[u32]| -> Vec<u8> {
            let bytes = tokens.iter().flat_map(|&t| self.tokenizer.token_bytes(t));
            bytes.copied().collect()
        };
        match &watch {
            Watch::Beginnings(beginnings) => {
                let mut text = bytes(&tokens);
                text.retain(|b| !b.is_ascii_whitespace());
                if beginnings.iter().any(|b| text.starts_with(b.as_bytes())) {
                    return self.enter(&tokens);
                }
                if beginnings.iter().any(|b| b.as_bytes().starts_with(&text)) {
                    return State::Waiting(watch, tokens);
                }
                State::Free
            }
            Watch::Tag => {
                // Only the token that the tag begins in matters of what came before.
                while bytes(tokens.get(1..).unwrap_or_default()).len() >= OPEN.len() {
                    tokens.remove(0);
                }
                let text = bytes(&tokens);
                if text.windows(OPEN.len()).any(|w| w == OPEN.as_bytes()) {
                    return match self.enter(&tokens) {
                        // A tag that is not a call's; the next may be.
                        State::Free => State::Waiting(watch, Vec::new()),
                        held => held,
                    };
                }
                State::Waiting(watch, tokens)
            }
        }
    }

    /// Takes up the grammar with the tokens that a call began with; free text if they are none.
    fn enter(&mut self, tokens: &[u32]) -> State {
        let tokens: Vec<u32> = tokens
            .iter()
            .copied()
            .filter(|&t| !self.tokenizer.token_bytes(t).is_empty())
            .collect();
        match self.grammar.try_consume_tokens(&tokens) {
            Ok(taken) if taken == tokens.len() => State::Held,
            Ok(taken) if self.grammar.rollback(taken).is_ok() => State::Free,
            _ => State::Free,
        }
    }

    /// The error of an answer for which the model has no token that its grammar allows.
    pub fn nothing_follows(&self) -> Exceeded {
        Exceeded {
            param: self.param.clone(),
            why: "no token of this model can follow within it; allow more characters".into(),
        }
    }

    fn exceeded(&self, error: &str) -> Exceeded {
        if error.contains("NoExtension") {
            return self.nothing_follows();
        }
        let why = "became too complex while the answer was written; use fewer alternatives, patterns and bounds";
        Exceeded {
            param: self.param.clone(),
            why: why.into(),
        }
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher")
            .field("held", &self.is_held())
            .finish_non_exhaustive()
    }
}

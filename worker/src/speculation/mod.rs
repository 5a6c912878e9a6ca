//! Speculation without loss: guesses from a sequence's own tokens, verified in the step that computes the next one.
//!
//! Belongs here: what is guessed ([`lookup`]) and how much of it is worth a row ([`payoff`]). All of it is pure; the engine's
//! thread calls it between steps, and what is drafted changes an answer's speed only, never its tokens. Verifying is
//! `engine`'s and `scheduler`'s business.

mod cost;
pub mod lookup;
mod odds;
pub mod payoff;

use std::collections::HashMap;

use crate::engine::Drafter;
use crate::scheduler::SequenceId;
use lookup::{Guess, History, MAX_DRAFTS};
use odds::Trust;
use payoff::{Offer, Payoff};

/// Drafts by prompt look-up, as far as it pays.
#[derive(Debug)]
pub struct Speculation {
    sequences: HashMap<SequenceId, Sequence>,
    payoff: Payoff,
}

#[derive(Debug)]
struct Sequence {
    history: History,
    /// How it was thought to go on from where it is now.
    guess: Option<Guess>,
    trust: Trust,
    /// Most drafts of a step. Begins at one, grows with tokens that were guessed right and is halved by one that was not: that
    /// others quoted says little of a sequence that has just begun.
    reach: usize,
}

impl Speculation {
    /// `max_rows` bounds a step.
    pub fn new(max_rows: usize) -> Self {
        Self {
            sequences: HashMap::new(),
            payoff: Payoff::new(max_rows),
        }
    }
}

impl Drafter for Speculation {
    fn begin(&mut self, id: SequenceId, prompt: &[u32]) {
        let sequence = Sequence {
            history: History::new(prompt),
            guess: None,
            trust: Trust::default(),
            reach: 1,
        };
        self.sequences.insert(id, sequence);
    }

    fn draft(&mut self, decoding: &[SequenceId]) -> Vec<(SequenceId, Vec<u32>)> {
        let mut offers = Vec::with_capacity(decoding.len());
        for id in decoding {
            let mut offer = Offer::default();
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.guess = sequence.history.guess();
                if let Some(guess) = &sequence.guess {
                    offer = Offer {
                        tokens: guess.tokens.len().min(sequence.reach),
                        matched: guess.matched,
                        trust: sequence.trust,
                    };
                }
            }
            offers.push(offer);
        }
        let counts = self.payoff.plan(&offers);
        let drafts = |(&id, count): (&SequenceId, usize)| {
            let guess = self.sequences.get(&id)?.guess.as_ref()?;
            Some((
                id,
                guess
                    .tokens
                    .get(..count)
                    .filter(|d| !d.is_empty())?
                    .to_vec(),
            ))
        };
        decoding.iter().zip(counts).filter_map(drafts).collect()
    }

    fn took(&mut self, id: SequenceId, tokens: &[u32], _drafts: &[u32]) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        // Also what was not drafted is compared: so the odds are known where no draft is made.
        if let Some(guess) = sequence.guess.take() {
            for (i, (token, guessed)) in tokens.iter().zip(&guess.tokens).enumerate() {
                let right = token == guessed;
                self.payoff
                    .saw(guess.matched + i, &mut sequence.trust, right);
                sequence.reach = match right {
                    true => (sequence.reach + 1).min(MAX_DRAFTS),
                    false => (sequence.reach / 2).max(1),
                };
                if !right {
                    break;
                }
            }
        }
        sequence.history.extend(tokens);
    }

    fn stepped(&mut self, rows: usize, seconds: f64) {
        self.payoff.stepped(rows, seconds);
    }

    fn end(&mut self, id: SequenceId) {
        self.sequences.remove(&id);
    }
}

#[cfg(test)]
mod tests;

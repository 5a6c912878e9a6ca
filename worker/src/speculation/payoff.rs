//! How many drafts the next step gets, so that tokens come fastest. Pure: the same events give the same plan.
//!
//! With n sequences that decode, a step gives n tokens and, for each draft, one more with the probability that it and those
//! before it are right. Of all numbers of drafts, the likeliest first, the one with the most expected tokens for its cost
//! is taken; where rows cost as much as steps that is none. A small part of the time goes into steps of other sizes, so that a
//! change of costs is noticed.

use super::cost::Costs;
use super::odds::{Odds, Trust};

/// A plan must promise so much more than plain decoding, because both are estimates.
const MARGIN: f64 = 1.03;
/// Part of the time that may be lost by trying sizes out, and how many plain steps' worth can be saved for one try.
const TRYING: f64 = 0.008;
const MOST_SAVED: f64 = 6.0;
/// What a new engine may spend at once to find out where it is.
const SAVED_AT_FIRST: f64 = 2.5;
/// Sizes to try: drafts of the whole step.
const TRIES: [usize; 6] = [0, 1, 3, 7, 15, 31];
/// Steps after which a size is worth trying again.
const TRY_AFTER: u64 = 64;

/// What could be drafted for one sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Offer {
    /// Tokens of the guess.
    pub tokens: usize,
    /// Length of its match.
    pub matched: usize,
    pub trust: Trust,
}

/// What has been learnt, and what may still be spent on learning.
#[derive(Debug, Clone)]
pub struct Payoff {
    costs: Costs,
    odds: Odds,
    /// In plain steps.
    saved: f64,
    max_rows: usize,
}

impl Payoff {
    /// `max_rows` bounds a step.
    pub fn new(max_rows: usize) -> Self {
        Self {
            costs: Costs::default(),
            odds: Odds::default(),
            saved: SAVED_AT_FIRST,
            max_rows,
        }
    }

    /// A step of `rows` rows, none of them of a prompt, took `seconds`.
    pub fn stepped(&mut self, rows: usize, seconds: f64) {
        self.costs.saw(rows, seconds);
    }

    /// A guess of which `matched` tokens stood before it turned out right or wrong.
    pub fn saw(&mut self, matched: usize, trust: &mut Trust, right: bool) {
        self.odds.saw(matched, trust, right);
    }

    /// How many drafts each of the sequences that decode gets: at most what it offers, and together with one row each at
    /// most the rows of a step.
    pub fn plan(&mut self, offers: &[Offer]) -> Vec<usize> {
        let plain = offers.len();
        let ranked = self.ranked(offers);
        let mut counts = vec![0; plain];
        if ranked.is_empty() {
            return counts;
        }
        // Tokens that a step with so many drafts is expected to give.
        let mut expected = vec![plain as f64];
        for &(chance, _) in &ranked {
            expected.push(expected[expected.len() - 1] + chance);
        }
        let rate = |drafts: usize| expected[drafts] / self.costs.of(plain + drafts);
        let mut best = 0;
        for drafts in 1..expected.len() {
            if rate(drafts) > rate(best) {
                best = drafts;
            }
        }
        if rate(best) < MARGIN * rate(0) {
            best = 0;
        }
        self.saved = (self.saved + TRYING).min(MOST_SAVED);
        // What a step of another size would lose, in plain steps.
        let loss = |drafts: usize| {
            let fair = expected[drafts] / rate(best);
            (self.costs.of(plain + drafts) - fair).max(0.0) / self.costs.of(plain)
        };
        let due = |&drafts: &usize| {
            drafts != best
                && drafts < expected.len()
                && self.costs.unseen_for(plain + drafts) >= TRY_AFTER
                && loss(drafts) <= self.saved
        };
        let longest_unseen = |&drafts: &usize| self.costs.unseen_for(plain + drafts);
        if let Some(tried) = TRIES.into_iter().filter(due).max_by_key(longest_unseen) {
            self.saved -= loss(tried);
            best = tried;
        }
        for &(_, sequence) in &ranked[..best] {
            counts[sequence] += 1;
        }
        counts
    }

    /// Chances of all drafts, each with those before it, with their sequences; the best first. A sequence's own come in their
    /// order, because chances only fall along a guess.
    fn ranked(&self, offers: &[Offer]) -> Vec<(f64, usize)> {
        let mut ranked = Vec::new();
        for (sequence, offer) in offers.iter().enumerate() {
            let mut chance = 1.0;
            for draft in 0..offer.tokens {
                // If all before it were right, the match is by so much longer.
                chance *= self.odds.right(offer.matched + draft, offer.trust);
                ranked.push((chance, sequence));
            }
        }
        ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
        ranked.truncate(self.max_rows.saturating_sub(offers.len()));
        ranked
    }
}

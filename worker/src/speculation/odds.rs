//! How likely guesses are right. Pure.
//!
//! Guesses are compared with what comes whether or not they were drafted, so this is known before any draft costs something.

use super::lookup::LONGEST_MATCH;

/// Shortest match of each class, and the share of right guesses that is assumed before any was seen.
const CLASSES: [(usize, f64); 6] = [
    (2, 0.2),
    (3, 0.35),
    (4, 0.45),
    (6, 0.6),
    (9, 0.7),
    (14, 0.8),
];
/// An assumption weighs as much as this many guesses seen.
const ASSUMED: f64 = 8.0;
/// Guesses that a class remembers.
const REMEMBERED: f64 = 256.0;
/// How fast a sequence's own odds follow what it does, and how fast they are forgotten.
const FOLLOW: f64 = 0.35;
const FORGET: f64 = 0.98;
const MOST_TRUST: f64 = 4.0;

/// How much more often than others this sequence does what was guessed, as a difference of log odds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Trust(f64);

/// By the length of the match, over all sequences. Rates only: no token is in here.
#[derive(Debug, Clone)]
pub struct Odds {
    classes: [Share; CLASSES.len()],
}

#[derive(Debug, Clone, Copy)]
struct Share {
    right: f64,
    seen: f64,
}

impl Default for Odds {
    fn default() -> Self {
        let classes = CLASSES.map(|(_, right)| Share {
            right,
            seen: ASSUMED,
        });
        Self { classes }
    }
}

impl Odds {
    /// Probability that a guess after a match of `matched` tokens is right.
    pub fn right(&self, matched: usize, trust: Trust) -> f64 {
        let right = self.classes[class(matched)].right.clamp(0.001, 0.999);
        let log_odds = (right / (1.0 - right)).ln() + trust.0;
        1.0 / (1.0 + (-log_odds).exp())
    }

    /// A guess turned out right or wrong.
    pub fn saw(&mut self, matched: usize, trust: &mut Trust, right: bool) {
        let outcome = f64::from(u8::from(right));
        let surprise = outcome - self.right(matched, *trust);
        trust.0 = (trust.0 * FORGET + FOLLOW * surprise).clamp(-MOST_TRUST, MOST_TRUST);
        let share = &mut self.classes[class(matched)];
        share.seen = (share.seen + 1.0).min(REMEMBERED);
        share.right += (outcome - share.right) / share.seen;
    }
}

fn class(matched: usize) -> usize {
    let matched = matched.min(LONGEST_MATCH);
    CLASSES
        .partition_point(|&(shortest, _)| shortest <= matched)
        .saturating_sub(1)
}

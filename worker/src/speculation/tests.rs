//! What is guessed did follow in this very sequence, and drafts are made where they make answers faster.

use proptest::prelude::*;

use super::Speculation;
use super::lookup::{Guess, History, LONGEST_MATCH, MAX_DRAFTS};
use super::odds::Trust;
use super::payoff::{Offer, Payoff};
use crate::engine::Drafter;
use crate::scheduler::SequenceId;

/// Tokens in which the ends of `a` and `b` agree.
fn common_end(a: &[u32], b: &[u32]) -> usize {
    (0..a.len().min(b.len()))
        .take_while(|i| a[a.len() - 1 - i] == b[b.len() - 1 - i])
        .count()
}

/// Whether the guess is what came after an earlier place with the same tokens before it, and no other is longer.
fn check(tokens: &[u32], guess: Option<&Guess>) -> Result<(), TestCaseError> {
    let places = 2..tokens.len();
    let longest = places
        .clone()
        .map(|next| common_end(&tokens[..next], tokens))
        .max();
    let Some(guess) = guess else {
        prop_assert!(longest.is_none_or(|l| l < 2), "something was overlooked");
        return Ok(());
    };
    prop_assert_eq!(guess.tokens.len(), MAX_DRAFTS);
    prop_assert_eq!(Some(guess.matched), longest.map(|l| l.min(LONGEST_MATCH)));
    let whole = [tokens, &guess.tokens].concat();
    let followed = |next: usize| {
        common_end(&tokens[..next], tokens) >= guess.matched
            && (0..MAX_DRAFTS).all(|i| guess.tokens[i] == whole[next + i])
    };
    prop_assert!(places.into_iter().any(followed), "that never followed");
    Ok(())
}

proptest! {
    #[test]
    fn a_guess_followed_the_longest_match_in_this_very_sequence(
        tokens in prop::collection::vec(0u32..5, 0..60),
        prompt in 0usize..60,
    ) {
        let prompt = prompt.min(tokens.len());
        let mut grown = History::new(&tokens[..prompt]);
        for end in prompt..=tokens.len() {
            let guess = grown.guess();
            check(&tokens[..end], guess.as_ref())?;
            prop_assert_eq!(guess, History::new(&tokens[..end]).guess());
            grown.extend(&tokens[end..(end + 1).min(tokens.len())]);
        }
    }

    #[test]
    fn no_more_is_drafted_than_is_offered_and_fits(
        steps in prop::collection::vec(
            (prop::collection::vec((0usize..=MAX_DRAFTS, 2usize..=LONGEST_MATCH), 1..20), 1u32..100, any::<bool>()),
            1..60,
        ),
        max_rows in 1usize..64,
    ) {
        let mut payoff = Payoff::new(max_rows);
        for (offers, ms, right) in steps {
            let offer = |&(tokens, matched)| Offer { tokens, matched, trust: Trust::default() };
            let offers: Vec<Offer> = offers.iter().map(offer).collect();
            let counts = payoff.plan(&offers);
            prop_assert_eq!(counts.len(), offers.len());
            prop_assert!(counts.iter().zip(&offers).all(|(&count, offer)| count <= offer.tokens));
            let drafts: usize = counts.iter().sum();
            prop_assert!(drafts == 0 || offers.len() + drafts <= max_rows);
            payoff.stepped(offers.len() + drafts, f64::from(ms) / 1000.0);
            payoff.saw(offers[0].matched, &mut Trust::default(), right);
        }
    }
}

/// A congruential generator: the same throws in every run.
struct Dice(u64);

impl Dice {
    /// From 0 to 1.
    fn unit(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// An engine with one model of costs and sequences of one kind, without a model.
struct World {
    payoff: Payoff,
    sequences: Vec<Trust>,
    dice: Dice,
    /// Seconds of a step by its rows.
    cost: fn(usize) -> f64,
    /// How often there is a guess, and how often each of its tokens is right.
    offered: f64,
    right: f64,
}

/// What a number of steps gave.
#[derive(Debug, Clone, Copy)]
struct Outcome {
    /// Tokens a second over what one row for each sequence gives.
    speedup: f64,
    drafts_per_step: f64,
}

impl World {
    fn new(sequences: usize, cost: fn(usize) -> f64, offered: f64, right: f64) -> Self {
        Self {
            payoff: Payoff::new(256),
            sequences: vec![Trust::default(); sequences],
            dice: Dice(sequences as u64 * 7919 + (right * 1000.0) as u64),
            cost,
            offered,
            right,
        }
    }

    fn run(&mut self, steps: usize) -> Outcome {
        let (mut tokens, mut seconds, mut drafts) = (0, 0.0, 0);
        for _ in 0..steps {
            let mut offers = Vec::new();
            for &trust in &self.sequences {
                let there = self.dice.unit() < self.offered;
                let matched = 2 + (self.dice.unit() * 14.0) as usize;
                offers.push(Offer {
                    tokens: if there { MAX_DRAFTS } else { 0 },
                    matched,
                    trust,
                });
            }
            let counts = self.payoff.plan(&offers);
            let rows = counts.len() + counts.iter().sum::<usize>();
            drafts += rows - counts.len();
            for (i, (offer, count)) in offers.iter().zip(counts).enumerate() {
                tokens += 1;
                for draft in 0..offer.tokens.min(count + 1) {
                    let right = self.dice.unit() < self.right;
                    self.payoff
                        .saw(offer.matched + draft, &mut self.sequences[i], right);
                    if !right {
                        break;
                    }
                    tokens += usize::from(draft < count);
                }
            }
            // Steps vary, and some are disturbed for long.
            let mut noise = 0.85 + 0.3 * self.dice.unit();
            if self.dice.unit() < 0.01 {
                noise *= 8.0;
            }
            let cost = (self.cost)(rows);
            seconds += cost;
            self.payoff.stepped(rows, cost * noise);
        }
        let plain = steps as f64 * (self.cost)(self.sequences.len());
        Outcome {
            speedup: tokens as f64 / (steps * self.sequences.len()) as f64 * plain / seconds,
            drafts_per_step: drafts as f64 / steps as f64,
        }
    }
}

const LINEAR: fn(usize) -> f64 = |rows| 0.004 * rows as f64;
const FLAT: fn(usize) -> f64 = |rows| 0.040 + 0.002 * rows as f64;
/// As measured with 2 threads on a 1B shape: 44, 48, 84 and 130 ms for 1, 2, 4 and 8 rows.
const MEASURED: fn(usize) -> f64 = |rows| match rows {
    0..=2 => 0.040 + 0.004 * rows as f64,
    3..=4 => 0.048 + 0.018 * (rows - 2) as f64,
    _ => 0.084 + 0.0115 * (rows - 4) as f64,
};
/// Free up to 8 rows, then as a step each.
const KNEE: fn(usize) -> f64 = |rows| 0.040 * (rows as f64 - 7.0).max(1.0);
/// In tiles of 8 rows that cost the same however full.
const TILES: fn(usize) -> f64 = |rows| 0.040 * rows.div_ceil(8) as f64;

#[test]
fn it_does_not_slow_down_where_rows_cost_as_much_as_steps() {
    for sequences in [1, 3, 8, 24] {
        for right in [0.1, 0.5, 0.9] {
            let outcome = World::new(sequences, LINEAR, 0.8, right).run(4000);
            assert!(outcome.speedup > 0.97, "{sequences} {right} {outcome:?}");
            let share = outcome.drafts_per_step / sequences as f64;
            assert!(share < 0.1, "{sequences} {right} {outcome:?}");
        }
    }
}

#[test]
fn it_does_not_slow_down_where_one_row_more_costs_much() {
    for sequences in [8, 24] {
        for cost in [KNEE, TILES] {
            for right in [0.5, 0.9] {
                let outcome = World::new(sequences, cost, 0.7, right).run(4000);
                assert!(outcome.speedup > 0.97, "{sequences} {right} {outcome:?}");
            }
        }
    }
}

#[test]
fn it_does_not_slow_down_where_guesses_are_wrong() {
    for cost in [FLAT, MEASURED, KNEE, TILES] {
        for sequences in [1, 8] {
            for right in [0.0, 0.05] {
                let outcome = World::new(sequences, cost, 0.9, right).run(4000);
                assert!(outcome.speedup > 0.97, "{sequences} {right} {outcome:?}");
            }
        }
    }
}

#[test]
fn it_speeds_up_where_rows_are_cheap_and_guesses_right() {
    let flat = World::new(1, FLAT, 0.9, 0.95).run(2000);
    assert!(flat.speedup > 3.5, "{flat:?}");
    let measured = World::new(1, MEASURED, 0.9, 0.9).run(2000);
    assert!(measured.speedup > 1.7, "{measured:?}");
    let four = World::new(4, FLAT, 0.9, 0.9).run(2000);
    assert!(four.speedup > 2.0, "{four:?}");
    // Up to where rows are free, and not beyond.
    let knee = World::new(1, KNEE, 0.9, 0.9).run(2000);
    assert!(knee.speedup > 3.5, "{knee:?}");
    assert!(knee.drafts_per_step < 7.5, "{knee:?}");
}

#[test]
fn a_sequence_earns_its_reach() {
    let mut speculation = Speculation::new(64);
    let id = SequenceId(1);
    let text: Vec<u32> = (0..60).collect();
    // It quotes the text, all but the fortieth token, beside steps in which rows cost nothing.
    let answer = |i: usize| if i == 40 { 99 } else { text[i] };
    speculation.begin(id, &[&text[..], &text[..3]].concat());
    let (mut at, mut lengths) = (3, Vec::new());
    while at < 50 {
        speculation.stepped(1, 0.04);
        speculation.stepped(13, 0.04);
        let drafts = speculation
            .draft(&[id])
            .pop()
            .map_or(Vec::new(), |(_, d)| d);
        let right = (0..drafts.len()).take_while(|&i| drafts[i] == answer(at + i));
        let taken: Vec<u32> = (at..=at + right.count()).map(answer).collect();
        speculation.took(id, &taken, &drafts);
        lengths.push(drafts.len());
        at += taken.len();
    }
    assert!(lengths[..2].iter().all(|&l| l <= 1), "{lengths:?}");
    assert!(lengths.iter().any(|&l| l >= 6), "{lengths:?}");
}

#[test]
fn it_notices_when_costs_change() {
    let mut world = World::new(1, LINEAR, 0.9, 0.9);
    world.run(3000);
    world.cost = FLAT;
    let found = world.run(1500);
    let settled = world.run(1500);
    assert!(
        found.speedup > 1.5 && settled.speedup > 2.4,
        "{found:?} {settled:?}"
    );
    world.cost = LINEAR;
    world.run(500);
    let back = world.run(3000);
    assert!(back.speedup > 0.97, "{back:?}");
}

#[test]
fn a_load_that_comes_and_goes_is_not_taken_for_a_change_of_shape() {
    let mut world = World::new(1, LINEAR, 0.9, 0.9);
    world.run(1000);
    for _ in 0..10 {
        world.cost = |rows| 2.5 * LINEAR(rows);
        let loaded = world.run(150);
        world.cost = LINEAR;
        let free = world.run(150);
        assert!(
            loaded.speedup > 0.95 && free.speedup > 0.95,
            "{loaded:?} {free:?}"
        );
    }
}

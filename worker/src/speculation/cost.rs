//! What a step costs by its rows. Pure.
//!
//! Decisions need only ratios, so a level that follows the machine's load within a few steps is kept apart from the shape, which
//! is learnt from steps of different sizes that lie close together. A load that comes and goes then changes the level alone.

use std::ops::Range;

/// Rows between which the shape is taken for a straight line. Kernels compute rows in tiles, so that one row more may cost much or
/// nothing: where single drafts are decided, each number of rows is its own.
const KNOTS: [usize; 26] = [
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20, 24, 28, 32, 40, 48, 64, 128, 256,
    512,
];
/// Cost of a further row over that of the first, as long as nothing was measured: drafts never pay then.
const ASSUMED_SLOPE: f64 = 1.0;
/// How fast the level follows, and how far one step may move it: on a shared machine single steps take many times as long.
const LEVEL_RATE: f64 = 0.125;
const LEVEL_MOST: f64 = 0.4;
/// How fast a knot follows when it is seen often, and how much of having been seen is left after each step.
const KNOT_RATE: f64 = 0.1;
const KEPT: f64 = 0.99;
/// Surprises, as logarithms: the most that one counts for, and what is first held for a disturbance.
const KNOT_MOST: f64 = 1.0;
const ODD: f64 = 0.6;
/// Steps unlike those before them after which a knot that none of them was near counts as never seen.
const FORGOTTEN: u64 = 256;

#[derive(Debug, Clone, Copy)]
struct Knot {
    /// Cost relative to the level.
    cost: f64,
    /// Steps that it could be compared in, lately.
    seen: f64,
    /// The last one was far from what was expected.
    odd: bool,
    /// The step count when it was last seen; 0 for never.
    last: u64,
    /// The count of comparisons at that time.
    compared: u64,
    /// Part of the level's memory that comes from here.
    share: f64,
}

/// Cost of steps without prompt rows.
#[derive(Debug, Clone)]
pub struct Costs {
    /// Seconds; 0 before the first step.
    level: f64,
    knots: [Knot; KNOTS.len()],
    steps: u64,
    /// Steps unlike those before them.
    compared: u64,
}

impl Default for Costs {
    fn default() -> Self {
        let knots = KNOTS.map(|rows| Knot {
            cost: 1.0 + ASSUMED_SLOPE * (rows - 1) as f64,
            seen: 0.0,
            odd: false,
            last: 0,
            compared: 0,
            share: 0.0,
        });
        Self {
            level: 0.0,
            knots,
            steps: 0,
            compared: 0,
        }
    }
}

impl Costs {
    /// Cost of a step of `rows` rows, in units of the level.
    pub fn of(&self, rows: usize) -> f64 {
        let (low, high_weight) = place(rows);
        let Knot { cost, .. } = self.knots[low];
        match self.knots.get(low + 1) {
            Some(high) => cost + (high.cost - cost) * high_weight,
            None => cost * rows as f64 / KNOTS[low] as f64,
        }
    }

    /// Steps since one of about so many rows; as good as for ever if there was none or it left doubts.
    pub fn unseen_for(&self, rows: usize) -> u64 {
        let (low, high_weight) = place(rows);
        let knot = &self.knots[(low + usize::from(high_weight > 0.5)).min(KNOTS.len() - 1)];
        if knot.last == 0 || knot.odd {
            return u64::MAX;
        }
        self.steps - knot.last
    }

    /// A step of `rows` rows took `seconds`.
    pub fn saw(&mut self, rows: usize, seconds: f64) {
        if rows == 0 || !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        self.steps += 1;
        let expected = self.of(rows);
        if self.level == 0.0 {
            self.level = seconds / expected;
        }
        // How much more than expected, as a logarithm: twice and half are equally far.
        let surprise = (seconds / self.level / expected).ln();
        let (low, high_weight) = place(rows);
        let weight = |knot: usize| match knot.checked_sub(low) {
            Some(0) => 1.0 - high_weight,
            Some(1) => high_weight,
            _ => 0.0,
        };
        // Against steps of the same size nothing can be told from load.
        let same: f64 = (low..KNOTS.len().min(low + 2))
            .map(|k| weight(k) * self.knots[k].share)
            .sum();
        let contrast = (1.0 - same).clamp(0.0, 1.0);
        self.compared += u64::from(contrast > 0.5);
        let most = surprise.clamp(-LEVEL_MOST, LEVEL_MOST);
        for (k, knot) in self.knots.iter_mut().enumerate() {
            let weight = weight(k);
            knot.seen *= KEPT;
            if weight > 0.0 {
                let fresh = knot.last == 0;
                knot.last = self.steps;
                knot.compared = self.compared;
                let odd = !fresh && surprise.abs() > ODD;
                let rate = (1.0 / (1.0 + knot.seen)).max(KNOT_RATE);
                let moved = if fresh {
                    surprise
                } else if odd && !knot.odd {
                    // A single odd step is a disturbance; two in a row are how it is.
                    0.0
                } else {
                    rate * surprise.clamp(-KNOT_MOST, KNOT_MOST)
                };
                knot.seen += weight * contrast;
                knot.cost *= (weight * contrast * moved).exp();
                knot.odd = odd;
            }
            if self.compared - knot.compared >= FORGOTTEN {
                knot.last = 0;
            }
            knot.share += LEVEL_RATE * (weight - knot.share);
        }
        self.level *= (LEVEL_RATE * most).exp();
        self.complete();
    }

    /// Knots that were never seen lie on lines through those that were.
    fn complete(&mut self) {
        let seen: Vec<usize> = (0..KNOTS.len())
            .filter(|&k| self.knots[k].last > 0)
            .collect();
        let (Some(&first), Some(&last)) = (seen.first(), seen.last()) else {
            return;
        };
        let slope = |from: usize, to: usize| {
            let cost = self.knots[to].cost - self.knots[from].cost;
            cost / (KNOTS[to] - KNOTS[from]) as f64
        };
        let assumed = 1.0 + ASSUMED_SLOPE * (KNOTS[first] - 1) as f64;
        let assumed = ASSUMED_SLOPE * self.knots[first].cost / assumed;
        // Beyond the last it goes on as over its upper half: from one neighbour to the next there is more noise than slope.
        let half = seen.iter().rev().find(|&&k| 2 * KNOTS[k] <= KNOTS[last]);
        let beyond = half.map_or(assumed, |&half| slope(half, last).max(0.0));
        let between: Vec<(Range<usize>, usize, f64)> = seen
            .windows(2)
            .map(|pair| (pair[0] + 1..pair[1], pair[0], slope(pair[0], pair[1])))
            .collect();
        self.draw(0..first, first, assumed);
        self.draw(last + 1..KNOTS.len(), last, beyond);
        for (knots, through, slope) in between {
            self.draw(knots, through, slope);
        }
    }

    /// Puts knots on the line of this slope through the knot `through`.
    fn draw(&mut self, knots: Range<usize>, through: usize, slope: f64) {
        for k in knots {
            let rows = KNOTS[k] as f64 - KNOTS[through] as f64;
            self.knots[k].cost = self.knots[through].cost + slope * rows;
        }
    }
}

/// The knot at or below `rows`, and the weight of the one above.
fn place(rows: usize) -> (usize, f64) {
    let low = KNOTS
        .partition_point(|&knot| knot <= rows)
        .saturating_sub(1);
    match KNOTS.get(low + 1) {
        Some(&high) => {
            let width = (high - KNOTS[low]) as f64;
            (low, (rows.max(1) - KNOTS[low]) as f64 / width)
        }
        None => (low, 0.0),
    }
}

//! The head of a row of logits: what a draw and its probabilities need.

/// The tokens that may be drawn from a row.
#[derive(Debug, Clone, Copy)]
pub struct Allowed<'a> {
    /// Bit `i % 32` of word `i / 32` is token `i`; tokens beyond are not allowed.
    pub words: &'a [u32],
    /// The token of the row's first logit.
    pub first: usize,
}

impl Allowed<'_> {
    /// The 64 tokens from column `at` on, the first in the lowest bit.
    #[inline(always)]
    pub(crate) fn bits(&self, at: usize) -> u64 {
        let token = self.first + at;
        let word = |i: usize| u64::from(self.words.get(token / 32 + i).copied().unwrap_or(0));
        let (low, shift) = (word(0) | word(1) << 32, token % 32);
        match shift {
            0 => low,
            _ => low >> shift | word(2) << (64 - shift),
        }
    }
}

/// What is told of a row, or of a part of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Head {
    /// The largest logits (of the tokens allowed) with their columns, largest first, equal ones by column. NaN is none of them.
    pub top: Vec<(u32, f32)>,
    /// Of all tokens, allowed or not; NaN does not count.
    pub largest: f32,
    /// Σ exp(logit − largest) over all tokens; NaN if a logit is.
    pub exp_sum: f64,
}

impl Head {
    /// The head of a row from those of its parts, whose `top`s may come in any order, each as long as the row's `k` ask for.
    pub fn of_parts(parts: impl IntoIterator<Item = Head>, k: usize) -> Head {
        let mut parts: Vec<Head> = parts.into_iter().collect();
        let largest = parts.iter().map(|p| p.largest);
        let largest = largest.fold(f32::NEG_INFINITY, f32::max);
        let exp_sum = |p: &Head| p.exp_sum * f64::from(p.largest - largest).exp();
        let exp_sum = parts.iter().map(exp_sum).sum();
        let mut top: Vec<(u32, f32)> = parts.iter_mut().flat_map(|p| p.top.drain(..)).collect();
        keep_best(&mut top, k);
        top.sort_unstable_by(better);
        Head {
            top,
            largest,
            exp_sum,
        }
    }
}

/// Larger logits first, equal ones by column. `-0.0 == 0.0`, but total_cmp orders them: both are fine as candidates.
pub(crate) fn better(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Leaves the best `k` in any order, the least of them last.
pub(crate) fn keep_best(candidates: &mut Vec<(u32, f32)>, k: usize) {
    if k > 0 && candidates.len() > k {
        candidates.select_nth_unstable_by(k - 1, better);
    }
    candidates.truncate(k);
}

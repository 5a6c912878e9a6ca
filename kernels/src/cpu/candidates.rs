//! The head of a part of a row of logits.

use super::simd::{Job, Simd, exp};
use crate::candidates::{Allowed, Head, keep_best};

/// Logits compared at once before any is looked at singly.
const CHUNK: usize = 64;
/// Logits whose exponentials are added up in f32.
const SUM: usize = 1024;

/// One pass for the largest, one for the sum, one for the candidates.
pub(crate) struct Summarise<'a> {
    pub logits: &'a [f32],
    /// The row's column that they begin at.
    pub first: usize,
    pub allowed: Option<Allowed<'a>>,
    pub k: usize,
}

impl Job for Summarise<'_> {
    type Out = Head;
    /// `top` comes in any order.
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Head {
        // SAFETY: the processor has `S`'s instructions.
        let (largest, exp_sum) = unsafe {
            let largest = largest::<S>(self.logits);
            (largest, exp_sum::<S>(self.logits, largest))
        };
        Head {
            top: self.top(),
            largest,
            exp_sum,
        }
    }
}

impl Summarise<'_> {
    #[inline(always)]
    fn top(&self) -> Vec<(u32, f32)> {
        let k = self.k.min(self.logits.len());
        if k == 0 {
            return Vec::new();
        }
        // Candidates gather above the best threshold known; each time twice k are there, the lower half goes.
        let mut kept: Vec<(u32, f32)> = Vec::with_capacity(2 * k + CHUNK);
        let mut threshold = f32::NEG_INFINITY;
        for (chunk_index, chunk) in self.logits.chunks(CHUNK).enumerate() {
            let first = self.first + chunk_index * CHUNK;
            let mut bits = self.allowed.map_or(u64::MAX, |allowed| allowed.bits(first));
            // One comparison a chunk skips most of a vocabulary.
            let full = kept.len() >= k;
            if bits == 0 || full && !chunk.iter().fold(false, |any, &x| any | (x > threshold)) {
                continue;
            }
            bits &= u64::MAX >> (CHUNK - chunk.len());
            while bits != 0 {
                let i = bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let x = chunk[i];
                let few = kept.len() < k && !x.is_nan() && self.allowed.is_none();
                if x > threshold || few {
                    kept.push(((first + i) as u32, x));
                }
            }
            if kept.len() >= 2 * k {
                keep_best(&mut kept, k);
                threshold = kept[k - 1].1;
            }
        }
        keep_best(&mut kept, k);
        kept
    }
}

/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn largest<S: Simd>(logits: &[f32]) -> f32 {
    let vectors = logits.chunks_exact(S::LANES);
    let rest = vectors.remainder().iter().copied();
    // SAFETY: each chunk is a whole vector.
    let most = unsafe {
        let lowest = S::splat(f32::NEG_INFINITY);
        // A NaN among the new ones leaves what was there.
        S::max_across(vectors.fold(lowest, |most, v| S::max(S::load(v.as_ptr()), most)))
    };
    rest.fold(most, f32::max)
}

/// Σ exp(x − largest); the rest of a last vector counts as a vector of its own.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn exp_sum<S: Simd>(logits: &[f32], largest: f32) -> f64 {
    if largest == f32::NEG_INFINITY {
        // No difference to such a one is a number.
        let nan = logits.iter().any(|x| x.is_nan());
        return if nan { f64::NAN } else { 0.0 };
    }
    let mut sum = 0.0;
    // SAFETY: whole vectors, the last one in an array of the most lanes that there are.
    unsafe {
        let largest = S::splat(largest);
        for chunk in logits.chunks(SUM) {
            let vectors = chunk.chunks_exact(S::LANES);
            let rest = vectors.remainder();
            let mut sums = S::splat(0.0);
            for v in vectors {
                sums = S::add(sums, exp::<S>(S::sub(S::load(v.as_ptr()), largest)));
            }
            if !rest.is_empty() {
                let mut last = [f32::NEG_INFINITY; 16];
                last[..rest.len()].copy_from_slice(rest);
                sums = S::add(sums, exp::<S>(S::sub(S::load(last.as_ptr()), largest)));
            }
            sum += f64::from(S::sum(sums));
        }
    }
    sum
}

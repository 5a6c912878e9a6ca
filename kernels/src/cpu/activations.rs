//! Rows of activations as bytes: once for all the matrices that share them.

use super::layout::BLOCK;
use super::simd::{Job, Simd};

/// 32 activations of one row: `x ≈ d * q`, with sums that stand in for the weights' zero points and minima.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct XBlock {
    /// In [-127, 127], or [`BIAS`] more, as the kernel wants them.
    pub q: [i8; BLOCK],
    pub d: f32,
    /// `d * Σ q`.
    pub d_sum: f32,
    /// `-Σ q`.
    pub negative_sum: i32,
    /// The same of the first sixteen.
    pub negative_first: i32,
}

/// What is added to each byte where a kernel wants them unsigned.
pub(crate) const BIAS: u8 = 128;

/// Below this largest magnitude a block counts as zeros: its inverse would overflow.
const SMALLEST: f32 = 1e-35;

/// Quantises `blocks` blocks, from `x` to `out`. A block with a value that is not finite gets a scale of NaN.
pub(crate) struct Quantise {
    pub x: *const f32,
    pub out: *mut XBlock,
    pub blocks: usize,
    /// Adds [`BIAS`].
    pub biased: bool,
}

impl Job for Quantise {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for b in 0..self.blocks {
            // SAFETY: `x` is valid for 32 reads a block and `out` for one write, by whoever made the job.
            unsafe {
                quantise::<S>(self.x.add(b * BLOCK), self.out.add(b));
                if self.biased {
                    // Not by `map`, which is a call.
                    for q in &mut (*self.out.add(b)).q {
                        *q = (*q as u8 ^ BIAS) as i8;
                    }
                }
            }
        }
    }
}

/// # Safety
/// `x` is valid for 32 reads, `out` for a write.
#[inline(always)]
unsafe fn quantise<S: Simd>(x: *const f32, out: *mut XBlock) {
    // SAFETY: LANES divides 32, so every vector lies within the block; the rest is passed on to the caller.
    unsafe {
        let mut largest = S::splat(0.0);
        let mut finite = S::splat(0.0);
        for i in (0..BLOCK).step_by(S::LANES) {
            let v = S::load(x.add(i));
            largest = S::max(S::abs(v), largest);
            finite = S::fma(v, S::splat(0.0), finite);
        }
        let largest = S::max_across(largest);
        let mut block = XBlock {
            q: [0; BLOCK],
            d: 0.0,
            d_sum: 0.0,
            negative_sum: 0,
            negative_first: 0,
        };
        if S::sum(finite) != 0.0 {
            block.d = f32::NAN;
            block.d_sum = f32::NAN;
        } else if largest > SMALLEST {
            let inverse = S::splat(127.0 / largest);
            for i in (0..BLOCK).step_by(S::LANES) {
                S::store_i8(
                    block.q.as_mut_ptr().add(i),
                    S::mul(S::load(x.add(i)), inverse),
                );
            }
            let sum = |q: &[i8]| q.iter().map(|&q| i32::from(q)).sum::<i32>();
            let first = sum(&block.q[..16]);
            let all = first + sum(&block.q[16..]);
            block.d = largest / 127.0;
            block.d_sum = block.d * all as f32;
            block.negative_sum = -all;
            block.negative_first = -first;
        }
        out.write(block);
    }
}

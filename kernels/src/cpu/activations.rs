//! Rows of activations as bytes: once for all the matrices that share them.

use super::layout::BLOCK;
use super::simd::{Job, Simd};

/// 32 activations of one row: `x ≈ d * q`, with sums that stand in for the weights' zero points and minima.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct XBlock {
    /// Bytes in [-127, 127], or [`BIAS`] more, as the kernel wants them: four a word.
    pub q: [u32; BLOCK / 4],
    pub d: f32,
    /// `d * Σ q`.
    pub d_sum: f32,
    /// `-Σ q`, apart for even and odd pairs of columns: as products are summed where they are summed in 16 bits.
    pub negative: [i16; 2],
    /// The same of the first sixteen.
    pub negative_first: [i16; 2],
}

impl XBlock {
    /// Of the last sixteen.
    #[inline(always)]
    pub fn negative_last(&self) -> [i16; 2] {
        [0, 1].map(|i| self.negative[i] - self.negative_first[i])
    }

    /// `-Σ q`
    #[inline(always)]
    pub fn negative_sum(&self) -> i32 {
        total(self.negative)
    }
}

/// Even and odd pairs together.
#[inline(always)]
pub(crate) fn total(pairs: [i16; 2]) -> i32 {
    i32::from(pairs[0]) + i32::from(pairs[1])
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
                let mut block = quantise::<S>(self.x.add(b * BLOCK));
                if self.biased {
                    block.q = block.q.map(|four| four ^ FOUR_BIASES);
                }
                self.out.add(b).write(block);
            }
        }
    }
}

/// # Safety
/// `x` is valid for 32 reads.
#[inline(always)]
unsafe fn quantise<S: Simd>(x: *const f32) -> XBlock {
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
            q: [0; BLOCK / 4],
            d: 0.0,
            d_sum: 0.0,
            negative: [0; 2],
            negative_first: [0; 2],
        };
        if S::sum(finite) != 0.0 {
            block.d = f32::NAN;
            block.d_sum = f32::NAN;
        } else if largest > SMALLEST {
            let inverse = S::splat(127.0 / largest);
            for i in (0..BLOCK).step_by(S::LANES) {
                S::store_i8(
                    block.q.as_mut_ptr().cast::<i8>().add(i),
                    S::mul(S::load(x.add(i)), inverse),
                );
            }
            let pairs = block.q.map(|four| pairs(four ^ FOUR_BIASES));
            let (first, last) = pairs.split_at(4);
            let (first, last) = (first.iter().sum::<u32>(), last.iter().sum::<u32>());
            block.negative_first = less_biases(first, 16);
            block.negative = less_biases(first + last, 32);
            block.d = largest / 127.0;
            block.d_sum = block.d * -block.negative_sum() as f32;
        }
        block
    }
}

const FOUR_BIASES: u32 = u32::from_le_bytes([BIAS; 4]);

/// Sums of both pairs of four unsigned bytes, in the halves of a word.
#[inline(always)]
fn pairs(four: u32) -> u32 {
    (four & 0x00ff_00ff) + (four >> 8 & 0x00ff_00ff)
}

/// Minus the sums of [`pairs`], without the biases of so many columns.
#[inline(always)]
fn less_biases(sums: u32, columns: i16) -> [i16; 2] {
    let biases = columns / 2 * i16::from(BIAS);
    [biases - sums as u16 as i16, biases - (sums >> 16) as i16]
}

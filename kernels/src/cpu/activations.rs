//! Rows of activations as bytes: once for all the matrices that share them.

use super::layout::BLOCK;
use super::simd::{Job, Simd};

/// 32 activations of one row: `x ≈ d * 2^shift * q`, with sums that stand in for the weights' zero points and minima. Eight that meet one
/// block of a K-quant share `d`, so that all its products are summed as integers; the shift keeps small ones beside large ones.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct XBlock {
    /// Bytes in [-127, 127], or [`BIAS`] more, as the kernel wants them: four a word.
    pub q: [u32; BLOCK / 4],
    pub d: f32,
    /// At most [`MOST_SHIFT`]; zero where a block has a scale of its own.
    pub shift: u32,
    /// [`d_sum`](XBlock::d_sum), or [`two_sums`](XBlock::two_sums).
    sum: u32,
    /// `-Σ q`, apart for even and odd pairs of columns: as products are summed where they are summed in 16 bits.
    pub negative: [i16; 2],
    /// The same of the first sixteen.
    pub negative_first: [i16; 2],
}

impl XBlock {
    /// `d * Σ q`, where the block has a scale of its own.
    #[inline(always)]
    pub fn d_sum(&self) -> f32 {
        f32::from_bits(self.sum)
    }

    /// `2^shift * Σ q` of this block and the next as 16 bits each, in every other block of those that share a scale.
    #[inline(always)]
    pub fn two_sums(&self) -> i32 {
        self.sum as i32
    }

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

/// Products of 32 codes of six bits, their factors, eight parts and so many doublings fit into 32 bits: 32 · 32 · 127 · 128 · 8 · 8.
const MOST_SHIFT: u32 = 3;

/// What is added to each byte where a kernel wants them unsigned.
pub(crate) const BIAS: u8 = 128;

/// Below this largest magnitude a block counts as zeros: its inverse would overflow.
const SMALLEST: f32 = 1e-35;

/// Quantises `blocks` blocks, from `x` to `out`. Where a value is not finite, the scale is NaN.
pub(crate) struct Quantise {
    pub x: *const f32,
    pub out: *mut XBlock,
    pub blocks: usize,
    /// So many blocks share a scale.
    pub group: usize,
    /// Adds [`BIAS`].
    pub biased: bool,
}

impl Job for Quantise {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for first in (0..self.blocks).step_by(self.group) {
            // SAFETY: `x` is valid for 32 reads a block and `out` for one write, by whoever made the job.
            unsafe {
                // What is not finite shows in the whole group.
                let mut unit = largest::<S>(self.x.add(first * BLOCK), self.group * BLOCK);
                if self.group > 1 {
                    unit /= (1 << MOST_SHIFT) as f32;
                }
                let mut sums = 0;
                for b in first..first + self.group {
                    let x = self.x.add(b * BLOCK);
                    let (mut range, mut shift) = (unit, 0);
                    if self.group > 1 {
                        let largest = largest::<S>(x, BLOCK);
                        while shift < MOST_SHIFT && largest > range {
                            (range, shift) = (2.0 * range, shift + 1);
                        }
                    }
                    let mut block = quantise::<S>(x, range);
                    block.d = unit / 127.0;
                    block.shift = shift;
                    if self.biased {
                        block.q = block.q.map(|four| four ^ FOUR_BIASES);
                    }
                    if self.group > 1 {
                        // At most 32 · 127 · 8.
                        let sum = -block.negative_sum() << shift;
                        sums = sums >> 16 | (sum as u32) << 16;
                        if b % 2 == 1 {
                            (*self.out.add(b - 1)).sum = sums;
                        }
                    }
                    self.out.add(b).write(block);
                }
            }
        }
    }
}

/// The largest magnitude, or NaN where one is not finite.
///
/// # Safety
/// `x` is valid for `len` reads, a multiple of 32.
#[inline(always)]
unsafe fn largest<S: Simd>(x: *const f32, len: usize) -> f32 {
    // SAFETY: LANES divides 32, so every vector lies within the floats; the rest is passed on to the caller.
    unsafe {
        let mut largest = S::splat(0.0);
        let mut finite = S::splat(0.0);
        for i in (0..len).step_by(S::LANES) {
            let v = S::load(x.add(i));
            largest = S::max(S::abs(v), largest);
            finite = S::fma(v, S::splat(0.0), finite);
        }
        if S::sum(finite) == 0.0 {
            S::max_across(largest)
        } else {
            f32::NAN
        }
    }
}

/// A block of magnitudes up to `largest`.
///
/// # Safety
/// `x` is valid for 32 reads.
#[inline(always)]
unsafe fn quantise<S: Simd>(x: *const f32, largest: f32) -> XBlock {
    // SAFETY: LANES divides 32, so every vector lies within the block; the rest is passed on to the caller.
    unsafe {
        let mut block = XBlock {
            q: [0; BLOCK / 4],
            d: 0.0,
            shift: 0,
            sum: 0,
            negative: [0; 2],
            negative_first: [0; 2],
        };
        if largest.is_nan() {
            block.sum = f32::NAN.to_bits();
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
            block.sum = (largest / 127.0 * -block.negative_sum() as f32).to_bits();
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

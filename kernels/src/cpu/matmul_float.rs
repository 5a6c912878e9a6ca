//! F32, F16 and BF16 weights times f32 activations: tiles of a few panels by a few rows.
//!
//! Each lane adds its columns 32 at a time, then the parts, in order: small error, and the same in any tile.
#![allow(clippy::needless_range_loop)] // rows index several arrays at once, and unroll as written

use super::layout::Matrix;
use super::matmul_int::{Output, rows_at_once};
use super::simd::{Job, Simd};
use crate::format::Format;

/// Columns that are summed before their sum is added to the rest.
const PART: usize = 32;

/// As [`MultiplyInts`](super::matmul_int::MultiplyInts), with `x` as floats.
pub(crate) struct MultiplyFloats<'a> {
    pub w: &'a Matrix,
    pub ends: &'a [usize],
    pub panels: std::ops::Range<usize>,
    /// `[rows, w.cols]`
    pub x: *const f32,
    pub rows: usize,
    pub out: Output,
}

impl Job for MultiplyFloats<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: passed on to whoever made the job.
        unsafe {
            match self.w.format {
                Format::F32 => self.run_as::<S, F32>(),
                Format::F16 => self.run_as::<S, F16>(),
                Format::BF16 => self.run_as::<S, Bf16>(),
                _ => unreachable!("quantised formats have kernels of their own"),
            }
        }
    }
}

impl MultiplyFloats<'_> {
    #[inline(always)]
    unsafe fn run_as<S: Simd, W: Element>(self) {
        let rows_at_once = rows_at_once(4 * self.w.cols);
        let mut r = 0;
        // SAFETY: the panels lie within the matrix, the rows within `x` and `out`.
        unsafe {
            if S::TILES {
                // Some rows stay in the cache while every panel meets them; only the last few rows are taken panels first.
                while self.rows - r >= 8 {
                    let end = r + (self.rows - r).min(rows_at_once) / 8 * 8;
                    for p in self.panels.clone() {
                        for row in (r..end).step_by(8) {
                            self.tile::<S, W, 1, 8>(p, row);
                        }
                    }
                    r = end;
                }
                if self.rows - r >= 4 {
                    self.strip::<S, W, 2, 4>(r);
                    r += 4;
                }
                if self.rows - r >= 2 {
                    self.strip::<S, W, 4, 2>(r);
                    r += 2;
                }
            }
            while r < self.rows {
                self.strip::<S, W, 4, 1>(r);
                r += 1;
            }
        }
    }

    /// All panels, `P` at a time so that enough sums are under way to hide an addition's latency.
    #[inline(always)]
    unsafe fn strip<S: Simd, W: Element, const P: usize, const R: usize>(&self, row: usize) {
        let mut p = self.panels.start;
        // SAFETY: passed on to the caller.
        unsafe {
            while p + P <= self.panels.end {
                self.tile::<S, W, P, R>(p, row);
                p += P;
            }
            while p < self.panels.end {
                self.tile::<S, W, 1, R>(p, row);
                p += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, W: Element, const P: usize, const R: usize>(
        &self,
        panel: usize,
        row: usize,
    ) {
        // SAFETY: a panel holds `cols` vectors; the rows exist.
        unsafe {
            let x = self.x.add(row * self.w.cols);
            let mut first = 0;
            for (part, &end) in self.ends.iter().enumerate() {
                let sums = self.part::<S, W, P, R>(panel, x, first..end);
                first = end;
                for p in 0..P {
                    self.out
                        .put::<S, R>(&sums[p], self.w, panel + p, row, part == 0);
                }
            }
        }
    }

    /// One part's sums for a tile whose first row begins at `x`.
    #[inline(always)]
    unsafe fn part<S: Simd, W: Element, const P: usize, const R: usize>(
        &self,
        panel: usize,
        x: *const f32,
        columns: std::ops::Range<usize>,
    ) -> [[S::F; R]; P] {
        let w = self.w;
        // SAFETY: passed on to the caller.
        unsafe {
            let data = w.data.as_ptr().add(panel * w.panel_bytes);
            let mut sums = [[S::splat(0.0); R]; P];
            let mut k = columns.start;
            while k < columns.end {
                let end = (k + PART).min(columns.end);
                let mut part = [[S::splat(0.0); R]; P];
                while k < end {
                    for p in 0..P {
                        let at = p * w.panel_bytes + k * S::LANES * W::BYTES;
                        let weights = W::load::<S>(data.add(at));
                        for r in 0..R {
                            let x = S::splat(*x.add(r * w.cols + k));
                            part[p][r] = S::fma(weights, x, part[p][r]);
                        }
                    }
                    k += 1;
                }
                for p in 0..P {
                    for r in 0..R {
                        sums[p][r] = S::add(sums[p][r], part[p][r]);
                    }
                }
            }
            sums
        }
    }
}

/// How a float weight lies in a panel.
trait Element {
    const BYTES: usize;
    /// # Safety
    /// `p` is valid for a vector of this element.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

struct F32;
impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load(p.cast()) }
    }
}

struct F16;
impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load_f16(p.cast()) }
    }
}

struct Bf16;
impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load_bf16(p.cast()) }
    }
}

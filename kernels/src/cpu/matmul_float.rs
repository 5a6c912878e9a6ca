//! F32, F16 and BF16 weights times f32 activations: tiles of a few panels by a few rows.
//!
//! Each lane adds its columns 32 at a time, then the parts, in order: small error, and the same in any tile.
#![allow(clippy::needless_range_loop)] // rows index several arrays at once, and unroll as written

use super::layout::{Matrix, STRIP, codes_at};
use super::matmul_int::rows_at_once;
use super::output::Output;
use super::simd::{Job, Simd};
use crate::format::Format;

/// Columns that are summed before their sum is added to the rest.
const PART: usize = 32;

/// As [`MultiplyInts`](super::matmul_int::MultiplyInts), with `x` as floats.
pub(crate) struct MultiplyFloats<'a> {
    pub w: &'a Matrix,
    pub ends: &'a [usize],
    pub strips: std::ops::Range<usize>,
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
        // SAFETY: the strips lie within the matrix, the rows within `x` and `out`.
        unsafe {
            if S::TILES {
                // Some rows stay in the cache while every panel meets them; only the last few rows are taken panels first.
                while self.rows - r >= 8 {
                    let end = r + (self.rows - r).min(rows_at_once) / 8 * 8;
                    for s in self.strips.clone() {
                        for i in (0..self.w.panels_of(s)).step_by(2) {
                            for row in (r..end).step_by(4) {
                                self.tile::<S, W, 2, 4>(s, i, row);
                            }
                        }
                    }
                    r = end;
                }
                if self.rows - r >= 4 {
                    self.all_strips::<S, W, 2, 4>(r);
                    r += 4;
                }
                if self.rows - r >= 2 {
                    self.all_strips::<S, W, STRIP, 2>(r);
                    r += 2;
                }
            }
            while r < self.rows {
                self.all_strips::<S, W, STRIP, 1>(r);
                r += 1;
            }
        }
    }

    /// All strips, `P` panels at a time so that enough sums are under way to hide an addition's latency.
    #[inline(always)]
    unsafe fn all_strips<S: Simd, W: Element, const P: usize, const R: usize>(&self, row: usize) {
        for s in self.strips.clone() {
            for i in (0..self.w.panels_of(s)).step_by(P) {
                // SAFETY: passed on to the caller.
                unsafe { self.tile::<S, W, P, R>(s, i, row) };
            }
        }
    }

    /// Panels `i..i + P` of a strip, of which the last ones may have no rows.
    #[inline(always)]
    unsafe fn tile<S: Simd, W: Element, const P: usize, const R: usize>(
        &self,
        strip: usize,
        i: usize,
        row: usize,
    ) {
        // SAFETY: a strip holds `cols` vectors of each panel; the rows exist.
        unsafe {
            let x = self.x.add(row * self.w.cols);
            let panels = self
                .w
                .strip(strip)
                .as_ptr()
                .add(codes_at(W::FORMAT, S::LANES, i, 0));
            let mut first = 0;
            let mut totals = [[S::no_grid(); R]; P];
            for &end in self.ends {
                let sums = self.part::<S, W, P, R>(panels, x, first..end);
                first = end;
                for p in 0..P {
                    let panel = strip * STRIP + i + p;
                    for r in 0..R {
                        let total = &mut totals[p][r];
                        self.out
                            .take::<S>(self.w, panel, row + r, sums[p][r], total);
                    }
                }
            }
            for p in 0..P {
                for r in 0..R {
                    let panel = strip * STRIP + i + p;
                    self.out.finish::<S>(self.w, panel, row + r, totals[p][r]);
                }
            }
        }
    }

    /// One part's sums for a tile whose first panel begins at `panels` and whose first row at `x`.
    #[inline(always)]
    unsafe fn part<S: Simd, W: Element, const P: usize, const R: usize>(
        &self,
        panels: *const u8,
        x: *const f32,
        columns: std::ops::Range<usize>,
    ) -> [[S::F; R]; P] {
        let cols = self.w.cols;
        // SAFETY: passed on to the caller.
        unsafe {
            let mut sums = [[S::splat(0.0); R]; P];
            let mut k = columns.start;
            while k < columns.end {
                let end = (k + PART).min(columns.end);
                let mut part = [[S::splat(0.0); R]; P];
                while k < end {
                    for p in 0..P {
                        let at = codes_at(W::FORMAT, S::LANES, p, k);
                        let weights = W::load::<S>(panels.add(at));
                        for r in 0..R {
                            let x = S::splat(*x.add(r * cols + k));
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
    const FORMAT: Format;
    /// # Safety
    /// `p` is valid for a vector of this element.
    unsafe fn load<S: Simd>(p: *const u8) -> S::F;
}

struct F32;
impl Element for F32 {
    const FORMAT: Format = Format::F32;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load(p.cast()) }
    }
}

struct F16;
impl Element for F16 {
    const FORMAT: Format = Format::F16;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load_f16(p.cast()) }
    }
}

struct Bf16;
impl Element for Bf16 {
    const FORMAT: Format = Format::BF16;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::F {
        // SAFETY: the trait's contract.
        unsafe { S::load_bf16(p.cast()) }
    }
}

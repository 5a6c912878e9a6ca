//! F32, F16 and BF16 weights times f32 activations: tiles of a few panels by a few rows.
//!
//! Each lane adds its columns 32 at a time, then the parts, in order: small error, and the same in any tile.
#![allow(clippy::needless_range_loop)] // rows index several arrays at once, and unroll as written

use super::layout::Matrix;
use super::matmul_int::store;
use super::simd::{Job, Simd};
use crate::format::Format;

/// Columns that are summed before their sum is added to the rest.
const PART: usize = 32;

/// As [`MultiplyInts`](super::matmul_int::MultiplyInts), with `x` as floats `[rows, cols]`.
pub(crate) struct MultiplyFloats<'a> {
    pub w: &'a Matrix,
    pub panels: std::ops::Range<usize>,
    pub x: *const f32,
    pub rows: usize,
    pub out: *mut f32,
}

impl Job for MultiplyFloats<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        debug_assert_eq!(self.w.lanes, S::LANES);
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
        let mut r = 0;
        // SAFETY: the panels lie within the matrix, the rows within `x` and `out`.
        unsafe {
            if S::TILES {
                while self.rows - r >= 8 {
                    self.strip::<S, W, 1, 8>(r);
                    r += 8;
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
        let cols = self.w.cols;
        // SAFETY: a panel holds `cols` vectors; the rows exist.
        unsafe {
            let w = self.w.data.as_ptr().add(panel * self.w.panel_bytes);
            let x = self.x.add(row * cols);
            let mut sums = [[S::splat(0.0); R]; P];
            let mut k = 0;
            while k < cols {
                let end = (k + PART).min(cols);
                let mut part = [[S::splat(0.0); R]; P];
                while k < end {
                    for p in 0..P {
                        let w =
                            W::load::<S>(w.add(p * self.w.panel_bytes + k * S::LANES * W::BYTES));
                        for r in 0..R {
                            part[p][r] = S::fma(w, S::splat(*x.add(r * cols + k)), part[p][r]);
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
            for (p, sums) in sums.iter().enumerate() {
                store::<S, R>(sums, self.w, panel + p, self.out.add(row * self.w.rows));
            }
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

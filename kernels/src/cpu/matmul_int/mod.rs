//! Quantised weights times quantised activations: tiles of one panel by a few rows, of a strip by one or two, or of half a
//! strip by four.
//!
//! Each lane adds its blocks in order of the columns, whatever the tile, so a row's result is the same in any company.
#![allow(clippy::needless_range_loop)] // rows index several arrays at once, and unroll as written

mod codes;
mod strip;

use std::marker::PhantomData;

use codes::{Codes, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, chunk};

use super::activations::{XBlock, total};
use super::bytes::LINE;
use super::layout::{
    BLOCK, Matrix, STRIP, block_bytes, code_bytes, codes_at, parts, scales_at, vector_stride,
};
use super::output::Output;
use super::simd::{Job, Simd, dispatch, has_strips};
use crate::format::Format;
use crate::isa::Isa;

/// Bytes of activations that one pass over the panels should keep in the second-level cache.
const ROWS_BYTES: usize = 256 << 10;

/// The same where a strip meets all of a pass's rows before the next: weights are unpacked, or come from memory, anew for each pass, and
/// a row is asked for while the one before is multiplied, so that activations need not stay so near. A fourth of this costs 7 % where
/// rows are long, eight times as much gains nothing.
const MANY_ROWS_BYTES: usize = 1 << 20;

/// How far ahead of a pass through a strip its codes are asked for, by measurement: 3 KiB come too late.
const AHEAD_BYTES: usize = 8 << 10;

/// Rows up to which a strip is multiplied as a whole, a few rows at a time. Where vectors are wide, panels are whole cache lines and
/// taller tiles have registers; a strip of eight bits does not stay in the first-level cache for so many passes.
const fn strip_rows<S: Simd, C: Codes>() -> usize {
    match (S::WIDE_TILE, code_bytes(C::FORMAT)) {
        (true, _) => 3,
        (false, BLOCK) => 11,
        (false, _) => usize::MAX,
    }
}

/// Rows of `row_bytes` bytes that one pass over the panels takes: whole tiles.
pub(crate) fn rows_at_once(row_bytes: usize) -> usize {
    rows_within(ROWS_BYTES, row_bytes)
}

fn rows_within(bytes: usize, row_bytes: usize) -> usize {
    (bytes / row_bytes.max(1)).next_multiple_of(8).max(8)
}

/// Whether so many rows times these matrices are worth strips, on processors that have them: then `x` is biased.
pub(crate) fn wants_strips(isa: Isa, w: &[&Matrix], rows: usize) -> bool {
    let pays = |w: &&Matrix| !w.format.is_quantised() || rows >= strip::fewest_rows(w.format);
    has_strips(isa) && w.iter().all(pays)
}

/// `out[r * w.rows + n]` for the weight rows of `strips` and the first `rows` rows of `x`.
pub(crate) struct MultiplyInts<'a> {
    pub w: &'a Matrix,
    /// Behind which column each part of the matrix ends: one, or several for [`Output::Grid`].
    pub ends: &'a [usize],
    pub strips: std::ops::Range<usize>,
    /// `[rows, stride]`
    pub x: *const XBlock,
    /// Blocks of a row.
    pub stride: usize,
    pub rows: usize,
    /// Whether `x` is [biased](super::activations::BIAS), as strips want it.
    pub biased: bool,
    pub out: Output,
}

/// The same for matrices of one format: a function of its own for each, or the compiler would take minutes over one of all.
struct Multiply<'a, C>(MultiplyInts<'a>, PhantomData<C>);

impl<C: Codes> Job for Multiply<'_, C> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: passed on to whoever made the job.
        unsafe { self.0.run_as::<S, C>() }
    }
}

impl MultiplyInts<'_> {
    /// # Safety
    /// The processor has `isa`; strips, rows and `out` are valid as the fields say.
    pub(crate) unsafe fn run(self, isa: Isa) {
        macro_rules! run {
            ($codes:ty) => {
                // SAFETY: passed on to the caller.
                unsafe { dispatch(isa, Multiply::<$codes>(self, PhantomData)) }
            };
        }
        match self.w.format {
            Format::Q8_0 => run!(Q8_0),
            Format::Q4_0 => run!(Q4_0),
            Format::Q4_1 => run!(Q4_1),
            Format::Q5_0 => run!(Q5_0),
            Format::Q5_1 => run!(Q5_1),
            Format::Q4_K => run!(Q4K),
            Format::Q5_K => run!(Q5K),
            Format::Q6_K => run!(Q6K),
            Format::F32 | Format::F16 | Format::BF16 => {
                unreachable!("floats have kernels of their own")
            }
        }
    }
}

impl MultiplyInts<'_> {
    #[inline(always)]
    unsafe fn run_as<S: Simd, C: Codes>(self) {
        if S::STRIPS && strip::fewest_rows(C::FORMAT) < usize::MAX && self.biased {
            // SAFETY: passed on to the caller.
            return unsafe { self.strips::<S, C>() };
        }
        let row_bytes = self.stride * size_of::<XBlock>();
        let rows_at_once = if strip_rows::<S, C>() == usize::MAX {
            rows_within(MANY_ROWS_BYTES, row_bytes)
        } else {
            rows_at_once(row_bytes)
        };
        let mut first = 0;
        while first < self.rows {
            let end = (first + rows_at_once).min(self.rows);
            for strip in self.strips.clone() {
                // SAFETY: the strips lie within the matrix, the rows within `x` and `out`.
                unsafe {
                    if S::TILES && end - first <= strip_rows::<S, C>() {
                        self.whole::<S, C>(strip, first..end);
                        continue;
                    }
                    for i in 0..self.w.panels_of(strip) {
                        self.rows::<S, C, 1>(strip, i, first..end, true);
                    }
                }
            }
            first = end;
        }
    }

    /// A strip times a few rows. Four rows of half of it unpack codes half as often as two rows of all of it, and take as many
    /// registers; codes of eight bits are not unpacked.
    #[inline(always)]
    unsafe fn whole<S: Simd, C: Codes>(&self, strip: usize, mut rows: std::ops::Range<usize>) {
        // SAFETY: passed on to the caller.
        unsafe {
            let mut ask = true;
            while !S::WIDE_TILE && code_bytes(C::FORMAT) < BLOCK && rows.len() >= 4 {
                self.tile::<S, C, 2, 4>(strip, 0, rows.start, ask);
                self.tile::<S, C, 2, 4>(strip, 2, rows.start, false);
                rows.start += 4;
                ask = false;
            }
            self.rows::<S, C, STRIP>(strip, 0, rows, ask);
        }
    }

    /// Panels `i..i + P` of a strip, times some rows: as few tiles as there are. The first one may `ask` for what comes next.
    #[inline(always)]
    unsafe fn rows<S: Simd, C: Codes, const P: usize>(
        &self,
        strip: usize,
        i: usize,
        rows: std::ops::Range<usize>,
        ask: bool,
    ) {
        let (mut r, end) = (rows.start, rows.end);
        let first = |r: usize| ask && r == rows.start;
        // SAFETY: passed on to the caller.
        unsafe {
            // Whole strips are for fewer rows.
            if S::WIDE_TILE && P == 1 {
                while end - r >= 8 {
                    self.tile::<S, C, P, 8>(strip, i, r, first(r));
                    r += 8;
                }
            }
            if S::TILES {
                while P == 1 && end - r >= 4 {
                    self.tile::<S, C, P, 4>(strip, i, r, first(r));
                    r += 4;
                }
                while end - r >= 2 {
                    self.tile::<S, C, P, 2>(strip, i, r, first(r));
                    r += 2;
                }
            }
            while r < end {
                self.tile::<S, C, P, 1>(strip, i, r, first(r));
                r += 1;
            }
        }
    }

    /// Panels `i..i + P` of a strip, of which the last ones may have no rows, times `R` rows.
    #[inline(always)]
    unsafe fn tile<S: Simd, C: Codes, const P: usize, const R: usize>(
        &self,
        strip: usize,
        i: usize,
        row: usize,
        ask: bool,
    ) {
        // SAFETY: the caller's rows and strip exist; a strip's codes and scales have the sizes of its format.
        unsafe {
            let x = self.x.add(row * self.stride);
            let start = self.w.strip(strip).as_ptr();
            let parts = parts(C::FORMAT);
            let mut first = 0;
            let mut totals = [[S::no_grid(); R]; P];
            for end in self.ends.iter().map(|end| end / BLOCK) {
                let mut sums = [[S::splat(0.0); R]; P];
                for own in first / parts..end / parts {
                    let scales: [_; P] = std::array::from_fn(|p| {
                        start.add(scales_at(C::FORMAT, S::LANES, i + p, own * parts))
                    });
                    let mut ints = [[S::splat_int(0); R]; P];
                    for part in 0..parts {
                        let b = own * parts + part;
                        let codes: [_; P] = std::array::from_fn(|p| {
                            start.add(codes_at(C::FORMAT, S::LANES, i + p, b))
                        });
                        if ask && P > 1 && code_bytes(C::FORMAT) < BLOCK {
                            ask_for::<S, C>(start, b);
                        }
                        if ask && P == 1 {
                            ask_for_next::<S, C>(self.w, codes[0]);
                        }
                        let (x, stride) = (x.add(b), self.stride);
                        let more = dots::<S, C, P, R>(codes, scales, part, x, stride);
                        for p in 0..P {
                            for r in 0..R {
                                ints[p][r] = if parts == 1 {
                                    more[p][r]
                                } else {
                                    let shift = S::splat_int((*x.add(r * stride)).shift as i32);
                                    S::add_32(ints[p][r], S::shl_by(more[p][r], shift))
                                };
                            }
                        }
                    }
                    let x = x.add(own * parts);
                    for p in 0..if C::MIN { P } else { 0 } {
                        let min = C::min::<S>(scales[p]);
                        // Apart from the products, or there would not be registers for both.
                        let mut ints = [S::splat_int(0); R];
                        for two in 0..parts / 2 {
                            let mins = C::mins::<S>(scales[p], two);
                            for r in 0..R {
                                let x = &*x.add(r * self.stride + 2 * two);
                                ints[r] = S::dot_16(ints[r], mins, S::splat_int(x.two_sums()));
                            }
                        }
                        for r in 0..R {
                            let x = &*x.add(r * self.stride);
                            let d_sum = if parts > 1 {
                                S::mul(S::int_to_float(ints[r]), S::splat(x.d))
                            } else {
                                S::splat(x.d_sum())
                            };
                            sums[p][r] = S::fma(d_sum, min, sums[p][r]);
                        }
                    }
                    for p in 0..P {
                        let scale = C::scale::<S>(scales[p]);
                        for r in 0..R {
                            let d = S::splat((*x.add(r * self.stride)).d);
                            let scaled = S::mul(S::int_to_float(ints[p][r]), d);
                            sums[p][r] = S::fma(scaled, scale, sums[p][r]);
                        }
                    }
                }
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
}

/// Asks for the codes that a pass which goes through strips block by block comes to soon.
#[inline(always)]
fn ask_for<S: Simd, C: Codes>(strip: *const u8, b: usize) {
    let bytes = block_bytes(C::FORMAT, S::LANES) / parts(C::FORMAT);
    for line in (0..bytes).step_by(LINE) {
        S::prefetch_second(strip.wrapping_add(b * bytes + AHEAD_BYTES + line));
    }
}

/// Asks for the same codes of the next strip: a pass through one panel after the other does not come to a strip's lines in order.
#[inline(always)]
fn ask_for_next<S: Simd, C: Codes>(w: &Matrix, codes: *const u8) {
    for v in 0..code_bytes(C::FORMAT) / 4 {
        S::prefetch_second(
            codes.wrapping_add(w.strip_bytes + v * vector_stride(C::FORMAT, S::LANES)),
        );
    }
}

/// Word `c` of a row's 32 bytes, in every lane.
#[inline(always)]
unsafe fn x_chunk<S: Simd, const C: usize>(x: *const XBlock) -> S::I {
    // SAFETY: the caller's block is valid.
    unsafe { S::splat_int((*x).q[C] as i32) }
}

/// Adds chunks to the sums of all panels and rows: each four activations are spread over a vector once for all panels.
macro_rules! add_chunks {
    ($S:ty, $C:ty, $P:expr, $R:expr, $dot:ident, $sums:ident, $codes:ident, $x:ident, $stride:ident, $($c:literal)*) => {$(
        let mut w = [<$S>::splat_int(0); $P];
        for p in 0..$P {
            w[p] = chunk::<$S, $C, $c>($codes[p]);
        }
        for r in 0..$R {
            let x = x_chunk::<$S, $c>($x.add(r * $stride));
            for p in 0..$P {
                let sum = <$S>::$dot($sums[p][r], w[p], x);
                // Or the compiler would gather more operands than there are registers.
                $sums[p][r] = if $P > 1 { <$S>::in_order(sum) } else { sum };
            }
        }
    )*};
}

/// What takes the codes' zero off a sum of [`Simd::dot`]s, which may begin with it: the sum may wrap on its way, at its end it is that
/// of signed codes, and 16 · 127 times sixteen columns or 32 · 127 times eight fit into 16 bits.
#[inline(always)]
unsafe fn zero_point<S: Simd, C: Codes>(negative: [i16; 2]) -> S::I {
    let [even, odd] = negative;
    let both = if S::DOT_32 {
        total(negative)
    } else {
        i32::from(odd) << 16 | i32::from(even as u16)
    };
    // SAFETY: passed on to the caller.
    unsafe {
        let both = S::splat_int(both);
        match (C::ZERO, S::DOT_32) {
            (8, true) => S::shl_32::<3>(both),
            (8, false) => S::shl_16::<3>(both),
            (16, true) => S::shl_32::<4>(both),
            (16, false) => S::shl_16::<4>(both),
            (32, true) => S::shl_32::<5>(both),
            (32, false) => S::shl_16::<5>(both),
            _ => S::splat_int(0),
        }
    }
}

/// Which of a block's columns.
#[derive(Clone, Copy)]
enum Columns {
    All,
    First,
    Last,
}

/// Sums as they begin: with their [`zero_point`].
#[inline(always)]
unsafe fn begun<S: Simd, C: Codes, const P: usize, const R: usize>(
    x: *const XBlock,
    stride: usize,
    columns: Columns,
) -> [[S::I; R]; P] {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut sums = [[S::splat_int(0); R]; P];
        for r in 0..R {
            let x = &*x.add(r * stride);
            let zero = zero_point::<S, C>(match columns {
                Columns::All => x.negative,
                Columns::First => x.negative_first,
                Columns::Last => x.negative_last(),
            });
            for p in 0..P {
                sums[p][r] = zero;
            }
        }
        sums
    }
}

/// The integer products of part `part` of a block, less the codes' zero, and times their factors where there are any.
#[inline(always)]
unsafe fn dots<S: Simd, C: Codes, const P: usize, const R: usize>(
    codes: [*const u8; P],
    scales: [*const u8; P],
    part: usize,
    x: *const XBlock,
    stride: usize,
) -> [[S::I; R]; P] {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut factors = [[S::splat_int(0); 2]; P];
        if C::FACTORS > 0 {
            for p in 0..P {
                factors[p] = C::factors::<S>(scales[p], part);
            }
        }
        let bits = code_bytes(C::FORMAT);
        let mut sums = [[S::splat_int(0); R]; P];
        if bits == 32 {
            if S::BIASED_BYTES {
                for r in 0..R {
                    let bias = S::splat_int((*x.add(r * stride)).negative_sum() << 7);
                    for sums in &mut sums {
                        sums[r] = bias;
                    }
                }
            }
            add_chunks!(S, C, P, R, dot_signed, sums, codes, x, stride, 0 1 2 3 4 5 6 7);
            return sums;
        }
        // Four times two products of 31 · 127 are the most that 16 bits hold of codes that begin at zero.
        let apart = C::APART || !S::DOT_32 && C::ZERO == 0 && bits == 20;
        if !apart {
            sums = begun::<S, C, P, R>(x, stride, Columns::All);
            add_chunks!(S, C, P, R, dot, sums, codes, x, stride, 0 4 1 5 2 6 3 7);
            return scaled::<S, C, P, R>(sums, factors, 0);
        }
        sums = begun::<S, C, P, R>(x, stride, Columns::First);
        add_chunks!(S, C, P, R, dot, sums, codes, x, stride, 0 1 2 3);
        let first = scaled::<S, C, P, R>(sums, factors, 0);
        sums = begun::<S, C, P, R>(x, stride, Columns::Last);
        add_chunks!(S, C, P, R, dot, sums, codes, x, stride, 4 5 6 7);
        sums = scaled::<S, C, P, R>(sums, factors, 1);
        for (sum, &first) in sums.as_flattened_mut().iter_mut().zip(first.as_flattened()) {
            *sum = S::add_32(*sum, first);
        }
        sums
    }
}

/// Sums as 32 bits, times the factors of one half of the columns where the format has any.
#[inline(always)]
unsafe fn scaled<S: Simd, C: Codes, const P: usize, const R: usize>(
    mut sums: [[S::I; R]; P],
    factors: [[S::I; 2]; P],
    half: usize,
) -> [[S::I; R]; P] {
    for (sums, factors) in sums.iter_mut().zip(factors) {
        for sum in sums {
            // SAFETY: passed on to the caller.
            *sum = unsafe {
                if C::FACTORS > 0 {
                    S::widen_by(*sum, factors[half])
                } else {
                    S::widen(*sum)
                }
            };
        }
    }
    sums
}

//! Quantised weights times quantised activations: tiles of one panel by a few rows.
//!
//! Each lane adds its blocks in order of the columns, whatever the tile, so a row's result is the same in any company.
#![allow(clippy::needless_range_loop)] // rows index several arrays at once, and unroll as written

mod strip;

pub(crate) use strip::PANELS as STRIP_PANELS;

use super::activations::XBlock;
use super::bytes::LINE;
use super::layout::{BLOCK, Matrix, code_bytes, scale_bytes};
use super::simd::{Job, Simd, has_strips};
use crate::device::to_grid;
use crate::format::Format;
use crate::isa::Isa;

/// Bytes of activations that one pass over the panels should keep in the second-level cache.
const ROWS_BYTES: usize = 256 << 10;

/// How far ahead of a pass over few rows, which waits for memory, the codes are asked for: the processor's own prefetch ends at each
/// 4 KiB, this one does not.
const AHEAD_BYTES: usize = 2 << 10;

/// Rows of `row_bytes` bytes that one pass over the panels takes: whole tiles.
pub(crate) fn rows_at_once(row_bytes: usize) -> usize {
    (ROWS_BYTES / row_bytes.max(1)).next_multiple_of(8).max(8)
}

/// Whether so many rows times these matrices are worth strips, on processors that have them: then `x` is biased. Codes of eight bits
/// are no smaller unpacked, and their products with biased bytes would not fit.
pub(crate) fn wants_strips(isa: Isa, w: &[&Matrix], rows: usize) -> bool {
    has_strips(isa) && rows >= strip::FEWEST_ROWS && w.iter().all(|w| code_bytes(w.format) < BLOCK)
}

/// Where a product goes: `[rows, w.rows]`.
#[derive(Clone, Copy)]
pub(crate) enum Output {
    /// Of one matrix.
    Floats(*mut f32),
    /// Of the parts of one matrix: each rounded [`to_grid`], and added up in order.
    Grid(*mut f64),
}

/// `out[r * w.rows + n]` for the weight rows of `panels` and the first `rows` rows of `x`.
pub(crate) struct MultiplyInts<'a> {
    /// Matrices of one format and height, whose columns lie side by side in `x`: one, or several for [`Output::Grid`].
    pub parts: &'a [&'a Matrix],
    pub panels: std::ops::Range<usize>,
    /// `[rows, stride]`
    pub x: *const XBlock,
    /// Blocks of a row: those of all parts together.
    pub stride: usize,
    pub rows: usize,
    /// Whether `x` is [biased](super::activations::BIAS), as strips want it.
    pub biased: bool,
    pub out: Output,
}

impl Job for MultiplyInts<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Some(first) = self.parts.first() else {
            return;
        };
        // SAFETY: passed on to whoever made the job.
        unsafe {
            match first.format {
                Format::Q8_0 => self.run_as::<S, Q8_0>(),
                Format::Q4_0 => self.run_as::<S, Q4_0>(),
                Format::Q4_1 => self.run_as::<S, Q4_1>(),
                Format::Q5_0 => self.run_as::<S, Q5_0>(),
                Format::Q5_1 => self.run_as::<S, Q5_1>(),
                Format::Q4_K => self.run_as::<S, Q4K>(),
                Format::Q5_K => self.run_as::<S, Q5K>(),
                Format::Q6_K => self.run_as::<S, Q6K>(),
                Format::F32 | Format::F16 | Format::BF16 => {
                    unreachable!("floats have kernels of their own")
                }
            }
        }
    }
}

impl MultiplyInts<'_> {
    #[inline(always)]
    unsafe fn run_as<S: Simd, C: Codes>(self) {
        if S::STRIPS && self.biased {
            // SAFETY: passed on to the caller.
            return unsafe { self.strips::<S, C>() };
        }
        let rows_at_once = rows_at_once(self.stride * size_of::<XBlock>());
        let mut first = 0;
        while first < self.rows {
            let end = (first + rows_at_once).min(self.rows);
            for p in self.panels.clone() {
                let mut r = first;
                // SAFETY: the panel lies within the matrix, the rows within `x` and `out`.
                unsafe {
                    if S::WIDE_TILE {
                        while end - r >= 8 {
                            self.tile::<S, C, 8>(p, r);
                            r += 8;
                        }
                    }
                    if S::TILES {
                        while end - r >= 4 {
                            self.tile::<S, C, 4>(p, r);
                            r += 4;
                        }
                        if end - r >= 2 {
                            self.tile::<S, C, 2>(p, r);
                            r += 2;
                        }
                    }
                    while r < end {
                        self.tile::<S, C, 1>(p, r);
                        r += 1;
                    }
                }
            }
            first = end;
        }
    }

    #[inline(always)]
    unsafe fn tile<S: Simd, C: Codes, const R: usize>(&self, panel: usize, row: usize) {
        // SAFETY: the caller's rows and panel exist; a panel's codes and scales have the sizes of its format.
        unsafe {
            let mut x = self.x.add(row * self.stride);
            for (part, w) in self.parts.iter().enumerate() {
                let (codes, scales) = panel_of(w, panel);
                let blocks = w.cols / BLOCK;
                let mut sums = [S::splat(0.0); R];
                for b in 0..blocks {
                    let codes = codes.add(b * code_bytes(C::FORMAT) * S::LANES);
                    if R <= 4 {
                        ask_for::<S, C>(codes, scales.wrapping_add(w.panel_bytes), b);
                    }
                    block::<S, C, R>(codes, scales, b, x.add(b), self.stride, &mut sums);
                }
                x = x.add(blocks);
                self.out.put::<S, R>(&sums, w, panel, row, part == 0);
            }
        }
    }
}

/// Where a panel's codes and scales begin.
fn panel_of(w: &Matrix, panel: usize) -> (*const u8, *const u8) {
    let panel = &w.data[panel * w.panel_bytes..(panel + 1) * w.panel_bytes];
    (panel.as_ptr(), panel[w.scales_at..].as_ptr())
}

impl Output {
    /// Takes one part's lanes of a tile whose first row is `row`: writes those that are rows of the matrix, or adds them to what the
    /// parts before wrote.
    ///
    /// # Safety
    /// The output is valid for rows `row..row + R` of the matrix' height.
    #[inline(always)]
    pub(crate) unsafe fn put<S: Simd, const R: usize>(
        self,
        sums: &[S::F; R],
        w: &Matrix,
        panel: usize,
        row: usize,
        first_part: bool,
    ) {
        let first = panel * S::LANES;
        let lanes = S::LANES.min(w.rows - first);
        for (r, &sum) in sums.iter().enumerate() {
            let at = (row + r) * w.rows + first;
            let mut all = [0.0f32; 16];
            // SAFETY: a whole vector is written only where that many rows of the matrix follow, or to `all`.
            unsafe {
                match self {
                    Output::Floats(out) if lanes == S::LANES => S::store(out.add(at), sum),
                    Output::Floats(out) => {
                        S::store(all.as_mut_ptr(), sum);
                        std::ptr::copy_nonoverlapping(all.as_ptr(), out.add(at), lanes);
                    }
                    Output::Grid(out) if lanes == S::LANES && first_part => {
                        S::store_grid(out.add(at), sum)
                    }
                    Output::Grid(out) if lanes == S::LANES => S::add_grid(out.add(at), sum),
                    Output::Grid(out) => {
                        S::store(all.as_mut_ptr(), sum);
                        for (i, &lane) in all[..lanes].iter().enumerate() {
                            let out = out.add(at + i);
                            *out = if first_part { 0.0 } else { *out } + to_grid(lane);
                        }
                    }
                }
            }
        }
    }
}

/// Asks for codes ahead of block `b`'s, and for the next panel's scales, which begin at `scales`, of the same block.
#[inline(always)]
fn ask_for<S: Simd, C: Codes>(codes: *const u8, scales: *const u8, b: usize) {
    for line in (0..code_bytes(C::FORMAT) * S::LANES).step_by(LINE) {
        S::prefetch(codes.wrapping_add(AHEAD_BYTES + line));
    }
    let scale_bytes = scale_bytes(C::FORMAT) * S::LANES * BLOCK / C::FORMAT.block_len();
    S::prefetch(scales.wrapping_add(b * scale_bytes));
}

/// Adds 32 columns of a panel times `R` rows to `sums`.
#[inline(always)]
unsafe fn block<S: Simd, C: Codes, const R: usize>(
    codes: *const u8,
    scales: *const u8,
    b: usize,
    x: *const XBlock,
    stride: usize,
    sums: &mut [S::F; R],
) {
    // SAFETY: passed on to the caller.
    unsafe {
        let (first, second) = C::scales::<S>(scales, b);
        if C::HALVES {
            let low = dots_low::<S, C, R>(codes, x, stride);
            let high = dots_high::<S, C, R>(codes, x, stride);
            for r in 0..R {
                let x = &*x.add(r * stride);
                let zero_low = S::splat_int(x.negative_first);
                let zero_high = S::sub_32(S::splat_int(x.negative_sum), zero_low);
                let d = S::splat(x.d);
                let low = S::int_to_float(S::add_32(low[r], S::shl_32::<5>(zero_low)));
                let high = S::int_to_float(S::add_32(high[r], S::shl_32::<5>(zero_high)));
                sums[r] = S::fma(S::mul(low, d), first, sums[r]);
                sums[r] = S::fma(S::mul(high, d), second, sums[r]);
            }
            return;
        }
        let ints = dots::<S, C, R>(codes, x, stride);
        for r in 0..R {
            let x = &*x.add(r * stride);
            let scaled = S::mul(S::int_to_float(ints[r]), S::splat(x.d));
            sums[r] = S::fma(scaled, first, sums[r]);
            if C::MIN {
                sums[r] = S::fma(S::splat(x.d_sum), second, sums[r]);
            }
        }
    }
}

/// Word `c` of a row's 32 bytes, in every lane.
#[inline(always)]
unsafe fn x_chunk<S: Simd, const C: usize>(x: *const XBlock) -> S::I {
    // SAFETY: the caller's block is valid; a chunk lies within its 32 bytes.
    unsafe { S::splat_int(x.cast::<i32>().add(C).read_unaligned()) }
}

/// Adds chunks to the sums of all rows.
macro_rules! add_chunks {
    ($S:ty, $C:ty, $R:expr, $dot:ident, $sums:ident, $codes:ident, $x:ident, $stride:ident, $($c:literal)*) => {$(
        let w = chunk::<$S, $C, $c>($codes);
        for r in 0..$R {
            $sums[r] = <$S>::$dot($sums[r], w, x_chunk::<$S, $c>($x.add(r * $stride)));
        }
    )*};
}

/// The whole block's integer products, less the codes' zero.
#[inline(always)]
unsafe fn dots<S: Simd, C: Codes, const R: usize>(
    codes: *const u8,
    x: *const XBlock,
    stride: usize,
) -> [S::I; R] {
    // SAFETY: passed on to the caller.
    unsafe {
        let bits = code_bytes(C::FORMAT);
        let mut sums = [S::splat_int(0); R];
        if bits == 32 {
            if S::BIASED_BYTES {
                for r in 0..R {
                    sums[r] = S::shl_32::<7>(S::splat_int((*x.add(r * stride)).negative_sum));
                }
            }
            add_chunks!(S, C, R, dot_signed, sums, codes, x, stride, 0 1 2 3 4 5 6 7);
            return sums;
        }
        if S::DOT_32 || bits == 16 {
            // Eight times two products of 15 · 127 stay within 16 bits.
            add_chunks!(S, C, R, dot, sums, codes, x, stride, 0 4 1 5 2 6 3 7);
            sums = widened::<S, R>(sums);
        } else {
            // Four times two products of 31 · 127 do.
            sums = dots_low::<S, C, R>(codes, x, stride);
            let high = dots_high::<S, C, R>(codes, x, stride);
            for r in 0..R {
                sums[r] = S::add_32(sums[r], high[r]);
            }
        }
        for r in 0..R {
            let negative = (*x.add(r * stride)).negative_sum;
            match C::ZERO {
                8 => sums[r] = S::add_32(sums[r], S::shl_32::<3>(S::splat_int(negative))),
                16 => sums[r] = S::add_32(sums[r], S::shl_32::<4>(S::splat_int(negative))),
                _ => {}
            }
        }
        sums
    }
}

/// Integer products of the first sixteen columns.
#[inline(always)]
unsafe fn dots_low<S: Simd, C: Codes, const R: usize>(
    codes: *const u8,
    x: *const XBlock,
    stride: usize,
) -> [S::I; R] {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut sums = [S::splat_int(0); R];
        add_chunks!(S, C, R, dot, sums, codes, x, stride, 0 1);
        if S::DOT_32 || code_bytes(C::FORMAT) == 20 {
            add_chunks!(S, C, R, dot, sums, codes, x, stride, 2 3);
            return widened::<S, R>(sums);
        }
        // Two times two products of 63 · 127 are the most that 16 bits hold.
        let mut more = [S::splat_int(0); R];
        add_chunks!(S, C, R, dot, more, codes, x, stride, 2 3);
        for r in 0..R {
            sums[r] = S::add_32(S::widen(sums[r]), S::widen(more[r]));
        }
        sums
    }
}

/// Integer products of the last sixteen columns.
#[inline(always)]
unsafe fn dots_high<S: Simd, C: Codes, const R: usize>(
    codes: *const u8,
    x: *const XBlock,
    stride: usize,
) -> [S::I; R] {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut sums = [S::splat_int(0); R];
        add_chunks!(S, C, R, dot, sums, codes, x, stride, 4 5);
        if S::DOT_32 || code_bytes(C::FORMAT) == 20 {
            add_chunks!(S, C, R, dot, sums, codes, x, stride, 6 7);
            return widened::<S, R>(sums);
        }
        let mut more = [S::splat_int(0); R];
        add_chunks!(S, C, R, dot, more, codes, x, stride, 6 7);
        for r in 0..R {
            sums[r] = S::add_32(S::widen(sums[r]), S::widen(more[r]));
        }
        sums
    }
}

/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn widened<S: Simd, const R: usize>(mut sums: [S::I; R]) -> [S::I; R] {
    for sum in &mut sums {
        // SAFETY: passed on to the caller.
        *sum = unsafe { S::widen(*sum) };
    }
    sums
}

/// Chunk `N` of a packed block: four codes a lane, a byte each.
#[inline(always)]
unsafe fn chunk<S: Simd, C: Codes, const N: usize>(codes: *const u8) -> S::I {
    // SAFETY: the vectors lie within the block by its format's size.
    unsafe {
        let vector_bytes = 4 * S::LANES;
        let bits = code_bytes(C::FORMAT);
        if bits == 32 {
            return S::load_bytes(codes.add(N * vector_bytes));
        }
        let nibbles = S::load_bytes(codes.add(N % 4 * vector_bytes));
        let nibbles = if N < 4 {
            nibbles
        } else {
            S::shr_16::<4>(nibbles)
        };
        let low = S::and(nibbles, S::splat_byte(15));
        if bits == 16 {
            return low;
        }
        let (plane, mask) = if bits == 20 {
            (4, 0x10)
        } else {
            (4 + N / 4, 0x30)
        };
        let high = S::load_bytes(codes.add(plane * vector_bytes));
        let shift_right = if bits == 20 {
            N as i32 - 4
        } else {
            (N % 4) as i32 * 2 - 4
        };
        let high = match shift_right {
            -4 => S::shl_16::<4>(high),
            -3 => S::shl_16::<3>(high),
            -2 => S::shl_16::<2>(high),
            -1 => S::shl_16::<1>(high),
            1 => S::shr_16::<1>(high),
            2 => S::shr_16::<2>(high),
            3 => S::shr_16::<3>(high),
            _ => high,
        };
        S::or(low, S::and(high, S::splat_byte(mask)))
    }
}

/// What a kernel has to know about a format.
trait Codes {
    const FORMAT: Format;
    /// The code that means zero, where there is no minimum.
    const ZERO: i32 = 0;
    /// [`scales`](Codes::scales) gives a scale and a minimum.
    const MIN: bool = false;
    /// It gives a scale for each sixteen columns.
    const HALVES: bool = false;

    /// The scales of block `b` of a panel.
    ///
    /// # Safety
    /// `scales` are those of a panel of this format with more than `b` blocks.
    unsafe fn scales<S: Simd>(scales: *const u8, b: usize) -> (S::F, S::F);
}

macro_rules! plain {
    ($name:ident, $format:expr, $zero:literal) => {
        #[allow(non_camel_case_types)]
        struct $name;
        impl Codes for $name {
            const FORMAT: Format = $format;
            const ZERO: i32 = $zero;
            #[inline(always)]
            unsafe fn scales<S: Simd>(scales: *const u8, b: usize) -> (S::F, S::F) {
                // SAFETY: the trait's contract.
                let d = unsafe { S::load_f16(scales.add(b * 2 * S::LANES).cast()) };
                (d, d)
            }
        }
    };
}
plain!(Q8_0, Format::Q8_0, 0);
plain!(Q4_0, Format::Q4_0, 8);
plain!(Q5_0, Format::Q5_0, 16);

macro_rules! with_min {
    ($name:ident, $format:expr) => {
        #[allow(non_camel_case_types)]
        struct $name;
        impl Codes for $name {
            const FORMAT: Format = $format;
            const MIN: bool = true;
            #[inline(always)]
            unsafe fn scales<S: Simd>(scales: *const u8, b: usize) -> (S::F, S::F) {
                // SAFETY: the trait's contract.
                unsafe {
                    let d = scales.add(b * 4 * S::LANES);
                    (
                        S::load_f16(d.cast()),
                        S::load_f16(d.add(2 * S::LANES).cast()),
                    )
                }
            }
        }
    };
}
with_min!(Q4_1, Format::Q4_1);
with_min!(Q5_1, Format::Q5_1);

macro_rules! k_with_min {
    ($name:ident, $format:expr) => {
        struct $name;
        impl Codes for $name {
            const FORMAT: Format = $format;
            const MIN: bool = true;
            #[inline(always)]
            unsafe fn scales<S: Simd>(scales: *const u8, b: usize) -> (S::F, S::F) {
                // SAFETY: the trait's contract.
                unsafe {
                    let d = scales.add(b / 8 * scale_bytes($format) * S::LANES);
                    let small = d.add((4 + b % 8) * S::LANES);
                    let scale = S::mul(S::load_f16(d.cast()), S::load_u8(small));
                    let min = S::mul(
                        S::load_f16(d.add(2 * S::LANES).cast()),
                        S::load_u8(small.add(8 * S::LANES)),
                    );
                    (scale, S::sub(S::splat(0.0), min))
                }
            }
        }
    };
}
k_with_min!(Q4K, Format::Q4_K);
k_with_min!(Q5K, Format::Q5_K);

struct Q6K;
impl Codes for Q6K {
    const FORMAT: Format = Format::Q6_K;
    const ZERO: i32 = 32;
    const HALVES: bool = true;
    #[inline(always)]
    unsafe fn scales<S: Simd>(scales: *const u8, b: usize) -> (S::F, S::F) {
        // SAFETY: the trait's contract.
        unsafe {
            let own = scales.add(b / 8 * scale_bytes(Format::Q6_K) * S::LANES);
            let small = own.add((2 + b % 8 * 2) * S::LANES);
            let d = S::load_f16(own.cast());
            (
                S::mul(d, S::load_i8(small)),
                S::mul(d, S::load_i8(small.add(S::LANES))),
            )
        }
    }
}

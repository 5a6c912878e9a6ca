//! Many rows of activations times a strip, where a product takes no broadcast operand (AVX2).
//!
//! The tiles of [`super`] spend a load for each product on spreading four activations over a vector. Here a few panels are unpacked
//! into the first-level cache as signed bytes, which a product reads from memory, and one spread serves them all: two and a quarter
//! instructions a product instead of three and a quarter. One thread of a Zen 3 at 2.45 GHz: 236 against 171 GOPS of its 313.
//!
//! The integers are the same as a tile's, and so is the arithmetic after them: a row's result does not tell which way it took.

use super::{Codes, MultiplyInts, ask_for, chunk, rows_at_once};
use crate::cpu::activations::{BIAS, XBlock};
use crate::cpu::bytes::LINE;
use crate::cpu::layout::{BLOCK, STRIP, code_bytes, codes_at, parts, scales_at};
use crate::cpu::simd::Simd;
use crate::format::Format;

/// Rows from which on unpacking pays, by measurement: sooner where codes take more instructions to unpack, later where they need no
/// zero taken off.
pub(crate) const fn fewest_rows(format: Format) -> usize {
    match format {
        Format::Q6_K => 6,
        Format::Q4_1 | Format::Q4_K => 32,
        _ => 12,
    }
}

/// What the first-level cache holds of a strip's blocks and their extras, beside a row.
const PIECE_BYTES: usize = 24 << 10;

/// Blocks that are unpacked at once: more than sixteen were not tried.
const fn piece_blocks<S: Simd, C: Codes>() -> usize {
    let fit = PIECE_BYTES / block_bytes::<S, C>();
    if fit < 16 { fit } else { 16 }
}

/// What the unpacked codes have been moved down by, so that they are signed.
const fn centre<C: Codes>() -> i32 {
    match code_bytes(C::FORMAT) {
        16 => 8,
        20 => 16,
        _ => 32,
    }
}

/// Vectors that go with a panel's block besides its codes: scales, and what takes the activations' bias off.
const fn extras<C: Codes>() -> usize {
    match (C::HALVES, C::MIN) {
        (true, _) => 5,
        (_, true) => 3,
        _ => 2,
    }
}

/// Bytes of a block of all panels: chunk by chunk the panels' codes, then panel by panel the extras.
const fn block_bytes<S: Simd, C: Codes>() -> usize {
    STRIP * (8 + extras::<C>()) * 4 * S::LANES
}

/// A cache line of memory for pieces.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "memory, used through pointers")] [u8; LINE]);

/// Memory of one pass.
struct Room {
    piece: Vec<Line>,
    /// `[rows, panels, lanes]`: the sums so far.
    sums: Vec<f32>,
}

impl MultiplyInts<'_> {
    /// All panels, some rows at a time that stay in the second-level cache.
    ///
    /// # Safety
    /// As [`MultiplyInts`].
    #[inline(always)]
    pub(super) unsafe fn strips<S: Simd, C: Codes>(self) {
        let rows_at_once = rows_at_once(self.stride * size_of::<XBlock>());
        let mut room = Room {
            piece: vec![
                Line([0; LINE]);
                (piece_blocks::<S, C>() * block_bytes::<S, C>()).div_ceil(LINE)
            ],
            sums: vec![0.0; rows_at_once * STRIP * S::LANES],
        };
        let mut first = 0;
        while first < self.rows {
            let end = (first + rows_at_once).min(self.rows);
            for strip in self.strips.clone() {
                // SAFETY: the strips lie within the matrix, the rows within `x` and `out`.
                unsafe { self.strip::<S, C>(strip, first..end, &mut room) };
            }
            first = end;
        }
    }

    /// A strip times some rows, a piece of the columns at a time.
    #[inline(always)]
    unsafe fn strip<S: Simd, C: Codes>(
        &self,
        strip: usize,
        rows: std::ops::Range<usize>,
        room: &mut Room,
    ) {
        let blocks = self.w.cols / BLOCK;
        let codes = self.w.strip(strip);
        let panels = self.w.panels_of(strip);
        let (mut part, mut begins) = (0, true);
        for piece_start in (0..blocks).step_by(piece_blocks::<S, C>()) {
            let piece_end = (piece_start + piece_blocks::<S, C>()).min(blocks);
            // SAFETY: the strip has these blocks, and the room is for as many.
            unsafe { unpack::<S, C>(codes, piece_start..piece_end, &mut room.piece) };
            // What of each part lies in this piece.
            let mut first = piece_start;
            while first < piece_end {
                let part_end = self.ends.get(part).map_or(blocks, |end| end / BLOCK);
                let end = part_end.min(piece_end);
                for (r, kept) in rows
                    .clone()
                    .zip(room.sums.chunks_exact_mut(STRIP * S::LANES))
                {
                    // SAFETY: the blocks lie within the piece and within `x`'s rows; rows and panels are the caller's.
                    unsafe {
                        let piece = room.piece.as_ptr().cast::<u8>();
                        let piece = piece.add((first - piece_start) * block_bytes::<S, C>());
                        let x = self.x.add(r * self.stride + first);
                        row::<S, C>(piece, x, self.stride, end - first, begins, kept);
                        if end == part_end {
                            for (i, sum) in kept.chunks_exact(S::LANES).enumerate().take(panels) {
                                let panel = strip * STRIP + i;
                                let sum = [S::load(sum.as_ptr())];
                                self.out.put::<S, 1>(&sum, self.w, panel, r, part == 0);
                            }
                        }
                    }
                }
                begins = end == part_end;
                part += usize::from(begins);
                first = end;
            }
        }
    }
}

/// Writes `blocks` of a strip to a piece.
///
/// # Safety
/// As [`Simd`]; the strip has these blocks, and `piece` room for as many.
#[inline(always)]
unsafe fn unpack<S: Simd, C: Codes>(
    strip: &[u8],
    blocks: std::ops::Range<usize>,
    piece: &mut [Line],
) {
    debug_assert!(size_of_val(piece) >= blocks.len() * block_bytes::<S, C>());
    let (strip, piece) = (strip.as_ptr(), piece.as_mut_ptr().cast::<u8>());
    let vector = 4 * S::LANES;
    // SAFETY: by the contract.
    unsafe {
        for (j, b) in blocks.enumerate() {
            let to = piece.add(j * block_bytes::<S, C>());
            ask_for::<S, C>(strip, b);
            for i in 0..STRIP {
                let codes = strip.add(codes_at(C::FORMAT, S::LANES, i, b));
                let (zero, centre) = (S::splat_int(0), S::splat_byte(centre::<C>() as u8));
                let mut biases = [zero; 2];
                macro_rules! each {
                    ($($n:literal)*) => {$(
                        let signed = S::sub_8(chunk::<S, C, $n>(codes), centre);
                        S::store_bytes(to.add(($n * STRIP + i) * vector), signed);
                        let half = if C::HALVES { $n / 4 } else { 0 };
                        biases[half] = S::dot(biases[half], S::splat_byte(BIAS), signed);
                    )*};
                }
                each!(0 1 2 3 4 5 6 7);
                let biases = biases.map(|bias| S::sub_16(zero, bias));
                let extra = to.add((8 * STRIP + i * extras::<C>()) * vector);
                let own = strip.add(scales_at(C::FORMAT, S::LANES, i, b));
                let (scale, min) = C::scales::<S>(own, b % parts(C::FORMAT));
                S::store(extra.cast(), scale);
                S::store_bytes(extra.add(vector), biases[0]);
                if C::MIN {
                    S::store(extra.add(2 * vector).cast(), min);
                }
                if C::HALVES {
                    let factors = C::factors::<S>(own, b % parts(C::FORMAT));
                    S::store_bytes(extra.add(2 * vector), factors[0]);
                    S::store_bytes(extra.add(3 * vector), biases[1]);
                    S::store_bytes(extra.add(4 * vector), factors[1]);
                }
            }
        }
    }
}

/// One row times a piece, added to what `kept` holds of the pieces before.
///
/// # Safety
/// As [`Simd`]; `piece` has `blocks` blocks, `x` as many.
#[inline(always)]
unsafe fn row<S: Simd, C: Codes>(
    piece: *const u8,
    x: *const XBlock,
    stride: usize,
    blocks: usize,
    begins: bool,
    kept: &mut [f32],
) {
    debug_assert_eq!(kept.len(), STRIP * S::LANES);
    let (vector, kept) = (4 * S::LANES, kept.as_mut_ptr());
    // SAFETY: by the contract.
    unsafe {
        let mut sums = [S::splat(0.0); STRIP];
        if !begins {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(kept.add(i * S::LANES));
            }
        }
        for b in 0..blocks {
            let codes = piece.add(b * block_bytes::<S, C>());
            // The next row's, which the second-level cache has.
            S::prefetch(x.wrapping_add(b + stride).cast());
            let x = &*x.add(b);
            let d = S::splat(x.d);
            let extra = |i: usize, which: usize| {
                codes.add((8 * STRIP + i * extras::<C>() + which) * vector)
            };
            // Sums of 16 bits begin with what takes the activations' bias off, and may wrap on their way: at the end they are those of
            // signed activations, of which 127 · 8 or 16 times sixteen columns, or 127 · 32 times eight, fit.
            macro_rules! dots {
                ($bias:literal: $($n:literal)*) => {{
                    let mut dots = [S::splat_int(0); STRIP];
                    for i in 0..STRIP {
                        dots[i] = S::load_bytes(extra(i, $bias));
                    }
                    $(
                        let spread = S::splat_int(x.q[$n] as i32);
                        for i in 0..STRIP {
                            let w = S::load_bytes(codes.add(($n * STRIP + i) * vector));
                            dots[i] = S::in_order(S::dot(dots[i], spread, w));
                        }
                    )*
                    dots
                }};
            }
            let mut ints = [S::splat_int(0); STRIP];
            if C::HALVES {
                let dots = dots!(1: 0 1 2 3);
                for i in 0..STRIP {
                    ints[i] = S::widen_by(dots[i], S::load_bytes(extra(i, 2)));
                }
                let dots = dots!(3: 4 5 6 7);
                for i in 0..STRIP {
                    let last = S::widen_by(dots[i], S::load_bytes(extra(i, 4)));
                    ints[i] = S::add_32(ints[i], last);
                }
            } else {
                let dots = dots!(1: 0 1 2 3 4 5 6 7);
                for i in 0..STRIP {
                    ints[i] = S::widen(dots[i]);
                }
            }
            // The format's codes begin at zero, ours at minus `centre`.
            let below = S::splat_int(-x.negative_sum() * centre::<C>());
            for i in 0..STRIP {
                if C::ZERO == 0 {
                    ints[i] = S::add_32(ints[i], below);
                }
                let scaled = S::mul(S::int_to_float(ints[i]), d);
                sums[i] = S::fma(scaled, S::load(extra(i, 0).cast()), sums[i]);
            }
            if C::MIN {
                let d_sum = S::splat(x.d_sum);
                for i in 0..STRIP {
                    sums[i] = S::fma(d_sum, S::load(extra(i, 2).cast()), sums[i]);
                }
            }
        }
        for (i, &sum) in sums.iter().enumerate() {
            S::store(kept.add(i * S::LANES), sum);
        }
    }
}

//! Many rows of activations times a strip, where a product takes no broadcast operand (AVX2).
//!
//! The tiles of [`super`] spend a load for each product on spreading four activations over a vector. Here a few panels are unpacked
//! into the first-level cache as signed bytes, which a product reads from memory, and one spread serves them all: two and a quarter
//! instructions a product instead of three and a quarter. One thread of a Zen 3 at 2.45 GHz: 236 against 171 GOPS of its 313.
//!
//! The integers are the same as a tile's, and so is the arithmetic after them: a row's result does not tell which way it took.

use super::{Codes, MultiplyInts, ask_for, chunk, rows_within};
use crate::cpu::activations::{BIAS, XBlock};
use crate::cpu::bytes::LINE;
use crate::cpu::layout::{BLOCK, STRIP, code_bytes, codes_at, parts, scales_at};
use crate::cpu::simd::Simd;
use crate::format::Format;

/// Rows from which on unpacking pays, by measurement: sooner where codes take more instructions to unpack.
pub(crate) const fn fewest_rows(format: Format) -> usize {
    match format {
        Format::Q4_1 => 32,
        Format::Q4_0 | Format::Q4_K => 16,
        _ => 12,
    }
}

/// Bytes of activations that one pass takes. They need not stay in the second-level cache, since a row is asked for while the one before
/// is multiplied: a fourth of this costs 7 % where rows are long, as strips are unpacked anew for each pass, eight times as much nothing.
const ROWS_BYTES: usize = 1 << 20;

/// What the first-level cache holds of a strip's blocks and their extras, beside a row.
const PIECE_BYTES: usize = 24 << 10;

/// Blocks that are unpacked at once: more than sixteen were not tried.
const fn piece_blocks<S: Simd, C: Codes>() -> usize {
    let fit = PIECE_BYTES / block_bytes::<S, C>();
    if fit < 16 { fit } else { 16 }
}

/// What the unpacked codes have been moved down by. Four bits with a minimum stay as they are: 127 · 15 times sixteen columns fit into
/// 16 bits.
const fn centre<C: Codes>() -> i32 {
    match code_bytes(C::FORMAT) {
        16 if C::MIN => 0,
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
struct Room<F, G> {
    piece: Vec<Line>,
    /// Each row's sums so far in this part.
    sums: Vec<[F; STRIP]>,
    /// Each row's totals of the parts before.
    totals: Vec<[G; STRIP]>,
}

impl MultiplyInts<'_> {
    /// All panels, some rows at a time.
    ///
    /// # Safety
    /// As [`MultiplyInts`].
    #[inline(always)]
    pub(super) unsafe fn strips<S: Simd, C: Codes>(self) {
        let rows_at_once = rows_within(ROWS_BYTES, self.stride * size_of::<XBlock>());
        let most = rows_at_once.min(self.rows);
        let mut room = Room {
            piece: vec![
                Line([0; LINE]);
                (piece_blocks::<S, C>() * block_bytes::<S, C>()).div_ceil(LINE)
            ],
            // SAFETY: passed on to the caller.
            sums: vec![[unsafe { S::splat(0.0) }; STRIP]; most],
            // SAFETY: as above.
            totals: vec![[unsafe { S::no_grid() }; STRIP]; most],
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
        room: &mut Room<S::F, S::Grid>,
    ) {
        let codes = self.w.strip(strip);
        // SAFETY: passed on to the caller.
        room.totals.fill([unsafe { S::no_grid() }; STRIP]);
        let mut first = 0;
        for part_end in self.ends.iter().map(|end| end / BLOCK) {
            let part_first = first;
            while first < part_end {
                let end = part_end.min(first + piece_blocks::<S, C>());
                // SAFETY: the strip has these blocks, and the room is for as many.
                unsafe { unpack::<S, C>(codes, first..end, &mut room.piece) };
                let piece = room.piece.as_ptr().cast::<u8>();
                let kept = room.sums.iter_mut().zip(&mut room.totals);
                for (r, (kept, totals)) in rows.clone().zip(kept) {
                    // SAFETY: the blocks lie within the piece and within `x`'s rows; rows and panels are the caller's.
                    unsafe {
                        let x = self.x.add(r * self.stride + first);
                        let begun = if first > part_first {
                            *kept
                        } else {
                            [S::splat(0.0); STRIP]
                        };
                        let sums = row::<S, C>(piece, x, self.stride, end - first, begun);
                        if end < part_end {
                            *kept = sums;
                            continue;
                        }
                        for i in 0..STRIP {
                            let panel = strip * STRIP + i;
                            self.out
                                .take::<S>(self.w, panel, r, sums[i], &mut totals[i]);
                        }
                    }
                }
                first = end;
            }
        }
        for (r, totals) in rows.zip(&room.totals) {
            for (i, &total) in totals.iter().enumerate() {
                // SAFETY: rows and panels are the caller's.
                unsafe { self.out.finish::<S>(self.w, strip * STRIP + i, r, total) };
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

/// One row times a piece, added to the `sums` of the pieces before.
///
/// # Safety
/// As [`Simd`]; `piece` has `blocks` blocks, `x` as many.
#[inline(always)]
unsafe fn row<S: Simd, C: Codes>(
    piece: *const u8,
    x: *const XBlock,
    stride: usize,
    blocks: usize,
    mut sums: [S::F; STRIP],
) -> [S::F; STRIP] {
    let vector = 4 * S::LANES;
    // SAFETY: by the contract.
    unsafe {
        for b in 0..blocks {
            let codes = piece.add(b * block_bytes::<S, C>());
            // The next row's, which a farther cache has.
            S::prefetch(x.wrapping_add(b + stride).cast());
            let x = &*x.add(b);
            let d = S::splat(x.d);
            let extra = |i: usize, which: usize| {
                codes.add((8 * STRIP + i * extras::<C>() + which) * vector)
            };
            // Sums of 16 bits begin with what takes the activations' bias off, and may wrap on their way: at the end they are those of
            // signed activations, of which 127 times 8, 15 or 16 times sixteen columns, or 127 · 32 times eight, fit.
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
            // What our codes are lower by than the format's.
            let below = centre::<C>() - C::ZERO;
            let below_sum = S::splat_int(-x.negative_sum() * below);
            for i in 0..STRIP {
                if below != 0 {
                    ints[i] = S::add_32(ints[i], below_sum);
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
    }
    sums
}

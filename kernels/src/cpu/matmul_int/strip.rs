//! Many rows of activations times a strip, where a product takes no broadcast operand (AVX2).
//!
//! The tiles of [`super`] spend a load for each product on spreading four activations over a vector. Here a few panels are unpacked
//! into the first-level cache as signed bytes, which a product reads from memory, and one spread serves them all: two and a quarter
//! instructions a product instead of three and a quarter. One thread of a Zen 3 at 2.45 GHz: 236 against 171 GOPS of its 313.
//!
//! The integers are the same as a tile's, and so is the arithmetic after them: a row's result does not tell which way it took.

use super::{Codes, MANY_ROWS_BYTES, MultiplyInts, ask_for, chunk, rows_within};
use crate::cpu::activations::{BIAS, XBlock};
use crate::cpu::bytes::LINE;
use crate::cpu::layout::{BLOCK, STRIP, code_bytes, codes_at, parts, scales_at};
use crate::cpu::simd::Simd;
use crate::format::Format;

/// Rows from which on unpacking pays, by measurement: sooner where codes take more instructions to unpack. The first-level cache gives
/// two vectors a cycle, of which a strip's pass takes one a product: so Q4_K, which computes least besides, gains nothing by it. Codes of
/// eight bits are no smaller unpacked, and their products with biased bytes would not fit.
pub(crate) const fn fewest_rows(format: Format) -> usize {
    match format {
        Format::Q4_1 => 32,
        Format::Q4_0 => 16,
        Format::Q4_K | Format::Q8_0 => usize::MAX,
        _ => 12,
    }
}

/// What the first-level cache holds of a strip's blocks and their extras, beside a row.
const PIECE_BYTES: usize = 20 << 10;

/// Blocks of 32 columns that are unpacked at once, whole blocks of the format: more than sixteen were not tried.
const fn piece_blocks<S: Simd, C: Codes>() -> usize {
    let fit = PIECE_BYTES / block_bytes::<S, C>();
    let most = if fit < 16 { fit } else { 16 };
    most / parts(C::FORMAT) * parts(C::FORMAT)
}

/// What the unpacked codes have been moved down by, so that sixteen columns' products fit into 16 bits, or eight columns' where they are
/// summed [apart](Codes::APART). Four bits with a minimum fit as they are.
const fn centre<C: Codes>() -> i32 {
    match code_bytes(C::FORMAT) {
        24 => 32,
        20 if !C::APART => 16,
        16 if !C::MIN => 8,
        _ => 0,
    }
}

/// Vectors that go with a panel's block besides its codes: the scale, then what takes the activations' bias off for all columns or each
/// sixteen, factors, and a minimum.
const fn extras<C: Codes>() -> usize {
    minimum::<C>() + if C::MIN { 1 } else { 0 }
}

/// Which of them is the first factor.
const fn factor<C: Codes>() -> usize {
    if C::APART { 3 } else { 2 }
}

/// Which of them is the minimum.
const fn minimum<C: Codes>() -> usize {
    factor::<C>() + C::FACTORS
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
        let rows_at_once = rows_within(MANY_ROWS_BYTES, self.stride * size_of::<XBlock>());
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
                        let half = if C::APART { $n / 4 } else { 0 };
                        biases[half] = S::dot(biases[half], S::splat_byte(BIAS), signed);
                    )*};
                }
                each!(0 1 2 3 4 5 6 7);
                let extra = |which: usize| to.add((8 * STRIP + i * extras::<C>() + which) * vector);
                let (own, part) = (
                    strip.add(scales_at(C::FORMAT, S::LANES, i, b)),
                    b % parts(C::FORMAT),
                );
                S::store(extra(0).cast(), C::scale::<S>(own));
                S::store_bytes(extra(1), S::sub_16(zero, biases[0]));
                if C::APART {
                    S::store_bytes(extra(2), S::sub_16(zero, biases[1]));
                }
                let factors = C::factors::<S>(own, part);
                for (which, &factors) in factors.iter().enumerate().take(C::FACTORS) {
                    S::store_bytes(extra(factor::<C>() + which), factors);
                }
                if C::MIN {
                    let min = C::min::<S>(own, part);
                    S::store(extra(minimum::<C>()).cast(), min);
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
        let parts = parts(C::FORMAT);
        for own in (0..blocks).step_by(parts) {
            let mut ints = [S::splat_int(0); STRIP];
            for b in own..own + parts {
                let codes = piece.add(b * block_bytes::<S, C>());
                // The next row's, which a farther cache has.
                S::prefetch(x.wrapping_add(b + stride).cast());
                let x = &*x.add(b);
                let extra = |i: usize, which: usize| {
                    codes.add((8 * STRIP + i * extras::<C>() + which) * vector)
                };
                // Sums of 16 bits begin with what takes the activations' bias off, and may wrap on their way: at the end they are those
                // of signed activations, of which 127 times 8, 15 or 16 times sixteen columns, or 127 times 31 or 32 times eight, fit.
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
                macro_rules! widened {
                    ($dots:expr, $which:literal) => {{
                        let mut dots = $dots;
                        for i in 0..STRIP {
                            dots[i] = if C::FACTORS > 0 {
                                let which = factor::<C>() + if C::FACTORS > 1 { $which } else { 0 };
                                S::widen_by(dots[i], S::load_bytes(extra(i, which)))
                            } else {
                                S::widen(dots[i])
                            };
                        }
                        dots
                    }};
                }
                let mut more;
                if C::APART {
                    more = widened!(dots!(1: 0 1 2 3), 0);
                    let last = widened!(dots!(2: 4 5 6 7), 1);
                    for i in 0..STRIP {
                        more[i] = S::add_32(more[i], last[i]);
                    }
                } else {
                    more = widened!(dots!(1: 0 1 2 3 4 5 6 7), 0);
                }
                let shift = S::splat_int(x.shift as i32);
                for i in 0..STRIP {
                    ints[i] = if parts == 1 {
                        more[i]
                    } else {
                        S::add_32(ints[i], S::shl_by(more[i], shift))
                    };
                }
                // What our codes are lower by than the format's.
                let below = centre::<C>() - C::ZERO;
                if below != 0 {
                    let below = S::splat_int(-x.negative_sum() * below);
                    for i in 0..STRIP {
                        ints[i] = S::add_32(ints[i], below);
                    }
                }
            }
            // Apart from the products, or there would not be registers for both.
            for b in own..own + if C::MIN { parts } else { 0 } {
                let d_sum = S::splat((*x.add(b)).d_sum);
                for i in 0..STRIP {
                    let which = 8 * STRIP + i * extras::<C>() + minimum::<C>();
                    let min = piece.add(b * block_bytes::<S, C>() + which * vector);
                    sums[i] = S::fma(d_sum, S::load(min.cast()), sums[i]);
                }
            }
            let d = S::splat((*x.add(own)).d);
            for i in 0..STRIP {
                let scale = piece
                    .add(own * block_bytes::<S, C>() + (8 * STRIP + i * extras::<C>()) * vector);
                let scaled = S::mul(S::int_to_float(ints[i]), d);
                sums[i] = S::fma(scaled, S::load(scale.cast()), sums[i]);
            }
        }
    }
    sums
}

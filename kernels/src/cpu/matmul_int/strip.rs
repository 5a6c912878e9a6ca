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

/// Rows from which on unpacking pays, by measurement: sooner where codes take more instructions to unpack. Codes of eight bits are no
/// smaller unpacked, and their products with biased bytes would not fit.
pub(crate) const fn fewest_rows(format: Format) -> usize {
    match format {
        Format::Q4_1 => 32,
        Format::Q4_0 => 16,
        Format::Q8_0 => usize::MAX,
        Format::Q6_K => 8,
        _ => 12,
    }
}

/// Whether two rows share what is loaded of a piece. That gains up to an eighth where more than codes is loaded; where products and their
/// scaling bound a pass, it loses a twentieth.
const fn two_rows(format: Format) -> bool {
    !matches!(format, Format::Q4_0 | Format::Q4_1)
}

/// What the first-level cache holds of a strip's blocks and their extras, beside a row.
const PIECE_BYTES: usize = 20 << 10;

/// Blocks of 32 columns that are unpacked at once, whole blocks of the format: more than sixteen were not tried.
const fn piece_blocks<S: Simd, C: Codes>() -> usize {
    let parts = parts(C::FORMAT);
    let fit = PIECE_BYTES / block_bytes::<S, C>() * parts;
    let most = if fit < 16 { fit } else { 16 };
    most / parts * parts
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

/// Vectors of a panel's block before its parts: the scale, then a minimum and those of two parts each.
const fn own_vectors<C: Codes>() -> usize {
    1 + if C::MIN { 1 + parts(C::FORMAT) / 2 } else { 0 }
}

/// Vectors of a panel's part behind its codes: what takes the activations' bias off for all columns or each sixteen, then factors.
const fn part_extras<C: Codes>() -> usize {
    factor::<C>() + C::FACTORS
}

/// Which of them is the first factor.
const fn factor<C: Codes>() -> usize {
    if C::APART { 2 } else { 1 }
}

/// Bytes of all panels' [`own_vectors`], panel by panel.
const fn own_bytes<S: Simd, C: Codes>() -> usize {
    STRIP * own_vectors::<C>() * 4 * S::LANES
}

/// Bytes of a part of all panels: chunk by chunk the panels' codes, then panel by panel the extras.
const fn part_bytes<S: Simd, C: Codes>() -> usize {
    STRIP * (8 + part_extras::<C>()) * 4 * S::LANES
}

/// Bytes of a block of the format.
const fn block_bytes<S: Simd, C: Codes>() -> usize {
    own_bytes::<S, C>() + parts(C::FORMAT) * part_bytes::<S, C>()
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

/// What is in the room.
struct Piece {
    strip: usize,
    blocks: std::ops::Range<usize>,
    /// First and last of a part of the columns.
    begins: bool,
    ends: bool,
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
                (piece_blocks::<S, C>() / parts(C::FORMAT) * block_bytes::<S, C>())
                    .div_ceil(LINE)
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
                let piece = Piece {
                    strip,
                    blocks: first..end,
                    begins: first == part_first,
                    ends: end == part_end,
                };
                let mut r = 0;
                // SAFETY: rows and strip are the caller's, the blocks lie within them.
                unsafe {
                    while two_rows(C::FORMAT) && rows.len() - r >= 2 {
                        self.piece::<S, C, 2>(&piece, rows.start, r, room);
                        r += 2;
                    }
                    while r < rows.len() {
                        self.piece::<S, C, 1>(&piece, rows.start, r, room);
                        r += 1;
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

    /// Rows `first + r..first + r + R` times a piece that is in the room.
    #[inline(always)]
    unsafe fn piece<S: Simd, C: Codes, const R: usize>(
        &self,
        piece: &Piece,
        first: usize,
        r: usize,
        room: &mut Room<S::F, S::Grid>,
    ) {
        let blocks = &piece.blocks;
        // SAFETY: passed on to the caller.
        unsafe {
            let begun = if piece.begins {
                [[S::splat(0.0); STRIP]; R]
            } else {
                std::array::from_fn(|i| room.sums[r + i])
            };
            let unpacked = room.piece.as_ptr().cast();
            let x = self.x.add((first + r) * self.stride + blocks.start);
            let sums = rows::<S, C, R>(unpacked, x, self.stride, blocks.len(), begun);
            if !piece.ends {
                room.sums[r..r + R].copy_from_slice(&sums);
                return;
            }
            for (i, sums) in sums.iter().enumerate() {
                let totals = &mut room.totals[r + i];
                for (p, (&sum, total)) in sums.iter().zip(totals).enumerate() {
                    let panel = piece.strip * STRIP + p;
                    self.out.take::<S>(self.w, panel, first + r + i, sum, total);
                }
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
    let parts = parts(C::FORMAT);
    debug_assert!(size_of_val(piece) >= blocks.len() / parts * block_bytes::<S, C>());
    let (strip, piece) = (strip.as_ptr(), piece.as_mut_ptr().cast::<u8>());
    let vector = 4 * S::LANES;
    // SAFETY: by the contract.
    unsafe {
        let (zero, less_centre) = (S::splat_int(0), S::splat_byte(-centre::<C>() as u8));
        for (j, b) in blocks.enumerate() {
            let (own, part) = (piece.add(j / parts * block_bytes::<S, C>()), j % parts);
            let to = own.add(own_bytes::<S, C>() + part * part_bytes::<S, C>());
            ask_for::<S, C>(strip, b);
            for i in 0..STRIP {
                let codes = strip.add(codes_at(C::FORMAT, S::LANES, i, b));
                // Four chunks of six bits, or eight of fewer, add up to a signed byte.
                let mut sums = [zero; 2];
                macro_rules! each {
                    ($($n:literal)*) => {$(
                        let signed = S::add_8(chunk::<S, C, $n>(codes), less_centre);
                        S::store_bytes(to.add(($n * STRIP + i) * vector), signed);
                        let half = if C::APART { $n / 4 } else { 0 };
                        sums[half] = S::add_8(sums[half], signed);
                    )*};
                }
                each!(0 1 2 3 4 5 6 7);
                let extra =
                    |which: usize| to.add((8 * STRIP + i * part_extras::<C>() + which) * vector);
                let scales = strip.add(scales_at(C::FORMAT, S::LANES, i, b));
                for half in 0..factor::<C>() {
                    let bias = S::dot(zero, S::splat_byte(BIAS), sums[half]);
                    S::store_bytes(extra(half), S::sub_16(zero, bias));
                }
                let factors = C::factors::<S>(scales, part);
                for (which, &factors) in factors.iter().enumerate().take(C::FACTORS) {
                    S::store_bytes(extra(factor::<C>() + which), factors);
                }
                if part > 0 {
                    continue;
                }
                let own = |which: usize| own.add((i * own_vectors::<C>() + which) * vector);
                S::store(own(0).cast(), C::scale::<S>(scales));
                if C::MIN {
                    S::store(own(1).cast(), C::min::<S>(scales));
                    for two in 0..parts / 2 {
                        S::store_bytes(own(2 + two), C::mins::<S>(scales, two));
                    }
                }
            }
        }
    }
}

/// `R` rows times a piece, added to the `sums` of the pieces before.
///
/// # Safety
/// As [`Simd`]; `piece` has `blocks` blocks, each row of `x` as many, and rows lie `stride` blocks apart.
#[inline(always)]
unsafe fn rows<S: Simd, C: Codes, const R: usize>(
    piece: *const u8,
    x: *const XBlock,
    stride: usize,
    blocks: usize,
    mut sums: [[S::F; STRIP]; R],
) -> [[S::F; STRIP]; R] {
    let vector = 4 * S::LANES;
    // SAFETY: by the contract.
    unsafe {
        let parts = parts(C::FORMAT);
        for block in 0..blocks / parts {
            let own = piece.add(block * block_bytes::<S, C>());
            let mut ints = [[S::splat_int(0); STRIP]; R];
            for part in 0..parts {
                let codes = own.add(own_bytes::<S, C>() + part * part_bytes::<S, C>());
                let b = block * parts + part;
                // The next rows', which a farther cache has.
                for r in R..2 * R {
                    S::prefetch(x.wrapping_add(b + r * stride).cast());
                }
                let x: [_; R] = std::array::from_fn(|r| &*x.add(b + r * stride));
                let extra = |i: usize, which: usize| {
                    codes.add((8 * STRIP + i * part_extras::<C>() + which) * vector)
                };
                // Sums of 16 bits begin with what takes the activations' bias off, and may wrap on their way: at the end they are those
                // of signed activations, of which 127 times 8, 15 or 16 times sixteen columns, or 127 times 31 or 32 times eight, fit.
                macro_rules! dots {
                    ($bias:literal: $($n:literal)*) => {{
                        let mut dots = [[S::splat_int(0); STRIP]; R];
                        for i in 0..STRIP {
                            let bias = S::load_bytes(extra(i, $bias));
                            for r in 0..R {
                                dots[r][i] = bias;
                            }
                        }
                        $(
                            let spread: [_; R] = std::array::from_fn(|r| S::splat_int(x[r].q[$n] as i32));
                            for i in 0..STRIP {
                                let w = S::load_bytes(codes.add(($n * STRIP + i) * vector));
                                for r in 0..R {
                                    dots[r][i] = S::in_order(S::dot(dots[r][i], spread[r], w));
                                }
                            }
                        )*
                        dots
                    }};
                }
                macro_rules! widened {
                    ($dots:expr, $which:literal) => {{
                        let mut dots = $dots;
                        for i in 0..STRIP {
                            if C::FACTORS > 0 {
                                let which = factor::<C>() + if C::FACTORS > 1 { $which } else { 0 };
                                let factors = S::load_bytes(extra(i, which));
                                for r in 0..R {
                                    dots[r][i] = S::widen_by(dots[r][i], factors);
                                }
                            } else {
                                for r in 0..R {
                                    dots[r][i] = S::widen(dots[r][i]);
                                }
                            }
                        }
                        dots
                    }};
                }
                let mut more;
                if C::APART {
                    more = widened!(dots!(0: 0 1 2 3), 0);
                    let last = widened!(dots!(1: 4 5 6 7), 1);
                    for r in 0..R {
                        for i in 0..STRIP {
                            more[r][i] = S::add_32(more[r][i], last[r][i]);
                        }
                    }
                } else {
                    more = widened!(dots!(0: 0 1 2 3 4 5 6 7), 0);
                }
                for r in 0..R {
                    let shift = S::splat_int(x[r].shift as i32);
                    for i in 0..STRIP {
                        ints[r][i] = if parts == 1 {
                            more[r][i]
                        } else {
                            S::add_32(ints[r][i], S::shl_by(more[r][i], shift))
                        };
                    }
                    // What our codes are lower by than the format's.
                    let below = centre::<C>() - C::ZERO;
                    if below != 0 {
                        let below = S::splat_int(-x[r].negative_sum() * below);
                        for i in 0..STRIP {
                            ints[r][i] = S::add_32(ints[r][i], below);
                        }
                    }
                }
            }
            let x: [_; R] = std::array::from_fn(|r| x.add(block * parts + r * stride));
            let own = |i: usize, which: usize| own.add((i * own_vectors::<C>() + which) * vector);
            // Apart from the products, or there would not be registers for both.
            for i in 0..if C::MIN { STRIP } else { 0 } {
                let mut ints = [S::splat_int(0); R];
                for two in 0..parts / 2 {
                    let mins = S::load_bytes(own(i, 2 + two));
                    for r in 0..R {
                        let sums = S::splat_int((*x[r].add(2 * two)).two_sums());
                        ints[r] = S::dot_16(ints[r], mins, sums);
                    }
                }
                let min = S::load(own(i, 1).cast());
                for r in 0..R {
                    let d_sum = if parts > 1 {
                        S::mul(S::int_to_float(ints[r]), S::splat((*x[r]).d))
                    } else {
                        S::splat((*x[r]).d_sum())
                    };
                    sums[r][i] = S::fma(d_sum, min, sums[r][i]);
                }
            }
            for i in 0..STRIP {
                let scale = S::load(own(i, 0).cast());
                for r in 0..R {
                    let scaled = S::mul(S::int_to_float(ints[r][i]), S::splat((*x[r]).d));
                    sums[r][i] = S::fma(scaled, scale, sums[r][i]);
                }
            }
        }
    }
    sums
}

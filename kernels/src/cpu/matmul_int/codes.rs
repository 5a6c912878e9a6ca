//! What the kernels have to know about each format: its codes as bytes, and the scales, factors and minima that go with them.

use crate::cpu::layout::{code_bytes, vector_stride};
use crate::cpu::simd::Simd;
use crate::format::Format;

/// What a kernel has to know about a format.
pub(super) trait Codes {
    const FORMAT: Format;
    /// The code that means zero, where there is no minimum.
    const ZERO: i32 = 0;
    /// Each part has a [minimum](Codes::min).
    const MIN: bool = false;
    /// Integer [factors](Codes::factors) of each part: one, or one for each sixteen columns.
    const FACTORS: usize = 0;
    /// Sixteen columns are summed apart: they have a factor of their own, or codes whose products are too large.
    const APART: bool = false;

    /// A panel's scale of a block.
    ///
    /// # Safety
    /// `own` are a panel's scales of a block of this format.
    #[inline(always)]
    unsafe fn scale<S: Simd>(own: *const u8) -> S::F {
        // SAFETY: passed on to the caller; every format's scales begin with this one.
        unsafe { S::load_f16(own.cast()) }
    }

    /// What is added, times the sum of the activations, and times [`mins`](Codes::mins) where there are parts.
    ///
    /// # Safety
    /// As of [`scale`](Codes::scale).
    #[inline(always)]
    unsafe fn min<S: Simd>(_own: *const u8) -> S::F {
        // SAFETY: passed on to the caller.
        unsafe { S::splat(0.0) }
    }

    /// The integer minima of parts `2 * two` and the next, 16 bits each.
    ///
    /// # Safety
    /// As of [`scale`](Codes::scale).
    #[inline(always)]
    unsafe fn mins<S: Simd>(_own: *const u8, _two: usize) -> S::I {
        // SAFETY: passed on to the caller.
        unsafe { S::splat_int(0) }
    }

    /// The factors of both halves of part `i`, where there are any.
    ///
    /// # Safety
    /// As of [`scale`](Codes::scale).
    #[inline(always)]
    unsafe fn factors<S: Simd>(_own: *const u8, _i: usize) -> [S::I; 2] {
        // SAFETY: passed on to the caller.
        unsafe { [S::splat_int(0); 2] }
    }
}

macro_rules! plain {
    ($name:ident, $format:expr, $zero:literal) => {
        #[allow(non_camel_case_types)]
        pub(super) struct $name;
        impl Codes for $name {
            const FORMAT: Format = $format;
            const ZERO: i32 = $zero;
        }
    };
}
plain!(Q8_0, Format::Q8_0, 0);
plain!(Q4_0, Format::Q4_0, 8);
plain!(Q5_0, Format::Q5_0, 16);

macro_rules! with_min {
    ($name:ident, $format:expr) => {
        #[allow(non_camel_case_types)]
        pub(super) struct $name;
        impl Codes for $name {
            const FORMAT: Format = $format;
            const MIN: bool = true;
            #[inline(always)]
            unsafe fn min<S: Simd>(own: *const u8) -> S::F {
                // SAFETY: the trait's contract.
                unsafe { S::load_f16(own.add(2 * S::LANES).cast()) }
            }
        }
    };
}
with_min!(Q4_1, Format::Q4_1);
with_min!(Q5_1, Format::Q5_1);

macro_rules! k_with_min {
    ($name:ident, $format:expr, $apart:literal) => {
        pub(super) struct $name;
        impl Codes for $name {
            const FORMAT: Format = $format;
            const MIN: bool = true;
            const FACTORS: usize = 1;
            const APART: bool = $apart;
            #[inline(always)]
            unsafe fn min<S: Simd>(own: *const u8) -> S::F {
                // SAFETY: the trait's contract.
                unsafe { S::sub(S::splat(0.0), S::load_f16(own.add(2 * S::LANES).cast())) }
            }
            #[inline(always)]
            unsafe fn mins<S: Simd>(own: *const u8, two: usize) -> S::I {
                // SAFETY: the trait's contract.
                unsafe { S::load_pairs(own.add((12 + 2 * two) * S::LANES)) }
            }
            #[inline(always)]
            unsafe fn factors<S: Simd>(own: *const u8, i: usize) -> [S::I; 2] {
                // SAFETY: the trait's contract.
                unsafe { [S::load_factors(own.add((4 + i) * S::LANES)); 2] }
            }
        }
    };
}
k_with_min!(Q4K, Format::Q4_K, false);
k_with_min!(Q5K, Format::Q5_K, true);

pub(super) struct Q6K;
impl Codes for Q6K {
    const FORMAT: Format = Format::Q6_K;
    const ZERO: i32 = 32;
    const FACTORS: usize = 2;
    const APART: bool = true;
    #[inline(always)]
    unsafe fn factors<S: Simd>(own: *const u8, i: usize) -> [S::I; 2] {
        // SAFETY: the trait's contract.
        unsafe {
            let small = own.add((2 + 2 * i) * S::LANES);
            [S::load_factors(small), S::load_factors(small.add(S::LANES))]
        }
    }
}

/// Chunk `N` of a packed block: four codes a lane, a byte each.
#[inline(always)]
pub(super) unsafe fn chunk<S: Simd, C: Codes, const N: usize>(codes: *const u8) -> S::I {
    // SAFETY: the vectors lie within the block by its format's size.
    unsafe {
        let stride = vector_stride(C::FORMAT, S::LANES);
        let bits = code_bytes(C::FORMAT);
        if bits == 32 {
            return S::load_bytes(codes.add(N * stride));
        }
        if bits == 24 {
            let half = codes.add(N / 4 * 3 * stride);
            if N % 4 < 3 {
                let six = S::load_bytes(half.add(N % 4 * stride));
                return S::and(six, S::splat_byte(0x3f));
            }
            let mut six = S::splat_int(0);
            for j in 0..3 {
                let two = S::load_bytes(half.add(j * stride));
                six = S::shr_16::<2>(S::or(six, S::and(two, S::splat_byte(0xc0))));
            }
            return six;
        }
        let nibbles = S::load_bytes(codes.add(N % 4 * stride));
        let nibbles = if N < 4 {
            nibbles
        } else {
            S::shr_16::<4>(nibbles)
        };
        let low = S::and(nibbles, S::splat_byte(15));
        if bits == 16 {
            return low;
        }
        let fifth = S::load_bytes(codes.add(4 * stride));
        let fifth = match N {
            0 => S::shl_16::<4>(fifth),
            1 => S::shl_16::<3>(fifth),
            2 => S::shl_16::<2>(fifth),
            3 => S::shl_16::<1>(fifth),
            5 => S::shr_16::<1>(fifth),
            6 => S::shr_16::<2>(fifth),
            7 => S::shr_16::<3>(fifth),
            _ => fifth,
        };
        S::or(low, S::and(fifth, S::splat_byte(0x10)))
    }
}

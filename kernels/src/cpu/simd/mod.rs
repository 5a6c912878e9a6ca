//! One vector of the processor, as a trait: kernels are written once over [`Simd`] and compiled for each instruction set.
//!
//! A kernel is a [`Job`]. [`dispatch`] runs it inside a function that has the instruction set enabled; everything that
//! a job calls must be `#[inline(always)]`, or it would be compiled without those instructions.

mod avx2;
mod avx512;
mod math;
mod scalar;

pub(crate) use math::{exp, silu};

use crate::isa::Isa;

/// A kernel with its arguments.
pub(crate) trait Job {
    type Out;
    /// # Safety
    /// The processor has `S`'s instructions, and the job's own pointers are valid as it says.
    unsafe fn run<S: Simd>(self) -> Self::Out;
}

/// Runs a job with the vectors of `isa`.
///
/// # Safety
/// The processor has `isa` ([`Isa::available`]), and the job's own pointers are valid as it says.
pub(crate) unsafe fn dispatch<J: Job>(isa: Isa, job: J) -> J::Out {
    // SAFETY: passed on to the caller.
    unsafe {
        match isa {
            Isa::Scalar => job.run::<scalar::Scalar>(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::run(job),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::run(job),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => avx512::run_vnni(job),
            #[cfg(not(target_arch = "x86_64"))]
            _ => job.run::<scalar::Scalar>(),
        }
    }
}

/// Lanes of an f32 vector of this instruction set: also the rows that a packed matrix interleaves.
pub(crate) const fn lanes(isa: Isa) -> usize {
    match isa {
        Isa::Scalar | Isa::Avx2 => 8,
        Isa::Avx512 | Isa::Avx512Vnni => 16,
    }
}

/// [`Simd::STRIPS`] of this instruction set.
pub(crate) const fn has_strips(isa: Isa) -> bool {
    matches!(isa, Isa::Avx2)
}

/// A vector of [`LANES`](Simd::LANES) floats `F`, or of four times as many bytes `I`.
///
/// # Safety
/// Every function needs the processor to have the instructions; those with a pointer read or write a whole vector there,
/// at any alignment.
pub(crate) trait Simd: Copy + 'static {
    const LANES: usize;
    /// Rows are worth taking together; otherwise they go one by one, which keeps the oracle's code small.
    const TILES: bool;
    /// Registers suffice for tiles of eight rows.
    const WIDE_TILE: bool;
    /// A product cannot spread four activations over its vector itself, so that strips of panels are worth unpacking for many rows.
    const STRIPS: bool;
    /// [`dot`](Simd::dot) sums into 32 bits; otherwise into 16, and [`widen`](Simd::widen) has work to do.
    const DOT_32: bool;
    /// [`dot_signed`](Simd::dot_signed) adds 128 times the activations' sum too much.
    const BIASED_BYTES: bool;
    type F: Copy;
    type I: Copy;
    /// Sums of `f64`, one for each lane of `F`.
    type Grid: Copy;

    /// Asks for the cache line at `p`, which may lie anywhere.
    #[inline(always)]
    fn prefetch(p: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint, which faults at no address; every x86-64 has it.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast())
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }

    /// The same, but no nearer than the second-level cache: the first level waits for a few lines only, and not while these come from
    /// memory.
    #[inline(always)]
    fn prefetch_second(p: *const u8) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(p.cast())
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = p;
    }

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// Rounds to the nearest f16, ties to even.
    unsafe fn store_f16(p: *mut u16, v: Self::F);
    unsafe fn load_bf16(p: *const u16) -> Self::F;
    unsafe fn load_i8(p: *const u8) -> Self::F;
    /// Rounds to the nearest integer and stores one byte a lane; values lie in [-128, 127].
    unsafe fn store_i8(p: *mut i8, v: Self::F);

    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once where the processor can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; `b` where either is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` where either is NaN.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::F) -> Self::F;
    /// `2^n` for integral `n` in [-126, 127].
    unsafe fn pow2(n: Self::F) -> Self::F;
    /// The sum of the lanes, in an order of its own that never changes.
    unsafe fn sum(a: Self::F) -> f32;
    /// The largest lane, where none is NaN.
    unsafe fn max_across(a: Self::F) -> f32;

    /// Zeros.
    unsafe fn no_grid() -> Self::Grid;
    /// Adds [`to_grid`](crate::device::to_grid) of each lane.
    unsafe fn add_grid(sum: Self::Grid, v: Self::F) -> Self::Grid;
    unsafe fn store_grid(p: *mut f64, sum: Self::Grid);

    unsafe fn load_bytes(p: *const u8) -> Self::I;
    unsafe fn store_bytes(p: *mut u8, v: Self::I);
    /// Each 16 bits, wrapping.
    unsafe fn sub_16(a: Self::I, b: Self::I) -> Self::I;
    /// Each byte, wrapping.
    unsafe fn add_8(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn splat_byte(x: u8) -> Self::I;
    unsafe fn splat_int(x: i32) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Shifts each 16 bits left.
    unsafe fn shl_16<const N: i32>(a: Self::I) -> Self::I;
    /// Shifts each 16 bits right, filling with zeros.
    unsafe fn shr_16<const N: i32>(a: Self::I) -> Self::I;
    unsafe fn shl_32<const N: i32>(a: Self::I) -> Self::I;
    unsafe fn add_32(a: Self::I, b: Self::I) -> Self::I;
    /// Shifts each 32 bits left by those of `by`, less than 32.
    unsafe fn shl_by(a: Self::I, by: Self::I) -> Self::I;
    unsafe fn int_to_float(a: Self::I) -> Self::F;
    /// Adds to each lane's sum the four products of unsigned bytes `w` and signed bytes `x`; see [`DOT_32`](Simd::DOT_32).
    unsafe fn dot(sum: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// A sum of [`dot`](Simd::dot)s as 32 bits a lane.
    unsafe fn widen(sum: Self::I) -> Self::I;
    /// A signed byte a lane, as [`widen_by`](Simd::widen_by) wants it.
    unsafe fn load_factors(p: *const u8) -> Self::I;
    /// A sum of [`dot`](Simd::dot)s times a factor of [`load_factors`](Simd::load_factors), as 32 bits a lane.
    unsafe fn widen_by(sum: Self::I, factors: Self::I) -> Self::I;
    /// Two unsigned bytes a lane, 16 bits each.
    unsafe fn load_pairs(p: *const u8) -> Self::I;
    /// Adds to each lane's 32 bits the two products of signed 16 bits.
    unsafe fn dot_16(sum: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// `sum`, but the compiler may not look behind it: so it stays in the order as written, and keeps few registers busy.
    #[inline(always)]
    unsafe fn in_order(sum: Self::I) -> Self::I {
        sum
    }
    /// Adds the four products of signed bytes in 32 bits; see [`BIASED_BYTES`](Simd::BIASED_BYTES). `x` is never -128.
    unsafe fn dot_signed(sum: Self::I, w: Self::I, x: Self::I) -> Self::I;
}

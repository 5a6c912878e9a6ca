//! 256 bits: eight floats, or 32 bytes whose products are summed in 16 bits.
#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use super::{Job, Simd};
use crate::device::GRID_SHIFT;

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// # Safety
/// The processor has AVX2, FMA and F16C; the job's pointers are valid.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn run<J: Job>(job: J) -> J::Out {
    // SAFETY: passed on to the caller.
    unsafe { job.run::<Avx2>() }
}

/// Hides a value from the compiler, without an instruction.
///
/// # Safety
/// The processor has AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn opaque(mut v: __m256i) -> __m256i {
    // SAFETY: nothing happens to the register.
    unsafe {
        std::arch::asm!("/* {0} */", inout(ymm_reg) v, options(nomem, nostack, preserves_flags));
    }
    v
}

/// Byte `i` of eight to the upper bytes of lane `i`, zeros to the lower ones.
const UPPER: [u8; 32] = {
    let mut from = [0x80; 32];
    let mut i = 0;
    while i < 8 {
        from[4 * i + 1] = i as u8;
        from[4 * i + 3] = i as u8;
        i += 1;
    }
    from
};

const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// SAFETY of every block below: the trait's contract gives the instructions and valid pointers.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    const LANES: usize = 8;
    const TILES: bool = true;
    const WIDE_TILE: bool = false;
    const STRIPS: bool = true;
    const DOT_32: bool = false;
    const BIASED_BYTES: bool = false;
    type F = __m256;
    type I = __m256i;
    type Grid = [__m256d; 2];

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m256) {
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m256 {
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: __m256) {
        unsafe {
            let ints = _mm256_cvtps_epi32(v);
            let words = _mm_packs_epi32(
                _mm256_castsi256_si128(ints),
                _mm256_extracti128_si256::<1>(ints),
            );
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(words, words))
        }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn abs(a: __m256) -> __m256 {
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }
    #[inline(always)]
    unsafe fn round(a: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<NEAREST>(a) }
    }
    #[inline(always)]
    unsafe fn pow2(n: __m256) -> __m256 {
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    unsafe fn sum(a: __m256) -> f32 {
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn max_across(a: __m256) -> f32 {
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    unsafe fn no_grid() -> [__m256d; 2] {
        unsafe { [_mm256_setzero_pd(); 2] }
    }
    #[inline(always)]
    unsafe fn add_grid(mut sum: [__m256d; 2], v: __m256) -> [__m256d; 2] {
        unsafe {
            let shift = _mm256_set1_pd(GRID_SHIFT);
            let halves = [_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)];
            for (sum, half) in sum.iter_mut().zip(halves) {
                let on_grid = _mm256_sub_pd(_mm256_add_pd(_mm256_cvtps_pd(half), shift), shift);
                *sum = _mm256_add_pd(*sum, on_grid);
            }
            sum
        }
    }
    #[inline(always)]
    unsafe fn store_grid(p: *mut f64, sum: [__m256d; 2]) {
        unsafe {
            _mm256_storeu_pd(p, sum[0]);
            _mm256_storeu_pd(p.add(4), sum[1]);
        }
    }

    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_bytes(p: *mut u8, v: __m256i) {
        unsafe { _mm256_storeu_si256(p.cast(), v) }
    }
    #[inline(always)]
    unsafe fn sub_16(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_sub_epi16(a, b) }
    }
    #[inline(always)]
    unsafe fn add_8(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi8(a, b) }
    }
    #[inline(always)]
    unsafe fn splat_byte(x: u8) -> __m256i {
        unsafe { _mm256_set1_epi8(x as i8) }
    }
    #[inline(always)]
    unsafe fn splat_int(x: i32) -> __m256i {
        unsafe { _mm256_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn shl_16<const N: i32>(a: __m256i) -> __m256i {
        unsafe { _mm256_slli_epi16::<N>(a) }
    }
    #[inline(always)]
    unsafe fn shr_16<const N: i32>(a: __m256i) -> __m256i {
        unsafe { _mm256_srli_epi16::<N>(a) }
    }
    #[inline(always)]
    unsafe fn shl_32<const N: i32>(a: __m256i) -> __m256i {
        unsafe { _mm256_slli_epi32::<N>(a) }
    }
    #[inline(always)]
    unsafe fn add_32(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn shl_by(a: __m256i, by: __m256i) -> __m256i {
        unsafe { _mm256_sllv_epi32(a, by) }
    }
    #[inline(always)]
    unsafe fn int_to_float(a: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn dot(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
        unsafe { _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)) }
    }
    #[inline(always)]
    unsafe fn widen(sum: __m256i) -> __m256i {
        unsafe { _mm256_madd_epi16(sum, _mm256_set1_epi16(1)) }
    }
    #[inline(always)]
    unsafe fn load_factors(p: *const u8) -> __m256i {
        // Into the upper bytes of both halves of a lane, from where a shift spreads the sign.
        unsafe {
            let eight = _mm256_set1_epi64x(p.cast::<i64>().read_unaligned());
            let upper = _mm256_shuffle_epi8(eight, _mm256_loadu_si256(UPPER.as_ptr().cast()));
            _mm256_srai_epi16::<8>(upper)
        }
    }
    #[inline(always)]
    unsafe fn widen_by(sum: __m256i, factors: __m256i) -> __m256i {
        unsafe { _mm256_madd_epi16(sum, factors) }
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const u8) -> __m256i {
        unsafe { _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn dot_16(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)) }
    }
    #[inline(always)]
    unsafe fn in_order(sum: __m256i) -> __m256i {
        unsafe { opaque(sum) }
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
        // |w| ≤ 128 and |x| ≤ 127: two products stay within 16 bits.
        unsafe {
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
}

//! Vectors without vector instructions: eight lanes in arrays. The oracle of the other two.

use half::{bf16, f16};

use super::Simd;
use crate::device::to_grid;

#[derive(Clone, Copy)]
pub(crate) struct Scalar;

const LANES: usize = 8;
type F = [f32; LANES];
type I = [i32; LANES];

#[inline(always)]
fn zip(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn halves(a: I, f: impl Fn(u16) -> u16) -> I {
    a.map(|x| {
        let x = x as u32;
        (u32::from(f(x as u16)) | u32::from(f((x >> 16) as u16)) << 16) as i32
    })
}

/// # Safety
/// `p` is valid for `LANES` reads.
#[inline(always)]
unsafe fn read<T: Copy>(p: *const T) -> [T; LANES] {
    // SAFETY: by this function's contract; an array has its element's layout.
    unsafe { p.cast::<[T; LANES]>().read_unaligned() }
}

// SAFETY of the blocks below: each pointer is valid for a whole vector by the trait's contract.
impl Simd for Scalar {
    const LANES: usize = LANES;
    const TILES: bool = false;
    const WIDE_TILE: bool = false;
    const STRIPS: bool = false;
    const DOT_32: bool = true;
    const BIASED_BYTES: bool = false;
    type F = F;
    type I = I;
    type Grid = [f64; LANES];

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> F {
        // SAFETY: the trait's contract.
        unsafe { read(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: F) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<F>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> F {
        // SAFETY: the trait's contract.
        unsafe { read(p) }.map(|x| f16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: F) {
        let halves = v.map(|x| f16::from_f32(x).to_bits());
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(halves) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> F {
        // SAFETY: the trait's contract.
        unsafe { read(p) }.map(|x| bf16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> F {
        // SAFETY: the trait's contract.
        unsafe { read(p) }.map(|x| f32::from(x as i8))
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, v: F) {
        let bytes = v.map(|x| x.round_ties_even() as i8);
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(bytes) }
    }

    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: F, b: F) -> F {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn max(a: F, b: F) -> F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(a: F, b: F) -> F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn abs(a: F) -> F {
        a.map(f32::abs)
    }
    #[inline(always)]
    unsafe fn round(a: F) -> F {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn pow2(n: F) -> F {
        n.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn sum(a: F) -> f32 {
        a.iter().sum()
    }
    #[inline(always)]
    unsafe fn max_across(a: F) -> f32 {
        a.iter().copied().fold(f32::NAN, f32::max)
    }

    #[inline(always)]
    unsafe fn no_grid() -> [f64; LANES] {
        [0.0; LANES]
    }
    #[inline(always)]
    unsafe fn add_grid(sum: [f64; LANES], v: F) -> [f64; LANES] {
        std::array::from_fn(|i| sum[i] + to_grid(v[i]))
    }
    #[inline(always)]
    unsafe fn store_grid(p: *mut f64, sum: [f64; LANES]) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<[f64; LANES]>().write_unaligned(sum) }
    }

    #[inline(always)]
    unsafe fn load_bytes(p: *const u8) -> I {
        // SAFETY: the trait's contract.
        unsafe { read(p.cast::<i32>()) }
    }
    #[inline(always)]
    unsafe fn store_bytes(p: *mut u8, v: I) {
        // SAFETY: the trait's contract.
        unsafe { p.cast::<I>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn sub_16(a: I, b: I) -> I {
        let low = |x: i32| x as i16;
        let high = |x: i32| (x >> 16) as i16;
        std::array::from_fn(|i| {
            let sub = |of: fn(i32) -> i16| of(a[i]).wrapping_sub(of(b[i])) as u16 as i32;
            sub(low) | sub(high) << 16
        })
    }
    #[inline(always)]
    unsafe fn add_8(a: I, b: I) -> I {
        std::array::from_fn(|i| {
            let (a, b) = (a[i].to_ne_bytes(), b[i].to_ne_bytes());
            i32::from_ne_bytes(std::array::from_fn(|j| a[j].wrapping_add(b[j])))
        })
    }
    #[inline(always)]
    unsafe fn splat_byte(x: u8) -> I {
        [i32::from_ne_bytes([x; 4]); LANES]
    }
    #[inline(always)]
    unsafe fn splat_int(x: i32) -> I {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn and(a: I, b: I) -> I {
        std::array::from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn shl_16<const N: i32>(a: I) -> I {
        halves(a, |x| x << N)
    }
    #[inline(always)]
    unsafe fn shr_16<const N: i32>(a: I) -> I {
        halves(a, |x| x >> N)
    }
    #[inline(always)]
    unsafe fn shl_32<const N: i32>(a: I) -> I {
        a.map(|x| x << N)
    }
    #[inline(always)]
    unsafe fn add_32(a: I, b: I) -> I {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn shl_by(a: I, by: I) -> I {
        std::array::from_fn(|i| a[i] << by[i])
    }
    #[inline(always)]
    unsafe fn int_to_float(a: I) -> F {
        a.map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn dot(sum: I, w: I, x: I) -> I {
        std::array::from_fn(|i| {
            let (w, x) = (w[i].to_ne_bytes(), x[i].to_ne_bytes());
            (0..4).fold(sum[i], |sum, j| {
                sum + i32::from(w[j]) * i32::from(x[j] as i8)
            })
        })
    }
    #[inline(always)]
    unsafe fn widen(sum: I) -> I {
        sum
    }
    #[inline(always)]
    unsafe fn load_factors(p: *const u8) -> I {
        // SAFETY: the trait's contract.
        unsafe { read(p) }.map(|x| i32::from(x as i8))
    }
    #[inline(always)]
    unsafe fn widen_by(sum: I, factors: I) -> I {
        std::array::from_fn(|i| sum[i] * factors[i])
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const u8) -> I {
        // SAFETY: the trait's contract.
        unsafe { read(p.cast::<[u8; 2]>()) }
            .map(|[low, high]| i32::from(low) | i32::from(high) << 16)
    }
    #[inline(always)]
    unsafe fn dot_16(sum: I, a: I, b: I) -> I {
        let low = |x: i32| i32::from(x as i16);
        std::array::from_fn(|i| sum[i] + low(a[i]) * low(b[i]) + low(a[i] >> 16) * low(b[i] >> 16))
    }
    #[inline(always)]
    unsafe fn dot_signed(sum: I, w: I, x: I) -> I {
        std::array::from_fn(|i| {
            let (w, x) = (w[i].to_ne_bytes(), x[i].to_ne_bytes());
            (0..4).fold(sum[i], |sum, j| {
                sum + i32::from(w[j] as i8) * i32::from(x[j] as i8)
            })
        })
    }
}

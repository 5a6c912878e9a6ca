//! What a sentence encoder (BERT, XLM-R) needs beyond a decoder's layer, on slices in host memory. Rows are independent.

use crate::cpu::simd::{Job, Simd, dispatch, exp};
use crate::isa::Isa;

/// `out = (x - mean) / sqrt(variance + eps) * weight + bias`, row by row; the width is `weight`'s length.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(bias.len(), weight.len());
    assert_eq!(x.len(), out.len());
    let job = LayerNorm {
        x,
        weight,
        bias,
        eps,
        out,
    };
    // SAFETY: `detect_once` gives an available instruction set; the job's slices are valid and of one width.
    unsafe { dispatch(Isa::detect_once(), job) };
}

/// See [`layer_norm`].
struct LayerNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    bias: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Job for LayerNorm<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.weight.len();
        let whole = width / S::LANES * S::LANES;
        let rows = self.x.chunks_exact(width.max(1));
        for (x, out) in rows.zip(self.out.chunks_exact_mut(width.max(1))) {
            // SAFETY: whole vectors up to `whole`, within slices of `width`.
            unsafe {
                let mut sum = S::splat(0.0);
                for i in (0..whole).step_by(S::LANES) {
                    sum = S::add(sum, S::load(x.as_ptr().add(i)));
                }
                let mut rest = 0.0;
                for v in &x[whole..] {
                    rest += v;
                }
                let mean = (S::sum(sum) + rest) / width as f32;

                let mut squares = S::splat(0.0);
                for i in (0..whole).step_by(S::LANES) {
                    let v = S::sub(S::load(x.as_ptr().add(i)), S::splat(mean));
                    squares = S::fma(v, v, squares);
                }
                let mut rest = 0.0;
                for v in &x[whole..] {
                    rest += (v - mean) * (v - mean);
                }
                let variance = (S::sum(squares) + rest) / width as f32;

                let scale = 1.0 / (variance + self.eps).sqrt();
                for i in (0..whole).step_by(S::LANES) {
                    let v = S::sub(S::load(x.as_ptr().add(i)), S::splat(mean));
                    let v = S::mul(v, S::splat(scale));
                    let weight = S::load(self.weight.as_ptr().add(i));
                    let bias = S::load(self.bias.as_ptr().add(i));
                    S::store(out.as_mut_ptr().add(i), S::fma(v, weight, bias));
                }
                for i in whole..width {
                    out[i] = (x[i] - mean) * scale * self.weight[i] + self.bias[i];
                }
            }
        }
    }
}

/// `x = x · Φ(x)`, the form by the error function; absolute error under 1e-6.
pub fn gelu(x: &mut [f32]) {
    // SAFETY: `detect_once` gives an available instruction set; the job's slice is valid.
    unsafe { dispatch(Isa::detect_once(), Gelu(x)) };
}

/// See [`gelu`].
struct Gelu<'a>(&'a mut [f32]);

impl Job for Gelu<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let len = self.0.len();
        let whole = len / S::LANES * S::LANES;
        // SAFETY: whole vectors within the slice; the rest goes through an array of one vector's length.
        unsafe {
            let x = self.0.as_mut_ptr();
            for i in (0..whole).step_by(S::LANES) {
                S::store(x.add(i), gelu_of::<S>(S::load(x.add(i))));
            }
            let mut rest = [0.0f32; 16];
            rest[..len - whole].copy_from_slice(&self.0[whole..]);
            S::store(rest.as_mut_ptr(), gelu_of::<S>(S::load(rest.as_ptr())));
            self.0[whole..].copy_from_slice(&rest[..len - whole]);
        }
    }
}

/// `max(x, 0) - |x|/2 · erfc(|x|/√2)`: the same as `x/2 · (1 + erf(x/√2))`, without its cancellation below zero. The complement is
/// Abramowitz and Stegun 7.1.26, absolute error under 1.5e-7.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn gelu_of<S: Simd>(x: S::F) -> S::F {
    // SAFETY: passed on to the caller.
    unsafe {
        let size = S::abs(x);
        let a = S::mul(size, S::splat(std::f32::consts::FRAC_1_SQRT_2));
        let one = S::splat(1.0);
        let t = S::div(one, S::fma(a, S::splat(0.327_591_1), one));
        let mut poly = S::splat(1.061_405_4);
        for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
            poly = S::fma(poly, t, S::splat(c));
        }
        let square = S::mul(a, a);
        let complement = S::mul(S::mul(poly, t), exp::<S>(S::sub(S::splat(0.0), square)));
        let half = S::mul(size, S::splat(0.5));
        // A NaN is the second operand of `max`, and stays.
        S::sub(S::max(S::splat(0.0), x), S::mul(half, complement))
    }
}

/// Adds `bias` to each row of `x`.
pub fn add_bias(x: &mut [f32], bias: &[f32]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (v, b) in row.iter_mut().zip(bias) {
            *v += b;
        }
    }
}

/// Attention in both directions within one sequence: `q`, `k`, `v` and `out` are `[rows, heads, head_dim]`.
pub fn attention(q: &[f32], k: &[f32], v: &[f32], heads: usize, head_dim: usize, out: &mut [f32]) {
    let width = heads * head_dim;
    assert!(
        width > 0 && q.len().is_multiple_of(width),
        "[rows, heads, head_dim]"
    );
    for x in [k, v, &*out] {
        assert_eq!(x.len(), q.len(), "[rows, heads, head_dim]");
    }
    for head in 0..heads {
        let job = Head {
            q,
            k,
            v,
            width,
            from: head * head_dim,
            dim: head_dim,
            out,
        };
        // SAFETY: `detect_once` gives an available instruction set; the job's slices are valid.
        unsafe { dispatch(Isa::detect_once(), job) };
    }
}

/// One head of [`attention`].
struct Head<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// From one row to the next.
    width: usize,
    /// Where in a row the head begins.
    from: usize,
    dim: usize,
    out: &'a mut [f32],
}

impl Job for Head<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let count = self.q.len() / self.width;
        let padded = count.next_multiple_of(S::LANES);
        let dim = self.dim.next_multiple_of(S::LANES);
        // Keys transposed, so that a vector holds a score of each key; values with whole vectors of dimensions.
        let mut transposed = vec![0.0f32; self.dim * padded];
        let mut values = vec![0.0f32; count * dim];
        for t in 0..count {
            let at = t * self.width + self.from;
            for d in 0..self.dim {
                transposed[d * padded + t] = self.k[at + d];
            }
            values[t * dim..t * dim + self.dim].copy_from_slice(&self.v[at..at + self.dim]);
        }
        let mut scores = vec![0.0f32; padded];
        let mut sums = vec![0.0f32; dim];
        let scale = 1.0 / (self.dim as f32).sqrt();
        for (q, out) in self
            .q
            .chunks_exact(self.width)
            .zip(self.out.chunks_exact_mut(self.width))
        {
            let q = &q[self.from..self.from + self.dim];
            // SAFETY: `padded` and `dim` are whole vectors, and the keys and values have as many rows.
            unsafe {
                let mut t = 0;
                while padded - t >= 4 * S::LANES {
                    score::<S, 4>(q, scale, &transposed, padded, t, &mut scores);
                    t += 4 * S::LANES;
                }
                while t < padded {
                    score::<S, 1>(q, scale, &transposed, padded, t, &mut scores);
                    t += S::LANES;
                }
                // What is beyond the last key must not be the largest, and counts as nothing.
                scores[count..].fill(f32::NEG_INFINITY);
                let mut largest = S::splat(f32::NEG_INFINITY);
                for t in (0..padded).step_by(S::LANES) {
                    largest = S::max(S::load(scores.as_ptr().add(t)), largest);
                }
                let largest = S::splat(S::max_across(largest));
                let mut total = S::splat(0.0);
                for t in (0..padded).step_by(S::LANES) {
                    let p = scores.as_mut_ptr().add(t);
                    let e = exp::<S>(S::sub(S::load(p), largest));
                    total = S::add(total, e);
                    S::store(p, e);
                }
                let total = S::sum(total);
                let mut d = 0;
                while dim - d >= 4 * S::LANES {
                    weigh::<S, 4>(&scores[..count], &values, dim, d, &mut sums);
                    d += 4 * S::LANES;
                }
                while dim - d >= 2 * S::LANES {
                    weigh::<S, 2>(&scores[..count], &values, dim, d, &mut sums);
                    d += 2 * S::LANES;
                }
                while d < dim {
                    weigh::<S, 1>(&scores[..count], &values, dim, d, &mut sums);
                    d += S::LANES;
                }
                for (out, sum) in out[self.from..self.from + self.dim].iter_mut().zip(&sums) {
                    *out = sum / total;
                }
            }
        }
    }
}

/// `scores[t..] = scale · q · keys[.., t..]` for `N` vectors of keys.
///
/// # Safety
/// As [`Simd`]; `keys` has `q.len()` rows of `padded`, `scores` has `padded`, and `t + N * LANES` is at most that.
#[inline(always)]
unsafe fn score<S: Simd, const N: usize>(
    q: &[f32],
    scale: f32,
    keys: &[f32],
    padded: usize,
    t: usize,
    scores: &mut [f32],
) {
    debug_assert!(keys.len() >= q.len() * padded && scores.len() >= t + N * S::LANES);
    // SAFETY: by the contract.
    unsafe {
        let mut sums = [S::splat(0.0); N];
        for (d, &q) in q.iter().enumerate() {
            let q = S::splat(q * scale);
            let row = keys.as_ptr().add(d * padded + t);
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::fma(q, S::load(row.add(n * S::LANES)), *sum);
            }
        }
        for (n, &sum) in sums.iter().enumerate() {
            S::store(scores.as_mut_ptr().add(t + n * S::LANES), sum);
        }
    }
}

/// `sums[d..] = Σ p[t] · values[t, d..]` for `N` vectors of dimensions.
///
/// # Safety
/// As [`Simd`]; `values` has `p.len()` rows of `dim`, `sums` has `dim`, and `d + N * LANES` is at most that.
#[inline(always)]
unsafe fn weigh<S: Simd, const N: usize>(
    p: &[f32],
    values: &[f32],
    dim: usize,
    d: usize,
    sums: &mut [f32],
) {
    debug_assert!(values.len() >= p.len() * dim && sums.len() >= d + N * S::LANES);
    // SAFETY: by the contract.
    unsafe {
        // Even and odd keys apart: twice as many sums under way.
        let (mut even, mut odd) = ([S::splat(0.0); N], [S::splat(0.0); N]);
        let values = values.as_ptr().add(d);
        let pairs = p.chunks_exact(2);
        let last = pairs.remainder();
        for (i, pair) in pairs.enumerate() {
            for n in 0..N {
                even[n] = S::fma(
                    S::splat(pair[0]),
                    S::load(values.add(2 * i * dim + n * S::LANES)),
                    even[n],
                );
                odd[n] = S::fma(
                    S::splat(pair[1]),
                    S::load(values.add((2 * i + 1) * dim + n * S::LANES)),
                    odd[n],
                );
            }
        }
        if let [last] = last {
            for (n, sum) in even.iter_mut().enumerate() {
                let value = S::load(values.add((p.len() - 1) * dim + n * S::LANES));
                *sum = S::fma(S::splat(*last), value, *sum);
            }
        }
        for n in 0..N {
            let sum = S::add(even[n], odd[n]);
            S::store(sums.as_mut_ptr().add(d + n * S::LANES), sum);
        }
    }
}

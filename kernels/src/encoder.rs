//! What a sentence encoder (BERT, XLM-R) needs beyond a decoder's layer, on slices in host memory. Rows are independent.

use crate::cpu::simd::{Job, Simd, dispatch, exp};
use crate::isa::Isa;

/// `out = (x - mean) / sqrt(variance + eps) * weight + bias`, row by row; the width is `weight`'s length.
pub fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    assert_eq!(bias.len(), width);
    assert_eq!(x.len(), out.len());
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / width as f64;
        let variance = x
            .iter()
            .map(|&v| (f64::from(v) - mean).powi(2))
            .sum::<f64>()
            / width as f64;
        let scale = (1.0 / (variance + f64::from(eps)).sqrt()) as f32;
        let mean = mean as f32;
        for i in 0..width {
            out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
        }
    }
}

/// `x = x · Φ(x)`, the exact form by the error function.
pub fn gelu(x: &mut [f32]) {
    for v in x {
        *v = 0.5 * *v * (1.0 + erf(*v * std::f32::consts::FRAC_1_SQRT_2));
    }
}

/// Abramowitz and Stegun 7.1.26 computed in f64: absolute error under 1.5e-7, at the last bit of f32 around one.
fn erf(x: f32) -> f32 {
    let a = f64::from(x.abs());
    let t = 1.0 / (1.0 + 0.327_591_1 * a);
    let poly = t
        * (0.254_829_592
            + t * (-0.284_496_736
                + t * (1.421_413_741 + t * (-1.453_152_027 + t * 1.061_405_429))));
    ((1.0 - poly * (-a * a).exp()) as f32).copysign(x)
}

/// Adds `bias` to each row of `x`.
pub fn add_bias(x: &mut [f32], bias: &[f32]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (v, b) in row.iter_mut().zip(bias) {
            *v += b;
        }
    }
}

/// Attention in both directions within one sequence: `q`, `k`, `v` and `out` are `[rows, heads, head_dim]`; keys whose `mask`
/// is false are not read. A sequence without any key gives zeros.
pub fn attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    heads: usize,
    head_dim: usize,
    mask: &[bool],
    out: &mut [f32],
) {
    let width = heads * head_dim;
    for x in [q, k, v, &*out] {
        assert_eq!(x.len(), mask.len() * width, "[rows, heads, head_dim]");
    }
    let keys: Vec<usize> = (0..mask.len()).filter(|&t| mask[t]).collect();
    if keys.is_empty() {
        out.fill(0.0);
        return;
    }
    for head in 0..heads {
        let job = Head {
            q,
            k,
            v,
            width,
            from: head * head_dim,
            dim: head_dim,
            keys: &keys,
            out,
        };
        // SAFETY: `detect` gives an available instruction set; the job's slices are valid.
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
    keys: &'a [usize],
    out: &'a mut [f32],
}

impl Job for Head<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (count, padded) = (self.keys.len(), self.keys.len().next_multiple_of(S::LANES));
        let dim = self.dim.next_multiple_of(S::LANES);
        // Keys transposed, so that a vector holds a score of each key; values with whole vectors of dimensions.
        let mut transposed = vec![0.0f32; self.dim * padded];
        let mut values = vec![0.0f32; count * dim];
        for (i, &t) in self.keys.iter().enumerate() {
            let at = t * self.width + self.from;
            for d in 0..self.dim {
                transposed[d * padded + i] = self.k[at + d];
            }
            values[i * dim..i * dim + self.dim].copy_from_slice(&self.v[at..at + self.dim]);
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
            // SAFETY: `padded` and `dim` are whole vectors.
            unsafe {
                for t in (0..padded).step_by(S::LANES) {
                    let mut sum = S::splat(0.0);
                    for (d, &q) in q.iter().enumerate() {
                        let keys = S::load(transposed.as_ptr().add(d * padded + t));
                        sum = S::fma(S::splat(q * scale), keys, sum);
                    }
                    S::store(scores.as_mut_ptr().add(t), sum);
                }
                let largest = scores[..count]
                    .iter()
                    .copied()
                    .fold(f32::NEG_INFINITY, f32::max);
                for t in (0..padded).step_by(S::LANES) {
                    let p = scores.as_mut_ptr().add(t);
                    S::store(p, exp::<S>(S::sub(S::load(p), S::splat(largest))));
                }
                let total: f32 = scores[..count].iter().sum();
                for d in (0..dim).step_by(S::LANES) {
                    let mut sum = S::splat(0.0);
                    for (t, &p) in scores[..count].iter().enumerate() {
                        sum = S::fma(S::splat(p), S::load(values.as_ptr().add(t * dim + d)), sum);
                    }
                    S::store(sums.as_mut_ptr().add(d), sum);
                }
                for (out, sum) in out[self.from..self.from + self.dim].iter_mut().zip(&sums) {
                    *out = sum / total;
                }
            }
        }
    }
}

//! The small operations of a layer: norm, gate, residual sum, rotation. Each works on a run of rows.

use super::simd::{Job, Simd, silu};
use crate::device::Rope;

/// Root-mean-square norm of each of `x`'s rows, whose width is `weight`'s length.
pub(crate) struct RmsNorm<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub eps: f32,
    pub out: &'a mut [f32],
}

impl Job for RmsNorm<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = self.weight.len();
        let whole = width / S::LANES * S::LANES;
        for (x, out) in self
            .x
            .chunks_exact(width)
            .zip(self.out.chunks_exact_mut(width))
        {
            // SAFETY: whole vectors up to `whole`, within rows of `width`.
            unsafe {
                let mut sums = [S::splat(0.0); 2];
                for i in (0..whole).step_by(S::LANES) {
                    let v = S::load(x.as_ptr().add(i));
                    sums[i / S::LANES % 2] = S::fma(v, v, sums[i / S::LANES % 2]);
                }
                let mut sum = S::sum(S::add(sums[0], sums[1]));
                for v in &x[whole..] {
                    sum += v * v;
                }
                let scale = 1.0 / (sum / width as f32 + self.eps).sqrt();
                for i in (0..whole).step_by(S::LANES) {
                    let v = S::mul(S::load(x.as_ptr().add(i)), S::splat(scale));
                    S::store(
                        out.as_mut_ptr().add(i),
                        S::mul(v, S::load(self.weight.as_ptr().add(i))),
                    );
                }
                for i in whole..width {
                    out[i] = x[i] * scale * self.weight[i];
                }
            }
        }
    }
}

/// `gate = silu(gate) * up`.
pub(crate) struct SiluGate<'a> {
    pub gate: &'a mut [f32],
    pub up: &'a [f32],
}

impl Job for SiluGate<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        assert_eq!(self.gate.len(), self.up.len());
        let len = self.gate.len();
        let whole = len / S::LANES * S::LANES;
        // SAFETY: whole vectors within both; the rest goes through an array of one vector's length.
        unsafe {
            let (gate, up) = (self.gate.as_mut_ptr(), self.up.as_ptr());
            for i in (0..whole).step_by(S::LANES) {
                let g = silu::<S>(S::load(gate.add(i)));
                S::store(gate.add(i), S::mul(g, S::load(up.add(i))));
            }
            if whole < len {
                let mut rest = [0.0f32; 16];
                rest[..len - whole].copy_from_slice(&self.gate[whole..]);
                S::store(rest.as_mut_ptr(), silu::<S>(S::load(rest.as_ptr())));
                for (i, g) in rest[..len - whole].iter().enumerate() {
                    self.gate[whole + i] = g * self.up[whole + i];
                }
            }
        }
    }
}

/// `x += sum`, the sum rounded first.
pub(crate) struct AddSum<'a> {
    pub x: &'a mut [f32],
    pub sum: &'a [f64],
}

impl Job for AddSum<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (x, &sum) in self.x.iter_mut().zip(self.sum) {
            *x += sum as f32;
        }
    }
}

/// Cosine and sine of every pair at some positions: `[positions, 2, head_dim / 2]`.
#[derive(Default)]
pub(crate) struct Angles {
    positions: Vec<u32>,
    inv_freq: Vec<f32>,
    table: Vec<f32>,
}

impl Angles {
    /// Whether the table is of these.
    pub fn fits(&self, positions: &[u32], rope: &Rope) -> bool {
        self.positions == positions && self.inv_freq == rope.inv_freq
    }

    pub fn new(positions: &[u32], rope: &Rope) -> Angles {
        let half = rope.inv_freq.len();
        let mut table = vec![0.0; positions.len() * 2 * half];
        for (row, &position) in table.chunks_exact_mut((2 * half).max(1)).zip(positions) {
            let (cos, sin) = row.split_at_mut(half);
            for ((c, s), frequency) in cos.iter_mut().zip(sin).zip(&rope.inv_freq) {
                // The product is rounded to f32 as in the reference.
                (*s, *c) = (position as f32 * frequency).sin_cos();
            }
        }
        Angles {
            positions: positions.to_vec(),
            inv_freq: rope.inv_freq.clone(),
            table,
        }
    }
}

/// Rotates rows of heads, from row `first` of the angles on.
pub(crate) struct Rotate<'a> {
    pub x: &'a mut [f32],
    pub heads: usize,
    pub first: usize,
    pub angles: &'a Angles,
    pub rope: &'a Rope,
}

impl Job for Rotate<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (dim, half) = (self.rope.head_dim, self.rope.head_dim / 2);
        let angles = self.angles.table[self.first * 2 * half..].chunks_exact(2 * half);
        for (row, angles) in self.x.chunks_exact_mut(self.heads * dim).zip(angles) {
            let (cos, sin) = angles.split_at(half);
            for head in row.chunks_exact_mut(dim) {
                if self.rope.interleaved {
                    for ((pair, c), s) in head.chunks_exact_mut(2).zip(cos).zip(sin) {
                        let (a, b) = (pair[0], pair[1]);
                        pair[0] = a * c - b * s;
                        pair[1] = a * s + b * c;
                    }
                } else {
                    let (first, second) = head.split_at_mut(half);
                    for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                        (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
                    }
                }
            }
        }
    }
}

//! Causal attention over a paged f16 cache, with grouped heads and an online softmax.
//!
//! A block's keys lie transposed, `[dim, position]`, so that one vector holds a score of each position; its values lie
//! `[position, dim]`. Each query meets the blocks of its sequence in order, whatever other queries are near.

use half::f16;

use super::simd::{Job, Simd, exp};
use crate::device::{BLOCK_TOKENS, Error, SeqSpan};

/// Query vectors (rows × heads of a group) that share one conversion of a block to floats.
const QUERIES: usize = 32;
/// Query vectors whose scores are computed together, to hide an addition's latency.
const TOGETHER: usize = 4;

/// A paged KV cache of all layers.
pub struct Kv {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    /// `head_dim` rounded up to whole vectors; what lies between is zero.
    dim: usize,
    blocks: usize,
    /// `[layers, blocks, kv_heads, dim, BLOCK_TOKENS]` f16
    keys: Vec<u16>,
    /// `[layers, blocks, kv_heads, BLOCK_TOKENS, dim]` f16
    values: Vec<u16>,
}

impl Kv {
    pub(crate) fn new(
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        blocks: usize,
    ) -> Result<Kv, Error> {
        let dim = head_dim.next_multiple_of(16);
        let len = [blocks, kv_heads, dim, BLOCK_TOKENS]
            .iter()
            .try_fold(layers, |a, &b| a.checked_mul(b));
        let bytes = len.and_then(|len| len.checked_mul(4)).unwrap_or(usize::MAX);
        let error = || Error::Memory {
            bytes,
            what: "the KV cache",
        };
        let len = len
            .filter(|_| bytes <= isize::MAX as usize)
            .ok_or_else(error)?;
        // Asked for once with an error as answer; zeroed pages come from the system only as they are touched.
        Vec::<u16>::new()
            .try_reserve_exact(len)
            .map_err(|_| error())?;
        Ok(Kv {
            layers,
            kv_heads,
            head_dim,
            dim,
            blocks,
            keys: vec![0; len],
            values: vec![0; len],
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        2 * (self.keys.len() + self.values.len())
    }

    /// Where a KV head's part of a block begins, in keys and in values.
    fn at(&self, layer: usize, block: usize, head: usize) -> usize {
        ((layer * self.blocks + block) * self.kv_heads + head) * self.dim * BLOCK_TOKENS
    }

    pub(crate) fn write(&mut self, layer: usize, k: &[f32], v: &[f32], slots: &[u32]) {
        let width = self.kv_heads * self.head_dim;
        assert!(
            layer < self.layers && k.len() >= slots.len() * width && v.len() >= slots.len() * width
        );
        for ((&slot, k), v) in slots
            .iter()
            .zip(k.chunks_exact(width))
            .zip(v.chunks_exact(width))
        {
            let (block, t) = (slot as usize / BLOCK_TOKENS, slot as usize % BLOCK_TOKENS);
            assert!(block < self.blocks, "slot {slot} of {} blocks", self.blocks);
            for head in 0..self.kv_heads {
                let at = self.at(layer, block, head);
                let row = head * self.head_dim..(head + 1) * self.head_dim;
                for (d, (&k, &v)) in k[row.clone()].iter().zip(&v[row]).enumerate() {
                    self.keys[at + d * BLOCK_TOKENS + t] = f16::from_f32(k).to_bits();
                    self.values[at + t * self.dim + d] = f16::from_f32(v).to_bits();
                }
            }
        }
    }
}

/// A part of the work: some rows of one span, for one KV head.
pub(crate) struct Part {
    span: usize,
    kv_head: usize,
    rows: std::ops::Range<usize>,
}

/// Cuts the attention of `seqs` into parts, and says how many products it takes.
pub(crate) fn parts(kv: &Kv, heads: usize, seqs: &[SeqSpan<'_>]) -> (Vec<Part>, usize) {
    let group = heads / kv.kv_heads;
    let rows_at_once = (QUERIES / group).max(1);
    let mut parts = Vec::new();
    let mut work = 0;
    for (span, s) in seqs.iter().enumerate() {
        work += s.rows * (s.context + s.rows) * heads * kv.dim;
        for kv_head in 0..kv.kv_heads {
            for first in (0..s.rows).step_by(rows_at_once) {
                parts.push(Part {
                    span,
                    kv_head,
                    rows: first..(first + rows_at_once).min(s.rows),
                });
            }
        }
    }
    (parts, work)
}

/// Asserts that every row and block named by `seqs` exists.
pub(crate) fn check(
    kv: &Kv,
    layer: usize,
    heads: usize,
    seqs: &[SeqSpan<'_>],
    q_len: usize,
    out_len: usize,
) {
    assert!(layer < kv.layers && heads.is_multiple_of(kv.kv_heads));
    for s in seqs {
        let end = (s.first_row + s.rows) * heads * kv.head_dim;
        assert!(
            end <= q_len && end <= out_len,
            "rows {}+{} of a span",
            s.first_row,
            s.rows
        );
        let blocks = (s.context + s.rows).div_ceil(BLOCK_TOKENS);
        assert!(
            blocks <= s.blocks.len(),
            "{blocks} blocks are read, {} given",
            s.blocks.len()
        );
        assert!(
            s.blocks[..blocks].iter().all(|&b| (b as usize) < kv.blocks),
            "block out of range"
        );
    }
}

/// One part of the attention.
pub(crate) struct Attend<'a> {
    pub kv: &'a Kv,
    pub layer: usize,
    pub heads: usize,
    pub seqs: &'a [SeqSpan<'a>],
    pub part: &'a Part,
    /// `[rows, heads, head_dim]`
    pub q: *const f32,
    pub out: *mut f32,
}

/// What a query vector carries from block to block.
#[derive(Clone, Copy)]
struct Running {
    largest: f32,
    total: f32,
}

impl Job for Attend<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let kv = self.kv;
        let (dim, head_dim) = (kv.dim, kv.head_dim);
        let span = &self.seqs[self.part.span];
        let group = self.heads / kv.kv_heads;
        let queries = self.part.rows.len() * group;
        // The last group of queries is computed whole; the surplus is thrown away.
        let padded = queries.next_multiple_of(TOGETHER);
        let mut scratch =
            vec![0.0f32; 2 * padded * dim + 2 * dim * BLOCK_TOKENS + padded * BLOCK_TOKENS];
        let (q, rest) = scratch.split_at_mut(padded * dim);
        let (acc, rest) = rest.split_at_mut(padded * dim);
        let (keys, rest) = rest.split_at_mut(dim * BLOCK_TOKENS);
        let (values, scores) = rest.split_at_mut(dim * BLOCK_TOKENS);
        let mut running = vec![
            Running {
                largest: f32::NEG_INFINITY,
                total: 0.0
            };
            queries
        ];
        let scale = 1.0 / (head_dim as f32).sqrt();
        let at = |i: usize| {
            let row = span.first_row + self.part.rows.start + i / group;
            (row * self.heads + self.part.kv_head * group + i % group) * head_dim
        };
        for i in 0..queries {
            for d in 0..head_dim {
                // SAFETY: rows and heads were checked against the length of `q`.
                q[i * dim + d] = unsafe { *self.q.add(at(i) + d) } * scale;
            }
        }
        let positions = span.context + self.part.rows.end;
        for (j, &block) in span.blocks[..positions.div_ceil(BLOCK_TOKENS)]
            .iter()
            .enumerate()
        {
            let from = kv.at(self.layer, block as usize, self.part.kv_head);
            let len = dim * BLOCK_TOKENS;
            // SAFETY: the slices have `len` floats, a multiple of every vector; `padded` queries have `dim` each.
            unsafe {
                widen::<S>(&kv.keys[from..from + len], keys);
                widen::<S>(&kv.values[from..from + len], values);
                for i in (0..queries).step_by(TOGETHER) {
                    score::<S>(&q[i * dim..], dim, keys, &mut scores[i * BLOCK_TOKENS..]);
                }
                for (i, running) in running.iter_mut().enumerate() {
                    let seen = span.context + self.part.rows.start + i / group + 1;
                    let valid = seen.saturating_sub(j * BLOCK_TOKENS).min(BLOCK_TOKENS);
                    if valid > 0 {
                        let scores = &mut scores[i * BLOCK_TOKENS..(i + 1) * BLOCK_TOKENS];
                        let acc = &mut acc[i * dim..(i + 1) * dim];
                        accumulate::<S>(running, scores, valid, values, acc);
                    }
                }
            }
        }
        for (i, running) in running.iter().enumerate() {
            for d in 0..head_dim {
                // SAFETY: as for `q`; each part writes rows and heads of its own.
                unsafe { *self.out.add(at(i) + d) = acc[i * dim + d] / running.total };
            }
        }
    }
}

/// # Safety
/// As [`Simd`]; `out` is as long as `from`, a multiple of a vector.
#[inline(always)]
unsafe fn widen<S: Simd>(from: &[u16], out: &mut [f32]) {
    debug_assert!(from.len() == out.len() && from.len().is_multiple_of(S::LANES));
    for i in (0..from.len()).step_by(S::LANES) {
        // SAFETY: whole vectors within both.
        unsafe { S::store(out.as_mut_ptr().add(i), S::load_f16(from.as_ptr().add(i))) };
    }
}

/// `scores[i, t] = q[i] · keys[.., t]` for [`TOGETHER`] queries.
///
/// # Safety
/// As [`Simd`]; `q` has `TOGETHER * dim` floats, `keys` `dim` rows of positions, `scores` `TOGETHER` rows.
#[inline(always)]
unsafe fn score<S: Simd>(q: &[f32], dim: usize, keys: &[f32], scores: &mut [f32]) {
    debug_assert!(q.len() >= TOGETHER * dim && keys.len() == dim * BLOCK_TOKENS);
    debug_assert!(scores.len() >= TOGETHER * BLOCK_TOKENS);
    for t in (0..BLOCK_TOKENS).step_by(S::LANES) {
        // SAFETY: by the contract.
        unsafe {
            // Even and odd dimensions apart: twice as many sums under way.
            let mut even = [S::splat(0.0); TOGETHER];
            let mut odd = [S::splat(0.0); TOGETHER];
            for d in (0..dim).step_by(2) {
                let first = S::load(keys.as_ptr().add(d * BLOCK_TOKENS + t));
                let second = S::load(keys.as_ptr().add((d + 1) * BLOCK_TOKENS + t));
                for i in 0..TOGETHER {
                    let q = q.as_ptr().add(i * dim + d);
                    even[i] = S::fma(S::splat(*q), first, even[i]);
                    odd[i] = S::fma(S::splat(*q.add(1)), second, odd[i]);
                }
            }
            for i in 0..TOGETHER {
                S::store(
                    scores.as_mut_ptr().add(i * BLOCK_TOKENS + t),
                    S::add(even[i], odd[i]),
                );
            }
        }
    }
}

/// Takes the first `valid` positions of a block into one query's softmax and sum of values.
///
/// # Safety
/// As [`Simd`]; `scores` has a block's positions, `values` a row of `acc`'s length for each.
#[inline(always)]
unsafe fn accumulate<S: Simd>(
    running: &mut Running,
    scores: &mut [f32],
    valid: usize,
    values: &[f32],
    acc: &mut [f32],
) {
    let dim = acc.len();
    debug_assert!(scores.len() == BLOCK_TOKENS && values.len() == dim * BLOCK_TOKENS);
    scores[valid..].fill(f32::NEG_INFINITY);
    // SAFETY: whole vectors within `scores`, `values` and `acc`, whose lengths are multiples of sixteen.
    unsafe {
        let mut largest = running.largest;
        for &s in &scores[..valid] {
            // A NaN stays: it must show in the result.
            largest = if s > largest || s.is_nan() {
                s
            } else {
                largest
            };
        }
        if largest != running.largest {
            let shrink = (running.largest - largest).exp();
            running.total *= shrink;
            for d in (0..dim).step_by(S::LANES) {
                let p = acc.as_mut_ptr().add(d);
                S::store(p, S::mul(S::load(p), S::splat(shrink)));
            }
            running.largest = largest;
        }
        for t in (0..BLOCK_TOKENS).step_by(S::LANES) {
            let p = scores.as_mut_ptr().add(t);
            S::store(p, exp::<S>(S::sub(S::load(p), S::splat(largest))));
        }
        for &p in &scores[..valid] {
            running.total += p;
        }
        let mut d = 0;
        while dim - d >= 8 * S::LANES {
            add_values::<S, 8>(&scores[..valid], values, dim, d, acc);
            d += 8 * S::LANES;
        }
        while dim - d >= 4 * S::LANES {
            add_values::<S, 4>(&scores[..valid], values, dim, d, acc);
            d += 4 * S::LANES;
        }
        while dim - d >= S::LANES {
            add_values::<S, 1>(&scores[..valid], values, dim, d, acc);
            d += S::LANES;
        }
    }
}

/// `acc[d..] += Σ p[t] * values[t, d..]` for `N` vectors of dimensions.
///
/// # Safety
/// As [`Simd`]; `d + N * LANES` dimensions exist in `acc` and in each of `p.len()` rows of `values`.
#[inline(always)]
unsafe fn add_values<S: Simd, const N: usize>(
    p: &[f32],
    values: &[f32],
    dim: usize,
    d: usize,
    acc: &mut [f32],
) {
    // SAFETY: by the contract.
    unsafe {
        let acc = acc.as_mut_ptr().add(d);
        let mut sums = [S::splat(0.0); N];
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum = S::load(acc.add(n * S::LANES));
        }
        for (t, &p) in p.iter().enumerate() {
            let p = S::splat(p);
            let row = values.as_ptr().add(t * dim + d);
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::fma(p, S::load(row.add(n * S::LANES)), *sum);
            }
        }
        for (n, &sum) in sums.iter().enumerate() {
            S::store(acc.add(n * S::LANES), sum);
        }
    }
}

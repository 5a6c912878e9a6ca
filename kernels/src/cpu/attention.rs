//! Causal attention over a paged f16 cache, with grouped heads and an online softmax.
//!
//! A block's keys lie transposed, `[dim, position]`, so that one vector holds a score of each position; its values lie
//! `[position, dim]`. Each query meets the blocks of its sequence in order, whatever other queries are near.

use super::bytes::{Bytes, Pages};
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
    keys: Bytes,
    /// `[layers, blocks, kv_heads, BLOCK_TOKENS, dim]` f16
    values: Bytes,
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
        // A sequence's block touches a little of every layer.
        let zeroed = || Bytes::zeroed(2 * len, "the KV cache", Pages::Sparse);
        Ok(Kv {
            layers,
            kv_heads,
            head_dim,
            dim,
            blocks,
            keys: zeroed()?,
            values: zeroed()?,
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.keys.len() + self.values.len()
    }

    pub(crate) fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Floats of one row of keys.
    pub(crate) fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Where a KV head's part of a block begins, in keys and in values.
    fn at(&self, layer: usize, block: usize, head: usize) -> usize {
        ((layer * self.blocks + block) * self.kv_heads + head) * self.dim * BLOCK_TOKENS
    }

    /// The pointers through which [`Store`] writes; everything it is told was checked here.
    pub(crate) fn target(
        &mut self,
        layer: usize,
        k_len: usize,
        v_len: usize,
        slots: &[u32],
    ) -> Target {
        let width = self.width();
        assert!(
            layer < self.layers && k_len >= slots.len() * width && v_len >= slots.len() * width
        );
        for &slot in slots {
            assert!(
                slot as usize / BLOCK_TOKENS < self.blocks,
                "slot {slot} of {} blocks",
                self.blocks
            );
        }
        Target {
            keys: self.keys.as_mut_ptr().cast(),
            values: self.values.as_mut_ptr().cast(),
        }
    }
}

/// Where [`Store`] writes.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    keys: *mut u16,
    values: *mut u16,
}

// SAFETY: each task writes one head's keys or values only.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

/// Stores rows of keys, or of values, of one head, as f16.
pub(crate) struct Store<'a> {
    /// The cache that `target` came from.
    pub kv: &'a Kv,
    pub target: Target,
    pub layer: usize,
    pub head: usize,
    /// Whether `rows` are keys.
    pub keys: bool,
    /// `[slots.len(), kv_heads, head_dim]`
    pub rows: *const f32,
    pub slots: &'a [u32],
}

impl Job for Store<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (dim, head_dim) = (self.kv.dim, self.kv.head_dim);
        let width = self.kv.width();
        for (i, &slot) in self.slots.iter().enumerate() {
            let (block, t) = (slot as usize / BLOCK_TOKENS, slot as usize % BLOCK_TOKENS);
            let at = self.kv.at(self.layer, block, self.head);
            for d in (0..head_dim).step_by(S::LANES) {
                let count = S::LANES.min(head_dim - d);
                // SAFETY: `Kv::target` checked rows, layer and slots; a vector of values ends within the padded `dim`, and what lies
                // beyond `head_dim` stays zero.
                unsafe {
                    let from = self.rows.add(i * width + self.head * head_dim + d);
                    let mut floats = [0.0f32; 16];
                    let x = if count == S::LANES {
                        S::load(from)
                    } else {
                        std::ptr::copy_nonoverlapping(from, floats.as_mut_ptr(), count);
                        S::load(floats.as_ptr())
                    };
                    if self.keys {
                        let mut halves = [0u16; 16];
                        S::store_f16(halves.as_mut_ptr(), x);
                        for (j, &half) in halves[..count].iter().enumerate() {
                            *self.target.keys.add(at + (d + j) * BLOCK_TOKENS + t) = half;
                        }
                    } else {
                        S::store_f16(self.target.values.add(at + t * dim + d), x);
                    }
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
struct Running<F> {
    largest: f32,
    /// Sums of exponentials, a lane each.
    total: F,
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
                // SAFETY: passed on to whoever made the job.
                total: unsafe { S::splat(0.0) },
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
            // In bytes, two a number.
            let from = 2 * kv.at(self.layer, block as usize, self.part.kv_head);
            let to = from + 2 * dim * BLOCK_TOKENS;
            // SAFETY: the slices have `dim * BLOCK_TOKENS` floats, a multiple of every vector; `padded` queries have `dim` each.
            unsafe {
                widen::<S>(&kv.keys[from..to], keys);
                widen::<S>(&kv.values[from..to], values);
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
            // SAFETY: as for `q`; each part writes rows and heads of its own.
            unsafe {
                let total = S::sum(running.total);
                for d in 0..head_dim {
                    *self.out.add(at(i) + d) = acc[i * dim + d] / total;
                }
            }
        }
    }
}

/// `out` from the bytes of f16.
///
/// # Safety
/// As [`Simd`]; `from` holds as many numbers as `out`, a multiple of a vector.
#[inline(always)]
unsafe fn widen<S: Simd>(from: &[u8], out: &mut [f32]) {
    debug_assert!(from.len() == 2 * out.len() && out.len().is_multiple_of(S::LANES));
    for i in (0..out.len()).step_by(S::LANES) {
        // SAFETY: whole vectors within both.
        unsafe {
            let from = from.as_ptr().add(2 * i).cast();
            S::store(out.as_mut_ptr().add(i), S::load_f16(from));
        };
    }
}

/// `scores[i, t] = q[i] · keys[.., t]` for [`TOGETHER`] queries: at least eight sums under way, to hide an addition's latency.
///
/// # Safety
/// As [`Simd`]; `q` has `TOGETHER * dim` floats, `keys` `dim` rows of positions, `scores` `TOGETHER` rows.
#[inline(always)]
unsafe fn score<S: Simd>(q: &[f32], dim: usize, keys: &[f32], scores: &mut [f32]) {
    debug_assert!(q.len() >= TOGETHER * dim && keys.len() == dim * BLOCK_TOKENS);
    debug_assert!(scores.len() >= TOGETHER * BLOCK_TOKENS);
    // SAFETY: by the contract; a block is one vector or two.
    unsafe {
        let (q, keys, scores) = (q.as_ptr(), keys.as_ptr(), scores.as_mut_ptr());
        let (mut first, mut second) = ([S::splat(0.0); TOGETHER], [S::splat(0.0); TOGETHER]);
        if S::LANES == BLOCK_TOKENS {
            // Even and odd dimensions apart.
            for d in (0..dim).step_by(2) {
                let even = S::load(keys.add(d * BLOCK_TOKENS));
                let odd = S::load(keys.add((d + 1) * BLOCK_TOKENS));
                for i in 0..TOGETHER {
                    let q = q.add(i * dim + d);
                    first[i] = S::fma(S::splat(*q), even, first[i]);
                    second[i] = S::fma(S::splat(*q.add(1)), odd, second[i]);
                }
            }
            for i in 0..TOGETHER {
                S::store(scores.add(i * BLOCK_TOKENS), S::add(first[i], second[i]));
            }
        } else {
            for d in 0..dim {
                let left = S::load(keys.add(d * BLOCK_TOKENS));
                let right = S::load(keys.add(d * BLOCK_TOKENS + S::LANES));
                for i in 0..TOGETHER {
                    let q = S::splat(*q.add(i * dim + d));
                    first[i] = S::fma(q, left, first[i]);
                    second[i] = S::fma(q, right, second[i]);
                }
            }
            for i in 0..TOGETHER {
                S::store(scores.add(i * BLOCK_TOKENS), first[i]);
                S::store(scores.add(i * BLOCK_TOKENS + S::LANES), second[i]);
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
    running: &mut Running<S::F>,
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
        let scores_at = scores.as_mut_ptr();
        let mut largest = S::splat(running.largest);
        for t in (0..BLOCK_TOKENS).step_by(S::LANES) {
            largest = S::max(S::load(scores_at.add(t)), largest);
        }
        let largest = S::max_across(largest);
        if largest != running.largest {
            let shrink = S::splat((running.largest - largest).exp());
            running.total = S::mul(running.total, shrink);
            for d in (0..dim).step_by(S::LANES) {
                let p = acc.as_mut_ptr().add(d);
                S::store(p, S::mul(S::load(p), shrink));
            }
            running.largest = largest;
        }
        // A score that is NaN is no largest, but shows in the total and in the result.
        for t in (0..BLOCK_TOKENS).step_by(S::LANES) {
            let p = exp::<S>(S::sub(S::load(scores_at.add(t)), S::splat(largest)));
            S::store(scores_at.add(t), p);
            running.total = S::add(running.total, p);
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

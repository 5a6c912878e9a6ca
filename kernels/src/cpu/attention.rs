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

/// What a query vector carries on from some blocks to the next.
#[derive(Clone, Copy)]
struct Running<F> {
    largest: f32,
    /// Sums of exponentials, a lane each.
    total: F,
}

/// Blocks whose keys and values are converted and taken into the softmax together: what the first-level cache holds. It depends on
/// nothing but the model, or a query's rounding would depend on its company.
const fn blocks_at_once(dim: usize) -> usize {
    match dim {
        0..=64 => 4,
        65..=128 => 2,
        _ => 1,
    }
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
        let (at_once, block_len) = (blocks_at_once(dim), dim * BLOCK_TOKENS);
        let width = at_once * BLOCK_TOKENS;
        // The last group of queries is computed whole; the surplus is thrown away.
        let padded = queries.next_multiple_of(TOGETHER);
        let mut scratch = vec![0.0f32; 2 * padded * dim + 2 * at_once * block_len + padded * width];
        let (q, rest) = scratch.split_at_mut(padded * dim);
        let (acc, rest) = rest.split_at_mut(padded * dim);
        let (keys, rest) = rest.split_at_mut(at_once * block_len);
        let (values, scores) = rest.split_at_mut(at_once * block_len);
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
        let blocks = &span.blocks[..positions.div_ceil(BLOCK_TOKENS)];
        for (j, blocks) in blocks.chunks(at_once).enumerate() {
            for (b, &block) in blocks.iter().enumerate() {
                // In bytes, two a number.
                let from = 2 * kv.at(self.layer, block as usize, self.part.kv_head);
                let to = from + 2 * block_len;
                let part = b * block_len..(b + 1) * block_len;
                // SAFETY: a block's floats are a multiple of every vector.
                unsafe {
                    widen::<S>(&kv.keys[from..to], &mut keys[part.clone()]);
                    widen::<S>(&kv.values[from..to], &mut values[part]);
                }
            }
            for first in (0..queries).step_by(TOGETHER) {
                let scores = &mut scores[first * width..(first + TOGETHER) * width];
                let mut most = 0;
                // SAFETY: `padded` queries have `dim` numbers and `width` scores each; keys and values of `blocks` were converted.
                unsafe {
                    for b in 0..blocks.len() {
                        let keys = &keys[b * block_len..(b + 1) * block_len];
                        score::<S>(
                            &q[first * dim..],
                            dim,
                            keys,
                            scores,
                            width,
                            b * BLOCK_TOKENS,
                        );
                    }
                    for i in 0..TOGETHER {
                        let scores = &mut scores[i * width..(i + 1) * width];
                        let Some(running) = running.get_mut(first + i) else {
                            scores.fill(0.0);
                            continue;
                        };
                        let seen = span.context + self.part.rows.start + (first + i) / group + 1;
                        let valid = seen.saturating_sub(j * width).min(width);
                        let acc = &mut acc[(first + i) * dim..(first + i + 1) * dim];
                        weigh::<S>(running, scores, valid, acc);
                        most = most.max(valid);
                    }
                    let acc = &mut acc[first * dim..(first + TOGETHER) * dim];
                    let mut d = 0;
                    while dim - d >= 2 * S::LANES {
                        add_values::<S, 2>(scores, width, most, values, dim, d, acc);
                        d += 2 * S::LANES;
                    }
                    while d < dim {
                        add_values::<S, 1>(scores, width, most, values, dim, d, acc);
                        d += S::LANES;
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

/// `scores[i, from + t] = q[i] · keys[.., t]` for [`TOGETHER`] queries and a block: eight sums under way hide an addition's latency.
///
/// # Safety
/// As [`Simd`]; `q` has `TOGETHER * dim` floats, `keys` `dim` rows of positions, `scores` `TOGETHER` rows of `width`, where a block
/// follows `from`.
#[inline(always)]
unsafe fn score<S: Simd>(
    q: &[f32],
    dim: usize,
    keys: &[f32],
    scores: &mut [f32],
    width: usize,
    from: usize,
) {
    debug_assert!(q.len() >= TOGETHER * dim && keys.len() == dim * BLOCK_TOKENS);
    debug_assert!(scores.len() >= TOGETHER * width && from + BLOCK_TOKENS <= width);
    // SAFETY: by the contract; a block is one vector or two.
    unsafe {
        let (q, keys) = (q.as_ptr(), keys.as_ptr());
        let scores = scores.as_mut_ptr().add(from);
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
                S::store(scores.add(i * width), S::add(first[i], second[i]));
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
                S::store(scores.add(i * width), first[i]);
                S::store(scores.add(i * width + S::LANES), second[i]);
            }
        }
    }
}

/// Turns one query's scores of the first `valid` positions into weights, and the others into zeros; shrinks what was summed before if
/// a larger score has come.
///
/// # Safety
/// As [`Simd`]; `scores` are whole blocks, `acc` whole vectors.
#[inline(always)]
unsafe fn weigh<S: Simd>(
    running: &mut Running<S::F>,
    scores: &mut [f32],
    valid: usize,
    acc: &mut [f32],
) {
    scores[valid..].fill(f32::NEG_INFINITY);
    // Whole vectors that hold a valid position.
    let end = valid.next_multiple_of(S::LANES);
    // SAFETY: whole vectors within `scores` and `acc`, whose lengths are multiples of sixteen.
    unsafe {
        let scores_at = scores.as_mut_ptr();
        let mut largest = S::splat(running.largest);
        for t in (0..end).step_by(S::LANES) {
            largest = S::max(S::load(scores_at.add(t)), largest);
        }
        let largest = S::max_across(largest);
        if largest != running.largest {
            let shrink = S::splat((running.largest - largest).exp());
            running.total = S::mul(running.total, shrink);
            for d in (0..acc.len()).step_by(S::LANES) {
                let p = acc.as_mut_ptr().add(d);
                S::store(p, S::mul(S::load(p), shrink));
            }
            running.largest = largest;
        }
        // A score that is NaN is no largest, but shows in the total and in the result.
        for t in (0..end).step_by(S::LANES) {
            let p = exp::<S>(S::sub(S::load(scores_at.add(t)), S::splat(largest)));
            S::store(scores_at.add(t), p);
            running.total = S::add(running.total, p);
        }
    }
    scores[valid..].fill(0.0);
}

/// `acc[i, d..] += Σ p[i, t] * values[t, d..]` for [`TOGETHER`] queries, the first `valid` positions and `N` vectors of dimensions.
///
/// # Safety
/// As [`Simd`]; `p` has `TOGETHER` rows of `width`, of which `valid` have values; `d + N * LANES` dimensions exist in `TOGETHER` rows
/// of `acc` and in each of `values`.
#[inline(always)]
unsafe fn add_values<S: Simd, const N: usize>(
    p: &[f32],
    width: usize,
    valid: usize,
    values: &[f32],
    dim: usize,
    d: usize,
    acc: &mut [f32],
) {
    debug_assert!(p.len() >= TOGETHER * width && valid <= width && values.len() >= valid * dim);
    debug_assert!(acc.len() >= TOGETHER * dim && d + N * S::LANES <= dim);
    // SAFETY: by the contract.
    unsafe {
        let (p, values, acc) = (p.as_ptr(), values.as_ptr().add(d), acc.as_mut_ptr().add(d));
        let mut sums = [[S::splat(0.0); N]; TOGETHER];
        for (i, sums) in sums.iter_mut().enumerate() {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(acc.add(i * dim + n * S::LANES));
            }
        }
        for t in 0..valid {
            let mut row = [S::splat(0.0); N];
            for (n, row) in row.iter_mut().enumerate() {
                *row = S::load(values.add(t * dim + n * S::LANES));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let p = S::splat(*p.add(i * width + t));
                for (sum, &row) in sums.iter_mut().zip(&row) {
                    *sum = S::fma(p, row, *sum);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (n, &sum) in sums.iter().enumerate() {
                S::store(acc.add(i * dim + n * S::LANES), sum);
            }
        }
    }
}

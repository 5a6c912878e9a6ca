//! Causal attention over the paged cache, with grouped heads and an online softmax.
//!
//! Blocks become floats a few at a time, whatever the cache's format ([`kv`](super::kv)). Keys come as `[dim, position]`, so that one
//! vector holds a score of each position, values as `[position, dim]`. Each query meets the blocks of its sequence in order, whatever
//! other queries are near.

use std::cell::Cell;

use super::kv::Kv;
use super::simd::{Job, Simd, exp};
use crate::device::{BLOCK_TOKENS, SeqSpan};

/// Query vectors (rows × heads of a group) that share one conversion of a block to floats.
const QUERIES: usize = 32;
/// Query vectors whose scores are computed together, to hide an addition's latency.
const TOGETHER: usize = 4;

thread_local! {
    /// Memory of a part, which would take longer to fill with zeros than a short context to attend to.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
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
        let floats = 2 * padded * dim + 2 * at_once * block_len + padded * width;
        // What the last part left there is overwritten, or belongs to the surplus.
        let mut scratch = SCRATCH.take();
        scratch.resize(floats.max(scratch.len()), 0.0);
        let (q, rest) = scratch[..floats].split_at_mut(padded * dim);
        let (acc, rest) = rest.split_at_mut(padded * dim);
        let (keys, rest) = rest.split_at_mut(at_once * block_len);
        let (values, scores) = rest.split_at_mut(at_once * block_len);
        acc.fill(0.0);
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
        for (i, to) in q.chunks_exact_mut(dim).enumerate().take(queries) {
            // SAFETY: rows and heads were checked against the length of `q`.
            let from = unsafe { std::slice::from_raw_parts(self.q.add(at(i)), head_dim) };
            to[..head_dim]
                .iter_mut()
                .zip(from)
                .for_each(|(to, from)| *to = from * scale);
            to[head_dim..].fill(0.0);
        }
        let positions = span.context + self.part.rows.end;
        let blocks = &span.blocks[..positions.div_ceil(BLOCK_TOKENS)];
        for (j, blocks) in blocks.chunks(at_once).enumerate() {
            for (b, &block) in blocks.iter().enumerate() {
                let (block, head) = (block as usize, self.part.kv_head);
                let part = b * block_len..(b + 1) * block_len;
                // SAFETY: passed on to whoever made the job.
                unsafe {
                    kv.widen_keys::<S>(self.layer, block, head, &mut keys[part.clone()]);
                    kv.widen_values::<S>(self.layer, block, head, &mut values[part]);
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
                let to = std::slice::from_raw_parts_mut(self.out.add(at(i)), head_dim);
                to.iter_mut()
                    .zip(&acc[i * dim..])
                    .for_each(|(to, acc)| *to = acc / total);
            }
        }
        SCRATCH.set(scratch);
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

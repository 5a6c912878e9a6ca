//! The KV cache in each format, and attention over it, on every instruction set of this machine.

mod material;

use half::f16;
use kernels::{BLOCK_TOKENS, Cpu, Device, Isa, KV_GROUP, KvFormat, SeqSpan};
use material::Random;

const LAYER: usize = 1;
/// How far f32 sums over some hundred positions are from exact ones.
const ROUNDING: f64 = 3e-5;

/// A cache filled with several sequences in scattered blocks, and what was put in.
struct Filled {
    kv_heads: usize,
    head_dim: usize,
    kv: kernels::cpu::Kv,
    seqs: Vec<Sequence>,
}

struct Sequence {
    blocks: Vec<u32>,
    /// `[positions, kv_heads, head_dim]`
    keys: Rows,
    values: Rows,
}

/// Rows as they were stored.
struct Rows {
    given: Vec<f32>,
    /// What the format makes of them.
    kept: Vec<f32>,
    /// Most that the two may be apart.
    step: Vec<f32>,
}

impl Rows {
    fn new(format: KvFormat, head_dim: usize, given: Vec<f32>) -> Rows {
        let (mut kept, mut step) = (Vec::new(), Vec::new());
        for group in given
            .chunks(head_dim)
            .flat_map(|head| head.chunks(KV_GROUP))
        {
            match format {
                KvFormat::F16 => {
                    kept.extend(group.iter().map(|&x| f16::from_f32(x).to_f32()));
                    step.extend(group.iter().map(|&x| x.abs() / 2048.0));
                }
                KvFormat::Int8 => {
                    let largest = group.iter().fold(0.0f32, |a, x| a.max(x.abs()));
                    // bf16, away from zero.
                    let bits = (largest / 127.0).to_bits();
                    let scale = f32::from_bits(bits.next_multiple_of(1 << 16));
                    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                    kept.extend(
                        group
                            .iter()
                            .map(|x| (x * inverse).round_ties_even() * scale),
                    );
                    step.extend(group.iter().map(|_| scale * 0.5001));
                }
            }
        }
        Rows { given, kept, step }
    }
}

fn slots(blocks: &[u32], positions: std::ops::Range<usize>) -> Vec<u32> {
    positions
        .map(|t| blocks[t / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (t % BLOCK_TOKENS) as u32)
        .collect()
}

fn filled(
    cpu: &Cpu,
    format: KvFormat,
    kv_heads: usize,
    head_dim: usize,
    lengths: &[usize],
    random: &mut Random,
) -> Filled {
    let need: usize = lengths.iter().map(|n| n.div_ceil(BLOCK_TOKENS)).sum();
    let mut free: Vec<u32> = (0..need as u32 + 3).collect();
    let mut kv = cpu
        .kv_alloc(format, LAYER + 1, kv_heads, head_dim, free.len())
        .unwrap();
    let width = kv_heads * head_dim;
    // What an earlier sequence left must not show, not even NaN.
    let stale = vec![f32::NAN; free.len() * BLOCK_TOKENS * width];
    let all: Vec<u32> = (0..(free.len() * BLOCK_TOKENS) as u32).collect();
    cpu.kv_write(&mut kv, LAYER, &stale, &stale, &all);
    let seqs = lengths
        .iter()
        .map(|&len| {
            let blocks: Vec<u32> = (0..len.div_ceil(BLOCK_TOKENS))
                .map(|_| free.swap_remove(random.below(free.len())))
                .collect();
            let mut rows = || Rows::new(format, head_dim, random.activations(len * width));
            let (keys, values) = (rows(), rows());
            let slots = slots(&blocks, 0..len);
            cpu.kv_write(&mut kv, LAYER, &keys.given, &values.given, &slots);
            Sequence {
                blocks,
                keys,
                values,
            }
        })
        .collect();
    Filled {
        kv_heads,
        head_dim,
        kv,
        seqs,
    }
}

/// Scores, and what they make of the values.
struct Attended {
    weights: Vec<f64>,
    out: Vec<f64>,
}

impl Filled {
    fn head<'a>(&self, rows: &'a [f32], t: usize, kv_head: usize) -> &'a [f32] {
        let at = (t * self.kv_heads + kv_head) * self.head_dim;
        &rows[at..at + self.head_dim]
    }

    /// Attention of one query over the first `seen` positions of keys and values, in f64.
    fn exact(
        &self,
        (keys, values): (&[f32], &[f32]),
        kv_head: usize,
        q: &[f32],
        seen: usize,
    ) -> Attended {
        let scores: Vec<f64> = (0..seen)
            .map(|t| {
                let products = q
                    .iter()
                    .zip(self.head(keys, t, kv_head))
                    .map(|(&q, &k)| f64::from(q) * f64::from(k));
                products.sum::<f64>() / (self.head_dim as f64).sqrt()
            })
            .collect();
        let largest = scores.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp() / total).collect();
        let out = (0..self.head_dim)
            .map(|d| {
                let value = |t| f64::from(self.head(values, t, kv_head)[d]);
                weights.iter().enumerate().map(|(t, w)| w * value(t)).sum()
            })
            .collect();
        Attended { weights, out }
    }

    /// How far the format can move each result away from that of the numbers that were given. A score moves by at most e, the sum
    /// of |q|·step; so each weight by a factor of at most exp(2e), and each value by its step.
    fn bound(&self, seq: &Sequence, kv_head: usize, q: &[f32], of_given: &Attended) -> Vec<f64> {
        let seen = of_given.weights.len();
        let moved = |t: usize| {
            let steps = self.head(&seq.keys.step, t, kv_head);
            let moves = q.iter().zip(steps).map(|(q, s)| f64::from(q.abs() * s));
            moves.sum::<f64>() / (self.head_dim as f64).sqrt()
        };
        let factor = (2.0 * (0..seen).map(moved).fold(0.0, f64::max)).exp();
        (0..self.head_dim)
            .map(|d| {
                let terms = of_given.weights.iter().enumerate().map(|(t, w)| {
                    let value = f64::from(self.head(&seq.values.given, t, kv_head)[d].abs());
                    let step = f64::from(self.head(&seq.values.step, t, kv_head)[d]);
                    w * ((factor - 1.0) * value + factor * step)
                });
                terms.sum::<f64>()
            })
            .collect()
    }
}

#[test]
fn attention_agrees_with_the_naive_form_for_prefill_and_decode_mixed() {
    let mut random = Random(4);
    for format in KvFormat::ALL {
        // Of the results that the given numbers have, and of how far those of the format are from them.
        let (mut size, mut apart) = (0.0, 0.0);
        for isa in Isa::available() {
            let cpu = Cpu::new(2, isa);
            for (heads, kv_heads, head_dim) in [(9, 3, 64), (8, 1, 128), (4, 4, 24), (2, 1, 80)] {
                // (positions before, rows of this step)
                let spans = [(0, 37), (15, 1), (16, 1), (63, 20), (0, 1), (100, 1)];
                let lengths: Vec<usize> =
                    spans.iter().map(|(context, rows)| context + rows).collect();
                let filled = filled(&cpu, format, kv_heads, head_dim, &lengths, &mut random);
                let rows: usize = spans.iter().map(|s| s.1).sum();
                let q = random.floats(rows * heads * head_dim);
                let mut first_row = 0;
                let seqs: Vec<SeqSpan> = spans
                    .iter()
                    .zip(&filled.seqs)
                    .map(|(&(context, rows), seq)| {
                        first_row += rows;
                        SeqSpan {
                            first_row: first_row - rows,
                            rows,
                            context,
                            blocks: &seq.blocks,
                        }
                    })
                    .collect();
                let mut out = vec![f32::NAN; q.len()];
                cpu.attention(&q, &filled.kv, LAYER, heads, &seqs, &mut out);
                for (s, seq) in seqs.iter().zip(&filled.seqs) {
                    for (row, head) in (0..s.rows).flat_map(|r| (0..heads).map(move |h| (r, h))) {
                        let at = ((s.first_row + row) * heads + head) * head_dim;
                        let (q, got) = (&q[at..at + head_dim], &out[at..at + head_dim]);
                        let (kv_head, seen) = (head / (heads / kv_heads), s.context + row + 1);
                        let kept = (&seq.keys.kept[..], &seq.values.kept[..]);
                        let given = (&seq.keys.given[..], &seq.values.given[..]);
                        let of_kept = filled.exact(kept, kv_head, q, seen);
                        let of_given = filled.exact(given, kv_head, q, seen);
                        let bound = filled.bound(seq, kv_head, q, &of_given);
                        for d in 0..head_dim {
                            let (got, kept, given) =
                                (f64::from(got[d]), of_kept.out[d], of_given.out[d]);
                            let rounding = ROUNDING * kept.abs().max(1.0);
                            let what = format!(
                                "{isa} {format} {heads}/{kv_heads}x{head_dim} context {} row {row}",
                                s.context
                            );
                            assert!(
                                (got - kept).abs() <= rounding,
                                "{what}: got {got}, the cache holds {kept}"
                            );
                            assert!(
                                (got - given).abs() <= bound[d] + rounding,
                                "{what}: got {got}, exact {given}, bound {}",
                                bound[d]
                            );
                            size += given * given;
                            apart += (got - given).powi(2);
                        }
                    }
                }
                // The same rows one at a time, and on other threads, bit for bit.
                let alone = Cpu::new(1, isa);
                for s in &seqs {
                    for row in [0, s.rows / 2, s.rows - 1] {
                        let at = (s.first_row + row) * heads * head_dim
                            ..(s.first_row + row + 1) * heads * head_dim;
                        let span = SeqSpan {
                            first_row: 0,
                            rows: 1,
                            context: s.context + row,
                            blocks: s.blocks,
                        };
                        let mut one = vec![0.0; heads * head_dim];
                        alone.attention(
                            &q[at.clone()].to_vec(),
                            &filled.kv,
                            LAYER,
                            heads,
                            &[span],
                            &mut one,
                        );
                        assert_eq!(one, out[at], "{isa} {heads}/{kv_heads}x{head_dim}");
                    }
                }
            }
        }
        let apart = (apart / size).sqrt();
        println!("{format}: {apart:.5} of the results' size apart");
        let most = match format {
            KvFormat::F16 => 5e-4,
            KvFormat::Int8 => 3e-2,
        };
        assert!(
            apart < most,
            "{format} is {apart} of the results' size apart"
        );
    }
}

#[test]
fn what_is_kept_of_a_position_does_not_depend_on_what_is_written_with_it() {
    const HEADS: usize = 6;
    const KV_HEADS: usize = 3;
    const DIM: usize = 72;
    const LEN: usize = 150;
    let mut random = Random(5);
    for (format, isa) in KvFormat::ALL
        .into_iter()
        .flat_map(|f| Isa::available().into_iter().map(move |isa| (f, isa)))
    {
        let width = KV_HEADS * DIM;
        let (k, v) = (
            random.activations(LEN * width),
            random.activations(LEN * width),
        );
        let q = random.floats(HEADS * DIM);
        let blocks: Vec<u32> = (0..LEN.div_ceil(BLOCK_TOKENS) as u32).rev().collect();
        let written = |threads: usize, at_once: usize| {
            let cpu = Cpu::new(threads, isa);
            let mut kv = cpu
                .kv_alloc(format, LAYER + 1, KV_HEADS, DIM, blocks.len())
                .unwrap();
            for first in (0..LEN).step_by(at_once) {
                let positions = first..(first + at_once).min(LEN);
                let part = positions.start * width..positions.end * width;
                let (k, v) = (k[part.clone()].to_vec(), v[part].to_vec());
                cpu.kv_write(&mut kv, LAYER, &k, &v, &slots(&blocks, positions));
            }
            let span = SeqSpan {
                first_row: 0,
                rows: 1,
                context: LEN - 1,
                blocks: &blocks,
            };
            let mut out = vec![0.0; q.len()];
            cpu.attention(&q, &kv, LAYER, HEADS, &[span], &mut out);
            out
        };
        let one_by_one = written(1, 1);
        assert_eq!(written(3, LEN), one_by_one, "{isa} {format}, as one prompt");
        assert_eq!(written(2, 67), one_by_one, "{isa} {format}, in chunks");
    }
}

/// Attention of each of `k`'s positions as if it were decoded, with queries of `q`, one head of 64.
fn rows(cpu: &Cpu, format: KvFormat, q: f32, k: &[f32], v: &[f32]) -> Vec<f32> {
    let len = k.len() / 64;
    let blocks: Vec<u32> = (0..len.div_ceil(BLOCK_TOKENS) as u32).collect();
    let mut kv = cpu.kv_alloc(format, 1, 1, 64, blocks.len()).unwrap();
    cpu.kv_write(
        &mut kv,
        0,
        &k.to_vec(),
        &v.to_vec(),
        &slots(&blocks, 0..len),
    );
    let seqs: Vec<SeqSpan> = (0..len)
        .map(|t| SeqSpan {
            first_row: t,
            rows: 1,
            context: t,
            blocks: &blocks,
        })
        .collect();
    let mut out = vec![0.0; len * 64];
    cpu.attention(&vec![q; len * 64], &kv, 0, 1, &seqs, &mut out);
    out
}

#[test]
fn attention_holds_where_exponentials_would_overflow() {
    for (isa, format) in Isa::available()
        .into_iter()
        .flat_map(|isa| KvFormat::ALL.map(|f| (isa, f)))
    {
        let cpu = Cpu::new(1, isa);
        // Scores rise to 80,000 from block to block; the last position takes all.
        let k: Vec<f32> = (0..64).flat_map(|t| vec![t as f32 * 10.0; 64]).collect();
        let v: Vec<f32> = (0..64).flat_map(|t| vec![t as f32; 64]).collect();
        for (q, expected) in [(16.0, 63.0), (-16.0, 0.0)] {
            let out = rows(&cpu, format, q, &k, &v);
            let last = &out[63 * 64..];
            assert!(
                last.iter().all(|&x| (x - expected).abs() < 0.5),
                "{isa} {format} {last:?}"
            );
        }
    }
}

#[test]
fn what_is_not_finite_shows_in_every_row_that_sees_it_and_in_none_before() {
    let mut random = Random(6);
    for (isa, format) in Isa::available()
        .into_iter()
        .flat_map(|isa| KvFormat::ALL.map(|f| (isa, f)))
    {
        let cpu = Cpu::new(1, isa);
        let (k, v) = (random.floats(70 * 64), random.floats(70 * 64));
        let good = rows(&cpu, format, 0.5, &k, &v);
        assert!(good.iter().all(|x| x.is_finite()));
        // In f16 an infinite key may make its position weigh nothing.
        let all = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        let bad = if format == KvFormat::F16 {
            &all[..1]
        } else {
            &all
        };
        for (&bad, in_keys) in bad.iter().flat_map(|b| [(b, true), (b, false)]) {
            for (position, d) in [(0, 0), (33, 63), (48, 31), (69, 40)] {
                let (mut k, mut v) = (k.clone(), v.clone());
                let spoiled = if in_keys { &mut k } else { &mut v };
                spoiled[position * 64 + d] = bad;
                let out = rows(&cpu, format, 0.5, &k, &v);
                let what = format!("{isa} {format}: {bad} at {position}, {d}");
                assert!(out[..position * 64] == good[..position * 64], "{what}");
                for row in out[position * 64..].chunks(64) {
                    assert!(row[d].is_nan(), "{what}: {row:?}");
                    assert!(!in_keys || row.iter().all(|x| x.is_nan()), "{what}");
                }
            }
        }
        assert!(
            rows(&cpu, format, 0.5, &k, &v) == good,
            "{isa} {format}: what was left in memory shows"
        );
    }
}

#[test]
fn int8_keeps_what_is_far_smaller_or_larger_than_f16_can_hold() {
    for isa in Isa::available() {
        let cpu = Cpu::new(1, isa);
        for size in [1e-25f32, 1e-9, 3e5, 1e30] {
            // All positions weigh the same, and so do the values that each dimension has in them.
            let k = vec![0.0; 20 * 64];
            let v: Vec<f32> = (0..20 * 64)
                .map(|i| size * (i % 64) as f32 / 63.0)
                .collect();
            let out = rows(&cpu, KvFormat::Int8, 1.0, &k, &v);
            for (&got, &given) in out.iter().zip(&v) {
                assert!(
                    (got - given).abs() <= size / 250.0,
                    "{isa}: {got} for {given}"
                );
            }
        }
        let zeros = vec![0.0; 20 * 64];
        let tiny = vec![1e-40; 20 * 64];
        for v in [&zeros, &tiny] {
            let out = rows(&cpu, KvFormat::Int8, 1.0, &zeros, v);
            assert!(out.iter().all(|&x| x == 0.0), "{isa}");
        }
    }
}

#[test]
fn a_cache_takes_what_its_format_says_and_one_too_large_for_any_machine_is_an_error() {
    let cpu = Cpu::new(1, Isa::Scalar);
    assert!(cpu.alloc(usize::MAX / 2).is_err());
    for format in KvFormat::ALL {
        assert!(cpu.kv_alloc(format, 80, 8, 128, usize::MAX / 1000).is_err());
        for (head_dim, padded, groups) in [(64, 64, 2), (128, 128, 4), (24, 32, 1), (80, 80, 3)] {
            let kv = cpu.kv_alloc(format, 2, 3, head_dim, 10).unwrap();
            let position_bytes = match format {
                KvFormat::F16 => 2 * padded,
                KvFormat::Int8 => padded + 2 * groups,
            };
            let parts = 2 * 2 * 3 * 10;
            assert_eq!(cpu.kv_bytes(&kv), parts * position_bytes * BLOCK_TOKENS);
            assert_eq!(
                format.head_block_bytes(head_dim),
                2 * position_bytes * BLOCK_TOKENS
            );
        }
        assert_eq!(format.name().parse(), Ok(format));
        assert_eq!(format.to_string(), format.name());
    }
    assert!(
        "f32"
            .parse::<KvFormat>()
            .unwrap_err()
            .contains("f16 or int8")
    );
}

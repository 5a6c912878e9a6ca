//! The operations of a layer other than matrix products, on every instruction set of this machine.

mod material;

use kernels::{BLOCK_TOKENS, Cpu, Device, Isa, Rope, SeqSpan};
use material::*;

fn close(got: &[f32], exact: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), exact.len());
    for (i, (&g, &e)) in got.iter().zip(exact).enumerate() {
        assert!(
            (f64::from(g) - e).abs() <= tolerance * e.abs().max(1.0),
            "{what}, {i}: got {g}, exact {e}"
        );
    }
}

#[test]
fn rms_norm_is_what_it_says() {
    let mut random = Random(1);
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        for width in [1, 7, 8, 40, 576] {
            for rows in [1, 3, 70] {
                let (x, weight) = (random.activations(rows * width), random.floats(width));
                let mut out = vec![0.0; rows * width];
                cpu.rms_norm(&x, &weight, rows, 1e-5, &mut out);
                for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / width as f64;
                    let exact: Vec<f64> = x
                        .iter()
                        .zip(&weight)
                        .map(|(&v, &w)| f64::from(v) / (mean + 1e-5).sqrt() * f64::from(w))
                        .collect();
                    close(out, &exact, 2e-6, &format!("{isa} {width}"));
                }
            }
        }
    }
}

#[test]
fn silu_gate_and_add_sum_are_what_they_say_at_any_length() {
    let mut random = Random(2);
    for isa in Isa::available() {
        let cpu = Cpu::new(3, isa);
        for len in [0, 1, 15, 16, 17, 1536, 100_003] {
            let mut x = random.activations(len);
            if len > 8 {
                x[..6].copy_from_slice(&[-200.0, -88.0, -1e-40, 0.0, 88.0, 200.0]);
            }
            let up = random.floats(len);
            let more: Vec<f64> = up.iter().map(|&u| f64::from(u) * 1.000_000_01).collect();
            let (mut gate, mut sum) = (x.clone(), x.clone());
            cpu.silu_gate(&mut gate, &up, len);
            cpu.add_sum(&mut sum, &more);
            let silu = |v: f32| f64::from(v) / (1.0 + (-f64::from(v)).exp());
            let exact: Vec<f64> = x
                .iter()
                .zip(&up)
                .map(|(&x, &u)| silu(x) * f64::from(u))
                .collect();
            close(&gate, &exact, 1e-6, &format!("{isa} {len}"));
            assert!(
                sum.iter()
                    .zip(x.iter().zip(&more))
                    .all(|(s, (x, &m))| *s == x + m as f32)
            );
        }
        let mut nan = vec![f32::NAN; 3];
        cpu.silu_gate(&mut nan, &vec![1.0; 3], 3);
        assert!(nan.iter().all(|x| x.is_nan()), "{isa}");
    }
}

#[test]
fn rope_turns_each_pair_by_its_angle() {
    let mut random = Random(3);
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        for interleaved in [false, true] {
            let rope = Rope {
                head_dim: 64,
                inv_freq: (0..32)
                    .map(|i| 500_000f32.powf(-(i as f32) / 32.0))
                    .collect(),
                interleaved,
            };
            let (rows, heads) = (5, 3);
            let positions = [0, 1, 17, 8191, 131_071];
            let x = random.activations(rows * heads * 64);
            let mut out = x.clone();
            cpu.rope(&mut out, rows, heads, &positions, &rope);
            assert_eq!(
                out[..heads * 64],
                x[..heads * 64],
                "position 0 turns nothing"
            );
            for (row, &position) in positions.iter().enumerate() {
                for head in 0..heads {
                    let at = (row * heads + head) * 64;
                    for i in 0..32 {
                        let (a, b) = if interleaved {
                            (2 * i, 2 * i + 1)
                        } else {
                            (i, i + 32)
                        };
                        let (p, q) = (f64::from(x[at + a]), f64::from(x[at + b]));
                        let angle = f64::from(position as f32 * rope.inv_freq[i]);
                        let exact = [
                            p * angle.cos() - q * angle.sin(),
                            p * angle.sin() + q * angle.cos(),
                        ];
                        close(
                            &[out[at + a], out[at + b]],
                            &exact,
                            1e-5,
                            &format!("{isa} {position}"),
                        );
                    }
                }
            }
            // Another set of positions, and then the first again: no stale angles.
            let (mut again, mut other) = (x.clone(), x.clone());
            cpu.rope(&mut other, rows, heads, &[3, 3, 3, 3, 3], &rope);
            cpu.rope(&mut again, rows, heads, &positions, &rope);
            assert_eq!(again, out);
            assert_ne!(other, out);
        }
    }
}

/// A cache filled with several sequences in scattered blocks, and what was put in.
struct Filled {
    kv_heads: usize,
    head_dim: usize,
    layers: usize,
    kv: kernels::cpu::Kv,
    /// Each sequence's blocks, keys and values.
    seqs: Vec<(Vec<u32>, Vec<f32>, Vec<f32>)>,
}

const LAYER: usize = 1;

fn filled(
    cpu: &Cpu,
    kv_heads: usize,
    head_dim: usize,
    lengths: &[usize],
    random: &mut Random,
) -> Filled {
    let need: usize = lengths.iter().map(|n| n.div_ceil(BLOCK_TOKENS)).sum();
    let mut free: Vec<u32> = (0..need as u32 + 3).collect();
    let mut kv = cpu.kv_alloc(2, kv_heads, head_dim, free.len()).unwrap();
    let width = kv_heads * head_dim;
    // What an earlier sequence left must not show, not even NaN.
    let stale = vec![f32::NAN; free.len() * BLOCK_TOKENS * width];
    let slots: Vec<u32> = (0..(free.len() * BLOCK_TOKENS) as u32).collect();
    cpu.kv_write(&mut kv, LAYER, &stale, &stale, &slots);
    let seqs = lengths
        .iter()
        .map(|&len| {
            let blocks: Vec<u32> = (0..len.div_ceil(BLOCK_TOKENS))
                .map(|_| free.swap_remove(random.below(free.len())))
                .collect();
            let (k, v) = (
                random.activations(len * width),
                random.activations(len * width),
            );
            let slots: Vec<u32> = (0..len)
                .map(|t| blocks[t / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (t % BLOCK_TOKENS) as u32)
                .collect();
            cpu.kv_write(&mut kv, LAYER, &k, &v, &slots);
            (blocks, k, v)
        })
        .collect();
    Filled {
        kv_heads,
        head_dim,
        layers: 2,
        kv,
        seqs,
    }
}

impl Filled {
    /// Attention of one query over the first `seen` positions of a sequence, in f64.
    fn exact(&self, seq: usize, kv_head: usize, q: &[f32], seen: usize) -> Vec<f64> {
        let (_, k, v) = &self.seqs[seq];
        let at = |t: usize| (t * self.kv_heads + kv_head) * self.head_dim;
        let half = |x: f32| f64::from(half::f16::from_f32(x).to_f32());
        let scores: Vec<f64> = (0..seen)
            .map(|t| {
                q.iter()
                    .zip(&k[at(t)..])
                    .map(|(&q, &k)| f64::from(q) * half(k))
                    .sum::<f64>()
            })
            .map(|s| s / (self.head_dim as f64).sqrt())
            .collect();
        let largest = scores.iter().copied().fold(f64::MIN, f64::max);
        let total: f64 = scores.iter().map(|s| (s - largest).exp()).sum();
        (0..self.head_dim)
            .map(|d| {
                scores
                    .iter()
                    .enumerate()
                    .map(|(t, s)| (s - largest).exp() / total * half(v[at(t) + d]))
                    .sum()
            })
            .collect()
    }
}

#[test]
fn attention_agrees_with_the_naive_form_for_prefill_and_decode_mixed() {
    let mut random = Random(4);
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        for (heads, kv_heads, head_dim) in [(9, 3, 64), (8, 1, 128), (4, 4, 24), (2, 1, 80)] {
            // (positions before, rows of this step)
            let spans = [(0, 37), (15, 1), (16, 1), (63, 20), (0, 1), (100, 1)];
            let lengths: Vec<usize> = spans.iter().map(|(context, rows)| context + rows).collect();
            let filled = filled(&cpu, kv_heads, head_dim, &lengths, &mut random);
            assert_eq!(filled.layers, 2);
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
                        blocks: &seq.0,
                    }
                })
                .collect();
            let mut out = vec![f32::NAN; q.len()];
            cpu.attention(&q, &filled.kv, LAYER, heads, &seqs, &mut out);
            for (i, s) in seqs.iter().enumerate() {
                for row in 0..s.rows {
                    for head in 0..heads {
                        let at = ((s.first_row + row) * heads + head) * head_dim;
                        let kv_head = head / (heads / kv_heads);
                        let exact =
                            filled.exact(i, kv_head, &q[at..at + head_dim], s.context + row + 1);
                        close(
                            &out[at..at + head_dim],
                            &exact,
                            3e-5,
                            &format!("{isa} span {i} row {row} head {head}"),
                        );
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
}

#[test]
fn attention_holds_where_exponentials_would_overflow() {
    for isa in Isa::available() {
        let cpu = Cpu::new(1, isa);
        let mut kv = cpu.kv_alloc(1, 1, 16, 4).unwrap();
        // Scores rise to 40,000 from block to block; the last position takes all.
        let k: Vec<f32> = (0..64).flat_map(|t| vec![t as f32 * 10.0; 16]).collect();
        let v: Vec<f32> = (0..64).flat_map(|t| vec![t as f32; 16]).collect();
        cpu.kv_write(&mut kv, 0, &k, &v, &(0..64).collect::<Vec<_>>());
        let mut out = vec![0.0; 16];
        for (sign, expected) in [(16.0, 63.0), (-16.0, 0.0)] {
            let span = SeqSpan {
                first_row: 0,
                rows: 1,
                context: 63,
                blocks: &[0, 1, 2, 3],
            };
            cpu.attention(&vec![sign; 16], &kv, 0, 1, &[span], &mut out);
            assert!(
                out.iter().all(|&x| (x - expected).abs() < 1e-5),
                "{isa} {out:?}"
            );
        }
    }
}

#[test]
fn a_cache_too_large_for_any_machine_is_an_error() {
    let cpu = Cpu::new(1, Isa::Scalar);
    assert!(cpu.kv_alloc(80, 8, 128, usize::MAX / 1000).is_err());
    assert!(cpu.alloc(usize::MAX / 2).is_err());
    let kv = cpu.kv_alloc(2, 3, 64, 10).unwrap();
    assert_eq!(cpu.kv_bytes(&kv), 2 * 2 * 3 * 64 * 10 * BLOCK_TOKENS * 2);
}

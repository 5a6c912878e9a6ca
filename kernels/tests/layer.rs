//! The operations of a layer other than matrix products and attention, on every instruction set of this machine.

mod material;

use kernels::{Cpu, Device, Isa, Rope};
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

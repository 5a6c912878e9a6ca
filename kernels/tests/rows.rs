//! What works on whole rows: candidates, log-sum-exp, the encoder's functions, the thread pool behind them.

mod material;

use kernels::encoder::{add_bias, attention, gelu, layer_norm};
use kernels::{Cpu, Device, Isa, log_sum_exp, measure, top_candidates};
use material::*;
use proptest::prelude::*;

proptest! {
    #[test]
    fn candidates_are_the_head_of_a_full_sort(
        logits in proptest::collection::vec(prop_oneof![4 => -5i32..5, 1 => -1000i32..1000], 0..700),
        k in 0usize..300,
    ) {
        let logits: Vec<f32> = logits.into_iter().map(|x| x as f32 / 4.0).collect();
        let mut sorted: Vec<(u32, f32)> = logits.iter().enumerate().map(|(i, &x)| (i as u32, x)).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        sorted.truncate(k);
        prop_assert_eq!(top_candidates(&logits, k), sorted);
    }

    #[test]
    fn log_sum_exp_moves_with_its_logits(logits in proptest::collection::vec(-50f32..50.0, 1..200), shift in -100f32..100.0) {
        let exact = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        prop_assert!((f64::from(log_sum_exp(&logits)) - exact).abs() < 1e-4);
        let shifted: Vec<f32> = logits.iter().map(|x| x + shift).collect();
        prop_assert!((log_sum_exp(&shifted) - log_sum_exp(&logits) - shift).abs() < 1e-3);
    }
}

#[test]
fn nan_is_no_candidate_and_shows_in_the_sum() {
    let logits = [1.0, f32::NAN, f32::NEG_INFINITY, 3.0];
    assert_eq!(
        top_candidates(&logits, 4),
        [(3, 3.0), (0, 1.0), (2, f32::NEG_INFINITY)]
    );
    assert!(log_sum_exp(&logits).is_nan());
    assert_eq!(log_sum_exp(&[]), f32::NEG_INFINITY);
}

#[test]
fn layer_norm_gelu_and_bias_are_what_they_say() {
    let mut random = Random(1);
    let (rows, width) = (3, 384);
    let x: Vec<f32> = random
        .activations(rows * width)
        .iter()
        .map(|x| x + 5.0)
        .collect();
    let (weight, bias) = (random.floats(width), random.floats(width));
    let mut out = vec![0.0; x.len()];
    layer_norm(&x, &weight, &bias, 1e-12, &mut out);
    for (x, out) in x.chunks(width).zip(out.chunks(width)) {
        let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / width as f64;
        let variance = x
            .iter()
            .map(|&v| (f64::from(v) - mean).powi(2))
            .sum::<f64>()
            / width as f64;
        for i in 0..width {
            let exact = (f64::from(x[i]) - mean) / variance.sqrt() * f64::from(weight[i])
                + f64::from(bias[i]);
            assert!((f64::from(out[i]) - exact).abs() < 2e-5);
        }
    }
    // Reference values of x · Φ(x).
    let mut y = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 30.0];
    gelu(&mut y);
    let exact = [
        -0.004_049_694,
        -0.158_655_25,
        -0.154_268_77,
        0.0,
        0.345_731_23,
        0.841_344_8,
        2.995_950_3,
        30.0,
    ];
    assert!(
        y.iter().zip(exact).all(|(y, e)| (y - e).abs() < 1e-6),
        "{y:?}"
    );
    let mut z = vec![1.0, 2.0, 3.0, 4.0];
    add_bias(&mut z, &[10.0, 20.0]);
    assert_eq!(z, [11.0, 22.0, 13.0, 24.0]);
}

#[test]
fn the_encoders_attention_reads_every_key_that_is_not_masked() {
    let mut random = Random(2);
    for (rows, heads, dim) in [(1, 1, 32), (13, 3, 32), (20, 2, 20)] {
        let width = heads * dim;
        let [q, k, mut v] = std::array::from_fn(|_| random.floats(rows * width));
        let mask: Vec<bool> = (0..rows).map(|t| t == 0 || t % 4 != 3).collect();
        // What is masked must not even be read.
        for t in (0..rows).filter(|&t| !mask[t]) {
            v[t * width..(t + 1) * width].fill(f32::NAN);
        }
        let mut out = vec![f32::NAN; rows * width];
        attention(&q, &k, &v, heads, dim, &mask, &mut out);
        for row in 0..rows {
            for head in 0..heads {
                let at = |t: usize| t * width + head * dim;
                let keys: Vec<usize> = (0..rows).filter(|&t| mask[t]).collect();
                let score = |t: usize| {
                    (0..dim)
                        .map(|d| f64::from(q[at(row) + d] * k[at(t) + d]))
                        .sum::<f64>()
                };
                let weights: Vec<f64> = keys
                    .iter()
                    .map(|&t| (score(t) / (dim as f64).sqrt()).exp())
                    .collect();
                let total: f64 = weights.iter().sum();
                for d in 0..dim {
                    let sum: f64 = keys
                        .iter()
                        .zip(&weights)
                        .map(|(&t, w)| w / total * f64::from(v[at(t) + d]))
                        .sum();
                    assert!((f64::from(out[at(row) + d]) - sum).abs() < 1e-5);
                }
            }
        }
        attention(&q, &k, &v, heads, dim, &vec![false; rows], &mut out);
        assert!(out.iter().all(|&x| x == 0.0));
    }
}

#[test]
fn one_processor_serves_many_callers_at_once() {
    let mut random = Random(3);
    let cpu = Cpu::new(3, Isa::detect());
    let w = Stored::random(kernels::Format::Q8_0, 512, 512, Scales::Usual, &mut random);
    let packed = cpu.pack(w.view()).unwrap();
    let x = random.activations(8 * 512);
    let mut expected = vec![0.0; 8 * 512];
    cpu.matmul(&[&packed], &x, 8, &mut [&mut expected]);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let mut out = vec![0.0; 8 * 512];
                    cpu.matmul(&[&packed], &x, 8, &mut [&mut out]);
                    assert_eq!(out, expected);
                }
            });
        }
    });
}

#[test]
fn the_machines_limits_are_plausible() {
    for threads in [1, 2] {
        let (read, peak) = (
            measure::read_bandwidth(threads),
            measure::int8_peak(threads),
        );
        assert!(read.is_finite() && read > 1e6, "{read}");
        assert!(peak.is_finite() && peak > 1e6, "{peak}");
    }
}

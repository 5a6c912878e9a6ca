//! What works on whole rows: candidates, the encoder's functions, the thread pool behind them.

mod material;

use kernels::encoder::{add_bias, attention, gelu, layer_norm};
use kernels::{Allowed, Cpu, Device, Head, Isa, measure};
use material::*;
use proptest::prelude::*;

fn heads(
    isa: Isa,
    logits: &[f32],
    width: usize,
    allowed: &[Option<Allowed<'_>>],
    k: usize,
) -> Vec<Head> {
    Cpu::new(2, isa).heads(&logits.to_vec(), width, allowed, k)
}

fn sorted(mut pairs: Vec<(u32, f32)>, k: usize) -> Vec<(u32, f32)> {
    pairs.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    pairs.truncate(k);
    pairs
}

fn numbered(logits: &[f32]) -> Vec<(u32, f32)> {
    (0..).zip(logits.iter().copied()).collect()
}

proptest! {
    #[test]
    fn candidates_are_the_head_of_a_full_sort(
        logits in proptest::collection::vec(prop_oneof![4 => -5i32..5, 1 => -1000i32..1000], 1..700),
        k in 0usize..300,
        words in proptest::collection::vec(prop_oneof![Just(0), Just(u32::MAX), any::<u32>()], 0..30),
        first in 0usize..200,
    ) {
        let logits: Vec<f32> = logits.into_iter().map(|x| x as f32 / 4.0).collect();
        let allowed = Allowed { words: &words, first };
        let bit = |token: usize| words.get(token / 32).is_some_and(|w| w >> (token % 32) & 1 == 1);
        let some: Vec<(u32, f32)> = numbered(&logits).into_iter().filter(|(i, _)| bit(first + *i as usize)).collect();
        for isa in Isa::available() {
            let rows = [logits.clone(), logits.clone()].concat();
            let heads = heads(isa, &rows, logits.len(), &[None, Some(allowed)], k);
            prop_assert_eq!(&heads[0].top, &sorted(numbered(&logits), k));
            prop_assert_eq!(&heads[1].top, &sorted(some.clone(), k));
            prop_assert_eq!(heads[0].exp_sum.to_bits(), heads[1].exp_sum.to_bits());
            let largest = logits.iter().copied().fold(f32::MIN, f32::max);
            let exact: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
            prop_assert_eq!(heads[0].largest, largest);
            prop_assert!((heads[0].exp_sum / exact - 1.0).abs() < 1e-6, "{} {exact}", heads[0].exp_sum);
        }
    }
}

#[test]
fn a_vocabulary_of_many_parts_has_one_head_in_any_company() {
    let mut random = Random(5);
    let width = 50_000;
    let rows: Vec<Vec<f32>> = (0..3).map(|_| random.activations(width)).collect();
    for isa in Isa::available() {
        let together = heads(isa, &rows.concat(), width, &[None; 3], 256);
        for (row, head) in rows.iter().zip(&together) {
            assert_eq!(head.top, sorted(numbered(row), 256));
            assert_eq!(*head, heads(isa, row, width, &[None], 256)[0]);
        }
    }
}

#[test]
fn what_is_not_finite_is_told() {
    let (nan, low, high) = (f32::NAN, f32::NEG_INFINITY, f32::INFINITY);
    for isa in Isa::available() {
        let head = |logits: &[f32]| heads(isa, logits, logits.len(), &[None], 4).remove(0);
        let some = head(&[1.0, nan, low, 3.0]);
        assert_eq!(some.top, [(3, 3.0), (0, 1.0), (2, low)]);
        assert!(some.largest == 3.0 && some.exp_sum.is_nan());
        for at in [0, 20, 39_999] {
            let mut logits = vec![low; 40_000];
            assert_eq!(head(&logits).largest, low);
            logits[at] = 2.0;
            assert!(
                (head(&logits).exp_sum - 1.0).abs() < 1e-5,
                "parts without a number add nothing"
            );
            for bad in [nan, high] {
                logits[at] = bad;
                let head = head(&logits);
                assert!(!head.exp_sum.is_finite() || !head.largest.is_finite());
            }
        }
    }
    let words = [u32::MAX];
    let allowed = [Some(Allowed {
        words: &words,
        first: 0,
    })];
    let masked = heads(Isa::detect(), &[low, 1.0, low], 3, &allowed, 4);
    assert_eq!(
        masked[0].top,
        [(1, 1.0)],
        "a forbidden logit is no candidate"
    );
}

#[test]
fn layer_norm_is_what_it_says_at_any_width() {
    let mut random = Random(1);
    let rows = 3;
    for width in [1, 7, 24, 384] {
        let x: Vec<f32> = random
            .activations(rows * width)
            .iter()
            .map(|x| x + 5.0)
            .collect();
        let (weight, bias) = (random.floats(width), random.floats(width));
        let mut out = vec![f32::NAN; x.len()];
        layer_norm(&x, &weight, &bias, 1e-3, &mut out);
        for (x, out) in x.chunks(width).zip(out.chunks(width)) {
            let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / width as f64;
            let variance = x
                .iter()
                .map(|&v| (f64::from(v) - mean).powi(2))
                .sum::<f64>()
                / width as f64;
            for i in 0..width {
                let exact = (f64::from(x[i]) - mean) / (variance + 1e-3).sqrt()
                    * f64::from(weight[i])
                    + f64::from(bias[i]);
                assert!(
                    (f64::from(out[i]) - exact).abs() < 2e-5,
                    "{width}, {i}: {} {exact}",
                    out[i]
                );
            }
        }
    }
}

/// `erfc(a)` for `a ≥ 0`: the power series of erf near zero, the continued fraction beyond.
fn erfc(a: f64) -> f64 {
    if a < 2.5 {
        let (mut term, mut sum) = (a, a);
        for n in 1..100 {
            term *= -a * a / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return 1.0 - 2.0 / std::f64::consts::PI.sqrt() * sum;
    }
    let fraction = (1..200)
        .rev()
        .fold(a, |rest, n| a + f64::from(n) / 2.0 / rest);
    (-a * a).exp() / std::f64::consts::PI.sqrt() / fraction
}

#[test]
fn gelu_is_x_times_the_normal_distribution_at_any_length() {
    // Known values of the reference itself.
    for (a, exact) in [
        (0.0, 1.0),
        (0.5, 0.479_500_122_186_953_5),
        (1.0, 0.157_299_207_050_285_1),
        (3.0, 2.209_049_699_858_544e-5),
    ] {
        assert!((erfc(a) - exact).abs() < 1e-14, "{a}");
    }
    for len in [0, 1, 7, 16, 19, 80_001] {
        let x: Vec<f32> = (0..len)
            .map(|i| (i as f32 - len as f32 / 2.0) * 1e-3)
            .chain([-300.0, -30.0, -1e-30, 0.0, 30.0, 300.0])
            .collect();
        let mut y = x.clone();
        gelu(&mut y);
        for (&x, &y) in x.iter().zip(&y) {
            let (x, y) = (f64::from(x), f64::from(y));
            let exact = x.max(0.0) - x.abs() / 2.0 * erfc(x.abs() / 2.0f64.sqrt());
            assert!((y - exact).abs() < 1e-6, "gelu({x}) is {exact}, got {y}");
        }
    }
    let mut nan = [f32::NAN, 1.0];
    gelu(&mut nan);
    assert!(nan[0].is_nan() && nan[1].is_finite());
}

#[test]
fn a_bias_is_added_to_each_row() {
    let mut z = vec![1.0, 2.0, 3.0, 4.0];
    add_bias(&mut z, &[10.0, 20.0]);
    assert_eq!(z, [11.0, 22.0, 13.0, 24.0]);
}

#[test]
fn the_encoders_attention_weighs_every_key() {
    let mut random = Random(2);
    for (rows, heads, dim) in [
        (1, 1, 32),
        (13, 3, 32),
        (20, 2, 20),
        (77, 1, 64),
        (200, 2, 32),
    ] {
        let width = heads * dim;
        let [mut q, mut k, v] = std::array::from_fn(|_| random.floats(rows * width));
        // Scores far below zero, which nothing beyond the last key may outweigh.
        q[..width].fill(-30.0);
        k.iter_mut().for_each(|k| *k += 5.0);
        let mut out = vec![f32::NAN; rows * width];
        attention(&q, &k, &v, heads, dim, &mut out);
        for row in 0..rows {
            for head in 0..heads {
                let at = |t: usize| t * width + head * dim;
                let scores: Vec<f64> = (0..rows)
                    .map(|t| {
                        (0..dim)
                            .map(|d| f64::from(q[at(row) + d]) * f64::from(k[at(t) + d]))
                            .sum::<f64>()
                            / (dim as f64).sqrt()
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                // Scores of hundreds have an error in the last bits, which the exponential carries on.
                let tolerance = if row == 0 { 1e-3 } else { 2e-5 };
                for d in 0..dim {
                    let sum: f64 = (0..rows)
                        .map(|t| weights[t] / total * f64::from(v[at(t) + d]))
                        .sum();
                    let got = f64::from(out[at(row) + d]);
                    assert!(
                        (got - sum).abs() < tolerance,
                        "{rows}x{heads}x{dim}, row {row}: {got} {sum}"
                    );
                }
            }
        }
    }
    attention(&[], &[], &[], 2, 32, &mut []);
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

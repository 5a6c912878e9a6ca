//! Choosing the next token from the candidates of a step.
//!
//! Order: bias, penalties, temperature, top-k, top-p, min-p, one draw. Belongs here: what turns logits into one token. Which
//! sequences want one, and what becomes of it, does not.

mod philox;

use std::collections::HashMap;

pub use philox::{philox, uniform};

use crate::client::Sampling;
use crate::model::CANDIDATES;

/// Draws tokens for one sequence. Same seed, same logits, same history: same tokens, also after a resumption.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    seed: u64,
    /// How often each token stands in (prompt, answer).
    seen: HashMap<u32, (u32, u32)>,
    bias: HashMap<u32, f64>,
}

impl Sampler {
    /// `seed` counts when the request names none.
    pub fn new(sampling: &Sampling, seed: u64, prompt: &[u32]) -> Self {
        let mut seen = HashMap::new();
        if sampling.repetition_penalty != 1.0 {
            for &token in prompt {
                seen.entry(token).or_insert((0, 0)).0 += 1;
            }
        }
        Self {
            sampling: sampling.clone(),
            seed: sampling.seed.unwrap_or(seed),
            seen,
            bias: sampling
                .logit_bias
                .iter()
                .map(|&(token, bias)| (token, f64::from(bias)))
                .collect(),
        }
    }

    /// Whether the best few candidates may not be enough: something raises the logits of tokens seen, or the
    /// distribution is so flat that its tail counts.
    pub fn needs_full_logits(&self) -> bool {
        let s = &self.sampling;
        s.temperature > 1.5
            || !self.bias.is_empty()
            || s.repetition_penalty < 1.0
            || s.presence_penalty < 0.0
            || s.frequency_penalty < 0.0
    }

    /// Records a token of the answer.
    pub fn accept(&mut self, token: u32) {
        self.seen.entry(token).or_insert((0, 0)).1 += 1;
    }

    /// Draws the token for `position` of the sequence from `candidates`, pairs of token id and logit in any order.
    /// `None` if there is no candidate with a finite logit.
    pub fn sample(&self, position: u64, candidates: &[(u32, f32)]) -> Option<u32> {
        let mut pool: Vec<(u32, f64)> = candidates
            .iter()
            .filter(|(_, logit)| logit.is_finite())
            .map(|&(token, logit)| (token, self.penalised(token, f64::from(logit))))
            .collect();
        // Equal logits in order of their ids, so that shards and batches cannot change the choice.
        let better = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let s = &self.sampling;
        if s.temperature <= 0.0 {
            return pool.into_iter().min_by(better).map(|(token, _)| token);
        }
        // Whole rows come for what changes logits; their tails weigh nothing unless the distribution is flat.
        if s.temperature <= 1.5 && pool.len() > CANDIDATES {
            pool.select_nth_unstable_by(CANDIDATES - 1, better);
            pool.truncate(CANDIDATES);
        }
        pool.sort_unstable_by(better);
        if s.top_k > 0 {
            pool.truncate(s.top_k as usize);
        }
        let best = pool.first()?.1;
        let temperature = f64::from(s.temperature);
        for (_, weight) in &mut pool {
            *weight = ((*weight - best) / temperature).exp();
        }
        let total: f64 = pool.iter().map(|(_, w)| w).sum();
        if s.top_p < 1.0 {
            let wanted = f64::from(s.top_p) * total;
            let mut sum = 0.0;
            let kept = pool.iter().position(|(_, w)| {
                sum += w;
                sum >= wanted
            });
            pool.truncate(kept.map_or(pool.len(), |at| at + 1));
        }
        if s.min_p > 0.0 {
            // Weights are relative to the best, whose weight is one.
            let kept = pool.iter().position(|(_, w)| *w < f64::from(s.min_p));
            pool.truncate(kept.unwrap_or(pool.len()));
        }
        let total: f64 = pool.iter().map(|(_, w)| w).sum();
        let mut left = uniform(self.seed, position) * total;
        for &(token, weight) in &pool {
            if left < weight {
                return Some(token);
            }
            left -= weight;
        }
        pool.last().map(|&(token, _)| token)
    }

    fn penalised(&self, token: u32, logit: f64) -> f64 {
        let logit = logit + self.bias.get(&token).copied().unwrap_or(0.0);
        let Some(&(_, answered)) = self.seen.get(&token) else {
            return logit;
        };
        let s = &self.sampling;
        let repetition = f64::from(s.repetition_penalty);
        let logit = if logit > 0.0 {
            logit / repetition
        } else {
            logit * repetition
        };
        if answered == 0 {
            return logit;
        }
        logit - f64::from(s.presence_penalty) - f64::from(s.frequency_penalty) * f64::from(answered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of the probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625 for the tokens 10 to 14.
    fn candidates() -> Vec<(u32, f32)> {
        [0.5f32, 0.25, 0.125, 0.0625, 0.0625]
            .iter()
            .enumerate()
            .map(|(i, p)| (10 + i as u32, p.ln()))
            .collect()
    }

    fn counts(sampling: &Sampling, draws: u64) -> HashMap<u32, u64> {
        let sampler = Sampler::new(sampling, 99, &[]);
        let mut counts = HashMap::new();
        for position in 0..draws {
            let token = sampler.sample(position, &candidates()).unwrap();
            *counts.entry(token).or_insert(0) += 1;
        }
        counts
    }

    /// Asserts that tokens come as often as `probabilities` (of tokens 10, 11, …) say, and no others.
    fn assert_distribution(sampling: &Sampling, probabilities: &[f64]) {
        const DRAWS: u64 = 200_000;
        let counts = counts(sampling, DRAWS);
        let total: f64 = probabilities.iter().sum();
        for (i, p) in probabilities.iter().enumerate() {
            let expected = p / total * DRAWS as f64;
            let got = *counts.get(&(10 + i as u32)).unwrap_or(&0) as f64;
            // Six standard deviations of a binomial count.
            let slack = 6.0 * (expected * (1.0 - p / total)).sqrt() + 1.0;
            assert!(
                (got - expected).abs() <= slack,
                "token {}: {got} times, expected {expected}",
                10 + i
            );
        }
        let known: u64 = (0..probabilities.len() as u32)
            .filter_map(|i| counts.get(&(10 + i)))
            .sum();
        assert_eq!(
            known, DRAWS,
            "tokens outside the distribution came: {counts:?}"
        );
    }

    #[test]
    fn tokens_come_as_often_as_their_probabilities_say() {
        assert_distribution(&Sampling::default(), &[0.5, 0.25, 0.125, 0.0625, 0.0625]);
    }

    #[test]
    fn temperature_sharpens_and_flattens() {
        let half = Sampling {
            temperature: 0.5,
            ..Sampling::default()
        };
        assert_distribution(&half, &[0.25, 0.0625, 1.0 / 64.0, 1.0 / 256.0, 1.0 / 256.0]);
        let two = Sampling {
            temperature: 2.0,
            ..Sampling::default()
        };
        assert_distribution(&two, &[0.5f64.sqrt(), 0.5, 0.125f64.sqrt(), 0.25, 0.25]);
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_where_they_say() {
        assert_distribution(
            &Sampling {
                top_k: 2,
                ..Sampling::default()
            },
            &[0.5, 0.25],
        );
        assert_distribution(
            &Sampling {
                top_p: 0.5,
                ..Sampling::default()
            },
            &[0.5],
        );
        assert_distribution(
            &Sampling {
                top_p: 0.51,
                ..Sampling::default()
            },
            &[0.5, 0.25],
        );
        assert_distribution(
            &Sampling {
                // Not 0.25, the third's very weight: rounding would decide.
                min_p: 0.2,
                ..Sampling::default()
            },
            &[0.5, 0.25, 0.125],
        );
        assert_distribution(
            &Sampling {
                top_k: 4,
                top_p: 0.8,
                min_p: 0.4,
                ..Sampling::default()
            },
            &[0.5, 0.25],
        );
    }

    #[test]
    fn greedy_takes_the_best_and_the_lower_id_of_equals() {
        let sampler = Sampler::new(&Sampling::greedy(), 0, &[]);
        assert_eq!(
            sampler.sample(0, &[(7, 1.0), (3, 2.0), (2, 2.0), (9, f32::NAN)]),
            Some(2)
        );
        assert_eq!(sampler.sample(0, &[]), None);
        assert_eq!(
            sampler.sample(0, &[(1, f32::NAN), (2, f32::NEG_INFINITY)]),
            None
        );
    }

    #[test]
    fn the_same_seed_and_position_draw_the_same_whatever_the_order_of_candidates() {
        let sampler = Sampler::new(
            &Sampling {
                seed: Some(5),
                ..Sampling::default()
            },
            0,
            &[],
        );
        let other = Sampler::new(
            &Sampling {
                seed: Some(5),
                ..Sampling::default()
            },
            1,
            &[],
        );
        let mut reversed = candidates();
        reversed.reverse();
        let draw =
            |s: &Sampler, c: &[(u32, f32)]| (0..200).map(|p| s.sample(p, c)).collect::<Vec<_>>();
        assert_eq!(draw(&sampler, &candidates()), draw(&other, &reversed));
        let third = Sampler::new(
            &Sampling {
                seed: Some(6),
                ..Sampling::default()
            },
            0,
            &[],
        );
        assert_ne!(draw(&sampler, &candidates()), draw(&third, &candidates()));
    }

    #[test]
    fn a_bias_forbids_forces_and_shifts() {
        let biased = |bias: Vec<(u32, f32)>| Sampling {
            logit_bias: bias,
            ..Sampling::default()
        };
        let forced = biased(vec![(14, 100.0)]);
        assert!(Sampler::new(&forced, 0, &[]).needs_full_logits());
        assert_distribution(&forced, &[0.0, 0.0, 0.0, 0.0, 1.0]);
        assert_distribution(
            &biased(vec![(10, -100.0)]),
            &[0.0, 0.25, 0.125, 0.0625, 0.0625],
        );
        let doubled = biased(vec![(12, std::f32::consts::LN_2)]);
        assert_distribution(&doubled, &[0.5, 0.25, 0.25, 0.0625, 0.0625]);
    }

    #[test]
    fn penalties_count_prompt_and_answer_as_openai_and_ctrl_define_them() {
        let sampling = Sampling {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..Sampling::greedy()
        };
        let mut sampler = Sampler::new(&sampling, 0, &[1]);
        sampler.accept(2);
        sampler.accept(2);
        assert_eq!(sampler.penalised(1, 3.0), 1.5, "prompt: repetition only");
        assert_eq!(sampler.penalised(1, -3.0), -6.0);
        assert_eq!(
            sampler.penalised(2, 3.0),
            1.5 - 0.5 - 0.5,
            "answer: all three"
        );
        assert_eq!(sampler.penalised(3, 3.0), 3.0);
        assert!(!sampler.needs_full_logits());
        let raising = Sampling {
            presence_penalty: -1.0,
            ..Sampling::default()
        };
        assert!(Sampler::new(&raising, 0, &[]).needs_full_logits());
    }
}

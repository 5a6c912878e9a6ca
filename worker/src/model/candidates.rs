//! What of a row's logits travels from each rank, and how the leader puts the parts together.

use std::ops::Range;

use kernels::{Allowed, Device, Head};
use serde::{Deserialize, Serialize};

use super::{CANDIDATES, Candidates, Error, StepBatch, Want};

/// One rank's part of one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Part {
    top: Vec<(u32, f32)>,
    largest: f32,
    /// Σ exp(logit − largest) over this part.
    exp_sum: f64,
    full: Option<Vec<f32>>,
}

/// Parts of the batch's rows of `logits`, `[logits_rows, vocab.len()]`.
pub fn parts<D: Device>(
    device: &D,
    logits: &D::Buf,
    vocab: Range<usize>,
    batch: &StepBatch,
) -> Vec<Part> {
    let mut wants = batch.wants.iter().peekable();
    let plain = Want::default();
    let wants: Vec<&Want> = (0..batch.logits_rows.len())
        .map(|row| wants.next_if(|want| want.row == row).unwrap_or(&plain))
        .collect();
    let first = vocab.start;
    let allowed: Vec<Option<Allowed<'_>>> = wants
        .iter()
        .map(|want| want.mask.as_deref().map(|words| Allowed { words, first }))
        .collect();
    let heads = device.heads(logits, vocab.len(), &allowed, CANDIDATES);
    let part = |(row, (want, head)): (usize, (&Want, Head))| {
        let mut top = head.top;
        for (id, _) in &mut top {
            *id += vocab.start as u32;
        }
        let full = (batch.full_logits || want.full).then(|| {
            let mut own = vec![0.0; vocab.len()];
            device.download(logits, row * vocab.len(), &mut own);
            match &want.mask {
                Some(mask) => masked(&own, vocab.start, mask),
                None => own,
            }
        });
        Part {
            top,
            largest: head.largest,
            exp_sum: head.exp_sum,
            full,
        }
    };
    let heads = wants.into_iter().zip(heads);
    heads.enumerate().map(part).collect()
}

/// The logits of the tokens from `first` with those that `mask` does not allow at negative infinity.
fn masked(logits: &[f32], first: usize, mask: &[u32]) -> Vec<f32> {
    let mut masked = vec![f32::NEG_INFINITY; logits.len()];
    let mut at = 0;
    while at < logits.len() {
        let token = first + at;
        let Some(word) = mask.get(token / 32) else {
            break;
        };
        let bits = word >> (token % 32);
        let run = (32 - token % 32).min(logits.len() - at);
        // Most words are all ones or all zeros.
        if bits == u32::MAX >> (token % 32) {
            masked[at..at + run].copy_from_slice(&logits[at..at + run]);
        } else if bits != 0 {
            for i in 0..run {
                if bits >> i & 1 == 1 {
                    masked[at + i] = logits[at + i];
                }
            }
        }
        at += run;
    }
    masked
}

/// The leader's view of each row from the parts of all ranks, in rank order. A row with a value that is not finite gives no candidate,
/// so that only its own sequence fails.
pub fn merge(mut ranks: Vec<Vec<Part>>, rows: usize) -> Result<Vec<Candidates>, Error> {
    if let Some(wrong) = ranks.iter().find(|parts| parts.len() != rows) {
        return Err(Error::Step {
            what: "rows of logits from a rank",
            expected: rows.to_string(),
            got: wrong.len().to_string(),
        });
    }
    let merged = (0..rows)
        .map(|row| {
            let largest = ranks
                .iter()
                .map(|p| p[row].largest)
                .fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = ranks
                .iter()
                .map(|p| p[row].exp_sum * f64::from(p[row].largest - largest).exp())
                .sum();
            if !largest.is_finite() || !sum.is_finite() {
                return Candidates {
                    top: Vec::new(),
                    log_sum_exp: f32::NAN,
                    full: None,
                };
            }
            let mut top: Vec<(u32, f32)> = ranks
                .iter()
                .flat_map(|p| p[row].top.iter().copied())
                .collect();
            top.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            top.truncate(CANDIDATES);
            let full: Option<Vec<Vec<f32>>> =
                ranks.iter_mut().map(|p| p[row].full.take()).collect();
            let log_sum_exp = (f64::from(largest) + sum.ln()) as f32;
            Candidates {
                top,
                log_sum_exp,
                full: full.map(|parts| parts.concat()),
            }
        })
        .collect();
    Ok(merged)
}

#[cfg(test)]
mod tests {
    use kernels::{Cpu, Isa};

    use super::*;

    fn of(logits: &[f32], vocab: Range<usize>, batch: &StepBatch) -> Vec<Part> {
        parts(&Cpu::new(1, Isa::detect()), &logits.to_vec(), vocab, batch)
    }

    /// `rows` rows of which all logits are wanted.
    fn batch(rows: u32) -> StepBatch {
        StepBatch {
            logits_rows: (0..rows).collect(),
            full_logits: true,
            ..StepBatch::default()
        }
    }

    #[test]
    fn candidates_do_not_depend_on_how_the_vocabulary_is_divided() {
        let logits: Vec<f32> = (0..1000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 128.0)
            .collect();
        let whole = merge(vec![of(&logits, 0..1000, &batch(1))], 1).unwrap();
        assert_eq!(whole[0].top.len(), CANDIDATES);
        for cut in [0, 1, 64, 500, 1000] {
            let halves = vec![
                of(&logits[..cut], 0..cut, &batch(1)),
                of(&logits[cut..], cut..1000, &batch(1)),
            ];
            let merged = merge(halves, 1).unwrap();
            assert_eq!(merged[0].top, whole[0].top);
            assert_eq!(merged[0].full, whole[0].full);
            assert!((merged[0].log_sum_exp - whole[0].log_sum_exp).abs() < 1e-6);
        }
    }

    #[test]
    fn a_row_that_is_not_finite_has_no_candidate_and_leaves_the_others_alone() {
        let good = [0.5, 2.0, -1.0, 0.0, 1.0, 1.0, 1.0, 1.0];
        let alone = merge(vec![of(&good, 0..8, &batch(1))], 1).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            for at in 0..8 {
                let mut logits = [good, good, good].concat();
                logits[8 + at] = bad;
                let halves = [0..4, 4..8].map(|half| {
                    let own: Vec<f32> = logits
                        .chunks(8)
                        .flat_map(|row| row[half.clone()].to_vec())
                        .collect();
                    of(&own, half, &batch(3))
                });
                let merged = merge(halves.into(), 3).unwrap();
                assert!(merged[1].top.is_empty() && merged[1].full.is_none());
                assert!(merged[1].log_sum_exp.is_nan());
                for row in [0, 2] {
                    assert_eq!(merged[row].top, alone[0].top);
                    assert_eq!(merged[row].full, alone[0].full);
                }
            }
        }
    }

    #[test]
    fn a_mask_leaves_the_allowed_tokens_and_the_models_probabilities() {
        let logits: Vec<f32> = (0..300u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 512.0)
            .collect();
        let allowed = |id: u32| id % 7 == 3 || (64..128).contains(&id);
        let mut mask = vec![0u32; 9];
        (0..288)
            .filter(|&id| allowed(id))
            .for_each(|id| mask[id as usize / 32] |= 1 << (id % 32));
        let mut want = batch(2);
        want.full_logits = false;
        want.wants = vec![Want {
            row: 1,
            mask: Some(mask),
            full: true,
        }];
        let two = [logits.clone(), logits.clone()].concat();
        let whole = merge(vec![of(&two, 0..300, &want)], 2).unwrap();
        assert_eq!(whole[0].top.len(), CANDIDATES);
        assert!(whole[0].full.is_none());
        let expected: Vec<u32> = (0..288).filter(|&id| allowed(id)).collect();
        let mut got: Vec<u32> = whole[1].top.iter().map(|t| t.0).collect();
        got.sort_unstable();
        assert_eq!(got, expected, "beyond the mask nothing is allowed");
        assert_eq!(whole[1].log_sum_exp, whole[0].log_sum_exp);
        let full = whole[1].full.as_ref().unwrap();
        assert!((0..300).all(|id| full[id as usize].is_finite() == (id < 288 && allowed(id))));
        for cut in [1, 33, 100, 299] {
            let half = |range: Range<usize>| {
                let own: Vec<f32> = two
                    .chunks(300)
                    .flat_map(|r| r[range.clone()].to_vec())
                    .collect();
                of(&own, range, &want)
            };
            let merged = merge(vec![half(0..cut), half(cut..300)], 2).unwrap();
            assert_eq!(
                (&merged[1].top, &merged[1].full),
                (&whole[1].top, &whole[1].full)
            );
        }
    }
}

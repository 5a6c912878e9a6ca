//! Between a row of candidates and a token: what a row must bring, the draw, and what is told of its probability.

use coordinator::Redacted;

use crate::client::TokenLogprob;
use crate::constrain::{Exceeded, Matcher};
use crate::model::{Candidates, Want};
use crate::sampling::Sampler;
use crate::text::Tokenizer;

/// Adds what a sequence's rows of logits, the first of which is `row`, want besides candidates.
///
/// # Errors
/// The answer's constraint cannot be followed further.
pub(super) fn wants(
    sampler: &Sampler,
    matcher: Option<&mut Matcher>,
    row: usize,
    drafts: &[u32],
    wants: &mut Vec<Want>,
) -> Result<(), Exceeded> {
    let full = sampler.needs_full_logits();
    let masks = match matcher {
        Some(matcher) => matcher.masks(drafts)?,
        None => Vec::new(),
    };
    let mut masks = masks.into_iter();
    for row in row..=row + drafts.len() {
        let mask = masks.next().flatten();
        if full || mask.is_some() {
            wants.push(Want { row, mask, full });
        }
    }
    Ok(())
}

/// Draws the token for `position`. `None` if the row allows none.
pub(super) fn draw(sampler: &Sampler, candidates: &Candidates, position: usize) -> Option<u32> {
    let Some(logits) = &candidates.full else {
        return sampler.sample(position as u64, &candidates.top);
    };
    let pairs: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    sampler.sample(position as u64, &pairs)
}

/// What is told of the token that was drawn, with the `others` most probable ones.
pub(super) fn logprob(
    tokenizer: &Tokenizer,
    candidates: &Candidates,
    token: u32,
    others: u8,
) -> TokenLogprob {
    let bytes = |token: u32| Redacted::new(tokenizer.token_name(token).to_vec());
    let logprob = |logit: f32| logit - candidates.log_sum_exp;
    let in_top = candidates
        .top
        .iter()
        .find(|(t, _)| *t == token)
        .map(|t| t.1);
    let full = candidates.full.as_ref();
    let logit = in_top.or_else(|| full.and_then(|full| full.get(token as usize).copied()));
    TokenLogprob {
        bytes: bytes(token),
        // Every token drawn is a candidate.
        logprob: logprob(logit.unwrap_or(f32::NEG_INFINITY)),
        top: candidates
            .top
            .iter()
            .take(usize::from(others))
            .map(|&(token, logit)| (bytes(token), logprob(logit)))
            .collect(),
    }
}

//! Hybrid retrieval: full text and vectors, fused by weighted reciprocal ranks. Pure: what the indexes found in, an order out.
//!
//! Equal weights lose against vectors alone on questions in everyday words (BM25 then ranks by chance), and win on section
//! numbers and keywords. So full text is weighed, query by query, by what it knows of the query's words.

use std::collections::HashMap;

use crate::index::text::QueryFacts;
use crate::index::{Arms, ChunkRef};

/// Candidates taken from each arm; the right passage is rarely deeper, and fusing costs microseconds.
pub const CANDIDATES: usize = 100;

/// Damps the difference between high ranks; the usual 60 is for long lists, here the first ranks decide.
const RANK_OFFSET: f32 = 10.0;

/// How much full text counts against vectors, which count 1.
pub fn text_weight(facts: &QueryFacts) -> f32 {
    let all: f32 = facts.words.iter().map(|(idf, _)| idf).sum();
    if all <= 0.0 {
        return 0.0;
    }
    let known: f32 = facts
        .words
        .iter()
        .filter(|(_, found)| *found)
        .map(|(idf, _)| idf)
        .sum();
    let coverage = known / all;
    let section = if facts.section { 0.4 } else { 0.0 };
    (coverage * facts.best_share * 2.0 + section).clamp(0.05, 1.5)
}

/// The best `top_k` chunks with scores from 0 to 1 (1: first in both arms).
pub fn fuse(arms: &Arms, top_k: usize) -> Vec<(ChunkRef, f32)> {
    let text = if arms.dense.is_empty() {
        1.0
    } else {
        text_weight(&arms.facts)
    };
    let dense = if arms.dense.is_empty() { 0.0 } else { 1.0 };
    let mut scores: HashMap<ChunkRef, f32> = HashMap::new();
    for (weight, arm) in [(dense, &arms.dense), (text, &arms.text)] {
        for (rank, (chunk, _)) in arm.iter().enumerate() {
            *scores.entry(*chunk).or_default() += weight / (RANK_OFFSET + rank as f32);
        }
    }
    let most = (text + dense) / RANK_OFFSET;
    let mut fused: Vec<(ChunkRef, f32)> = scores
        .into_iter()
        // Rounding must not make it more than all.
        .map(|(chunk, score)| (chunk, (score / most).min(1.0)))
        .collect();
    // Equal scores in the order of the chunks, so that the same question has the same answer on every replica.
    fused.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    fused.truncate(top_k);
    fused
}

/// The vector scaled to length 1; `None` if it has no direction.
pub fn unit(mut vector: Vec<f32>) -> Option<Vec<f32>> {
    let length = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    if !length.is_finite() || length <= f32::MIN_POSITIVE {
        return None;
    }
    vector.iter_mut().for_each(|x| *x /= length);
    Some(vector)
}

//! The top of a row of logits: all that has to travel between ranks and into the sampler.

/// The `k` largest logits with their indices, largest first; equal ones by index. NaN is never a candidate.
pub fn top_candidates(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let k = k.min(logits.len());
    if k == 0 {
        return Vec::new();
    }
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    // Candidates gather above the best threshold known; each time twice k are there, the lower half goes.
    let mut kept: Vec<(u32, f32)> = Vec::with_capacity(2 * k + CHUNK);
    let mut threshold = f32::NEG_INFINITY;
    for (chunk_index, chunk) in logits.chunks(CHUNK).enumerate() {
        let first = chunk_index * CHUNK;
        // One comparison a chunk skips most of a vocabulary.
        if kept.len() >= k && !chunk.iter().fold(false, |any, &x| any | (x > threshold)) {
            continue;
        }
        for (i, &x) in chunk.iter().enumerate() {
            if x > threshold || (kept.len() < k && !x.is_nan()) {
                kept.push(((first + i) as u32, x));
            }
        }
        if kept.len() >= 2 * k {
            kept.select_nth_unstable_by(k - 1, order);
            kept.truncate(k);
            threshold = kept[k - 1].1;
        }
    }
    kept.sort_unstable_by(order);
    kept.truncate(k);
    // `-0.0 == 0.0`, but total_cmp orders them: both are fine as candidates.
    kept
}

/// Logits compared at once before any is looked at singly.
const CHUNK: usize = 64;

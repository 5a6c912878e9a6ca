//! Who holds which part of a model: whole KV-head groups of attention, segments of the feed-forward width and rows of the
//! vocabulary, in proportion to how fast each rank reads its memory, bounded by how much it has.
//!
//! Pure integer arithmetic: every rank computes the same plan from the same configuration and capacities.

use std::ops::Range;

use kernels::KvFormat;
use serde::{Deserialize, Serialize};

use crate::file::ModelConfig;
use crate::kv::BLOCK_TOKENS;

/// Full contexts that the KV cache holds at most; more sequences share it when they are shorter.
const KV_CONTEXTS: u64 = 4;
/// Vocabulary rows move between ranks in runs of this many (a tile of every kernel divides it).
const VOCAB_RUN: usize = 64;
/// Narrowest feed-forward segment; below, dispatching its matmul costs more than it computes.
const MIN_SEGMENT_COLUMNS: usize = 256;
/// Most segments a feed-forward width is cut into; 1/32 of the width is fine enough to balance eight unequal ranks.
const MAX_SEGMENTS: usize = 32;
/// Rows of activations a rank sets aside for one step, in elements of the widest buffers.
const WORKSPACE_ROWS: u64 = 512;

/// What a rank's device offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankCapacity {
    pub memory_bytes: u64,
    /// Measured streaming read; only the ratios between ranks matter. 0 counts as 1.
    pub read_bytes_per_s: u64,
}

/// One rank's part. Ranges are half-open and in units of the whole model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shard {
    pub query_heads: Range<usize>,
    pub kv_heads: Range<usize>,
    pub ffn_columns: Range<usize>,
    pub vocab_rows: Range<usize>,
    /// Bytes of the file that belong to it, norms included.
    pub weight_bytes: u64,
    /// Bytes of its part of the KV cache.
    pub kv_bytes: u64,
}

/// The whole division.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardPlan {
    /// In rank order; adjacent ranges touch, so that together they cover the model exactly.
    pub shards: Vec<Shard>,
    /// Columns of a feed-forward segment (the last may be narrower). Row-parallel sums are taken segment by segment, so that
    /// their value does not depend on how the segments are spread over ranks.
    pub segment_columns: usize,
    /// Longest sequence.
    pub context_tokens: usize,
    /// KV blocks, the same number on every rank.
    pub kv_blocks: usize,
    /// How they keep their numbers, the same on every rank.
    pub kv_format: KvFormat,
}

/// Why a model cannot be divided so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("no ranks given; expected at least one")]
    NoRanks,
    #[error(
        "{ranks} ranks are more than this model can be divided into: it has {kv_heads} KV heads, divisible into {parts} parts; use at most {parts} ranks"
    )]
    TooManyRanks {
        ranks: usize,
        kv_heads: usize,
        parts: usize,
    },
    #[error(
        "a context of {asked} tokens was asked for, the model was made for {limit}; choose at most {limit} and at least 1"
    )]
    Context { asked: usize, limit: usize },
    #[error(
        "the model is too large for these ranks: {missing_bytes} bytes are missing ({weight_bytes} bytes of weights, {kv_bytes} bytes of KV cache for one \
         context of {context_tokens} tokens and {other_bytes} bytes of norms and workspace stand against {memory_bytes} bytes of memory); add ranks, \
         shorten the context or choose a smaller quantisation"
    )]
    TooLarge {
        missing_bytes: u64,
        weight_bytes: u64,
        kv_bytes: u64,
        other_bytes: u64,
        memory_bytes: u64,
        context_tokens: usize,
    },
    #[error(
        "rank {rank} is too small: {missing_bytes} bytes are missing for {what}; give it more memory, leave it out, or shorten the context"
    )]
    RankTooSmall {
        rank: usize,
        missing_bytes: u64,
        what: &'static str,
    },
}

impl ShardPlan {
    /// The plan of one rank that holds everything, with no limit on memory and keys and values in f16.
    pub fn whole(config: &ModelConfig, context_tokens: usize) -> Result<ShardPlan, Error> {
        Self::whole_in(KvFormat::F16, config, context_tokens)
    }

    /// [`ShardPlan::whole`] with keys and values in `kv_format`.
    pub fn whole_in(
        kv_format: KvFormat,
        config: &ModelConfig,
        context_tokens: usize,
    ) -> Result<ShardPlan, Error> {
        plan(
            config,
            &[RankCapacity {
                memory_bytes: u64::MAX / 4,
                read_bytes_per_s: 1,
            }],
            context_tokens,
            kv_format,
        )
    }

    /// The feed-forward segments in a shard, in order.
    pub fn segments(&self, shard: &Shard) -> impl Iterator<Item = Range<usize>> {
        let (end, step) = (shard.ffn_columns.end, self.segment_columns.max(1));
        shard
            .ffn_columns
            .clone()
            .step_by(step)
            .map(move |start| start..(start + step).min(end))
    }
}

/// Columns of one feed-forward segment of a model; depends on the model alone.
fn segment_columns(config: &ModelConfig) -> usize {
    config
        .ffn
        .div_ceil(MAX_SEGMENTS)
        .max(MIN_SEGMENT_COLUMNS)
        .next_multiple_of(config.sizes.ffn_block.max(1))
        .min(config.ffn)
}

/// Divides a model. Deterministic; see the module's comment.
///
/// Units are dealt one at a time, the largest kind first (attention, feed-forward, vocabulary), each to the rank that will have read
/// its share of that kind first and still has room. Kinds do not make up for each other: the ranks wait for all after each.
pub fn plan(
    config: &ModelConfig,
    ranks: &[RankCapacity],
    context_tokens: usize,
    kv_format: KvFormat,
) -> Result<ShardPlan, Error> {
    let sizes = &config.sizes;
    let heads_a_unit = sizes.kv_head_block.clamp(1, config.kv_heads);
    let attention_units = config.kv_heads.div_ceil(heads_a_unit);
    if ranks.is_empty() {
        return Err(Error::NoRanks);
    }
    if ranks.len() > attention_units {
        return Err(Error::TooManyRanks {
            ranks: ranks.len(),
            kv_heads: config.kv_heads,
            parts: attention_units,
        });
    }
    if !(1..=config.context_tokens).contains(&context_tokens) {
        return Err(Error::Context {
            asked: context_tokens,
            limit: config.context_tokens,
        });
    }
    let segment = segment_columns(config);
    let blocks_a_context = context_tokens.div_ceil(BLOCK_TOKENS) as u64;
    let head_block_bytes = config.kv_head_block_bytes(kv_format);
    let head_kv_bytes = head_block_bytes * blocks_a_context;
    let segment_bytes =
        (sizes.ffn_block_bytes * segment as u64).div_ceil(sizes.ffn_block.max(1) as u64);
    let other_bytes = sizes.replicated_bytes + workspace_bytes(config);

    check_total(
        config,
        ranks,
        context_tokens,
        segment_bytes,
        head_kv_bytes,
        other_bytes,
    )?;

    let mut deal = Deal::new(ranks, other_bytes)?;
    let head_bytes = sizes.kv_head_bytes * heads_a_unit as u64;
    let attention = deal.units(
        "a KV head group",
        attention_units,
        head_bytes,
        head_bytes + head_kv_bytes * heads_a_unit as u64,
        true,
    )?;
    let ffn = deal.units(
        "a feed-forward segment",
        config.ffn.div_ceil(segment),
        segment_bytes,
        segment_bytes,
        false,
    )?;
    let run_bytes = sizes.vocab_row_bytes * VOCAB_RUN as u64;
    let vocab = deal.units(
        "rows of the vocabulary",
        config.vocab.div_ceil(VOCAB_RUN),
        run_bytes,
        run_bytes,
        false,
    )?;

    let kv_ranges = ranges(&attention, heads_a_unit, config.kv_heads);
    let group = config.group_heads();
    // The room that is left takes more contexts, the same number of blocks on every rank.
    let spare_blocks = kv_ranges
        .iter()
        .zip(&deal.room)
        .map(|(heads, room)| room / (head_block_bytes * heads.len() as u64).max(1))
        .min();
    let kv_blocks = blocks_a_context
        + spare_blocks
            .unwrap_or(0)
            .min(blocks_a_context * (KV_CONTEXTS - 1));
    let shards = kv_ranges
        .into_iter()
        .zip(ranges(&ffn, segment, config.ffn))
        .zip(ranges(&vocab, VOCAB_RUN, config.vocab))
        .map(|((kv_heads, ffn_columns), vocab_rows)| Shard {
            weight_bytes: sizes.kv_head_bytes * kv_heads.len() as u64
                + (sizes.ffn_block_bytes * ffn_columns.len() as u64)
                    .div_ceil(sizes.ffn_block.max(1) as u64)
                + sizes.vocab_row_bytes * vocab_rows.len() as u64
                + sizes.replicated_bytes,
            kv_bytes: head_block_bytes * kv_heads.len() as u64 * kv_blocks,
            query_heads: kv_heads.start * group..kv_heads.end * group,
            kv_heads,
            ffn_columns,
            vocab_rows,
        })
        .collect();
    Ok(ShardPlan {
        shards,
        segment_columns: segment,
        context_tokens,
        kv_blocks: kv_blocks as usize,
        kv_format,
    })
}

/// Activations of one step: residual, its sum in f64, projections and feed-forward, and logits of a few rows.
fn workspace_bytes(config: &ModelConfig) -> u64 {
    let width = 6 * config.hidden + 2 * config.heads * config.head_dim + 2 * config.ffn;
    WORKSPACE_ROWS * 4 * width as u64 + 16 * 4 * config.vocab as u64
}

/// The first thing a user wants to know: whether it fits at all, and what is missing.
fn check_total(
    config: &ModelConfig,
    ranks: &[RankCapacity],
    context_tokens: usize,
    segment_bytes: u64,
    head_kv_bytes: u64,
    other_bytes: u64,
) -> Result<(), Error> {
    let sizes = &config.sizes;
    let segments = config.ffn.div_ceil(segment_columns(config)) as u64;
    let weight_bytes = sizes.kv_head_bytes * config.kv_heads as u64
        + segment_bytes * segments
        + sizes.vocab_row_bytes * config.vocab as u64;
    let kv_bytes = head_kv_bytes * config.kv_heads as u64;
    let other_bytes = other_bytes * ranks.len() as u64;
    let memory_bytes = ranks
        .iter()
        .fold(0u64, |sum, r| sum.saturating_add(r.memory_bytes));
    let needed = weight_bytes + kv_bytes + other_bytes;
    if needed > memory_bytes {
        return Err(Error::TooLarge {
            missing_bytes: needed - memory_bytes,
            weight_bytes,
            kv_bytes,
            other_bytes,
            memory_bytes,
            context_tokens,
        });
    }
    Ok(())
}

/// Deals equal units to ranks.
struct Deal {
    /// Bytes a rank can still take.
    room: Vec<u64>,
    /// Bytes a rank reads in each decoding step of the kind that is being dealt, so far.
    load: Vec<u64>,
    speed: Vec<u64>,
}

impl Deal {
    fn new(ranks: &[RankCapacity], reserved: u64) -> Result<Deal, Error> {
        let room = ranks.iter().enumerate().map(|(rank, r)| {
            let missing_bytes = reserved.saturating_sub(r.memory_bytes);
            if missing_bytes > 0 {
                Err(Error::RankTooSmall {
                    rank,
                    missing_bytes,
                    what: "norms and workspace",
                })
            } else {
                Ok(r.memory_bytes - reserved)
            }
        });
        Ok(Deal {
            room: room.collect::<Result<_, _>>()?,
            load: vec![0; ranks.len()],
            speed: ranks.iter().map(|r| r.read_bytes_per_s.max(1)).collect(),
        })
    }

    /// Deals `count` units of which each adds `load` bytes to read and takes `memory` bytes; returns how many each rank got.
    fn units(
        &mut self,
        what: &'static str,
        count: usize,
        load: u64,
        memory: u64,
        at_least_one: bool,
    ) -> Result<Vec<usize>, Error> {
        self.load.fill(0);
        let mut got = vec![0; self.room.len()];
        let mut left = count;
        if at_least_one {
            for (rank, got) in got.iter_mut().enumerate() {
                self.give(rank, what, load, memory)?;
                *got += 1;
                left -= 1;
            }
        }
        for _ in 0..left {
            // Time after taking the unit is (load + unit) / speed; compared crosswise to stay in integers.
            let later = |a: usize, b: usize| {
                let time = |r: usize, other: usize| {
                    u128::from(self.load[r] + load) * u128::from(self.speed[other])
                };
                time(a, b).cmp(&time(b, a)).then(a.cmp(&b))
            };
            let fits = (0..got.len())
                .filter(|&r| self.room[r] >= memory)
                .min_by(|&a, &b| later(a, b));
            let roomiest = (0..got.len()).max_by_key(|&r| self.room[r]).unwrap_or(0);
            let rank = fits.unwrap_or(roomiest);
            self.give(rank, what, load, memory)?;
            got[rank] += 1;
        }
        Ok(got)
    }

    fn give(
        &mut self,
        rank: usize,
        what: &'static str,
        load: u64,
        memory: u64,
    ) -> Result<(), Error> {
        let missing_bytes = memory.saturating_sub(self.room[rank]);
        if missing_bytes > 0 {
            return Err(Error::RankTooSmall {
                rank,
                missing_bytes,
                what,
            });
        }
        self.room[rank] -= memory;
        self.load[rank] += load;
        Ok(())
    }
}

/// Consecutive ranges of `units[rank] * unit` elements, cut off at `total`.
fn ranges(units: &[usize], unit: usize, total: usize) -> Vec<Range<usize>> {
    let mut start = 0;
    units
        .iter()
        .map(|count| {
            let end = (start + count * unit).min(total);
            std::mem::replace(&mut start, end)..end
        })
        .collect()
}

#[cfg(test)]
mod tests;

use proptest::prelude::*;

use super::*;

/// A plan with keys and values in f16.
fn plan(
    config: &ModelConfig,
    ranks: &[RankCapacity],
    context_tokens: usize,
) -> Result<ShardPlan, Error> {
    super::plan(config, ranks, context_tokens, KvFormat::F16)
}
use crate::file::WeightSizes;

const GIB: u64 = 1 << 30;

fn config(
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    ffn: usize,
    vocab: usize,
    layers: usize,
    ffn_block: usize,
) -> ModelConfig {
    let hidden = heads * head_dim;
    let layers_u64 = layers as u64;
    // About 4.5 bits a weight, as in Q4 formats.
    let bytes = |weights: usize| weights as u64 * 9 / 16 * layers_u64;
    ModelConfig {
        name: String::new(),
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim,
        ffn,
        vocab,
        eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        rope_interleaved: true,
        tied_embeddings: false,
        context_tokens: 131_072,
        sizes: WeightSizes {
            kv_head_bytes: bytes(2 * hidden * hidden / kv_heads + 2 * hidden * head_dim),
            ffn_block_bytes: bytes(3 * hidden * ffn_block),
            ffn_block,
            kv_head_block: 1,
            vocab_row_bytes: 2 * hidden as u64,
            replicated_bytes: (2 * layers_u64 + 1) * hidden as u64 * 4,
        },
    }
}

fn smollm2() -> ModelConfig {
    config(9, 3, 64, 1536, 49_152, 30, 32)
}

fn llama_70b() -> ModelConfig {
    config(64, 8, 128, 28_672, 128_256, 80, 256)
}

fn rank(memory_gib: u64, gb_per_s: u64) -> RankCapacity {
    RankCapacity {
        memory_bytes: memory_gib * GIB,
        read_bytes_per_s: gb_per_s * 1_000_000_000,
    }
}

/// Shards cover the model exactly: no gap, no overlap, nothing cut that must stay whole.
fn assert_covers(plan: &ShardPlan, config: &ModelConfig, ranks: &[RankCapacity]) {
    assert_eq!(plan.shards.len(), ranks.len());
    let (mut heads, mut ffn, mut vocab) = (0, 0, 0);
    for (shard, rank) in plan.shards.iter().zip(ranks) {
        assert_eq!(
            (
                shard.kv_heads.start,
                shard.ffn_columns.start,
                shard.vocab_rows.start
            ),
            (heads, ffn, vocab)
        );
        assert!(!shard.kv_heads.is_empty());
        assert_eq!(
            shard.query_heads,
            heads * config.group_heads()..shard.kv_heads.end * config.group_heads()
        );
        assert!(
            shard.kv_heads.end == config.kv_heads
                || shard
                    .kv_heads
                    .end
                    .is_multiple_of(config.sizes.kv_head_block)
        );
        assert!(
            shard.ffn_columns.end == config.ffn
                || shard.ffn_columns.end.is_multiple_of(plan.segment_columns)
        );
        assert!(
            plan.segment_columns.is_multiple_of(config.sizes.ffn_block)
                || plan.segment_columns == config.ffn
        );
        assert_eq!(
            plan.segments(shard).map(|s| s.len()).sum::<usize>(),
            shard.ffn_columns.len()
        );
        assert!(shard.weight_bytes + shard.kv_bytes <= rank.memory_bytes);
        (heads, ffn, vocab) = (
            shard.kv_heads.end,
            shard.ffn_columns.end,
            shard.vocab_rows.end,
        );
    }
    assert_eq!(
        (heads, ffn, vocab),
        (config.kv_heads, config.ffn, config.vocab)
    );
    assert!(plan.kv_blocks * BLOCK_TOKENS >= plan.context_tokens);
}

#[test]
fn nine_query_heads_over_three_kv_heads_divide_over_one_two_and_three_ranks() {
    let config = smollm2();
    for (count, expected) in [(1, vec![9]), (2, vec![6, 3]), (3, vec![3, 3, 3])] {
        let ranks = vec![rank(4, 30); count];
        let plan = plan(&config, &ranks, 2048).unwrap();
        assert_covers(&plan, &config, &ranks);
        assert_eq!(
            plan.shards
                .iter()
                .map(|s| s.query_heads.len())
                .collect::<Vec<_>>(),
            expected
        );
    }
}

#[test]
fn two_equal_ranks_of_an_odd_model_divide_evenly_what_can_be() {
    let plan = plan(&smollm2(), &[rank(4, 30), rank(4, 30)], 2048).unwrap();
    let [a, b] = &plan.shards[..] else {
        panic!("two shards");
    };
    // The third KV head must be somewhere. Less of the rest would not help its rank: all wait for all after each kind.
    assert_eq!((a.kv_heads.len(), b.kv_heads.len()), (2, 1));
    assert_eq!(a.ffn_columns.len(), b.ffn_columns.len());
    assert_eq!(a.vocab_rows.len(), b.vocab_rows.len());
}

#[test]
fn seventy_billion_weights_divide_over_one_to_eight_unequal_ranks() {
    let config = llama_70b();
    for count in 1..=8 {
        let ranks: Vec<RankCapacity> = (0..count as u64)
            .map(|i| rank(80 / count as u64 + 8 + i, 400 + 100 * i))
            .collect();
        let plan = plan(&config, &ranks, 8192).unwrap();
        assert_covers(&plan, &config, &ranks);
    }
    let equal = vec![rank(24, 900); 8];
    let plan = plan(&config, &equal, 8192).unwrap();
    assert!(plan.shards.iter().all(|s| s.kv_heads.len() == 1));
}

#[test]
fn a_rank_with_little_memory_gets_less_than_its_speed_would_give_it() {
    let config = llama_70b();
    let ranks = [rank(10, 900), rank(80, 900)];
    let plan = plan(&config, &ranks, 8192).unwrap();
    assert_covers(&plan, &config, &ranks);
    assert!(plan.shards[0].weight_bytes < plan.shards[1].weight_bytes / 2);
}

#[test]
fn more_ranks_than_kv_heads_name_both_numbers() {
    let error = plan(&smollm2(), &[rank(4, 30); 4], 2048).unwrap_err();
    assert_eq!(
        error,
        Error::TooManyRanks {
            ranks: 4,
            kv_heads: 3,
            parts: 3
        }
    );
    let text = error.to_string();
    assert!(
        text.contains("4 ranks") && text.contains("3 KV heads"),
        "{text}"
    );
}

#[test]
fn a_model_that_is_too_large_says_how_much_is_missing_and_for_what() {
    let config = llama_70b();
    let ranks = [rank(12, 900), rank(12, 900)];
    let Err(Error::TooLarge {
        missing_bytes,
        weight_bytes,
        kv_bytes,
        other_bytes,
        memory_bytes,
        ..
    }) = plan(&config, &ranks, 8192)
    else {
        panic!("expected TooLarge");
    };
    assert_eq!(
        missing_bytes,
        weight_bytes + kv_bytes + other_bytes - memory_bytes
    );
    assert_eq!(memory_bytes, 24 * GIB);
    // With what is missing, and one unit's room for rounding, it fits.
    let unit = config.sizes.kv_head_bytes * 2;
    let enough = [
        rank(12, 900),
        RankCapacity {
            memory_bytes: 12 * GIB + missing_bytes + unit,
            ..rank(12, 900)
        },
    ];
    assert_covers(&plan(&config, &enough, 8192).unwrap(), &config, &enough);
}

#[test]
fn keys_and_values_in_int8_give_about_twice_the_blocks_in_the_same_memory() {
    let config = llama_70b();
    // Room for the weights and a good context of 32,768 tokens, but not for four.
    let ranks = [rank(52, 900)];
    let of = |format| super::plan(&config, &ranks, 32_768, format).unwrap();
    let (f16, int8) = (of(KvFormat::F16), of(KvFormat::Int8));
    for plan in [&f16, &int8] {
        assert_covers(plan, &config, &ranks);
        assert!(
            plan.kv_blocks < 4 * 32_768 / BLOCK_TOKENS,
            "not bounded by memory"
        );
    }
    let ratio = int8.kv_blocks as f64 / f16.kv_blocks as f64;
    assert!((1.85..2.0).contains(&ratio), "{ratio} times the blocks");
    let bytes = |plan: &ShardPlan| plan.shards[0].kv_bytes / plan.kv_blocks as u64;
    // A block of all layers and heads: 256 numbers a position and head, with a scale of two bytes for each 32 of them in int8.
    assert_eq!(bytes(&f16), 80 * 8 * 16 * 256 * 2);
    assert_eq!(bytes(&int8), 80 * 8 * 16 * (256 + 8 * 2));
    // What just does not fit in f16 does in int8.
    let small = [rank(45, 900)];
    assert!(matches!(
        super::plan(&config, &small, 32_768, KvFormat::F16),
        Err(Error::TooLarge { .. })
    ));
    assert_covers(
        &super::plan(&config, &small, 32_768, KvFormat::Int8).unwrap(),
        &config,
        &small,
    );
}

#[test]
fn a_context_beyond_the_model_is_refused() {
    assert_eq!(
        plan(&smollm2(), &[rank(4, 30)], 200_000),
        Err(Error::Context {
            asked: 200_000,
            limit: 131_072
        })
    );
    assert_eq!(
        plan(&smollm2(), &[rank(4, 30)], 0),
        Err(Error::Context {
            asked: 0,
            limit: 131_072
        })
    );
    assert_eq!(plan(&smollm2(), &[], 100), Err(Error::NoRanks));
}

#[test]
fn heads_that_share_a_quantisation_block_stay_together() {
    // 32 heads of 64 with one query head each, in blocks of 256 columns: four heads at a time.
    let mut config = config(32, 32, 64, 8192, 32_000, 4, 256);
    config.sizes.kv_head_block = 4;
    let ranks = vec![rank(4, 30); 3];
    let plan_of_three = plan(&config, &ranks, 512).unwrap();
    assert_covers(&plan_of_three, &config, &ranks);
    assert!(matches!(
        plan(&config, &[rank(4, 30); 9], 512),
        Err(Error::TooManyRanks { parts: 8, .. })
    ));
}

proptest! {
    #[test]
    fn every_plan_covers_exactly(
        kv_heads in 1usize..17,
        group in 1usize..9,
        ffn_blocks in 1usize..120,
        vocab in 1usize..200_000,
        capacities in proptest::collection::vec((1u64..200, 1u64..2000), 1..9),
        context in 1usize..20_000,
        format in prop::sample::select(KvFormat::ALL.to_vec()),
    ) {
        let config = config(kv_heads * group, kv_heads, 64, ffn_blocks * 256, vocab, 32, 256);
        let ranks: Vec<RankCapacity> = capacities.iter().map(|&(gib, speed)| rank(gib, speed)).collect();
        match super::plan(&config, &ranks, context, format) {
            Ok(plan) => assert_covers(&plan, &config, &ranks),
            Err(Error::TooManyRanks { .. }) => prop_assert!(ranks.len() > kv_heads),
            Err(Error::TooLarge { missing_bytes, .. } | Error::RankTooSmall { missing_bytes, .. }) => prop_assert!(missing_bytes > 0),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    #[test]
    fn a_faster_rank_never_gets_fewer_heads_nor_noticeably_fewer_bytes(
        speeds in proptest::collection::vec(1u64..2000, 2..9),
        which in any::<prop::sample::Index>(),
        more in 1u64..2000,
    ) {
        let config = llama_70b();
        let which = which.index(speeds.len());
        let before: Vec<RankCapacity> = speeds.iter().map(|&s| rank(200, s)).collect();
        let mut after = before.clone();
        after[which].read_bytes_per_s += more * 1_000_000_000;
        let (before, after) = (plan(&config, &before, 8192).unwrap(), plan(&config, &after, 8192).unwrap());
        let (before, after) = (&before.shards[which], &after.shards[which]);
        prop_assert!(after.kv_heads.len() >= before.kv_heads.len());
        // To within one feed-forward segment, since units are dealt one at a time.
        let segment = config.sizes.ffn_block_bytes * 4;
        prop_assert!(after.weight_bytes + segment >= before.weight_bytes);
    }
}

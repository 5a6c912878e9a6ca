use super::*;
use crate::file::WeightSizes;
use crate::model::{Span, Want};
use crate::plan::RankCapacity;

fn config() -> ModelConfig {
    ModelConfig {
        name: String::new(),
        layers: 1,
        hidden: 64,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        ffn: 64,
        vocab: 100,
        eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: None,
        rope_interleaved: true,
        tied_embeddings: true,
        context_tokens: 64,
        sizes: WeightSizes {
            ffn_block: 32,
            kv_head_block: 1,
            ..WeightSizes::default()
        },
    }
}

fn good() -> StepBatch {
    StepBatch {
        tokens: vec![1, 2, 3],
        positions: vec![0, 1, 17],
        slots: vec![32, 33, 49],
        spans: vec![
            Span {
                first_row: 0,
                rows: 2,
                context: 0,
                blocks: vec![2],
            },
            Span {
                first_row: 2,
                rows: 1,
                context: 17,
                blocks: vec![0, 3],
            },
        ],
        logits_rows: vec![1, 2],
        full_logits: false,
        wants: Vec::new(),
    }
}

fn want(row: usize) -> Want {
    Want {
        row,
        ..Want::default()
    }
}

#[test]
fn a_step_that_points_outside_the_model_or_its_cache_is_refused() {
    let config = config();
    let memory = [RankCapacity {
        memory_bytes: 1 << 30,
        read_bytes_per_s: 1,
    }];
    let plan = crate::plan::plan(&config, &memory, 64, kernels::KvFormat::F16).unwrap();
    check(&good(), &config, &plan).unwrap();
    type Spoil = fn(&mut StepBatch);
    let cases: [(&str, Spoil); 15] = [
        ("no rows", |b| *b = StepBatch::default()),
        ("a token beyond the vocabulary", |b| b.tokens[0] = 100),
        ("fewer positions than tokens", |b| b.positions.truncate(2)),
        ("fewer slots than tokens", |b| b.slots.truncate(2)),
        ("a position that is not the sequence's next", |b| {
            b.positions[1] = 5
        }),
        ("a slot outside the sequence's blocks", |b| b.slots[2] = 0),
        ("a block beyond the cache", |b| {
            b.spans[0].blocks[0] = 1 << 30
        }),
        ("too few blocks", |b| b.spans[1].blocks.truncate(1)),
        ("a context that overflows", |b| {
            b.spans[1].context = usize::MAX
        }),
        ("rows without a span", |b| b.spans.truncate(1)),
        ("overlapping spans", |b| b.spans[1].first_row = 1),
        ("a span that overflows", |b| b.spans[1].rows = usize::MAX),
        ("logits of a row that is not there", |b| {
            b.logits_rows = vec![3]
        }),
        ("wants of a row without logits", |b| b.wants = vec![want(2)]),
        ("wants out of order", |b| b.wants = vec![want(1), want(0)]),
    ];
    for (what, spoil) in cases {
        let mut batch = good();
        spoil(&mut batch);
        assert!(
            matches!(check(&batch, &config, &plan), Err(Error::Step { .. })),
            "{what} was accepted"
        );
    }
}

//! What a group says does not depend on how many ranks it has, how fast they are, or what else is in a step.

mod support;

use kernels::{BLOCK_TOKENS, Cpu};
use support::{Over, cpu, on_ranks, push, smollm2};
use worker::file::ModelFile;
use worker::model::{Candidates, RankModel, StepBatch};
use worker::plan::{RankCapacity, ShardPlan, plan};

const PROMPTS: usize = 20;
const PROMPT_TOKENS: usize = 8;
const ANSWER_TOKENS: usize = 16;
const BLOCKS: usize = (PROMPT_TOKENS + ANSWER_TOKENS).div_ceil(BLOCK_TOKENS);

/// Prompts as token ids, spread over the vocabulary.
fn prompt(which: usize) -> Vec<u32> {
    (0..PROMPT_TOKENS)
        .map(|i| ((which * 7919 + i * 104_729 + 17) % 49_000) as u32)
        .collect()
}

/// The greedy answers to prompts `from..to`, all in the same steps, with everything that the last step's sampler saw.
fn answers(
    model: &mut RankModel<Cpu>,
    prompts: std::ops::Range<usize>,
) -> (Vec<Vec<u32>>, Vec<Candidates>) {
    let blocks = |which: usize| -> Vec<u32> {
        (0..BLOCKS as u32)
            .map(|b| (which * BLOCKS) as u32 + b)
            .collect()
    };
    let mut texts = vec![Vec::new(); prompts.len()];
    let mut last = Vec::new();
    for position in 0..ANSWER_TOKENS {
        let mut batch = StepBatch::default();
        for (i, which) in prompts.clone().enumerate() {
            match position {
                0 => push(&mut batch, &prompt(which), 0, &blocks(i)),
                _ => push(
                    &mut batch,
                    &texts[i][position - 1..],
                    PROMPT_TOKENS + position - 1,
                    &blocks(i),
                ),
            }
            batch.logits_rows.push(batch.tokens.len() as u32 - 1);
        }
        last = model.step(&batch).unwrap().unwrap();
        for (text, candidates) in texts.iter_mut().zip(&last) {
            text.push(candidates.top[0].0);
        }
    }
    (texts, last)
}

fn division(file: &ModelFile, speeds: &[u64]) -> ShardPlan {
    let ranks: Vec<RankCapacity> = speeds
        .iter()
        .map(|&read_bytes_per_s| RankCapacity {
            memory_bytes: 4 << 30,
            read_bytes_per_s,
        })
        .collect();
    plan(&file.config().unwrap(), &ranks, 1024).unwrap()
}

#[test]
fn one_two_and_three_ranks_give_the_same_greedy_text_on_twenty_prompts() {
    let file = ModelFile::open(smollm2()).unwrap();
    let all = |model: &mut RankModel<Cpu>| answers(model, 0..PROMPTS);
    let (texts, last) = on_ranks(&file, &division(&file, &[1]), Over::Tcp, cpu, all);
    for (speeds, over) in [
        (vec![1, 1], Over::Shm),
        (vec![1, 1, 1], Over::Tcp),
        (vec![5, 1], Over::Tcp),
    ] {
        let (other_texts, other_last) = on_ranks(&file, &division(&file, &speeds), over, cpu, all);
        assert_eq!(
            texts,
            other_texts,
            "{} ranks of speeds {speeds:?}",
            speeds.len()
        );
        // Not only the text: every candidate's logit, to the bit.
        for (a, b) in last.iter().zip(&other_last) {
            assert_eq!(a.top, b.top);
            assert!((a.log_sum_exp - b.log_sum_exp).abs() < 1e-5);
        }
    }
}

#[test]
fn an_answer_does_not_depend_on_what_else_is_in_its_steps() {
    let file = ModelFile::open(smollm2()).unwrap();
    on_ranks(&file, &division(&file, &[1]), Over::Tcp, cpu, |model| {
        let (together, _) = answers(model, 0..5);
        for (which, text) in together.iter().enumerate() {
            let (alone, _) = answers(model, which..which + 1);
            assert_eq!(alone[0], *text);
        }
    });
}

#[test]
fn a_rank_reads_only_its_share_and_the_norms() {
    let file = ModelFile::open(smollm2()).unwrap();
    let config = file.config().unwrap();
    let whole = std::fs::metadata(smollm2()).unwrap().len();
    for speeds in [vec![1], vec![1, 1], vec![1, 1, 1], vec![5, 1]] {
        let plan = division(&file, &speeds);
        let read: Vec<u64> = (0..plan.shards.len())
            .map(|rank| {
                let model = worker::model::Model::load(&file, &plan, rank, cpu()).unwrap();
                let numbers = model.numbers(plan.context_tokens);
                let shard = &plan.shards[rank];
                assert_eq!(numbers.kv_heads, shard.kv_heads);
                // Sizes per head and column are rounded up to bytes.
                let rounding = config.kv_heads as u64 + config.ffn as u64;
                assert!(
                    numbers.mapped_bytes <= shard.weight_bytes,
                    "{} > {}",
                    numbers.mapped_bytes,
                    shard.weight_bytes
                );
                assert!(numbers.mapped_bytes + rounding >= shard.weight_bytes);
                numbers.mapped_bytes
            })
            .collect();
        let norms = config.sizes.replicated_bytes;
        let sum: u64 = read.iter().map(|bytes| bytes - norms).sum::<u64>() + norms;
        assert!(
            sum < whole && sum > whole * 9 / 10,
            "{sum} of {whole} bytes"
        );
    }
}

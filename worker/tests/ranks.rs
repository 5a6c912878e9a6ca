//! What a group says does not depend on how many ranks it has, how fast they are, or what else is in a step.

mod support;

use std::ops::Range;
use std::path::Path;

use kernels::{BLOCK_TOKENS, Cpu, Format, KvFormat};
use support::{Over, cpu, on_ranks, on_ranks_with, push, smollm2};
use worker::file::{
    Error as FileError, LAYER_WEIGHTS, LayerWeight, ModelConfig, ModelFile, Tensor, Weight,
};
use worker::model::{Candidates, Error, Model, RankModel, StepBatch};
use worker::plan::{RankCapacity, Shard, ShardPlan, plan};

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
    plan(&file.config().unwrap(), &ranks, 1024, KvFormat::F16).unwrap()
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
fn a_prompt_that_is_computed_in_halves_while_sums_travel_gives_the_same_bits() {
    let file = ModelFile::open(smollm2()).unwrap();
    let last_logits = |model: &mut RankModel<Cpu>| {
        // The first cut falls into the first sequence, later ones into others; the logits lie in both halves.
        let lengths = [150, 9, 70];
        let mut first_block = 0;
        let mut places = Vec::new();
        for length in lengths {
            let blocks = (2usize * length).div_ceil(BLOCK_TOKENS) as u32;
            places.push((first_block..first_block + blocks).collect::<Vec<u32>>());
            first_block += blocks;
        }
        let mut seen = Vec::new();
        for round in 0..2 {
            let mut batch = StepBatch::default();
            for (length, blocks) in lengths.iter().zip(&places) {
                let tokens: Vec<u32> = (0..*length)
                    .map(|i| ((i * 104_729 + round * 31 + length) % 49_000) as u32)
                    .collect();
                batch.logits_rows.push(batch.tokens.len() as u32);
                push(&mut batch, &tokens, round * length, blocks);
                batch.logits_rows.push(batch.tokens.len() as u32 - 1);
            }
            batch.full_logits = true;
            let rows = model.step(&batch).unwrap().unwrap();
            seen.extend(rows.into_iter().map(|row| row.full.unwrap()));
        }
        seen
    };
    // Alone a rank computes all rows at once; over TCP it halves them.
    let whole = on_ranks(&file, &division(&file, &[1]), Over::Tcp, cpu, last_logits);
    for speeds in [vec![1, 1], vec![2, 1, 1]] {
        let halved = on_ranks(
            &file,
            &division(&file, &speeds),
            Over::Tcp,
            cpu,
            last_logits,
        );
        assert!(whole == halved, "{} ranks", speeds.len());
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
                let model = Model::load(&file, &plan, rank, cpu()).unwrap();
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

/// The rows and columns of a matrix that belong to a shard; `None` for what every rank holds.
fn share(
    weight: Weight,
    shard: &Shard,
    config: &ModelConfig,
) -> Option<(Range<usize>, Range<usize>)> {
    let part = |range: &Range<usize>, width: usize| range.start * width..range.end * width;
    let whole = 0..config.hidden;
    let queries = part(&shard.query_heads, config.head_dim);
    let keys = part(&shard.kv_heads, config.head_dim);
    Some(match weight {
        Weight::Embedding | Weight::Output => (shard.vocab_rows.clone(), whole),
        Weight::OutputNorm => return None,
        Weight::Layer(_, layer) => match layer {
            LayerWeight::AttentionNorm | LayerWeight::FfnNorm => return None,
            LayerWeight::Query => (queries, whole),
            LayerWeight::Key | LayerWeight::Value => (keys, whole),
            LayerWeight::AttentionOutput => (whole, queries),
            LayerWeight::Gate | LayerWeight::Up => (shard.ffn_columns.clone(), whole),
            LayerWeight::Down => (whole, shard.ffn_columns.clone()),
        },
    })
}

/// Where each weight's bytes lie in the file.
fn places<'a>(
    file: &'a ModelFile,
    bytes: &[u8],
    config: &ModelConfig,
) -> Vec<(Weight, Tensor<'a>, usize)> {
    let layers = (0..config.layers).flat_map(|l| LAYER_WEIGHTS.map(|w| Weight::Layer(l, w)));
    let weights = layers.chain([Weight::Embedding, Weight::OutputNorm]);
    let tensors: Vec<_> = weights.map(|w| (w, file.weight(w).unwrap())).collect();
    // All tensors lie in one map, so one that is found in the file gives the places of all.
    let (_, known) = &tensors[0];
    let found = bytes
        .windows(known.data().len())
        .position(|part| part == known.data())
        .unwrap();
    let base = (known.data().as_ptr() as usize).wrapping_sub(found);
    let place = |tensor: &Tensor<'_>| (tensor.data().as_ptr() as usize).wrapping_sub(base);
    tensors
        .into_iter()
        .map(|(weight, tensor)| {
            let at = place(&tensor);
            assert_eq!(&bytes[at..at + tensor.data().len()], tensor.data());
            (weight, tensor, at)
        })
        .collect()
}

/// Writes the file with NaN as the scale of every block that does not belong to `shard`.
fn poison(file: &ModelFile, bytes: &[u8], shard: &Shard, to: &Path) {
    let config = file.config().unwrap();
    let mut out = bytes.to_vec();
    let mut poisoned = 0usize;
    for (weight, tensor, at) in places(file, bytes, &config) {
        let Some((rows, columns)) = share(weight, shard, &config) else {
            continue;
        };
        // The formats of this file; each block of theirs begins with an f16 scale.
        assert!(matches!(tensor.format(), Format::Q4_1 | Format::Q8_0));
        let (block, block_bytes) = (tensor.format().block_len(), tensor.format().block_bytes());
        let blocks = tensor.cols() / block;
        for row in 0..tensor.rows() {
            for column in 0..blocks {
                let first = column * block;
                if rows.contains(&row) && columns.contains(&first) {
                    assert!(columns.contains(&(first + block - 1)), "a block is cut");
                    continue;
                }
                let scale = at + (row * blocks + column) * block_bytes;
                out[scale..scale + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
                poisoned += 1;
            }
        }
    }
    assert!(
        poisoned > 100_000,
        "only {poisoned} blocks are another rank's"
    );
    std::fs::write(to, out).unwrap();
}

#[test]
fn a_rank_touches_no_byte_of_another_ranks_share() {
    let path = smollm2();
    let file = ModelFile::open(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let few = |model: &mut RankModel<Cpu>| answers(model, 0..3);
    for speeds in [vec![1, 1, 1], vec![5, 1]] {
        let plan = division(&file, &speeds);
        let files: Vec<ModelFile> = plan
            .shards
            .iter()
            .enumerate()
            .map(|(rank, shard)| {
                let own = folder.path().join(format!("{}-{rank}.gguf", speeds.len()));
                poison(&file, &bytes, shard, &own);
                ModelFile::open(own).unwrap()
            })
            .collect();
        // The poison is seen by whoever has no business there.
        for rank in 0..files.len() {
            let foreign = &files[(rank + 1) % files.len()];
            let error = Model::load(foreign, &plan, rank, cpu()).err();
            assert!(
                matches!(error, Some(Error::File(FileError::NotFinite { .. }))),
                "rank {rank} loaded another's share: {error:?}"
            );
        }
        // Nothing foreign is loaded, and nothing foreign gets into a single bit of the answers.
        let good = on_ranks(&file, &plan, Over::Tcp, cpu, few);
        assert_eq!(on_ranks_with(&files, &plan, Over::Tcp, cpu, few), good);
    }
}

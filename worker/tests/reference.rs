//! Logits against the transformers reference (tests/reference/make_reference.py), for one rank and for two.

mod support;

use std::path::PathBuf;

use kernels::{BLOCK_TOKENS, Device, KvFormat};
use support::exact::ExactKv;
use support::{Over, cpu, on_ranks, push};
use worker::file::ModelFile;
use worker::model::{RankModel, StepBatch};
use worker::plan::{RankCapacity, plan};

/// What issue 2 asks for, with keys and values in f32 as the reference has them.
const TOLERANCE: f32 = 1e-4;
/// With keys and values in f16, as they are kept in use: rounding to 11 bits, over three layers.
const TOLERANCE_F16: f32 = 5e-3;
/// In int8: a step of 1/127 of the largest of 32 numbers.
const TOLERANCE_INT8: f32 = 5e-2;

fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-tiny")
}

/// Tokens and the logits of the last rows, `[rows][vocab]`.
fn reference() -> (Vec<u32>, Vec<Vec<f32>>) {
    let bytes = std::fs::read(fixture().join("reference.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let data = file.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    };
    let vocab = file.tensor("logits").unwrap().shape()[1];
    let tokens = floats("tokens").into_iter().map(|t| t as u32).collect();
    (
        tokens,
        floats("logits")
            .chunks_exact(vocab)
            .map(<[f32]>::to_vec)
            .collect(),
    )
}

/// A step of `tokens` after `context` positions, in blocks that do not lie in order, asking for the last `wanted` rows.
fn step(tokens: &[u32], context: usize, wanted: usize) -> StepBatch {
    let blocks: Vec<u32> = (0..(context + tokens.len()).div_ceil(BLOCK_TOKENS) as u32)
        .map(|b| b ^ 1)
        .collect();
    let mut batch = StepBatch {
        full_logits: true,
        ..StepBatch::default()
    };
    push(&mut batch, tokens, context, &blocks);
    batch.logits_rows = (tokens.len() - wanted..tokens.len())
        .map(|r| r as u32)
        .collect();
    batch
}

/// Logits of the last `rows` tokens: most of the prompt in one step, the rest one by one.
fn logits<D: Device>(model: &mut RankModel<D>, tokens: &[u32], rows: usize) -> Vec<Vec<f32>> {
    let (prompt, rest) = tokens.split_at(tokens.len() - 4);
    let mut out = model
        .step(&step(prompt, 0, rows - rest.len()))
        .unwrap()
        .unwrap();
    for (i, token) in rest.iter().enumerate() {
        out.extend(
            model
                .step(&step(&[*token], prompt.len() + i, 1))
                .unwrap()
                .unwrap(),
        );
    }
    out.into_iter().map(|c| c.full.unwrap()).collect()
}

/// Logits on `size` ranks of which each computes on a `device`, with keys and values in `format`.
fn on<D: Device>(
    format: KvFormat,
    size: usize,
    over: Over,
    device: impl Fn() -> D + Sync,
) -> Vec<Vec<f32>> {
    let file = ModelFile::open(fixture()).unwrap();
    logits_of(&file, format, size, over, device)
}

fn logits_of<D: Device>(
    file: &ModelFile,
    format: KvFormat,
    size: usize,
    over: Over,
    device: impl Fn() -> D + Sync,
) -> Vec<Vec<f32>> {
    let (tokens, expected) = reference();
    let config = file.config().unwrap();
    assert_eq!(config.group_heads(), 8);
    let capacity = RankCapacity {
        memory_bytes: 1 << 30,
        read_bytes_per_s: 1,
    };
    let plan = plan(&config, &vec![capacity; size], 128, format).unwrap();
    on_ranks(file, &plan, over, device, |model| {
        logits(model, &tokens, expected.len())
    })
}

/// Panics unless `got` is the reference to within `tolerance`.
fn assert_agrees(got: &[Vec<f32>], tolerance: f32) {
    let (_, expected) = reference();
    assert_eq!(got.len(), expected.len());
    let pairs = got.iter().flatten().zip(expected.iter().flatten());
    let difference = pairs.map(|(a, e)| (a - e).abs()).fold(0f32, f32::max);
    println!("largest difference {difference}");
    assert!(
        difference < tolerance,
        "largest difference {difference}, allowed {tolerance}"
    );
}

#[test]
fn logits_agree_with_the_transformers_reference_on_one_rank_and_on_two() {
    let exact = |size, over| on(KvFormat::F16, size, over, || ExactKv(cpu()));
    let one = exact(1, Over::Tcp);
    assert_agrees(&one, TOLERANCE);
    assert_eq!(exact(2, Over::Shm), one, "one rank and two differ");
}

#[test]
fn a_cache_in_either_format_stays_near_the_reference_and_is_the_same_on_two_ranks() {
    for (format, tolerance) in [
        (KvFormat::F16, TOLERANCE_F16),
        (KvFormat::Int8, TOLERANCE_INT8),
    ] {
        let one = on(format, 1, Over::Tcp, cpu);
        assert_agrees(&one, tolerance);
        for over in [Over::Tcp, Over::Shm] {
            assert_eq!(on(format, 2, over, cpu), one, "one rank and two differ");
        }
    }
}

#[test]
fn the_same_model_as_gguf_agrees_too() {
    let folder = ModelFile::open(fixture()).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("llama-tiny.gguf");
    support::convert::to_gguf(&folder, &folder.config().unwrap(), &path);
    let gguf = ModelFile::open(&path).unwrap();
    assert!(gguf.config().unwrap().rope_interleaved);
    assert_agrees(
        &logits_of(&gguf, KvFormat::F16, 1, Over::Tcp, || ExactKv(cpu())),
        TOLERANCE,
    );
}

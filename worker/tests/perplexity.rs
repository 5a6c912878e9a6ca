//! Perplexity of SmolLM2 on the licence's text against llama.cpp's, made by tests/reference/perplexity.py.

mod support;

use std::path::PathBuf;

use kernels::{Cpu, Isa, KvFormat};
use sha2::{Digest, Sha256};
use support::smollm2;
use worker::bench;
use worker::collective::Local;
use worker::file::ModelFile;
use worker::model::RankModel;
use worker::plan::ShardPlan;

/// Positions of a chunk.
const CONTEXT: usize = 512;

// What perplexity.py printed, with the llama.cpp of llama-cpp-python 0.3.36 built natively (AVX2, F16C, FMA, repacked).
const TEXT_SHA256: &str = "d126070e53a97387b339cc1b4c794e9bc134df061d6cb5ab37cef0bfe986228a";
const TOKENS: usize = 3078;
const SUM_OF_IDS: u64 = 14_257_549;
const CHUNKS: usize = 6;
const SCORED: usize = 1530;
const LLAMA_CPP: f64 = 12.681_519_6;
/// What issue 2 asks for.
const TOLERANCE: f64 = 0.005;
/// What keys and values in int8 may change of perplexity (measured: 0.03 %), and how often the likeliest token stays (96.1 %).
const INT8_TOLERANCE: f64 = 0.005;
const INT8_TOP1: f64 = 0.95;

fn licence() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../LICENSE")
}

#[test]
fn perplexity_is_llama_cpps() {
    let text = std::fs::read_to_string(licence()).unwrap();
    let digest: String = Sha256::digest(&text)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(
        digest, TEXT_SHA256,
        "the text is another one: run tests/reference/perplexity.py again"
    );
    let file = ModelFile::open(smollm2()).unwrap();
    let tokenizer = worker::text::load(&file).unwrap().tokenizer;
    let tokens = tokenizer.encode_prompt(&text).unwrap();
    let sum: u64 = tokens.iter().map(|&id| u64::from(id)).sum();
    assert_eq!((tokens.len(), sum), (TOKENS, SUM_OF_IDS));

    let plan = ShardPlan::whole(&file.config().unwrap(), CONTEXT).unwrap();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let device = Cpu::new(threads, Isa::detect());
    let mut rank = RankModel::load(&file, &plan, Box::new(Local::default()), device).unwrap();
    let bos = tokenizer.bos().filter(|bos| tokens.first() == Some(bos));
    let ours = bench::perplexity(&mut rank, &tokens, CONTEXT, bos).unwrap();
    assert_eq!((ours.chunks, ours.scored), (CHUNKS, SCORED));
    let apart = ours.value / LLAMA_CPP - 1.0;
    println!(
        "{} against {LLAMA_CPP}, {:+.3} %",
        ours.value,
        apart * 100.0
    );
    assert!(
        apart.abs() < TOLERANCE,
        "perplexity {}, llama.cpp has {LLAMA_CPP}",
        ours.value
    );
}

#[test]
fn keys_and_values_in_int8_predict_nearly_as_well_as_in_f16() {
    let measured = bench::kv_formats(&bench::FormatOptions {
        model: smollm2(),
        text: licence(),
        ranks: 1,
        threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        context: CONTEXT,
        chunks: CHUNKS,
    })
    .unwrap();
    let int8 = measured.iter().find(|one| one.format == KvFormat::Int8);
    let int8 = int8.unwrap();
    assert_eq!(int8.perplexity.scored, SCORED);
    let change = int8.perplexity_ratio - 1.0;
    println!(
        "perplexity {:.4}, {:+.3} % against f16, {:.2} % the same likeliest token",
        int8.perplexity.value,
        100.0 * change,
        100.0 * int8.top1_agreement
    );
    assert!(change.abs() < INT8_TOLERANCE, "{int8:?}");
    assert!(int8.top1_agreement > INT8_TOP1, "{int8:?}");
    assert!(int8.perplexity != measured[0].perplexity, "both are f16");
}

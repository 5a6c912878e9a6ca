//! Sampling from candidates, and German text to tokens and back.

use std::path::Path;

use divan::Bencher;
use divan::counter::BytesCount;
use worker::client::Sampling;
use worker::file::ModelFile;
use worker::sampling::Sampler;
use worker::text::{self, Tokenizer};

/// Candidates as the ranks hand them in: with logits that fall as they do in a language model.
fn candidates(count: u32) -> Vec<(u32, f32)> {
    (0..count)
        .map(|i| {
            (
                i.wrapping_mul(7919) % 128_256,
                20.0 - 2.0 * (1.0 + i as f32).ln(),
            )
        })
        .collect()
}

#[divan::bench(args = [64, 1024, 128_256])]
fn sample(bencher: Bencher, count: u32) {
    let sampling = Sampling {
        temperature: 0.8,
        top_p: 0.95,
        ..Sampling::default()
    };
    let sampler = Sampler::new(&sampling, 7, &[]);
    let candidates = candidates(count);
    let mut position = 0;
    bencher.bench_local(|| {
        position += 1;
        sampler.sample(position, &candidates)
    });
}

#[divan::bench(args = [64, 128_256])]
fn sample_greedy(bencher: Bencher, count: u32) {
    let sampler = Sampler::new(&Sampling::greedy(), 7, &[]);
    let candidates = candidates(count);
    bencher.bench_local(|| sampler.sample(1, &candidates));
}

/// The tokenizer of a model under `VERBUND_MODELS`; `None`, and a word about it, where the model is not there.
fn tokenizer(file: &str) -> Option<Tokenizer> {
    let folder = std::env::var("VERBUND_MODELS").unwrap_or_default();
    let found = ModelFile::open(Path::new(&folder).join(file))
        .map_err(|e| e.to_string())
        .and_then(|model| text::load(&model).map_err(|e| e.to_string()));
    match found {
        Ok(side) => Some(side.tokenizer),
        Err(why) => {
            eprintln!("left out: {why}");
            None
        }
    }
}

const SENTENCE: &str = "Der Antrag auf Erteilung einer Baugenehmigung ist gemäß § 68 der Bauordnung \
    schriftlich bei der unteren Bauaufsichtsbehörde einzureichen; Gebühren in Höhe von 1.250,00 € fallen an. ";

/// Bytes are those of the text.
#[divan::bench(args = ["SmolLM2-135M-Instruct.Q4_1.gguf", "ggml-vocab-llama-bpe.gguf"])]
fn encode(bencher: Bencher, file: &str) {
    let Some(tokenizer) = tokenizer(file) else {
        return;
    };
    let text = SENTENCE.repeat(100);
    bencher
        .counter(BytesCount::new(text.len()))
        .bench_local(|| tokenizer.encode_prompt(&text).map(|ids| ids.len()).ok());
}

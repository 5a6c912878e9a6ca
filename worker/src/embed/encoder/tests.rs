use kernels::quantize_row;

use super::super::gguf::{self, Tensor, Value};
use super::*;

const HIDDEN: usize = 32;
const CONTEXT: usize = 8;

/// An encoder of one layer, whose tensors `change` may spoil.
fn tiny(change: impl Fn(&str, &mut Vec<u8>)) -> (tempfile::TempDir, ModelFile) {
    let pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁b"].map(String::from);
    let metadata = [
        ("general.architecture", Value::String("bert")),
        ("bert.block_count", Value::U32(1)),
        ("bert.context_length", Value::U32(CONTEXT as u32)),
        ("bert.embedding_length", Value::U32(HIDDEN as u32)),
        ("bert.feed_forward_length", Value::U32(HIDDEN as u32)),
        ("bert.attention.head_count", Value::U32(2)),
        ("tokenizer.ggml.model", Value::String("t5")),
        ("tokenizer.ggml.tokens", Value::Strings(&pieces)),
        ("tokenizer.ggml.scores", Value::F32s(&[0.0; 6])),
        (
            "tokenizer.ggml.token_type",
            Value::I32s(&[3, 3, 3, 2, 1, 1]),
        ),
        ("tokenizer.ggml.bos_token_id", Value::U32(0)),
        ("tokenizer.ggml.padding_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
        ("tokenizer.ggml.unknown_token_id", Value::U32(3)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        ("tokenizer.ggml.add_eos_token", Value::Bool(true)),
        ("tokenizer.ggml.add_space_prefix", Value::Bool(true)),
    ];
    let mut shapes = vec![
        ("token_embd.weight".to_owned(), pieces.len(), HIDDEN),
        ("position_embd.weight".to_owned(), CONTEXT, HIDDEN),
        ("token_types.weight".to_owned(), 1, HIDDEN),
    ];
    let vector = |name: &str| (name.to_owned(), 0, HIDDEN);
    for name in [
        "token_embd_norm",
        "blk.0.attn_output_norm",
        "blk.0.layer_output_norm",
    ] {
        shapes.extend([
            vector(&format!("{name}.weight")),
            vector(&format!("{name}.bias")),
        ]);
    }
    for part in [
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_up",
        "ffn_down",
    ] {
        shapes.push((format!("blk.0.{part}.weight"), HIDDEN, HIDDEN));
        shapes.push(vector(&format!("blk.0.{part}.bias")));
    }
    let data: Vec<(Format, Vec<u8>)> = shapes
        .iter()
        .map(|(name, rows, cols)| {
            let quantised = *rows > 1 && name != "position_embd.weight";
            let format = if quantised { Format::Q4_0 } else { Format::F32 };
            let mut bytes = Vec::new();
            for row in 0..(*rows).max(1) {
                let x: Vec<f32> = (0..*cols)
                    .map(|i| ((row * 31 + i * 17 + name.len()) as f32).sin())
                    .collect();
                quantize_row(format, &x, &mut bytes).unwrap();
            }
            change(name, &mut bytes);
            (format, bytes)
        })
        .collect();
    let tensors: Vec<Tensor<'_>> = shapes
        .iter()
        .zip(&data)
        .map(|((name, rows, cols), (format, data))| Tensor {
            name: name.clone(),
            shape: if *rows == 0 {
                vec![*cols]
            } else {
                vec![*rows, *cols]
            },
            ggml_type: format.ggml_type(),
            data,
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    let mut out = Vec::new();
    gguf::write(&mut out, &metadata, &tensors).unwrap();
    std::fs::write(&path, out).unwrap();
    let file = ModelFile::open(&path).unwrap();
    (dir, file)
}

const INFINITE_F16: [u8; 2] = [0x00, 0x7c];

#[test]
fn vectors_have_length_one_and_do_not_depend_on_their_company() {
    let (_dir, file) = tiny(|_, _| ());
    let embedder = Embedder::load(&file, 2).unwrap();
    let texts = ["a b", "", "b a b a b a b a b a", "a"];
    let (together, tokens) = embedder.embed(&texts, EmbedKind::Raw).unwrap();
    let mut alone_tokens = 0;
    for (text, vector) in texts.iter().zip(&together) {
        let (alone, count) = embedder.embed(&[text], EmbedKind::Raw).unwrap();
        alone_tokens += count;
        assert_eq!(alone[0], *vector, "{text:?}");
        let length: f32 = vector.iter().map(|v| v * v).sum();
        assert!((length - 1.0).abs() < 1e-5, "{text:?}: {length}");
    }
    assert_eq!(tokens, alone_tokens);
    assert_ne!(together[0], together[3]);
}

#[test]
fn a_matrix_with_an_infinite_scale_is_refused_when_loaded() {
    for part in ["attn_q", "attn_output", "ffn_down"] {
        let spoilt = format!("blk.0.{part}.weight");
        let (_dir, file) = tiny(|name, bytes| {
            if name == spoilt {
                bytes[18..20].copy_from_slice(&INFINITE_F16);
            }
        });
        let error = Embedder::load(&file, 1).err();
        assert!(
            matches!(&error, Some(Error::File(crate::file::Error::NotFinite { tensor, row: 1, .. })) if *tensor == spoilt),
            "{error:?}"
        );
    }
}

#[test]
fn a_text_whose_vector_is_not_finite_is_an_error_and_others_are_not() {
    // The table of words is read from the file as it is asked for; only "b" is spoilt.
    let (_dir, file) = tiny(|name, bytes| {
        if name == "token_embd.weight" {
            bytes[5 * 18..5 * 18 + 2].copy_from_slice(&INFINITE_F16);
        }
    });
    let embedder = Embedder::load(&file, 1).unwrap();
    assert!(embedder.embed(&["a"], EmbedKind::Raw).is_ok());
    let error = embedder.embed(&["a", "b"], EmbedKind::Raw).err();
    assert!(matches!(error, Some(Error::Model { .. })), "{error:?}");
}

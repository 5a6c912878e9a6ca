//! Turns the tiny Llama's folder into GGUF as llama.cpp's converter does: its names, q and k rows permuted so that rotary pairs are
//! neighbours, rope scaling as a tensor of divisors.

use std::path::Path;

use worker::file::{LAYER_WEIGHTS, LayerWeight, ModelConfig, ModelFile, RopeScaling, Weight};

/// Writes `file` as GGUF with f32 tensors.
pub fn to_gguf(file: &ModelFile, config: &ModelConfig, path: &Path) {
    let mut weights = vec![
        ("token_embd.weight".to_owned(), Weight::Embedding),
        ("output.weight".to_owned(), Weight::Output),
        ("output_norm.weight".to_owned(), Weight::OutputNorm),
    ];
    let parts = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ];
    for layer in 0..config.layers {
        for (part, weight) in parts.iter().zip(LAYER_WEIGHTS) {
            weights.push((
                format!("blk.{layer}.{part}.weight"),
                Weight::Layer(layer, weight),
            ));
        }
    }
    let mut out = Gguf::default();
    let numbers = [
        ("llama.block_count", config.layers),
        ("llama.context_length", config.context_tokens),
        ("llama.embedding_length", config.hidden),
        ("llama.feed_forward_length", config.ffn),
        ("llama.attention.head_count", config.heads),
        ("llama.attention.head_count_kv", config.kv_heads),
        ("llama.attention.key_length", config.head_dim),
        ("llama.rope.dimension_count", config.head_dim),
    ];
    out.value(
        "general.architecture",
        8,
        &[&5u64.to_le_bytes()[..], b"llama"].concat(),
    );
    for (key, number) in numbers {
        out.value(key, 4, &(number as u32).to_le_bytes());
    }
    out.value(
        "llama.attention.layer_norm_rms_epsilon",
        6,
        &config.eps.to_le_bytes(),
    );
    out.value("llama.rope.freq_base", 6, &config.rope_theta.to_le_bytes());
    for (name, weight) in weights {
        let tensor = file.weight(weight).unwrap();
        let values = tensor.to_f32().unwrap();
        let values = match weight {
            Weight::Layer(_, LayerWeight::Query | LayerWeight::Key) => {
                permute(&values, config.head_dim, tensor.cols())
            }
            _ => values,
        };
        out.tensor(&name, tensor.shape(), &values);
    }
    out.tensor(
        "rope_freqs.weight",
        &[config.head_dim / 2],
        &divisors(config),
    );
    std::fs::write(path, out.bytes()).unwrap();
}

/// Row `j * half + i` of each head becomes row `2 * i + j`.
fn permute(values: &[f32], head_dim: usize, cols: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let heads = values.chunks_exact(head_dim * cols);
    let row = |head: &[f32], row: usize| head[row * cols..(row + 1) * cols].to_vec();
    heads
        .flat_map(|head| (0..head_dim).flat_map(move |new| row(head, new % 2 * half + new / 2)))
        .collect()
}

/// What each rotary frequency is divided by.
fn divisors(config: &ModelConfig) -> Vec<f32> {
    let Some(RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_context,
    }) = config.rope_scaling
    else {
        panic!("the fixture has Llama 3's scaling");
    };
    let half = config.head_dim / 2;
    let wavelength =
        |i: usize| 2.0 * std::f32::consts::PI * config.rope_theta.powf(i as f32 / half as f32);
    let divisor = |wavelength: f32| {
        if wavelength < original_context / high_freq_factor {
            1.0
        } else if wavelength > original_context / low_freq_factor {
            factor
        } else {
            let smooth = (original_context / wavelength - low_freq_factor)
                / (high_freq_factor - low_freq_factor);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..half).map(|i| divisor(wavelength(i))).collect()
}

#[derive(Default)]
struct Gguf {
    values: (u64, Vec<u8>),
    tensors: (u64, Vec<u8>),
    data: Vec<u8>,
}

impl Gguf {
    fn value(&mut self, key: &str, kind: u32, bytes: &[u8]) {
        self.values.0 += 1;
        let entry = [
            &(key.len() as u64).to_le_bytes()[..],
            key.as_bytes(),
            &kind.to_le_bytes(),
            bytes,
        ]
        .concat();
        self.values.1.extend_from_slice(&entry);
    }

    fn tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.tensors.0 += 1;
        let out = &mut self.tensors.1;
        out.extend_from_slice(&[&(name.len() as u64).to_le_bytes()[..], name.as_bytes()].concat());
        out.extend_from_slice(&(shape.len() as u32).to_le_bytes());
        for &length in shape.iter().rev() {
            out.extend_from_slice(&(length as u64).to_le_bytes());
        }
        out.extend_from_slice(&0u32.to_le_bytes());
        out.extend_from_slice(&(self.data.len() as u64).to_le_bytes());
        self.data
            .extend(values.iter().flat_map(|v| v.to_le_bytes()));
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    fn bytes(&self) -> Vec<u8> {
        let counts = [self.tensors.0.to_le_bytes(), self.values.0.to_le_bytes()].concat();
        let mut out = [
            b"GGUF\x03\0\0\0".as_slice(),
            &counts,
            &self.values.1,
            &self.tensors.1,
        ]
        .concat();
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend_from_slice(&self.data);
        out
    }
}

//! The llama configuration of a model file, from GGUF metadata or `config.json`, checked against the tensors.

use kernels::KvFormat;
use serde::{Deserialize, Serialize};

use super::weights::{LAYER_WEIGHTS, LayerWeight, Weight, name};
use super::{Dialect, Error, ModelFile, Tensor};

/// Upper bounds that no llama comes near; they keep arithmetic on hostile numbers far from overflow.
const MAX_LAYERS: usize = 1024;
const MAX_WIDTH: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
const MAX_CONTEXT: usize = 1 << 24;
/// Hugging Face's default where `config.json` is silent.
const DEFAULT_ROPE_THETA: f32 = 10_000.0;

/// How rotary frequencies are stretched beyond the context a model was first trained with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RopeScaling {
    /// All frequencies divided by one number.
    Linear { factor: f32 },
    /// Llama 3.1 and later: long waves divided by `factor`, short ones kept, smooth in between.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_context: f32,
    },
    /// A divisor per frequency, `[head_dim / 2]`: what llama.cpp's converter stores for Llama 3.
    Divisors(Vec<f32>),
}

/// Bytes that the units of a shard take in the file, summed over the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WeightSizes {
    /// Rows of q, k, v and columns of the output projection that belong to one KV head.
    pub kv_head_bytes: u64,
    /// One row of gate and up and one column of down, times `ffn_block`.
    pub ffn_block_bytes: u64,
    /// Fewest ffn columns that can be cut off: one quantisation block of the down projection.
    pub ffn_block: usize,
    /// Fewest KV heads that can be cut off so that the output projection splits between quantisation blocks.
    pub kv_head_block: usize,
    /// One row of the output matrix, and of the embedding where it is a matrix of its own.
    pub vocab_row_bytes: u64,
    /// What every rank holds: the norms.
    pub replicated_bytes: u64,
}

/// Shape of a llama. All widths are in elements.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    pub name: String,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    pub vocab: usize,
    /// Added under the root of RMSNorm.
    pub eps: f32,
    pub rope_theta: f32,
    pub rope_scaling: Option<RopeScaling>,
    /// Whether rotary pairs are neighbours (GGUF) or half a head apart (safetensors).
    pub rope_interleaved: bool,
    /// Whether the output matrix is the embedding.
    pub tied_embeddings: bool,
    /// Longest context the model was made for.
    pub context_tokens: usize,
    pub sizes: WeightSizes,
}

impl ModelConfig {
    /// Query heads that share one KV head.
    pub fn group_heads(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// KV-cache bytes of one block in one KV head, over all layers, keys and values.
    pub fn kv_head_block_bytes(&self, format: KvFormat) -> u64 {
        (self.layers * format.head_block_bytes(self.head_dim)) as u64
    }

    /// Rotary frequencies, `[head_dim / 2]`, scaling applied. Computed as the transformers reference does, in f32.
    pub fn inv_freq(&self) -> Vec<f32> {
        let half = self.head_dim / 2;
        let base =
            (0..half).map(|i| 1.0 / self.rope_theta.powf((2 * i) as f32 / self.head_dim as f32));
        match &self.rope_scaling {
            None => base.collect(),
            Some(RopeScaling::Linear { factor }) => base.map(|f| f / factor).collect(),
            Some(RopeScaling::Divisors(divisors)) => {
                base.zip(divisors).map(|(f, d)| f / d).collect()
            }
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            }) => base
                .map(|f| {
                    let wavelength = 2.0 * std::f32::consts::PI / f;
                    if wavelength < original_context / high_freq_factor {
                        f
                    } else if wavelength > original_context / low_freq_factor {
                        f / factor
                    } else {
                        let smooth = (original_context / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
        }
    }
}

/// Reads and checks the configuration.
pub(super) fn read(file: &ModelFile) -> Result<ModelConfig, Error> {
    let mut config = match file.dialect() {
        Dialect::Gguf => from_gguf(file)?,
        Dialect::Safetensors => from_hf(file)?,
    };
    check_numbers(file, &config)?;
    config.sizes = check_tensors(file, &config)?;
    Ok(config)
}

fn from_gguf(file: &ModelFile) -> Result<ModelConfig, Error> {
    let meta = file.metadata();
    let architecture = meta.str("general.architecture").unwrap_or("none");
    if architecture != "llama" {
        return Err(invalid(
            file,
            "general.architecture",
            "llama",
            architecture,
            "choose a model of the Llama architecture",
        ));
    }
    let number = |key: &str| {
        let key = format!("llama.{key}");
        meta.u64(&key).map(clamp).ok_or_else(|| Error::Missing {
            path: file.path().into(),
            what: format!("metadata {key}"),
        })
    };
    let heads = number("attention.head_count")?;
    let hidden = number("embedding_length")?;
    let head_dim = number("attention.key_length").unwrap_or(hidden / heads.max(1));
    let rope_dim = number("rope.dimension_count").unwrap_or(head_dim);
    if rope_dim != head_dim {
        return Err(unsupported(
            file,
            "llama.rope.dimension_count",
            &head_dim.to_string(),
            &rope_dim.to_string(),
        ));
    }
    let embedding = file.weight(Weight::Embedding)?;
    let scaling_kind = meta.str("llama.rope.scaling.type").unwrap_or("none");
    let rope_scaling = match (file.tensor("rope_freqs.weight"), scaling_kind) {
        (Some(divisors), _) => Some(RopeScaling::Divisors(divisors.to_f32()?)),
        (None, "none") => None,
        (None, "linear") => meta
            .f32("llama.rope.scaling.factor")
            .map(|factor| RopeScaling::Linear { factor }),
        (None, other) => {
            return Err(unsupported(
                file,
                "llama.rope.scaling.type",
                "none, linear or a rope_freqs.weight tensor",
                other,
            ));
        }
    };
    if let Some(experts) = meta.u64("llama.expert_count").filter(|&n| n > 0) {
        return Err(unsupported(
            file,
            "llama.expert_count",
            "0",
            &experts.to_string(),
        ));
    }
    Ok(ModelConfig {
        name: meta.str("general.name").unwrap_or_default().to_owned(),
        layers: number("block_count")?,
        hidden,
        heads,
        kv_heads: number("attention.head_count_kv").unwrap_or(heads),
        head_dim,
        ffn: number("feed_forward_length")?,
        vocab: embedding.rows(),
        eps: meta
            .f32("llama.attention.layer_norm_rms_epsilon")
            .unwrap_or(1e-5),
        rope_theta: meta
            .f32("llama.rope.freq_base")
            .unwrap_or(DEFAULT_ROPE_THETA),
        rope_scaling,
        rope_interleaved: true,
        tied_embeddings: file.tensor("output.weight").is_none(),
        context_tokens: number("context_length")?,
        sizes: WeightSizes::default(),
    })
}

fn from_hf(file: &ModelFile) -> Result<ModelConfig, Error> {
    let none = serde_json::Value::Null;
    let json = file.hf_config().unwrap_or(&none);
    let kind = json
        .get("model_type")
        .and_then(|v| v.as_str())
        .unwrap_or("none");
    if kind != "llama" {
        return Err(invalid(
            file,
            "config.json: model_type",
            "llama",
            kind,
            "choose a model of the Llama architecture",
        ));
    }
    for bias in ["attention_bias", "mlp_bias"] {
        if json.get(bias).and_then(|v| v.as_bool()) == Some(true) {
            return Err(unsupported(
                file,
                &format!("config.json: {bias}"),
                "false",
                "true",
            ));
        }
    }
    let get = |key: &str| json.get(key).and_then(|v| v.as_u64()).map(clamp);
    let number = |key: &str| {
        get(key).ok_or_else(|| Error::Missing {
            path: file.path().into(),
            what: format!("config.json: {key}"),
        })
    };
    let heads = number("num_attention_heads")?;
    let hidden = number("hidden_size")?;
    let has_output = file
        .tensor(&name(Dialect::Safetensors, Weight::Output))
        .is_some();
    let tied = json
        .get("tie_word_embeddings")
        .and_then(|v| v.as_bool())
        .unwrap_or(false);
    if !has_output && !tied {
        return Err(Error::Missing {
            path: file.path().into(),
            what: "tensor lm_head.weight".into(),
        });
    }
    // Newer transformers write both under `rope_parameters`, older ones apart.
    let rope = json.get("rope_parameters").filter(|v| v.is_object());
    let theta = rope
        .and_then(|r| r.get("rope_theta"))
        .or(json.get("rope_theta"))
        .and_then(|v| v.as_f64());
    Ok(ModelConfig {
        name: json
            .get("_name_or_path")
            .and_then(|v| v.as_str())
            .unwrap_or_default()
            .to_owned(),
        layers: number("num_hidden_layers")?,
        hidden,
        heads,
        kv_heads: get("num_key_value_heads").unwrap_or(heads),
        head_dim: get("head_dim").unwrap_or(hidden / heads.max(1)),
        ffn: number("intermediate_size")?,
        vocab: number("vocab_size")?,
        eps: json
            .get("rms_norm_eps")
            .and_then(|v| v.as_f64())
            .unwrap_or(1e-6) as f32,
        rope_theta: theta.map_or(DEFAULT_ROPE_THETA, |v| v as f32),
        rope_scaling: hf_scaling(file, rope.or(json.get("rope_scaling")))?,
        rope_interleaved: false,
        tied_embeddings: tied,
        context_tokens: number("max_position_embeddings")?,
        sizes: WeightSizes::default(),
    })
}

fn hf_scaling(
    file: &ModelFile,
    json: Option<&serde_json::Value>,
) -> Result<Option<RopeScaling>, Error> {
    let Some(json) = json.filter(|v| v.is_object()) else {
        return Ok(None);
    };
    let kind = json
        .get("rope_type")
        .or(json.get("type"))
        .and_then(|v| v.as_str())
        .unwrap_or("default");
    let number = |key: &str| {
        let missing = || Error::Missing {
            path: file.path().into(),
            what: format!("config.json: rope_scaling.{key}"),
        };
        json.get(key)
            .and_then(|v| v.as_f64())
            .map(|v| v as f32)
            .ok_or_else(missing)
    };
    match kind {
        "default" => Ok(None),
        "linear" => Ok(Some(RopeScaling::Linear {
            factor: number("factor")?,
        })),
        "llama3" => Ok(Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: number("original_max_position_embeddings")?,
        })),
        other => Err(unsupported(
            file,
            "config.json: rope_scaling.rope_type",
            "default, linear or llama3",
            other,
        )),
    }
}

/// Bounds on every number, before any of them is multiplied.
fn check_numbers(file: &ModelFile, c: &ModelConfig) -> Result<(), Error> {
    let bounds = [
        ("layers", c.layers, MAX_LAYERS),
        ("hidden width", c.hidden, MAX_WIDTH),
        ("query heads", c.heads, MAX_WIDTH),
        ("KV heads", c.kv_heads, MAX_WIDTH),
        ("head width", c.head_dim, MAX_WIDTH),
        ("feed-forward width", c.ffn, MAX_WIDTH),
        ("vocabulary", c.vocab, MAX_VOCAB),
        ("context", c.context_tokens, MAX_CONTEXT),
    ];
    for (what, got, max) in bounds {
        if !(1..=max).contains(&got) {
            return Err(damaged(
                file,
                what,
                &format!("1 to {max}"),
                &got.to_string(),
            ));
        }
    }
    if !c.heads.is_multiple_of(c.kv_heads) {
        return Err(damaged(
            file,
            "query heads",
            &format!("a multiple of the {} KV heads", c.kv_heads),
            &c.heads.to_string(),
        ));
    }
    if !c.head_dim.is_multiple_of(2) || c.heads.saturating_mul(c.head_dim) > MAX_WIDTH {
        return Err(damaged(
            file,
            "head width",
            &format!("an even width, at most {MAX_WIDTH} over all heads"),
            &c.head_dim.to_string(),
        ));
    }
    let positive = |what: &str, v: f32| {
        if v.is_finite() && v > 0.0 {
            Ok(())
        } else {
            Err(damaged(file, what, "a number above 0", &v.to_string()))
        }
    };
    positive("RMSNorm epsilon", c.eps)?;
    positive("rope theta", c.rope_theta)?;
    match &c.rope_scaling {
        None => {}
        Some(RopeScaling::Linear { factor }) => positive("rope factor", *factor)?,
        Some(RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context,
        }) => {
            for (what, v) in [
                ("rope factor", factor),
                ("rope low_freq_factor", low_freq_factor),
                ("rope original context", original_context),
            ] {
                positive(what, *v)?;
            }
            positive(
                "rope high_freq_factor minus low_freq_factor",
                high_freq_factor - low_freq_factor,
            )?;
        }
        Some(RopeScaling::Divisors(divisors)) => {
            if divisors.len() != c.head_dim / 2 {
                return Err(damaged(
                    file,
                    "length of rope_freqs.weight",
                    &(c.head_dim / 2).to_string(),
                    &divisors.len().to_string(),
                ));
            }
            divisors
                .iter()
                .try_for_each(|&d| positive("rope_freqs.weight", d))?;
        }
    }
    Ok(())
}

/// Every weight is there with its shape; sums up the sizes.
fn check_tensors(file: &ModelFile, c: &ModelConfig) -> Result<WeightSizes, Error> {
    let check = |weight: Weight, shape: &[usize]| {
        let tensor = file.weight(weight)?;
        if tensor.shape() == shape {
            Ok(tensor)
        } else {
            Err(Error::Shape {
                path: file.path().into(),
                tensor: tensor.name().into(),
                expected: shape.into(),
                got: tensor.shape().into(),
            })
        }
    };
    let (q, kv) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
    let group_columns = c.group_heads() * c.head_dim;
    let embedding = check(Weight::Embedding, &[c.vocab, c.hidden])?;
    let output = check(Weight::Output, &[c.vocab, c.hidden])?;
    let norm = check(Weight::OutputNorm, &[c.hidden])?;
    let row_bytes = |t: &Tensor<'_>| t.format().row_bytes(t.cols()) as u64;
    let mut sizes = WeightSizes {
        ffn_block: 1,
        kv_head_block: 1,
        replicated_bytes: norm.data().len() as u64,
        ..WeightSizes::default()
    };
    sizes.vocab_row_bytes = row_bytes(&output)
        + if c.tied_embeddings {
            0
        } else {
            row_bytes(&embedding)
        };
    // Bits, not bytes, because one column of a block format is a fraction of a byte.
    let mut kv_head_bits = 0u64;
    let mut ffn_column_bits = 0u64;
    for layer in 0..c.layers {
        for weight in LAYER_WEIGHTS {
            let (rows, cols) = match weight {
                LayerWeight::AttentionNorm | LayerWeight::FfnNorm => {
                    sizes.replicated_bytes += check(Weight::Layer(layer, weight), &[c.hidden])?
                        .data()
                        .len() as u64;
                    continue;
                }
                LayerWeight::Query => (q, c.hidden),
                LayerWeight::Key | LayerWeight::Value => (kv, c.hidden),
                LayerWeight::AttentionOutput => (c.hidden, q),
                LayerWeight::Gate | LayerWeight::Up => (c.ffn, c.hidden),
                LayerWeight::Down => (c.hidden, c.ffn),
            };
            let tensor = check(Weight::Layer(layer, weight), &[rows, cols])?;
            let bits = tensor.data().len() as u64 * 8;
            let block = tensor.format().block_len();
            match weight {
                LayerWeight::AttentionOutput => {
                    kv_head_bits += bits / c.kv_heads as u64;
                    sizes.kv_head_block =
                        lcm(sizes.kv_head_block, block / gcd(block, group_columns));
                }
                LayerWeight::Down => {
                    ffn_column_bits += bits / c.ffn as u64;
                    sizes.ffn_block = lcm(sizes.ffn_block, block);
                }
                LayerWeight::Gate | LayerWeight::Up => ffn_column_bits += bits / c.ffn as u64,
                _ => kv_head_bits += bits / c.kv_heads as u64,
            }
        }
    }
    if file.dialect() == Dialect::Gguf && file.tensor("blk.0.attn_q.bias").is_some() {
        return Err(unsupported(
            file,
            "blk.0.attn_q.bias",
            "no biases",
            "a bias",
        ));
    }
    sizes.kv_head_bytes = kv_head_bits.div_ceil(8);
    sizes.ffn_block_bytes = (ffn_column_bits * sizes.ffn_block as u64).div_ceil(8);
    Ok(sizes)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn lcm(a: usize, b: usize) -> usize {
    a / gcd(a, b) * b
}

/// A number too large for a usize is too large for every bound.
fn clamp(v: u64) -> usize {
    usize::try_from(v).unwrap_or(usize::MAX)
}

fn invalid(file: &ModelFile, what: &str, expected: &str, got: &str, remedy: &'static str) -> Error {
    Error::Invalid {
        path: file.path().into(),
        what: what.into(),
        expected: expected.into(),
        got: got.into(),
        remedy,
    }
}

fn unsupported(file: &ModelFile, what: &str, expected: &str, got: &str) -> Error {
    invalid(
        file,
        what,
        expected,
        got,
        "this version does not compute such models; choose another",
    )
}

fn damaged(file: &ModelFile, what: &str, expected: &str, got: &str) -> Error {
    invalid(
        file,
        what,
        expected,
        got,
        "the file is damaged; fetch or convert it again",
    )
}

//! Model files of random weights in the shape of real models: as fast and as slow as those, free to make anywhere.
//!
//! Belongs here: which tensors such a file has, in which format. [`blocks`] draws the weights, [`gguf`] writes the file.
//!
//! The formats of the tensors follow llama.cpp's quantiser (`llama_tensor_get_type`), so that a Q4_K_M file has the same
//! mixture of Q4_K and Q6_K as a real one. Tokens that are no whole UTF-8 text and special tokens get an output row near
//! zero: answers are nonsense, but readable nonsense that ends only when it is long enough.

mod blocks;
mod gguf;

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use kernels::Format;
use worker::file::ModelFile;

use blocks::Draw;
use gguf::{Header, Value};

/// A model's dimensions, in elements.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    /// Whether the output matrix is the embedding.
    pub tied: bool,
    /// By how much Llama 3's rope scaling divides long waves.
    pub rope_factor: f32,
}

/// Shapes that can be asked for by name.
pub const SHAPES: [Shape; 3] = [
    // For tests of everything but speed.
    Shape {
        name: "tiny",
        layers: 2,
        hidden: 256,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        ffn: 512,
        tied: true,
        rope_factor: 32.0,
    },
    // Llama 3.2 1B
    Shape {
        name: "1b",
        layers: 16,
        hidden: 2048,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        ffn: 8192,
        tied: true,
        rope_factor: 32.0,
    },
    // Llama 3.1 8B
    Shape {
        name: "8b",
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        ffn: 14336,
        tied: false,
        rope_factor: 8.0,
    },
];

/// Quantisation of a whole file, by llama.cpp's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mixture {
    Q4_0,
    Q4KM,
    Q8_0,
}

impl Mixture {
    /// Every mixture.
    pub const ALL: [Mixture; 3] = [Mixture::Q4_0, Mixture::Q4KM, Mixture::Q8_0];

    /// What llama.cpp calls it.
    pub fn name(self) -> &'static str {
        match self {
            Mixture::Q4_0 => "Q4_0",
            Mixture::Q4KM => "Q4_K_M",
            Mixture::Q8_0 => "Q8_0",
        }
    }

    /// Its number in `general.file_type`.
    fn file_type(self) -> u32 {
        match self {
            Mixture::Q4_0 => 2,
            Mixture::Q8_0 => 7,
            Mixture::Q4KM => 15,
        }
    }

    /// The format of most tensors.
    fn base(self) -> Format {
        match self {
            Mixture::Q4_0 => Format::Q4_0,
            Mixture::Q4KM => Format::Q4_K,
            Mixture::Q8_0 => Format::Q8_0,
        }
    }

    /// The output matrix, also where it is the embedding: six bits unless the file has eight.
    fn output(self) -> Format {
        match self {
            Mixture::Q8_0 => Format::Q8_0,
            _ => Format::Q6_K,
        }
    }

    /// Value and down projections: more bits in the first and last eighth of the layers and every third between.
    fn sensitive(self, layer: usize, layers: usize) -> Format {
        let eighth = layers / 8;
        let more = layer < eighth
            || layer >= 7 * layers / 8
            || layer.checked_sub(eighth).is_some_and(|l| l % 3 == 2);
        match self {
            Mixture::Q4KM if more => Format::Q6_K,
            _ => self.base(),
        }
    }
}

/// A shape in a mixture, as in `1b:Q4_K_M`.
#[derive(Debug, Clone, Copy)]
pub struct Recipe {
    pub shape: Shape,
    pub mixture: Mixture,
}

impl std::str::FromStr for Recipe {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let find = || {
            let (shape, mixture) = text.split_once(':')?;
            Some(Recipe {
                shape: *SHAPES.iter().find(|s| s.name.eq_ignore_ascii_case(shape))?,
                mixture: *Mixture::ALL
                    .iter()
                    .find(|m| m.name().eq_ignore_ascii_case(mixture))?,
            })
        };
        find().with_context(|| {
            format!(
                "unknown model {text}; expected SHAPE:FORMAT with one of {:?} and one of {:?}",
                SHAPES.map(|s| s.name),
                Mixture::ALL.map(Mixture::name)
            )
        })
    }
}

impl Recipe {
    /// The file's name.
    pub fn file_name(&self) -> String {
        format!(
            "llama-{}-shape.{}.gguf",
            self.shape.name,
            self.mixture.name()
        )
    }

    /// Writes the model to `path` with the tokenizer of the GGUF file `vocabulary` and, if given, a chat template. The same
    /// seed gives the same bytes. Written beside and moved in place, so that a file of that name is always whole.
    pub fn write(
        &self,
        path: &Path,
        vocabulary: &Path,
        template: Option<&str>,
        seed: u64,
    ) -> Result<()> {
        let vocabulary = Vocabulary::read(vocabulary, template)?;
        let part = path.with_extension("part");
        let mut out = BufWriter::with_capacity(
            1 << 20,
            File::create(&part).with_context(|| format!("{} cannot be written", part.display()))?,
        );
        let tensors = self.tensors(vocabulary.tokens.len());
        let mut header = self.header(&vocabulary);
        for tensor in &tensors {
            header.tensor(&tensor.name, tensor.format, tensor.rows, tensor.cols);
        }
        let mut writer = header.write(&mut out)?;
        let mut draw = Draw::new(seed);
        for tensor in &tensors {
            match &tensor.content {
                Content::Values(values) => {
                    writer.row(bytemuck::cast_slice(values))?;
                }
                Content::Random { std, readable } => {
                    let mut row = vec![0; tensor.format.row_bytes(tensor.cols)];
                    for r in 0..tensor.rows {
                        let dim = *readable && !vocabulary.readable[r];
                        let std = if dim { std * UNREADABLE } else { *std };
                        draw.row(tensor.format, std, &mut row);
                        writer.row(&row)?;
                    }
                }
            }
            writer.end_tensor()?;
        }
        out.into_inner().map_err(|e| e.into_error())?.sync_all()?;
        std::fs::rename(&part, path)?;
        Ok(())
    }

    fn header(&self, vocabulary: &Vocabulary) -> Header {
        let Shape {
            name,
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn,
            ..
        } = self.shape;
        let mut header = Header::default();
        let uint = |n: usize| Value::U32(n as u32);
        header.set("general.architecture", Value::Str("llama".into()));
        header.set(
            "general.name",
            Value::Str(format!("llama-{name}-shape-{}", self.mixture.name())),
        );
        header.set("general.file_type", Value::U32(self.mixture.file_type()));
        header.set("general.quantization_version", Value::U32(2));
        header.set("llama.block_count", uint(layers));
        header.set("llama.context_length", Value::U32(131_072));
        header.set("llama.embedding_length", uint(hidden));
        header.set("llama.feed_forward_length", uint(ffn));
        header.set("llama.attention.head_count", uint(heads));
        header.set("llama.attention.head_count_kv", uint(kv_heads));
        header.set("llama.attention.key_length", uint(head_dim));
        header.set("llama.attention.value_length", uint(head_dim));
        header.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
        header.set("llama.rope.freq_base", Value::F32(ROPE_BASE));
        header.set("llama.rope.dimension_count", uint(head_dim));
        header.set("llama.vocab_size", uint(vocabulary.tokens.len()));
        vocabulary.describe(&mut header);
        header
    }

    fn tensors(&self, vocab: usize) -> Vec<Tensor> {
        let Shape {
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            ffn,
            tied,
            rope_factor,
            ..
        } = self.shape;
        let base = self.mixture.base();
        let embedding = if tied { self.mixture.output() } else { base };
        let mut tensors = vec![Tensor::random(
            "token_embd.weight",
            embedding,
            vocab,
            hidden,
            tied,
        )];
        if !tied {
            tensors.push(Tensor::random(
                "output.weight",
                self.mixture.output(),
                vocab,
                hidden,
                true,
            ));
        }
        tensors.push(Tensor::values("output_norm.weight", vec![1.0; hidden]));
        tensors.push(Tensor::values(
            "rope_freqs.weight",
            rope_divisors(head_dim, rope_factor),
        ));
        for layer in 0..layers {
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            let sensitive = self.mixture.sensitive(layer, layers);
            let (q, kv) = (heads * head_dim, kv_heads * head_dim);
            tensors.push(Tensor::values(name("attn_norm"), vec![1.0; hidden]));
            tensors.push(Tensor::values(name("ffn_norm"), vec![1.0; hidden]));
            for (part, format, rows, cols) in [
                ("attn_q", base, q, hidden),
                ("attn_k", base, kv, hidden),
                ("attn_v", sensitive, kv, hidden),
                ("attn_output", base, hidden, q),
                ("ffn_gate", base, ffn, hidden),
                ("ffn_up", base, ffn, hidden),
                ("ffn_down", sensitive, hidden, ffn),
            ] {
                tensors.push(Tensor::random(name(part), format, rows, cols, false));
            }
        }
        tensors
    }
}

const ROPE_BASE: f32 = 500_000.0;
/// Spread of the output rows of tokens that should not come, against the others'.
const UNREADABLE: f32 = 1e-2;

struct Tensor {
    name: String,
    format: Format,
    rows: usize,
    cols: usize,
    content: Content,
}

enum Content {
    Values(Vec<f32>),
    /// `readable` dims the rows of tokens that should not come.
    Random {
        std: f32,
        readable: bool,
    },
}

impl Tensor {
    /// A spread of one over the root of the width keeps a unit vector at unit length through any number of layers.
    fn random(
        name: impl Into<String>,
        format: Format,
        rows: usize,
        cols: usize,
        readable: bool,
    ) -> Self {
        let std = 1.0 / (cols as f32).sqrt();
        Tensor {
            name: name.into(),
            format,
            rows,
            cols,
            content: Content::Random { std, readable },
        }
    }

    fn values(name: impl Into<String>, values: Vec<f32>) -> Self {
        Tensor {
            name: name.into(),
            format: Format::F32,
            rows: 1,
            cols: values.len(),
            content: Content::Values(values),
        }
    }
}

/// Llama 3's rope scaling as divisors of the frequencies, `[head_dim / 2]`: what llama.cpp's converter stores.
fn rope_divisors(head_dim: usize, factor: f32) -> Vec<f32> {
    const ORIGINAL_CONTEXT: f32 = 8192.0;
    const LOW: f32 = 1.0;
    const HIGH: f32 = 4.0;
    (0..head_dim / 2)
        .map(|i| {
            let wave =
                2.0 * std::f32::consts::PI * ROPE_BASE.powf((2 * i) as f32 / head_dim as f32);
            if wave < ORIGINAL_CONTEXT / HIGH {
                1.0
            } else if wave > ORIGINAL_CONTEXT / LOW {
                factor
            } else {
                let smooth = (ORIGINAL_CONTEXT / wave - LOW) / (HIGH - LOW);
                1.0 / ((1.0 - smooth) / factor + smooth)
            }
        })
        .collect()
}

/// A byte-level tokenizer out of another GGUF file.
struct Vocabulary {
    model: String,
    pre: String,
    tokens: Vec<String>,
    kinds: Vec<i64>,
    merges: Vec<String>,
    ids: Vec<(&'static str, u32)>,
    template: Option<String>,
    /// Whether a token may stand in an answer.
    readable: Vec<bool>,
}

/// `tokenizer.ggml.token_type` of a plain token.
const PLAIN: i64 = 1;

impl Vocabulary {
    fn read(path: &Path, template: Option<&str>) -> Result<Self> {
        let file = ModelFile::open(path)?;
        let data = file.metadata();
        let text = |key| data.str(key).map(str::to_owned);
        let strings = |key: &str| -> Result<Vec<String>> {
            data.strings(key)?
                .with_context(|| format!("{}: {key} is missing", path.display()))
        };
        let model = text("tokenizer.ggml.model").unwrap_or_default();
        if model != "gpt2" {
            bail!(
                "{}: the tokenizer is {model:?}, expected gpt2 (bytes and merges)",
                path.display()
            );
        }
        let tokens = strings("tokenizer.ggml.tokens")?;
        let kinds = data
            .ints("tokenizer.ggml.token_type")?
            .unwrap_or_else(|| vec![PLAIN; tokens.len()]);
        ensure!(
            kinds.len() == tokens.len(),
            "{}: {} token types for {} tokens",
            path.display(),
            kinds.len(),
            tokens.len()
        );
        let readable = tokens
            .iter()
            .zip(&kinds)
            .map(|(token, &kind)| kind == PLAIN && whole_text(token))
            .collect();
        let ids = ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"];
        let ids = ids.map(|key| data.u64(key).map(|id| (key, id as u32)));
        Ok(Vocabulary {
            model,
            pre: text("tokenizer.ggml.pre").unwrap_or_else(|| "default".into()),
            tokens,
            kinds,
            merges: strings("tokenizer.ggml.merges")?,
            ids: ids.into_iter().flatten().collect(),
            template: template
                .map(str::to_owned)
                .or_else(|| text("tokenizer.chat_template")),
            readable,
        })
    }

    fn describe(&self, header: &mut Header) {
        header.set("tokenizer.ggml.model", Value::Str(self.model.clone()));
        header.set("tokenizer.ggml.pre", Value::Str(self.pre.clone()));
        header.set("tokenizer.ggml.tokens", Value::Strs(self.tokens.clone()));
        header.set(
            "tokenizer.ggml.token_type",
            Value::I32s(self.kinds.iter().map(|&k| k as i32).collect()),
        );
        header.set("tokenizer.ggml.merges", Value::Strs(self.merges.clone()));
        for &(key, id) in &self.ids {
            header.set(key, Value::U32(id));
        }
        if let Some(template) = &self.template {
            header.set("tokenizer.chat_template", Value::Str(template.clone()));
        }
    }
}

/// Whether a token of GPT-2's alphabet stands for whole UTF-8 characters that can be seen.
fn whole_text(token: &str) -> bool {
    // The alphabet writes bytes that print as themselves, and the others from U+0100 on in their order.
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let others: Vec<u8> = (0..=255).filter(|&b| !printable(b.into())).collect();
    let bytes: Option<Vec<u8>> = token
        .chars()
        .map(|c| match c as u32 {
            c if printable(c) => Some(c as u8),
            c => others.get((c as usize).checked_sub(0x100)?).copied(),
        })
        .collect();
    let Some(Ok(text)) = bytes.map(String::from_utf8) else {
        return false;
    };
    !text.trim().is_empty() && text.chars().all(|c| !c.is_control())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many layers of a model give value and down projections more bits: llama.cpp's own count.
    #[test]
    fn a_k_m_mixture_is_the_quantisers() {
        let more = |layers: usize| -> Vec<usize> {
            (0..layers)
                .filter(|&l| Mixture::Q4KM.sensitive(l, layers) == Format::Q6_K)
                .collect()
        };
        assert_eq!(more(16), [0, 1, 4, 7, 10, 13, 14, 15]);
        assert_eq!(
            more(32),
            [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
        );
    }

    #[test]
    fn readable_tokens_are_whole_characters() {
        for (token, readable) in [
            ("hello", true),
            ("Ġhello", true),
            ("Ã¤", true),
            ("Ã", false),
            ("Ġ", false),
            ("Ċ", false),
            ("日", false),
        ] {
            assert_eq!(whole_text(token), readable, "{token}");
        }
    }

    #[test]
    fn a_written_model_is_a_model() {
        let folder = tempfile::tempdir().unwrap();
        let vocabulary = folder.path().join("vocabulary.gguf");
        let mut header = Header::default();
        let tokens = ["a", "b", "ab", "Ã", "<end>"].map(String::from).to_vec();
        header.set("tokenizer.ggml.model", Value::Str("gpt2".into()));
        header.set("tokenizer.ggml.tokens", Value::Strs(tokens));
        header.set(
            "tokenizer.ggml.token_type",
            Value::I32s(vec![1, 1, 1, 1, 3]),
        );
        header.set("tokenizer.ggml.merges", Value::Strs(vec!["a b".into()]));
        header.set("tokenizer.ggml.eos_token_id", Value::U32(4));
        header
            .write(&mut File::create(&vocabulary).unwrap())
            .unwrap();

        for recipe in ["tiny:Q4_0", "tiny:Q4_K_M", "tiny:Q8_0"] {
            let recipe: Recipe = recipe.parse().unwrap();
            let path = folder.path().join(recipe.file_name());
            recipe
                .write(&path, &vocabulary, Some("{{ x }}"), 7)
                .unwrap();
            let file = ModelFile::open(&path).unwrap();
            let config = file.config().unwrap();
            assert_eq!((config.hidden, config.vocab), (256, 5));
            assert!(config.tied_embeddings);
            let squares = |name: &str| -> Vec<f32> {
                let tensor = file.tensor(name).unwrap();
                let (format, cols) = (tensor.format(), tensor.cols());
                let rows = tensor.data().chunks(format.row_bytes(cols));
                rows.map(|row| {
                    let mut weights = vec![0.0; cols];
                    kernels::dequantize_row(format, row, &mut weights).unwrap();
                    weights.iter().map(|w| w * w).sum()
                })
                .collect()
            };
            for name in [
                "blk.0.attn_q.weight",
                "blk.0.attn_v.weight",
                "blk.1.ffn_down.weight",
            ] {
                let rows = squares(name);
                let mean = rows.iter().sum::<f32>() / rows.len() as f32;
                assert!((0.9..1.1).contains(&mean), "{recipe:?} {name}: {mean}");
            }
            // "ab" may come, half a character and the end may not.
            let tokens = squares("token_embd.weight");
            assert!(tokens[2] > 100.0 * tokens[3].max(tokens[4]), "{tokens:?}");
            let first = std::fs::read(&path).unwrap();
            recipe
                .write(&path, &vocabulary, Some("{{ x }}"), 7)
                .unwrap();
            assert!(
                first == std::fs::read(&path).unwrap(),
                "same seed, other bytes"
            );
        }
    }

    #[test]
    fn an_unknown_model_is_refused_with_the_known_ones() {
        let error = "2b:Q4_0".parse::<Recipe>().unwrap_err().to_string();
        assert!(error.contains("1b") && error.contains("Q4_K_M"), "{error}");
    }
}

//! The encoder's forward pass. Texts are laid one after the other without padding, so every matrix is read once a batch;
//! attention stays within each text.

use std::borrow::Cow;
use std::thread;

use kernels::cpu::Matrix;
use kernels::encoder::{add_bias, attention, gelu, layer_norm};
use kernels::{Cpu, Device, Format, Isa, WeightRows, dequantize_row};

use super::Error;
use crate::client::EmbedKind;
use crate::file::ModelFile;
use crate::text::{Tokenizer, Vocabulary};

/// Rows of one pass: activations of 1 MB a buffer at width 384, which stay in a core's cache.
const PASS_ROWS: usize = 512;
const MAX_LAYERS: u64 = 256;

/// A loaded encoder. Calls may come from several threads; each uses all threads given, so callers take turns.
pub struct Embedder {
    file: ModelFile,
    tokenizer: Tokenizer,
    /// Runs one text with all threads.
    wide: Cpu,
    /// Runs a part of a batch within one thread.
    narrow: Cpu,
    hidden: usize,
    heads: usize,
    eps: f32,
    context_tokens: usize,
    query_prefix: String,
    passage_prefix: String,
    word_format: Format,
    word_rows: usize,
    /// Position and first token type together, `[context_tokens, hidden]`.
    position: Vec<f32>,
    norm: Norm,
    layers: Vec<Layer>,
    weight_bytes: u64,
}

struct Norm {
    weight: Vec<f32>,
    bias: Vec<f32>,
}

struct Linear {
    matrix: Matrix,
    bias: Vec<f32>,
}

struct Layer {
    q: Linear,
    k: Linear,
    v: Linear,
    attention_out: Linear,
    attention_norm: Norm,
    up: Linear,
    down: Linear,
    out_norm: Norm,
}

/// A part of a text that the encoder reads at once: begin, at most `context - 2` tokens, end.
struct Window {
    text: usize,
    ids: Vec<u32>,
}

impl Embedder {
    /// Loads a GGUF file of architecture `bert`; `threads` at least 1.
    ///
    /// # Errors
    /// Another architecture, missing or misshapen tensors, values that are not finite, or a tokenizer that cannot be used.
    pub fn load(file: &ModelFile, threads: usize) -> Result<Self, Error> {
        let meta = file.metadata();
        let architecture = meta.str("general.architecture").unwrap_or("none");
        if architecture != "bert" {
            return Err(Error::model("general.architecture", "bert", architecture));
        }
        let number = |key: &str, most: u64| {
            let value = meta.u64(&format!("bert.{key}"));
            let fits = value.filter(|v| (1..=most).contains(v)).map(|v| v as usize);
            fits.ok_or_else(|| {
                Error::model(
                    format!("bert.{key}"),
                    format!("1 to {most}"),
                    format!("{value:?}"),
                )
            })
        };
        let hidden = number("embedding_length", 1 << 14)?;
        let heads = number("attention.head_count", 1 << 10)?;
        let ffn = number("feed_forward_length", 1 << 16)?;
        let layer_count = number("block_count", MAX_LAYERS)?;
        let context_tokens = number("context_length", 1 << 16)?;
        let eps = meta
            .f32("bert.attention.layer_norm_epsilon")
            .unwrap_or(1e-12);
        if !hidden.is_multiple_of(heads) {
            return Err(Error::model(
                "bert.embedding_length",
                format!("a multiple of {heads} heads"),
                hidden.to_string(),
            ));
        }
        if context_tokens < 3 {
            return Err(Error::model(
                "bert.context_length",
                "at least 3",
                context_tokens.to_string(),
            ));
        }
        let tokenizer = Tokenizer::from_vocabulary(&Vocabulary::from_gguf(file)?)?;

        let isa = Isa::detect();
        let wide = Cpu::new(threads.max(1), isa);
        let mut loader = Loader {
            file,
            device: &wide,
            bytes: 0,
        };
        let word = file.require("token_embd.weight")?;
        if word.cols() != hidden || word.rows() < tokenizer.vocab_size() {
            let got = format!("{:?}", word.shape());
            return Err(Error::model(
                "token_embd.weight",
                format!("[{} or more, {hidden}]", tokenizer.vocab_size()),
                got,
            ));
        }
        let (word_format, word_rows) = (word.format(), word.rows());
        let mut position = loader.floats("position_embd.weight", context_tokens * hidden)?;
        let types = file.require("token_types.weight")?.to_f32()?;
        let first_type = types.get(..hidden).ok_or_else(|| {
            Error::model(
                "token_types.weight",
                format!("{hidden} columns"),
                types.len().to_string(),
            )
        })?;
        add_bias(&mut position, first_type);
        let norm = loader.norm("token_embd_norm", hidden)?;
        let layers = (0..layer_count)
            .map(|i| {
                let name = |part: &str| format!("blk.{i}.{part}");
                Ok(Layer {
                    q: loader.linear(&name("attn_q"), hidden, hidden)?,
                    k: loader.linear(&name("attn_k"), hidden, hidden)?,
                    v: loader.linear(&name("attn_v"), hidden, hidden)?,
                    attention_out: loader.linear(&name("attn_output"), hidden, hidden)?,
                    attention_norm: loader.norm(&name("attn_output_norm"), hidden)?,
                    up: loader.linear(&name("ffn_up"), ffn, hidden)?,
                    down: loader.linear(&name("ffn_down"), hidden, ffn)?,
                    out_norm: loader.norm(&name("layer_output_norm"), hidden)?,
                })
            })
            .collect::<Result<Vec<Layer>, Error>>()?;
        let weight_bytes = loader.bytes + word.data().len() as u64;
        let prefix = |key: &str| {
            meta.str(&format!("verbund.embed.{key}_prefix"))
                .unwrap_or_default()
                .to_owned()
        };
        let (query_prefix, passage_prefix) = (prefix("query"), prefix("passage"));
        let narrow = Cpu::new(1, isa);
        Ok(Self {
            file: file.clone(),
            tokenizer,
            wide,
            narrow,
            hidden,
            heads,
            eps,
            context_tokens,
            query_prefix,
            passage_prefix,
            word_format,
            word_rows,
            position,
            norm,
            layers,
            weight_bytes,
        })
    }

    /// One vector of length 1 for each text, and the tokens of all. A text longer than the context is read in windows; its
    /// vector is the mean of theirs, weighted by their tokens.
    ///
    /// # Errors
    /// The tokenizer fails on a text, or the model computes a value that is not finite.
    pub fn embed<S: AsRef<str>>(
        &self,
        texts: &[S],
        kind: EmbedKind,
    ) -> Result<(Vec<Vec<f32>>, usize), Error> {
        let mut windows = Vec::new();
        let mut tokens = 0;
        for (text, content) in texts.iter().enumerate() {
            let ids = self.tokens(content.as_ref(), kind)?;
            tokens += ids.len();
            self.cut(text, ids, &mut windows);
        }
        let passes = self.passes(&windows);
        let mut means: Vec<Vec<f32>> = Vec::with_capacity(windows.len());
        let threads = self.wide.threads().min(passes.len());
        if threads <= 1 {
            passes
                .iter()
                .for_each(|pass| means.extend(self.forward(&self.wide, &windows[pass.clone()])));
        } else {
            // Whole passes a thread: no thread waits for another within a layer.
            let share = passes.len().div_ceil(threads);
            let done: Vec<Vec<Vec<f32>>> = thread::scope(|scope| {
                let run = |passes: &[std::ops::Range<usize>]| {
                    passes
                        .iter()
                        .flat_map(|p| self.forward(&self.narrow, &windows[p.clone()]))
                        .collect::<Vec<_>>()
                };
                let handles: Vec<_> = passes
                    .chunks(share)
                    .map(|part| scope.spawn(move || run(part)))
                    .collect();
                handles
                    .into_iter()
                    .map(|h| {
                        h.join()
                            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                    })
                    .collect()
            });
            means.extend(done.into_iter().flatten());
        }

        let mut vectors = vec![vec![0.0f32; self.hidden]; texts.len()];
        for (window, mean) in windows.iter().zip(&means) {
            // Without begin and end; an empty text has weight as well.
            let weight = window.ids.len().saturating_sub(2).max(1) as f32;
            vectors[window.text]
                .iter_mut()
                .zip(mean)
                .for_each(|(v, m)| *v += weight * m);
        }
        for vector in &mut vectors {
            let length = vector.iter().map(|v| v * v).sum::<f32>().max(1e-12).sqrt();
            vector.iter_mut().for_each(|v| *v /= length);
            // An index must never hold such a vector: no distance to it is a number.
            if !vector.iter().all(|v| v.is_finite()) {
                return Err(Error::model(
                    "computed vector",
                    "finite numbers",
                    "infinity or NaN; the file is damaged, convert it again",
                ));
            }
        }
        Ok((vectors, tokens))
    }

    /// A text's tokens as the encoder reads them, prefix and specials included, before it is cut into windows.
    ///
    /// # Errors
    /// The tokenizer fails on the text.
    pub fn tokens(&self, text: &str, kind: EmbedKind) -> Result<Vec<u32>, Error> {
        let prefix = match kind {
            EmbedKind::Query => &self.query_prefix,
            EmbedKind::Passage => &self.passage_prefix,
            EmbedKind::Raw => "",
        };
        let text = if prefix.is_empty() {
            Cow::Borrowed(text)
        } else {
            Cow::Owned(format!("{prefix}{text}"))
        };
        Ok(self.tokenizer.encode_for_encoder(&text)?)
    }

    fn cut(&self, text: usize, ids: Vec<u32>, windows: &mut Vec<Window>) {
        if ids.len() <= self.context_tokens {
            return windows.push(Window { text, ids });
        }
        let (begin, end) = (ids.first().copied(), ids.last().copied());
        for content in ids[1..ids.len() - 1].chunks(self.context_tokens - 2) {
            windows.push(Window {
                text,
                ids: begin
                    .into_iter()
                    .chain(content.iter().copied())
                    .chain(end)
                    .collect(),
            });
        }
    }

    /// Windows that are computed together: at least one, and as many as fit into [`PASS_ROWS`]; fewer where that gives every
    /// thread a pass.
    fn passes(&self, windows: &[Window]) -> Vec<std::ops::Range<usize>> {
        let rows: usize = windows.iter().map(|w| w.ids.len()).sum();
        let most = PASS_ROWS.min(rows.div_ceil(self.wide.threads()).max(64));
        let mut passes: Vec<std::ops::Range<usize>> = Vec::new();
        let mut held = 0;
        for (at, window) in windows.iter().enumerate() {
            match passes.last_mut() {
                Some(pass) if held + window.ids.len() <= most => pass.end = at + 1,
                _ => {
                    passes.push(at..at + 1);
                    held = 0;
                }
            }
            held += window.ids.len();
        }
        passes
    }

    /// The mean of the last layer's rows of each window.
    fn forward(&self, device: &Cpu, windows: &[Window]) -> Vec<Vec<f32>> {
        let hidden = self.hidden;
        let rows: usize = windows.iter().map(|w| w.ids.len()).sum();
        let mut x = vec![0.0f32; rows * hidden];
        let ids = windows.iter().flat_map(|w| w.ids.iter().enumerate());
        for ((position, &id), row) in ids.zip(x.chunks_exact_mut(hidden)) {
            self.word(id, row);
            add_bias(row, &self.position[position * hidden..][..hidden]);
        }
        let mut scratch = x.clone();
        layer_norm(
            &scratch,
            &self.norm.weight,
            &self.norm.bias,
            self.eps,
            &mut x,
        );

        let buffer = || vec![0.0f32; rows * hidden];
        let (mut q, mut k, mut v, mut context) = (buffer(), buffer(), buffer(), buffer());
        let mut inner = Vec::new();
        for layer in &self.layers {
            device.matmul(
                &[&layer.q.matrix, &layer.k.matrix, &layer.v.matrix],
                &x,
                rows,
                &mut [&mut q, &mut k, &mut v],
            );
            for (out, linear) in [(&mut q, &layer.q), (&mut k, &layer.k), (&mut v, &layer.v)] {
                add_bias(out, &linear.bias);
            }
            let mut first = 0;
            for window in windows {
                let len = window.ids.len();
                let part = first * hidden..(first + len) * hidden;
                let head_dim = hidden / self.heads;
                attention(
                    &q[part.clone()],
                    &k[part.clone()],
                    &v[part.clone()],
                    self.heads,
                    head_dim,
                    &mut context[part],
                );
                first += len;
            }
            device.matmul(
                &[&layer.attention_out.matrix],
                &context,
                rows,
                &mut [&mut scratch],
            );
            residual_norm(
                &mut x,
                &mut scratch,
                &layer.attention_out.bias,
                &layer.attention_norm,
                self.eps,
            );

            inner.resize(rows * layer.up.bias.len(), 0.0);
            device.matmul(&[&layer.up.matrix], &x, rows, &mut [&mut inner]);
            add_bias(&mut inner, &layer.up.bias);
            gelu(&mut inner);
            device.matmul(&[&layer.down.matrix], &inner, rows, &mut [&mut scratch]);
            residual_norm(
                &mut x,
                &mut scratch,
                &layer.down.bias,
                &layer.out_norm,
                self.eps,
            );
        }

        let mut first = 0;
        let mean = |window: &Window| {
            let len = window.ids.len();
            let mut mean = vec![0.0f32; hidden];
            for row in x[first * hidden..(first + len) * hidden].chunks_exact(hidden) {
                mean.iter_mut().zip(row).for_each(|(m, v)| *m += v);
            }
            first += len;
            mean.iter_mut().for_each(|m| *m /= len as f32);
            mean
        };
        windows.iter().map(mean).collect()
    }

    /// A token's row of the embedding table, straight from the file's map.
    fn word(&self, id: u32, out: &mut [f32]) {
        let bytes = self.word_format.row_bytes(self.hidden);
        let id = id as usize;
        let row = (id < self.word_rows)
            .then(|| self.file.tensor("token_embd.weight"))
            .flatten()
            .and_then(|t| t.data().get(id * bytes..(id + 1) * bytes));
        let read = row.map(|row| dequantize_row(self.word_format, row, out));
        if !matches!(read, Some(Ok(()))) {
            out.fill(0.0);
        }
    }

    /// Length of a vector.
    pub fn dimensions(&self) -> usize {
        self.hidden
    }

    /// Tokens of one window.
    pub fn context_tokens(&self) -> usize {
        self.context_tokens
    }

    /// Layers of the encoder.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Attention heads of a layer.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Rows of the embedding table.
    pub fn vocabulary(&self) -> usize {
        self.word_rows
    }

    /// Width of the feed-forward part.
    pub fn ffn(&self) -> usize {
        self.layers.first().map_or(0, |l| l.up.bias.len())
    }

    /// Bytes of packed weights and of the embedding table, which stays in the file's map.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

/// `x = norm(x + (y + bias))`; `y` is scratch afterwards.
fn residual_norm(x: &mut [f32], y: &mut [f32], bias: &[f32], norm: &Norm, eps: f32) {
    add_bias(y, bias);
    y.iter_mut().zip(&*x).for_each(|(y, x)| *y += x);
    layer_norm(y, &norm.weight, &norm.bias, eps, x);
}

struct Loader<'a> {
    file: &'a ModelFile,
    device: &'a Cpu,
    bytes: u64,
}

impl Loader<'_> {
    fn floats(&mut self, name: &str, len: usize) -> Result<Vec<f32>, Error> {
        let values = self.file.require(name)?.to_f32()?;
        if values.len() != len {
            return Err(Error::model(
                name,
                format!("{len} numbers"),
                values.len().to_string(),
            ));
        }
        self.bytes += 4 * len as u64;
        Ok(values)
    }

    fn norm(&mut self, name: &str, width: usize) -> Result<Norm, Error> {
        let weight = self.floats(&format!("{name}.weight"), width)?;
        Ok(Norm {
            weight,
            bias: self.floats(&format!("{name}.bias"), width)?,
        })
    }

    fn linear(&mut self, name: &str, rows: usize, cols: usize) -> Result<Linear, Error> {
        let tensor = self.file.require(&format!("{name}.weight"))?;
        if tensor.shape() != [rows, cols] {
            return Err(Error::model(
                format!("{name}.weight"),
                format!("[{rows}, {cols}]"),
                format!("{:?}", tensor.shape()),
            ));
        }
        tensor.check_finite(0..rows, 0..tensor.format().row_bytes(cols))?;
        let matrix =
            self.device
                .pack(WeightRows::new(tensor.format(), rows, cols, tensor.data()))?;
        self.bytes += self.device.matrix_bytes(&matrix) as u64;
        Ok(Linear {
            matrix,
            bias: self.floats(&format!("{name}.bias"), rows)?,
        })
    }
}

#[cfg(test)]
mod tests;

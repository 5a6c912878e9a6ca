//! The engine alone, measured: prefill and decode of random tokens, and perplexity of a text. No cluster, no sampler.

mod formats;
mod group;

use std::path::PathBuf;
use std::time::Instant;

use kernels::measure::{steady_int8_peak, steady_read_bandwidth};
use kernels::{BLOCK_TOKENS, Cpu, Device, Isa, KvFormat};
use serde::{Deserialize, Serialize};

use crate::file::{ModelConfig, ModelFile};
use crate::kv::BlockTable;
use crate::model::{self, RankModel, Span, StepBatch};
use crate::plan::{RankCapacity, plan};

pub use formats::{FormatOptions, FormatQuality, kv_formats, wire_formats};
pub use group::Ranks;

/// Rows of one prefill step: what a worker's scheduler takes at most in a step unless told otherwise.
pub const PREFILL_ROWS: usize = 256;
/// Each measurement is repeated this often and the best is reported: on a shared machine the others are noise.
const REPEATS: usize = 3;

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    pub model: PathBuf,
    /// Of all ranks together; 0 takes as many as there are cores.
    pub threads: usize,
    pub ranks: Ranks,
    /// How keys and values are kept.
    pub kv_format: KvFormat,
    /// Prompt tokens to prefill, in one sequence; 0 leaves it out.
    pub prefill: usize,
    /// Tokens to decode, in each sequence; 0 leaves it out.
    pub decode: usize,
    /// Sequences that decode at once.
    pub batch: usize,
    /// A text file to compute perplexity of.
    pub perplexity: Option<PathBuf>,
    /// Positions of a perplexity chunk.
    pub context: usize,
}

/// What came out. Rates count all sequences together.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BenchReport {
    pub model: String,
    pub threads: usize,
    pub ranks: usize,
    pub isa: String,
    pub kv_format: KvFormat,
    pub prefill_tokens: usize,
    pub decode_tokens: usize,
    pub batch: usize,
    pub prefill_tokens_per_s: Option<f64>,
    pub decode_tokens_per_s: Option<f64>,
    /// Packed weights, which every decoding step reads (an embedding apart from the output matrix only row by row).
    pub weight_bytes: u64,
    pub limits: Limits,
    /// Rate over what the 8-bit peak allowed just before and after.
    pub prefill_share_of_peak: Option<f64>,
    /// Rate over what reading the weights allowed just before and after; over 1 where they stay in the cache.
    pub decode_share_of_bandwidth: Option<f64>,
    pub load_s: f64,
    pub perplexity: Option<Perplexity>,
}

/// The machine's limits in the mean, measured before and after each of the rates.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Limits {
    /// Streaming read of all threads together.
    pub read_bytes_per_s: f64,
    /// Steps a second that one read of all weights a step allows.
    pub decode_steps_per_s: f64,
    /// 8-bit products of all threads together, a multiply and an add counted as two.
    pub int8_ops_per_s: f64,
    /// Prompt tokens a second that these allow, attention not counted.
    pub prefill_tokens_per_s: f64,
}

/// Perplexity of a text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    pub value: f64,
    pub chunks: usize,
    /// Predictions that were scored.
    pub scored: usize,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Model(#[from] model::Error),
    #[error(transparent)]
    Text(#[from] crate::text::Error),
    #[error("{path}: {source}; expected a text file in UTF-8")]
    Input {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{what} is {got}, expected {expected}")]
    Option {
        what: &'static str,
        expected: String,
        got: usize,
    },
}

impl From<crate::file::Error> for Error {
    fn from(error: crate::file::Error) -> Self {
        Error::Model(error.into())
    }
}

/// Runs the measurements that `options` ask for.
pub fn run(options: &BenchOptions) -> Result<BenchReport, Error> {
    let file = ModelFile::open(&options.model)?;
    let config = file.config()?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = if options.threads == 0 {
        cores
    } else {
        options.threads
    };
    let batch = options.batch.max(1);
    let longest = options
        .prefill
        .max(options.decode + 1)
        .max(if options.perplexity.is_some() {
            options.context
        } else {
            1
        });
    if longest > config.context_tokens {
        let expected = format!("at most {}, the model's context", config.context_tokens);
        return Err(Error::Option {
            what: "length of a sequence",
            expected,
            got: longest,
        });
    }
    let isa = Isa::detect();
    let capacity = RankCapacity {
        memory_bytes: u64::MAX / 4,
        read_bytes_per_s: 1,
    };
    let capacities = vec![capacity; options.ranks.count.max(1)];
    let mut plan =
        plan(&config, &capacities, longest, options.kv_format).map_err(model::Error::from)?;
    plan.kv_blocks = BlockTable::blocks_for(options.prefill.max(options.context))
        .max(batch * BlockTable::blocks_for(options.decode + 1))
        .max(1);
    let measure = |rank: &mut RankModel<Cpu>| {
        let text = options.perplexity.as_ref().map(|path| -> Result<_, Error> {
            let text = std::fs::read_to_string(path).map_err(|source| Error::Input {
                path: path.clone(),
                source,
            })?;
            let tokenizer = crate::text::load(&file)?.tokenizer;
            let tokens = tokenizer.encode_prompt(&text)?;
            let bos = tokenizer.bos().filter(|bos| tokens.first() == Some(bos));
            perplexity(rank, &tokens, options.context, bos)
        });
        let perplexity = text.transpose()?;
        let prefill = Beside::runs(options.prefill, threads, steady_int8_peak, || {
            prefill(rank, options.prefill)
        })?;
        let decode = Beside::runs(options.decode, threads, steady_read_bandwidth, || {
            decode(rank, batch, options.decode)
        })?;
        Ok((perplexity, prefill, decode, rank.numbers().weight_bytes))
    };
    let ((perplexity, prefill, decode, leader_bytes), load_s) =
        group::on_ranks(&file, &plan, &options.ranks, threads, isa, measure)?;
    // What the other ranks packed is known to them alone; a share takes about as many bytes as in the file.
    let others = plan.shards.iter().skip(1).map(|shard| shard.weight_bytes);
    let weight_bytes = leader_bytes + others.sum::<u64>();

    let limit = |runs: &Option<Beside>, measure: fn(usize) -> f64| {
        runs.as_ref()
            .map_or_else(|| measure(threads), Beside::limit)
    };
    let read_bytes_per_s = limit(&decode, steady_read_bandwidth);
    let int8_ops_per_s = limit(&prefill, steady_int8_peak);
    let limits = Limits {
        read_bytes_per_s,
        decode_steps_per_s: read_bytes_per_s / weight_bytes.max(1) as f64,
        int8_ops_per_s,
        prefill_tokens_per_s: int8_ops_per_s / (2 * row_products(&config)).max(1) as f64,
    };
    Ok(BenchReport {
        model: if config.name.is_empty() {
            options.model.display().to_string()
        } else {
            config.name
        },
        threads,
        ranks: capacities.len(),
        isa: isa.name().into(),
        kv_format: options.kv_format,
        prefill_tokens: options.prefill,
        decode_tokens: options.decode,
        batch,
        prefill_tokens_per_s: prefill.as_ref().map(Beside::best),
        decode_tokens_per_s: decode.as_ref().map(Beside::best),
        weight_bytes,
        limits,
        prefill_share_of_peak: prefill
            .map(|runs| runs.share() * int8_ops_per_s / limits.prefill_tokens_per_s),
        decode_share_of_bandwidth: decode
            .map(|runs| runs.share() * weight_bytes as f64 / batch as f64),
        load_s,
        perplexity,
    })
}

impl std::fmt::Display for BenchReport {
    /// A line a measurement, each beside the machine's limit.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let share = |share: Option<f64>| 100.0 * share.unwrap_or(0.0);
        let BenchReport {
            model,
            threads,
            ranks,
            isa,
            kv_format,
            limits,
            ..
        } = self;
        writeln!(
            f,
            "{model} · {ranks} ranks · {threads} threads · {isa} · KV in {kv_format} · loaded in {:.2} s",
            self.load_s
        )?;
        if let Some(rate) = self.prefill_tokens_per_s {
            writeln!(
                f,
                "prefill {:>6} tokens       {rate:>10.1} tokens/s   {:>4.0} % of {:.1}, which {:.0} GOPS of 8-bit products allow",
                self.prefill_tokens,
                share(self.prefill_share_of_peak),
                limits.prefill_tokens_per_s,
                limits.int8_ops_per_s / 1e9
            )?;
        }
        if let Some(rate) = self.decode_tokens_per_s {
            writeln!(
                f,
                "decode  {:>6} tokens × {:<3} {rate:>10.1} tokens/s   {:>4.0} % of {:.1}, which reading {:.0} MB a step at {:.1} GB/s allows",
                self.decode_tokens,
                self.batch,
                share(self.decode_share_of_bandwidth),
                limits.decode_steps_per_s * self.batch as f64,
                self.weight_bytes as f64 / 1e6,
                limits.read_bytes_per_s / 1e9
            )?;
        }
        if let Some(perplexity) = self.perplexity {
            writeln!(
                f,
                "perplexity {:.4} over {} chunks",
                perplexity.value, perplexity.chunks
            )?;
        }
        Ok(())
    }
}

/// Products of one row with the weights of all layers.
fn row_products(config: &ModelConfig) -> usize {
    let attention = config.hidden * config.head_dim * 2 * (config.heads + config.kv_heads);
    config.layers * (attention + 3 * config.hidden * config.ffn)
}

/// Several runs' rates, each beside what the machine could do just before and after it. On a shared machine that changes by half
/// within seconds, so a rate of one moment says nothing beside a limit of another.
struct Beside {
    /// Tokens a second, and the limit in its own unit.
    runs: Vec<(f64, f64)>,
}

impl Beside {
    /// Runs of `tokens` tokens; `None` if there is nothing to run.
    fn runs(
        tokens: usize,
        threads: usize,
        limit: fn(usize) -> f64,
        mut work: impl FnMut() -> Result<f64, model::Error>,
    ) -> Result<Option<Self>, model::Error> {
        if tokens == 0 {
            return Ok(None);
        }
        let mut runs = Vec::new();
        let mut before = limit(threads);
        for _ in 0..REPEATS {
            let rate = work()?;
            let after = limit(threads);
            runs.push((rate, (before + after) / 2.0));
            before = after;
        }
        Ok(Some(Self { runs }))
    }

    fn best(&self) -> f64 {
        self.runs.iter().map(|run| run.0).fold(0.0, f64::max)
    }

    /// In the mean.
    fn limit(&self) -> f64 {
        self.runs.iter().map(|run| run.1).sum::<f64>() / self.runs.len().max(1) as f64
    }

    /// Tokens for each unit of the limit, in the middle one of the runs.
    fn share(&self) -> f64 {
        let mut shares: Vec<f64> = self.runs.iter().map(|(rate, limit)| rate / limit).collect();
        shares.sort_by(f64::total_cmp);
        shares.get(shares.len() / 2).copied().unwrap_or(0.0)
    }
}

/// Tokens a second of one prompt of `tokens` tokens.
fn prefill<D: Device>(rank: &mut RankModel<D>, tokens: usize) -> Result<f64, model::Error> {
    let mut sequence = Sequence::new(rank.plan().kv_blocks, 0, tokens);
    let prompt = noise(tokens, rank.config().vocab);
    let start = Instant::now();
    for chunk in prompt.chunks(PREFILL_ROWS) {
        let last = sequence.length + chunk.len() == tokens;
        let batch = step(&mut [(&mut sequence, chunk)], |rows| {
            if last {
                vec![rows as u32 - 1]
            } else {
                Vec::new()
            }
        });
        rank.step(&batch)?;
    }
    Ok(tokens as f64 / start.elapsed().as_secs_f64())
}

/// Tokens a second of `count` sequences that decode `tokens` tokens each at once.
fn decode<D: Device>(
    rank: &mut RankModel<D>,
    count: usize,
    tokens: usize,
) -> Result<f64, model::Error> {
    let blocks = BlockTable::blocks_for(tokens + 1);
    let mut sequences: Vec<Sequence> = (0..count)
        .map(|i| Sequence::new(blocks, i * blocks, tokens + 1))
        .collect();
    let ids = noise((tokens + 1) * count, rank.config().vocab);
    let mut one = |i: usize| {
        let mut rows: Vec<(&mut Sequence, &[u32])> = sequences
            .iter_mut()
            .zip(ids[i * count..].chunks(1))
            .collect();
        let batch = step(&mut rows, |rows| (0..rows as u32).collect());
        rank.step(&batch).map(|_| ())
    };
    one(0)?;
    let start = Instant::now();
    for i in 1..=tokens {
        one(i)?;
    }
    Ok((tokens * count) as f64 / start.elapsed().as_secs_f64())
}

/// Perplexity as llama.cpp's tool computes it: the text in chunks of `context` tokens, each begun with `bos` in place of its first token
/// (if the model has one), the predictions in its second half scored.
pub fn perplexity<D: Device>(
    rank: &mut RankModel<D>,
    tokens: &[u32],
    context: usize,
    bos: Option<u32>,
) -> Result<Perplexity, Error> {
    score(rank, tokens, context, bos).map(|(perplexity, _)| perplexity)
}

/// [`perplexity`], and the likeliest token at each scored place.
fn score<D: Device>(
    rank: &mut RankModel<D>,
    tokens: &[u32],
    context: usize,
    bos: Option<u32>,
) -> Result<(Perplexity, Vec<u32>), Error> {
    if context < 4 || tokens.len() < context {
        let expected = "at least 4, and the text at least one context long".into();
        return Err(Error::Option {
            what: "context",
            expected,
            got: context,
        });
    }
    let mut sum = 0.0;
    let mut likeliest = Vec::new();
    let chunks = tokens.chunks_exact(context);
    let count = chunks.len();
    for chunk in chunks {
        let mut input = chunk.to_vec();
        if let Some(bos) = bos {
            input[0] = bos;
        }
        let mut sequence = Sequence::new(rank.plan().kv_blocks, 0, context);
        for rows in input.chunks(PREFILL_ROWS.min(64)) {
            let before = sequence.length;
            // Row r of this step predicts token before + r + 1; the second half is scored, the last has nothing to predict.
            let wanted = |r: &u32| (context / 2..context - 1).contains(&(before + *r as usize));
            let mut batch = step(&mut [(&mut sequence, rows)], |rows| {
                (0..rows as u32).filter(wanted).collect()
            });
            batch.full_logits = true;
            let candidates = rank.step(&batch)?.unwrap_or_default();
            for (row, candidates) in batch.logits_rows.iter().zip(candidates) {
                let next = chunk[before + *row as usize + 1];
                let logit = candidates
                    .full
                    .as_ref()
                    .and_then(|all| all.get(next as usize))
                    .copied()
                    .unwrap_or(f32::NAN);
                sum -= f64::from(logit) - f64::from(candidates.log_sum_exp);
                likeliest.push(candidates.top.first().map_or(u32::MAX, |top| top.0));
            }
        }
    }
    let perplexity = Perplexity {
        value: (sum / likeliest.len() as f64).exp(),
        chunks: count,
        scored: likeliest.len(),
    };
    Ok((perplexity, likeliest))
}

/// A sequence that grows in consecutive blocks.
struct Sequence {
    blocks: Vec<u32>,
    length: usize,
}

impl Sequence {
    fn new(blocks: usize, first: usize, positions: usize) -> Self {
        let needed = BlockTable::blocks_for(positions);
        debug_assert!(needed <= blocks, "the caller sized the cache for this");
        Sequence {
            blocks: (first as u32..).take(needed).collect(),
            length: 0,
        }
    }
}

/// The step that appends each sequence's tokens.
fn step(
    sequences: &mut [(&mut Sequence, &[u32])],
    wanted: impl FnOnce(usize) -> Vec<u32>,
) -> StepBatch {
    let mut batch = StepBatch::default();
    for (sequence, tokens) in sequences {
        let (first_row, context) = (batch.tokens.len(), sequence.length);
        for (i, &token) in tokens.iter().enumerate() {
            let position = context + i;
            batch.tokens.push(token);
            batch.positions.push(position as u32);
            batch.slots.push(
                sequence.blocks[position / BLOCK_TOKENS] * BLOCK_TOKENS as u32
                    + (position % BLOCK_TOKENS) as u32,
            );
        }
        sequence.length += tokens.len();
        batch.spans.push(Span {
            first_row,
            rows: tokens.len(),
            context,
            blocks: sequence.blocks.clone(),
        });
    }
    batch.logits_rows = wanted(batch.tokens.len());
    batch
}

/// Token ids without a pattern.
fn noise(count: usize, vocab: usize) -> Vec<u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab as u64) as u32
    };
    (0..count).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use crate::service::WorkerConfig;

    #[test]
    fn a_prefill_step_has_as_many_rows_as_a_workers() {
        let worker = WorkerConfig::new(0, ([127, 0, 0, 1], 0).into());
        assert_eq!(super::PREFILL_ROWS, worker.step_rows);
    }
}

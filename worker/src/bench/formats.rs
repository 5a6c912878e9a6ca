//! What each format, of sums on the wire or of the KV cache, does to a model's predictions.

use std::path::PathBuf;

use kernels::{Cpu, Isa, KvFormat};
use serde::Serialize;

use super::group::{Ranks, on_ranks};
use super::{Error, Perplexity, score};
use crate::collective::Wire;
use crate::file::ModelFile;
use crate::kv::BlockTable;
use crate::model::{self, RankModel};
use crate::plan::{RankCapacity, plan};

/// What to compare.
#[derive(Debug, Clone)]
pub struct FormatOptions {
    pub model: PathBuf,
    pub text: PathBuf,
    pub ranks: usize,
    /// Of all ranks together.
    pub threads: usize,
    /// Positions of a chunk; the second half of each is scored.
    pub context: usize,
    /// Most chunks taken from the text.
    pub chunks: usize,
}

/// One format beside the most exact one.
#[derive(Debug, Clone, Serialize)]
pub struct FormatQuality<F> {
    pub format: F,
    pub perplexity: Perplexity,
    /// Perplexity over the most exact format's.
    pub perplexity_ratio: f64,
    /// Share of the scored places at which the likeliest token is the most exact format's.
    pub top1_agreement: f64,
}

/// Scores the text with sums in each format, on a group over TCP.
///
/// # Errors
/// The model or the text cannot be read, or the text is shorter than one chunk.
pub fn wire_formats(options: &FormatOptions) -> Result<Vec<FormatQuality<Wire>>, Error> {
    compare(options, &Wire::ALL, |wire| (wire, KvFormat::default()))
}

/// Scores the text with keys and values in each format.
///
/// # Errors
/// As [`wire_formats`].
pub fn kv_formats(options: &FormatOptions) -> Result<Vec<FormatQuality<KvFormat>>, Error> {
    compare(options, &KvFormat::ALL, |kv| (Wire::Exact, kv))
}

fn compare<F: Copy>(
    options: &FormatOptions,
    formats: &[F],
    set: impl Fn(F) -> (Wire, KvFormat),
) -> Result<Vec<FormatQuality<F>>, Error> {
    let file = ModelFile::open(&options.model)?;
    let config = file.config()?;
    let text = std::fs::read_to_string(&options.text).map_err(|source| Error::Input {
        path: options.text.clone(),
        source,
    })?;
    let tokenizer = crate::text::load(&file)?.tokenizer;
    let mut tokens = tokenizer.encode_prompt(&text)?;
    tokens.truncate(options.context.saturating_mul(options.chunks.max(1)));
    let bos = tokenizer.bos().filter(|bos| tokens.first() == Some(bos));
    let capacity = RankCapacity {
        memory_bytes: u64::MAX / 4,
        read_bytes_per_s: 1,
    };
    let capacities = vec![capacity; options.ranks];
    let mut exact: Option<(Perplexity, Vec<u32>)> = None;
    let mut all = Vec::new();
    for &format in formats {
        let (wire, kv) = set(format);
        let mut plan =
            plan(&config, &capacities, options.context, kv).map_err(model::Error::from)?;
        plan.kv_blocks = BlockTable::blocks_for(options.context).max(1);
        let ranks = Ranks {
            count: options.ranks,
            tcp: true,
            wire,
            overlap: true,
        };
        let work = |rank: &mut RankModel<Cpu>| score(rank, &tokens, options.context, bos);
        let (scored, _) = on_ranks(&file, &plan, &ranks, options.threads, Isa::detect(), work)?;
        let (perplexity, likeliest) = &scored;
        let (reference, expected) = exact.as_ref().unwrap_or(&scored);
        let same = likeliest.iter().zip(expected).filter(|(a, b)| a == b);
        all.push(FormatQuality {
            format,
            perplexity: *perplexity,
            perplexity_ratio: perplexity.value / reference.value,
            top1_agreement: same.count() as f64 / expected.len().max(1) as f64,
        });
        exact.get_or_insert(scored);
    }
    Ok(all)
}

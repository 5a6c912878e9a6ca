//! Model files as an operator sees them: where the defaults lie, what a file is called in `/v1/models`, whether it fits.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use coordinator::control::ModelKind;
use worker::file::ModelFile;
use worker::kv::KvFormat;
use worker::plan::{RankCapacity, ShardPlan, plan};

const DEFAULT_GENERATE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const DEFAULT_EMBED: &str = "multilingual-e5-small.gguf";

/// `$VERBUND_MODELS`, or below the user's cache.
pub fn folder() -> PathBuf {
    let home = || std::env::var_os("HOME").map_or_else(|| PathBuf::from("/var/lib"), PathBuf::from);
    let cache =
        || std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home().join(".cache"), PathBuf::from);
    std::env::var_os("VERBUND_MODELS").map_or_else(|| cache().join("verbund/models"), PathBuf::from)
}

pub fn default_generate() -> PathBuf {
    folder().join(DEFAULT_GENERATE)
}

pub fn default_embed() -> PathBuf {
    folder().join(DEFAULT_EMBED)
}

/// The model's id: its file's or folder's name without ending and without the quantisation, which users need not know.
pub fn id_of(path: &Path) -> String {
    let name = if path.is_dir() {
        path.file_name()
    } else {
        path.file_stem()
    };
    let name = name
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let cut = name
        .rfind(['.', '-'])
        .filter(|at| *at > 0 && is_quantisation(&name[at + 1..]));
    cut.map_or(name.clone(), |at| name[..at].to_owned())
}

fn is_quantisation(part: &str) -> bool {
    let part = part.to_ascii_uppercase();
    let quantised = |prefix: &str| {
        part.strip_prefix(prefix)
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    quantised("Q") || quantised("IQ") || matches!(part.as_str(), "F32" | "F16" | "BF16")
}

/// What a file is for, by its architecture.
pub fn kind_of(path: &Path) -> ModelKind {
    let generates = ModelFile::open(path).and_then(|file| file.config()).is_ok();
    if generates {
        ModelKind::Generate
    } else {
        ModelKind::Embed
    }
}

/// Divides the model at `path` over equal ranks.
///
/// # Errors
/// The file is no model that can be served, has too few KV heads for so many ranks, or does not fit.
pub fn plan_for(
    path: &Path,
    ranks: &[RankCapacity],
    context_tokens: usize,
    kv_format: KvFormat,
) -> Result<ShardPlan> {
    let config = ModelFile::open(path)?.config()?;
    let context_tokens = if context_tokens == 0 {
        config.context_tokens
    } else {
        context_tokens
    };
    plan(&config, ranks, context_tokens, kv_format)
        .map_err(|e| anyhow!(e))
        .with_context(|| format!("{}", path.display()))
}

/// Says at once what a cluster would say later.
pub fn check(path: &Path, ranks: u32, memory_bytes: u64) -> Result<()> {
    let capacity = RankCapacity {
        memory_bytes,
        read_bytes_per_s: 1,
    };
    plan_for(
        path,
        &vec![capacity; ranks as usize],
        0,
        KvFormat::default(),
    )
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_called_without_its_quantisation() {
        let cases = [
            (
                "/m/SmolLM2-135M-Instruct.Q4_1.gguf",
                "SmolLM2-135M-Instruct",
            ),
            (
                "Llama-3.3-70B-Instruct-Q4_K_M.gguf",
                "Llama-3.3-70B-Instruct",
            ),
            ("model-iq2_xs.gguf", "model"),
            ("model.BF16.gguf", "model"),
            ("multilingual-e5-small.gguf", "multilingual-e5-small"),
            ("Qwen-2.gguf", "Qwen-2"),
            ("Q4_0.gguf", "Q4_0"),
        ];
        for (path, id) in cases {
            assert_eq!(id_of(Path::new(path)), id, "{path}");
        }
    }
}

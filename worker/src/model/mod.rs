//! The forward pass of a llama on one rank, and the step that the ranks of a group take together.
//!
//! Belongs here: what is computed in a step, and what travels between the ranks for it. Does not belong here: which sequences are
//! in a step (`scheduler`), what is done with logits (`sampling`).

mod candidates;
mod forward;
mod rank;

use serde::{Deserialize, Serialize};

pub use forward::Model;
pub use rank::{RankModel, follow};

/// Logits that travel for each row; a sampler that needs more asks for all ([`StepBatch::full_logits`]).
pub const CANDIDATES: usize = 256;
/// Most rows in one step: bounds activations and messages.
pub const MAX_STEP_ROWS: usize = 4096;

/// One forward pass: rows of sequences in decode and in prefill. The leader sends it to the followers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepBatch {
    /// Token ids, one a row.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Where each row's keys and values go: block · BLOCK_TOKENS + offset.
    pub slots: Vec<u32>,
    /// The sequences, in row order, covering all rows.
    pub spans: Vec<Span>,
    /// Rows whose logits are wanted.
    pub logits_rows: Vec<u32>,
    /// Whether all logits of those rows travel, not only the candidates.
    pub full_logits: bool,
    /// What single rows of those want besides, in order of their rows.
    pub wants: Vec<Want>,
}

/// What one row of logits wants besides the usual candidates.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Want {
    /// Which of the batch's `logits_rows`, by its place there.
    pub row: usize,
    /// Only these tokens are candidates: bit `i % 32` of word `i / 32` is token `i`, tokens beyond are not. Each rank masks its
    /// own part, so that a few kilobytes travel instead of all logits.
    pub mask: Option<Vec<u32>>,
    /// All logits travel, those that the mask forbids as negative infinity.
    pub full: bool,
}

/// The rows of one sequence in a step.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    pub first_row: usize,
    pub rows: usize,
    /// Positions in the KV cache before this span's first row.
    pub context: usize,
    /// The sequence's KV blocks in order, including those of the rows of this step.
    pub blocks: Vec<u32>,
}

/// What the sampler gets for one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidates {
    /// The [`CANDIDATES`] largest logits (of the tokens allowed) with their token ids, largest first, equal ones by id. Empty, and
    /// `full` absent, where the row holds a value that is not finite.
    pub top: Vec<(u32, f32)>,
    /// Over the whole vocabulary; NaN where the row is not finite.
    pub log_sum_exp: f32,
    /// All logits, if asked for.
    pub full: Option<Vec<f32>>,
}

/// Why a model could not be loaded or a step not be taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    File(#[from] crate::file::Error),
    #[error(transparent)]
    Plan(#[from] crate::plan::Error),
    #[error(transparent)]
    Collective(#[from] crate::collective::Error),
    #[error(transparent)]
    Device(#[from] kernels::Error),
    #[error("invalid step: {what} is {got}, expected {expected}")]
    Step {
        what: &'static str,
        expected: String,
        got: String,
    },
    #[error(
        "the plan is for {planned} ranks, the group has {ranks}; plan again for the ranks of this epoch"
    )]
    WrongGroup { planned: usize, ranks: usize },
    #[error(
        "the model computed values that are not finite numbers; its file is damaged or not a llama"
    )]
    NotFinite,
}

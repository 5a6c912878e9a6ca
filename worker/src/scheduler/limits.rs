//! What a scheduler may use, what it refuses, and when to come again.

use crate::model::MAX_STEP_ROWS;

/// What a scheduler may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at once; each decodes one row a step.
    pub max_sequences: usize,
    /// Sequences that may wait; beyond, submitting fails. A sequence that gives way counts again, so that never more than
    /// `max_sequences + max_waiting` are here.
    pub max_waiting: usize,
    /// Rows of one step: bounds how long a newcomer waits for the step under way.
    pub step_rows: usize,
    /// Rows of prompts and drafts in a step in which answers go on: bounds how much longer their next tokens take. A prompt
    /// of somebody who got less than all whose answers go on may use the whole step.
    pub mixed_rows: usize,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: usize,
    /// KV blocks in all.
    pub blocks: usize,
    /// Sequences of one tenant that run at once.
    pub tenant_running: usize,
    /// Sequences of one tenant that may wait.
    pub tenant_waiting: usize,
}

impl Default for Limits {
    /// For a model on a processor: with 32 mixed rows a flood of prompts costs more than 5 % of the throughput (`tests/flood.rs`);
    /// with more, a newcomer waits longer for the step under way.
    fn default() -> Self {
        Self {
            max_sequences: 32,
            max_waiting: 512,
            step_rows: 256,
            mixed_rows: 48,
            context_tokens: 8192,
            blocks: 2048,
            tenant_running: usize::MAX,
            tenant_waiting: usize::MAX,
        }
    }
}

impl Limits {
    /// Limits that contradict are narrowed: at least one sequence runs, and every running one fits into a step.
    pub(super) fn narrowed(self) -> Self {
        let step_rows = self.step_rows.clamp(1, MAX_STEP_ROWS);
        Self {
            step_rows,
            mixed_rows: self.mixed_rows.max(1),
            max_sequences: self.max_sequences.clamp(1, step_rows),
            tenant_running: self.tenant_running.max(1),
            ..self
        }
    }
}

/// Why a sequence was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The prompt leaves no room for an answer within `context` tokens.
    TooLong { tokens: usize, context: usize },
    /// No token to begin with.
    Empty,
    /// As many are waiting as may, in all or of this tenant.
    Full { retry_after_s: u32 },
}

/// Shortest and longest time that a refused client is told to wait: not at once, and not so long that people give up.
const RETRY_S: (u64, u64) = (1, 120);
/// Without a measurement, what one sequence is thought to take.
const FIRST_INTERVAL_MS: u64 = 500;

/// How fast sequences end while others wait.
#[derive(Debug, Clone, Default)]
pub(super) struct Pace {
    /// The last end, if the queue was not empty ever since.
    last_ms: Option<u64>,
    /// Mean time between two ends, in 1/8 of which each new one counts.
    interval_ms: Option<u64>,
}

impl Pace {
    /// A sequence ended.
    pub fn ended(&mut self, now_ms: u64, others_wait: bool) {
        if let Some(last) = self.last_ms {
            let new = now_ms.saturating_sub(last);
            let mean = self.interval_ms.map_or(new, |old| (7 * old + new) / 8);
            self.interval_ms = Some(mean);
        }
        self.last_ms = others_wait.then_some(now_ms);
    }

    /// When half of `waiting`, of which every `one_in`-th end is, will be through: whoever comes back then finds room, and
    /// not everybody else with him.
    pub fn retry_after_s(&self, waiting: usize, one_in: u64) -> u32 {
        let interval = self.interval_ms.unwrap_or(FIRST_INTERVAL_MS).max(1);
        let ms = interval.saturating_mul(one_in) * (waiting as u64).div_ceil(2);
        ms.div_ceil(1000).clamp(RETRY_S.0, RETRY_S.1) as u32
    }
}

//! Which sequences are in the next step. Pure: no clock, no thread, no model; the same events give the same steps.
//!
//! Every step takes first one row of each sequence in decode, then chunks of prompts in order of arrival, then admits
//! waiting sequences as long as rows and KV blocks last. When a decoding sequence finds no free block, the youngest
//! running one gives its blocks back and waits to be computed again. What tokens mean, and when an answer ends, is the
//! engine's business.

use std::collections::BTreeMap;

use coordinator::ids::TenantId;

use crate::kv::{BLOCK_TOKENS, BlockAllocator, BlockTable};
use crate::model::{MAX_STEP_ROWS, Span, StepBatch};

/// A sequence in one engine; never used twice. Grows with arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// What a scheduler may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at once; each decodes one row a step.
    pub max_sequences: usize,
    /// Sequences that may wait; beyond, submitting fails.
    pub max_waiting: usize,
    /// Rows of one step: bounds how long decoding sequences wait for somebody's prompt.
    pub step_rows: usize,
    /// Longest sequence, prompt and answer together.
    pub context_tokens: usize,
    /// KV blocks in all.
    pub blocks: usize,
}

/// Why a sequence was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The prompt leaves no room for an answer within `context` tokens.
    TooLong { tokens: usize, context: usize },
    /// No token to begin with.
    Empty,
    /// As many are waiting as may.
    Full,
}

/// A step to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub batch: StepBatch,
    /// For each of the batch's `logits_rows`: whose next token it gives.
    pub samples: Vec<SequenceId>,
    /// For each of the batch's `spans`: whose rows these are.
    pub owners: Vec<SequenceId>,
}

#[derive(Debug)]
struct Sequence {
    tenant: TenantId,
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    table: BlockTable,
    preempted: bool,
}

/// The state between two steps.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    allocator: BlockAllocator,
    /// In order of arrival.
    running: BTreeMap<SequenceId, Sequence>,
    waiting: BTreeMap<SequenceId, Sequence>,
    preemptions: u64,
}

impl Scheduler {
    /// Limits that contradict are narrowed: at least one sequence runs, and every running one fits into a step.
    pub fn new(limits: Limits) -> Self {
        let step_rows = limits.step_rows.clamp(1, MAX_STEP_ROWS);
        let max_sequences = limits.max_sequences.clamp(1, step_rows);
        Self {
            limits: Limits {
                step_rows,
                max_sequences,
                ..limits
            },
            allocator: BlockAllocator::new(limits.blocks),
            running: BTreeMap::new(),
            waiting: BTreeMap::new(),
            preemptions: 0,
        }
    }

    /// Longest sequence that can ever be held.
    pub fn capacity_tokens(&self) -> usize {
        self.limits
            .context_tokens
            .min(self.limits.blocks.saturating_mul(BLOCK_TOKENS))
    }

    /// Queues a sequence. Ids must grow from call to call.
    ///
    /// # Errors
    /// See [`Refused`]; nothing is queued then.
    pub fn submit(
        &mut self,
        id: SequenceId,
        tenant: TenantId,
        tokens: Vec<u32>,
    ) -> Result<(), Refused> {
        if tokens.is_empty() {
            return Err(Refused::Empty);
        }
        if tokens.len() >= self.capacity_tokens() {
            return Err(Refused::TooLong {
                tokens: tokens.len(),
                context: self.capacity_tokens(),
            });
        }
        if self.waiting.len() >= self.limits.max_waiting {
            return Err(Refused::Full);
        }
        let sequence = Sequence {
            tenant,
            tokens,
            computed: 0,
            table: BlockTable::default(),
            preempted: false,
        };
        self.waiting.insert(id, sequence);
        Ok(())
    }

    /// Adds the token that a sample gave. Returns the sequence's length, or `None` if it is gone.
    pub fn append(&mut self, id: SequenceId, token: u32) -> Option<usize> {
        let sequence = self.running.get_mut(&id)?;
        sequence.tokens.push(token);
        Some(sequence.tokens.len())
    }

    /// Drops a sequence, finished or cancelled; its blocks are free at once. Returns whether it was there.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        match self.running.remove(&id) {
            Some(mut sequence) => {
                sequence.table.release(&mut self.allocator);
                true
            }
            None => self.waiting.remove(&id).is_some(),
        }
    }

    /// Length of a sequence: the position that its next token will have.
    pub fn length(&self, id: SequenceId) -> Option<usize> {
        self.running
            .get(&id)
            .or_else(|| self.waiting.get(&id))
            .map(|s| s.tokens.len())
    }

    /// The next step, or `None` when there is nothing to compute. Its rows count as computed from here on; each sample
    /// wants [`Self::append`] or [`Self::remove`] before the next call.
    pub fn plan(&mut self) -> Option<Planned> {
        let mut planned = Planned {
            batch: StepBatch::default(),
            samples: Vec::new(),
            owners: Vec::new(),
        };
        self.find_blocks_for_decode();
        let decoding: Vec<SequenceId> = self
            .running
            .iter()
            .filter(|(_, s)| s.tokens.len() - s.computed == 1)
            .map(|(&id, _)| id)
            .collect();
        for id in decoding {
            self.take_rows(id, &mut planned);
        }
        let prefilling: Vec<SequenceId> = self
            .running
            .iter()
            .filter(|(_, s)| s.tokens.len() - s.computed > 1)
            .map(|(&id, _)| id)
            .collect();
        for id in prefilling {
            self.take_rows(id, &mut planned);
        }
        while planned.batch.tokens.len() < self.limits.step_rows {
            let Some(id) = self.admit() else { break };
            self.take_rows(id, &mut planned);
        }
        (!planned.batch.tokens.is_empty()).then_some(planned)
    }

    /// Reserves the block for each decoding sequence's next position, oldest first; the youngest pay.
    fn find_blocks_for_decode(&mut self) {
        let ids: Vec<SequenceId> = self.running.keys().copied().collect();
        for id in ids {
            while let Some(sequence) = self.running.get_mut(&id) {
                if sequence
                    .table
                    .reserve(sequence.tokens.len(), &mut self.allocator)
                    .is_ok()
                {
                    break;
                }
                self.preempt_youngest();
            }
        }
    }

    fn preempt_youngest(&mut self) {
        if let Some((id, mut sequence)) = self.running.pop_last() {
            sequence.table.release(&mut self.allocator);
            sequence.computed = 0;
            sequence.preempted = true;
            self.preemptions += 1;
            self.waiting.insert(id, sequence);
        }
    }

    /// Moves the waiting sequence whose turn it is to the running ones, if it fits: those that were preempted first, then
    /// those of the tenant with the fewest running, then by arrival. Nobody overtakes one that does not fit yet, so a
    /// long prompt is not starved by short ones.
    fn admit(&mut self) -> Option<SequenceId> {
        if self.running.len() >= self.limits.max_sequences {
            return None;
        }
        let mut of_tenant: BTreeMap<&TenantId, usize> = BTreeMap::new();
        for sequence in self.running.values() {
            *of_tenant.entry(&sequence.tenant).or_default() += 1;
        }
        let turn = |(id, s): &(&SequenceId, &Sequence)| {
            (
                !s.preempted,
                of_tenant.get(&s.tenant).copied().unwrap_or(0),
                **id,
            )
        };
        let id = self.waiting.iter().min_by_key(turn).map(|(&id, _)| id)?;
        let sequence = self.waiting.get_mut(&id)?;
        // One block more for each running sequence, so that the newcomer is not preempted at the next step.
        let needed = BlockTable::blocks_for(sequence.tokens.len() + 1);
        if !self.running.is_empty() && needed + self.running.len() > self.allocator.free_blocks() {
            return None;
        }
        sequence
            .table
            .reserve(sequence.tokens.len(), &mut self.allocator)
            .ok()?;
        sequence.preempted = false;
        let sequence = self.waiting.remove(&id)?;
        self.running.insert(id, sequence);
        Some(id)
    }

    /// Puts as many of a sequence's uncomputed tokens into the step as fit.
    fn take_rows(&mut self, id: SequenceId, planned: &mut Planned) {
        let Some(sequence) = self.running.get_mut(&id) else {
            return;
        };
        let batch = &mut planned.batch;
        let room = self.limits.step_rows - batch.tokens.len();
        let from = sequence.computed;
        let to = sequence.tokens.len().min(from + room);
        if from == to {
            return;
        }
        let first_row = batch.tokens.len();
        for position in from..to {
            let Some(slot) = sequence.table.slot(position) else {
                return;
            };
            batch.slots.push(slot);
            batch.tokens.push(sequence.tokens[position]);
            batch.positions.push(position as u32);
        }
        let held = BlockTable::blocks_for(to);
        let mut blocks = sequence.table.ids();
        blocks.truncate(held);
        batch.spans.push(Span {
            first_row,
            rows: to - from,
            context: from,
            blocks,
        });
        planned.owners.push(id);
        sequence.computed = to;
        if to == sequence.tokens.len() {
            batch.logits_rows.push(batch.tokens.len() as u32 - 1);
            planned.samples.push(id);
        }
    }

    /// Sequences that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// KV blocks in use.
    pub fn used_blocks(&self) -> usize {
        self.allocator.total_blocks() - self.allocator.free_blocks()
    }

    /// KV blocks in all.
    pub fn total_blocks(&self) -> usize {
        self.allocator.total_blocks()
    }

    /// How often a sequence had to give its blocks back.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }
}

#[cfg(test)]
mod tests;

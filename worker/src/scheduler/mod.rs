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

/// A sequence that wants tokens of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    pub id: SequenceId,
    /// Guesses that the step computes besides the last token. The row after which draft `i` is expected comes `i` rows
    /// after the sample's first.
    pub drafts: Vec<u32>,
}

impl Sample {
    /// Rows of logits that it has in the step.
    pub fn rows(&self) -> usize {
        1 + self.drafts.len()
    }
}

/// A step to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub batch: StepBatch,
    /// Whose next tokens the batch's `logits_rows` give: [`Sample::rows`] of them each, in this order.
    pub samples: Vec<Sample>,
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
    /// Offered for the next step, or verified by the one under way.
    drafts: Vec<u32>,
    preempted: bool,
}

impl Sequence {
    /// Whether only the last token is left to compute.
    fn decodes(&self) -> bool {
        self.tokens.len() - self.computed == 1
    }
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
            drafts: Vec::new(),
            preempted: false,
        };
        self.waiting.insert(id, sequence);
        Ok(())
    }

    /// Sequences of which the next step computes the last token: those that drafts may be offered for.
    pub fn decoding(&self) -> impl Iterator<Item = SequenceId> {
        self.running
            .iter()
            .filter(|(_, s)| s.decodes())
            .map(|(&id, _)| id)
    }

    /// Offers guesses how a decoding sequence goes on. The next step takes as many of them, from the front, as it has rows,
    /// blocks and context for after everybody else was served; the rest is forgotten. An offer for another sequence counts for
    /// nothing.
    pub fn draft(&mut self, id: SequenceId, drafts: &[u32]) {
        if let Some(sequence) = self.running.get_mut(&id)
            && sequence.decodes()
        {
            sequence.drafts = drafts.to_vec();
        }
    }

    /// Adds the tokens that a sample gave: the drafts that were right, and one more. Blocks that only wrong drafts needed are
    /// free then. Returns the sequence's length, or `None` if it is gone.
    pub fn accept(&mut self, id: SequenceId, tokens: &[u32]) -> Option<usize> {
        let sequence = self.running.get_mut(&id)?;
        let right = tokens.len().saturating_sub(1);
        debug_assert_eq!(
            sequence.drafts.get(..right),
            tokens.get(..right),
            "all taken tokens but the last were drafts of the step"
        );
        sequence.drafts.clear();
        sequence.tokens.extend_from_slice(tokens);
        // What wrong drafts left in the cache lies behind this, and is written over by the tokens that come instead.
        sequence.computed = sequence.tokens.len() - 1;
        sequence
            .table
            .shrink(sequence.tokens.len(), &mut self.allocator);
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
    /// wants [`Self::accept`] or [`Self::remove`] before the next call.
    pub fn plan(&mut self) -> Option<Planned> {
        self.find_blocks_for_decode();
        let mut rows: BTreeMap<SequenceId, usize> = self.decoding().map(|id| (id, 1)).collect();
        let mut room = self.limits.step_rows - rows.len();
        let prefilling: Vec<SequenceId> = self
            .running
            .iter()
            .filter(|(_, s)| !s.decodes())
            .map(|(&id, _)| id)
            .collect();
        let mut order: Vec<SequenceId> = rows.keys().copied().chain(prefilling.clone()).collect();
        let mut give = |running: &BTreeMap<SequenceId, Sequence>, id, room: &mut usize| {
            let Some(sequence) = running.get(&id) else {
                return;
            };
            let chunk = (*room).min(sequence.tokens.len() - sequence.computed);
            rows.insert(id, chunk);
            *room -= chunk;
        };
        for id in prefilling {
            give(&self.running, id, &mut room);
        }
        while room > 0 {
            let Some(id) = self.admit() else { break };
            order.push(id);
            give(&self.running, id, &mut room);
        }
        // Drafts are bets: they take only what nobody has a certain use for.
        let capacity = self.capacity_tokens();
        for sequence in self.running.values_mut() {
            let len = sequence.tokens.len();
            // With all drafts right, one more token comes; the last of them needs no place in the cache.
            let most = room.min(capacity.saturating_sub(len + 1));
            sequence.drafts.truncate(most);
            while sequence
                .table
                .reserve(len + sequence.drafts.len(), &mut self.allocator)
                .is_err()
                && sequence.drafts.pop().is_some()
            {}
            room -= sequence.drafts.len();
        }
        let mut planned = Planned {
            batch: StepBatch::default(),
            samples: Vec::new(),
            owners: Vec::new(),
        };
        for id in order {
            self.take_rows(id, rows.get(&id).copied().unwrap_or(0), &mut planned);
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
            sequence.drafts.clear();
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

    /// Puts `rows` of a sequence's uncomputed tokens into the step, and its drafts behind the last of them.
    fn take_rows(&mut self, id: SequenceId, rows: usize, planned: &mut Planned) {
        let Some(sequence) = self.running.get_mut(&id).filter(|_| rows > 0) else {
            return;
        };
        let batch = &mut planned.batch;
        let (from, to) = (sequence.computed, sequence.computed + rows);
        let whole = to == sequence.tokens.len();
        let drafts = if whole {
            sequence.drafts.as_slice()
        } else {
            &[]
        };
        let first_row = batch.tokens.len();
        let tokens = sequence.tokens[from..to].iter().chain(drafts);
        for (position, &token) in (from..).zip(tokens) {
            let Some(slot) = sequence.table.slot(position) else {
                return;
            };
            batch.slots.push(slot);
            batch.tokens.push(token);
            batch.positions.push(position as u32);
        }
        let held = BlockTable::blocks_for(to + drafts.len());
        let mut blocks = sequence.table.ids();
        blocks.truncate(held);
        batch.spans.push(Span {
            first_row,
            rows: rows + drafts.len(),
            context: from,
            blocks,
        });
        planned.owners.push(id);
        sequence.computed = to;
        if whole {
            let last = (first_row + rows - 1) as u32;
            batch.logits_rows.extend(last..batch.tokens.len() as u32);
            let drafts = drafts.to_vec();
            planned.samples.push(Sample { id, drafts });
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

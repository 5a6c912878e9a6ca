//! Which sequences are in the next step. Pure: no clock, no thread, no model; the same events give the same steps.
//!
//! Every step takes first one row of each sequence in decode ([`plan`]), then pieces of prompts, always of the tenant that got
//! least ([`fair`]); within a tenant the prompt that is soonest done goes first, and every third piece goes to the oldest, so
//! that a short one does not wait for a long one nor a long one for ever. (Of equal prompts the first goes first: taking turns
//! would end none earlier and most later.) Waiting sequences are admitted by the same counters as long as places and KV blocks
//! last. When they do not last, who has more than his share gives way ([`room`]): a sequence gives its blocks back, which stay
//! in the cache until somebody needs them, and waits. What tokens mean, and when an answer ends, is the engine's business.

mod fair;
mod limits;
mod plan;
mod room;
mod tenants;

use std::collections::{BTreeMap, BTreeSet};

use coordinator::ids::TenantId;

use self::fair::{ANSWER_COST, Fair, FlowId};
use self::limits::Pace;
use self::tenants::Tenants;
use crate::client::Class;
use crate::kv::{BLOCK_TOKENS, BlockTable, Blocks};
use crate::model::StepBatch;

pub use fair::bound;
pub use limits::{Limits, Refused};
pub use tenants::Served;

/// A sequence in one engine; never used twice. Grows with arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// A sequence to be computed.
#[derive(Debug, Clone)]
pub struct Request {
    pub tenant: TenantId,
    pub class: Class,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// When [`Scheduler::expired`] begins to name it, on the clock of the caller.
    pub deadline_ms: Option<u64>,
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

/// A sequence that got its place, once for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    pub id: SequenceId,
    /// Since it was submitted.
    pub waited_ms: u64,
    /// Tokens of its prompt that need not be computed.
    pub cached_tokens: usize,
}

/// A step to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    pub batch: StepBatch,
    /// Whose next tokens the batch's `logits_rows` give: [`Sample::rows`] of them each, in this order.
    pub samples: Vec<Sample>,
    /// For each of the batch's `spans`: whose rows these are.
    pub owners: Vec<SequenceId>,
    /// Rows that are prompt, the last one of each included.
    pub prompt_rows: usize,
    /// Who was admitted since the last step.
    pub admitted: Vec<Admitted>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    /// Has a place; more than a last token, or everything after a return, is left to compute.
    Computing,
    /// Each step computes its last token.
    Decoding,
}

#[derive(Debug)]
struct Sequence {
    flow: FlowId,
    phase: Phase,
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache once the steps given out are taken.
    computed: usize,
    /// Of these, in the cache for certain.
    stored: usize,
    /// Tokens that were paid for: computing them again after giving way is not.
    paid: usize,
    table: BlockTable,
    /// Offered for the next step, or verified by the one under way.
    drafts: Vec<u32>,
    submitted_ms: u64,
    deadline_ms: Option<u64>,
    admitted_before: bool,
}

impl Sequence {
    /// Tokens to compute that have to be paid for yet.
    fn unpaid(&self) -> usize {
        self.tokens.len() - self.computed.max(self.paid)
    }
}

/// The state between two steps.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    tenants: Tenants,
    sequences: BTreeMap<SequenceId, Sequence>,
    running: BTreeSet<SequenceId>,
    deadlines: BTreeSet<(u64, SequenceId)>,
    /// In the step that was given out last.
    in_step: Vec<SequenceId>,
    admitted: Vec<Admitted>,
    pace: Pace,
    now_ms: u64,
    /// Steps planned: whose turn it is where not all can have one.
    turn: usize,
    preemptions: u64,
}

impl Scheduler {
    /// Limits that contradict are narrowed: at least one sequence runs, and every running one fits into a step.
    pub fn new(limits: Limits) -> Self {
        let limits = limits.narrowed();
        let cache_tokens = limits.blocks.saturating_mul(BLOCK_TOKENS);
        let fair = Fair::new(limits.context_tokens.min(cache_tokens), cache_tokens);
        Self {
            limits,
            blocks: Blocks::new(limits.blocks),
            tenants: Tenants::new(fair, limits.tenant_running),
            sequences: BTreeMap::new(),
            running: BTreeSet::new(),
            deadlines: BTreeSet::new(),
            in_step: Vec::new(),
            admitted: Vec::new(),
            pace: Pace::default(),
            now_ms: 0,
            turn: 0,
            preemptions: 0,
        }
    }

    /// Longest sequence that can ever be held.
    pub fn capacity_tokens(&self) -> usize {
        self.limits
            .context_tokens
            .min(self.limits.blocks.saturating_mul(BLOCK_TOKENS))
    }

    /// Gives a tenant another share than the 1 that everybody begins with.
    pub fn set_weight(&mut self, tenant: &TenantId, weight: u32) {
        let number = self.tenants.number(tenant, &mut self.blocks);
        self.tenants.set_weight(number, weight, &mut self.blocks);
    }

    /// Has nothing found again of what was computed for a tenant so far. His running sequences go on, and leave nothing behind.
    pub fn forget(&mut self, tenant: &TenantId) {
        self.tenants.forget(tenant, &mut self.blocks);
    }

    /// Queues a sequence. Ids must grow from call to call.
    ///
    /// # Errors
    /// See [`Refused`]; nothing is queued then.
    pub fn submit(&mut self, id: SequenceId, request: Request, now_ms: u64) -> Result<(), Refused> {
        self.now_ms = self.now_ms.max(now_ms);
        let Request {
            tenant,
            class,
            tokens,
            deadline_ms,
        } = request;
        if tokens.is_empty() {
            return Err(Refused::Empty);
        }
        if tokens.len() >= self.capacity_tokens() {
            return Err(Refused::TooLong {
                tokens: tokens.len(),
                context: self.capacity_tokens(),
            });
        }
        let number = self.tenants.number(&tenant, &mut self.blocks);
        let flow = Tenants::flow(number, class);
        let all_waiting = self.waiting();
        let waiting = self.tenants.all[number].waiting;
        let places = self.limits.max_waiting.saturating_sub(all_waiting);
        if places == 0 {
            let retry_after_s = self.pace.retry_after_s(all_waiting, 1);
            return Err(Refused::Full { retry_after_s });
        }
        // Half of the queue at most, and half of what is left to the next: one who floods it leaves places to the others.
        if waiting >= places || waiting >= self.limits.tenant_waiting {
            let share = self.tenants.share(flow, 1 << 16).max(1);
            let retry_after_s = self
                .pace
                .retry_after_s(waiting, (1u64 << 16).div_ceil(share as u64));
            return Err(Refused::Full { retry_after_s });
        }
        if self.sequences.is_empty() {
            self.tenants.fair.settle();
        }
        self.deadlines.extend(deadline_ms.map(|at| (at, id)));
        let owner = self.tenants.all[number].owner;
        let sequence = Sequence {
            flow,
            phase: Phase::Waiting,
            tokens,
            computed: 0,
            stored: 0,
            paid: 0,
            table: BlockTable::new(owner),
            drafts: Vec::new(),
            submitted_ms: now_ms,
            deadline_ms,
            admitted_before: false,
        };
        self.sequences.insert(id, sequence);
        self.tenants.change(flow, |flow, tenant| {
            flow.waiting.insert((true, id));
            tenant.waiting += 1;
        });
        Ok(())
    }

    /// Sequences of which the next step computes the last token: those that drafts may be offered for.
    pub fn decoding(&self) -> impl Iterator<Item = SequenceId> {
        let decodes = |s: &Sequence| s.phase == Phase::Decoding && s.computed < s.tokens.len();
        let running = self.running.iter().copied();
        running.filter(move |id| self.sequences.get(id).is_some_and(decodes))
    }

    /// Offers guesses how a decoding sequence goes on. The next step takes as many of them, from the front, as it has rows,
    /// blocks and context for after everybody else was served; the rest is forgotten. An offer for another sequence counts for
    /// nothing.
    pub fn draft(&mut self, id: SequenceId, drafts: &[u32]) {
        if let Some(sequence) = self.sequences.get_mut(&id)
            && sequence.phase == Phase::Decoding
        {
            sequence.drafts = drafts.to_vec();
        }
    }

    /// The step given out last was taken: what it computed can be found in the cache from now on.
    pub fn done(&mut self) {
        for id in std::mem::take(&mut self.in_step) {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.stored = sequence.computed;
                sequence
                    .table
                    .publish(&sequence.tokens, sequence.stored, &mut self.blocks);
            }
        }
    }

    /// Adds the tokens that a sample gave: the drafts that were right, and one more. Blocks that only wrong drafts needed are
    /// free then. Returns the sequence's length, or `None` if it does not run.
    pub fn accept(&mut self, id: SequenceId, tokens: &[u32]) -> Option<usize> {
        let sequence = self.sequences.get_mut(&id)?;
        if sequence.phase == Phase::Waiting {
            return None;
        }
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
        sequence.stored = sequence
            .stored
            .max(sequence.computed.min(sequence.stored + right));
        sequence.paid = sequence.tokens.len();
        sequence
            .table
            .shrink(sequence.tokens.len(), &mut self.blocks);
        let (flow, length) = (sequence.flow, sequence.tokens.len());
        // The first was paid for with the step.
        self.tenants.fair.charge(flow, ANSWER_COST * right as u64);
        let tenant = self.tenants.flows[flow].tenant;
        let answer = tokens.len() as u64;
        self.tenants.serve(tenant, |served| served.answer += answer);
        Some(length)
    }

    /// Drops a sequence, finished or cancelled; its blocks are there for others at once. Returns whether it was there.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        let Some(mut sequence) = self.sequences.remove(&id) else {
            return false;
        };
        self.deadlines
            .remove(&(sequence.deadline_ms.unwrap_or_default(), id));
        let flow = sequence.flow;
        if sequence.phase == Phase::Waiting {
            self.tenants.change(flow, |flow, tenant| {
                let gave_way = flow.waiting.remove(&(false, id));
                let there = gave_way || flow.waiting.remove(&(true, id));
                debug_assert!(there, "a waiting sequence is in its flow's queue");
                tenant.waiting -= 1;
            });
            return true;
        }
        self.leave(id, &mut sequence);
        let others_wait = self.waiting() > 0;
        self.pace.ended(self.now_ms, others_wait);
        true
    }

    /// Sequences whose deadline is over; each is named until it is removed.
    pub fn expired(&self, now_ms: u64) -> Vec<SequenceId> {
        let over = self.deadlines.range(..=(now_ms, SequenceId(u64::MAX)));
        over.map(|&(_, id)| id).collect()
    }

    /// Length of a sequence: the position that its next token will have.
    pub fn length(&self, id: SequenceId) -> Option<usize> {
        self.sequences.get(&id).map(|s| s.tokens.len())
    }

    /// Sequences that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> usize {
        self.sequences.len() - self.running.len()
    }

    /// KV blocks that sequences hold.
    pub fn used_blocks(&self) -> usize {
        self.blocks.total() - self.blocks.available()
    }

    /// KV blocks that nobody holds and whose contents can be found.
    pub fn cached_blocks(&self) -> usize {
        self.blocks.idle()
    }

    /// KV blocks in all.
    pub fn total_blocks(&self) -> usize {
        self.blocks.total()
    }

    /// How often a sequence had to give its blocks back.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Cached blocks that were taken for something else.
    pub fn evictions(&self) -> u64 {
        self.blocks.evictions()
    }

    /// What tenants got since the last call, of those that got something.
    pub fn take_served(&mut self) -> Vec<(TenantId, Served)> {
        self.tenants.take_served()
    }
}

#[cfg(test)]
mod tests;

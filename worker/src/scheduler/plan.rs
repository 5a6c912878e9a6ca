//! The rows of one step.

use std::collections::BTreeMap;

use super::fair::{ANSWER_COST, FlowId, PROMPT_COST};
use super::{Phase, Planned, Sample, Scheduler, SequenceId};
use crate::model::{Span, StepBatch};

/// Rows that a prompt gets before it is asked again whose turn it is: few enough to share a step, enough to fill the
/// kernels' tiles.
const CHUNK_ROWS: usize = 32;
/// Every so many chunks of a flow the oldest prompt gets one instead of the one that is soonest done: rarer, and long
/// prompts wait much longer at saturation; more often, and middling ones do.
pub(super) const OLDEST_EVERY: u64 = 3;

/// Rows given to sequences so far.
#[derive(Debug, Default)]
struct Step {
    order: Vec<SequenceId>,
    rows: BTreeMap<SequenceId, usize>,
    total: usize,
    prompt: usize,
}

impl Step {
    fn give(&mut self, id: SequenceId, rows: usize) {
        let given = self.rows.entry(id).or_insert(0);
        if *given == 0 {
            self.order.push(id);
        }
        *given += rows;
        self.total += rows;
    }
}

/// The flows whose answers go on in a step.
struct Decoding {
    /// The two of them that got least, with what they got before the step.
    least: Vec<(i64, FlowId)>,
}

impl Decoding {
    fn new(flows: impl Iterator<Item = (i64, FlowId)>) -> Self {
        let mut least: Vec<(i64, FlowId)> = flows.collect();
        least.sort_unstable();
        least.truncate(2);
        Self { least }
    }

    /// Whether there are others than `flow`, and each of them got more than `counter`.
    fn all_got_more_than(&self, flow: FlowId, counter: i64) -> bool {
        let other = self.least.iter().find(|&&(_, other)| other != flow);
        other.is_some_and(|&(least, _)| counter < least)
    }
}

impl Scheduler {
    /// The next step, or `None` when there is nothing to compute. Its rows count as computed from here on; then come
    /// [`Self::done`] (unless the step failed), and [`Self::accept`] or [`Self::remove`] for each sample, before the next call.
    pub fn plan(&mut self, now_ms: u64) -> Option<Planned> {
        self.now_ms = self.now_ms.max(now_ms);
        self.blocks.advance(self.now_ms);
        self.reserve_for_decode();
        self.admit_all();
        let mut step = Step::default();
        let decoding = self.give_decode_rows(&mut step);
        self.give_prompt_rows(&mut step, &decoding);
        self.give_draft_rows(&step);
        let planned = self.build(step);
        (!planned.batch.tokens.is_empty()).then_some(planned)
    }

    /// A row for each sequence that decodes. While the prompt of somebody who got less than all of them is computed, a flow
    /// that has more than its share of the places takes turns on that share: those who flood the places with answers make
    /// the prompt's steps no longer than their share of them may.
    fn give_decode_rows(&mut self, step: &mut Step) -> Decoding {
        let mut flows: BTreeMap<FlowId, Vec<SequenceId>> = BTreeMap::new();
        for id in self.decoding() {
            if let Some(sequence) = self.sequences.get(&id) {
                flows.entry(sequence.flow).or_default().push(id);
            }
        }
        let decoding = Decoding::new(flows.keys().map(|&f| (self.tenants.fair.counter(f), f)));
        let hurry = self
            .tenants
            .fair
            .next_computing()
            .filter(|&flow| decoding.all_got_more_than(flow, self.tenants.fair.counter(flow)));
        self.turn = self.turn.wrapping_add(1);
        let mut given = Vec::new();
        for (flow, ids) in flows {
            let rows = match hurry {
                Some(other) if other != flow => self.tenants.share(flow, self.limits.max_sequences),
                _ => ids.len(),
            };
            let affordable = self.tenants.fair.headroom(flow) / ANSWER_COST;
            let rows = rows.min(usize::try_from(affordable).unwrap_or(usize::MAX));
            let rows = rows.min(ids.len());
            let first = if rows < ids.len() {
                self.turn * rows % ids.len()
            } else {
                0
            };
            for i in 0..rows {
                self.tenants.fair.charge(flow, ANSWER_COST);
                given.push(ids[(first + i) % ids.len()]);
            }
        }
        // In order of arrival, whatever flow they are of.
        given.sort_unstable();
        for id in given {
            step.give(id, 1);
        }
        decoding
    }

    /// Chunks of prompts, each to the flow that got least.
    fn give_prompt_rows(&mut self, step: &mut Step, decoding: &Decoding) {
        while let Some(flow) = self.tenants.fair.next_computing() {
            let behind = decoding.all_got_more_than(flow, self.tenants.fair.counter(flow));
            let most = if decoding.least.is_empty() || behind {
                self.limits.step_rows
            } else {
                self.limits.mixed_rows
            };
            let room = (self.limits.step_rows - step.total).min(most.saturating_sub(step.prompt));
            let Some(id) = self.next_prompt(flow).filter(|_| room > 0) else {
                return;
            };
            let Some(sequence) = self.sequences.get_mut(&id) else {
                return;
            };
            let already = step.rows.get(&id).copied().unwrap_or(0);
            let left = sequence.tokens.len() - sequence.computed - already;
            let headroom = self.tenants.fair.headroom(flow);
            let payable = usize::try_from(headroom / PROMPT_COST).unwrap_or(usize::MAX);
            let mut rows = left.min(room).min(CHUNK_ROWS).min(payable);
            // A prompt's last row gives a token; it waits until that can be paid, too.
            if rows == left && headroom < PROMPT_COST * rows as u64 + ANSWER_COST {
                rows -= 1;
            }
            if rows == 0 {
                return;
            }
            let from = sequence.computed + already;
            let to_pay = (from + rows).saturating_sub(from.max(sequence.paid));
            let whole = rows == left;
            let cost = PROMPT_COST * to_pay as u64 + if whole { ANSWER_COST } else { 0 };
            sequence.paid = sequence.paid.max(from + rows);
            step.give(id, rows);
            step.prompt += rows;
            self.tenants.fair.promise(flow, -(to_pay as i64));
            self.tenants.fair.charge(flow, cost);
            let tenant = self.tenants.flows[flow].tenant;
            self.tenants
                .serve(tenant, |served| served.prompt += to_pay as u64);
            self.tenants.change(flow, |flow, _| {
                flow.chunks += 1;
                if whole {
                    flow.computing.retain(|&other| other != id);
                }
            });
        }
    }

    /// Which of a flow's prompts gets the next chunk.
    fn next_prompt(&self, flow: FlowId) -> Option<SequenceId> {
        let flow = &self.tenants.flows[flow];
        if flow.chunks % OLDEST_EVERY == OLDEST_EVERY - 1 {
            return flow.computing.iter().min().copied();
        }
        let left = |id: &SequenceId| {
            let left = self
                .sequences
                .get(id)
                .map_or(0, |s| s.tokens.len() - s.computed.max(s.paid));
            (left, *id)
        };
        flow.computing.iter().copied().min_by_key(left)
    }

    /// Cuts the offered drafts to what nobody has a certain use for: they are bets.
    fn give_draft_rows(&mut self, step: &Step) {
        let capacity = self.capacity_tokens();
        let mut room = (self.limits.step_rows - step.total)
            .min(self.limits.mixed_rows.saturating_sub(step.prompt));
        let mut bets: BTreeMap<FlowId, u64> = BTreeMap::new();
        let decoding: Vec<SequenceId> = self.decoding().collect();
        for id in decoding {
            let Some(sequence) = self.sequences.get_mut(&id) else {
                continue;
            };
            if !step.rows.contains_key(&id) {
                sequence.drafts.clear();
            }
            if sequence.drafts.is_empty() {
                continue;
            }
            let bet = bets.entry(sequence.flow).or_insert(0);
            let payable = self.tenants.fair.headroom(sequence.flow) / ANSWER_COST;
            let payable = usize::try_from(payable.saturating_sub(*bet)).unwrap_or(usize::MAX);
            let length = sequence.tokens.len();
            // With all drafts right, one more token comes; the last of them needs no place in the cache.
            let most = room.min(capacity.saturating_sub(length + 1)).min(payable);
            sequence.drafts.truncate(most);
            while sequence
                .table
                .reserve(length + sequence.drafts.len(), &mut self.blocks)
                .is_err()
                && sequence.drafts.pop().is_some()
            {}
            room -= sequence.drafts.len();
            *bet += sequence.drafts.len() as u64;
        }
    }

    fn build(&mut self, step: Step) -> Planned {
        let mut planned = Planned {
            batch: StepBatch::default(),
            samples: Vec::new(),
            owners: Vec::new(),
            prompt_rows: step.prompt,
            admitted: Vec::new(),
        };
        for id in step.order {
            let rows = step.rows.get(&id).copied().unwrap_or(0);
            self.put_rows(id, rows, &mut planned);
        }
        if !planned.owners.is_empty() {
            planned.admitted = std::mem::take(&mut self.admitted);
        }
        self.in_step = planned.owners.clone();
        planned
    }

    /// Puts `rows` of a sequence's uncomputed tokens into the step, and its drafts behind the last of them.
    fn put_rows(&mut self, id: SequenceId, rows: usize, planned: &mut Planned) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
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
            let slot = sequence.table.slot(position);
            debug_assert!(slot.is_some(), "rows have their blocks");
            batch.slots.push(slot.unwrap_or(u32::MAX));
            batch.tokens.push(token);
            batch.positions.push(position as u32);
        }
        batch.spans.push(Span {
            first_row,
            rows: rows + drafts.len(),
            context: from,
            blocks: sequence.table.ids(to + drafts.len()),
        });
        planned.owners.push(id);
        sequence.computed = to;
        if whole {
            sequence.phase = Phase::Decoding;
            let last = (first_row + rows - 1) as u32;
            batch.logits_rows.extend(last..batch.tokens.len() as u32);
            let drafts = drafts.to_vec();
            planned.samples.push(Sample { id, drafts });
        }
    }
}

//! Places and blocks: who gets them, and who must give his back.

use super::fair::{ANSWER_COST, FlowId, PROMPT_COST};
use super::{Admitted, Phase, Scheduler, Sequence, SequenceId};
use crate::kv::BlockTable;

/// With less the last row of a prompt cannot be paid: who has so little is as far ahead as may be.
const LEAST_HEADROOM: u64 = PROMPT_COST + ANSWER_COST;

impl Scheduler {
    /// Reserves the block for each decoding sequence's next position, oldest first. Where there is none, a younger one gives
    /// way; the oldest of all never does, so there is always one that comes to its end.
    pub(super) fn reserve_for_decode(&mut self) {
        let ids: Vec<SequenceId> = self.running.iter().copied().collect();
        for id in ids {
            while let Some(sequence) = self.sequences.get_mut(&id)
                && sequence.phase != Phase::Waiting
                && sequence
                    .table
                    .reserve(sequence.tokens.len(), &mut self.blocks)
                    .is_err()
            {
                let Some(youngest) = self.youngest_to_give_way() else {
                    break;
                };
                self.preempt(youngest);
            }
        }
    }

    /// The youngest sequence of the flow that holds most for its weight and has more than one; else the youngest of all.
    fn youngest_to_give_way(&self) -> Option<SequenceId> {
        let flows = self.running_flows();
        let most = flows
            .into_iter()
            .filter(|&flow| self.tenants.flows[flow].running.len() > 1)
            .max_by_key(|&flow| {
                let held = self.held_blocks(flow) as u64;
                ((held << 16) / self.tenants.fair.weight(flow), flow)
            });
        match most {
            Some(flow) => self.tenants.flows[flow].running.last().copied(),
            None => self.running.last().copied(),
        }
    }

    fn running_flows(&self) -> Vec<FlowId> {
        let mut flows: Vec<FlowId> = self
            .running
            .iter()
            .filter_map(|id| self.sequences.get(id).map(|s| s.flow))
            .collect();
        flows.sort_unstable();
        flows.dedup();
        flows
    }

    /// Blocks in the tables of a flow's sequences; shared ones count for each.
    fn held_blocks(&self, flow: FlowId) -> usize {
        let running = self.tenants.flows[flow].running.iter();
        running
            .filter_map(|id| self.sequences.get(id).map(|s| s.table.len()))
            .sum()
    }

    /// Takes a running sequence's blocks and place; it waits, before others of its flow, to be computed again.
    pub(super) fn preempt(&mut self, id: SequenceId) {
        let Some(mut sequence) = self.sequences.remove(&id) else {
            return;
        };
        let flow = sequence.flow;
        self.leave(id, &mut sequence);
        sequence.phase = Phase::Waiting;
        sequence.computed = 0;
        sequence.stored = 0;
        sequence.drafts.clear();
        self.sequences.insert(id, sequence);
        self.tenants.change(flow, |flow, tenant| {
            flow.waiting.insert((false, id));
            tenant.waiting += 1;
        });
        self.preemptions += 1;
    }

    /// Takes a sequence out of the running ones.
    pub(super) fn leave(&mut self, id: SequenceId, sequence: &mut Sequence) {
        sequence.table.release(&mut self.blocks);
        self.running.remove(&id);
        if sequence.phase == Phase::Computing {
            let unpaid = sequence.unpaid() as i64;
            self.tenants.fair.promise(sequence.flow, -unpaid);
        }
        self.tenants.change(sequence.flow, |flow, tenant| {
            flow.running.remove(&id);
            flow.computing.retain(|&other| other != id);
            tenant.running -= 1;
        });
    }

    /// Gives places to waiting sequences, in the order of the counters, until the next one does not fit. Nobody overtakes
    /// that one, so a long prompt is not starved by short ones.
    pub(super) fn admit_all(&mut self) {
        while let Some(flow) = self.tenants.fair.next_waiting()
            && self.admit(flow)
        {}
    }

    fn admit(&mut self, flow: FlowId) -> bool {
        let Some(&(_, id)) = self.tenants.flows[flow].waiting.first() else {
            return false;
        };
        while !self.fits(id) {
            let Some(other) = self.gives_way_to(flow, id) else {
                return false;
            };
            self.preempt(other);
        }
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        let found = sequence.table.reuse(&sequence.tokens, &mut self.blocks);
        let length = sequence.tokens.len();
        if sequence.table.reserve(length, &mut self.blocks).is_err() {
            // `fits` said otherwise; nothing is lost by waiting.
            debug_assert!(false, "a sequence that fits can reserve its blocks");
            sequence.table.release(&mut self.blocks);
            return false;
        }
        sequence.phase = Phase::Computing;
        sequence.computed = found;
        sequence.stored = found;
        sequence.paid = sequence.paid.max(found);
        let unpaid = sequence.unpaid() as i64;
        let first = !std::mem::replace(&mut sequence.admitted_before, true);
        if first {
            self.admitted.push(Admitted {
                id,
                waited_ms: self.now_ms.saturating_sub(sequence.submitted_ms),
                cached_tokens: found,
            });
        }
        self.running.insert(id);
        self.tenants.fair.promise(flow, unpaid);
        self.tenants.change(flow, |flow, tenant| {
            flow.waiting.pop_first();
            flow.running.insert(id);
            flow.computing.push(id);
            tenant.waiting -= 1;
            tenant.running += 1;
        });
        if first {
            let tenant = self.tenants.flows[flow].tenant;
            self.tenants
                .serve(tenant, |served| served.cached += found as u64);
        }
        true
    }

    /// Whether there are a place and blocks for a waiting sequence, and one block more for each running one, so that the
    /// newcomer need not give way at the next step.
    fn fits(&mut self, id: SequenceId) -> bool {
        if self.running.len() >= self.limits.max_sequences {
            return false;
        }
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        let (found, idle) = sequence.table.findable(&sequence.tokens, &self.blocks);
        let needed = BlockTable::blocks_for(sequence.tokens.len()) - found;
        let spare = match self.running.len() {
            0 => 0,
            running => running + 1,
        };
        needed + spare <= self.blocks.available() - idle
    }

    /// The sequence that gives way so that `id` of `flow` can come in: the youngest of the flow that got most, if that flow
    /// got more than this one, holds more than its share of places or blocks, and this one stays within its own. So who
    /// floods the places does not keep others waiting for the end of his answers, and two never take from each other in
    /// turns. Who is as far ahead as may be gives way in any case.
    fn gives_way_to(&self, flow: FlowId, id: SequenceId) -> Option<SequenceId> {
        let places = self.limits.max_sequences;
        let tenants = &self.tenants;
        let needed = BlockTable::blocks_for(self.sequences.get(&id)?.tokens.len());
        let total = self.blocks.total();
        let within = tenants.flows[flow].running.len() < tenants.share(flow, places)
            && self.held_blocks(flow) + needed <= tenants.share(flow, total);
        let (_, other) = self
            .running_flows()
            .into_iter()
            .filter(|&other| other != flow)
            .filter(|&other| tenants.fair.counter(other) > tenants.fair.counter(flow))
            .filter(|&other| {
                let running = tenants.flows[other].running.len();
                let beyond = running > tenants.share(other, places)
                    || self.held_blocks(other) > tenants.share(other, total);
                within && beyond || tenants.fair.headroom(other) < LEAST_HEADROOM
            })
            .map(|other| (tenants.fair.counter(other), other))
            .max()?;
        tenants.flows[other].running.last().copied()
    }
}

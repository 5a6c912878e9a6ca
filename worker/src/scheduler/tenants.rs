//! Who asks: tenants, and their requests of each class as a flow with its share.

use std::collections::{BTreeMap, BTreeSet};

use coordinator::ids::TenantId;

use super::SequenceId;
use super::fair::{CREDIT_TOKENS, Fair, FlowId};
use crate::client::Class;
use crate::kv::{Blocks, Owner};

/// An interactive request counts as much as so many of the background. A weight and not an order: background work always
/// gets a seventeenth, so it cannot starve, and interactive requests do not notice.
const INTERACTIVE_WEIGHT: u64 = 16;

/// What a tenant got in some time, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Served {
    /// Of prompts, computed.
    pub prompt: u64,
    /// Of prompts, found in the cache.
    pub cached: u64,
    /// Of answers.
    pub answer: u64,
}

#[derive(Debug)]
pub(super) struct Tenant {
    id: TenantId,
    pub owner: Owner,
    pub waiting: usize,
    pub running: usize,
    /// Since it was last asked for.
    served: Served,
}

/// One tenant's requests of one class.
#[derive(Debug, Default)]
pub(super) struct Flow {
    pub tenant: usize,
    /// Those that gave way first, then by arrival.
    pub waiting: BTreeSet<(bool, SequenceId)>,
    pub running: BTreeSet<SequenceId>,
    /// Running ones whose prompt is not computed to its end.
    pub computing: Vec<SequenceId>,
    /// Chunks given so far; every [`super::plan::OLDEST_EVERY`]th goes to the oldest prompt.
    pub chunks: u64,
}

impl Flow {
    fn busy(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }
}

/// All who ever asked; there are as many as municipalities.
#[derive(Debug)]
pub(super) struct Tenants {
    numbers: BTreeMap<TenantId, usize>,
    pub all: Vec<Tenant>,
    /// Two for each tenant: interactive, background.
    pub flows: Vec<Flow>,
    pub fair: Fair,
    /// Of the flows that have anything here.
    pub busy_weight: u64,
    tenant_running: usize,
    /// Whose `served` is not empty.
    served: Vec<usize>,
}

impl Tenants {
    pub fn new(fair: Fair, tenant_running: usize) -> Self {
        Self {
            numbers: BTreeMap::new(),
            all: Vec::new(),
            flows: Vec::new(),
            fair,
            busy_weight: 0,
            tenant_running,
            served: Vec::new(),
        }
    }

    /// A tenant's number; a new one has weight 1.
    pub fn number(&mut self, id: &TenantId, blocks: &mut Blocks) -> usize {
        if let Some(&number) = self.numbers.get(id) {
            return number;
        }
        let number = self.all.len();
        self.numbers.insert(id.clone(), number);
        self.all.push(Tenant {
            id: id.clone(),
            owner: blocks.add_owner(1),
            waiting: 0,
            running: 0,
            served: Served::default(),
        });
        // Background work that comes back has nobody who waits for it.
        for (weight, credit) in [(INTERACTIVE_WEIGHT, CREDIT_TOKENS), (1, 0)] {
            self.fair.open(weight, credit);
            self.flows.push(Flow {
                tenant: number,
                ..Flow::default()
            });
        }
        number
    }

    /// Has a tenant find nothing again of what was computed for him.
    pub fn forget(&mut self, id: &TenantId, blocks: &mut Blocks) {
        if let Some(&number) = self.numbers.get(id) {
            let tenant = &mut self.all[number];
            tenant.owner = blocks.forget(tenant.owner);
        }
    }

    pub fn flow(tenant: usize, class: Class) -> FlowId {
        2 * tenant + usize::from(class == Class::Background)
    }

    pub fn set_weight(&mut self, tenant: usize, weight: u32, blocks: &mut Blocks) {
        blocks.set_weight(self.all[tenant].owner, weight);
        for (class, factor) in [
            (Class::Interactive, INTERACTIVE_WEIGHT),
            (Class::Background, 1),
        ] {
            let flow = Self::flow(tenant, class);
            let before = self.fair.weight(flow);
            self.fair
                .set_weight(flow, factor * u64::from(weight.max(1)));
            if self.flows[flow].busy() {
                self.busy_weight = self.busy_weight - before + self.fair.weight(flow);
            }
        }
    }

    /// Records that a tenant was served.
    pub fn serve(&mut self, tenant: usize, add: impl FnOnce(&mut Served)) {
        let served = &mut self.all[tenant].served;
        if *served == Served::default() {
            self.served.push(tenant);
        }
        add(served);
    }

    pub fn take_served(&mut self) -> Vec<(TenantId, Served)> {
        let mut numbers = std::mem::take(&mut self.served);
        numbers.sort_unstable();
        numbers.dedup();
        let take = |number: usize| {
            let tenant = &mut self.all[number];
            (tenant.id.clone(), std::mem::take(&mut tenant.served))
        };
        numbers.into_iter().map(take).collect()
    }

    /// Changes a flow, and tells the counters what it and its tenant's other flow want now.
    pub fn change<T>(
        &mut self,
        flow: FlowId,
        change: impl FnOnce(&mut Flow, &mut Tenant) -> T,
    ) -> T {
        let state = &mut self.flows[flow];
        let was_busy = state.busy();
        let result = change(state, &mut self.all[state.tenant]);
        let weight = self.fair.weight(flow);
        match (was_busy, state.busy()) {
            (false, true) => self.busy_weight += weight,
            (true, false) => self.busy_weight -= weight,
            _ => {}
        }
        let may_run = self.all[state.tenant].running < self.tenant_running;
        for flow in [flow & !1, flow | 1] {
            let state = &self.flows[flow];
            let waits = may_run && !state.waiting.is_empty();
            self.fair.set(flow, waits, !state.computing.is_empty());
        }
        result
    }

    /// A flow's share of `all`, at least one.
    pub fn share(&self, flow: FlowId, all: usize) -> usize {
        let share =
            all as u128 * u128::from(self.fair.weight(flow)) / u128::from(self.busy_weight.max(1));
        (share as usize).clamp(1, all.max(1))
    }
}

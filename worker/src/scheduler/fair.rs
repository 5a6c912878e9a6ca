//! Virtual token counters: who is served next so that everybody gets his share.
//!
//! After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588). Each flow has a counter
//! of the service it got, prompt tokens at [`PROMPT_COST`] and answer tokens at [`ANSWER_COST`], divided by its weight. The
//! flow with the least counter is served next. A flow that had nothing to do is lifted when it comes back, so that idleness
//! cannot be saved up.
//!
//! The paper's Theorem 4.4: over any time in which two flows both have work waiting, the service they got differs by at
//! most 2·max(w_p·L_input, w_q·M), with L_input the longest prompt and M the tokens of the KV cache. There it follows from
//! what can run at once. Here sequences grow into the cache instead of reserving it, so the bound U = max(w_p·L_input,
//! w_q·M) on the distance of two waiting flows' counters is *kept* ([`Fair::headroom`]): who is so far ahead gets no row
//! until the last has caught up, and who comes back is not put farther behind. Two counters that are never lifted and at
//! most U apart at both ends of a time have risen by amounts at most 2·U apart: the theorem, for counters divided by
//! weights.
//!
//! One thing is added. A flow that used less than its share may come back up to [`CREDIT_TOKENS`] behind the others (never
//! farther than the bound), so that somebody who asks now and then has his prompt computed at once, not in turns with those
//! who ask all the time.

use std::collections::BTreeSet;

/// Of one prompt token computed: the paper's w_p.
pub const PROMPT_COST: u64 = 1;
/// Of one answer token: the paper's w_q. A token of an answer takes a step of its own, one of a prompt a row of a step.
pub const ANSWER_COST: u64 = 2;
/// How far behind the others a flow may come back: some long prompts with their sources, and the answers. With so much, who
/// asks for half of his share finds his first tokens as soon as if he were alone (`tests/flood.rs`); with half as much, a few
/// questions in a row already wait.
pub const CREDIT_TOKENS: u64 = 16_384;

/// Of counters, so that weights divide costs with little rounding.
const SCALE: i64 = 720_720;

/// Number of a flow: one tenant's requests of one class.
pub type FlowId = usize;

#[derive(Debug, Clone)]
struct Account {
    weight: i64,
    /// Tokens that it may come back behind.
    credit: u64,
    counter: i64,
    /// Tokens of prompts that were admitted and are not computed yet.
    promised: i64,
    /// How far above the least waiting flow it may get.
    bound: i64,
    waits: bool,
    computes: bool,
}

impl Account {
    fn scaled(&self, cost: u64) -> i64 {
        i64::try_from(cost)
            .unwrap_or(i64::MAX)
            .saturating_mul(SCALE)
            / self.weight
    }

    fn with_promises(&self) -> i64 {
        let promised = self.scaled(PROMPT_COST * self.promised.unsigned_abs());
        self.counter.saturating_add(promised)
    }
}

/// The counters of all flows.
#[derive(Debug, Clone)]
pub struct Fair {
    accounts: Vec<Account>,
    /// Cost that one flow of weight 1 may be ahead.
    bound: u64,
    /// Flows that have something waiting, by what they got and were promised.
    waiting: BTreeSet<(i64, FlowId)>,
    /// Flows that have prompts to compute, by what they got.
    computing: BTreeSet<(i64, FlowId)>,
    /// Flows that have either, by what they got.
    backlogged: BTreeSet<(i64, FlowId)>,
    /// The same, by what they got less their bound.
    floors: BTreeSet<(i64, FlowId)>,
    /// The most that the least counter among the backlogged ever was.
    virtual_time: i64,
}

impl Fair {
    /// For prompts of at most `input_tokens` in a cache of `cache_tokens`.
    pub fn new(input_tokens: usize, cache_tokens: usize) -> Self {
        Self {
            accounts: Vec::new(),
            bound: bound(input_tokens, cache_tokens),
            waiting: BTreeSet::new(),
            computing: BTreeSet::new(),
            backlogged: BTreeSet::new(),
            floors: BTreeSet::new(),
            virtual_time: 0,
        }
    }

    /// A new flow with a share of `weight`, which may come back `credit` tokens behind the others.
    pub fn open(&mut self, weight: u64, credit: u64) -> FlowId {
        let weight = weight.clamp(1, 1 << 32) as i64;
        let mut account = Account {
            weight,
            credit,
            counter: 0,
            promised: 0,
            bound: 0,
            waits: false,
            computes: false,
        };
        account.bound = account.scaled(self.bound);
        self.accounts.push(account);
        self.accounts.len() - 1
    }

    /// Changes a flow's share for what is served from now on.
    pub fn set_weight(&mut self, flow: FlowId, weight: u64) {
        let bound = self.bound;
        self.change(flow, |a| {
            a.weight = weight.clamp(1, 1 << 32) as i64;
            a.bound = a.scaled(bound);
        });
    }

    /// The machine was idle: nobody owes anybody. Without this, who asks now and then would have to make up for all that he got
    /// while others had nothing to do. Counters of flows that have work must not be forgotten, so there may be none.
    pub fn settle(&mut self) {
        debug_assert!(self.backlogged.is_empty(), "somebody has work");
        for account in &mut self.accounts {
            account.counter = 0;
        }
        self.virtual_time = 0;
    }

    pub fn weight(&self, flow: FlowId) -> u64 {
        self.accounts[flow].weight as u64
    }

    pub fn counter(&self, flow: FlowId) -> i64 {
        self.accounts[flow].counter
    }

    /// Says what a flow has to do: requests that could be admitted, prompts under way. Coming back it is lifted.
    pub fn set(&mut self, flow: FlowId, waits: bool, computes: bool) {
        let account = &self.accounts[flow];
        if (account.waits, account.computes) == (waits, computes) {
            return;
        }
        let comes_back = !(account.waits || account.computes) && (waits || computes);
        let credit = account.scaled(account.credit);
        if comes_back {
            let least = self.least();
            self.virtual_time = self.virtual_time.max(least.unwrap_or(i64::MIN));
            let lifted = account.counter.max(self.virtual_time - credit);
            // Neither farther behind nor farther ahead of anybody than the bound.
            let floor = self.floors.last().map_or(i64::MIN, |&(floor, _)| floor);
            let ceiling = least.map_or(i64::MAX, |l| l.saturating_add(account.bound));
            self.accounts[flow].counter = lifted.min(ceiling).max(floor);
        }
        self.change(flow, |a| (a.waits, a.computes) = (waits, computes));
    }

    /// The backlogged flow that got least, or what it got when there was one.
    fn least(&self) -> Option<i64> {
        self.backlogged.first().map(|&(counter, _)| counter)
    }

    /// Whose request is admitted next.
    pub fn next_waiting(&self) -> Option<FlowId> {
        self.waiting.first().map(|&(_, flow)| flow)
    }

    /// Whose prompt is computed next.
    pub fn next_computing(&self) -> Option<FlowId> {
        self.computing.first().map(|&(_, flow)| flow)
    }

    /// A prompt was admitted of which this is to be computed yet (or, negative, will not be after all).
    pub fn promise(&mut self, flow: FlowId, prompt_tokens: i64) {
        self.change(flow, |a| {
            a.promised += prompt_tokens;
            debug_assert!(a.promised >= 0, "more taken back than was promised");
        });
    }

    /// A flow was served.
    pub fn charge(&mut self, flow: FlowId, cost: u64) {
        let scaled = self.accounts[flow].scaled(cost);
        self.change(flow, |a| a.counter = a.counter.saturating_add(scaled));
    }

    /// Most cost that a flow may be charged now. Unbounded for one that nobody waits beside.
    pub fn headroom(&self, flow: FlowId) -> u64 {
        let account = &self.accounts[flow];
        let Some(least) = self.least().filter(|_| account.waits || account.computes) else {
            return u64::MAX;
        };
        let room = least
            .saturating_add(account.bound)
            .saturating_sub(account.counter);
        u64::try_from(room.saturating_mul(account.weight) / SCALE).unwrap_or(0)
    }

    fn change(&mut self, flow: FlowId, change: impl FnOnce(&mut Account)) {
        if let Some(least) = self.least() {
            self.virtual_time = self.virtual_time.max(least);
        }
        let account = &mut self.accounts[flow];
        let places = |a: &Account| {
            (
                (a.with_promises(), flow),
                (a.counter, flow),
                (a.counter.saturating_sub(a.bound), flow),
            )
        };
        let (promised, got, floor) = places(account);
        self.waiting.remove(&promised);
        self.computing.remove(&got);
        self.backlogged.remove(&got);
        self.floors.remove(&floor);
        change(account);
        let (promised, got, floor) = places(account);
        if account.waits {
            self.waiting.insert(promised);
        }
        if account.computes {
            self.computing.insert(got);
        }
        if account.waits || account.computes {
            self.backlogged.insert(got);
            self.floors.insert(floor);
        }
    }
}

/// The paper's max(w_p·L_input, w_q·M), in cost: how far apart two backlogged flows' counters may be.
pub fn bound(input_tokens: usize, cache_tokens: usize) -> u64 {
    (PROMPT_COST * input_tokens as u64).max(ANSWER_COST * cache_tokens as u64)
}

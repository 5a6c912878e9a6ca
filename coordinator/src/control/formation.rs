//! Which groups to form: a pure decision of the control leader from the state, the heartbeats and the time.

use std::collections::BTreeMap;

use super::command::Command;
use super::health::{Liveness, Presence};
use super::state::{ControlState, Deployment, Group, GroupState, Node, RankAssignment, StoreGroup};
use crate::ids::{Device, Epoch, GroupId, NodeId, RaftGroupId, Rank, Role};

/// A first forming waits so long for all wished workers, so that a start-up does not form twice.
const WORKERS_PATIENCE_MS: u64 = 2_000;
/// The store's first group waits so long for three members: a group that is made too small stays so, and machines that are
/// switched on together differ by that much.
pub(super) const STORES_PATIENCE_MS: u64 = 60_000;
/// A wait for store nodes is worth a warning after this time.
const STORES_WARN_MS: u64 = 5_000;
/// Copies of everything that the store keeps.
pub(super) const STORE_REPLICAS: usize = 3;
/// A group grows only after so long without a request, so that a client between two requests is not interrupted.
const IDLE_BEFORE_GROWING_MS: u64 = 1_000;
/// A forming that failed or broke with the same workers is repeated after this time, doubled each time up to the maximum.
const RETRY_FIRST_MS: u64 = 1_000;
const RETRY_MAX_MS: u64 = 60_000;
/// A group that was ready for so long has got over its earlier failures.
const STEADY_MS: u64 = 10_000;

/// The leader's memory between two decisions. Starts empty with each leadership.
#[derive(Debug, Default)]
pub struct Formation {
    /// Since when a first forming waits for workers, by model.
    waiting: BTreeMap<String, u64>,
    /// Since when a group that could grow is idle.
    idle: BTreeMap<GroupId, u64>,
    attempts: BTreeMap<String, Attempt>,
    /// Since when the store's first group waits for members.
    stores_since_ms: Option<u64>,
}

/// The last forming of a model's group.
#[derive(Debug)]
struct Attempt {
    at_ms: u64,
    /// How often in a row it was repeated with the same workers.
    repeated: u32,
    /// Processes that could have been chosen.
    workers: Vec<(NodeId, u64)>,
}

/// Why a group is to be formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    /// There is none, all its ranks are gone, or the deployment was changed: take the time to form it well.
    Anew,
    /// Some rank is gone: the survivors go on at once.
    Lost,
    /// All ranks live, but the group broke or failed.
    Again,
    /// More workers are there than the group has ranks.
    Grow,
}

impl Formation {
    /// What to propose now. `key` makes the secret of a new epoch. Calling again before the proposals are applied gives
    /// the same commands; the epoch they expect makes the second of them stale.
    pub fn decide(
        &mut self,
        now_ms: u64,
        state: &ControlState,
        liveness: &Liveness,
        key: &mut dyn FnMut() -> [u8; 32],
    ) -> Vec<Command> {
        let mut commands = node_verdicts(now_ms, state, liveness);
        commands.extend(self.store_group(now_ms, state, liveness));
        for deployment in state.deployments.values() {
            let group = state.group_of(&deployment.model);
            if let Some(ranks) = self.group(now_ms, state, liveness, deployment) {
                let expect = group.map_or(Epoch(0), |g| g.epoch);
                commands.push(Command::FormGroup {
                    model: deployment.model.clone(),
                    expect,
                    ranks,
                    key: key(),
                });
            } else if let Some(group) = group.filter(|g| orphaned(now_ms, state, liveness, g)) {
                let reason = "no worker of this group is alive; start one".to_owned();
                commands.push(Command::RankFailed {
                    group: group.id,
                    epoch: group.epoch,
                    rank: Rank(0),
                    reason,
                });
            }
        }
        self.waiting
            .retain(|model, _| state.deployments.contains_key(model));
        self.attempts
            .retain(|model, _| state.deployments.contains_key(model));
        self.idle
            .retain(|group, _| state.groups.contains_key(group));
        commands
    }

    /// Whether the store's first group waits for more members, for longer than a usual start takes.
    pub fn waits_for_stores(&self, now_ms: u64) -> bool {
        self.stores_since_ms
            .is_some_and(|since| now_ms >= since + STORES_WARN_MS)
    }

    fn group(
        &mut self,
        now_ms: u64,
        state: &ControlState,
        liveness: &Liveness,
        deployment: &Deployment,
    ) -> Option<Vec<RankAssignment>> {
        let group = state.group_of(&deployment.model);
        let broken = group.filter(|g| liveness.is_broken(g.id, g.epoch));
        let presence = |node: &Node| match broken {
            Some(group) => {
                liveness.presence_after_break(now_ms, group.id, node.id, node.incarnation)
            }
            None => liveness.presence(now_ms, node.id, node.incarnation),
        };
        let mut live = Vec::new();
        let mut unsure = 0;
        for node in state.nodes_with(Role::Worker) {
            match presence(node) {
                _ if node.incarnation == 0
                    || node.data_addr.is_none()
                    || node.devices.is_empty() => {}
                Presence::Live => live.push(node),
                Presence::Unsure => unsure += 1,
                Presence::Down => {}
            }
        }
        let wished = deployment.ranks as usize;
        let reason = self.reason(now_ms, state, liveness, deployment, group, &live, &presence)?;
        let short = live.len() < wished;
        // Whether these are dead or late shows within the time to live.
        if short && unsure > 0 {
            return None;
        }
        if reason == Reason::Anew {
            let since = *self
                .waiting
                .entry(deployment.model.clone())
                .or_insert(now_ms);
            if live.is_empty() {
                self.waiting.remove(&deployment.model);
            } else if short && now_ms < since + WORKERS_PATIENCE_MS {
                return None;
            }
        }
        let ranks = place(state, group, &live, wished);
        if ranks.is_empty() || !self.may_try(now_ms, deployment, reason, &live) {
            return None;
        }
        self.waiting.remove(&deployment.model);
        Some(ranks)
    }

    #[allow(clippy::too_many_arguments)]
    fn reason(
        &mut self,
        now_ms: u64,
        state: &ControlState,
        liveness: &Liveness,
        deployment: &Deployment,
        group: Option<&Group>,
        live: &[&Node],
        presence: &dyn Fn(&Node) -> Presence,
    ) -> Option<Reason> {
        let Some(group) = group else {
            return Some(Reason::Anew);
        };
        let changed = group.path != deployment.path
            || group.kind != deployment.kind
            || group.context_tokens != deployment.context_tokens
            || group.ranks.len() > deployment.ranks as usize;
        let lost = |rank: &RankAssignment| match state.nodes.get(&rank.node) {
            Some(node) => node.incarnation != rank.incarnation || presence(node) == Presence::Down,
            None => true,
        };
        if changed || group.ranks.iter().all(lost) {
            return Some(Reason::Anew);
        }
        if group.ranks.iter().any(lost) {
            return Some(Reason::Lost);
        }
        if liveness.is_broken(group.id, group.epoch) {
            return Some(Reason::Again);
        }
        match group.state {
            GroupState::Forming => None,
            GroupState::Failed { .. } => Some(Reason::Again),
            GroupState::Ready => {
                if self
                    .attempts
                    .get(&group.model)
                    .is_some_and(|a| now_ms >= a.at_ms + STEADY_MS)
                {
                    self.attempts.remove(&group.model);
                }
                let more = group.ranks.len() < (deployment.ranks as usize).min(live.len());
                let leader = group.leader()?;
                let busy = liveness
                    .health(group.id, group.epoch, leader.node)
                    .is_none_or(|h| h.active_requests > 0);
                if !more || busy {
                    self.idle.remove(&group.id);
                    return None;
                }
                let since = *self.idle.entry(group.id).or_insert(now_ms);
                (now_ms >= since + IDLE_BEFORE_GROWING_MS).then_some(Reason::Grow)
            }
        }
    }

    /// Slows down formings that fail again and again with the same workers.
    fn may_try(
        &mut self,
        now_ms: u64,
        deployment: &Deployment,
        reason: Reason,
        live: &[&Node],
    ) -> bool {
        let workers: Vec<_> = live.iter().map(|n| (n.id, n.incarnation)).collect();
        let mut repeated = 0;
        if let Some(last) = self
            .attempts
            .get(&deployment.model)
            .filter(|a| a.workers == workers)
            && reason == Reason::Again
        {
            let pause_ms = (RETRY_FIRST_MS << last.repeated.min(6)).min(RETRY_MAX_MS);
            if now_ms < last.at_ms + pause_ms {
                return false;
            }
            repeated = last.repeated + 1;
        }
        self.attempts.insert(
            deployment.model.clone(),
            Attempt {
                at_ms: now_ms,
                repeated,
                workers,
            },
        );
        true
    }

    /// The store's first Raft group; later ones are an operator's decision.
    fn store_group(
        &mut self,
        now_ms: u64,
        state: &ControlState,
        liveness: &Liveness,
    ) -> Option<Command> {
        if !state.store_groups.is_empty() {
            self.stores_since_ms = None;
            return None;
        }
        let members: Vec<_> = state
            .nodes_with(Role::Store)
            .filter(|n| liveness.presence(now_ms, n.id, n.incarnation) == Presence::Live)
            .map(|n| n.id)
            .take(STORE_REPLICAS)
            .collect();
        if members.is_empty() {
            self.stores_since_ms = None;
            return None;
        }
        if members.len() < STORE_REPLICAS {
            let since = *self.stores_since_ms.get_or_insert(now_ms);
            if now_ms < since + STORES_PATIENCE_MS {
                return None;
            }
        }
        Some(Command::CreateStoreGroup(StoreGroup {
            id: RaftGroupId(1),
            members,
        }))
    }
}

/// Nodes whose `up` differs from what the heartbeats say.
fn node_verdicts(now_ms: u64, state: &ControlState, liveness: &Liveness) -> Vec<Command> {
    let mut commands = Vec::new();
    for node in state.nodes.values().filter(|n| n.incarnation != 0) {
        let up = match liveness.presence(now_ms, node.id, node.incarnation) {
            Presence::Live => true,
            Presence::Down => false,
            Presence::Unsure => continue,
        };
        if up != node.up {
            commands.push(Command::SetNodeUp {
                node: node.id,
                incarnation: node.incarnation,
                up,
            });
        }
    }
    commands
}

/// Whether a group that the state does not call failed has nobody left.
fn orphaned(now_ms: u64, state: &ControlState, liveness: &Liveness, group: &Group) -> bool {
    let dead = |rank: &RankAssignment| {
        let node = state.nodes.get(&rank.node);
        node.is_none_or(|n| liveness.presence(now_ms, n.id, n.incarnation) == Presence::Down)
    };
    !matches!(group.state, GroupState::Failed { .. }) && group.ranks.iter().all(dead)
}

/// Chooses workers: those that hold a rank of the group already stay, in their order, so that little is loaded anew;
/// then those that host the fewest ranks.
fn place(
    state: &ControlState,
    group: Option<&Group>,
    live: &[&Node],
    wished: usize,
) -> Vec<RankAssignment> {
    let held = |node: &Node| group.and_then(|g| g.rank_on(node.id)).map(|r| r.rank);
    let hosted = |node: &Node| {
        state
            .groups
            .values()
            .filter(|g| g.rank_on(node.id).is_some())
            .count()
    };
    let mut order: Vec<_> = live.to_vec();
    order.sort_by_key(|n| (held(n).is_none(), held(n), hosted(n), n.id));
    let chosen = order.into_iter().take(wished).enumerate();
    chosen
        .filter_map(|(at, node)| {
            Some(RankAssignment {
                rank: Rank(u32::try_from(at).ok()?),
                node: node.id,
                incarnation: node.incarnation,
                data_addr: node.data_addr?,
                device: largest_device(node)?.clone(),
                report: None,
            })
        })
        .collect()
}

fn largest_device(node: &Node) -> Option<&Device> {
    node.devices.iter().max_by_key(|d| d.memory_bytes)
}

#[cfg(test)]
#[path = "formation_tests.rs"]
mod tests;

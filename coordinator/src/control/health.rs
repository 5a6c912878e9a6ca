//! Heartbeats, and what the control leader concludes from them: a pure function of what was heard and when.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::state::ControlState;
use crate::ids::{Epoch, GroupId, NodeId, Rank};

/// Every node tells the control leader that it lives this often.
pub const HEARTBEAT_INTERVAL_MS: u64 = 250;
/// A node is down after six missed heartbeats; a new leader waits as long before it judges anybody.
pub const HEARTBEAT_TTL_MS: u64 = 1_500;
/// When a group reports itself broken, a member that missed two heartbeats is taken for the culprit.
pub const SUSPECT_MS: u64 = 600;
/// Whoever missed a heartbeat is looked for at its data port: several times before [`HEARTBEAT_TTL_MS`] is over.
pub const LOOK_FOR_MS: u64 = 400;
/// A process whose port answered is there for so long; it is looked for again meanwhile.
const VOUCHED_MS: u64 = 600;
/// A process that is there and says nothing for so long hangs: four times as long as one may be silent that is not there.
const HANGS_MS: u64 = 6_000;
/// The judge looks at least this often; a longer gap is his own stall, in which he could hear nobody.
const BLINK_MS: u64 = HEARTBEAT_INTERVAL_MS;

/// What a node tells the control leader every [`HEARTBEAT_INTERVAL_MS`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    pub node: NodeId,
    pub incarnation: u64,
    /// The control state's revision that the node acts on.
    pub revision: u64,
    pub groups: Vec<GroupHealth>,
}

/// How a node finds a group that it hosts a rank of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupHealth {
    pub group: GroupId,
    pub epoch: Epoch,
    pub rank: Rank,
    /// Requests in the scheduler; rank 0 only.
    pub active_requests: u32,
    /// Why the group cannot go on in this epoch, as when a peer's connection broke.
    pub broken: Option<String>,
}

/// The judge's time: it stands still while he does not come to look, so that nobody's silence is counted that he slept through.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attention {
    counted_ms: u64,
    looked_ms: u64,
}

impl Attention {
    /// The time now, of a clock that shows `clock_ms`.
    pub fn now_ms(&self, clock_ms: u64) -> u64 {
        self.counted_ms + clock_ms.saturating_sub(self.looked_ms).min(BLINK_MS)
    }

    /// He looks.
    pub fn look(&mut self, clock_ms: u64) {
        self.counted_ms = self.now_ms(clock_ms);
        self.looked_ms = self.looked_ms.max(clock_ms);
    }
}

/// What the leader heard last of one node. Times are monotone milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    at_ms: u64,
    incarnation: u64,
    groups: Vec<GroupHealth>,
}

/// The control leader's memory of heartbeats during one term of leadership.
#[derive(Debug)]
pub struct Liveness {
    since_ms: u64,
    seen: BTreeMap<NodeId, Seen>,
    /// When a node's data port answered last.
    vouched: BTreeMap<NodeId, u64>,
    /// When a group's epoch was first reported broken.
    broken: BTreeMap<GroupId, (Epoch, u64)>,
}

/// How sure the leader is of a node's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Heard within the time that was asked for.
    Live,
    /// Not heard yet or not lately, but not long enough to call it down, or its port answers.
    Unsure,
    Down,
}

impl Liveness {
    /// Begins with nobody heard; everybody has the full time to live from now on.
    pub fn new(now_ms: u64) -> Liveness {
        Liveness {
            since_ms: now_ms,
            seen: BTreeMap::new(),
            vouched: BTreeMap::new(),
            broken: BTreeMap::new(),
        }
    }

    /// Takes in a heartbeat.
    pub fn heard(&mut self, now_ms: u64, heartbeat: Heartbeat) {
        for health in heartbeat.groups.iter().filter(|h| h.broken.is_some()) {
            let first = self
                .broken
                .entry(health.group)
                .or_insert((health.epoch, now_ms));
            if first.0 < health.epoch {
                *first = (health.epoch, now_ms);
            }
        }
        let seen = Seen {
            at_ms: now_ms,
            incarnation: heartbeat.incarnation,
            groups: heartbeat.groups,
        };
        self.seen.insert(heartbeat.node, seen);
    }

    /// The kernel of the node's machine took a connection to its data port: the machine lives, and the process has not ended,
    /// however little of a processor it gets.
    pub fn vouched(&mut self, now_ms: u64, node: NodeId) {
        self.vouched.insert(node, now_ms);
    }

    /// How long nothing was heard of `node`.
    pub fn silent_ms(&self, now_ms: u64, node: NodeId) -> u64 {
        let heard_ms = self.seen.get(&node).map_or(self.since_ms, |s| s.at_ms);
        now_ms.saturating_sub(heard_ms)
    }

    /// What silence means: a process that is there may be starved of its processor, but not for ever.
    fn silent(&self, now_ms: u64, node: NodeId) -> Presence {
        let there = self.vouched.get(&node);
        let there = there.is_some_and(|&at_ms| now_ms < at_ms + VOUCHED_MS);
        if there && self.silent_ms(now_ms, node) < HANGS_MS {
            Presence::Unsure
        } else {
            Presence::Down
        }
    }

    /// Forgets nodes and groups that the state no longer has.
    pub fn retain(&mut self, state: &ControlState) {
        self.seen.retain(|id, _| state.nodes.contains_key(id));
        self.vouched.retain(|id, _| state.nodes.contains_key(id));
        self.broken
            .retain(|id, (epoch, _)| state.groups.get(id).is_some_and(|g| g.epoch == *epoch));
    }

    /// Whether the process `incarnation` of `node` lives, by the ordinary time to live.
    pub fn presence(&self, now_ms: u64, node: NodeId, incarnation: u64) -> Presence {
        match self.seen.get(&node) {
            Some(seen)
                if seen.incarnation == incarnation && now_ms < seen.at_ms + HEARTBEAT_TTL_MS =>
            {
                Presence::Live
            }
            // A registration reaches the state before its first heartbeat reaches the leader.
            Some(seen)
                if seen.incarnation != incarnation && now_ms < seen.at_ms + HEARTBEAT_TTL_MS =>
            {
                Presence::Unsure
            }
            None if now_ms < self.since_ms + HEARTBEAT_TTL_MS => Presence::Unsure,
            _ => self.silent(now_ms, node),
        }
    }

    /// Whether `node` was heard after the group's break-down: `Down` already after [`SUSPECT_MS`] of silence.
    pub fn presence_after_break(
        &self,
        now_ms: u64,
        group: GroupId,
        node: NodeId,
        incarnation: u64,
    ) -> Presence {
        let Some((_, broken_ms)) = self.broken.get(&group) else {
            return self.presence(now_ms, node, incarnation);
        };
        match self.seen.get(&node) {
            Some(seen) if seen.incarnation == incarnation && seen.at_ms >= *broken_ms => {
                Presence::Live
            }
            Some(seen) if now_ms < seen.at_ms.max(*broken_ms) + SUSPECT_MS => Presence::Unsure,
            None if now_ms < (*broken_ms).max(self.since_ms) + SUSPECT_MS => Presence::Unsure,
            // A peer has seen its end; whoever answers at its port by now may be its successor.
            _ => Presence::Down,
        }
    }

    /// Whether any rank reported that `epoch` of `group` cannot go on.
    pub fn is_broken(&self, group: GroupId, epoch: Epoch) -> bool {
        self.broken.get(&group).is_some_and(|(e, _)| *e == epoch)
    }

    /// What rank 0's node last said of the group in this epoch.
    pub fn health(&self, group: GroupId, epoch: Epoch, node: NodeId) -> Option<&GroupHealth> {
        self.seen
            .get(&node)?
            .groups
            .iter()
            .find(|h| h.group == group && h.epoch == epoch)
    }
}

//! Membership changes: new members learn first, then everything changes at once.

use std::collections::BTreeSet;

use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2};
use tokio::time::{sleep, timeout};

use super::core::Event;
use super::{Error, Replica, ReplicaStatus};
use crate::clock::Duration;
use crate::ids::NodeId;

/// One change takes two commits.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// A new member receives the whole state first.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(600);
const CATCH_UP_POLL: Duration = Duration::from_millis(50);
/// A member that lags by so little will not hold commits up.
const CAUGHT_UP_ENTRIES: u64 = 100;

type Nodes = BTreeSet<NodeId>;

pub(super) async fn change(replica: &Replica, voters: Nodes, learners: Nodes) -> Result<(), Error> {
    if voters.is_empty() {
        return Err(Error::Config {
            why: "a group needs at least one voter".to_owned(),
        });
    }
    if voters.iter().chain(&learners).any(|node| node.0 == 0) || !voters.is_disjoint(&learners) {
        return Err(Error::Config {
            why: "a member is either voter or learner, and node 0 neither".to_owned(),
        });
    }
    let now = replica.status();
    if !now.is_leader {
        return Err(Error::NotLeader { leader: now.leader });
    }
    let newcomers: Nodes = voters
        .union(&learners)
        .filter(|n| !now.voters.contains(n) && !now.learners.contains(n))
        .copied()
        .collect();
    let stages = [
        (
            now.voters.clone(),
            now.learners.union(&newcomers).copied().collect(),
        ),
        (voters, learners),
    ];
    for (stage, (voters, learners)) in stages.into_iter().enumerate() {
        if stage == 1 {
            catch_up(replica, &voters).await?;
        }
        change_to(replica, &voters, &learners).await?;
    }
    Ok(())
}

async fn change_to(replica: &Replica, voters: &Nodes, learners: &Nodes) -> Result<(), Error> {
    let steps = steps(&replica.status(), voters, learners);
    if steps.is_empty() {
        return Ok(());
    }
    let mut change = ConfChangeV2::default();
    change.set_changes(steps.into());
    replica.ask(|reply| Event::Change { change, reply }).await?;
    let mut status = replica.watch_status();
    // A leader that leaves the group hears no more of it once it has stepped down.
    let done = status.wait_for(|s| {
        s.failure.is_some()
            || (s.voters == *voters && s.learners == *learners && !s.changing)
            || !s.is_leader
    });
    let end = timeout(CHANGE_TIMEOUT, done)
        .await
        .map_err(|_| Error::Timeout)?
        .map_err(|_| Error::Closed)?
        .clone();
    match end {
        s if s.voters == *voters && s.learners == *learners => Ok(()),
        ReplicaStatus {
            failure: Some(why), ..
        } => Err(Error::Storage { why }),
        _ => Err(Error::Interrupted),
    }
}

/// The single steps from the present membership to the wanted one.
fn steps(now: &ReplicaStatus, voters: &Nodes, learners: &Nodes) -> Vec<ConfChangeSingle> {
    let mut steps = Vec::new();
    let mut add = |kind, node: &NodeId| {
        let mut step = ConfChangeSingle::default();
        step.set_change_type(kind);
        step.set_node_id(node.0);
        steps.push(step);
    };
    for node in voters.difference(&now.voters) {
        add(ConfChangeType::AddNode, node);
    }
    for node in learners.difference(&now.learners) {
        add(ConfChangeType::AddLearnerNode, node);
    }
    for node in now
        .voters
        .union(&now.learners)
        .filter(|n| !voters.contains(n) && !learners.contains(n))
    {
        add(ConfChangeType::RemoveNode, node);
    }
    steps
}

/// Waits until every future voter has nearly everything.
async fn catch_up(replica: &Replica, voters: &Nodes) -> Result<(), Error> {
    let wait = async {
        loop {
            let progress = replica.ask(Event::Progress).await?;
            let goal = replica
                .status()
                .commit
                .saturating_sub(CAUGHT_UP_ENTRIES)
                .max(1);
            if voters
                .iter()
                .all(|node| progress.get(node).is_some_and(|matched| *matched >= goal))
            {
                return Ok(());
            }
            sleep(CATCH_UP_POLL).await;
        }
    };
    timeout(CATCH_UP_TIMEOUT, wait)
        .await
        .unwrap_or(Err(Error::Timeout))
}

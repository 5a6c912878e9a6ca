//! What replicas tell Prometheus: how each group of this process stands.

use std::sync::LazyLock;

use prometheus::{
    IntCounterVec, IntGaugeVec, Opts, register_int_counter_vec, register_int_gauge_vec,
};

use super::{Error, ReplicaStatus};
use crate::ids::RaftGroupId;

/// All families; the label `group` is a Raft group's number, of which a node has a handful.
struct Metrics {
    term: IntGaugeVec,
    is_leader: IntGaugeVec,
    apply_lag: IntGaugeVec,
    proposals_failed: IntCounterVec,
}

/// Registered in Prometheus' default registry on first use. `None` only if another part took one of the names.
static METRICS: LazyLock<Option<Metrics>> = LazyLock::new(|| register().ok());

fn register() -> prometheus::Result<Metrics> {
    Ok(Metrics {
        term: register_int_gauge_vec!(
            Opts::new("verbund_raft_term", "Raft term that the replica is in."),
            &["group"]
        )?,
        is_leader: register_int_gauge_vec!(
            Opts::new("verbund_raft_is_leader", "1 where the replica leads."),
            &["group"]
        )?,
        apply_lag: register_int_gauge_vec!(
            Opts::new(
                "verbund_raft_apply_lag_entries",
                "Log entries that are committed, as far as known here, but not applied here yet."
            ),
            &["group"]
        )?,
        proposals_failed: register_int_counter_vec!(
            Opts::new(
                "verbund_raft_proposals_failed_total",
                "Proposals at this replica that got an error, by its kind."
            ),
            &["group", "code"]
        )?,
    })
}

fn number(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// Shows a replica's new status.
pub(super) fn status(group: RaftGroupId, status: &ReplicaStatus) {
    let Some(metrics) = METRICS.as_ref() else {
        return;
    };
    let group = group.to_string();
    let show = |family: &IntGaugeVec, value| family.with_label_values(&[&group]).set(value);
    show(&metrics.term, number(status.term));
    show(&metrics.is_leader, i64::from(status.is_leader));
    show(
        &metrics.apply_lag,
        number(status.commit.saturating_sub(status.applied)),
    );
}

/// Counts a proposal that failed.
pub(super) fn proposal_failed(group: RaftGroupId, error: &Error) {
    let code = match error {
        Error::NotLeader { .. } => "not_leader",
        Error::Storage { .. } => "storage",
        Error::TooLarge { .. } => "too_large",
        Error::Overloaded => "overloaded",
        Error::Interrupted => "interrupted",
        Error::Timeout => "timeout",
        Error::Closed => "closed",
        // About directories and configurations, which no proposal meets.
        Error::Format { .. }
        | Error::Locked { .. }
        | Error::Foreign { .. }
        | Error::Config { .. } => "other",
    };
    if let Some(metrics) = METRICS.as_ref() {
        let group = group.to_string();
        metrics
            .proposals_failed
            .with_label_values(&[&*group, code])
            .inc();
    }
}

//! What a run amounts to: rates, percentiles, and how many answers were good.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::plan::{Bounds, Plan};
use super::run::{Outcome, Record};

/// Percentiles of a sample, by the nearest rank. Units are the sample's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    pub count: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

impl Percentiles {
    /// Of a sample in any order; zeros if it is empty.
    pub fn of(mut sample: Vec<f64>) -> Self {
        sample.sort_by(f64::total_cmp);
        let Some(&max) = sample.last() else {
            return Percentiles::default();
        };
        let at = |percent: f64| {
            let rank = (percent / 100.0 * sample.len() as f64).ceil() as usize;
            sample[rank.clamp(1, sample.len()) - 1]
        };
        Percentiles {
            count: sample.len(),
            mean: sample.iter().sum::<f64>() / sample.len() as f64,
            p50: at(50.0),
            p90: at(90.0),
            p99: at(99.0),
            max,
        }
    }
}

/// One tenant's, or everybody's, part.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct TenantSummary {
    pub name: String,
    pub requests: usize,
    pub answered: usize,
    pub cancelled: usize,
    /// Ends other than an answer or the client's own going, by kind.
    pub failed: BTreeMap<String, usize>,
    /// Seconds from the intended beginning to the first token, of all that got one.
    pub first_token_s: Percentiles,
    /// Seconds between neighbouring tokens.
    pub between_tokens_s: Percentiles,
    /// Each answer's longest wait between two tokens, in seconds.
    pub longest_gap_s: Percentiles,
    /// Seconds by which requests left later than intended: the generator's own lateness.
    pub sent_late_s: Percentiles,
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    /// Prompt tokens that the server had in its cache, where it says so.
    pub cached_tokens: usize,
    /// Answered tokens a second over the time from the first request to the last answer.
    pub tokens_per_s: f64,
    /// Answers a second that kept both bounds.
    pub goodput_per_s: f64,
}

/// A run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Summary {
    pub seconds: f64,
    /// Bounds of a good answer, seconds.
    pub bound_first_token_s: f64,
    pub bound_between_tokens_s: f64,
    pub all: TenantSummary,
    pub tenants: Vec<TenantSummary>,
}

impl Summary {
    /// Of the records of a plan.
    pub fn of(plan: &Plan, records: &[Record]) -> Self {
        let first = records
            .iter()
            .map(|r| r.intended_s)
            .fold(f64::MAX, f64::min);
        let last = records.iter().map(|r| r.end_s).fold(0.0, f64::max);
        let seconds = (last - first).max(1e-9);
        let part = |name: &str, tenant: Option<usize>| {
            let mine = records
                .iter()
                .filter(|r| tenant.is_none_or(|t| r.tenant == t));
            tenant_summary(name, &mine.collect::<Vec<_>>(), plan.bounds, seconds)
        };
        let tenants = plan.tenants.iter().enumerate();
        Summary {
            seconds,
            bound_first_token_s: plan.bounds.first_token_s,
            bound_between_tokens_s: plan.bounds.between_tokens_s,
            all: part("all", None),
            tenants: tenants.map(|(i, t)| part(&t.name, Some(i))).collect(),
        }
    }
}

fn tenant_summary(name: &str, records: &[&Record], bounds: Bounds, seconds: f64) -> TenantSummary {
    let mut failed = BTreeMap::new();
    for record in records {
        let kind = match &record.outcome {
            Outcome::Answered | Outcome::Cancelled => continue,
            Outcome::Refused(status) => format!("HTTP {status}"),
            Outcome::Broken(why) => format!("broken ({})", why.lines().next().unwrap_or_default()),
            Outcome::Unanswered => "unanswered".into(),
            Outcome::NotSent => "not sent".into(),
        };
        *failed.entry(kind).or_insert(0) += 1;
    }
    let count = |outcome| records.iter().filter(|r| r.outcome == outcome).count();
    let good = records.iter().filter(|r| {
        let gaps = r.gaps_s().count().max(1) as f64;
        r.outcome == Outcome::Answered
            && r.first_token_s().is_some_and(|t| t <= bounds.first_token_s)
            && r.gaps_s().sum::<f64>() / gaps <= bounds.between_tokens_s
    });
    let longest = |r: &&Record| r.gaps_s().reduce(f64::max);
    let sum = |of: fn(&Record) -> usize| records.iter().map(|r| of(r)).sum::<usize>();
    let completion_tokens = sum(|r| r.completion_tokens);
    TenantSummary {
        name: name.into(),
        requests: records.len(),
        answered: count(Outcome::Answered),
        cancelled: count(Outcome::Cancelled),
        failed,
        first_token_s: Percentiles::of(records.iter().filter_map(|r| r.first_token_s()).collect()),
        between_tokens_s: Percentiles::of(records.iter().flat_map(|r| r.gaps_s()).collect()),
        longest_gap_s: Percentiles::of(records.iter().filter_map(longest).collect()),
        sent_late_s: Percentiles::of(records.iter().map(|r| r.sent_s - r.intended_s).collect()),
        prompt_tokens: sum(|r| r.prompt_tokens),
        completion_tokens,
        cached_tokens: sum(|r| r.cached_tokens),
        tokens_per_s: completion_tokens as f64 / seconds,
        goodput_per_s: good.count() as f64 / seconds,
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{:<14} {:>6} {:>6} {:>8} {:>23} {:>26} {:>8} {:>8}",
            "tenant",
            "asked",
            "good/s",
            "tokens/s",
            "first token 50/90/99 s",
            "between tokens 50/90/99 ms",
            "gap s",
            "failed"
        )?;
        for t in self.tenants.iter().chain([&self.all]) {
            let (first, between) = (t.first_token_s, t.between_tokens_s);
            writeln!(
                f,
                "{:<14} {:>6} {:>6.2} {:>8.1} {:>7.2}/{:>7.2}/{:>7.2} {:>8.1}/{:>8.1}/{:>8.1} {:>8.2} {:>8}",
                t.name,
                t.requests,
                t.goodput_per_s,
                t.tokens_per_s,
                first.p50,
                first.p90,
                first.p99,
                1e3 * between.p50,
                1e3 * between.p90,
                1e3 * between.p99,
                t.longest_gap_s.max,
                t.failed.values().sum::<usize>(),
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let p = Percentiles::of((1..=200).rev().map(f64::from).collect());
        assert_eq!((p.p50, p.p90, p.p99, p.max), (100.0, 180.0, 198.0, 200.0));
        assert_eq!(p.mean, 100.5);
        assert_eq!(Percentiles::of(vec![7.0]).p99, 7.0);
        assert_eq!(Percentiles::of(vec![]), Percentiles::default());
    }

    fn record(tenant: usize, intended_s: f64, tokens_s: &[f64], outcome: Outcome) -> Record {
        Record {
            tenant,
            intended_s,
            sent_s: intended_s + 0.5,
            tokens_s: tokens_s.to_vec(),
            end_s: tokens_s.last().copied().unwrap_or(intended_s),
            prompt_tokens: 10,
            completion_tokens: tokens_s.len(),
            cached_tokens: 4,
            outcome,
        }
    }

    #[test]
    fn latency_counts_from_the_intended_beginning() {
        let bounds = Bounds {
            first_token_s: 1.0,
            between_tokens_s: 0.2,
        };
        let records = [
            record(0, 1.0, &[1.9, 2.0, 2.1], Outcome::Answered),
            // Late by half a second that the server did not cause: over the bound all the same.
            record(0, 2.0, &[3.2, 3.3], Outcome::Answered),
            // Two tokens too far apart.
            record(0, 3.0, &[3.1, 3.5, 3.9], Outcome::Answered),
            record(0, 4.0, &[], Outcome::Refused(429)),
            Record {
                end_s: 9.0,
                ..record(0, 5.0, &[], Outcome::Unanswered)
            },
        ];
        let all: Vec<&Record> = records.iter().collect();
        let summary = tenant_summary("a", &all, bounds, 4.0);
        assert_eq!((summary.requests, summary.answered), (5, 3));
        assert_eq!(summary.failed["HTTP 429"], 1);
        // Who was never answered waited at least until the end; who was refused did not wait.
        assert_eq!(summary.first_token_s.count, 4);
        assert!((summary.first_token_s.max - 4.0).abs() < 1e-9);
        assert!((summary.first_token_s.p50 - 0.9).abs() < 1e-9);
        assert!((summary.longest_gap_s.max - 0.4).abs() < 1e-9);
        assert!((summary.goodput_per_s - 0.25).abs() < 1e-9);
        assert!((summary.sent_late_s.p50 - 0.5).abs() < 1e-9);
        assert_eq!(summary.cached_tokens, 20);
    }
}

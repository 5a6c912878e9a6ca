//! Who asks, how often, and for how long: everything of a run that is fixed before it begins.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::client::Target;
use super::prompts::Mix;

/// When a tenant's requests begin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arrivals {
    /// Poisson arrivals of so many a second, whatever the server does.
    Open { per_s: f64 },
    /// So many clients, each with one request at a time.
    Closed { clients: usize },
}

/// One tenant's part of the load.
#[derive(Debug, Clone)]
pub struct TenantPlan {
    pub name: String,
    /// Bearer token; empty sends none.
    pub key: String,
    pub arrivals: Arrivals,
    pub mix: Mix,
    /// Part of the requests, 0 to 1, whose client goes away in the middle of the answer.
    pub cancelled: f64,
}

/// Bounds of a good answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Seconds from the intended start to the first token.
    pub first_token_s: f64,
    /// Mean seconds between tokens.
    pub between_tokens_s: f64,
}

/// A whole run.
#[derive(Debug, Clone)]
pub struct Plan {
    pub target: Target,
    pub tenants: Vec<TenantPlan>,
    /// New requests begin for so long; those under way are then waited for.
    pub duration: Duration,
    /// Longest wait for those under way; what is left then counts as unanswered.
    pub drain: Duration,
    /// Most requests of the whole run.
    pub max_requests: usize,
    /// Most requests at one time; an open loop that would exceed it counts the request as not sent.
    pub max_in_flight: usize,
    pub bounds: Bounds,
    pub seed: u64,
}

/// A request that has not been sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    pub tenant: usize,
    /// Seconds from the beginning of the run; 0 in a closed loop, where the client decides.
    pub at_s: f64,
    pub prompt: String,
    pub answer_tokens: usize,
    /// The client goes away after so many tokens.
    pub cancel_after: Option<usize>,
}

/// A tenant's requests, one after the other, without end: the same for the same seed.
pub struct Requests<'a> {
    tenant: usize,
    plan: &'a TenantPlan,
    random: StdRng,
    at_s: f64,
}

impl<'a> Requests<'a> {
    /// `stream` tells apart clients of one tenant.
    pub fn new(plan: &'a TenantPlan, tenant: usize, stream: u64, seed: u64) -> Self {
        let mixed = seed ^ (tenant as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (stream << 32);
        Requests {
            tenant,
            plan,
            random: StdRng::seed_from_u64(mixed),
            at_s: 0.0,
        }
    }
}

impl Iterator for Requests<'_> {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        if let Arrivals::Open { per_s } = self.plan.arrivals {
            // The time between events of a Poisson process is exponential.
            self.at_s += -(1.0 - self.random.random::<f64>()).ln() / per_s;
        }
        let (prompt, answer_tokens) = self.plan.mix.draw(&mut self.random);
        let cancel_after = (self.random.random::<f64>() < self.plan.cancelled)
            .then(|| self.random.random_range(0..answer_tokens.max(1)));
        Some(Request {
            tenant: self.tenant,
            at_s: self.at_s,
            prompt,
            answer_tokens,
            cancel_after,
        })
    }
}

/// All requests of the open-loop tenants within `duration`, by time, at most `max` of them.
pub fn schedule(tenants: &[TenantPlan], duration: Duration, max: usize, seed: u64) -> Vec<Request> {
    let mut all: Vec<Request> = tenants
        .iter()
        .enumerate()
        .filter(|(_, plan)| matches!(plan.arrivals, Arrivals::Open { .. }))
        .flat_map(|(i, plan)| {
            Requests::new(plan, i, 0, seed)
                .take_while(|r| r.at_s < duration.as_secs_f64())
                .take(max)
        })
        .collect();
    all.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
    all.truncate(max);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenant(per_s: f64) -> TenantPlan {
        TenantPlan {
            name: "a".into(),
            key: String::new(),
            arrivals: Arrivals::Open { per_s },
            mix: Mix::fixed(8, 4),
            cancelled: 0.25,
        }
    }

    #[test]
    fn open_arrivals_are_poisson() {
        let requests = schedule(&[tenant(50.0)], Duration::from_secs(200), 100_000, 3);
        let count = requests.len() as f64;
        // 10,000 expected, standard deviation 100.
        assert!((9_500.0..10_500.0).contains(&count), "{count}");
        let gaps: Vec<f64> = requests.windows(2).map(|w| w[1].at_s - w[0].at_s).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        // An exponential's standard deviation is its mean.
        let spread = variance.sqrt() / mean;
        assert!((0.95..1.05).contains(&spread), "{spread}");
        let cancelled = requests.iter().filter(|r| r.cancel_after.is_some()).count() as f64;
        assert!((0.22..0.28).contains(&(cancelled / count)), "{cancelled}");
    }

    #[test]
    fn a_seed_gives_one_schedule() {
        let tenants = [tenant(5.0), tenant(9.0)];
        let make = |seed| schedule(&tenants, Duration::from_secs(20), 50, seed);
        assert_eq!(make(1), make(1));
        assert_ne!(make(1), make(2));
        assert_eq!(make(1).len(), 50);
        assert!(make(1).is_sorted_by(|a, b| a.at_s <= b.at_s));
    }
}

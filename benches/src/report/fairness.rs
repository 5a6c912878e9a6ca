//! One tenant floods: what another notices of it, and what the cluster's throughput pays for fairness.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::Setting;
use crate::load::prompts::Mix;
use crate::load::{Arrivals, Bounds, Plan, Summary, TenantPlan, run as load};
use crate::server::{Cluster, Server};

/// By how much the flooding tenant exceeds its share: half of what the cluster can do.
const FLOOD: f64 = 50.0;
/// The quiet tenant's part of its own share.
const QUIET: f64 = 0.25;
const PROMPT: usize = 48;
const ANSWER: usize = 16;

/// What was seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fairness {
    pub model: String,
    /// Requests a second that the cluster answers when nothing but one tenant asks.
    pub capacity_per_s: f64,
    pub alone: Summary,
    pub flooded: Summary,
    /// The same flood and the same other requests under one key: first come, first served.
    pub in_order: Summary,
}

/// Measures the capacity, then the quiet tenant alone, beside the flood, and in one queue with it.
pub async fn run(setting: &Setting) -> Result<Fairness> {
    let model = setting.default_model();
    ensure!(
        model.is_file(),
        "{} is not there; `ops/setup models` fetches it",
        model.display()
    );
    let cluster = Cluster {
        binary: setting.verbund.clone(),
        model: None,
        ranks: 1,
        env: Vec::new(),
    };
    let server = Server::verbund(&cluster).await?;
    let (quiet, loud) = (server.tenant("quiet").await?, server.tenant("loud").await?);
    let seconds = if setting.quick { 5 } else { 60 };
    let plan = |tenants, seconds| plan(&server, tenants, seconds);

    let busy = plan(
        vec![tenant("loud", &loud, Arrivals::Closed { clients: 32 })],
        seconds.min(20),
    );
    let full = Summary::of(&busy, &load(&busy).await?);
    let capacity_per_s = full.all.answered as f64 / full.seconds;
    let share = capacity_per_s / 2.0;
    let open = |per_s: f64| Arrivals::Open { per_s };

    let mut summaries = Vec::new();
    for tenants in [
        vec![tenant("quiet", &quiet, open(QUIET * share))],
        vec![
            tenant("quiet", &quiet, open(QUIET * share)),
            tenant("loud", &loud, open(FLOOD * share)),
        ],
        vec![
            tenant("quiet", &loud, open(QUIET * share)),
            tenant("loud", &loud, open(FLOOD * share)),
        ],
    ] {
        let plan = plan(tenants, seconds);
        summaries.push(Summary::of(&plan, &load(&plan).await?));
        // Nothing of one measurement is left in the next.
        tokio::time::sleep(Duration::from_secs(5)).await;
    }
    let mut next = summaries.into_iter();
    let mut next = || next.next().unwrap_or_default();
    Ok(Fairness {
        model: "SmolLM2 135M Q4_1".into(),
        capacity_per_s,
        alone: next(),
        flooded: next(),
        in_order: next(),
    })
}

fn tenant(name: &str, key: &str, arrivals: Arrivals) -> TenantPlan {
    TenantPlan {
        name: name.into(),
        key: key.into(),
        arrivals,
        mix: Mix::fixed(PROMPT, ANSWER),
        cancelled: 0.0,
    }
}

fn plan(server: &Server, tenants: Vec<TenantPlan>, seconds: u64) -> Plan {
    Plan {
        target: server.target.clone(),
        tenants,
        duration: Duration::from_secs(seconds),
        drain: Duration::from_secs(60),
        max_requests: 100_000,
        // A flood that is not answered at once stays; more than this would be a test of the generator.
        max_in_flight: 600,
        bounds: Bounds {
            first_token_s: 1.0,
            between_tokens_s: 0.2,
        },
        seed: 11,
    }
}

/// The table.
pub fn table(fairness: &Fairness) -> String {
    let mut text = format!(
        "{}: the cluster answers {:.1} requests a second of {PROMPT} tokens with {ANSWER} tokens of answer. Each of two tenants' share is half of that; one asks for {:.0} % of its share, the other for {FLOOD:.0} times its share.\n\n| | first token of the quiet tenant, median | p99 | its answers | tokens/s of all | refused |\n| --- | ---: | ---: | ---: | ---: | ---: |\n",
        fairness.model,
        fairness.capacity_per_s,
        100.0 * QUIET
    );
    for (name, summary) in [
        ("alone", &fairness.alone),
        ("beside the flood", &fairness.flooded),
        ("in one queue with the flood", &fairness.in_order),
    ] {
        let Some(quiet) = summary.tenants.first() else {
            continue;
        };
        text.push_str(&format!(
            "| {name} | {:.3} s | {:.3} s | {} of {} | {:.1} | {} |\n",
            quiet.first_token_s.p50,
            quiet.first_token_s.p99,
            quiet.answered,
            quiet.requests,
            summary.all.tokens_per_s,
            summary.all.failed.values().sum::<usize>()
        ));
    }
    let p99 = |s: &Summary| s.tenants.first().map_or(f64::NAN, |t| t.first_token_s.p99);
    let (wait, rate) = (
        p99(&fairness.flooded) / p99(&fairness.alone),
        fairness.flooded.all.tokens_per_s / fairness.in_order.all.tokens_per_s,
    );
    let answered = |s: &Summary| s.tenants.first().is_some_and(|t| t.answered == t.requests);
    let met = |ok| if ok { "✓" } else { "✗" };
    text.push_str(&format!(
        "\nThe quiet tenant's p99 is {wait:.2} times that of when it is alone (goal: at most 1.2 {}); throughput is {rate:.2} of one queue's (goal: at least 0.95 {}).\n",
        met(wait <= 1.2 && answered(&fairness.flooded)),
        met(rate >= 0.95)
    ));
    text
}

//! One tenant floods: what another notices of it, and what the cluster's throughput pays for fairness.
//!
//! Three runs with the same requests of the quiet tenant at the same moments: alone; beside the flood; and both under one key on a
//! cluster whose queue holds for that key what it holds for both in the fair run: first come, first served. Prompts are so long that
//! the cluster answers some requests a second: refusing the rest of the flood is then a small part of what the cores do, and the
//! table says how much.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::Setting;
use crate::load::prompts::Mix;
use crate::load::{Arrivals, Bounds, Plan, Summary, TenantPlan, run as load};
use crate::server::{Cluster, Server, cpu_seconds};

/// By how much the flooding tenant exceeds its share: half of what the cluster can do.
const FLOOD: f64 = 50.0;
/// The quiet tenant's part of its own share.
const QUIET: f64 = 0.4;
const PROMPT: usize = 192;
const ANSWER: usize = 12;
/// Requests that may wait in the fair run: one who floods takes half of them, the next half of what is left.
const WAITING: usize = 512;
/// Of this the one key's half is the three quarters that both have together.
const WAITING_IN_ORDER: usize = WAITING * 3 / 2;
/// Requests of the quiet tenant that are wanted: for a p99 that is not the slowest one.
const WANTED: f64 = 110.0;
/// Longest and shortest of the three runs, seconds.
const RUN_S: (f64, f64) = (30.0, 110.0);
/// What is not answered so long after a run counts as unanswered; the flood's queue would take minutes.
const DRAIN: Duration = Duration::from_secs(8);

/// One of the three runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Flood {
    pub summary: Summary,
    /// Part of all cores that the worker's process took, and that everything else of the benchmark took: gateway, coordinators,
    /// and the load itself.
    pub worker_cpu: f64,
    pub other_cpu: f64,
}

/// What was seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fairness {
    pub model: String,
    /// Requests a second that the cluster answers when nothing but one tenant asks.
    pub capacity_per_s: f64,
    pub seconds: f64,
    pub alone: Flood,
    pub flooded: Flood,
    pub in_order: Flood,
}

/// Measures the capacity, then the quiet tenant alone, beside the flood, and in one queue with it.
pub async fn run(setting: &Setting) -> Result<Fairness> {
    let model = setting.default_model();
    ensure!(
        model.is_file(),
        "{} is not there; `ops/setup models` fetches it",
        model.display()
    );
    let cluster = |waiting: usize| Cluster {
        binary: setting.verbund.clone(),
        model: None,
        ranks: 1,
        env: vec![("VERBUND_WORKER_MAX_WAITING".into(), waiting.to_string())],
    };
    let server = Server::verbund(&cluster(WAITING)).await?;
    let (quiet, loud) = (server.tenant("quiet").await?, server.tenant("loud").await?);
    let busy = plan(
        &server,
        vec![tenant("loud", &loud, Arrivals::Closed { clients: 32 })],
        if setting.quick { 5.0 } else { 20.0 },
    );
    let full = Summary::of(&busy, &load(&busy).await?);
    let capacity_per_s = full.all.answered as f64 / full.seconds;
    ensure!(capacity_per_s > 0.0, "nothing was answered");
    let share = capacity_per_s / 2.0;
    let open = |per_s: f64| Arrivals::Open { per_s };
    let seconds = if setting.quick {
        6.0
    } else {
        (WANTED / (QUIET * share)).clamp(RUN_S.0, RUN_S.1)
    };
    let both = |quiet: &str, loud: &str| {
        vec![
            tenant("quiet", quiet, open(QUIET * share)),
            tenant("loud", loud, open(FLOOD * share)),
        ]
    };

    let mut only_quiet = both(&quiet, &loud);
    only_quiet.truncate(1);
    let alone = measured(&server, only_quiet, seconds).await?;
    let flooded = measured(&server, both(&quiet, &loud), seconds).await?;
    drop(server);
    let server = Server::verbund(&cluster(WAITING_IN_ORDER)).await?;
    let all = server.tenant("all").await?;
    let in_order = measured(&server, both(&all, &all), seconds).await?;
    Ok(Fairness {
        model: "SmolLM2 135M Q4_1".into(),
        capacity_per_s,
        seconds,
        alone,
        flooded,
        in_order,
    })
}

async fn measured(server: &Server, tenants: Vec<TenantPlan>, seconds: f64) -> Result<Flood> {
    // Nothing of the run before is left: a second after its clients went away.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let plan = plan(server, tenants, seconds);
    let used = || {
        let (mut worker, mut other) = (0.0, cpu_seconds(std::process::id()));
        for (name, pid) in server.processes() {
            if name.starts_with("worker") {
                worker += cpu_seconds(pid);
            } else {
                other += cpu_seconds(pid);
            }
        }
        (worker, other)
    };
    let (before, start) = (used(), Instant::now());
    let records = load(&plan).await?;
    let (after, took) = (used(), start.elapsed().as_secs_f64());
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get()) as f64;
    Ok(Flood {
        summary: Summary::of(&plan, &records),
        worker_cpu: (after.0 - before.0) / (took * cores),
        other_cpu: (after.1 - before.1) / (took * cores),
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

fn plan(server: &Server, tenants: Vec<TenantPlan>, seconds: f64) -> Plan {
    Plan {
        target: server.target.clone(),
        tenants,
        duration: Duration::from_secs_f64(seconds),
        drain: DRAIN,
        max_requests: 100_000,
        // All that may wait or run, and those that are about to be refused.
        max_in_flight: WAITING_IN_ORDER / 2 + 200,
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
        "{}: the cluster answers {:.1} requests a second of {PROMPT} tokens with {ANSWER} tokens of answer. Each of two tenants' share is \
         half of that; one asks for {:.0} % of its share, the other for {FLOOD:.0} times its share, {:.0} s in each run, the quiet one's \
         requests at the same moments in all. \"In one queue\" has both under one key, which may have as many requests waiting as both \
         tenants together have beside the flood. CPU: of all cores, the worker's process and all else (gateway, coordinators, and the load \
         itself on the same machine).\n\n\
         | | first token of the quiet tenant, median | p99 | its answers | tokens/s of all | refused | CPU, worker / else |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        fairness.model,
        fairness.capacity_per_s,
        100.0 * QUIET,
        fairness.seconds
    );
    for (name, flood) in [
        ("alone", &fairness.alone),
        ("beside the flood", &fairness.flooded),
        ("in one queue with the flood", &fairness.in_order),
    ] {
        let all = &flood.summary.all;
        let Some(quiet) = flood.summary.tenants.first() else {
            continue;
        };
        text.push_str(&format!(
            "| {name} | {:.3} s | {:.3} s | {} of {} | {:.1} | {} of {} | {:.0} / {:.0} % |\n",
            quiet.first_token_s.p50,
            quiet.first_token_s.p99,
            quiet.answered,
            quiet.requests,
            all.tokens_per_s,
            all.failed.get("HTTP 429").copied().unwrap_or(0),
            all.requests,
            100.0 * flood.worker_cpu,
            100.0 * flood.other_cpu,
        ));
    }
    let p99 = |f: &Flood| {
        let quiet = f.summary.tenants.first();
        quiet.map_or(f64::NAN, |t| t.first_token_s.p99)
    };
    let (wait, rate) = (
        p99(&fairness.flooded) / p99(&fairness.alone),
        fairness.flooded.summary.all.tokens_per_s / fairness.in_order.summary.all.tokens_per_s,
    );
    let quiet = fairness.flooded.summary.tenants.first();
    let answered = quiet.is_some_and(|t| t.answered == t.requests);
    let met = |ok| if ok { "✓" } else { "✗" };
    text.push_str(&format!(
        "\nThe quiet tenant's p99 is {wait:.2} times that of when it is alone (goal: at most 1.2, with every request answered {}); throughput \
         is {rate:.2} of one queue's (goal: at least 0.95 {}).\n",
        met(wait <= 1.2 && answered),
        met(rate >= 0.95)
    ));
    let quiet = fairness.in_order.summary.tenants.first();
    let lost = quiet.map_or(0, |t| t.requests - t.answered);
    if lost > 0 {
        text.push_str(&format!(
            "In one queue {lost} of the quiet tenant's requests were refused or not answered; the times are those of the others.\n"
        ));
    }
    // Requests whose answer had not begun when the run was over are expected of a flood, others are not.
    for (name, flood) in [
        ("beside the flood", &fairness.flooded),
        ("in one queue", &fairness.in_order),
    ] {
        let failed = flood.summary.all.failed.iter();
        let other = failed.filter(|(kind, _)| !["HTTP 429", "unanswered"].contains(&kind.as_str()));
        for (kind, count) in other {
            text.push_str(&format!(
                "Of the requests {name}, {count} ended otherwise: {kind}.\n"
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Percentiles, TenantSummary};

    #[test]
    fn one_unanswered_request_of_the_quiet_tenant_misses_the_goal() {
        let flood = |p99, answered, tokens_per_s| {
            let quiet = TenantSummary {
                requests: 100,
                answered,
                first_token_s: Percentiles {
                    p99,
                    ..Percentiles::default()
                },
                ..TenantSummary::default()
            };
            let all = TenantSummary {
                tokens_per_s,
                ..TenantSummary::default()
            };
            Flood {
                summary: Summary {
                    all,
                    tenants: vec![quiet],
                    ..Summary::default()
                },
                worker_cpu: 0.9,
                other_cpu: 0.05,
            }
        };
        let with = |answered| {
            table(&Fairness {
                model: "m".into(),
                capacity_per_s: 5.0,
                seconds: 60.0,
                alone: flood(0.5, 100, 10.0),
                flooded: flood(0.55, answered, 98.0),
                in_order: flood(40.0, 4, 100.0),
            })
        };
        let all = with(100);
        assert!(all.contains("1.10 times") && all.contains("every request answered ✓"));
        assert!(all.contains("0.98 of one queue's (goal: at least 0.95 ✓)"));
        assert!(all.contains("96 of the quiet tenant's requests"));
        assert!(with(99).contains("every request answered ✗"));
    }
}

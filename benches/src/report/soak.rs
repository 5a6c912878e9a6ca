//! A quarter of an hour at saturation: several tenants, long and short prompts, clients that go away. Memory stays flat, and at
//! the end no sequence and no block is left.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Setting;
use crate::load::client::{Ask, ask};
use crate::load::prompts::Mix;
use crate::load::{Arrivals, Bounds, Endpoint, Plan, Summary, TenantPlan, run as load};
use crate::plot::{Series, lines};
use crate::server::{Cluster, Metrics, Server, resident_bytes};

/// Time between two looks at the processes.
const LOOK: Duration = Duration::from_secs(5);
/// Longest wait for the engine to be empty after the last answer.
const EMPTY_WITHIN: Duration = Duration::from_secs(30);

/// The processes at one moment.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Look {
    pub at_s: f64,
    /// By process; what they share counts once.
    pub resident_bytes: BTreeMap<String, u64>,
    pub open_files: usize,
}

impl Look {
    fn all_bytes(&self) -> f64 {
        self.resident_bytes.values().sum::<u64>() as f64
    }

    fn of(server: &Server, at_s: f64) -> Self {
        let processes = server.processes();
        let resident = processes.into_iter();
        Look {
            at_s,
            resident_bytes: resident
                .filter_map(|(name, pid)| Some((name, resident_bytes(pid)?)))
                .collect(),
            open_files: server.open_files(),
        }
    }
}

/// What was seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Soak {
    pub model: String,
    pub seconds: f64,
    pub summary: Summary,
    pub looks: Vec<Look>,
    /// Preemptions of the whole run.
    pub preemptions: f64,
    /// Of the engine after the last answer.
    pub sequences_left: f64,
    /// KV blocks that sequences still hold, that are kept for later ones, and that there are.
    pub blocks_left: f64,
    pub blocks_cached: f64,
    pub blocks_total: f64,
    /// Processes that died and were started again.
    pub restarted: Vec<String>,
    /// Whether a request is still answered when all is over.
    pub alive: bool,
}

/// Runs for so many seconds.
pub async fn run(setting: &Setting, seconds: u64) -> Result<Soak> {
    let cluster = Cluster {
        binary: setting.verbund.clone(),
        model: None,
        ranks: 1,
        env: Vec::new(),
    };
    let mut server = Server::verbund(&cluster).await?;
    let mut tenants = Vec::new();
    for (name, clients, cancelled) in [("city", 12, 0.1), ("town", 8, 0.3), ("village", 4, 0.1)] {
        tenants.push(TenantPlan {
            name: name.into(),
            key: server.tenant(name).await?,
            arrivals: Arrivals::Closed { clients },
            mix: Mix::town_hall().scaled(0.15),
            cancelled,
        });
    }
    let mut target = server.target.clone();
    target.endpoint = Endpoint::Chat;
    let plan = Plan {
        target,
        tenants,
        duration: Duration::from_secs(seconds),
        drain: Duration::from_secs(180),
        max_requests: 1_000_000,
        max_in_flight: 100,
        bounds: Bounds {
            first_token_s: 10.0,
            between_tokens_s: 0.5,
        },
        seed: 17,
    };
    let before = server.processes();
    let start = Instant::now();
    let mut running = std::pin::pin!(load(&plan));
    let mut looks = Vec::new();
    let look = if setting.quick { LOOK / 5 } else { LOOK };
    let records = loop {
        tokio::select! {
            records = &mut running => break records?,
            () = tokio::time::sleep(look) => looks.push(Look::of(&server, start.elapsed().as_secs_f64())),
        }
    };
    let seconds = start.elapsed().as_secs_f64();
    let (metrics, sequences_left, blocks_left) = emptied(&server).await?;
    let after = server.processes();
    let again = before
        .into_iter()
        .filter(|(name, pid)| after.get(name) != Some(pid));
    let question = Ask {
        key: &server.key,
        prompt: " time year people way",
        answer_tokens: 4,
        cancel_after: None,
        temperature: 0.0,
    };
    let answer = ask(&server.http, &server.target, question).await;
    let blocks = |state: &str| metrics.sum("verbund_engine_kv_blocks", &[state]);
    Ok(Soak {
        model: "SmolLM2 135M Q4_1".into(),
        seconds,
        summary: Summary::of(&plan, &records),
        looks,
        preemptions: metrics.sum("verbund_engine_preemptions_total", &[]),
        sequences_left,
        blocks_left,
        blocks_cached: blocks("state=\"cached\""),
        blocks_total: blocks("state=\"total\""),
        restarted: again.map(|(name, _)| name).collect(),
        alive: answer.complete && server.runs(),
    })
}

/// Waits until the engine holds nothing; what it still holds when the wait is over.
async fn emptied(server: &Server) -> Result<(Metrics, f64, f64)> {
    let start = Instant::now();
    loop {
        let metrics = server.engine_metrics().await?;
        let sequences = metrics.sum("verbund_engine_sequences", &[]);
        let blocks = metrics.sum("verbund_engine_kv_blocks", &["state=\"used\""]);
        if sequences + blocks == 0.0 || start.elapsed() > EMPTY_WITHIN {
            return Ok((metrics, sequences, blocks));
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

impl Soak {
    /// Growth of the resident memory over the second half of the run, by a straight line through it, as a part of its mean. The
    /// first half fills the caches.
    pub fn growth(&self) -> Option<f64> {
        let half = &self.looks[self.looks.len() / 2..];
        let n = half.len() as f64;
        let (first, last) = (half.first()?.at_s, half.last()?.at_s);
        let mean_t = half.iter().map(|l| l.at_s).sum::<f64>() / n;
        let mean_b = half.iter().map(Look::all_bytes).sum::<f64>() / n;
        let (mut product, mut square) = (0.0, 0.0);
        for look in half {
            let t = look.at_s - mean_t;
            product += t * (look.all_bytes() - mean_b);
            square += t * t;
        }
        (square > 0.0).then(|| product / square * (last - first) / mean_b)
    }

    fn names(&self) -> Vec<&String> {
        let all = self.looks.iter().flat_map(|l| l.resident_bytes.keys());
        all.collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// Memory over time, of each process and of all.
pub fn picture(soak: &Soak) -> Result<String> {
    let series = |name: &str, bytes: &dyn Fn(&Look) -> f64| Series {
        name: name.into(),
        points: soak
            .looks
            .iter()
            .map(|l| (l.at_s, bytes(l) / 1e6))
            .collect(),
        dashed: false,
    };
    let mut all = vec![series("all processes", &Look::all_bytes)];
    for name in soak.names() {
        let of = |l: &Look| l.resident_bytes.get(name).map_or(f64::NAN, |&b| b as f64);
        all.push(series(name, &of));
    }
    lines(
        "Memory while it is saturated",
        "s",
        "MB",
        false,
        false,
        &all,
    )
    .context("no look at the processes was taken")
}

/// The table.
pub fn table(soak: &Soak) -> String {
    let all = &soak.summary.all;
    let (first, last) = (soak.looks.first(), soak.looks.last());
    let middle = soak.looks.get(soak.looks.len() / 2);
    let files = |l: Option<&Look>| l.map_or(0, |l| l.open_files);
    let growth = soak.growth().unwrap_or(f64::NAN);
    let failed = all.failed.iter().map(|(k, n)| format!("{n} × {k}"));
    let failed: Vec<String> = failed.map(|f| f.replace('|', "/")).collect();
    let or_none = |list: Vec<String>| match list.as_slice() {
        [] => "none".into(),
        list => list.join(", "),
    };
    let mut text = format!(
        "{}, three tenants with 24 clients, {:.0} s.\n\n| what | seen | |\n| --- | ---: | --- |\n",
        soak.model, soak.seconds
    );
    let mut line = |what: &str, seen: String, met: Option<bool>| {
        let met = met.map_or("", |ok| if ok { "✓" } else { "✗" });
        text.push_str(&format!("| {what} | {seen} | {met} |\n"));
    };
    line(
        "requests answered; cancelled by their clients",
        format!("{}; {}", all.answered, all.cancelled),
        None,
    );
    let no_failure = failed.is_empty();
    line("failed", or_none(failed), Some(no_failure));
    line(
        "tokens of prompts; of answers; answer tokens/s",
        format!(
            "{}; {}; {:.0}",
            all.prompt_tokens, all.completion_tokens, all.tokens_per_s
        ),
        None,
    );
    let first_token = all.first_token_s;
    line(
        "first token: median, p90, longest",
        format!(
            "{:.2}, {:.1}, {:.1} s",
            first_token.p50, first_token.p90, first_token.max
        ),
        None,
    );
    line("preemptions", format!("{:.0}", soak.preemptions), None);
    let looks = |bytes: &dyn Fn(&Look) -> f64| {
        let mb = |l: Option<&Look>| l.map_or(f64::NAN, |l| bytes(l) / 1e6);
        format!("{:.0}, {:.0}, {:.0} MB", mb(first), mb(middle), mb(last))
    };
    line(
        "resident memory of all processes: first, middle, last look",
        looks(&Look::all_bytes),
        None,
    );
    for name in soak.names() {
        let of = |l: &Look| l.resident_bytes.get(name).map_or(f64::NAN, |&b| b as f64);
        line(&format!("of {name}"), looks(&of), None);
    }
    line(
        "growth over the second half, by a straight line (goal: below 3 %)",
        format!("{:+.1} %", 100.0 * growth),
        Some(growth < 0.03),
    );
    line(
        "open files: first, last look",
        format!("{}, {}", files(first), files(last)),
        None,
    );
    line(
        "sequences left",
        format!("{:.0}", soak.sequences_left),
        Some(soak.sequences_left == 0.0),
    );
    line(
        "KV blocks still held; kept in the cache; in all",
        format!(
            "{:.0}; {:.0}; {:.0}",
            soak.blocks_left, soak.blocks_cached, soak.blocks_total
        ),
        Some(soak.blocks_left == 0.0 && soak.blocks_total > 0.0),
    );
    let unharmed = soak.restarted.is_empty();
    line(
        "processes that died",
        or_none(soak.restarted.clone()),
        Some(unharmed),
    );
    line(
        "a request afterwards is answered",
        soak.alive.to_string(),
        Some(soak.alive),
    );
    text.push_str("\n![Memory](benchmarks/soak.svg)\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soak(bytes: fn(u64) -> u64) -> Soak {
        let look = |i: u64| Look {
            at_s: i as f64,
            resident_bytes: [("a", bytes(i)), ("b", 0)]
                .map(|(n, b)| (n.to_owned(), b))
                .into(),
            open_files: 1,
        };
        Soak {
            model: String::new(),
            seconds: 0.0,
            summary: Summary::default(),
            looks: (0..100).map(look).collect(),
            preemptions: 0.0,
            sequences_left: 0.0,
            blocks_left: 0.0,
            blocks_cached: 5.0,
            blocks_total: 9.0,
            restarted: Vec::new(),
            alive: true,
        }
    }

    #[test]
    fn growth_is_that_of_the_second_half() {
        assert!(soak(|i| 1_000 + 10 * i.min(50)).growth().unwrap().abs() < 1e-3);
        let grows = soak(|i| 1_000 + i).growth().unwrap();
        assert!((0.04..0.05).contains(&grows), "{grows}");
    }

    #[test]
    fn what_is_left_or_died_misses_the_goal() {
        let good = soak(|_| 1_000_000);
        assert!(!table(&good).contains('✗'), "{}", table(&good));
        let bad = [
            Soak {
                blocks_left: 1.0,
                ..good.clone()
            },
            Soak {
                sequences_left: 1.0,
                ..good.clone()
            },
            Soak {
                restarted: vec!["worker1".into()],
                ..good
            },
        ];
        for bad in bad {
            assert_eq!(table(&bad).matches('✗').count(), 1);
        }
    }
}

//! A quarter of an hour at saturation: several tenants, long and short prompts, clients that go away. Memory stays flat, and at
//! the end no sequence and no block is left.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Setting;
use crate::load::prompts::Mix;
use crate::load::{Arrivals, Bounds, Endpoint, Plan, Summary, TenantPlan, run as load};
use crate::plot::{Series, lines};
use crate::server::{Cluster, Metrics, Server};

/// Time between two looks at the processes.
const LOOK: Duration = Duration::from_secs(5);
/// Longest wait for the engine to be empty after the last answer.
const EMPTY_WITHIN: Duration = Duration::from_secs(30);

/// The processes at one moment.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Look {
    pub at_s: f64,
    pub resident_bytes: u64,
    pub open_files: usize,
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
    pub blocks_left: f64,
    /// Whether the cluster still answers.
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
    let start = Instant::now();
    let mut running = std::pin::pin!(load(&plan));
    let mut looks = Vec::new();
    let records = loop {
        tokio::select! {
            records = &mut running => break records?,
            () = tokio::time::sleep(LOOK) => looks.push(Look {
                at_s: start.elapsed().as_secs_f64(),
                resident_bytes: server.resident_bytes(),
                open_files: server.open_files(),
            }),
        }
    };
    let (metrics, sequences_left, blocks_left) = emptied(&server).await?;
    Ok(Soak {
        model: "SmolLM2 135M Q4_1".into(),
        seconds: start.elapsed().as_secs_f64(),
        summary: Summary::of(&plan, &records),
        looks,
        preemptions: metrics.sum("verbund_engine_preemptions_total", &[]),
        sequences_left,
        blocks_left,
        alive: server.runs(),
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
    /// Growth of the resident memory over the second half of the run, by a straight line through it, as a part of its mean.
    pub fn growth(&self) -> Option<f64> {
        let half = &self.looks[self.looks.len() / 2..];
        let n = half.len() as f64;
        let (first, last) = (half.first()?.at_s, half.last()?.at_s);
        let mean_t = half.iter().map(|l| l.at_s).sum::<f64>() / n;
        let mean_b = half.iter().map(|l| l.resident_bytes as f64).sum::<f64>() / n;
        let (mut product, mut square) = (0.0, 0.0);
        for look in half {
            let t = look.at_s - mean_t;
            product += t * (look.resident_bytes as f64 - mean_b);
            square += t * t;
        }
        (square > 0.0).then(|| product / square * (last - first) / mean_b)
    }
}

/// Memory over time.
pub fn picture(soak: &Soak) -> Result<String> {
    let points = soak.looks.iter();
    let series = Series {
        name: "all processes".into(),
        points: points
            .map(|l| (l.at_s, l.resident_bytes as f64 / 1e6))
            .collect(),
        dashed: false,
    };
    lines(
        "Memory while it is saturated",
        "s",
        "MB",
        false,
        false,
        &[series],
    )
    .context("no look at the processes was taken")
}

/// The table.
pub fn table(soak: &Soak) -> String {
    let all = &soak.summary.all;
    let looks = &soak.looks;
    let mb = |l: Option<&Look>| l.map_or(f64::NAN, |l| l.resident_bytes as f64 / 1e6);
    let files = |l: Option<&Look>| l.map_or(0, |l| l.open_files);
    let growth = soak.growth().unwrap_or(f64::NAN);
    let met = |ok| if ok { "✓" } else { "✗" };
    let failed: Vec<String> = all.failed.iter().map(|(k, n)| format!("{n} {k}")).collect();
    format!(
        "{}, three tenants with 24 clients, {:.0} s.\n\n| what | seen | |\n| --- | ---: | --- |\n| requests: answered, cancelled, failed | {}, {}, {} | {} |\n| tokens: of prompts, of answers | {}, {} | |\n| preemptions | {:.0} | |\n| memory: first, middle, last look | {:.0}, {:.0}, {:.0} MB | |\n| growth over the second half | {:.1} % | {} |\n| open files: first, last look | {}, {} | |\n| sequences left | {:.0} | {} |\n| blocks left | {:.0} | {} |\n| still answers | {} | {} |\n\n![Memory](benchmarks/soak.svg)\n",
        soak.model,
        soak.seconds,
        all.answered,
        all.cancelled,
        if failed.is_empty() {
            "0".into()
        } else {
            failed.join(", ")
        },
        met(all.failed.is_empty()),
        all.prompt_tokens,
        all.completion_tokens,
        soak.preemptions,
        mb(looks.first()),
        mb(looks.get(looks.len() / 2)),
        mb(looks.last()),
        100.0 * growth,
        met(growth < 0.03),
        files(looks.first()),
        files(looks.last()),
        soak.sequences_left,
        met(soak.sequences_left == 0.0),
        soak.blocks_left,
        met(soak.blocks_left == 0.0),
        soak.alive,
        met(soak.alive),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_that_of_the_second_half() {
        let soak = |bytes: fn(u64) -> u64| Soak {
            model: String::new(),
            seconds: 0.0,
            summary: Summary::default(),
            looks: (0..100)
                .map(|i| Look {
                    at_s: i as f64,
                    resident_bytes: bytes(i),
                    open_files: 1,
                })
                .collect(),
            preemptions: 0.0,
            sequences_left: 0.0,
            blocks_left: 0.0,
            alive: true,
        };
        assert!(soak(|i| 1_000 + 10 * i.min(50)).growth().unwrap().abs() < 1e-3);
        let grows = soak(|i| 1_000 + i).growth().unwrap();
        assert!((0.04..0.05).contains(&grows), "{grows}");
    }
}

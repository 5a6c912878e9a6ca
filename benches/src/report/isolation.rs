//! Whether one tenant can tell from its waiting time what another asked, and what keeping them apart costs in hits.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::Setting;
use crate::load::Percentiles;
use crate::load::client::{Answer, Ask, ask};
use crate::load::prompts::prompt;
use crate::server::{Cluster, Server};

const PROBES: usize = 10_000;
/// Tokens of a probed prompt: some blocks, so that a hit would save most of the work.
const PROBE_TOKENS: usize = 192;
const CONVERSATIONS: usize = 24;
const TURNS: usize = 5;

/// What was seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Isolation {
    pub probes: usize,
    /// Probes of them that the tenant itself had cached, or could have: the control.
    pub own_probes: usize,
    /// Chance that a probe of a prompt that the other tenant had cached was faster than one of a prompt that it had not: 0.5 tells
    /// nothing, and less tells as much as more.
    pub auc: f64,
    /// Median seconds of a probe, of cached and of other prompts of the other tenant.
    pub median_s: [f64; 2],
    /// The same for prompts that the tenant itself had cached: what the probe would see if it could.
    pub auc_own: f64,
    /// Prompt tokens found in the cache, of the same conversations held by four tenants and by one.
    pub hits_apart: usize,
    pub hits_together: usize,
    /// Probes that got no answer.
    pub failed: usize,
}

/// Probes a cluster with the smallest model: the shortest step shows a hit best.
pub async fn run(setting: &Setting) -> Result<Isolation> {
    let model = setting.shape("llama-tiny-shape.Q8_0.gguf");
    ensure!(
        model.is_file(),
        "{} is not there; `ops/setup bench` makes it",
        model.display()
    );
    let cluster = Cluster {
        binary: setting.verbund.clone(),
        model: Some(&model),
        ranks: 1,
        env: Vec::new(),
    };
    let server = Server::verbund(&cluster).await?;
    let (victim, spy) = (server.tenant("victim").await?, server.tenant("spy").await?);
    let (probes, own_every) = if setting.quick { (60, 4) } else { (PROBES, 20) };
    // The first requests find pages and caches cold.
    for _ in 0..20 {
        let text = prompt(&mut StdRng::seed_from_u64(4), PROBE_TOKENS);
        one(&server, &victim, &text).await;
        one(&server, &spy, &text).await;
    }
    let mut random = StdRng::seed_from_u64(5);
    let (mut other, mut own) = (Times::default(), Times::default());
    let mut failed = 0;
    // Which of the two the victim asks is drawn anew for each probe: what drifts disturbs both alike. Prompts are of one length,
    // and each probe follows at once on the same work.
    while other.count() < probes {
        let secret = prompt(&mut random, PROBE_TOKENS);
        let decoy = prompt(&mut random, PROBE_TOKENS);
        let cached = random.random::<bool>();
        // Some more probes ask what the spy itself has asked: the control that a hit can be seen at all.
        let total = other.count() + own.count() + failed;
        let (asker, times) = if total % own_every == own_every - 1 {
            (&spy, &mut own)
        } else {
            (&victim, &mut other)
        };
        one(&server, asker, if cached { &secret } else { &decoy }).await;
        match one(&server, &spy, &secret).await {
            Some((seconds, _)) => times.add(cached, seconds),
            None => failed += 1,
        }
        ensure!(failed <= probes / 10, "{failed} probes got no answer");
    }
    let mut tenants = Vec::new();
    for i in 0..4 {
        tenants.push(server.tenant(&format!("town-{i}")).await?);
    }
    let hits_apart = conversations(&server, &tenants).await?;
    let together = vec![server.tenant("all-towns").await?; 4];
    let hits_together = conversations(&server, &together).await?;
    Ok(Isolation {
        probes,
        own_probes: own.count(),
        median_s: [&other.cached, &other.fresh].map(|s| Percentiles::of(s.clone()).p50),
        auc: other.auc().context("too few probes")?,
        auc_own: own.auc().context("too few probes")?,
        hits_apart,
        hits_together,
        failed,
    })
}

/// Seconds to the one token, by whether the prompt was cached.
#[derive(Default)]
struct Times {
    cached: Vec<f64>,
    fresh: Vec<f64>,
}

impl Times {
    fn count(&self) -> usize {
        self.cached.len() + self.fresh.len()
    }

    fn add(&mut self, cached: bool, seconds: f64) {
        if cached {
            self.cached.push(seconds);
        } else {
            self.fresh.push(seconds);
        }
    }

    /// Area under the curve, by the rank sum (Mann and Whitney); `None` where a side is empty.
    fn auc(&self) -> Option<f64> {
        let mut all: Vec<(f64, bool)> = self
            .cached
            .iter()
            .map(|&s| (s, true))
            .chain(self.fresh.iter().map(|&s| (s, false)))
            .collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let pairs = self.cached.len() * self.fresh.len();
        let mut slower = 0.0;
        let mut wins = 0.0;
        // From the slowest on, equal times together: a cached one beats every slower fresh one, and half of its equals.
        for equal in all.chunk_by(|a, b| a.0 == b.0) {
            let cached = equal.iter().filter(|(_, cached)| *cached).count() as f64;
            let fresh = equal.len() as f64 - cached;
            wins += cached * (slower + 0.5 * fresh);
            slower += fresh;
        }
        (pairs > 0).then(|| wins / pairs as f64)
    }
}

/// Seconds to the end of an answer of one token, whose text may be empty, and what came.
async fn one(server: &Server, key: &str, prompt: &str) -> Option<(f64, Answer)> {
    let start = Instant::now();
    let request = Ask {
        key,
        prompt,
        answer_tokens: 1,
        cancel_after: None,
        temperature: 0.0,
    };
    let answer = ask(&server.http, &server.target, request).await;
    let seconds = start.elapsed().as_secs_f64();
    answer.complete.then_some((seconds, answer))
}

/// Conversations that grow turn by turn, their turns mixed, the same in each call; the prompt tokens that the cache had.
async fn conversations(server: &Server, keys: &[String]) -> Result<usize> {
    let mut random = StdRng::seed_from_u64(21);
    let mut texts: Vec<String> = (0..CONVERSATIONS)
        .map(|_| prompt(&mut random, 96))
        .collect();
    let mut hits = 0;
    for _ in 0..TURNS {
        for (i, text) in texts.iter_mut().enumerate() {
            let key = &keys[i % keys.len()];
            let (_, answer) = one(server, key, text)
                .await
                .context("a turn got no answer")?;
            hits += answer.cached_tokens.unwrap_or(0);
            text.push_str(&prompt(&mut random, 64));
        }
    }
    Ok(hits)
}

/// The table.
pub fn table(isolation: &Isolation) -> String {
    let kept = isolation.hits_apart as f64 / isolation.hits_together.max(1) as f64;
    let met = |ok| if ok { "✓" } else { "✗" };
    format!(
        "The smallest shape, prompts of {PROBE_TOKENS} tokens, answers of one token. Before each probe the first tenant asks either the same \
         prompt or another one, by chance.\n\n\
         | | measured | goal |\n| --- | ---: | ---: |\n\
         | AUC of a second tenant's waiting times, {} probes | {:.3} | 0.48 to 0.52 {} |\n\
         | median of a probe, of prompts that the first had cached / had not | {:.2} / {:.2} ms | |\n\
         | AUC of a tenant's own cached prompts, {} probes (a hit can be seen) | {:.3} | |\n\
         | cached prompt tokens of the same conversations, four tenants / one | {} / {} = {kept:.3} | ≥ 0.95 {} |\n\
         | probes without an answer | {} | 0 {} |\n",
        isolation.probes,
        isolation.auc,
        met((isolation.auc - 0.5).abs() <= 0.02),
        1e3 * isolation.median_s[0],
        1e3 * isolation.median_s[1],
        isolation.own_probes,
        isolation.auc_own,
        isolation.hits_apart,
        isolation.hits_together,
        met(isolation.hits_together > 0 && kept >= 0.95),
        isolation.failed,
        met(isolation.failed == 0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auc_is_the_chance_that_a_cached_one_is_faster() {
        let auc = |cached: &[f64], fresh: &[f64]| {
            let times = Times {
                cached: cached.to_vec(),
                fresh: fresh.to_vec(),
            };
            times.auc()
        };
        assert_eq!(auc(&[1.0, 2.0], &[3.0, 4.0]), Some(1.0));
        assert_eq!(auc(&[3.0, 4.0], &[1.0, 2.0]), Some(0.0));
        assert_eq!(auc(&[1.0, 4.0], &[2.0, 3.0]), Some(0.5));
        assert_eq!(auc(&[1.0, 1.0], &[1.0]), Some(0.5));
        assert_eq!(auc(&[1.0, 3.0], &[2.0, 3.0]), Some(0.625));
        assert_eq!(auc(&[], &[1.0]), None);
    }
}

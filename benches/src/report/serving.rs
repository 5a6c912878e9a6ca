//! Eight streaming clients at once: our whole cluster beside llama.cpp's server.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Setting;
use crate::load::client::{Ask, ask};
use crate::load::prompts::Mix;
use crate::load::{Arrivals, Bounds, Plan, Summary, TenantPlan, run as load};
use crate::server::{Cluster, Server};

const CLIENTS: usize = 8;

/// One number of clients.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub clients: usize,
    pub ours: Summary,
    pub peer: Option<Summary>,
}

/// All of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Serving {
    pub model: String,
    pub prompt: usize,
    pub answer: usize,
    /// What the peer's server is.
    pub peer: String,
    pub rows: Vec<Row>,
    /// Why the peer is missing.
    pub no_peer: Option<String>,
}

/// Starts both servers in turn, and keeps the run with the most tokens a second of each number of clients.
pub async fn run(setting: &Setting) -> Result<Serving> {
    let (model, name): (PathBuf, _) = if setting.quick {
        (setting.shape("llama-tiny-shape.Q8_0.gguf"), "tiny Q8_0")
    } else {
        (setting.shape("llama-1b-shape.Q4_0.gguf"), "1B Q4_0")
    };
    ensure!(
        model.is_file(),
        "{} is not there; `ops/setup bench` makes it",
        model.display()
    );
    let mut serving = Serving {
        model: name.into(),
        prompt: 132,
        answer: if setting.quick { 8 } else { 64 },
        peer: if setting.peer_server.is_file() {
            "llama.cpp".into()
        } else {
            "llama-cpp-python".into()
        },
        rows: Vec::new(),
        no_peer: None,
    };
    const COUNTS: [usize; 2] = [1, CLIENTS];
    let (mut ours, mut peer) = <([Option<Summary>; 2], [Option<Summary>; 2])>::default();
    let cluster = Cluster {
        binary: setting.verbund.clone(),
        model: Some(&model),
        ranks: 1,
        env: Vec::new(),
    };
    // A slot has room for its prompt and answer, in the multiple that llama.cpp takes.
    let positions = CLIENTS * (serving.prompt + serving.answer + 1).next_multiple_of(256);
    for round in 0..setting.rounds {
        let seed = |clients: usize| (round * 100 + clients) as u64;
        let server = Server::verbund(&cluster).await?;
        for (best, clients) in ours.iter_mut().zip(COUNTS) {
            better(
                best,
                burst(&server, clients, &serving, seed(clients)).await?,
            );
        }
        drop(server);
        let beside = async {
            let server = Server::llama_cpp(
                &setting.peer_server,
                &setting.peer_python,
                &model,
                setting.threads,
                CLIENTS,
                positions,
            )
            .await?;
            for (best, clients) in peer.iter_mut().zip(COUNTS) {
                better(
                    best,
                    burst(&server, clients, &serving, seed(clients)).await?,
                );
            }
            anyhow::Ok(())
        };
        if let Err(error) = beside.await {
            serving.no_peer = Some(format!("{error:#}"));
        }
    }
    for ((ours, peer), clients) in ours.into_iter().zip(peer).zip(COUNTS) {
        serving.rows.push(Row {
            clients,
            ours: ours.context("no round was run")?,
            peer,
        });
    }
    Ok(serving)
}

fn better(best: &mut Option<Summary>, new: Summary) {
    if best
        .as_ref()
        .is_none_or(|b| b.all.tokens_per_s < new.all.tokens_per_s)
    {
        *best = Some(new);
    }
}

/// So many clients ask once, all at the same moment, after a warm-up.
async fn burst(server: &Server, clients: usize, serving: &Serving, seed: u64) -> Result<Summary> {
    let warm_up = Ask {
        key: &server.key,
        prompt: " time year people way",
        answer_tokens: 4,
        cancel_after: None,
        temperature: 0.0,
    };
    let answer = ask(&server.http, &server.target, warm_up).await;
    ensure!(answer.complete, "the warm-up failed: {answer:?}");
    let plan = Plan {
        target: server.target.clone(),
        tenants: vec![TenantPlan {
            name: "clients".into(),
            key: server.key.clone(),
            arrivals: Arrivals::Closed { clients },
            // The server puts the beginning-of-text token before the words.
            mix: Mix::fixed(serving.prompt - 1, serving.answer),
            cancelled: 0.0,
        }],
        duration: Duration::from_secs(600),
        drain: Duration::from_secs(60),
        max_requests: clients,
        max_in_flight: clients,
        bounds: Bounds {
            first_token_s: 5.0,
            between_tokens_s: 0.25,
        },
        seed,
    };
    let records = load(&plan).await?;
    let summary = Summary::of(&plan, &records);
    ensure!(
        summary.all.answered == clients,
        "{} of {clients} were answered: {:?}",
        summary.all.answered,
        records.iter().map(|r| &r.outcome).collect::<Vec<_>>()
    );
    Ok(summary)
}

/// The table.
pub fn table(serving: &Serving) -> String {
    let mut text = format!(
        "{}, prompts of {} tokens, {} tokens of answer each, all clients at the same moment. Ours is a whole cluster with its gateway; llama.cpp's server has {CLIENTS} slots, continuous batching and its prompt cache. \"Longest gap\" is the longest wait of any stream between two tokens.\n\n| clients | server | tokens/s | first token, median | between tokens, median | longest gap |\n| ---: | --- | ---: | ---: | ---: | ---: |\n",
        serving.model, serving.prompt, serving.answer
    );
    for row in &serving.rows {
        let mut line = |name: &str, s: &Summary| {
            text.push_str(&format!(
                "| {} | {name} | {:.1} | {:.2} s | {:.0} ms | {:.2} s |\n",
                row.clients,
                s.all.tokens_per_s,
                s.all.first_token_s.p50,
                1e3 * s.all.between_tokens_s.p50,
                s.all.longest_gap_s.max
            ));
        };
        line("ours", &row.ours);
        if let Some(peer) = &row.peer {
            line(&serving.peer, peer);
            let (ours, peer) = (&row.ours.all, &peer.all);
            let (rate, first) = (
                ours.tokens_per_s / peer.tokens_per_s,
                ours.first_token_s.p50 / peer.first_token_s.p50,
            );
            let met = |ok| {
                if row.clients < CLIENTS {
                    ""
                } else if ok {
                    " ✓"
                } else {
                    " ✗"
                }
            };
            text.push_str(&format!(
                "| {} | ratio | {rate:.2}{} | {first:.2}{} | {:.2} | {:.2} |\n",
                row.clients,
                met(rate >= 4.0),
                met(first <= 0.25),
                ours.between_tokens_s.p50 / peer.between_tokens_s.p50,
                ours.longest_gap_s.max / peer.longest_gap_s.max
            ));
        }
    }
    text.push_str("\nGoals with 8 clients: tokens/s at least 4, first token at most 0.25.\n");
    if let Some(why) = &serving.no_peer {
        text.push_str(&format!("\nA run of the peer is missing: {why}\n"));
    }
    text
}

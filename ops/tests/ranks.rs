//! The number of ranks changes who computes, not what is answered, and the status shows who holds what.

mod cluster;

use std::time::{Duration, Instant};

use cluster::Cluster;
use serde_json::{Value, json};

/// A bound against hanging.
const GIVE_UP: Duration = Duration::from_secs(60);
const PROMPTS: [&str; 20] = [
    "Write one sentence about a town hall.",
    "What is the capital of France?",
    "List three colours.",
    "Explain what a library is.",
    "Count from one to ten.",
    "Name a large river in Germany.",
    "What is 7 plus 5?",
    "Give a synonym for happy.",
    "Why is the sky blue?",
    "Write a short greeting for a citizen.",
    "What does a mayor do?",
    "Complete the sentence: The early bird",
    "Translate 'good morning' into German.",
    "What is photosynthesis?",
    "Name two months with 31 days.",
    "What is the opposite of cold?",
    "Describe a bicycle in one sentence.",
    "What is a tax?",
    "Who wrote Faust?",
    "How many days are in a week?",
];

/// Greedy answers to all prompts, and the cluster's status for programs and for people.
async fn answers(ranks: u32) -> (Vec<String>, Value, String) {
    let cluster = Cluster::start(ranks).await;
    let mut texts = Vec::new();
    for prompt in PROMPTS {
        let request = json!({
            "model": "SmolLM2-135M-Instruct", "temperature": 0, "max_tokens": 32,
            "messages": [{"role": "user", "content": prompt}],
        });
        let (code, body) = cluster.post("/v1/chat/completions", request).await;
        assert_eq!(code, 200, "{body}");
        texts.push(
            body["choices"][0]["message"]["content"]
                .as_str()
                .expect("text")
                .to_owned(),
        );
    }
    (texts, cluster.status(), cluster.status_text())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_two_and_three_ranks_give_the_same_text_and_each_holds_its_share() {
    let (one, alone, _) = answers(1).await;
    let whole = ranks_of(&alone)[0]["weight_bytes"].as_u64().expect("bytes");
    for count in [2, 3] {
        let (texts, status, shown) = answers(count).await;
        for (prompt, (expected, got)) in PROMPTS.iter().zip(one.iter().zip(&texts)) {
            assert_eq!(
                expected, got,
                "{count} ranks answer «{prompt}» otherwise than one"
            );
        }
        let ranks = ranks_of(&status);
        assert_eq!(ranks.len(), count as usize, "{status}");
        let heads: u64 = ranks.iter().map(|r| width(&r["query_heads"])).sum();
        let columns: u64 = ranks.iter().map(|r| width(&r["ffn_columns"])).sum();
        let rows: u64 = ranks.iter().map(|r| width(&r["vocab_rows"])).sum();
        assert_eq!((heads, columns, rows), (9, 1536, 49152), "{status}");
        shows_what_programs_see(&shown, &status);
        for rank in &ranks {
            let share = share_of_layers(rank).max(width(&rank["vocab_rows"]) as f64 / 49152.0);
            let mapped = rank["mapped_bytes"].as_u64().expect("mapped_bytes") as f64;
            // Norms are 61 vectors of 576 floats, on every rank.
            assert!(
                mapped <= share * whole as f64 * 1.02 + 200_000.0,
                "a rank maps {mapped} of {whole}: {rank}"
            );
        }
    }
}

/// The table names members, leader and epoch, and heads, columns and bytes of each rank.
fn shows_what_programs_see(shown: &str, status: &Value) {
    let nodes = status["nodes"].as_array().expect("nodes");
    for node in nodes {
        let name = node["name"].as_str().expect("name");
        let line = shown
            .lines()
            .find(|l| l.split_whitespace().nth(1) == Some(name));
        assert!(line.is_some_and(|l| l.contains(" up ")), "{name}:\n{shown}");
        if node["id"] == status["leader"] {
            assert!(
                shown.contains(&format!("leader {name}")),
                "{name}:\n{shown}"
            );
        }
    }
    let group = generating(status);
    assert!(
        shown.contains(&format!("epoch {}", group["epoch"])),
        "{shown}"
    );
    let table: Vec<&str> = shown
        .lines()
        .skip_while(|l| !l.starts_with(group["model"].as_str().expect("model")))
        .skip(2)
        .collect();
    let range = |r: &Value| format!("{}..{} ({})", r[0], r[1], width(r));
    let mib = |b: &Value| format!("{:.1} MiB", b.as_u64().expect("bytes") as f64 / 1048576.0);
    for (rank, line) in group["ranks"].as_array().expect("ranks").iter().zip(table) {
        for cell in [
            range(&rank["query_heads"]),
            range(&rank["ffn_columns"]),
            mib(&rank["weight_bytes"]),
            mib(&rank["mapped_bytes"]),
        ] {
            assert!(line.contains(&cell), "{cell} is not in «{line}»:\n{shown}");
        }
    }
}

/// The largest part of any layer's matrix that a rank holds.
fn share_of_layers(rank: &Value) -> f64 {
    (width(&rank["query_heads"]) as f64 / 9.0).max(width(&rank["ffn_columns"]) as f64 / 1536.0)
}

fn width(range: &Value) -> u64 {
    range[1].as_u64().expect("end") - range[0].as_u64().expect("start")
}

fn generating(status: &Value) -> &Value {
    let groups = status["groups"].as_array().expect("groups");
    groups
        .iter()
        .find(|g| g["kind"] == "generate")
        .expect("a generating group")
}

fn ranks_of(status: &Value) -> Vec<Value> {
    let group = generating(status);
    assert!(group["epoch"].as_u64().expect("epoch") >= 1);
    assert!(status["leader"].is_u64(), "{status}");
    group["ranks"].as_array().expect("ranks").clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn fewer_ranks_at_the_next_start_leave_no_dead_member_and_more_come_back() {
    let mut cluster = Cluster::start(2).await;
    for ranks in [1, 2] {
        assert!(cluster.stop().success(), "verbund up ends cleanly");
        cluster = cluster.start_again(ranks, &[]).await;
        let started = Instant::now();
        loop {
            let status = cluster.status();
            if has_workers(&status, ranks as usize) {
                break;
            }
            assert!(started.elapsed() < GIVE_UP, "not {ranks} workers: {status}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// Whether so many workers are members, all members are up, and the workers hold the model together.
fn has_workers(status: &Value, count: usize) -> bool {
    let nodes = status["nodes"].as_array().expect("nodes");
    let is_worker = |n: &&Value| n["name"].as_str().is_some_and(|n| n.starts_with("worker"));
    nodes.iter().filter(is_worker).count() == count
        && nodes.iter().all(|n| n["up"] == true)
        && generating(status)["state"] == "ready"
        && ranks_of(status).len() == count
}

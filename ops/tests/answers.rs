//! A fresh cluster answers from documents with sources: over HTTP, through the official client, and in the browser.

mod cluster;

use std::path::Path;

use cluster::{Cluster, bounded, example_questions, squeeze};
use futures::StreamExt;
use serde_json::json;

/// How many of the example questions must have their passage among the first three citations.
const FOUND_OF_30: f64 = 28.0 / 30.0;
/// What the whole demo cluster may hold in memory.
const RESIDENT_BYTES: u64 = 3 << 29;
/// A client or browser that hangs is ended; its checks take a minute or two.
const CHECKS_WITHIN_S: u32 = 600;

#[tokio::test(flavor = "multi_thread")]
async fn example_questions_are_answered_with_the_right_source() {
    let cluster = Cluster::start(2).await;
    println!("{} MiB resident when ready", cluster.resident_bytes() >> 20);
    let collection = cluster.with_examples().await;

    let questions = example_questions();
    assert!(questions.len() >= 30);
    let asked = futures::stream::iter(&questions).map(|q| {
        let (cluster, collection) = (&cluster, &collection);
        async move {
            let request = json!({
                "model": "SmolLM2-135M-Instruct", "max_tokens": 1, "temperature": 0,
                "messages": [{"role": "user", "content": q["question"]}], "collections": [collection],
            });
            let (code, body) = cluster.post("/v1/chat/completions", request).await;
            assert_eq!(code, 200, "{body}");
            let passage = squeeze(q["passage"].as_str().expect("passage"));
            let citations = body["citations"].as_array().cloned().unwrap_or_default();
            let found = citations.iter().take(3).any(|c| {
                c["document"] == q["document"] && squeeze(c["passage"].as_str().unwrap_or_default()).contains(&passage)
            });
            if !found {
                println!("not among the first three: {}", q["question"]);
            }
            found
        }
    });
    let found = asked
        .buffer_unordered(4)
        .filter(|found| std::future::ready(*found))
        .count()
        .await;
    println!(
        "{found} of {} passages among the first three citations",
        questions.len()
    );
    assert!(
        found as f64 >= FOUND_OF_30 * questions.len() as f64,
        "only {found} of {}",
        questions.len()
    );

    let resident = cluster.resident_bytes();
    println!("{} MiB resident after the questions", resident >> 20);
    assert!(
        resident < RESIDENT_BYTES,
        "{} MiB resident, expected less than {}",
        resident >> 20,
        RESIDENT_BYTES >> 20
    );

    a_deadline_that_passes_is_told_and_frees_the_cache(&cluster).await;
    run_python_client(&cluster);
    run_browser(&cluster);
}

async fn a_deadline_that_passes_is_told_and_frees_the_cache(cluster: &Cluster) {
    let request = |stream: bool| {
        json!({
            "model": "SmolLM2-135M-Instruct", "max_tokens": 4000, "temperature": 0, "timeout_ms": 1, "stream": stream,
            "messages": [{"role": "user", "content": "Erzähle eine lange Geschichte."}], "priority": "background",
        })
    };
    let (code, body) = cluster.post("/v1/chat/completions", request(false)).await;
    assert_eq!((code, &body["error"]["code"]), (504, &json!("timeout")));
    let told = body["error"]["message"].as_str().unwrap_or_default();
    assert!(told.contains("within the 1 ms"), "{told}");
    let (code, stream) = cluster.post("/v1/chat/completions", request(true)).await;
    let told = stream.to_string();
    assert!(
        told.contains("timeout") && !told.contains("[DONE]"),
        "{code} {told}"
    );
    // The engine tells its metrics after the step in which it gave the blocks back.
    let mut used = f64::NAN;
    for _ in 0..100 {
        used = used_blocks(cluster).await;
        if used == 0.0 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("{used} blocks are still held");
}

/// KV blocks that requests hold, over all workers.
async fn used_blocks(cluster: &Cluster) -> f64 {
    let mut used = Vec::new();
    for worker in ["worker1", "worker2"] {
        let config = std::fs::read_to_string(cluster.dir().join(worker).join("node.toml"));
        let config: toml::Table = config.expect("node.toml").parse().expect("TOML");
        let admin = config["node"]["admin_listen"].as_str().expect("an address");
        let metrics = cluster.http.get(format!("http://{admin}/metrics")).send();
        let metrics = metrics.await.expect("metrics").text().await.expect("text");
        let held = metrics.lines().filter(|line| {
            line.starts_with("verbund_engine_kv_blocks") && line.contains("state=\"used\"")
        });
        used.extend(held.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()));
    }
    assert!(!used.is_empty(), "no worker tells of its blocks");
    used.iter().sum()
}

/// The official `openai` client: models, streamed and whole chat completions, embeddings, error classes.
fn run_python_client(cluster: &Cluster) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gateway/tests/openai_client.py");
    let python = std::env::var("VERBUND_PYTHON").unwrap_or_else(|_| "python3".into());
    let done = bounded(CHECKS_WITHIN_S)
        .arg(python)
        .arg(script)
        .arg(cluster.dir().join("demo.json"))
        .status()
        .expect("python");
    assert!(done.success(), "the openai client's checks failed");
}

/// Headless Chromium: ask, see the answer stream in, open a citation; axe-core finds no violation.
fn run_browser(cluster: &Cluster) {
    let ui = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gateway/ui");
    let screens = Path::new(env!("CARGO_TARGET_TMPDIR")).join("screens");
    std::fs::create_dir_all(&screens).expect("folder for screenshots");
    println!("screenshots in {}", screens.display());
    let done = bounded(CHECKS_WITHIN_S)
        .arg("node")
        .current_dir(&ui)
        .args(["tests/browser.mjs"])
        .arg(cluster.dir().join("demo.json"))
        .arg(&screens)
        .status()
        .expect("node");
    assert!(done.success(), "the browser's checks failed");
}

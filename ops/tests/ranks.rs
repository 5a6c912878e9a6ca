//! The number of ranks changes who computes, not what is answered, and the status shows who holds what.

mod cluster;

use cluster::Cluster;
use serde_json::{Value, json};

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

/// Greedy answers to all prompts, and the cluster's status.
async fn answers(ranks: u32) -> (Vec<String>, Value) {
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
    (texts, cluster.status())
}

#[tokio::test(flavor = "multi_thread")]
async fn one_two_and_three_ranks_give_the_same_text_and_each_holds_its_share() {
    let (one, alone) = answers(1).await;
    let whole = ranks_of(&alone)[0]["weight_bytes"].as_u64().expect("bytes");
    for count in [2, 3] {
        let (texts, status) = answers(count).await;
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

/// The largest part of any layer's matrix that a rank holds.
fn share_of_layers(rank: &Value) -> f64 {
    (width(&rank["query_heads"]) as f64 / 9.0).max(width(&rank["ffn_columns"]) as f64 / 1536.0)
}

fn width(range: &Value) -> u64 {
    range[1].as_u64().expect("end") - range[0].as_u64().expect("start")
}

fn ranks_of(status: &Value) -> Vec<Value> {
    let groups = status["groups"].as_array().expect("groups");
    let group = groups
        .iter()
        .find(|g| g["kind"] == "generate")
        .expect("a generating group");
    assert!(group["epoch"].as_u64().expect("epoch") >= 1);
    assert!(status["leader"].is_u64(), "{status}");
    group["ranks"].as_array().expect("ranks").clone()
}

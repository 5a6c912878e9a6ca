//! Any one process may be killed with `kill -9`: what was acknowledged stays, and the cluster answers again by itself.

mod cluster;

use std::time::{Duration, Instant};

use cluster::{Cluster, Process, signal};
use serde_json::{Value, json};

/// A bound against hanging; the times that count are printed.
const GIVE_UP: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn every_process_may_die_and_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::start(2).await;
    let collection = cluster.create_collection("Dauerfeuer").await;
    let mut kept = Vec::new();
    keep_document(&cluster, &collection, &mut kept).await;

    let leader = leader_of(&cluster);
    let store = cluster
        .processes()
        .into_iter()
        .find(|p| p.name.starts_with("node") && p.name != leader.name);
    let victims = [
        ("coordinator leader", leader.name),
        ("store node", store.expect("another store node").name),
        ("rank 1", "worker2".to_owned()),
        ("rank 0", "worker1".to_owned()),
        ("gateway", "gateway".to_owned()),
    ];
    for (what, name) in victims {
        keep_document(&cluster, &collection, &mut kept).await;
        let before = cluster.process(&name);
        signal(before.pid, "KILL");
        let killed = Instant::now();
        // Asks until an answer that needs every part comes: retrieval, embedding, generation, and the gateway.
        loop {
            let answered = ask(&cluster, &collection).await;
            if answered && cluster.process(&name).pid != before.pid {
                break;
            }
            assert!(
                killed.elapsed() < GIVE_UP,
                "no answer since {what} ({name}) was killed"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        println!(
            "{what} killed: answered again and restarted after {:.1} s",
            killed.elapsed().as_secs_f32()
        );
        all_there(&cluster, &kept).await;
        whole_again(&cluster).await;
    }

    let dir = cluster.dir().to_owned();
    assert!(cluster.stop().success(), "verbund up ends cleanly");
    let again = Cluster::start_again(&dir, 2).await;
    all_there(&again, &kept).await;
    assert!(ask(&again, &collection).await);
}

/// Uploads a document with a word of its own and remembers what must be found from now on.
async fn keep_document(cluster: &Cluster, collection: &str, kept: &mut Vec<(String, Vec<u8>)>) {
    let bytes = format!(
        "Merkblatt {0}\n\nDas Kennwort der Akte {0} lautet Zaunkönig{0}.",
        kept.len()
    )
    .into_bytes();
    let (code, doc) = cluster
        .upload(
            collection,
            &format!("akte-{}.txt", kept.len()),
            bytes.clone(),
        )
        .await;
    assert!((200..300).contains(&code), "upload: {code} {doc}");
    kept.push((doc["id"].as_str().expect("id").to_owned(), bytes));
}

async fn all_there(cluster: &Cluster, kept: &[(String, Vec<u8>)]) {
    for (id, bytes) in kept {
        assert_eq!(cluster.ingested(id).await["status"], "ready");
        let url = format!("{}/api/documents/{id}/original", cluster.base);
        let reply = cluster
            .http
            .get(url)
            .bearer_auth(&cluster.key)
            .send()
            .await
            .expect("original");
        assert_eq!(
            reply.bytes().await.expect("bytes").as_ref(),
            bytes.as_slice(),
            "{id}"
        );
    }
}

async fn ask(cluster: &Cluster, collection: &str) -> bool {
    let request = json!({
        "model": "SmolLM2-135M-Instruct", "max_tokens": 2, "temperature": 0,
        "messages": [{"role": "user", "content": "Wie lautet das Kennwort der Akte 0?"}], "collections": [collection],
    });
    let (code, body) = cluster.post("/v1/chat/completions", request).await;
    assert!(
        matches!(code, 0 | 200 | 429 | 500..=599),
        "an answer that a client would not retry: {code} {body}"
    );
    code == 200 && body["citations"].as_array().is_some_and(|c| !c.is_empty())
}

/// Waits until every member is up and the group has both ranks again.
async fn whole_again(cluster: &Cluster) {
    let started = Instant::now();
    loop {
        let status = cluster.status();
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        let groups = status["groups"].as_array().cloned().unwrap_or_default();
        let full = |g: &&Value| {
            g["kind"] == "generate"
                && g["state"] == "ready"
                && g["ranks"].as_array().is_some_and(|r| r.len() == 2)
        };
        if !nodes.is_empty()
            && nodes.iter().all(|n| n["up"] == true)
            && groups.iter().any(|g| full(&g))
        {
            return;
        }
        assert!(
            started.elapsed() < GIVE_UP,
            "the cluster is not whole again: {status}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn leader_of(cluster: &Cluster) -> Process {
    let status = cluster.status();
    let node = status["nodes"]
        .as_array()
        .and_then(|nodes| nodes.iter().find(|n| n["id"] == status["leader"]));
    cluster.process(
        node.and_then(|n| n["name"].as_str())
            .unwrap_or_else(|| panic!("no leader in {status}")),
    )
}

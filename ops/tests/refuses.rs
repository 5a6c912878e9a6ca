//! Bad requests and bad surroundings get a clear error that says what was expected, and the cluster stays up.

mod cluster;

use std::process::Output;

use cluster::{Cluster, example_documents, free_port, verbund};
use serde_json::{Value, json};

const MODEL: &str = "SmolLM2-135M-Instruct";

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_in_the_openai_form_and_harm_nothing() {
    let cluster = Cluster::start(1).await;
    let chat = "/v1/chat/completions";
    let hello = json!([{"role": "user", "content": "Hallo"}]);
    let long = "Amt ".repeat(20_000);
    // (path, body, status, part of the message)
    let cases: Vec<(&str, Value, u16, &str)> = vec![
        (
            chat,
            json!({"model": "gibt-es-nicht", "messages": hello}),
            404,
            MODEL,
        ),
        (chat, json!({"model": MODEL}), 400, "messages"),
        (
            chat,
            json!({"model": MODEL, "messages": []}),
            400,
            "messages",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": "Hallo"}),
            400,
            "messages",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": hello, "n": 100_000}),
            400,
            "n",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": hello, "temperature": "warm"}),
            400,
            "temperature",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": hello, "temperature": -1}),
            400,
            "temperature",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": hello, "max_tokens": -5}),
            400,
            "max_tokens",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": [{"role": "user", "content": long}]}),
            400,
            "8192",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": hello, "collections": ["col_fremd"]}),
            404,
            "collection",
        ),
        (
            "/v1/completions",
            json!({"model": MODEL, "prompt": 7}),
            400,
            "prompt",
        ),
        (
            "/v1/embeddings",
            json!({"model": "multilingual-e5-small", "input": {"a": 1}}),
            400,
            "input",
        ),
        ("/api/collections", json!({"name": ""}), 400, "name"),
        ("/api/retrieve", json!({"collections": []}), 400, "query"),
    ];
    for (path, body, status, part) in cases {
        let (code, reply) = cluster.post(path, body).await;
        let message = reply["error"]["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        assert_eq!(code, status, "{path} → {reply}");
        assert!(
            message.contains(part),
            "{path}: «{message}» does not name {part}"
        );
        assert!(reply["error"]["type"].is_string(), "{reply}");
    }

    let url = format!("{}{chat}", cluster.base);
    let request = || {
        cluster
            .http
            .post(&url)
            .header("content-type", "application/json")
    };
    let (code, reply) = cluster
        .send(request().bearer_auth(&cluster.key).body("{\"model\": "))
        .await;
    assert_eq!(
        (code, reply["error"]["type"].is_string()),
        (400, true),
        "{reply}"
    );
    let (code, reply) = cluster
        .send(request().bearer_auth("vb-falsch").body("{}"))
        .await;
    assert_eq!(
        (code, reply["error"]["type"].is_string()),
        (401, true),
        "{reply}"
    );
    let (code, reply) = cluster.send(request().body("{}")).await;
    assert_eq!(
        (code, reply["error"]["type"].is_string()),
        (401, true),
        "{reply}"
    );
    let (code, reply) = cluster
        .send(
            request()
                .bearer_auth(&cluster.key)
                .body(vec![b' '; 80 << 20]),
        )
        .await;
    assert!(code == 413 || code == 0, "an 80 MB request: {code} {reply}");

    let (code, reply) = cluster
        .post(
            chat,
            json!({"model": MODEL, "messages": hello, "max_tokens": 4}),
        )
        .await;
    assert_eq!(code, 200, "still answers: {reply}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_documents_fail_with_a_reason_and_good_ones_beside_them_are_kept() {
    let cluster = Cluster::start(1).await;
    let collection = cluster.create_collection("Schlechte Dateien").await;
    let (code, reply) = cluster
        .upload(&collection, "riesig.pdf", vec![b'%'; 100 << 20])
        .await;
    assert!(code == 413 || code == 0, "a 100 MB file: {code} {reply}");
    if code == 413 {
        assert!(
            reply["error"]["message"]
                .as_str()
                .is_some_and(|m| m.contains("50")),
            "names the limit: {reply}"
        );
    }

    let pdf = example_documents()
        .into_iter()
        .find(|p| p.extension().is_some_and(|e| e == "pdf"))
        .expect("a PDF");
    let whole = std::fs::read(pdf).expect("PDF");
    let cases: [(&str, Vec<u8>); 4] = [
        ("leer.txt", Vec::new()),
        ("abgeschnitten.pdf", whole[..whole.len() / 3].to_vec()),
        (
            "kaputt.docx",
            b"PK\x03\x04 not really a zip archive".to_vec(),
        ),
        ("programm.exe", b"MZ\x90\x00\x03\x00\x00\x00".repeat(64)),
    ];
    for (name, bytes) in cases {
        let (code, doc) = cluster.upload(&collection, name, bytes).await;
        if code == 400 || code == 415 {
            assert!(
                doc["error"]["message"]
                    .as_str()
                    .is_some_and(|m| m.len() > 10),
                "{name}: {doc}"
            );
            continue;
        }
        assert!((200..300).contains(&code), "{name}: {code} {doc}");
        let doc = cluster.ingested(doc["id"].as_str().expect("id")).await;
        assert_eq!(doc["status"], "failed", "{name}: {doc}");
        assert!(
            doc["error"].as_str().is_some_and(|m| m.len() > 10),
            "{name} says why: {doc}"
        );
    }

    let latin1 = b"Die Geb\xfchr f\xfcr das F\xfchrungszeugnis betr\xe4gt 13 Euro.".to_vec();
    let (code, doc) = cluster.upload(&collection, "latin1.txt", latin1).await;
    assert!((200..300).contains(&code), "{code} {doc}");
    assert_eq!(
        cluster.ingested(doc["id"].as_str().expect("id")).await["status"],
        "ready"
    );
    let query = json!({"query": "Was kostet ein Führungszeugnis?", "collections": [collection], "top_k": 3});
    let (code, found) = cluster.post("/api/retrieve", query).await;
    assert_eq!(code, 200, "{found}");
    assert!(
        found["results"][0]["text"]
            .as_str()
            .is_some_and(|t| t.contains("Führungszeugnis beträgt")),
        "{found}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_surroundings_stop_the_start_with_a_word() {
    let dir = tempfile::tempdir().expect("directory");

    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("listener");
    let port = taken.local_addr().expect("address").port();
    let said = refused(up(dir.path(), port, &[]));
    assert!(said.contains(&port.to_string()), "port in use: {said}");

    let said = refused(up(dir.path(), free_port(), &["--ranks", "4"]));
    assert!(
        said.contains('4') && said.contains('3'),
        "more ranks than KV heads names both: {said}"
    );

    let broken = dir.path().join("broken.gguf");
    std::fs::write(
        &broken,
        b"GGUF\x03\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\x7f",
    )
    .expect("file");
    let said = refused(up(
        dir.path(),
        free_port(),
        &["--model", &broken.display().to_string()],
    ));
    assert!(
        said.contains("broken.gguf"),
        "a truncated model names the file: {said}"
    );

    let missing = dir.path().join("missing.gguf");
    let said = refused(up(
        dir.path(),
        free_port(),
        &["--model", &missing.display().to_string()],
    ));
    assert!(
        said.contains("missing.gguf"),
        "a missing model names the file: {said}"
    );

    let cluster = Cluster::start(1).await;
    let said = refused(up(cluster.dir(), free_port(), &[]));
    assert!(
        said.contains(&cluster.dir().display().to_string()),
        "a directory in use is named: {said}"
    );
}

#[test]
fn a_directory_of_another_version_is_left_alone() {
    let dir = tempfile::tempdir().expect("directory");
    std::fs::write(dir.path().join("FORMAT"), "verbund 999\n").expect("file");
    let said = refused(up(dir.path(), free_port(), &[]));
    assert!(said.contains("999"), "names the version found: {said}");
    assert_eq!(
        std::fs::read_dir(dir.path()).expect("directory").count(),
        1,
        "nothing was written"
    );
}

fn up(dir: &std::path::Path, port: u16, more: &[&str]) -> Output {
    let mut command = std::process::Command::new("timeout");
    command
        .args(["--signal=TERM", "60"])
        .arg(verbund().get_program());
    command
        .args(["up", "--data"])
        .arg(dir)
        .args(["--port", &port.to_string()])
        .args(more);
    command.output().expect("verbund up")
}

/// The error text of a command that must fail by itself, without a panic.
fn refused(out: Output) -> String {
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(
        !out.status.success() && out.status.code() != Some(124),
        "not refused: {said}"
    );
    assert!(!said.contains("panicked"), "{said}");
    said
}

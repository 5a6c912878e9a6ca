//! Clients that mean harm, or are merely broken: the cluster stays up and goes on serving everybody else.

mod cluster;

use cluster::Cluster;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

const CONNECTIONS: usize = 1000;
/// Requests of the flooding tenant at one time.
const FLOOD: usize = 40;
/// Words, one token each, of a flooding prompt: most of the model's context of 8192 tokens.
const LONGEST_WORDS: usize = 7500;

#[tokio::test(flavor = "multi_thread")]
async fn hostile_clients_harm_nobody_else() {
    let mut cluster = Cluster::start(1).await;
    let before = pids(&cluster);
    let model = generating_model(&cluster).await;

    // Clients that ask for a long stream and then take one byte of it.
    let mut unread = Vec::new();
    for _ in 0..4 {
        let mut stream = connect(&cluster).await;
        let body = chat(&model, "Erzähle eine lange Geschichte.", 2000, true).to_string();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nHost: verbund\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            cluster.key,
            body.len()
        );
        stream.write_all(request.as_bytes()).await.expect("request");
        let mut first = [0];
        stream.read_exact(&mut first).await.expect("one byte");
        unread.push(stream);
    }
    answers(&cluster, &model).await;

    // As many connections as a broken program opens, all at once and none of them used.
    let mut connects = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let address = address(&cluster);
        connects.spawn(async move { TcpStream::connect(address).await });
    }
    answers(&cluster, &model).await;
    let idle = connects.join_all().await;
    let open = idle.iter().filter(|c| c.is_ok()).count();
    assert!(open > CONNECTIONS / 2, "only {open} connections were made");
    drop(idle);
    answers(&cluster, &model).await;

    // Another tenant sends the longest prompts there are, many at once.
    let loud = another_tenants_key(&cluster).await;
    let mut flood = JoinSet::new();
    for i in 0..FLOOD {
        let prompt = format!("{i}{}", " house".repeat(LONGEST_WORDS));
        let request = cluster
            .http
            .post(format!("{}/v1/chat/completions", cluster.base))
            .bearer_auth(&loud)
            .json(&chat(&model, &prompt, 16, true));
        flood.spawn(async move { request.send().await.map(|reply| reply.status().as_u16()) });
    }
    // The first of them are being computed when others ask.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    for _ in 0..3 {
        answers(&cluster, &model).await;
    }
    flood.abort_all();
    while let Some(done) = flood.join_next().await {
        if let Ok(Ok(status)) = done {
            assert!(
                matches!(status, 200 | 429),
                "the flood was answered {status}"
            );
        }
    }
    drop(unread);
    answers(&cluster, &model).await;
    assert!(cluster.runs());
    assert_eq!(
        pids(&cluster),
        before,
        "a process ended and was started again"
    );
}

fn chat(model: &str, text: &str, tokens: usize, stream: bool) -> Value {
    json!({
        "model": model,
        "messages": [{ "role": "user", "content": text }],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
    })
}

/// An ordinary question of the demo tenant gets its answer.
async fn answers(cluster: &Cluster, model: &str) {
    let question = chat(model, "Was ist eine Satzung?", 4, false);
    let (code, answer) = cluster.post("/v1/chat/completions", question).await;
    assert_eq!(code, 200, "{answer}");
    assert!(
        answer["choices"][0]["message"]["content"].is_string(),
        "{answer}"
    );
}

async fn generating_model(cluster: &Cluster) -> String {
    let (code, models) = cluster.get("/v1/models").await;
    assert_eq!(code, 200, "{models}");
    let all = models["data"].as_array().expect("models");
    let model = all
        .iter()
        .find(|m| m["kind"] == "generate")
        .expect("a model");
    model["id"].as_str().expect("id").to_owned()
}

/// Makes a tenant with a key.
async fn another_tenants_key(cluster: &Cluster) -> String {
    let admin = |path: &str, body: Value| {
        let url = format!("{}{path}", cluster.base);
        cluster.send(
            cluster
                .http
                .post(url)
                .bearer_auth(&cluster.admin_key)
                .json(&body),
        )
    };
    let (code, made) = admin("/api/tenants", json!({ "id": "laut", "name": "Laut" })).await;
    assert_eq!(code, 201, "{made}");
    let (code, made) = admin("/api/tenants/laut/keys", json!({ "name": "Test" })).await;
    assert_eq!(code, 201, "{made}");
    let key = made["secret"].as_str().expect("the key itself").to_owned();
    let models = cluster.http.get(format!("{}/v1/models", cluster.base));
    let (code, models) = cluster.send(models.bearer_auth(&key)).await;
    assert_eq!(code, 200, "{models}");
    key
}

fn address(cluster: &Cluster) -> String {
    cluster.base.trim_start_matches("http://").to_owned()
}

async fn connect(cluster: &Cluster) -> TcpStream {
    TcpStream::connect(address(cluster))
        .await
        .expect("connection")
}

fn pids(cluster: &Cluster) -> Vec<i32> {
    cluster.processes().iter().map(|p| p.pid).collect()
}

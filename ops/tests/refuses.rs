//! Bad requests and bad surroundings get a clear error that says what was expected, and the cluster stays up.

mod cluster;

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use cluster::{Cluster, bounded, example_documents, free_port, signal, verbund};
use serde_json::{Value, json};

const MODEL: &str = "SmolLM2-135M-Instruct";

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_refused_in_the_openai_form_and_harm_nothing() {
    let cluster = Cluster::start(1).await;
    let chat = "/v1/chat/completions";
    let hello = json!([{"role": "user", "content": "Hallo"}]);
    let long = "Amt ".repeat(20_000);
    // (path, body, status, the parameter at fault, part of the message)
    let cases: Vec<(&str, Value, u16, &str, &str)> = vec![
        (
            chat,
            json!({"model": "gibt-es-nicht", "messages": hello}),
            404,
            "model",
            MODEL,
        ),
        (chat, json!({"model": MODEL}), 400, "messages", "messages"),
        (
            chat,
            json!({"model": MODEL, "messages": []}),
            400,
            "messages",
            "1 to 2048",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": "Hallo"}),
            400,
            "messages",
            "expected",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": hello, "n": 100_000}),
            400,
            "n",
            "100000",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": hello, "temperature": "warm"}),
            400,
            "temperature",
            "expected",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": hello, "temperature": -1}),
            400,
            "temperature",
            "-1",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": hello, "max_tokens": -5}),
            400,
            "max_tokens",
            "-5",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": [{"role": "user", "content": long}]}),
            400,
            "messages",
            "8192",
        ),
        (
            chat,
            json!({"model": MODEL, "messages": hello, "collections": ["col_fremd"]}),
            404,
            "collections",
            "collection",
        ),
        (
            "/v1/completions",
            json!({"model": MODEL, "prompt": 7}),
            400,
            "prompt",
            "expected",
        ),
        (
            "/v1/embeddings",
            json!({"model": "multilingual-e5-small", "input": {"a": 1}}),
            400,
            "input",
            "expected",
        ),
        ("/api/collections", json!({"name": ""}), 400, "name", "name"),
        (
            "/api/retrieve",
            json!({"collections": []}),
            400,
            "query",
            "query",
        ),
    ];
    for (path, body, status, param, part) in cases {
        let (code, reply) = cluster.post(path, body).await;
        let message = reply["error"]["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        assert_eq!(code, status, "{path} → {reply}");
        assert_eq!(reply["error"]["param"], param, "{path} → {reply}");
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
    assert_eq!(code, 413, "an 80 MB request: {reply}");
    assert!(reply["error"]["type"].is_string(), "{reply}");

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
    assert_eq!(code, 413, "a 100 MB file: {reply}");
    assert!(
        reply["error"]["message"]
            .as_str()
            .is_some_and(|m| m.contains("50 MiB")),
        "names the limit: {reply}"
    );

    let pdf = example_documents()
        .into_iter()
        .find(|p| p.extension().is_some_and(|e| e == "pdf"))
        .expect("a PDF");
    let whole = std::fs::read(pdf).expect("PDF");
    let protected = |name| {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rag-store/tests/fixtures");
        std::fs::read(fixtures.join(name)).expect("protected document")
    };
    let (code, reply) = cluster.upload(&collection, "leer.txt", Vec::new()).await;
    assert_eq!(code, 400, "an empty file: {reply}");
    assert!(
        reply["error"]["message"]
            .as_str()
            .is_some_and(|m| m.contains("empty")),
        "{reply}"
    );
    // (name, content, part of the reason)
    let cases: [(&str, Vec<u8>, &str); 5] = [
        (
            "abgeschnitten.pdf",
            whole[..whole.len() / 3].to_vec(),
            "beschädigt",
        ),
        (
            "kaputt.docx",
            b"PK\x03\x04 not really a zip archive".to_vec(),
            "beschädigt",
        ),
        (
            "programm.exe",
            b"MZ\x90\x00\x03\x00\x00\x00".repeat(64),
            "nicht unterstützt",
        ),
        ("geheim.pdf", protected("protected.pdf"), "Kennwort"),
        ("geheim.docx", protected("protected.docx"), "Kennwort"),
    ];
    for (name, bytes, reason) in cases {
        let (code, doc) = cluster.upload(&collection, name, bytes).await;
        assert!((200..300).contains(&code), "{name}: {code} {doc}");
        let doc = cluster.ingested(doc["id"].as_str().expect("id")).await;
        assert_eq!(doc["status"], "failed", "{name}: {doc}");
        assert!(
            doc["error"].as_str().is_some_and(|m| m.contains(reason)),
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
    assert!(
        said.contains(&format!("port {port} is not free")),
        "port in use: {said}"
    );

    let said = refused(up(dir.path(), free_port(), &["--ranks", "4"]));
    assert!(
        said.contains("4 ranks") && said.contains("3 KV heads"),
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
        said.contains("broken.gguf") && said.contains("damaged"),
        "a truncated model names the file and what is wrong: {said}"
    );

    let missing = dir.path().join("missing.gguf");
    let said = refused(up(
        dir.path(),
        free_port(),
        &["--model", &missing.display().to_string()],
    ));
    assert!(
        said.contains("no model at") && said.contains("missing.gguf"),
        "a missing model names the file: {said}"
    );

    let cluster = Cluster::start(1).await;
    let said = refused(up(cluster.dir(), free_port(), &[]));
    assert!(
        said.contains("in use") && said.contains(&cluster.dir().display().to_string()),
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

/// Where nothing can hold even one shard; each of two ranks would need about 60 MB.
const TOO_SMALL_BYTES: &str = "20000000";

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_too_large_says_how_much_is_missing() {
    let models = std::env::var("VERBUND_MODELS").expect("VERBUND_MODELS; run with `ops/setup env`");
    let model = Path::new(&models).join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let said = refused(
        bounded(60)
            .arg(verbund().get_program())
            .args([
                "plan",
                "--ranks",
                "2",
                "--memory",
                TOO_SMALL_BYTES,
                "--model",
            ])
            .arg(model)
            .output()
            .expect("verbund plan"),
    );
    assert!(names_missing_bytes(&said), "plan: {said}");

    let dir = tempfile::tempdir().expect("directory");
    let said = refused(
        bounded(90)
            .arg(verbund().get_program())
            .args(["up", "--ranks", "2", "--data"])
            .arg(dir.path())
            .args(["--port", &free_port().to_string()])
            // What the workers tell the cluster that they have.
            .env("VERBUND_WORKER_MEMORY_BYTES", TOO_SMALL_BYTES)
            .output()
            .expect("verbund up"),
    );
    assert!(names_missing_bytes(&said), "up: {said}");
}

/// "too large" or "too small", and a number of bytes above zero that is missing.
fn names_missing_bytes(said: &str) -> bool {
    let before = said.split(" bytes are missing").next().unwrap_or_default();
    let number = before.rsplit(|c: char| !c.is_ascii_digit()).next();
    said.contains("too ")
        && said.contains(" bytes are missing")
        && number
            .and_then(|n| n.parse().ok())
            .is_some_and(|n: u64| n > 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_uploads_and_loses_nothing() {
    let Some(disk) = SmallDisk::mount("512m") else {
        println!("not tested: mounting a small disk needs root");
        return;
    };
    let mut cluster = Cluster::start_in(disk.path(), 1).await;
    let collection = cluster.create_collection("Volle Platte").await;
    let text = |n: u32| format!("Aktenvermerk {n}: Das Rathaus hat am Brückentag geschlossen.");
    let upload = async |cluster: &Cluster, n: u32| {
        let name = format!("vermerk-{n}.txt");
        cluster
            .upload(&collection, &name, text(n).into_bytes())
            .await
    };
    let (code, first) = upload(&cluster, 1).await;
    assert!((200..300).contains(&code), "{code} {first}");
    let first = first["id"].as_str().expect("id").to_owned();
    assert_eq!(cluster.ingested(&first).await["status"], "ready");

    disk.fill();
    let (code, reply) = upload(&cluster, 2).await;
    assert_eq!(code, 507, "an upload to a full disk: {reply}");
    assert!(reply["error"]["type"].is_string(), "{reply}");
    assert!(
        reply["error"]["message"]
            .as_str()
            .is_some_and(|m| m.contains("MB free") && m.contains("are needed")),
        "says how much is free and needed: {reply}"
    );

    // A process that dies now is started again, though nothing can be noted about it.
    signal(cluster.process("gateway").pid, "KILL");
    let original = format!("/api/documents/{first}/original");
    let started = Instant::now();
    let mut read = cluster.get(&original).await;
    while read.0 != 200 {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "{read:?}\n{}",
            cluster.said()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
        read = cluster.get(&original).await;
    }
    assert_eq!(read.1, Value::String(text(1)));
    assert!(cluster.runs(), "verbund up goes on:\n{}", cluster.said());

    disk.empty();
    let started = Instant::now();
    let (mut code, mut third) = upload(&cluster, 3).await;
    while !(200..300).contains(&code) {
        assert!(
            matches!(code, 503 | 507) && started.elapsed() < Duration::from_secs(60),
            "after making room: {code} {third}"
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
        (code, third) = upload(&cluster, 3).await;
    }
    let third = third["id"].as_str().expect("id");
    assert_eq!(cluster.ingested(third).await["status"], "ready");
}

/// A file system of its own in memory, unmounted with the test.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// `None` where this user may not mount.
    fn mount(size: &str) -> Option<SmallDisk> {
        let dir = tempfile::tempdir().expect("directory");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(dir.path())
            .output()
            .is_ok_and(|out| out.status.success());
        mounted.then_some(SmallDisk(dir))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Leaves nothing free, not even the rest of a log's last page.
    fn fill(&self) {
        let zeros = vec![0; 1 << 20];
        let fill = |path: &Path| {
            let mut file = std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .expect("a file to fill");
            for part in [zeros.len(), 4096, 1] {
                while std::io::Write::write_all(&mut file, &zeros[..part]).is_ok() {}
            }
        };
        fill(&self.path().join("ballast"));
        let members = std::fs::read_dir(self.path()).expect("readable");
        let logs = members
            .flat_map(|member| {
                ["log", "stderr"].map(|name| member.as_ref().expect("member").path().join(name))
            })
            .filter(|log| log.is_file());
        let mut filled = 0;
        for log in logs {
            fill(&log);
            filled += 1;
        }
        assert!(
            filled >= 4,
            "the logs of two members or more lie here: {filled}"
        );
    }

    fn empty(&self) {
        std::fs::remove_file(self.path().join("ballast")).expect("ballast");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.path()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.path().display());
        }
    }
}

fn up(dir: &Path, port: u16, more: &[&str]) -> Output {
    let mut command = bounded(90);
    command
        .arg(verbund().get_program())
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
        !out.status.success() && !matches!(out.status.code(), None | Some(124 | 137)),
        "not refused: {said}"
    );
    assert!(!said.contains("panicked"), "{said}");
    said
}

//! A whole cluster of processes on loopback for the tests: `verbund up` on a directory of its own, ended with the test.

#![allow(dead_code)] // each test binary uses its own part

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest wait for a cluster to become ready; a bound against hanging, far above what it takes.
const READY_WITHIN: Duration = Duration::from_secs(90);

pub struct Cluster {
    up: Child,
    dir: PathBuf,
    _own_dir: Option<tempfile::TempDir>,
    pub base: String,
    pub key: String,
    pub admin_key: String,
    pub http: reqwest::Client,
}

/// One process of the cluster as `demo.json` lists it.
#[derive(Debug, Clone)]
pub struct Process {
    pub name: String,
    pub role: String,
    pub pid: i32,
}

pub fn verbund() -> Command {
    Command::new(env!("CARGO_BIN_EXE_verbund"))
}

/// The folder of the repository that holds the example documents and their questions.
pub fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples")
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .expect("a free port")
        .port()
}

impl Cluster {
    /// Starts a cluster with so many ranks on a new directory and waits until it is ready.
    pub async fn start(ranks: u32) -> Cluster {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().to_owned();
        Cluster::start_on(&path, Some(dir), ranks).await
    }

    /// Starts a cluster on an existing directory, which outlives it.
    pub async fn start_again(dir: &Path, ranks: u32) -> Cluster {
        Cluster::start_on(dir, None, ranks).await
    }

    async fn start_on(dir: &Path, own_dir: Option<tempfile::TempDir>, ranks: u32) -> Cluster {
        let port = free_port();
        let log = std::fs::File::create(dir.join("up.out")).expect("log file");
        let mut up = verbund()
            .args(["up", "--data"])
            .arg(dir)
            .args(["--port", &port.to_string(), "--ranks", &ranks.to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log file"))
            .stderr(log)
            .spawn()
            .expect("verbund up");
        let http = reqwest::Client::builder()
            .timeout(Duration::from_secs(120))
            .build()
            .expect("client");
        let ready = format!("http://127.0.0.1:{port}/ready");
        let started = Instant::now();
        loop {
            if let Ok(reply) = http.get(&ready).send().await
                && reply.status() == 200
            {
                break;
            }
            let ended = up.try_wait().expect("state of verbund up");
            let said = || std::fs::read_to_string(dir.join("up.out")).unwrap_or_default();
            assert!(
                ended.is_none(),
                "verbund up ended early with {ended:?}:\n{}",
                said()
            );
            assert!(
                started.elapsed() < READY_WITHIN,
                "not ready after {READY_WITHIN:?}:\n{}",
                said()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        println!(
            "ready after {:.1} s with {ranks} ranks",
            started.elapsed().as_secs_f32()
        );
        let demo = read_demo(dir);
        let text = |k: &str| {
            demo[k]
                .as_str()
                .unwrap_or_else(|| panic!("demo.json lacks {k}"))
                .to_owned()
        };
        Cluster {
            base: text("base_url"),
            key: text("api_key"),
            admin_key: text("admin_api_key"),
            up,
            dir: dir.to_owned(),
            _own_dir: own_dir,
            http,
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn processes(&self) -> Vec<Process> {
        read_demo(&self.dir)["processes"]
            .as_array()
            .expect("processes")
            .iter()
            .map(|p| Process {
                name: p["name"].as_str().expect("name").to_owned(),
                role: p["role"].as_str().expect("role").to_owned(),
                pid: p["pid"].as_i64().expect("pid") as i32,
            })
            .collect()
    }

    pub fn process(&self, name: &str) -> Process {
        self.processes()
            .into_iter()
            .find(|p| p.name == name)
            .unwrap_or_else(|| panic!("no process {name}"))
    }

    /// Asks the operator's command for the state of the cluster.
    pub fn status(&self) -> Value {
        let out = verbund()
            .args(["status", "--json", "--data"])
            .arg(&self.dir)
            .output()
            .expect("verbund status");
        assert!(
            out.status.success(),
            "status: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        serde_json::from_slice(&out.stdout).expect("status as JSON")
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.send(
            self.http
                .get(format!("{}{path}", self.base))
                .bearer_auth(&self.key),
        )
        .await
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.send(
            self.http
                .post(format!("{}{path}", self.base))
                .bearer_auth(&self.key)
                .json(&body),
        )
        .await
    }

    pub async fn delete(&self, path: &str) -> (u16, Value) {
        self.send(
            self.http
                .delete(format!("{}{path}", self.base))
                .bearer_auth(&self.key),
        )
        .await
    }

    /// Status and JSON body; status 0 with the reason where no answer came.
    pub async fn send(&self, request: reqwest::RequestBuilder) -> (u16, Value) {
        match request.send().await {
            Ok(reply) => {
                let status = reply.status().as_u16();
                let text = reply.text().await.unwrap_or_default();
                (
                    status,
                    serde_json::from_str(&text).unwrap_or(Value::String(text)),
                )
            }
            Err(e) => (0, Value::String(e.to_string())),
        }
    }

    pub async fn create_collection(&self, name: &str) -> String {
        let (code, body) = self.post("/api/collections", json!({ "name": name })).await;
        assert!(
            (200..300).contains(&code),
            "create collection: {code} {body}"
        );
        body["id"].as_str().expect("id").to_owned()
    }

    pub async fn upload(&self, collection: &str, filename: &str, bytes: Vec<u8>) -> (u16, Value) {
        let part = reqwest::multipart::Part::bytes(bytes).file_name(filename.to_owned());
        let form = reqwest::multipart::Form::new().part("file", part);
        let url = format!("{}/api/collections/{collection}/documents", self.base);
        self.send(self.http.post(url).bearer_auth(&self.key).multipart(form))
            .await
    }

    /// Waits until a document is ready or failed and returns it.
    pub async fn ingested(&self, id: &str) -> Value {
        let started = Instant::now();
        loop {
            let (code, doc) = self.get(&format!("/api/documents/{id}")).await;
            if code == 200 && matches!(doc["status"].as_str(), Some("ready" | "failed")) {
                return doc;
            }
            assert!(
                started.elapsed() < Duration::from_secs(120),
                "document {id} hangs: {code} {doc}"
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Uploads every example document into a new collection and waits until all are ready.
    pub async fn with_examples(&self) -> String {
        let collection = self.create_collection("Beispiele im Test").await;
        let mut ids = Vec::new();
        for path in example_documents() {
            let name = path
                .file_name()
                .and_then(|n| n.to_str())
                .expect("file name")
                .to_owned();
            let (code, doc) = self
                .upload(&collection, &name, std::fs::read(&path).expect("example"))
                .await;
            assert!((200..300).contains(&code), "upload {name}: {code} {doc}");
            ids.push((name, doc["id"].as_str().expect("id").to_owned()));
        }
        for (name, id) in ids {
            let doc = self.ingested(&id).await;
            assert_eq!(doc["status"], "ready", "{name}: {doc}");
        }
        collection
    }

    /// Stops the cluster as an operator would, and waits for its end.
    pub fn stop(&mut self) -> std::process::ExitStatus {
        signal(self.up.id() as i32, "TERM");
        let started = Instant::now();
        loop {
            if let Some(status) = self.up.try_wait().expect("state of verbund up") {
                return status;
            }
            assert!(
                started.elapsed() < Duration::from_secs(30),
                "verbund up does not stop"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.up.try_wait().ok().flatten().is_none() {
            signal(self.up.id() as i32, "TERM");
            for _ in 0..200 {
                if self.up.try_wait().ok().flatten().is_some() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            self.up.kill().ok();
            self.up.wait().ok();
        }
    }
}

/// Sends a signal to a process that this test started.
pub fn signal(pid: i32, name: &str) {
    Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status()
        .expect("kill");
}

pub fn example_documents() -> Vec<PathBuf> {
    const KINDS: [&str; 6] = ["pdf", "docx", "odt", "html", "md", "txt"];
    let mut paths: Vec<PathBuf> = std::fs::read_dir(examples())
        .expect("examples")
        .map(|entry| entry.expect("entry").path())
        .filter(|p| {
            p.extension()
                .and_then(|e| e.to_str())
                .is_some_and(|e| KINDS.contains(&e))
        })
        .collect();
    paths.sort();
    assert!(paths.len() >= 6, "only {} example documents", paths.len());
    paths
}

/// The example questions: question, document, passage.
pub fn example_questions() -> Vec<Value> {
    let text =
        std::fs::read_to_string(examples().join("questions.jsonl")).expect("questions.jsonl");
    text.lines()
        .filter(|l| !l.trim().is_empty())
        .map(|l| serde_json::from_str(l).expect("a question a line"))
        .collect()
}

/// Text with every run of white space as one blank, for comparing passages.
pub fn squeeze(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn read_demo(dir: &Path) -> Value {
    let text = std::fs::read(dir.join("demo.json")).expect("demo.json");
    serde_json::from_slice(&text).expect("demo.json")
}

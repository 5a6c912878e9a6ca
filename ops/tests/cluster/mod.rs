//! A whole cluster of processes on loopback for the tests: `verbund up` on a directory of its own, ended with the test.

#![allow(dead_code)] // each test binary uses its own part

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

/// Longest wait for a cluster to become ready; a bound against hanging, far above what it takes.
const READY_WITHIN: Duration = Duration::from_secs(90);
/// A gateway that takes a connection and never answers is asked again.
const READY_ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// One cluster at a time: two would share the cores, and each would be slower than what the tests wait for.
static ONE: Mutex<()> = Mutex::const_new(());

pub struct Cluster {
    // Fields end in this order: the processes, then their directory, then the turn.
    up: Up,
    dir: PathBuf,
    own_dir: Option<tempfile::TempDir>,
    turn: MutexGuard<'static, ()>,
    pub base: String,
    pub key: String,
    pub admin_key: String,
    pub http: reqwest::Client,
    /// From the start of `verbund up` until `GET /ready` answered 200.
    pub ready_after: Duration,
}

/// `verbund up`, ended with the test whatever happens to it.
struct Up(Child);

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
        Cluster::start_with(ranks, &[], &[]).await
    }

    /// The same with more arguments for `verbund up` and with variables in the environment of all its processes.
    pub async fn start_with(ranks: u32, more: &[&str], env: &[(&str, &str)]) -> Cluster {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().to_owned();
        Cluster::begin(ONE.lock().await, &path, Some(dir), ranks, more, env).await
    }

    /// Starts a cluster on a directory that outlives it.
    pub async fn start_in(dir: &Path, ranks: u32) -> Cluster {
        Cluster::begin(ONE.lock().await, dir, None, ranks, &[], &[]).await
    }

    /// Starts a cluster that was stopped again, on its directory.
    pub async fn start_again(self, ranks: u32, more: &[&str]) -> Cluster {
        let Cluster {
            up,
            dir,
            own_dir,
            turn,
            ..
        } = self;
        drop(up);
        Cluster::begin(turn, &dir, own_dir, ranks, more, &[]).await
    }

    async fn begin(
        turn: MutexGuard<'static, ()>,
        dir: &Path,
        own_dir: Option<tempfile::TempDir>,
        ranks: u32,
        more: &[&str],
        env: &[(&str, &str)],
    ) -> Cluster {
        let port = free_port();
        let log = std::fs::File::create(dir.join("up.out")).expect("log file");
        let started = Instant::now();
        let mut up = Up(verbund()
            .args(["up", "--data"])
            .arg(dir)
            .args(["--port", &port.to_string(), "--ranks", &ranks.to_string()])
            .args(more)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("log file"))
            .stderr(log)
            .spawn()
            .expect("verbund up"));
        let http = reqwest::Client::builder()
            .timeout(Duration::from_secs(120))
            .build()
            .expect("client");
        let ready = format!("http://127.0.0.1:{port}/ready");
        loop {
            let asked = http.get(&ready).timeout(READY_ANSWER_WITHIN).send().await;
            if asked.is_ok_and(|reply| reply.status() == 200) {
                break;
            }
            let ended = up.0.try_wait().expect("state of verbund up");
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
        let ready_after = started.elapsed();
        println!(
            "ready after {:.1} s with {ranks} ranks",
            ready_after.as_secs_f32()
        );
        let demo = read_demo(dir);
        let text = |k: &str| {
            demo[k]
                .as_str()
                .unwrap_or_else(|| panic!("demo.json lacks {k}"))
                .to_owned()
        };
        Cluster {
            up,
            dir: dir.to_owned(),
            own_dir,
            turn,
            base: text("base_url"),
            key: text("api_key"),
            admin_key: text("admin_api_key"),
            http,
            ready_after,
        }
    }

    /// Whether `verbund up` still runs.
    pub fn runs(&mut self) -> bool {
        self.up.0.try_wait().expect("state of verbund up").is_none()
    }

    /// What `verbund up` said so far.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.dir.join("up.out")).unwrap_or_default()
    }

    /// Waits until `verbund up` has said so.
    pub async fn has_said(&self, words: &str) {
        let started = Instant::now();
        while !self.said().contains(words) {
            assert!(
                started.elapsed() < READY_WITHIN,
                "verbund up has not said «{words}»:\n{}",
                self.said()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Resident memory of `verbund up` and all its processes; what they share counts once.
    pub fn resident_bytes(&self) -> u64 {
        let pids = self.processes().into_iter().map(|p| p.pid);
        let pss = |pid: i32| {
            let path = format!("/proc/{pid}/smaps_rollup");
            let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
            let line = text.lines().find_map(|l| l.strip_prefix("Pss:"));
            let kib = line.and_then(|l| l.split_whitespace().next());
            kib.and_then(|kib| kib.parse::<u64>().ok())
                .unwrap_or_else(|| panic!("{path} has no Pss"))
                * 1024
        };
        pids.chain([self.up.0.id() as i32]).map(pss).sum()
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
        self.try_status().unwrap_or_else(|why| panic!("{why}"))
    }

    /// The same where the cluster may be without a leader at the moment.
    pub fn try_status(&self) -> Result<Value, String> {
        let out = status_of(&self.dir).arg("--json").output();
        let out = out.expect("verbund status");
        if !out.status.success() {
            return Err(format!("status: {}", String::from_utf8_lossy(&out.stderr)));
        }
        serde_json::from_slice(&out.stdout).map_err(|e| format!("status as JSON: {e}"))
    }

    /// The state as people see it.
    pub fn status_text(&self) -> String {
        let out = status_of(&self.dir).output().expect("verbund status");
        assert!(
            out.status.success(),
            "status: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8(out.stdout).expect("text")
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

    /// Kills `verbund up` itself; its processes are asked to end by the kernel.
    pub fn kill(&mut self) {
        self.up.0.kill().expect("kill");
        self.up.0.wait().expect("the end of verbund up");
    }

    /// Stops the cluster as an operator would, and waits for its end.
    pub fn stop(&mut self) -> std::process::ExitStatus {
        signal(self.up.0.id() as i32, "TERM");
        let started = Instant::now();
        loop {
            if let Some(status) = self.up.0.try_wait().expect("state of verbund up") {
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

impl Drop for Up {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

/// Ends a process that this test started: asks it to, and kills it when it has not after 20 s: `up` gives its own children 10.
pub fn end(child: &mut Child) {
    if child.try_wait().ok().flatten().is_some() {
        return;
    }
    signal(child.id() as i32, "TERM");
    for _ in 0..400 {
        if child.try_wait().ok().flatten().is_some() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().ok();
    child.wait().ok();
}

/// `verbund status` for the cluster whose operator's identity is in `dir`; ends by itself.
pub fn status_of(dir: &Path) -> Command {
    let mut command = bounded(60);
    command
        .arg(verbund().get_program())
        .args(["status", "--data"])
        .arg(dir);
    command
}

/// The start of a command line that is ended after so many seconds, with status 124, or killed 30 s later.
pub fn bounded(seconds: u32) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=30", &seconds.to_string()]);
    command
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

//! Servers to load: a whole cluster of ours on this machine, and llama.cpp's own server. Each ends when it is dropped.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::load::{Endpoint, Target};

/// Longest wait for a server: an 8B model is read from disk and repacked first.
const READY_WITHIN: Duration = Duration::from_secs(300);
/// `verbund up` gives its own children ten seconds to end.
const END_WITHIN: Duration = Duration::from_secs(20);

/// Longest wait until a cluster's gateway knows what it changed itself.
const SOON: Duration = Duration::from_secs(10);

/// A running server.
pub struct Server {
    // Ends before its folder.
    process: Process,
    dir: TempDir,
    pub target: Target,
    /// Empty where none is needed.
    pub key: String,
    admin_key: String,
    pub http: reqwest::Client,
}

/// How to start a cluster.
#[derive(Debug, Clone, Default)]
pub struct Cluster<'a> {
    /// The `verbund` binary.
    pub binary: PathBuf,
    /// The small default model when absent.
    pub model: Option<&'a Path>,
    pub ranks: u32,
    /// Variables in the environment of all its processes.
    pub env: Vec<(String, String)>,
}

impl Server {
    /// `verbund up` on a new folder.
    pub async fn verbund(cluster: &Cluster<'_>) -> Result<Server> {
        let (dir, port) = (tempfile::tempdir()?, free_port()?);
        let mut command = Command::new(&cluster.binary);
        command
            .args(["up", "--data"])
            .arg(dir.path().join("cluster"))
            .args(["--port", &port.to_string()])
            .args(["--ranks", &cluster.ranks.max(1).to_string()])
            .envs(cluster.env.iter().map(|(k, v)| (k, v)));
        if let Some(model) = cluster.model {
            command.arg("--model").arg(model);
        }
        let mut server = Server::start(command, dir, port, "/ready").await?;
        let demo = server.dir.path().join("cluster/demo.json");
        let demo: Value = serde_json::from_slice(&std::fs::read(&demo)?)?;
        let text = |key: &str| demo[key].as_str().unwrap_or_default().to_owned();
        (server.key, server.admin_key) = (text("api_key"), text("admin_api_key"));
        let models = server.get("/v1/models", &server.key).await?;
        let model = models["data"]
            .as_array()
            .and_then(|all| all.iter().find(|m| m["kind"] == "generate"))
            .and_then(|m| m["id"].as_str());
        server.target.model = model.context("the cluster names no model")?.to_owned();
        Ok(server)
    }

    /// llama.cpp's own server on a model file, for so many sequences at once in `positions` positions altogether; where it was
    /// not compiled, the Python package's, which answers one request after the other.
    pub async fn llama_cpp(
        server: &Path,
        python: &Path,
        model: &Path,
        threads: usize,
        sequences: usize,
        positions: usize,
    ) -> Result<Server> {
        let (dir, port) = (tempfile::tempdir()?, free_port()?);
        let (threads, positions) = (threads.to_string(), positions.to_string());
        let own = server.is_file();
        let mut command = Command::new(if own { server } else { python });
        if !own {
            command.args(["-m", "llama_cpp.server"]);
        }
        let at = port.to_string();
        command
            .arg("--model")
            .arg(model)
            .args(["--host", "127.0.0.1", "--port", &at]);
        if own {
            command
                .args(["--threads", &threads, "--threads-batch", &threads])
                .args([
                    "--ctx-size",
                    &positions,
                    "--parallel",
                    &sequences.to_string(),
                ])
                // What it would do by itself, said because the figures depend on it.
                .args(["--cont-batching", "--alias", "peer"]);
        } else {
            command
                .args(["--n_threads", &threads, "--n_threads_batch", &threads])
                .args(["--n_ctx", &positions, "--model_alias", "peer"])
                // Or it would end one answer as soon as the next request comes.
                .args(["--interrupt_requests", "false"]);
        }
        let ready = if own { "/health" } else { "/v1/models" };
        let mut server = Server::start(command, dir, port, ready).await?;
        server.target.model = "peer".into();
        Ok(server)
    }

    async fn start(mut command: Command, dir: TempDir, port: u16, ready: &str) -> Result<Server> {
        let log = File::create(dir.path().join("log"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{:?} does not start", command.get_program()))?;
        let base_url = format!("http://127.0.0.1:{port}");
        let mut server = Server {
            process: Process(child),
            dir,
            target: Target::new(&base_url, "", Endpoint::Completions, false)?,
            key: String::new(),
            admin_key: String::new(),
            http: crate::load::client::http(Duration::from_secs(60))?,
        };
        let start = Instant::now();
        loop {
            let asked = server.http.get(format!("{base_url}{ready}"));
            let asked = asked.timeout(Duration::from_secs(5)).send().await;
            if asked.is_ok_and(|reply| reply.status().is_success()) {
                return Ok(server);
            }
            if let Some(status) = server.process.0.try_wait()? {
                bail!("the server ended with {status}: {}", server.said());
            }
            ensure!(
                start.elapsed() < READY_WITHIN,
                "the server is not ready after {READY_WITHIN:?}: {}",
                server.said()
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Whether it runs.
    pub fn runs(&mut self) -> bool {
        matches!(self.process.0.try_wait(), Ok(None))
    }

    /// The end of what it wrote.
    pub fn said(&self) -> String {
        let text = std::fs::read(self.dir.path().join("log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Makes a tenant of a cluster, and a key for it that the gateway knows.
    pub async fn tenant(&self, id: &str) -> Result<String> {
        let made = json!({ "id": id, "name": id });
        self.post("/api/tenants", &made).await?;
        let (path, key) = (
            format!("/api/tenants/{id}/keys"),
            json!({ "name": "benches" }),
        );
        // The gateway hears of what it changed a moment later.
        let key = soon(async || self.post(&path, &key).await).await?;
        let secret = key["secret"]
            .as_str()
            .context("a key without a secret")?
            .to_owned();
        soon(async || self.get("/v1/models", &secret).await).await?;
        Ok(secret)
    }

    async fn get(&self, path: &str, key: &str) -> Result<Value> {
        let url = format!("{}{path}", self.target.base_url);
        let reply = self.http.get(url).bearer_auth(key).send().await?;
        Ok(reply.error_for_status()?.json().await?)
    }

    async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let url = format!("{}{path}", self.target.base_url);
        let request = self.http.post(url).bearer_auth(&self.admin_key).json(body);
        let reply = request.send().await?;
        let status = reply.status();
        let text = reply.text().await?;
        ensure!(status.is_success(), "{path} answers {status}: {text}");
        Ok(serde_json::from_str(&text)?)
    }

    /// What the engine of a cluster's first worker tells Prometheus, by metric with its labels.
    pub async fn engine_metrics(&self) -> Result<Metrics> {
        let path = self.dir.path().join("cluster/worker1/node.toml");
        let config = std::fs::read_to_string(&path)?;
        let address = config
            .lines()
            .find_map(|l| l.strip_prefix("admin_listen = "))
            .with_context(|| format!("{}: no admin_listen", path.display()))?;
        let url = format!("http://{}/metrics", address.trim_matches('"'));
        let text = self.http.get(url).send().await?.text().await?;
        Ok(Metrics::parse(&text))
    }

    /// A cluster's processes by name, as they are now.
    pub fn processes(&self) -> BTreeMap<String, u32> {
        let read = || -> Option<BTreeMap<String, u32>> {
            let text = std::fs::read(self.dir.path().join("cluster/demo.json")).ok()?;
            let demo: Value = serde_json::from_slice(&text).ok()?;
            let processes = demo["processes"].as_array()?.iter();
            let named = processes.filter_map(|p| {
                let pid = u32::try_from(p["pid"].as_u64()?).ok()?;
                Some((p["name"].as_str()?.to_owned(), pid))
            });
            let up = ("up".to_owned(), self.process.0.id());
            Some(named.chain([up]).collect())
        };
        read().unwrap_or_default()
    }

    /// Open file descriptors of all its processes.
    pub fn open_files(&self) -> usize {
        let count = |pid| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        descendants(self.process.0.id())
            .into_iter()
            .map(count)
            .sum()
    }
}

/// Resident bytes of a process; a page that several share counts for each in part. `None` if it has ended.
pub fn resident_bytes(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("Pss:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Seconds that a process computed so far, all threads together; 0 if it has ended.
pub fn cpu_seconds(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything; user and system time are the 12th and 13th field behind it.
    let (_, rest) = text.rsplit_once(')').unwrap_or_default();
    let ticks = rest.split_whitespace().skip(11).take(2);
    let ticks: u64 = ticks.filter_map(|t| t.parse::<u64>().ok()).sum();
    // Linux tells programs hundredths of a second, whatever it counts by itself.
    ticks as f64 / 100.0
}

/// Asks again for some seconds until it works.
async fn soon<T>(ask: impl AsyncFn() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match ask().await {
            Err(_) if start.elapsed() < SOON => tokio::time::sleep(Duration::from_millis(50)).await,
            last => return last,
        }
    }
}

/// A process and all that it started.
fn descendants(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut next = 0;
    while next < all.len() {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", all[next]));
        for task in tasks.into_iter().flatten().flatten() {
            let children = std::fs::read_to_string(task.path().join("children"));
            let children = children.unwrap_or_default();
            all.extend(
                children
                    .split_whitespace()
                    .filter_map(|p| p.parse::<u32>().ok()),
            );
        }
        next += 1;
    }
    all
}

/// Samples of a page in Prometheus' text format.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Vec<(String, f64)>);

impl Metrics {
    fn parse(text: &str) -> Self {
        let sample = |line: &str| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        let lines = text.lines().filter(|l| !l.starts_with('#'));
        Metrics(lines.filter_map(sample).collect())
    }

    /// The sum of the samples of a metric that carry all these labels, as in `state="used"`.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let wanted = |sample: &str| {
            let (metric, rest) = sample.split_once('{').unwrap_or((sample, ""));
            metric == name && labels.iter().all(|label| rest.contains(label))
        };
        let samples = self.0.iter().filter(|(sample, _)| wanted(sample));
        samples.map(|(_, value)| value).sum()
    }
}

/// Asked to end when dropped, and made to when it does not.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let pid = self.0.id().to_string();
        let asked = Command::new("kill").args(["-TERM", &pid]).status();
        let start = Instant::now();
        while asked.is_ok() && start.elapsed() < END_WITHIN {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?
        .local_addr()?
        .port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_summed_by_their_labels() {
        let metrics = Metrics::parse(
            "# HELP a x\na{model=\"m\",state=\"used\"} 3\na{model=\"n\",state=\"used\"} 4\na{model=\"m\",state=\"total\"} 9\nab 5\n",
        );
        assert_eq!(metrics.sum("a", &["state=\"used\""]), 7.0);
        assert_eq!(metrics.sum("a", &["state=\"used\"", "model=\"m\""]), 3.0);
        assert_eq!(metrics.sum("ab", &[]), 5.0);
        assert_eq!(metrics.sum("b", &[]), 0.0);
    }

    #[test]
    fn a_process_tells_what_it_used() {
        let me = std::process::id();
        assert!(resident_bytes(me).unwrap() > 100_000);
        let before = cpu_seconds(me);
        while cpu_seconds(me) < before + 0.05 {}
        assert_eq!(
            (resident_bytes(u32::MAX), cpu_seconds(u32::MAX)),
            (None, 0.0)
        );
    }

    #[test]
    fn a_process_has_itself_and_its_children() {
        let mut child = Command::new("sleep").arg("30").spawn().unwrap();
        let all = descendants(std::process::id());
        assert!(all.contains(&child.id()) && all[0] == std::process::id());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

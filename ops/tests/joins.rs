//! A cluster made by hand, as on several servers: `init`, `token`, `join`, `node`, and what the operator then sees.

mod cluster;

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use cluster::{bounded, end, free_port, status_of, verbund};
use serde_json::Value;

/// A bound against hanging; an election takes a second or two.
const GIVE_UP: Duration = Duration::from_secs(60);

/// A running node, ended with the test.
struct Node {
    child: Child,
    log: PathBuf,
}

impl Node {
    fn start(config: &str, env: &[(&str, &str)]) -> Node {
        let log = Path::new(config).with_file_name("stderr");
        let child = verbund()
            .args(["node", "--config", config])
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).expect("log"))
            .spawn()
            .expect("verbund node");
        Node { child, log }
    }

    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

#[test]
fn three_processes_join_by_token_elect_a_leader_and_are_shown() {
    let root = tempfile::tempdir().expect("directory");
    let dir = |name: &str| root.path().join(name).display().to_string();
    let (first, second, third) = (dir("eins"), dir("zwei"), dir("drei"));
    let roles = "coordinator,store";

    let made = init(&first, &free_udp());
    let config = json_of(&made)["config"]
        .as_str()
        .expect("config")
        .to_owned();
    assert_eq!(json_of(&made)["node"], 1, "{made:?}");
    let again = init(&first, &free_udp());
    assert!(
        !again.status.success() && stderr(&again).contains("holds a node already"),
        "a second init on the same directory: {again:?}"
    );

    let admin = format!("127.0.0.1:{}", free_port());
    let one = Node::start(&config, &[("VERBUND_NODE_ADMIN_LISTEN", &admin)]);
    until(&first, &one, |status| status["leader"] == 1);

    let (token, spare) = (new_token(&first, roles), new_token(&first, roles));
    let joined = join(&second, &token, roles);
    let two = Node::start(json_of(&joined)["config"].as_str().expect("config"), &[]);
    let used = join(&third, &token, roles);
    assert!(
        !used.status.success() && stderr(&used).contains("unknown or was used"),
        "a token that was used: {used:?}"
    );
    let greedy = join(&third, &spare, "coordinator,store,worker");
    assert!(
        !greedy.status.success() && stderr(&greedy).contains("does not allow the role worker"),
        "a role that the token does not give: {greedy:?}"
    );
    let joined = join(&third, &new_token(&first, roles), roles);
    let three = Node::start(json_of(&joined)["config"].as_str().expect("config"), &[]);

    let status = until(&first, &one, |status| {
        let nodes = status["nodes"].as_array();
        nodes.is_some_and(|n| n.len() == 3 && n.iter().all(|n| n["up"] == true))
            && status["voters"].as_array().is_some_and(|v| v.len() == 3)
            && status["leader"].is_u64()
    });
    let nodes = status["nodes"].as_array().expect("nodes");
    let mut names: Vec<_> = nodes
        .iter()
        .map(|n| n["name"].as_str().expect("name"))
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["drei", "eins", "zwei"], "{status}");
    let shown = status_of(Path::new(&first)).output().expect("status");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    for part in [
        "Cluster kreis",
        "leader",
        "eins",
        "zwei",
        "drei",
        "coordinator,store",
    ] {
        assert!(shown.contains(part), "{part} is not in\n{shown}");
    }

    let health = http_get(&admin, "/health");
    assert!(
        health.starts_with("HTTP/1.1 200") && health.contains("\"eins\""),
        "{health}"
    );
    let metrics = http_get(&admin, "/metrics");
    assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
    assert!(http_get(&admin, "/").starts_with("HTTP/1.1 404"));

    // Two of three are a majority: the cluster goes on without the third.
    drop(three);
    let status = until(&first, &one, |status| {
        let nodes = status["nodes"].as_array();
        nodes.is_some_and(|n| n.iter().any(|n| n["name"] == "drei" && n["up"] == false))
    });
    assert!(status["leader"].is_u64(), "{status}");
    drop(two);
}

fn init(data: &str, listen: &str) -> Output {
    bounded(60)
        .arg(verbund().get_program())
        .args(["init", "--name", "kreis", "--node-name", "eins", "--json"])
        .args(["--data", data, "--listen", listen])
        .output()
        .expect("verbund init")
}

fn new_token(data: &str, roles: &str) -> String {
    let out = bounded(60)
        .arg(verbund().get_program())
        .args(["token", "--json", "--data", data, "--roles", roles])
        .output()
        .expect("verbund token");
    json_of(&out)["token"].as_str().expect("token").to_owned()
}

/// Joins under the name of the directory.
fn join(data: &str, token: &str, roles: &str) -> Output {
    let name = Path::new(data).file_name().expect("name");
    bounded(60)
        .arg(verbund().get_program())
        .args(["join", "--json", "--token", token, "--roles", roles])
        .args(["--data", data, "--listen", &free_udp(), "--node-name"])
        .arg(name)
        .output()
        .expect("verbund join")
}

/// The status when it is as wanted, asked again until then.
fn until(data: &str, node: &Node, wanted: impl Fn(&Value) -> bool) -> Value {
    let started = Instant::now();
    loop {
        let out = status_of(Path::new(data)).arg("--json").output();
        let out = out.expect("verbund status");
        if let Ok(status) = serde_json::from_slice(&out.stdout)
            && wanted(&status)
        {
            return status;
        }
        assert!(
            started.elapsed() < GIVE_UP,
            "not so after {GIVE_UP:?}: {}{}\n{}",
            String::from_utf8_lossy(&out.stdout),
            stderr(&out),
            node.said()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn http_get(addr: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(addr).expect("admin_listen");
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .expect("timeout");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {addr}\r\n\r\n").expect("request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answer");
    answer
}

fn free_udp() -> String {
    UdpSocket::bind("127.0.0.1:0")
        .and_then(|s| s.local_addr())
        .expect("a free port")
        .to_string()
}

fn json_of(out: &Output) -> Value {
    assert!(out.status.success(), "{}", stderr(out));
    serde_json::from_slice(&out.stdout).expect("JSON")
}

fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

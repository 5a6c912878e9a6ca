//! Any one process may be killed with `kill -9`: what was acknowledged stays, and the cluster answers again by itself.

mod cluster;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cluster::{Cluster, Process, signal};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// A bound against hanging.
const GIVE_UP: Duration = Duration::from_secs(60);
/// A client that gets no answer asks again after this.
const CLIENT_PATIENCE: Duration = Duration::from_secs(3);
/// Longest time without an answer while a process dies. On a quiet machine it is under 5 s (printed); tests share theirs.
const ANSWERS_WITHIN: Duration = Duration::from_secs(15);

/// Twice as long as a node may be silent before it is looked for whether it has ended.
const STANDS_STILL: Duration = Duration::from_secs(3);

/// All three control nodes die in turn, so the leader of the store's Raft group is among them, and with the second and third
/// death the majority needs what the one before has caught up on.
#[tokio::test(flavor = "multi_thread")]
async fn every_process_may_die_while_a_client_asks_and_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::start(2).await;
    let collection = cluster.create_collection("Dauerfeuer").await;
    let mut kept = Vec::new();
    keep_document(&cluster, &collection, &mut kept).await;

    let leader = leader_of(&cluster).name;
    let others = cluster.processes().into_iter().map(|p| p.name);
    let others: Vec<_> = others
        .filter(|name| name.starts_with("node") && *name != leader)
        .collect();
    let victims = [
        ("coordinator leader", &*leader),
        ("store node", &*others[0]),
        ("store node", &*others[1]),
        ("rank 1", "worker2"),
        ("rank 0", "worker1"),
        ("gateway", "gateway"),
    ];
    let client = Client::start(&cluster, &collection);
    for (what, name) in victims {
        keep_document(&cluster, &collection, &mut kept).await;
        let before = cluster.process(name);
        let epoch = epoch_of(&cluster.status());
        signal(before.pid, "KILL");
        let killed = Instant::now();
        let answered = client.first_answer_to_a_question_after(killed, what).await;
        let restarted = restarted(&cluster, &before, killed).await;
        keep_document(&cluster, &collection, &mut kept).await;
        all_there(&cluster, &kept).await;
        // A group that lost a rank is whole again only in a new epoch; the old one still shows until the death is noticed.
        let newer = u64::from(name.starts_with("worker"));
        whole_again(&cluster, epoch + newer).await;
        let silence = client.longest_silence_since(killed);
        println!(
            "{what} ({name}) killed: answered after {:.1} s, longest silence {:.1} s, restarted after {:.1} s, whole after {:.1} s",
            answered.as_secs_f32(),
            silence.as_secs_f32(),
            restarted.as_secs_f32(),
            killed.elapsed().as_secs_f32()
        );
        assert!(
            silence < ANSWERS_WITHIN,
            "{what} ({name}) killed: no answer for {silence:?}"
        );
    }
    client.stop().await;

    assert!(cluster.stop().success(), "verbund up ends cleanly");
    let again = cluster.start_again(2, &[]).await;
    all_there(&again, &kept).await;
    // The indexes are built anew first: until then a question is put off, and never answered without sources.
    let started = Instant::now();
    while !ask(&again.http, &again.base, &again.key, &collection)
        .await
        .expect("nothing but an answer or a delay")
        .is_answer
    {
        assert!(started.elapsed() < GIVE_UP, "no answer after the new start");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A rank that gets no processor for longer than a heartbeat lives, as on an overloaded machine, is not taken for dead.
#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_stands_still_for_a_while_keeps_its_group() {
    let cluster = Cluster::start(2).await;
    let epoch = epoch_of(&cluster.status());
    for name in ["worker1", "worker2"] {
        let rank = cluster.process(name);
        signal(rank.pid, "STOP");
        tokio::time::sleep(STANDS_STILL).await;
        signal(rank.pid, "CONT");
        let question = json!({
            "model": "SmolLM2-135M-Instruct", "max_tokens": 4,
            "messages": [{ "role": "user", "content": "Was ist eine Satzung?" }],
        });
        let (code, answer) = cluster.post("/v1/chat/completions", question).await;
        assert_eq!(code, 200, "{name}: {answer}");
    }
    assert_eq!(
        epoch_of(&cluster.status()),
        epoch,
        "no group was formed anew"
    );
}

/// `kill -9` of the supervisor itself: its processes end, and the next start on the same directory needs no help.
#[tokio::test(flavor = "multi_thread")]
async fn the_supervisor_may_die_and_the_next_start_waits_for_what_it_left() {
    let mut cluster = Cluster::start(1).await;
    let collection = cluster.create_collection("Bestand").await;
    let mut kept = Vec::new();
    keep_document(&cluster, &collection, &mut kept).await;
    let left = cluster.processes();
    cluster.kill();
    let again = cluster.start_again(1, &[]).await;
    for process in left {
        let line = std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        assert!(
            !String::from_utf8_lossy(&line).contains("node.toml"),
            "{} of the earlier start still runs",
            process.name
        );
    }
    all_there(&again, &kept).await;
}

/// Asks one question after the other until it is stopped, and notes when an answer came.
struct Client {
    seen: Arc<Mutex<Seen>>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Seen {
    /// When the question was asked, and when its answer had come.
    answers: Vec<(Instant, Instant)>,
    /// Replies that tell a client not to ask again.
    refusals: Vec<String>,
}

impl Client {
    fn start(cluster: &Cluster, collection: &str) -> Client {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (noted, http) = (seen.clone(), cluster.http.clone());
        let (base, key) = (cluster.base.clone(), cluster.key.clone());
        let collection = collection.to_owned();
        let task = tokio::spawn(async move {
            loop {
                let asked = Instant::now();
                let reply = ask(&http, &base, &key, &collection).await;
                note(&noted, asked, reply);
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        Client { seen, task }
    }

    /// How long after `killed` the first answer came to a question that was asked later than that.
    async fn first_answer_to_a_question_after(&self, killed: Instant, what: &str) -> Duration {
        loop {
            let answers = self.seen.lock().expect("not poisoned").answers.clone();
            let first = answers.iter().find(|(asked, _)| *asked > killed);
            if let Some((_, answered)) = first {
                return answered.duration_since(killed);
            }
            assert!(
                killed.elapsed() < GIVE_UP,
                "no answer since {what} was killed"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The longest time between two answers from `start` until now.
    fn longest_silence_since(&self, start: Instant) -> Duration {
        let seen = self.seen.lock().expect("not poisoned");
        let answers = seen.answers.iter().map(|(_, answered)| *answered);
        let times: Vec<_> = [start]
            .into_iter()
            .chain(answers.filter(|at| *at > start))
            .chain([Instant::now()])
            .collect();
        let gaps = times.windows(2).map(|pair| pair[1].duration_since(pair[0]));
        gaps.max().unwrap_or_default()
    }

    /// Ends the asking; no reply may have been one that a client would not ask again after.
    async fn stop(self) {
        self.task.abort();
        let _ = self.task.await;
        let seen = self.seen.lock().expect("not poisoned");
        assert!(seen.refusals.is_empty(), "{:?}", seen.refusals);
        println!("{} questions answered", seen.answers.len());
    }
}

fn note(seen: &Mutex<Seen>, asked: Instant, reply: Result<Reply, String>) {
    let mut seen = seen.lock().expect("not poisoned");
    match reply {
        Ok(reply) if reply.is_answer => seen.answers.push((asked, Instant::now())),
        Ok(_) => {}
        Err(refusal) => seen.refusals.push(refusal),
    }
}

struct Reply {
    /// Not an error that a client asks again after, nor an answer without sources.
    is_answer: bool,
}

/// One question that needs every part: the gateway, retrieval, embedding, generation.
///
/// # Errors
/// A reply after which a client would not ask again.
async fn ask(
    http: &reqwest::Client,
    base: &str,
    key: &str,
    collection: &str,
) -> Result<Reply, String> {
    let request = json!({
        "model": "SmolLM2-135M-Instruct", "max_tokens": 2, "temperature": 0,
        "messages": [{"role": "user", "content": "Wie lautet das Kennwort der Akte 0?"}], "collections": [collection],
    });
    let sent = http
        .post(format!("{base}/v1/chat/completions"))
        .bearer_auth(key)
        .timeout(CLIENT_PATIENCE)
        .json(&request)
        .send()
        .await;
    let Ok(reply) = sent else {
        return Ok(Reply { is_answer: false });
    };
    let code = reply.status().as_u16();
    let Ok(body) = reply.json::<Value>().await else {
        return Ok(Reply { is_answer: false });
    };
    match code {
        200 => Ok(Reply {
            is_answer: body["citations"].as_array().is_some_and(|c| !c.is_empty()),
        }),
        429 | 500..=599 => Ok(Reply { is_answer: false }),
        _ => Err(format!("{code} {body}")),
    }
}

/// Uploads a document with a word of its own, again until it is acknowledged, and remembers what must be found from now on.
async fn keep_document(cluster: &Cluster, collection: &str, kept: &mut Vec<(String, Vec<u8>)>) {
    let bytes = format!(
        "Merkblatt {0}\n\nDas Kennwort der Akte {0} lautet Zaunkönig{0}.",
        kept.len()
    )
    .into_bytes();
    let name = format!("akte-{}.txt", kept.len());
    let started = Instant::now();
    loop {
        let (code, doc) = cluster.upload(collection, &name, bytes.clone()).await;
        if (200..300).contains(&code) {
            kept.push((doc["id"].as_str().expect("id").to_owned(), bytes));
            return;
        }
        assert!(
            matches!(code, 0 | 429 | 500..=599) && started.elapsed() < GIVE_UP,
            "upload: {code} {doc}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Every document is ready and its original is what was uploaded.
async fn all_there(cluster: &Cluster, kept: &[(String, Vec<u8>)]) {
    for (id, bytes) in kept {
        assert_eq!(cluster.ingested(id).await["status"], "ready");
        let started = Instant::now();
        let got = loop {
            let url = format!("{}/api/documents/{id}/original", cluster.base);
            let sent = cluster.http.get(url).bearer_auth(&cluster.key).send().await;
            if let Ok(reply) = sent.and_then(reqwest::Response::error_for_status)
                && let Ok(got) = reply.bytes().await
            {
                break got;
            }
            assert!(started.elapsed() < GIVE_UP, "{id} cannot be read");
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        assert_eq!(got.as_ref(), bytes.as_slice(), "{id}");
    }
}

/// Waits until another process stands in the place of the killed one.
async fn restarted(cluster: &Cluster, before: &Process, killed: Instant) -> Duration {
    while cluster.process(&before.name).pid == before.pid {
        assert!(
            killed.elapsed() < GIVE_UP,
            "{} is not started again",
            before.name
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    killed.elapsed()
}

/// Waits until every member is up and the group has both ranks again, in this epoch or a later one.
async fn whole_again(cluster: &Cluster, epoch: u64) {
    let started = Instant::now();
    loop {
        let status = cluster.try_status();
        if status
            .as_ref()
            .is_ok_and(|s| is_whole(s) && epoch_of(s) >= epoch)
        {
            return;
        }
        assert!(
            started.elapsed() < GIVE_UP,
            "the cluster is not whole again: {status:?}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn is_whole(status: &Value) -> bool {
    let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
    let groups = status["groups"].as_array().cloned().unwrap_or_default();
    let full = |g: &Value| {
        g["kind"] == "generate"
            && g["state"] == "ready"
            && g["ranks"].as_array().is_some_and(|r| r.len() == 2)
    };
    !nodes.is_empty() && nodes.iter().all(|n| n["up"] == true) && groups.iter().any(full)
}

/// The epoch of the group that generates, 0 while there is none.
fn epoch_of(status: &Value) -> u64 {
    let groups = status["groups"].as_array();
    let group = groups.and_then(|all| all.iter().find(|g| g["kind"] == "generate"));
    group.and_then(|g| g["epoch"].as_u64()).unwrap_or(0)
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

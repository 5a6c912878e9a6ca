//! A worker node's handlers and ranks, without a coordinator.

use std::sync::mpsc;

use coordinator::Redacted;
use coordinator::control::{DeviceKind, GroupState, ModelKind};
use coordinator::identity::Ca;
use coordinator::ids::{Device, Rank, TenantId};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::*;
use crate::client::{
    Call, EmbedKind, EmbedRequest, Embeddings, Event, Frame, GenerateRequest, InferError, Prompt,
    SERVICE_EMBED, SERVICE_FORGET, SERVICE_GENERATE, SERVICE_TOKENIZE, Sampling,
};
use crate::engine::{Engine, EngineConfig, Stepper};
use crate::model::{self, Candidates, StepBatch};
use crate::scheduler::Limits;
use crate::text::{Tokenizer, Vocabulary};

const PATIENCE: Duration = Duration::from_secs(60);
const GROUP: GroupId = GroupId(1);

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// What a node shares, on a transport of its own and without any coordinator.
fn node() -> (Arc<Shared>, Transport) {
    let identity = Ca::create("test").unwrap().issue(NodeId(1), "one").unwrap();
    let transport = Transport::bind(&identity, loopback()).unwrap();
    let shared = Arc::new(Shared {
        node: NodeId(1),
        config: WorkerConfig::new(1, loopback()),
        control: ControlHandle::connect(transport.clone(), Vec::new()),
        hub: Hub::bind(loopback()).unwrap(),
        hosted: Mutex::default(),
    });
    handlers::register(&transport, &shared);
    (shared, transport)
}

/// Ranks that end every answer at once.
struct Silent;

impl Stepper for Silent {
    fn step(&mut self, batch: &StepBatch) -> Result<Vec<Candidates>, model::Error> {
        let end = Candidates {
            top: vec![(1, 1.0)],
            log_sum_exp: 1.0,
            full: None,
        };
        Ok(vec![end; batch.logits_rows.len()])
    }

    fn idle(&mut self) -> Result<(), model::Error> {
        Ok(())
    }

    fn stop(&mut self) {}
}

fn engine() -> Engine {
    let vocabulary = Vocabulary {
        model: "llama".into(),
        tokens: ["<unk>", "</s>", "a"].map(str::to_owned).into(),
        scores: vec![0.0; 3],
        eos: Some(1),
        add_space_prefix: Some(false),
        ..Vocabulary::default()
    };
    let config = EngineConfig {
        model: "silent".into(),
        limits: Limits {
            max_sequences: 1,
            max_waiting: 1,
            step_rows: 8,
            context_tokens: 32,
            blocks: 2,
            ..Limits::default()
        },
    };
    let tokenizer = Arc::new(Tokenizer::from_vocabulary(&vocabulary).unwrap());
    Engine::start(Silent, tokenizer, None, config).unwrap()
}

async fn ask<A: DeserializeOwned>(
    transport: &Transport,
    service: &str,
    epoch: Epoch,
    request: impl Serialize,
) -> A {
    let call = Call {
        group: GROUP,
        epoch,
        request,
    };
    let bytes = postcard::to_stdvec(&call).unwrap();
    let to = transport.local_addr();
    let answer = transport.call(to, service, bytes.into(), PATIENCE).await;
    postcard::from_bytes(&answer.unwrap()).unwrap()
}

fn tenant() -> TenantId {
    TenantId::new("t1").unwrap()
}

fn generate(text: &str) -> GenerateRequest {
    GenerateRequest {
        tenant: tenant(),
        model: "silent".into(),
        prompt: Prompt::Text(Redacted::new(text.to_owned())),
        max_tokens: None,
        sampling: Sampling::greedy(),
        stop: Vec::new(),
        echo: false,
        constraint: None,
        logprobs: None,
        priority: Default::default(),
        timeout_ms: None,
    }
}

/// Prompt tokens that were found computed.
async fn cached(transport: &Transport, text: &str) -> u32 {
    let call = Call {
        group: GROUP,
        epoch: Epoch(5),
        request: generate(text),
    };
    let bytes = postcard::to_stdvec(&call).unwrap();
    let to = transport.local_addr();
    let mut frames = transport
        .open(to, SERVICE_GENERATE, bytes.into())
        .await
        .unwrap();
    while let Some(frame) = frames.next().await {
        if let Frame::Event(Event::Finished { cached_tokens, .. }) =
            postcard::from_bytes(&frame.unwrap()).unwrap()
        {
            return cached_tokens;
        }
    }
    panic!("no end came");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_asked_to_forget_a_tenants_prompts_finds_none_of_them() {
    let (shared, transport) = node();
    let hosted = Hosted::serving_engine(GROUP, Epoch(5), engine());
    shared.hosted().insert(GROUP, hosted);
    let text = "a".repeat(20);
    assert_eq!(cached(&transport, &text).await, 0);
    assert_eq!(cached(&transport, &text).await, 16);
    for (of, found) in [("t2", 16), ("t1", 0)] {
        let request = postcard::to_stdvec(&TenantId::new(of).unwrap()).unwrap();
        let to = transport.local_addr();
        let answer = transport.call(to, SERVICE_FORGET, request.into(), PATIENCE);
        answer.await.unwrap();
        assert_eq!(cached(&transport, &text).await, found, "after {of}");
    }
    let to = transport.local_addr();
    let answer = transport.call(to, SERVICE_FORGET, vec![9].into(), PATIENCE);
    assert!(answer.await.is_err(), "no tenant");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_epoch_that_is_hosted_is_served() {
    let (shared, transport) = node();
    let hosted = Hosted::serving_engine(GROUP, Epoch(5), engine());
    shared.hosted().insert(GROUP, hosted);
    let text = || Redacted::new("aa".to_owned());
    let tokens =
        |epoch| ask::<Result<Vec<u32>, InferError>>(&transport, SERVICE_TOKENIZE, epoch, text());
    let generated = |epoch| ask::<Frame>(&transport, SERVICE_GENERATE, epoch, generate("aa"));
    let embedded = |epoch| {
        let request = EmbedRequest {
            tenant: tenant(),
            model: None,
            input: vec![text()],
            kind: EmbedKind::Query,
        };
        ask::<Result<Embeddings, InferError>>(&transport, SERVICE_EMBED, epoch, request)
    };

    assert_eq!(tokens(Epoch(5)).await, Ok(vec![2, 2]));
    assert!(matches!(generated(Epoch(5)).await, Frame::Event(_)));
    for stale in [Epoch(0), Epoch(4), Epoch(6), Epoch(u64::MAX)] {
        let Frame::Error(generated) = generated(stale).await else {
            panic!("epoch {stale} was served");
        };
        for error in [
            generated,
            tokens(stale).await.unwrap_err(),
            embedded(stale).await.unwrap_err(),
        ] {
            let InferError::NotReady { why } = &error else {
                panic!("epoch {stale} gave {error}");
            };
            assert!(why.contains(&format!("epoch {stale}")), "{why}");
            assert!(error.retryable());
        }
    }
    // The right epoch of another group is no better.
    shared.hosted().clear();
    assert!(tokens(Epoch(5)).await.is_err());
}

/// A group whose model does not exist, with this node as its only rank.
fn broken_group() -> Group {
    let rank = RankAssignment {
        rank: Rank(0),
        node: NodeId(1),
        incarnation: 1,
        data_addr: loopback(),
        device: Device {
            kind: DeviceKind::Cpu,
            name: "cpu".into(),
            memory_bytes: 1 << 30,
            read_bytes_per_s: 1,
            threads: 1,
        },
        report: None,
    };
    Group {
        id: GROUP,
        model: "none".into(),
        kind: ModelKind::Generate,
        path: "/nonexistent/model.gguf".into(),
        context_tokens: 0,
        epoch: Epoch(3),
        ranks: vec![rank],
        state: GroupState::Forming,
        key: [0; 32],
        last_failure: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_cannot_be_loaded_shows_in_the_heartbeats_when_control_cannot_be_told() {
    let (shared, _transport) = node();
    let group = broken_group();
    let host = Hosted::start(shared, group.clone(), group.ranks[0].clone(), None);
    let health = tokio::time::timeout(PATIENCE, async {
        loop {
            let health = host.health();
            if health.broken.is_some() {
                return health;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let health = health.await.unwrap();
    assert_eq!((health.group, health.epoch), (GROUP, Epoch(3)));
    let why = health.broken.unwrap();
    assert!(why.contains("/nonexistent/model.gguf"), "{why}");
    assert!(host.serving().is_err_and(|e| e == why));
    // It still tries to tell control; leaving ends that.
    let (ended, end) = mpsc::channel();
    host.leave();
    std::thread::spawn(move || {
        host.join();
        ended.send(())
    });
    end.recv_timeout(PATIENCE).unwrap();
}

#[test]
fn the_leaders_kv_format_holds_for_all_ranks() {
    let hubs: Vec<Hub> = (0..3).map(|_| Hub::bind(loopback()).unwrap()).collect();
    let group = |rank| collective::GroupConfig {
        group: 1,
        epoch: 1,
        rank,
        peers: hubs.iter().map(Hub::local_addr).collect(),
        key: [7; 32],
        wire: Wire::Exact,
        sealing: collective::Sealing::Encrypted,
        overlap: true,
    };
    let own = [KvFormat::Int8, KvFormat::F16, KvFormat::Int8];
    let agreed: Vec<KvFormat> = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..3)
            .map(|rank| {
                let (hub, group) = (&hubs[rank], group(rank));
                scope.spawn(move || {
                    let mut tcp = collective::Tcp::join(hub, group, PATIENCE).unwrap();
                    host::agree(&mut tcp, own[rank]).ok()
                })
            })
            .collect();
        let agreed = ranks.into_iter().map(|rank| rank.join().unwrap());
        agreed.map(|format| format.expect("a format")).collect()
    });
    assert_eq!(agreed, [KvFormat::Int8; 3]);
}

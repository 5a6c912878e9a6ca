//! A gateway over HTTP with a real coordinator behind it, and where a test wants one a real store of a single node.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use coordinator::Redacted;
use coordinator::clock;
use coordinator::control::{
    Command, ControlHandle, Coordinator, CoordinatorConfig, NewApiKey, Node, StoreGroup, api_key,
};
use coordinator::identity::Ca;
use coordinator::ids::{NodeId, RaftGroupId, Role, TenantId};
use coordinator::transport::Transport;
use futures::future::BoxFuture;
use gateway::{Gateway, GatewayConfig};
use rag_store::{EmbedKind, Embedder, StoreClient, StoreConfig, StoreNode};
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use worker::client::InferenceClient;

pub const PATIENCE: Duration = Duration::from_secs(20);

/// A running gateway, its coordinator, and the keys of two tenants.
pub struct Site {
    pub base: String,
    pub http: reqwest::Client,
    /// Admin of the operator's tenant.
    pub operator: String,
    /// Ordinary key of the operator's tenant.
    pub clerk: String,
    /// Admin of another tenant.
    pub neighbour: String,
    stop: CancellationToken,
    served: tokio::task::JoinHandle<()>,
    store: Option<StoreNode>,
    _coordinator: Coordinator,
    _dir: tempfile::TempDir,
}

fn tenant(id: &str) -> TenantId {
    TenantId::new(id).expect("a tenant id")
}

async fn propose(control: &ControlHandle, command: Command) {
    control.propose(command).await.expect("control accepts");
}

async fn key(control: &ControlHandle, of: &str, name: &str, admin: bool) -> String {
    let NewApiKey {
        secret,
        sha256,
        key,
    } = api_key(tenant(of), name, admin, clock::now_ms());
    propose(control, Command::CreateApiKey { sha256, key }).await;
    secret
}

/// No text gets a vector.
struct NoModel;

impl Embedder for NoModel {
    fn embed(
        &self,
        _: &TenantId,
        _: EmbedKind,
        _: Vec<Redacted<String>>,
    ) -> BoxFuture<'static, Result<Vec<Vec<f32>>, String>> {
        Box::pin(async { Err("no model".to_owned()) })
    }
}

impl Site {
    /// Without a store.
    pub async fn start() -> Site {
        Self::start_with(false).await
    }

    /// With a store that keeps originals; nothing extracts or embeds them.
    pub async fn with_store() -> Site {
        Self::start_with(true).await
    }

    async fn start_with(store: bool) -> Site {
        let dir = tempfile::tempdir().expect("directory");
        let ca = Arc::new(Ca::create("test").expect("CA"));
        let identity = ca.issue(NodeId(1), "one").expect("identity");
        let transport =
            Transport::bind(&identity, "127.0.0.1:0".parse().expect("address")).expect("transport");
        let addr = transport.local_addr();
        let control = ControlHandle::connect(transport.clone(), vec![addr]);
        let config = CoordinatorConfig {
            node: NodeId(1),
            dir: dir.path().join("control"),
            cluster_name: "test".into(),
            bootstrap: Some(BTreeMap::from([(NodeId(1), addr)])),
            ca,
            cluster_key: Redacted::new([7; 32]),
        };
        let coordinator =
            Coordinator::start(config, transport.clone(), control.clone()).expect("coordinator");
        let mut roles = BTreeSet::from([Role::Coordinator, Role::Gateway]);
        let store = if store {
            roles.insert(Role::Store);
            let mut config = StoreConfig::new(dir.path().join("store"), NodeId(1), [7; 32]);
            config.extract_program = Some(dir.path().join("no-extractor"));
            config.min_free_bytes = 0;
            let started = StoreNode::start(
                config,
                transport.clone(),
                control.clone(),
                Arc::new(NoModel),
            );
            Some(started.await.expect("store"))
        } else {
            None
        };
        let node = Node {
            id: NodeId(1),
            name: "one".into(),
            addr,
            data_addr: None,
            roles,
            devices: Vec::new(),
            up: true,
            version: "test".into(),
            incarnation: 1,
        };
        let member = control.clone();
        tokio::spawn(async move { member.run_member(node).await });
        control
            .wait_for(PATIENCE, |state| state.nodes.contains_key(&NodeId(1)))
            .await
            .expect("registered");

        if let Some(store) = &store {
            // The coordinator would wait for two more store nodes first; it is no matter who is faster.
            let group = StoreGroup {
                id: RaftGroupId(1),
                members: vec![NodeId(1)],
            };
            let _ = control.propose(Command::CreateStoreGroup(group)).await;
            control
                .wait_for(PATIENCE, |state| !state.store_groups.is_empty())
                .await
                .expect("a store group");
            let deadline = clock::monotonic() + PATIENCE;
            while !store.ready() {
                assert!(clock::monotonic() < deadline, "the store leads its group");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }

        let now_ms = clock::now_ms();
        for (id, name) in [
            ("musterstadt", "Stadt Musterstadt"),
            ("nachbarort", "Gemeinde Nachbarort"),
        ] {
            propose(
                &control,
                Command::CreateTenant {
                    id: tenant(id),
                    name: name.into(),
                    now_ms,
                },
            )
            .await;
        }
        let operator = key(&control, "musterstadt", "Betrieb", true).await;
        let clerk = key(&control, "musterstadt", "Sachbearbeitung", false).await;
        let neighbour = key(&control, "nachbarort", "Verwaltung", true).await;
        control
            .wait_for(PATIENCE, |state| state.api_keys.len() == 3)
            .await
            .expect("keys are known here");

        let config = GatewayConfig {
            listen: "127.0.0.1:0".parse().expect("address"),
            operator_tenant: Some(tenant("musterstadt")),
            drain_s: 5,
            ..GatewayConfig::default()
        };
        let gateway = Gateway::bind(config).await.expect("a free port");
        let base = format!("http://{}", gateway.local_addr());
        let inference = InferenceClient::new(transport.clone(), control.clone());
        let client = StoreClient::new(transport, control.clone());
        let stop = CancellationToken::new();
        let served = tokio::spawn(gateway.run(control, inference, client, stop.clone()));
        let http = reqwest::Client::builder()
            .timeout(PATIENCE)
            .build()
            .expect("client");
        Site {
            base,
            http,
            operator,
            clerk,
            neighbour,
            stop,
            served,
            store,
            _coordinator: coordinator,
            _dir: dir,
        }
    }

    pub fn request(&self, method: &str, path: &str, key: &str) -> reqwest::RequestBuilder {
        let method = method.parse().expect("a method");
        self.http
            .request(method, format!("{}{path}", self.base))
            .bearer_auth(key)
    }

    pub async fn send(&self, request: reqwest::RequestBuilder) -> (u16, Value) {
        let response = request.send().await.expect("an answer");
        let status = response.status().as_u16();
        let text = response.text().await.expect("a body");
        (
            status,
            serde_json::from_str(&text).unwrap_or(Value::String(text)),
        )
    }

    pub async fn get(&self, path: &str, key: &str) -> (u16, Value) {
        self.send(self.request("GET", path, key)).await
    }

    pub async fn post(&self, path: &str, key: &str, body: &Value) -> (u16, Value) {
        self.send(self.request("POST", path, key).json(body)).await
    }

    pub async fn stop(self) {
        self.stop.cancel();
        self.served.await.expect("the gateway ends");
        if let Some(store) = self.store {
            store.shutdown().await;
        }
    }
}

//! Three store nodes in one process, on loopback, with real transport, replication, extraction child and indexes. Only the
//! embedding model is replaced: by letters counted, so that plumbing is tested and not a model.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
pub use std::sync::atomic::Ordering;

use coordinator::identity::Ca;
use futures::FutureExt;
use tokio::sync::MutexGuard;

use super::*;
use crate::client::Directory;
pub use crate::{CollectionId, Document, DocumentId, Hit, RetrieveRequest, Status, StoreClient};

/// Three nodes keep two cores busy: one cluster at a time.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

pub const GROUP: RaftGroupId = RaftGroupId(1);
pub const CLUSTER_KEY: [u8; 32] = [7; 32];
/// Long enough for a loaded machine; reached only when a test fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where each node listens now, and who the group's members are.
#[derive(Default)]
pub struct Addresses(pub Mutex<BTreeMap<NodeId, SocketAddr>>);

impl AddressBook for Addresses {
    fn addr(&self, node: NodeId) -> Option<SocketAddr> {
        self.0.lock().unwrap().get(&node).copied()
    }
}

impl Directory for Addresses {
    fn group_of(&self, _tenant: &TenantId) -> Option<(RaftGroupId, Vec<(NodeId, SocketAddr)>)> {
        Some((
            GROUP,
            self.0
                .lock()
                .unwrap()
                .iter()
                .map(|(id, addr)| (*id, *addr))
                .collect(),
        ))
    }
}

/// Counts words by their first letters.
pub struct CountingEmbedder {
    pub ready: AtomicBool,
}

impl Embedder for CountingEmbedder {
    fn embed(
        &self,
        _tenant: &TenantId,
        _kind: EmbedKind,
        texts: Vec<Redacted<String>>,
    ) -> BoxFuture<'static, Result<Vec<Vec<f32>>, String>> {
        let ready = self.ready.load(Ordering::SeqCst);
        let embed = |text: &Redacted<String>| {
            let mut vector = vec![0.01f32; 64];
            for word in text
                .expose()
                .to_lowercase()
                .split(|c: char| !c.is_alphanumeric())
                .filter(|w| w.len() > 3)
            {
                let place = word.bytes().take(4).fold(5usize, |h, b| {
                    h.wrapping_mul(31).wrapping_add(usize::from(b))
                });
                vector[place % 64] += 1.0;
            }
            vector
        };
        let vectors = texts.iter().map(embed).collect();
        async move {
            if ready {
                Ok(vectors)
            } else {
                Err("no model is loaded".to_owned())
            }
        }
        .boxed()
    }
}

pub struct Running {
    pub node: StoreNode,
    pub transport: Transport,
}

pub struct Cluster {
    pub ca: Ca,
    pub dir: tempfile::TempDir,
    pub addresses: Arc<Addresses>,
    pub embedder: Arc<CountingEmbedder>,
    pub nodes: HashMap<NodeId, Running>,
    pub client: StoreClient,
    extract_program: PathBuf,
    /// Given back when all else is dropped.
    _turn: MutexGuard<'static, ()>,
}

pub fn extract_program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test
        .parent()
        .and_then(Path::parent)
        .unwrap()
        .join("examples")
        .join("extract");
    assert!(
        program.exists(),
        "{} is missing: cargo build -p rag-store --examples",
        program.display()
    );
    program
}

impl Cluster {
    pub async fn start() -> Self {
        Self::reading_with(extract_program()).await
    }

    /// With another program as the extraction child.
    pub async fn reading_with(extract_program: PathBuf) -> Self {
        let turn = ONE_AT_A_TIME.lock().await;
        let ca = Ca::create("test").unwrap();
        let addresses = Arc::new(Addresses::default());
        let identity = ca.issue(NodeId(100), "client").unwrap();
        let transport = Transport::bind(&identity, "127.0.0.1:0".parse().unwrap()).unwrap();
        let client = StoreClient::with_directory(transport, addresses.clone());
        let embedder = Arc::new(CountingEmbedder {
            ready: AtomicBool::new(true),
        });
        let dir = tempfile::tempdir().unwrap();
        let mut cluster = Self {
            ca,
            dir,
            addresses,
            embedder,
            nodes: HashMap::new(),
            client,
            extract_program,
            _turn: turn,
        };
        for id in 1..=3 {
            cluster.start_node(NodeId(id));
        }
        cluster
    }

    pub fn start_node(&mut self, id: NodeId) {
        let identity = self.ca.issue(id, "node").unwrap();
        let transport = Transport::bind(&identity, "127.0.0.1:0".parse().unwrap()).unwrap();
        self.addresses
            .0
            .lock()
            .unwrap()
            .insert(id, transport.local_addr());
        let config = StoreConfig {
            extract_program: Some(self.extract_program.clone()),
            min_free_bytes: 0,
            ..StoreConfig::new(self.dir.path().join(format!("node-{id}")), id, CLUSTER_KEY)
        };
        let members = (1..=3).map(NodeId).collect();
        let node = StoreNode::start_fixed(
            config,
            transport.clone(),
            self.addresses.clone(),
            self.embedder.clone(),
            &[(GROUP, members)],
        );
        self.nodes.insert(
            id,
            Running {
                node: node.unwrap(),
                transport,
            },
        );
    }

    pub async fn stop_node(&mut self, id: NodeId) {
        let running = self.nodes.remove(&id).unwrap();
        running.node.shutdown().await;
        running.transport.shutdown().await;
    }

    pub async fn leader(&self) -> NodeId {
        let leader = || {
            self.nodes.values().find_map(|n| {
                let status = n.node.group(GROUP)?.replica.status();
                status.is_leader.then_some(status.leader?)
            })
        };
        eventually("a leader", async || leader()).await
    }

    pub async fn status(&self, owner: &TenantId, id: DocumentId, wanted: Status) -> Document {
        eventually("the document's status", async || {
            let document = ask(async || self.client.document(owner, id).await).await;
            (document.status == wanted).then_some(document)
        })
        .await
    }

    pub async fn upload(
        &self,
        owner: &TenantId,
        to: CollectionId,
        name: &str,
        text: impl Into<Bytes>,
    ) -> Document {
        let bytes: Bytes = text.into();
        let document =
            ask(async || self.client.upload(owner, to, name, "", bytes.clone()).await).await;
        self.status(owner, document.id, Status::Ready).await
    }

    /// Uploads without waiting for ingestion.
    pub async fn queue(
        &self,
        owner: &TenantId,
        to: CollectionId,
        name: &str,
        text: &'static str,
    ) -> Document {
        ask(async || self.client.upload(owner, to, name, "", text.into()).await).await
    }

    pub async fn collection(&self, owner: &TenantId, name: &str) -> CollectionId {
        ask(async || self.client.create_collection(owner, name).await)
            .await
            .id
    }

    pub async fn delete(&self, owner: &TenantId, id: DocumentId) {
        ask(
            async || match self.client.delete_document(owner, id).await {
                // A deletion that could not be confirmed had its effect.
                Err(Error::NotFound) => Ok(()),
                other => other,
            },
        )
        .await;
    }

    pub fn group(&self, node: NodeId) -> Arc<Group> {
        self.nodes[&node].node.group(GROUP).unwrap()
    }

    /// Searches when every node that works has indexed what is acknowledged; a loaded machine takes longer than a question
    /// waits.
    pub async fn search(&self, owner: &TenantId, query: &str) -> Vec<Hit> {
        for running in self.nodes.values() {
            let group = running.node.group(GROUP).unwrap();
            if group.fresh_view().await.is_ok() {
                group.machine.follower.caught_up().await;
            }
        }
        self.search_now(owner, query).await
    }

    pub async fn search_now(&self, owner: &TenantId, query: &str) -> Vec<Hit> {
        ask(async || self.client.retrieve(owner, question(query, &[])).await).await
    }
}

pub fn question(query: &str, collections: &[CollectionId]) -> RetrieveRequest {
    RetrieveRequest {
        query: Redacted::new(query.into()),
        collections: collections.to_vec(),
        top_k: 5,
    }
}

pub fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

pub async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let search = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, search)
        .await
        .unwrap_or_else(|_| panic!("{what} did not come about"))
}

/// Asks until the store is available: an overloaded test machine may hold several elections in a row.
pub async fn ask<T>(mut what: impl AsyncFnMut() -> Result<T, Error>) -> T {
    eventually("an answer", async || match what().await {
        Ok(answer) => Some(answer),
        Err(Error::Unavailable { .. }) => None,
        Err(error) => panic!("{error}"),
    })
    .await
}

pub const DOG_TAX: &str = "# Hundesteuersatzung\n\n## § 5 Steuersatz\n\nDie Steuer beträgt für den ersten Hund 96 Euro.\n\n\
    ## § 6 Ermäßigung\n\nFür Rettungshunde wird die Steuer auf Antrag um die Hälfte ermäßigt.\n";
pub const PARKING: &str = "# Parkordnung\n\nBewohnerparkausweise kosten 30,70 Euro im Jahr.\n";

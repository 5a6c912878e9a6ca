//! Three store nodes in one process, on loopback, with real transport, replication, extraction child and indexes. Only the
//! embedding model is replaced: by letters counted, so that plumbing is tested and not a model.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use coordinator::identity::Ca;
use futures::FutureExt;

use super::*;
use crate::client::{Directory, MAX_UPLOAD_BYTES};
use crate::{CollectionId, Document, DocumentId, Hit, RetrieveRequest, Status, StoreClient};

const GROUP: RaftGroupId = RaftGroupId(1);
const CLUSTER_KEY: [u8; 32] = [7; 32];
/// Long enough for a loaded machine; reached only when a test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where each node listens now, and who the group's members are.
#[derive(Default)]
struct Addresses(Mutex<BTreeMap<NodeId, SocketAddr>>);

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
struct CountingEmbedder {
    ready: AtomicBool,
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

struct Running {
    node: StoreNode,
    transport: Transport,
}

struct Cluster {
    ca: Ca,
    dir: tempfile::TempDir,
    addresses: Arc<Addresses>,
    embedder: Arc<CountingEmbedder>,
    nodes: HashMap<NodeId, Running>,
    client: StoreClient,
    min_free_bytes: u64,
}

fn extract_program() -> PathBuf {
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
    async fn start() -> Self {
        Self::with_min_free(0).await
    }

    async fn with_min_free(min_free_bytes: u64) -> Self {
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
            min_free_bytes,
        };
        for id in 1..=3 {
            cluster.start_node(NodeId(id));
        }
        cluster
    }

    fn start_node(&mut self, id: NodeId) {
        let identity = self.ca.issue(id, "node").unwrap();
        let transport = Transport::bind(&identity, "127.0.0.1:0".parse().unwrap()).unwrap();
        self.addresses
            .0
            .lock()
            .unwrap()
            .insert(id, transport.local_addr());
        let config = StoreConfig {
            extract_program: Some(extract_program()),
            min_free_bytes: self.min_free_bytes,
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

    async fn stop_node(&mut self, id: NodeId) {
        let running = self.nodes.remove(&id).unwrap();
        running.node.shutdown().await;
        running.transport.shutdown().await;
    }

    async fn leader(&self) -> NodeId {
        let leader = || {
            self.nodes.values().find_map(|n| {
                let status = n.node.group(GROUP)?.replica.status();
                status.is_leader.then_some(status.leader?)
            })
        };
        eventually("a leader", async || leader()).await
    }

    async fn status(&self, owner: &TenantId, id: DocumentId, wanted: Status) -> Document {
        eventually("the document's status", async || {
            let document = ask(async || self.client.document(owner, id).await).await;
            (document.status == wanted).then_some(document)
        })
        .await
    }

    async fn upload(
        &self,
        owner: &TenantId,
        to: CollectionId,
        name: &str,
        text: impl Into<Bytes>,
    ) -> Document {
        let document = self
            .client
            .upload(owner, to, name, "", text.into())
            .await
            .unwrap();
        self.status(owner, document.id, Status::Ready).await
    }

    async fn search(&self, owner: &TenantId, query: &str) -> Vec<Hit> {
        ask(async || self.client.retrieve(owner, question(query, &[])).await).await
    }
}

fn question(query: &str, collections: &[CollectionId]) -> RetrieveRequest {
    RetrieveRequest {
        query: Redacted::new(query.into()),
        collections: collections.to_vec(),
        top_k: 5,
    }
}

fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

async fn eventually<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
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
async fn ask<T>(mut what: impl AsyncFnMut() -> Result<T, Error>) -> T {
    eventually("an answer", async || match what().await {
        Ok(answer) => Some(answer),
        Err(Error::Unavailable { .. }) => None,
        Err(error) => panic!("{error}"),
    })
    .await
}

const DOG_TAX: &str = "# Hundesteuersatzung\n\n## § 5 Steuersatz\n\nDie Steuer beträgt für den ersten Hund 96 Euro.\n\n\
    ## § 6 Ermäßigung\n\nFür Rettungshunde wird die Steuer auf Antrag um die Hälfte ermäßigt.\n";
const PARKING: &str = "# Parkordnung\n\nBewohnerparkausweise kosten 30,70 Euro im Jahr.\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_uploaded_document_becomes_ready_and_is_found_down_to_its_passage_on_every_replica() {
    let cluster = Cluster::start().await;
    let owner = tenant("musterstadt");
    let collection =
        ask(async || cluster.client.create_collection(&owner, "Satzungen").await).await;
    let exists = cluster
        .client
        .create_collection(&owner, " Satzungen ")
        .await;
    assert_eq!(
        exists,
        Err(Error::Exists {
            what: "collection \"Satzungen\"".into()
        })
    );

    let document = cluster
        .upload(&owner, collection.id, "ordner/hundesteuer.md", DOG_TAX)
        .await;
    assert_eq!(
        (document.name.as_str(), document.bytes),
        ("hundesteuer.md", DOG_TAX.len() as u64)
    );
    assert_eq!((document.progress, &document.error), (1.0, &None));
    let parking = cluster
        .upload(&owner, collection.id, "parken.md", PARKING)
        .await;

    let hits = cluster
        .search(&owner, "Wie hoch ist die Hundesteuer für den ersten Hund?")
        .await;
    assert_eq!(hits[0].document_id, document.id);
    assert!(
        hits[0]
            .text
            .expose()
            .contains("für den ersten Hund 96 Euro")
    );
    assert!(
        DOG_TAX.contains(hits[0].text.expose().lines().last().unwrap()),
        "the passage is literal"
    );
    assert!(hits[0].heading.contains("§ 5 Steuersatz"));
    assert_eq!(
        cluster.search(&owner, "Parkausweis für Bewohner").await[0].document_id,
        parking.id
    );

    let chunks = cluster.client.chunks(&owner, document.id).await.unwrap();
    assert_eq!(chunks.len(), document.chunks as usize);
    let (about, original) = cluster.client.original(&owner, document.id).await.unwrap();
    assert_eq!(
        (about, original.as_ref()),
        (document.clone(), DOG_TAX.as_bytes())
    );
    assert_eq!(
        cluster
            .client
            .documents(&owner, collection.id)
            .await
            .unwrap(),
        [document.clone(), parking]
    );
    assert_eq!(
        cluster.client.collections(&owner).await.unwrap()[0].documents,
        2
    );

    for running in cluster.nodes.values() {
        let group = running.node.group(GROUP).unwrap();
        group.fresh_view().await.unwrap();
        group.machine.follower.caught_up().await;
        let arms = group
            .machine
            .follower
            .indexes()
            .search(&owner, "Rettungshunde", None, None, 3)
            .unwrap();
        assert_eq!(
            arms.text[0].0.document, document.id,
            "on node {}",
            group.node
        );
        assert!(running.node.ready());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_tenants_ids_answer_exactly_as_unknown_ones_on_every_method() {
    let cluster = Cluster::start().await;
    let (owner, stranger) = (tenant("musterstadt"), tenant("musterstadt-2"));
    let collection = ask(async || cluster.client.create_collection(&owner, "Akten").await).await;
    let document = cluster.upload(&owner, collection.id, "a.md", DOG_TAX).await;
    let own = cluster
        .client
        .create_collection(&stranger, "Akten")
        .await
        .expect("names are per tenant");
    cluster.upload(&stranger, own.id, "b.md", PARKING).await;
    assert_eq!(
        cluster.client.collections(&stranger).await.unwrap().len(),
        1
    );

    let client = &cluster.client;
    for (c, d) in [
        (collection.id, document.id),
        (CollectionId::generate(), DocumentId::generate()),
    ] {
        let answers = [
            client.collection(&stranger, c).await.err(),
            client.delete_collection(&stranger, c).await.err(),
            client
                .upload(&stranger, c, "x.txt", "", Bytes::from_static(b"x"))
                .await
                .err(),
            client.documents(&stranger, c).await.err(),
            client.document(&stranger, d).await.err(),
            client.delete_document(&stranger, d).await.err(),
            client.original(&stranger, d).await.err(),
            client.chunks(&stranger, d).await.err(),
            client
                .retrieve(&stranger, question("Hund", &[c]))
                .await
                .err(),
            client
                .retrieve(&stranger, question("Hund", &[own.id, c]))
                .await
                .err(),
        ];
        for (method, answer) in answers.iter().enumerate() {
            assert_eq!(answer, &Some(Error::NotFound), "method {method} with {c}");
        }
    }
    let hits = cluster.search(&stranger, "Hundesteuer erster Hund").await;
    assert!(hits.iter().all(|hit| hit.document == "b.md"));
    assert_eq!(
        cluster.client.document(&owner, document.id).await.unwrap(),
        document
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_the_leaders_end_and_a_restart_of_all() {
    let mut cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = ask(async || cluster.client.create_collection(&owner, "Akten").await).await;
    let first = cluster.upload(&owner, collection.id, "a.md", DOG_TAX).await;

    // A document that is being ingested when its leader goes.
    cluster.embedder.ready.store(false, Ordering::SeqCst);
    let second = cluster
        .client
        .upload(&owner, collection.id, "b.md", "", Bytes::from(PARKING))
        .await
        .unwrap();
    cluster.status(&owner, second.id, Status::Processing).await;
    let leader = cluster.leader().await;
    cluster.stop_node(leader).await;
    cluster.embedder.ready.store(true, Ordering::SeqCst);
    cluster.status(&owner, second.id, Status::Ready).await;
    assert_eq!(
        cluster.search(&owner, "Bewohnerparkausweise").await[0].document_id,
        second.id
    );
    assert_eq!(
        ask(async || cluster.client.document(&owner, first.id).await).await,
        first
    );

    // The lost node comes back and catches up, derived data included.
    cluster.start_node(leader);
    let group = cluster.nodes[&leader].node.group(GROUP).unwrap();
    eventually("the restarted node's index", async || {
        group.machine.follower.caught_up().await;
        let arms = group
            .machine
            .follower
            .indexes()
            .search(&owner, "Bewohnerparkausweise", None, None, 3)
            .ok()?;
        arms.text
            .first()
            .filter(|(chunk, _)| chunk.document == second.id)
            .map(|_| ())
    })
    .await;

    let before = cluster.search(&owner, "Steuer für Rettungshunde").await;
    for id in 1..=3 {
        cluster.stop_node(NodeId(id)).await;
    }
    for id in 1..=3 {
        cluster.start_node(NodeId(id));
    }
    let documents = ask(async || cluster.client.documents(&owner, collection.id).await).await;
    assert_eq!(
        documents
            .iter()
            .map(|d| (d.id, d.status))
            .collect::<Vec<_>>(),
        [(first.id, Status::Ready), (second.id, Status::Ready)]
    );
    // Rebuilt indexes answer as those that grew.
    assert_eq!(
        cluster.search(&owner, "Steuer für Rettungshunde").await,
        before
    );
}

fn files_with(dir: &Path, marker: &[u8]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_with(&path, marker));
        } else if std::fs::read(&path)
            .is_ok_and(|bytes| bytes.windows(marker.len()).any(|w| w == marker))
        {
            found.push(path);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_plain_text_reaches_the_disk_and_deletion_destroys_the_key_everywhere() {
    let mut cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = ask(async || {
        cluster
            .client
            .create_collection(&owner, "Geheimnamensammlung")
            .await
    })
    .await;
    let text = format!(
        "# Vermerk\n\n{}",
        "Kennwortzebrastreifen steht hier. ".repeat(200)
    );
    let document = cluster
        .upload(&owner, collection.id, "Personalaktenname.md", text.clone())
        .await;
    let kept = cluster.upload(&owner, collection.id, "b.md", PARKING).await;
    let wrapped: Vec<u8> = {
        let group = cluster.nodes[&NodeId(1)].node.group(GROUP).unwrap();
        let view = group.fresh_view().await.unwrap();
        view.get(&keys::data_key(&owner, document.id))
            .unwrap()
            .expect("a document has a key")
    };
    cluster
        .client
        .delete_document(&owner, document.id)
        .await
        .unwrap();
    assert_eq!(
        cluster.client.document(&owner, document.id).await,
        Err(Error::NotFound)
    );
    assert!(
        cluster
            .search(&owner, "Kennwortzebrastreifen")
            .await
            .iter()
            .all(|h| h.document_id == kept.id)
    );
    for running in cluster.nodes.values() {
        let group = running.node.group(GROUP).unwrap();
        let view = group.fresh_view().await.unwrap();
        assert_eq!(
            view.get(&keys::data_key(&owner, document.id)).unwrap(),
            None
        );
        group.machine.follower.caught_up().await;
        assert_eq!(
            group.machine.follower.indexes().documents(&owner, None),
            [kept.id]
        );
    }
    // Files are complete when the nodes have stopped.
    for id in 1..=3 {
        cluster.stop_node(NodeId(id)).await;
    }
    for marker in [
        "Kennwortzebrastreifen",
        "kennwortzebrastreif",
        "Personalaktenname",
        "Geheimnamensammlung",
    ] {
        assert_eq!(
            files_with(cluster.dir.path(), marker.as_bytes()),
            [] as [PathBuf; 0],
            "{marker}"
        );
    }
    let _ = wrapped;
    assert!(
        !files_with(cluster.dir.path(), owner.as_str().as_bytes()).is_empty(),
        "the scan does read the files"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_model_delays_documents_and_neither_fails_them_nor_holds_up_deletion() {
    let cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = ask(async || cluster.client.create_collection(&owner, "Akten").await).await;
    cluster.embedder.ready.store(false, Ordering::SeqCst);
    let one = cluster
        .client
        .upload(&owner, collection.id, "a.md", "", Bytes::from(DOG_TAX))
        .await
        .unwrap();
    let two = cluster
        .client
        .upload(&owner, collection.id, "b.md", "", Bytes::from(PARKING))
        .await
        .unwrap();
    assert!(matches!(one.status, Status::Queued | Status::Processing));
    cluster.status(&owner, one.id, Status::Processing).await;
    cluster
        .client
        .delete_document(&owner, one.id)
        .await
        .unwrap();
    assert_eq!(
        cluster.client.document(&owner, one.id).await,
        Err(Error::NotFound)
    );
    assert_eq!(cluster.search(&owner, "Hund").await, []);
    cluster.embedder.ready.store(true, Ordering::SeqCst);
    cluster.status(&owner, two.id, Status::Ready).await;
    assert_eq!(
        cluster
            .client
            .documents(&owner, collection.id)
            .await
            .unwrap()
            .len(),
        1
    );
    cluster
        .client
        .delete_collection(&owner, collection.id)
        .await
        .unwrap();
    assert_eq!(
        cluster.client.document(&owner, two.id).await,
        Err(Error::NotFound)
    );
    assert_eq!(cluster.search(&owner, "Parken").await, []);
    let group = cluster.nodes[&cluster.leader().await]
        .node
        .group(GROUP)
        .unwrap();
    eventually("sweeping", async || {
        let view = group.fresh_view().await.ok()?;
        let left = view.scan_prefix(&keys::originals(&owner, two.id)).next();
        left.is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_uploads_and_questions_get_a_typed_error_and_unreadable_files_a_german_reason() {
    let cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = ask(async || cluster.client.create_collection(&owner, "Akten").await).await;
    let upload = async |name: &str, bytes: Vec<u8>| {
        cluster
            .client
            .upload(&owner, collection.id, name, "", bytes.into())
            .await
    };

    let got = 100 * 1024 * 1024;
    assert_eq!(
        upload("gross.pdf", vec![0; got]).await,
        Err(Error::TooLarge {
            limit: MAX_UPLOAD_BYTES,
            got: got as u64
        })
    );
    assert!(matches!(
        upload("leer.pdf", vec![]).await,
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(
        upload("", b"x".to_vec()).await,
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(
        cluster.client.create_collection(&owner, "  ").await,
        Err(Error::Invalid { .. })
    ));
    assert!(matches!(
        cluster
            .client
            .create_collection(&owner, &"x".repeat(201))
            .await,
        Err(Error::Invalid { .. })
    ));
    for (query, top_k) in [("", 5), ("Hund", 0), ("Hund", 101)] {
        let request = RetrieveRequest {
            top_k,
            ..question(query, &[])
        };
        assert!(
            matches!(
                cluster.client.retrieve(&owner, request).await,
                Err(Error::Invalid { .. })
            ),
            "{query:?} {top_k}"
        );
    }
    assert!(matches!(
        cluster
            .client
            .retrieve(&owner, question(&"x".repeat(40_000), &[]))
            .await,
        Err(Error::Invalid { .. })
    ));
    for (name, bytes) in [
        ("kaputt.pdf", b"%PDF-1.7 nichts".to_vec()),
        ("kaputt.docx", b"PK\x03\x04 nichts".to_vec()),
    ] {
        let document = upload(name, bytes.clone()).await.unwrap();
        let failed = cluster.status(&owner, document.id, Status::Failed).await;
        let reason = failed.error.expect("a failed document says why");
        assert!(reason.contains("Bitte"), "{name}: {reason}");
        assert_eq!(
            cluster
                .client
                .original(&owner, document.id)
                .await
                .unwrap()
                .1
                .as_ref(),
            bytes
        );
        assert_eq!(
            cluster.client.chunks(&owner, document.id).await.unwrap(),
            []
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_original_and_many_chunks_travel_in_parts_and_come_back_whole() {
    let cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = ask(async || cluster.client.create_collection(&owner, "Akten").await).await;
    let mut text = String::new();
    for section in 1..=1500 {
        text.push_str(&format!(
            "# § {section} Vorschrift {section}\n\n{}\n\n",
            "Die Gemeinde regelt dies durch Satzung. ".repeat(40)
        ));
    }
    assert!(text.len() > 2 * crate::store::PART_BYTES, "several parts");
    let document = cluster
        .upload(&owner, collection.id, "gross.md", text.clone())
        .await;
    assert!(document.chunks >= 1500);
    let (_, original) = cluster.client.original(&owner, document.id).await.unwrap();
    assert!(original.as_ref() == text.as_bytes());
    let chunks = cluster.client.chunks(&owner, document.id).await.unwrap();
    assert!(
        chunks
            .iter()
            .enumerate()
            .all(|(at, chunk)| chunk.ordinal as usize == at)
    );
    assert_eq!(chunks.len(), document.chunks as usize);
    let hits = cluster.search(&owner, "Was steht in § 777?").await;
    assert!(
        hits.iter().any(|hit| hit.heading.contains("§ 777 ")),
        "section numbers are found"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_uploads_with_the_remedy_and_keeps_what_is_there() {
    let cluster = Cluster::with_min_free(u64::MAX / 2).await;
    let owner = tenant("a");
    let refused = eventually("a refusal", async || {
        match cluster.client.create_collection(&owner, "Akten").await {
            Err(Error::Unavailable { .. }) => None,
            other => Some(other),
        }
    })
    .await;
    let Err(Error::DiskFull { why }) = refused else {
        panic!("{refused:?}")
    };
    assert!(why.contains("are needed"), "{why}");
    assert_eq!(cluster.client.collections(&owner).await, Ok(Vec::new()));
}

#[tokio::test]
async fn without_any_member_the_client_says_so() {
    let ca = Ca::create("test").unwrap();
    let identity = ca.issue(NodeId(100), "client").unwrap();
    let transport = Transport::bind(&identity, "127.0.0.1:0".parse().unwrap()).unwrap();
    let client = StoreClient::with_directory(transport, Arc::new(Addresses::default()));
    assert!(matches!(
        client.collections(&tenant("a")).await,
        Err(Error::Unavailable { .. })
    ));
}

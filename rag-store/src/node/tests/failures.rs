//! What fails: nodes, disks, indexes; and what is left on the disk.

use std::os::unix::fs::PermissionsExt;

use super::cluster::*;
use super::*;
use crate::extract::{Block, BlockKind, ExtractError, ExtractedDocument};
use crate::index::follow::Change;

/// Files that hold all the markers.
fn files_with(dir: &Path, markers: &[&[u8]]) -> Vec<PathBuf> {
    let holds = |bytes: &[u8], marker: &[u8]| bytes.windows(marker.len()).any(|w| w == marker);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_with(&path, markers));
        } else if std::fs::read(&path)
            .is_ok_and(|bytes| markers.iter().all(|marker| holds(&bytes, marker)))
        {
            found.push(path);
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_the_leaders_end_and_a_restart_of_all() {
    let mut cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = cluster.collection(&owner, "Akten").await;
    let first = cluster.upload(&owner, collection, "a.md", DOG_TAX).await;

    // A document that is being ingested when its leader goes.
    cluster.embedder.ready.store(false, Ordering::SeqCst);
    let second = cluster.queue(&owner, collection, "b.md", PARKING).await;
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
    let documents = ask(async || cluster.client.documents(&owner, collection).await).await;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_plain_text_reaches_the_disk_and_deletion_takes_record_key_and_index_everywhere() {
    let mut cluster = Cluster::start().await;
    let owner = tenant("musterstadtname");
    let collection = cluster.collection(&owner, "Geheimnamensammlung").await;
    let text = format!(
        "# Vermerk\n\n{}",
        "Kennwortzebrastreifen steht hier. ".repeat(200)
    );
    let document = cluster
        .upload(&owner, collection, "Personalaktenname.md", text)
        .await;
    let kept = cluster.upload(&owner, collection, "b.md", PARKING).await;
    cluster.delete(&owner, document.id).await;
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
    for node in 1..=3 {
        let group = cluster.group(NodeId(node));
        let view = eventually("a fresh view", async || group.fresh_view().await.ok()).await;
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
            files_with(cluster.dir.path(), &[marker.as_bytes()]),
            [] as [PathBuf; 0],
            "{marker}"
        );
    }
    assert!(
        !files_with(cluster.dir.path(), &[owner.as_str().as_bytes()]).is_empty(),
        "the scan does read the files"
    );
}

/// The tables of RocksDB that hold the state, as opposed to the log, name their column family.
const OF_THE_STATE: &[u8] = b"state-";

/// What is promised of a deletion, on each replica: the wrapped key leaves the files of the state, at once or, after a crash,
/// at the next start. The Raft log keeps the entry that brought it, wrapped by the tenant's key, until it is truncated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_destroyed_key_leaves_the_files_of_the_state_also_when_the_nodes_stop_right_after() {
    let mut cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = cluster.collection(&owner, "Akten").await;
    let mut keys_of = Vec::new();
    let mut documents = Vec::new();
    for name in ["a.md", "b.md", "c.md"] {
        let document = cluster.upload(&owner, collection, name, PARKING).await;
        let group = cluster.group(NodeId(1));
        let view = eventually("a fresh view", async || group.fresh_view().await.ok()).await;
        let wrapped = view.get(&keys::data_key(&owner, document.id)).unwrap();
        // Without the length before it, which a compressed block may hold apart.
        keys_of.push(wrapped.expect("a document has a key")[8..40].to_vec());
        documents.push(document.id);
    }
    // Out of memory into tables, on every replica.
    for node in 1..=3 {
        let group = cluster.group(NodeId(node));
        eventually("a fresh view", async || group.fresh_view().await.ok()).await;
        let table = keys::data_keys(&owner);
        group.replica.compact_prefix(&table).await.unwrap();
    }
    let dir = cluster.dir.path().to_owned();
    let replicas_with = |key: &[u8]| {
        let in_state = |node: &u64| {
            let dir = dir.join(format!("node-{node}"));
            !files_with(&dir, &[key, OF_THE_STATE]).is_empty()
        };
        (1..=3).filter(in_state).collect::<Vec<u64>>()
    };
    for key in &keys_of {
        assert_eq!(
            replicas_with(key),
            [1, 2, 3],
            "the scan finds a key that is there"
        );
    }

    cluster.delete(&owner, documents[0]).await;
    eventually("the first key's end", async || {
        replicas_with(&keys_of[0]).is_empty().then_some(())
    })
    .await;

    // Deleted, and stopped before a compaction is due.
    cluster.delete(&owner, documents[1]).await;
    for id in 1..=3 {
        cluster.stop_node(NodeId(id)).await;
    }
    for id in 1..=3 {
        cluster.start_node(NodeId(id));
    }
    eventually("the second key's end", async || {
        replicas_with(&keys_of[1]).is_empty().then_some(())
    })
    .await;
    assert_eq!(replicas_with(&keys_of[2]), [1, 2, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_uploads_with_the_remedy_and_keeps_what_is_there() {
    let cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = cluster.collection(&owner, "Akten").await;
    let first = cluster.upload(&owner, collection, "a.md", DOG_TAX).await;
    let reserve = |bytes: u64| {
        for node in 1..=3 {
            let group = cluster.group(NodeId(node));
            group.min_free_bytes.store(bytes, Ordering::SeqCst);
        }
    };

    reserve(u64::MAX / 2);
    let upload = async || {
        let bytes = Bytes::from(PARKING);
        let sent = cluster.client.upload(&owner, collection, "b.md", "", bytes);
        match sent.await {
            Err(Error::Unavailable { .. }) => None,
            other => Some(other),
        }
    };
    let refused = eventually("a refusal", upload).await;
    let Err(Error::DiskFull { why }) = refused else {
        panic!("{refused:?}")
    };
    assert!(why.contains("are needed"), "{why}");
    let (about, original) = ask(async || cluster.client.original(&owner, first.id).await).await;
    assert_eq!(
        (about, original.as_ref()),
        (first.clone(), DOG_TAX.as_bytes())
    );
    let documents = ask(async || cluster.client.documents(&owner, collection).await).await;
    assert_eq!(documents, std::slice::from_ref(&first));
    assert_eq!(
        cluster.search(&owner, "erster Hund").await[0].document_id,
        first.id
    );

    reserve(0);
    cluster.upload(&owner, collection, "b.md", PARKING).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_replica_that_fails_holds_up_neither_reads_nor_writes_nor_is_it_asked_first_again() {
    let cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = cluster.collection(&owner, "Akten").await;
    let first = cluster.upload(&owner, collection, "a.md", DOG_TAX).await;
    // Its replica is gone, its services still answer: as when its disk fails.
    cluster.group(NodeId(1)).replica.shutdown().await;

    let identity = cluster.ca.issue(NodeId(101), "client").unwrap();
    let transport = Transport::bind(&identity, "127.0.0.1:0".parse().unwrap()).unwrap();
    let fresh = StoreClient::with_directory(transport, cluster.addresses.clone());
    let documents = ask(async || fresh.documents(&owner, collection).await).await;
    assert_eq!(documents, [first]);
    assert!(fresh.leader(GROUP).is_some_and(|node| node != NodeId(1)));
    let second = ask(async || {
        let bytes = Bytes::from(PARKING);
        fresh.upload(&owner, collection, "b.md", "", bytes).await
    })
    .await;
    cluster.status(&owner, second.id, Status::Ready).await;
    let hits = ask(async || {
        fresh
            .retrieve(&owner, question("Bewohnerparkausweise", &[]))
            .await
    })
    .await;
    assert_eq!(hits[0].document_id, second.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn indexes_that_could_not_follow_are_built_again_before_anybody_searches_them() {
    let cluster = Cluster::start().await;
    let owner = tenant("a");
    let collection = cluster.collection(&owner, "Akten").await;
    let document = cluster.upload(&owner, collection, "a.md", DOG_TAX).await;
    let ready = Change::Ready {
        tenant: owner.clone(),
        document: document.id,
    };
    let group = cluster.group(NodeId(2));
    let good = eventually("a fresh view", async || group.fresh_view().await.ok()).await;
    // A view that fails every read.
    cluster.group(NodeId(1)).replica.shutdown().await;
    let broken = cluster.group(NodeId(1)).replica.local_view();

    let follower = &group.machine.follower;
    follower.caught_up().await;
    assert!(follower.is_built());
    follower.push(ready.clone(), &broken);
    eventually("the failure", async || (!follower.is_built()).then_some(())).await;
    assert!(
        !follower.is_caught_up(),
        "what failed is not counted as done"
    );
    assert_eq!(follower.indexes().chunks(), 0);
    // The other replica answers meanwhile.
    assert_eq!(
        cluster.search_now(&owner, "erster Hund").await[0].document_id,
        document.id
    );
    follower.push(ready, &good);
    follower.caught_up().await;
    assert!(follower.is_built());
    assert_eq!(follower.indexes().documents(&owner, None), [document.id]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::await_holding_lock)] // holding up the index threads is the point
async fn one_tenants_indexing_does_not_make_another_tenants_search_unavailable() {
    let cluster = Cluster::start().await;
    let (busy, owner) = (tenant("busy"), tenant("owner"));
    let theirs = cluster.collection(&busy, "Akten").await;
    cluster.upload(&busy, theirs, "a.md", DOG_TAX).await;
    let collection = cluster.collection(&owner, "Akten").await;
    let old = cluster.upload(&owner, collection, "a.md", DOG_TAX).await;
    let groups: Vec<Arc<Group>> = (1..=3).map(|n| cluster.group(NodeId(n))).collect();
    for group in &groups {
        eventually("a fresh view", async || group.fresh_view().await.ok()).await;
        group.machine.follower.caught_up().await;
    }

    // Every replica is stuck in the busy tenant's index, with a document of the other one behind it.
    let held: Vec<_> = groups
        .iter()
        .map(|group| group.machine.follower.indexes().tenant(&busy).unwrap())
        .collect();
    let guards: Vec<_> = held.iter().map(|index| index.write().unwrap()).collect();
    cluster.upload(&busy, theirs, "b.md", PARKING).await;
    let new = cluster.upload(&owner, collection, "b.md", PARKING).await;
    let found = async |query: &str| {
        let search = cluster.client.retrieve(&owner, question(query, &[]));
        search.await.map(|hits| hits[0].document_id)
    };
    assert_eq!(
        found("Wie hoch ist die Steuer für den ersten Hund?").await,
        Ok(old.id)
    );
    drop(guards);
    eventually("the new document", async || {
        (found("Bewohnerparkausweise").await == Ok(new.id)).then_some(())
    })
    .await;
}

/// What [`crate::extract::child_main`] sends.
#[derive(serde::Serialize)]
enum Message {
    #[allow(dead_code)]
    Progress(f32),
    Done(Result<ExtractedDocument, ExtractError>),
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_that_the_store_refuses_for_ever_fails_with_a_german_reason() {
    let dir = tempfile::tempdir().unwrap();
    let (program, frame) = (dir.path().join("child"), dir.path().join("frame"));
    let cluster = Cluster::reading_with(program.clone()).await;
    // A child gone wrong, whatever it is asked: a chunk of five megabytes of blanks is larger than an entry may be.
    let document = ExtractedDocument {
        title: "t".repeat(10_000),
        pages: None,
        unread_pages: Vec::new(),
        blocks: vec![Block {
            page: None,
            heading_path: vec!["h".repeat(10_000)],
            kind: BlockKind::Paragraph,
            text: format!("a{}b", " ".repeat(5 << 20)),
        }],
    };
    let body = postcard::to_stdvec(&Message::Done(Ok(document))).unwrap();
    let length = (body.len() as u32).to_le_bytes();
    std::fs::write(&frame, [&length[..], &body].concat()).unwrap();
    std::fs::write(
        &program,
        format!("#!/bin/sh\nexec /bin/cat {}\n", frame.display()),
    )
    .unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();

    let owner = tenant("a");
    let collection = cluster.collection(&owner, "Akten").await;
    let document = cluster.queue(&owner, collection, "a.md", DOG_TAX).await;
    let failed = cluster.status(&owner, document.id, Status::Failed).await;
    let reason = failed.error.expect("a failed document says why");
    assert!(
        reason.contains("ließ sich nicht speichern") && reason.contains("Bitte"),
        "{reason}"
    );
    let (_, original) = ask(async || cluster.client.original(&owner, document.id).await).await;
    assert_eq!(original.as_ref(), DOG_TAX.as_bytes());
}

#[tokio::test]
async fn without_any_member_the_client_says_so() {
    let ca = coordinator::identity::Ca::create("test").unwrap();
    let identity = ca.issue(NodeId(100), "client").unwrap();
    let transport = Transport::bind(&identity, "127.0.0.1:0".parse().unwrap()).unwrap();
    let client = StoreClient::with_directory(transport, Arc::new(Addresses::default()));
    assert!(matches!(
        client.collections(&tenant("a")).await,
        Err(Error::Unavailable { .. })
    ));
}

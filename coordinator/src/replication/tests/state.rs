//! What a state machine sees: its own writes, deleted prefixes, and views that do not move; and what erasure leaves.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use super::cluster::{Cluster, eventually, rows, set};
use crate::clock::Duration;
use crate::ids::{NodeId, RaftGroupId};
use crate::replication::directory::Directory;
use crate::replication::machine::{Txn, successor};
use crate::replication::store::{Position, Store};

fn store(dir: &std::path::Path) -> Store {
    let directory = Directory::open(dir, RaftGroupId(1), NodeId(1)).expect("a directory");
    Store::open(Arc::new(directory), Some(&[NodeId(1)])).expect("a store")
}

#[test]
fn a_command_sees_its_own_writes_and_deleted_prefixes() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = store(dir.path());
    let mut txn = Txn::new(store.db(), store.state().expect("a state"));
    for key in ["a", "ab", "ab1", "b", "\u{10ffff}"] {
        txn.put(key.as_bytes(), b"1");
    }
    txn.put(&[255, 255], b"last");
    assert_eq!(txn.scan_prefix(b"a").len(), 3);
    let at = |index| Position { index, term: 1 };
    store
        .write_applied(txn.into_batch().expect("a batch"), at(2), None)
        .expect("written");

    let before = store.view().expect("a view");
    let mut txn = Txn::new(store.db(), store.state().expect("a state"));
    assert_eq!(txn.get(b"ab"), Some(b"1".to_vec()));
    txn.delete_prefix(b"ab");
    assert_eq!(
        (txn.get(b"ab"), txn.get(b"ab1"), txn.get(b"a")),
        (None, None, Some(b"1".to_vec()))
    );
    txn.put(b"ab2", b"2");
    txn.delete(b"b");
    assert_eq!(
        txn.scan_prefix(b"a"),
        [
            (b"a".to_vec(), b"1".to_vec()),
            (b"ab2".to_vec(), b"2".to_vec())
        ]
    );
    txn.delete_prefix(&[255]);
    store
        .write_applied(txn.into_batch().expect("a batch"), at(3), None)
        .expect("written");

    let after = store.view().expect("a view");
    let keys = |view| {
        rows(view)
            .into_iter()
            .map(|(key, _)| key)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        keys(&after),
        [
            b"a".to_vec(),
            b"ab2".to_vec(),
            "\u{10ffff}".as_bytes().to_vec()
        ]
    );
    assert_eq!(
        keys(&before).len(),
        6,
        "an old view still shows the old state"
    );
    assert_eq!((before.applied(), after.applied()), (2, 3));
    let range: Vec<_> = after
        .scan_range(b"a", b"ab2")
        .map(|row| row.expect("readable").0)
        .collect();
    assert_eq!(range, [b"a".to_vec()]);

    let mut txn = Txn::new(store.db(), store.state().expect("a state"));
    txn.delete_prefix(b"");
    assert!(txn.scan_prefix(b"").is_empty());
    store
        .write_applied(txn.into_batch().expect("a batch"), at(4), None)
        .expect("written");
    assert!(rows(&store.view().expect("a view")).is_empty());
}

#[test]
fn a_prefix_ends_where_the_next_begins() {
    assert_eq!(successor(b"ab"), Some(b"ac".to_vec()));
    assert_eq!(successor(&[1, 255]), Some(vec![2]));
    assert_eq!(successor(&[255, 255]), None);
    assert_eq!(successor(b""), None);
}

#[test]
fn a_view_outlives_the_state_that_a_snapshot_replaces() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = store(dir.path());
    let mut txn = Txn::new(store.db(), store.state().expect("a state"));
    txn.put(b"old", b"1");
    store
        .write_applied(
            txn.into_batch().expect("a batch"),
            Position { index: 2, term: 1 },
            None,
        )
        .expect("written");
    let before = store.view().expect("a view");
    let generation = store.begin_generation().expect("a generation");
    store
        .fill_generation(generation, &[(b"new", b"2")])
        .expect("filled");
    store.flush_generation(generation).expect("flushed");
    let conf = before.conf().clone();
    let hard_state = store.hard_state().expect("a hard state");
    store
        .install(
            generation,
            Position { index: 9, term: 3 },
            &conf,
            &hard_state,
        )
        .expect("installed");
    assert_eq!(rows(&before), [(b"old".to_vec(), b"1".to_vec())]);
    let after = store.view().expect("a view");
    assert_eq!(
        (rows(&after), after.applied()),
        (vec![(b"new".to_vec(), b"2".to_vec())], 9)
    );
}

/// Extensions of the files under `dir` that contain `bytes`.
fn found_in(dir: &Path, bytes: &[u8]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for file in std::fs::read_dir(dir).expect("a directory") {
        let path = file.expect("a file").path();
        if path.is_dir() {
            found.extend(found_in(&path, bytes));
        }
        // One that was removed meanwhile holds nothing any more.
        let content = std::fs::read(&path).unwrap_or_default();
        if content.windows(bytes.len()).any(|part| part == bytes) {
            let extension = path.extension().unwrap_or_default();
            found.insert(extension.to_string_lossy().into_owned());
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_values_leave_the_disk_of_every_member() {
    let mut cluster = Cluster::start(3, |_| {});
    let secret = b"Aktenzeichen-4711-geheim";
    cluster.propose(set("doc/1", secret)).await;
    cluster.propose(set("keep", b"1")).await;
    cluster.converge().await;
    for id in 1..=3 {
        let dir = cluster.config(id).dir;
        assert!(
            found_in(&dir, secret).contains("log"),
            "the scan finds it in the write-ahead log"
        );
        // Everything is written out once, so that the secret lies in the state's files too.
        cluster.replica(id).forget_log().await.expect("forgotten");
        assert!(
            found_in(&dir, secret).contains("sst"),
            "the scan finds it in the state's files"
        );
    }
    cluster.propose(set("doc/2", secret)).await;
    cluster.propose(b"del doc/".to_vec()).await;
    cluster.converge().await;
    for id in 1..=3 {
        let replica = cluster.replica(id);
        replica.compact_prefix(b"doc/").await.expect("compacted");
        replica.forget_log().await.expect("forgotten");
        let dir = cluster.config(id).dir;
        // RocksDB removes rewritten files in the background.
        eventually(|| found_in(&dir, secret).is_empty().then_some(())).await;
        // Once more, with nothing left to forget.
        replica.forget_log().await.expect("forgotten");
    }
    // What is left is enough to start again from, and to go on.
    for id in 1..=3 {
        cluster.stop_node(id).await;
    }
    for id in 1..=3 {
        cluster.start_node(id);
    }
    cluster.propose(set("after", b"1")).await;
    let state = cluster.converge().await;
    let keys: Vec<_> = state.into_keys().collect();
    assert_eq!(keys, [b"after".to_vec(), b"keep".to_vec()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_view_still_shows_is_not_called_erased() {
    let cluster = Cluster::start(1, |_| {});
    let secret = b"Aktenzeichen-4712-geheim";
    cluster.propose(set("doc/1", secret)).await;
    let replica = cluster.replica(1);
    replica.forget_log().await.expect("forgotten");
    let view = replica.local_view();
    cluster.propose(b"del doc/".to_vec()).await;
    let compacting = tokio::spawn({
        let replica = replica.clone();
        async move { replica.compact_prefix(b"doc/").await }
    });
    // It cannot be over while the view stands, however long this takes.
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert!(!compacting.is_finished());
    }
    assert_eq!(
        view.get(b"doc/1").expect("readable").as_deref(),
        Some(&secret[..])
    );
    drop(view);
    compacting.await.expect("no panic").expect("compacted");
    replica.forget_log().await.expect("forgotten");
    let dir = cluster.config(1).dir;
    eventually(|| found_in(&dir, secret).is_empty().then_some(())).await;
}

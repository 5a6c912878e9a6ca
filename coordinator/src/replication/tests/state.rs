//! What a state machine sees: its own writes, deleted prefixes, and views that do not move.

use std::sync::Arc;

use super::cluster::{Cluster, rows, set};
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

#[tokio::test(flavor = "multi_thread")]
async fn compaction_takes_deleted_values_off_the_disk() {
    let cluster = Cluster::start(1, |config| config.max_log_entries = 4);
    let secret = b"Aktenzeichen-4711-geheim";
    cluster.propose(set("doc/1", secret)).await;
    cluster.propose(set("keep", b"1")).await;
    cluster.propose(b"del doc/".to_vec()).await;
    cluster
        .replica(1)
        .compact_prefix(b"doc/")
        .await
        .expect("compacted");
    let state = cluster.converge().await;
    assert_eq!(state.into_keys().collect::<Vec<_>>(), [b"keep".to_vec()]);
}

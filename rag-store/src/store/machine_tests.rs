//! The state machine on a plain map: each case is a run of commands with the replies it must give.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::crypto::Key;

#[derive(Clone, Default, PartialEq, Debug)]
struct MapState(BTreeMap<Vec<u8>, Vec<u8>>);

impl State for MapState {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.get(key).cloned()
    }

    fn put(&mut self, key: &[u8], value: &[u8]) {
        self.0.insert(key.to_vec(), value.to_vec());
    }

    fn delete(&mut self, key: &[u8]) {
        self.0.remove(key);
    }

    fn delete_prefix(&mut self, prefix: &[u8]) {
        self.0.retain(|key, _| !key.starts_with(prefix));
    }

    fn keys(&self, prefix: &[u8]) -> Vec<Vec<u8>> {
        self.0
            .keys()
            .filter(|key| key.starts_with(prefix))
            .cloned()
            .collect()
    }
}

fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

fn sealed(text: &str) -> Sealed {
    Sealed::from_stored(text.as_bytes().to_vec())
}

fn col(n: u8) -> CollectionId {
    CollectionId::from_bytes([n; 16])
}

fn doc(n: u8) -> DocumentId {
    DocumentId::from_bytes([n; 16])
}

fn create(n: u8, name: u8) -> Command {
    Command::CreateCollection {
        id: col(n),
        name_tag: [name; 16],
        created_ms: 1,
        about: sealed("about"),
    }
}

fn begin(n: u8, collection: u8, parts: u32) -> Command {
    Command::BeginDocument {
        id: doc(n),
        collection: col(collection),
        created_ms: 2,
        bytes: 10,
        parts,
        wrapped_key: sealed("key"),
        about: sealed("about"),
    }
}

fn part(n: u8, part: u32) -> Command {
    Command::Part {
        document: doc(n),
        part,
        sealed: sealed("part"),
    }
}

fn commit(n: u8) -> Command {
    Command::CommitDocument { document: doc(n) }
}

fn start(n: u8, attempt: u64) -> Command {
    Command::StartIngestion {
        document: doc(n),
        attempt,
    }
}

fn chunks(n: u8, attempt: u64, ordinals: std::ops::Range<u32>) -> Command {
    Command::Chunks {
        document: doc(n),
        attempt,
        chunks: ordinals.map(|o| (o, sealed("chunk"))).collect(),
    }
}

fn ready(n: u8, attempt: u64, count: u32, last: std::ops::Range<u32>) -> Command {
    let last = last.map(|o| (o, sealed("chunk"))).collect();
    Command::Ready {
        document: doc(n),
        attempt,
        pages: Some(3),
        count,
        last,
    }
}

fn fail(n: u8, attempt: u64) -> Command {
    Command::Fail {
        document: doc(n),
        attempt,
        reason: sealed("why"),
    }
}

fn delete(n: u8) -> Command {
    Command::DeleteDocument { document: doc(n) }
}

/// Applies as tenant "a" and checks each reply.
fn run(state: &mut MapState, steps: Vec<(Command, Reply)>) {
    for (at, (command, expected)) in steps.into_iter().enumerate() {
        let reply = apply(
            Entry {
                tenant: tenant("a"),
                command: command.clone(),
            },
            state,
        );
        assert_eq!(reply, expected, "step {at}: {command:?}");
    }
}

fn record(state: &MapState, n: u8) -> Option<DocumentRecord> {
    decode(state.get(&keys::document(&tenant("a"), doc(n))))
}

fn documents(state: &MapState, n: u8) -> Option<u64> {
    decode::<CollectionRecord>(state.get(&keys::collection(&tenant("a"), col(n))))
        .map(|r| r.documents)
}

#[test]
fn a_document_becomes_ready_step_by_step_and_every_step_may_come_twice() {
    use Reply::{Done, Incomplete};
    let mut state = MapState::default();
    run(
        &mut state,
        vec![
            (create(1, 1), Done),
            (create(1, 1), Done),
            (begin(1, 1, 2), Done),
            (begin(1, 1, 2), Done),
            (part(1, 1), Done),
            (commit(1), Incomplete),
            (part(1, 0), Done),
            (part(1, 0), Done),
            (commit(1), Done),
            (commit(1), Done),
            (start(1, 7), Done),
            (chunks(1, 7, 0..2), Done),
            (chunks(1, 7, 0..2), Done),
            (ready(1, 7, 4, 2..3), Incomplete),
            (ready(1, 7, 3, 2..3), Done),
            (ready(1, 7, 3, 2..3), Done),
        ],
    );
    let record = record(&state, 1).unwrap();
    assert_eq!(
        (record.stage, record.permille, record.pages, record.chunks),
        (Stage::Ready, 1000, Some(3), 3)
    );
    assert_eq!(documents(&state, 1), Some(1));
    assert!(state.keys(&keys::unfinished_all(&tenant("a"))).is_empty());
}

#[test]
fn what_does_not_fit_the_state_is_refused_and_changes_nothing() {
    use Reply::{Done, Exists, Malformed, NotFound, Stale};
    let mut state = MapState::default();
    run(
        &mut state,
        vec![
            (create(1, 1), Done),
            (create(2, 1), Exists),
            (create(1, 2), Exists),
            (begin(1, 9, 1), NotFound),
            (begin(1, 1, 0), Malformed),
            (begin(1, 1, MAX_PARTS + 1), Malformed),
            (part(1, 0), NotFound),
            (commit(1), NotFound),
            (delete(1), NotFound),
            (Command::DeleteCollection { id: col(9) }, NotFound),
            (begin(1, 1, 1), Done),
            (part(1, 1), Malformed),
            (start(1, 1), Stale),
            (fail(1, 0), Stale),
            (part(1, 0), Done),
            (commit(1), Done),
            (chunks(1, 0, 0..1), Stale),
            (start(1, 1), Done),
            (fail(1, 2), Stale),
        ],
    );
    let before = state.clone();
    run(
        &mut state,
        vec![
            (ready(1, 2, 0, 0..0), Stale),
            (chunks(1, 9, 0..5), Stale),
            (ready(1, 1, 5, 0..0), Reply::Incomplete),
        ],
    );
    assert_eq!(state, before);
}

#[test]
fn a_later_attempt_begins_without_the_chunks_of_an_earlier_one_and_overtakes_it() {
    use Reply::{Done, Stale};
    let mut state = MapState::default();
    run(
        &mut state,
        vec![
            (create(1, 1), Done),
            (begin(1, 1, 1), Done),
            (part(1, 0), Done),
            (commit(1), Done),
            (start(1, 1), Done),
            (chunks(1, 1, 0..9), Done),
            (start(1, 2), Done),
            (chunks(1, 1, 0..9), Stale),
            (ready(1, 2, 1, 0..1), Done),
            (ready(1, 1, 1, 0..1), Stale),
            (start(1, 3), Stale),
        ],
    );
    assert_eq!(state.keys(&keys::chunks(&tenant("a"), doc(1))).len(), 1);
}

#[test]
fn a_failed_document_keeps_its_original_and_reason_but_no_chunks() {
    use Reply::Done;
    let mut state = MapState::default();
    run(
        &mut state,
        vec![
            (create(1, 1), Done),
            (begin(1, 1, 1), Done),
            (part(1, 0), Done),
            (commit(1), Done),
            (start(1, 1), Done),
            (chunks(1, 1, 0..3), Done),
            (fail(1, 1), Done),
        ],
    );
    let record = record(&state, 1).unwrap();
    assert_eq!(
        (record.stage, record.failure),
        (Stage::Failed, Some(sealed("why")))
    );
    assert!(state.keys(&keys::chunks(&tenant("a"), doc(1))).is_empty());
    assert_eq!(state.keys(&keys::originals(&tenant("a"), doc(1))).len(), 1);
}

#[test]
fn deleting_at_any_stage_leaves_nothing_of_the_document_and_what_follows_finds_nothing() {
    use Reply::{Done, NotFound};
    let way = [
        begin(1, 1, 1),
        part(1, 0),
        commit(1),
        start(1, 1),
        chunks(1, 1, 0..2),
        ready(1, 1, 2, 0..0),
    ];
    for stages in 1..=way.len() {
        let mut state = MapState::default();
        run(&mut state, vec![(create(1, 1), Done)]);
        let empty = state.clone();
        run(
            &mut state,
            way[..stages].iter().map(|c| (c.clone(), Done)).collect(),
        );
        run(&mut state, vec![(delete(1), Done)]);
        assert_eq!(state, empty, "after {stages} stages");
        run(
            &mut state,
            way[1..].iter().map(|c| (c.clone(), NotFound)).collect(),
        );
        assert_eq!(
            state, empty,
            "after {stages} stages, and the rest of the way"
        );
    }
}

#[test]
fn deleting_a_collection_destroys_keys_at_once_and_sweeping_the_rest() {
    use Reply::{Done, NotFound};
    let mut state = MapState::default();
    run(&mut state, vec![(create(1, 1), Done), (create(2, 2), Done)]);
    for n in 1..=3 {
        let collection = if n == 3 { 2 } else { 1 };
        run(
            &mut state,
            vec![
                (begin(n, collection, 1), Done),
                (part(n, 0), Done),
                (commit(n), Done),
            ],
        );
    }
    run(
        &mut state,
        vec![(Command::DeleteCollection { id: col(1) }, Done)],
    );
    let a = tenant("a");
    assert_eq!(
        state.keys(&keys::data_keys(&a)),
        [keys::data_key(&a, doc(3))]
    );
    assert!(record(&state, 1).is_none() && record(&state, 3).is_some());
    let documents = vec![doc(1), doc(2), doc(3)];
    run(
        &mut state,
        vec![(Command::Sweep { documents }, Done), (delete(3), Done)],
    );
    run(
        &mut state,
        vec![
            (Command::DeleteCollection { id: col(2) }, Done),
            (begin(4, 1, 1), NotFound),
        ],
    );
    assert_eq!(state, MapState::default(), "nothing is left of either");
}

#[test]
fn the_first_tenant_key_stays() {
    let mut state = MapState::default();
    let first = Command::EnsureTenant {
        wrapped_key: sealed("first"),
    };
    let second = Command::EnsureTenant {
        wrapped_key: sealed("second"),
    };
    run(
        &mut state,
        vec![
            (first, Reply::TenantKey(sealed("first"))),
            (second, Reply::TenantKey(sealed("first"))),
        ],
    );
}

#[test]
fn unreadable_entries_are_answered_not_feared() {
    let mut state = MapState::default();
    for bytes in [&b""[..], b"\xff\xff\xff", b"\x01a\x63", &[0; 100]] {
        assert_eq!(
            postcard::from_bytes::<Reply>(&apply_bytes(bytes, &mut state)),
            Ok(Reply::Malformed)
        );
    }
    assert_eq!(state, MapState::default());
}

fn any_command() -> impl Strategy<Value = Command> {
    let (n, c) = (1u8..4, 1u8..3);
    prop_oneof![
        (c.clone(), 1u8..3).prop_map(|(n, name)| create(n, name)),
        c.clone()
            .prop_map(|n| Command::DeleteCollection { id: col(n) }),
        (n.clone(), c, 1u32..3).prop_map(|(n, c, parts)| begin(n, c, parts)),
        (n.clone(), 0u32..3).prop_map(|(n, p)| part(n, p)),
        n.clone().prop_map(commit),
        (n.clone(), 0u64..3).prop_map(|(n, a)| start(n, a)),
        (n.clone(), 0u64..3, 0u32..4).prop_map(|(n, a, count)| chunks(n, a, 0..count)),
        (n.clone(), 0u64..3, 0u32..4).prop_map(|(n, a, count)| ready(n, a, count, 0..count)),
        (n.clone(), 0u64..3).prop_map(|(n, a)| fail(n, a)),
        n.clone().prop_map(delete),
        n.prop_map(|n| Command::Sweep {
            documents: vec![doc(n)]
        }),
    ]
}

proptest! {
    #[test]
    fn a_tenants_commands_never_touch_another_tenants_keys(commands in proptest::collection::vec(any_command(), 1..60)) {
        let mut both = MapState::default();
        let mut alone = MapState::default();
        for (at, command) in commands.into_iter().enumerate() {
            // "a" and "a-b" share a beginning, which a careless prefix scan would mix up.
            let owner = if at % 2 == 0 { tenant("a") } else { tenant("a-b") };
            let reply = apply(Entry { tenant: owner.clone(), command: command.clone() }, &mut both);
            if at % 2 == 0 {
                prop_assert_eq!(reply, apply(Entry { tenant: owner, command }, &mut alone));
            }
        }
        let of_a = MapState(both.0.into_iter().filter(|(key, _)| key.starts_with(b"a\0")).collect());
        prop_assert_eq!(of_a, alone);
    }

    #[test]
    fn counts_marks_and_keys_agree_with_the_documents_after_any_commands(
        commands in proptest::collection::vec(any_command(), 1..80),
    ) {
        let mut state = MapState::default();
        let a = tenant("a");
        for command in commands {
            apply(Entry { tenant: a.clone(), command }, &mut state);
            let mut counts: BTreeMap<CollectionId, u64> = BTreeMap::new();
            for n in 1..4 {
                let there = record(&state, n);
                prop_assert_eq!(state.get(&keys::data_key(&a, doc(n))).is_some(), there.is_some());
                let unfinished = there.as_ref().is_some_and(|r| !matches!(r.stage, Stage::Ready | Stage::Failed));
                prop_assert_eq!(state.get(&keys::unfinished(&a, doc(n))).is_some(), unfinished);
                if let Some(record) = there {
                    prop_assert!(state.get(&keys::collection(&a, record.collection)).is_some());
                    prop_assert!(state.get(&keys::member(&a, record.collection, doc(n))).is_some());
                    *counts.entry(record.collection).or_default() += u64::from(record.stage != Stage::Uploading);
                    let stored = state.keys(&keys::chunks(&a, doc(n))).len();
                    prop_assert_eq!(stored, record.chunks as usize);
                }
            }
            for n in 1..3 {
                if let Some(stored) = documents(&state, n) {
                    prop_assert_eq!(stored, counts.get(&col(n)).copied().unwrap_or(0));
                }
            }
        }
    }

    #[test]
    fn entries_come_back_from_their_bytes(command in any_command()) {
        let entry = Entry { tenant: tenant("a"), command };
        prop_assert_eq!(postcard::from_bytes::<Entry>(&encode(&entry)), Ok(entry));
    }
}

#[test]
fn replicas_that_apply_the_same_entries_hold_the_same_bytes() {
    let key = Key::generate();
    let entries: Vec<Vec<u8>> = [create(1, 1), begin(1, 1, 1), part(1, 0), commit(1)]
        .into_iter()
        .chain([Command::EnsureTenant {
            wrapped_key: key.seal(b"", b"key"),
        }])
        .map(|command| {
            encode(&Entry {
                tenant: tenant("a"),
                command,
            })
        })
        .collect();
    let replica = || {
        let mut state = MapState::default();
        let replies: Vec<_> = entries
            .iter()
            .map(|entry| apply_bytes(entry, &mut state))
            .collect();
        (state, replies)
    };
    assert_eq!(replica(), replica());
}

//! Both arms on small corpora: what is found, what is filtered, and that order of arrival does not matter.

use half::f16;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::vectors::Vectors;
use super::*;
use crate::retrieve::fuse;

/// Of 38 example questions.
const FOUND_BY_WORDS: usize = 34;

fn col(n: u8) -> CollectionId {
    CollectionId::from_bytes([n; 16])
}

fn doc(n: u8) -> DocumentId {
    DocumentId::from_bytes([n; 16])
}

fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

/// A few components that depend on the letters, so that texts differ in direction.
fn vector(text: &str) -> Vec<f32> {
    let mut v = vec![0.01f32; 16];
    text.bytes().for_each(|b| v[usize::from(b) % 16] += 1.0);
    let length = v.iter().map(|x| x * x).sum::<f32>().sqrt();
    v.into_iter().map(|x| x / length).collect()
}

fn document(n: u8, collection: u8, name: &str, texts: &[&str]) -> IndexedDocument {
    let chunk = |text: &&str| ChunkRecord {
        page: None,
        title: String::new(),
        heading: String::new(),
        text: (*text).to_owned(),
        vector: vector(text)
            .into_iter()
            .map(|x| f16::from_f32(x).to_bits())
            .collect(),
    };
    IndexedDocument {
        id: doc(n),
        collection: col(collection),
        name: name.into(),
        chunks: texts.iter().map(chunk).collect(),
    }
}

fn town() -> Vec<IndexedDocument> {
    vec![
        document(
            1,
            1,
            "hundesteuersatzung.md",
            &[
                "§ 1 Steuergegenstand: das Halten von Hunden im Stadtgebiet.",
                "§ 5 Die Steuer beträgt für den ersten Hund 96 Euro.",
            ],
        ),
        document(
            2,
            1,
            "parkordnung.md",
            &[
                "Bewohnerparkausweise kosten 30,70 Euro im Jahr.",
                "Falschparken wird geahndet.",
            ],
        ),
        document(
            3,
            2,
            "homeoffice.md",
            &["Mobiles Arbeiten ist an zwei Tagen je Woche möglich."],
        ),
    ]
}

fn texts(
    indexes: &Indexes,
    owner: &str,
    query: &str,
    permitted: Option<&[CollectionId]>,
) -> Vec<(u8, u32)> {
    let arms = indexes
        .search(&tenant(owner), query, None, permitted, 10)
        .unwrap();
    arms.text
        .iter()
        .map(|(c, _)| (c.document.bytes()[0], c.ordinal))
        .collect()
}

fn filled() -> Indexes {
    let indexes = Indexes::default();
    indexes.update(&tenant("a"), &[], &town()).unwrap();
    indexes
}

#[test]
fn words_are_found_in_other_forms_in_compounds_and_by_section_number() {
    let indexes = filled();
    for (query, first) in [
        ("Was kostet ein Parkausweis für Bewohner?", (2, 0)),
        ("Hundesteuer", (1, 1)),
        ("steuergegenstände", (1, 0)),
        ("§ 5 Hundesteuersatzung", (1, 1)),
        ("Arbeit mobil", (3, 0)),
        ("Falschparker", (2, 1)),
    ] {
        assert_eq!(
            texts(&indexes, "a", query, None).first(),
            Some(&first),
            "{query}"
        );
    }
    assert!(texts(&indexes, "a", "der die und", None).is_empty());
    assert!(texts(&indexes, "a", "Quantenphysik", None).is_empty());
    assert!(texts(&indexes, "a", "", None).is_empty());
}

#[test]
fn words_without_umlauts_and_parts_of_longer_compounds_are_found() {
    let indexes = Indexes::default();
    let documents = [
        document(
            1,
            1,
            "gebuehren.md",
            &[
                "Die Verwaltungsgebühr für eine Änderung beträgt 20 Euro.",
                "Die Steuer wird jährlich fällig.",
            ],
        ),
        document(
            2,
            1,
            "parken.md",
            &["Der Bewohnerparkausweis gilt ein Jahr."],
        ),
        document(3, 1, "hund.md", &["Die Hundesteuermarke ist zu tragen."]),
    ];
    indexes.update(&tenant("a"), &[], &documents).unwrap();
    for (query, first) in [
        ("Verwaltungsgebuehr", (1, 0)),
        ("Aenderung", (1, 0)),
        ("faellig", (1, 1)),
        ("Steuer", (1, 1)),
        ("Parkausweis", (2, 0)),
        ("Steuermarke", (3, 0)),
    ] {
        assert_eq!(
            texts(&indexes, "a", query, None).first(),
            Some(&first),
            "{query}"
        );
    }
}

#[test]
fn chunks_of_headings_alone_are_not_indexed_unless_the_document_says_nothing_else() {
    let indexes = Indexes::default();
    let under = |heading: &str, text: &str| ChunkRecord {
        heading: heading.into(),
        ..document(9, 1, "x.md", &[text]).chunks.remove(0)
    };
    let statute = IndexedDocument {
        chunks: vec![
            under("Satzung › § 2 Umfang", "Satzung\n\n§ 2 Umfang"),
            under("Satzung › § 2 Umfang", "Der Umfang der Steuer."),
        ],
        ..document(1, 1, "satzung.md", &[])
    };
    let notice = IndexedDocument {
        chunks: vec![under("Sperrung der Brücke", "Sperrung der Brücke")],
        ..document(2, 1, "aushang.md", &[])
    };
    indexes
        .update(&tenant("a"), &[], &[statute, notice])
        .unwrap();
    assert_eq!(indexes.chunks(), 2);
    assert_eq!(texts(&indexes, "a", "Umfang", None), [(1, 1)]);
    assert_eq!(texts(&indexes, "a", "Brücke gesperrt", None), [(2, 0)]);
}

#[test]
fn equal_scores_come_in_the_order_of_the_chunks_whatever_was_indexed_first() {
    let text = &["Die Gemeinde regelt dies."];
    let search = |order: [u8; 3]| {
        let indexes = Indexes::default();
        for n in order {
            let document = document(n, 1, "x.md", text);
            indexes.update(&tenant("a"), &[], &[document]).unwrap();
        }
        indexes
            .search(&tenant("a"), "Gemeinde", Some(&vector(text[0])), None, 10)
            .unwrap()
    };
    let arms = search([1, 2, 3]);
    assert_eq!(arms, search([3, 1, 2]));
    for arm in [&arms.text, &arms.dense] {
        let order: Vec<u8> = arm.iter().map(|(c, _)| c.document.bytes()[0]).collect();
        assert_eq!(order, [1, 2, 3]);
    }
}

/// The example questions by words alone. The whole of retrieval, with vectors, is tested in ops/tests/answers.rs; here shows
/// what a change of German does to full text.
#[test]
fn full_text_alone_finds_most_passages_of_the_example_questions() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../ops/examples");
    let questions = std::fs::read_to_string(dir.join("questions.jsonl")).unwrap();
    let questions: Vec<serde_json::Value> = questions
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let names: std::collections::BTreeSet<&str> = questions
        .iter()
        .map(|q| q["document"].as_str().unwrap())
        .collect();
    let documents: Vec<IndexedDocument> = names
        .iter()
        .zip(1u8..)
        .map(|(name, n)| {
            let bytes = std::fs::read(dir.join(name)).unwrap();
            let read = crate::extract::extract(&bytes, name, "").unwrap();
            let record = |piece: crate::chunk::ChunkText| ChunkRecord {
                page: piece.page,
                title: read.title.clone(),
                heading: piece.heading.unwrap_or_default(),
                text: piece.text,
                vector: Vec::new(),
            };
            IndexedDocument {
                id: doc(n),
                collection: col(1),
                name: (*name).into(),
                chunks: crate::chunk::chunk(&read).into_iter().map(record).collect(),
            }
        })
        .collect();
    let indexes = Indexes::default();
    indexes.update(&tenant("a"), &[], &documents).unwrap();
    let found = questions
        .iter()
        .filter(|question| {
            let text = |key: &str| question[key].as_str().unwrap();
            let hits = texts(&indexes, "a", text("question"), None);
            hits.iter().take(3).any(|(n, ordinal)| {
                let document = &documents[usize::from(*n) - 1];
                document.name == text("document")
                    && document.chunks[*ordinal as usize]
                        .text
                        .contains(text("passage"))
            })
        })
        .count();
    println!("{found} of {}", questions.len());
    assert!(
        found >= FOUND_BY_WORDS,
        "only {found} of {}",
        questions.len()
    );
}

#[test]
fn only_permitted_collections_and_ones_own_tenant_are_searched() {
    let indexes = filled();
    assert!(texts(&indexes, "b", "Hund Steuer Euro", None).is_empty());
    assert!(texts(&indexes, "a", "Hund Euro", Some(&[col(2)])).is_empty());
    assert!(texts(&indexes, "a", "Hund Euro", Some(&[])).is_empty());
    assert_eq!(
        texts(&indexes, "a", "mobil Hund", Some(&[col(2)])),
        [(3, 0)]
    );
    let arms = indexes
        .search(
            &tenant("a"),
            "Hund",
            Some(&vector("Hund")),
            Some(&[col(2)]),
            10,
        )
        .unwrap();
    assert_eq!(
        arms.dense
            .iter()
            .map(|(c, _)| c.document)
            .collect::<Vec<_>>(),
        [doc(3)]
    );
    assert!(
        indexes
            .search(&tenant("b"), "Hund", Some(&vector("Hund")), None, 10)
            .unwrap()
            .dense
            .is_empty()
    );
}

#[test]
fn a_deleted_document_is_found_by_neither_arm_and_a_replaced_one_only_as_it_is_now() {
    let indexes = filled();
    indexes
        .update(
            &tenant("a"),
            &[doc(1)],
            &[document(
                2,
                1,
                "parkordnung.md",
                &["Elektroautos parken frei."],
            )],
        )
        .unwrap();
    let arms = indexes
        .search(
            &tenant("a"),
            "Hund Steuer Euro parken",
            Some(&vector("Hund")),
            None,
            10,
        )
        .unwrap();
    let found: Vec<_> = arms
        .text
        .iter()
        .chain(&arms.dense)
        .map(|(c, _)| (c.document, c.ordinal))
        .collect();
    assert!(found.contains(&(doc(2), 0)) && found.contains(&(doc(3), 0)));
    assert!(
        !found
            .iter()
            .any(|(d, ordinal)| *d == doc(1) || *ordinal == 1),
        "{found:?}"
    );
    assert_eq!(indexes.chunks(), 2);
    assert!(texts(&indexes, "a", "Falschparken", None).is_empty());
}

#[test]
fn indexes_built_at_once_answer_as_those_built_one_by_one() {
    let one_by_one = Indexes::default();
    for document in town() {
        one_by_one.update(&tenant("a"), &[], &[document]).unwrap();
    }
    let at_once = filled();
    for query in [
        "Hundesteuer Euro",
        "parken Woche Tage",
        "§ 5",
        "Was kostet der Hund?",
    ] {
        let search = |i: &Indexes| {
            i.search(&tenant("a"), query, Some(&vector(query)), None, 10)
                .unwrap()
        };
        let (a, b) = (search(&one_by_one), search(&at_once));
        assert_eq!(a, b, "{query}");
        assert_eq!(fuse(&a, 5), fuse(&b, 5), "{query}");
    }
}

fn random_unit(rng: &mut StdRng, dims: usize) -> Vec<f32> {
    let v: Vec<f32> = (0..dims).map(|_| rng.random_range(-1.0..1.0f32)).collect();
    let length = v.iter().map(|x| x * x).sum::<f32>().sqrt();
    v.into_iter().map(|x| x / length).collect()
}

fn half_row(v: &[f32]) -> Vec<f16> {
    v.iter().map(|x| f16::from_f32(*x)).collect()
}

#[test]
fn the_graph_finds_nearly_what_an_exact_scan_finds_also_after_removals_and_filtered() {
    let mut rng = StdRng::seed_from_u64(7);
    let (mut graph, mut exact) = (
        Vectors::with_exact_rows(200),
        Vectors::with_exact_rows(usize::MAX),
    );
    for key in 0..3_000u64 {
        let row = half_row(&random_unit(&mut rng, 32));
        assert!(graph.add(key, &row) && exact.add(key, &row));
    }
    for key in (0..3_000).step_by(7) {
        graph.remove(key);
        exact.remove(key);
    }
    let permitted = |key: u64| key.is_multiple_of(2);
    let (mut found, mut all) = (0, 0);
    for _ in 0..50 {
        let query = random_unit(&mut rng, 32);
        let want = exact.search(&query, 10, exact.rows(), permitted);
        let got = graph.search(&query, 10, graph.rows(), permitted);
        assert!(
            got.iter()
                .all(|(key, _)| permitted(*key) && !key.is_multiple_of(7))
        );
        all += want.len();
        found += want
            .iter()
            .filter(|(key, _)| got.iter().any(|(k, _)| k == key))
            .count();
    }
    assert_eq!(all, 500);
    assert!(found * 100 >= all * 95, "the graph found {found} of {all}");
}

proptest! {
    #[test]
    fn an_exact_scan_agrees_with_sorting_all_cosines(seed in 0u64..1000, removed in proptest::collection::vec(0u64..40, 0..30)) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut vectors = Vectors::default();
        let mut rows: HashMap<u64, Vec<f16>> = HashMap::new();
        for key in 0..40 {
            let row = half_row(&random_unit(&mut rng, 8));
            vectors.add(key, &row);
            rows.insert(key, row);
        }
        for key in removed {
            vectors.remove(key);
            rows.remove(&key);
        }
        let query = random_unit(&mut rng, 8);
        let cosine = |row: &[f16]| query.iter().zip(row).map(|(q, r)| q * r.to_f32()).sum::<f32>();
        let mut want: Vec<(u64, f32)> = rows.iter().map(|(key, row)| (*key, cosine(row))).collect();
        want.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        want.truncate(5);
        prop_assert_eq!(vectors.search(&query, 5, vectors.rows(), |_| true), want);
        prop_assert!(vectors.search(&query[..7], 5, vectors.rows(), |_| true).is_empty());
    }
}

#[test]
fn rows_of_another_length_are_refused_and_the_rest_still_found() {
    let mut vectors = Vectors::default();
    assert!(vectors.add(1, &half_row(&[1.0, 0.0])));
    assert!(!vectors.add(2, &half_row(&[1.0, 0.0, 0.0])));
    assert!(!vectors.add(3, &[]));
    assert_eq!(vectors.search(&[1.0, 0.0], 5, 1, |_| true), [(1, 1.0)]);
    vectors.remove(1);
    vectors.remove(1);
    assert!(
        vectors.add(4, &half_row(&[0.0, 1.0, 0.0])),
        "an empty index takes rows of any one length"
    );
}

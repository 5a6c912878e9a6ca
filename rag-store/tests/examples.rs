//! The example documents: every question's passage stands literally in a chunk of its document.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rag_store::chunk::{ChunkText, chunk};
use rag_store::extract::extract;
use serde_json::Value;

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../ops/examples")
}

/// Whether a file of the examples is a document; beside them lie the questions and settings.
fn is_document(path: &Path) -> bool {
    let kinds = ["pdf", "docx", "odt", "html", "md", "txt"];
    path.extension()
        .and_then(|ending| ending.to_str())
        .is_some_and(|ending| kinds.contains(&ending))
}

fn chunks() -> BTreeMap<String, Vec<ChunkText>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(examples()).expect("examples") {
        let path = entry.expect("entry").path();
        let name = path
            .file_name()
            .and_then(|n| n.to_str())
            .expect("name")
            .to_string();
        if is_document(&path) {
            let document = extract(&std::fs::read(&path).expect("bytes"), &name, "").expect(&name);
            let cut = chunk(&document);
            for piece in &cut {
                assert!(
                    document.page_text(piece.page).contains(&piece.text),
                    "{name}: not literal: {}",
                    piece.text
                );
            }
            all.insert(name, cut);
        }
    }
    all
}

#[test]
fn every_passage_is_in_one_chunk_of_its_document() {
    let chunks = chunks();
    let questions = std::fs::read_to_string(examples().join("questions.jsonl")).expect("questions");
    let questions: Vec<Value> = questions
        .lines()
        .map(|l| serde_json::from_str(l).expect("a question a line"))
        .collect();
    assert!(questions.len() >= 30);
    let mut wrong = Vec::new();
    for question in &questions {
        let text = |key: &str| {
            question[key]
                .as_str()
                .unwrap_or_else(|| panic!("{key} in {question}"))
        };
        assert!(!text("answer").is_empty() && !text("question").is_empty());
        let document = chunks
            .get(text("document"))
            .unwrap_or_else(|| panic!("{}", text("document")));
        let holding = document
            .iter()
            .filter(|c| c.text.contains(text("passage")))
            .count();
        if holding != 1 {
            wrong.push(format!(
                "{holding} chunks of {} hold {:?}",
                text("document"),
                text("passage")
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for document in chunks.keys() {
        assert!(
            questions.iter().any(|q| q["document"] == document.as_str()),
            "no question about {document}"
        );
    }
}

#[test]
fn sections_keep_their_headings_and_pages() {
    let chunks = chunks();
    let statute = &chunks["hundesteuersatzung.pdf"];
    let fine = statute
        .iter()
        .find(|c| c.text.contains("Geldbuße bis zu 5.000 Euro"))
        .expect("§ 13");
    assert!(
        fine.heading
            .as_deref()
            .is_some_and(|h| h.ends_with("§ 13 Ordnungswidrigkeiten")),
        "{:?}",
        fine.heading
    );
    assert_eq!(fine.page, Some(3));
    assert!(statute.iter().any(|c| c.page == Some(1)));
    let order = &chunks["dienstanweisung-mobile-arbeit.docx"];
    let heading = order
        .iter()
        .find(|c| c.text.contains("PO-17"))
        .and_then(|c| c.heading.clone());
    assert_eq!(
        heading.as_deref(),
        Some(
            "Dienstanweisung über mobile Arbeit in der Stadtverwaltung Amselbrück › § 4 Antrag und Genehmigung"
        )
    );
    let parking = &chunks["parkgebuehrenordnung.html"];
    assert!(
        parking
            .iter()
            .all(|c| !c.text.contains("Bewohnerparken") && !c.text.contains("document.title"))
    );
}

//! Where cuts fall, and that nothing is lost or invented.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn block(page: u32, path: &[&str], kind: BlockKind, text: &str) -> Block {
    let heading_path = path.iter().map(|h| h.to_string()).collect();
    Block {
        page: Some(page),
        heading_path,
        kind,
        text: text.to_string(),
    }
}

fn document(blocks: Vec<Block>) -> ExtractedDocument {
    ExtractedDocument {
        title: "T".into(),
        pages: Some(3),
        unread_pages: Vec::new(),
        blocks,
    }
}

fn words(count: usize, word: &str) -> String {
    vec![word; count].join(" ")
}

#[test]
fn a_section_is_one_chunk_with_its_headings() {
    let chunks = chunk(&document(vec![
        block(1, &[], BlockKind::Paragraph, "Vorwort."),
        block(1, &[], BlockKind::Heading(1), "Satzung"),
        block(1, &["Satzung"], BlockKind::Heading(2), "§ 1 Zweck"),
        block(
            1,
            &["Satzung", "§ 1 Zweck"],
            BlockKind::Paragraph,
            "Der Zweck.",
        ),
        block(
            1,
            &["Satzung", "§ 1 Zweck"],
            BlockKind::Paragraph,
            "Noch ein Satz.",
        ),
        block(1, &["Satzung"], BlockKind::Heading(2), "§ 2 Umfang"),
        block(
            2,
            &["Satzung", "§ 2 Umfang"],
            BlockKind::Paragraph,
            "Der Umfang.",
        ),
    ]));
    let got: Vec<(Option<u32>, Option<&str>, &str)> = chunks
        .iter()
        .map(|c| (c.page, c.heading.as_deref(), c.text.as_str()))
        .collect();
    assert_eq!(
        got,
        [
            (Some(1), None, "Vorwort."),
            (
                Some(1),
                Some("Satzung › § 1 Zweck"),
                "Satzung\n\n§ 1 Zweck\n\nDer Zweck.\n\nNoch ein Satz."
            ),
            (Some(1), Some("Satzung › § 2 Umfang"), "§ 2 Umfang"),
            (Some(2), Some("Satzung › § 2 Umfang"), "Der Umfang."),
        ]
    );
    assert!(
        chunks
            .iter()
            .enumerate()
            .all(|(i, c)| c.ordinal as usize == i)
    );
}

#[test]
fn long_sections_are_cut_evenly_between_sentences() {
    let sentence = format!("Es {} sehr.", words(18, "gilt"));
    let text = vec![sentence.as_str(); 13].join(" ");
    let chunks = chunk(&document(vec![block(1, &[], BlockKind::Paragraph, &text)]));
    let sizes: Vec<usize> = chunks
        .iter()
        .map(|c| c.text.split_whitespace().count())
        .collect();
    assert_eq!(sizes, [140, 120]);
    assert!(
        chunks
            .iter()
            .all(|c| c.text.starts_with("Es") && c.text.ends_with("sehr."))
    );
}

#[test]
fn sentences_do_not_end_at_abbreviations_and_ordinals() {
    let parts = split::split(
        "Nach § 5 Abs. 2 gilt das ab dem 1. Januar nicht. Danach schon.",
        Size {
            words: 12,
            tokens: 99,
        },
    );
    let texts: Vec<&str> = parts.iter().map(|(text, _)| *text).collect();
    assert_eq!(
        texts,
        [
            "Nach § 5 Abs. 2 gilt das ab dem 1. Januar nicht.",
            "Danach schon."
        ]
    );
}

#[test]
fn tables_are_cut_between_rows() {
    let rows: Vec<String> = (0..90).map(|i| format!("Gebühr {i} | {i},00 €")).collect();
    let chunks = chunk(&document(vec![block(
        1,
        &[],
        BlockKind::Table,
        &rows.join("\n"),
    )]));
    assert!(chunks.len() > 1);
    let back: Vec<&str> = chunks.iter().flat_map(|c| c.text.lines()).collect();
    assert_eq!(back, rows);
}

#[test]
fn a_word_of_a_megabyte_is_cut_into_allowed_pieces() {
    let text = "ä".repeat(100_000);
    let chunks = chunk(&document(vec![block(1, &[], BlockKind::Paragraph, &text)]));
    assert!(chunks.iter().all(|c| Size::of(&c.text).is_allowed()));
    assert_eq!(
        chunks.iter().map(|c| c.text.as_str()).collect::<String>(),
        text
    );
}

#[test]
fn headings_of_a_child_gone_wrong_are_cut_at_a_letter() {
    let path = ["ä".repeat(5_000), "unten".into()];
    let path: Vec<&str> = path.iter().map(String::as_str).collect();
    let chunks = chunk(&document(vec![block(
        1,
        &path,
        BlockKind::Paragraph,
        "Text",
    )]));
    let heading = chunks[0].heading.as_deref().unwrap_or_default();
    assert_eq!(heading.len(), MAX_HEADING_BYTES);
    assert!(heading.chars().all(|c| c == 'ä'));
}

fn any_block() -> impl Strategy<Value = Block> {
    let text = "[a-zA-ZäöüÄß0-9§.,;:|()\n 漢字😀-]{1,900}"
        .prop_filter("not blank", |t| !t.trim().is_empty());
    (1u32..4, text, 0u8..5).prop_map(|(page, text, kind)| {
        let kind = match kind {
            0 => BlockKind::Heading(2),
            1 => BlockKind::Table,
            2 => BlockKind::List,
            _ => BlockKind::Paragraph,
        };
        block(page, &["Oben"], kind, &text)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn chunks_are_literal_small_and_complete(mut blocks in prop::collection::vec(any_block(), 1..12)) {
        blocks.sort_by_key(|b| b.page);
        let document = document(blocks);
        let chunks = chunk(&document);
        let mut rest: BTreeMap<Option<u32>, String> = BTreeMap::new();
        for c in &chunks {
            prop_assert!(Size::of(&c.text).is_allowed());
            prop_assert!(!c.text.is_empty());
            let page = rest.entry(c.page).or_insert_with(|| document.page_text(c.page));
            // In order, each found behind the one before, with only white space skipped.
            let at = page.find(&c.text);
            prop_assert!(at.is_some());
            let at = at.unwrap_or(0);
            prop_assert!(page[..at].trim().is_empty());
            *page = page[at + c.text.len()..].to_string();
        }
        prop_assert!(rest.values().all(|left| left.trim().is_empty()));
    }
}

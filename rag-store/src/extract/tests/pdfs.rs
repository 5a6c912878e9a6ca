//! PDFs made for the purpose: layout, and structures that set traps.

use pdf_extract::{Dictionary, Document, Object, Stream, dictionary};

use super::BlockKind::{Heading, Paragraph, Table};
use super::*;

/// A page a string: lines of "x y size text" in points.
fn pdf(pages: &[&str]) -> Vec<u8> {
    let streams = pages.iter().map(|page| {
        let shown = page.lines().filter(|l| !l.trim().is_empty()).map(|line| {
            let mut parts = line.trim().splitn(4, ' ');
            let mut next = || parts.next().expect("x y size text");
            let (x, y, size, text) = (next(), next(), next(), next());
            let encoded: String = text
                .chars()
                .map(|c| format!("{:02x}", if c == '§' { 0xa7 } else { c as u32 }))
                .collect();
            format!("BT /F1 {size} Tf 1 0 0 1 {x} {y} Tm <{encoded}> Tj ET\n")
        });
        shown.collect::<String>()
    });
    save(streams.map(|s| s.into_bytes()).collect(), |_, _| {})
}

fn save(streams: Vec<Vec<u8>>, change: impl Fn(&mut Document, &mut Dictionary)) -> Vec<u8> {
    let mut document = Document::with_version("1.5");
    let tree = document.new_object_id();
    let font = document.add_object(dictionary! {
        "Type" => "Font", "Subtype" => "Type1", "BaseFont" => "Helvetica", "Encoding" => "WinAnsiEncoding",
    });
    let mut kids: Vec<Object> = Vec::new();
    for content in streams {
        let content = document.add_object(Stream::new(Dictionary::new(), content));
        let mut resources = dictionary! { "Font" => dictionary! { "F1" => font } };
        change(&mut document, &mut resources);
        kids.push(
            document
                .add_object(dictionary! {
                    "Type" => "Page", "Parent" => tree, "Contents" => content, "Resources" => resources,
                    "MediaBox" => vec![0.into(), 0.into(), 595.into(), 842.into()],
                })
                .into(),
        );
    }
    let count = i64::try_from(kids.len()).expect("few pages");
    document.objects.insert(
        tree,
        dictionary! { "Type" => "Pages", "Kids" => kids, "Count" => count }.into(),
    );
    let catalog = document.add_object(dictionary! { "Type" => "Catalog", "Pages" => tree });
    document.trailer.set("Root", catalog);
    let mut bytes = Vec::new();
    document.save_to(&mut bytes).expect("saved");
    bytes
}

#[test]
fn lines_become_headings_paragraphs_and_tables() {
    let first = "70 820 9 Stadt Amselbrueck
        70 780 18 Satzung
        70 740 11 § 1 Zweck
        70 726 11 Der Zweck dieser Satzung ist in jedem Fall klar, und zwar die Hunde-
        70 712 11 steuer, ihre E-
        70 698 11 mail-Adresse und die Park-
        70 684 11 und Halteverbote.
        70 650 11 Erster Hund
        300 650 11 96,00
        70 636 11 Zweiter Hund
        300 636 11 132,00
        280 30 9 Seite 1";
    let second = "70 820 9 Stadt Amselbrueck
        70 780 11 (1) Ein Absatz, der lang genug ist, dass seine Zeile bis an den rechten Rand
        70 766 11 reicht.
        70 752 11 (2) Noch einer.
        280 30 9 Seite 2";
    let document = read("a.pdf", &pdf(&[first, second])).expect("pdf");
    assert_eq!(
        blocks(&document),
        [
            (Some(1), Heading(1), "Satzung"),
            (Some(1), Heading(2), "§ 1 Zweck"),
            (
                Some(1),
                Paragraph,
                "Der Zweck dieser Satzung ist in jedem Fall klar, und zwar die Hundesteuer, ihre E-mail-Adresse und die Park- und Halteverbote."
            ),
            (Some(1), Table, "Erster Hund | 96,00\nZweiter Hund | 132,00"),
            (
                Some(2),
                Paragraph,
                "(1) Ein Absatz, der lang genug ist, dass seine Zeile bis an den rechten Rand reicht."
            ),
            (Some(2), Paragraph, "(2) Noch einer."),
        ]
    );
    assert_eq!(document.blocks[4].heading_path, ["Satzung", "§ 1 Zweck"]);
    assert_eq!((document.pages, document.unread_pages.len()), (Some(2), 0));
}

#[test]
fn a_page_without_text_is_a_scan() {
    assert_eq!(read("a.pdf", &pdf(&["", ""])), Err(ExtractError::NoText));
    let picture = save(
        vec![b"q 100 0 0 100 0 0 cm /Im Do Q".to_vec()],
        |document, resources| {
            let pixels = Stream::new(
                dictionary! { "Type" => "XObject", "Subtype" => "Image", "Width" => 4, "Height" => 4 },
                vec![7; 16],
            );
            let id = document.add_object(pixels);
            resources.set("XObject", dictionary! { "Im" => id });
        },
    );
    assert_eq!(read("a.pdf", &picture), Err(ExtractError::NoText));
}

#[test]
fn a_page_that_breaks_the_reader_costs_only_itself() {
    let good = b"BT /F1 11 Tf 70 700 Td (Lesbar) Tj ET".to_vec();
    let bad = b"BT /F9 11 Tf 70 700 Td (Ohne Schrift) Tj ET".to_vec();
    let document = read("a.pdf", &save(vec![good, bad.clone()], |_, _| {})).expect("one page");
    assert_eq!(blocks(&document), [(Some(1), Paragraph, "Lesbar")]);
    assert_eq!(document.unread_pages, [2]);
    assert!(matches!(
        read("a.pdf", &save(vec![bad], |_, _| {})),
        Err(ExtractError::Broken { .. })
    ));
}

#[test]
fn forms_that_draw_themselves_are_refused() {
    let content = b"/Fm Do".to_vec();
    let own = save(vec![content.clone()], |document, resources| {
        let id = document.new_object_id();
        let form = dictionary! {
            "Subtype" => "Form", "Resources" => dictionary! { "XObject" => dictionary! { "Fm" => id } },
        };
        document
            .objects
            .insert(id, Stream::new(form, b"/Fm Do".to_vec()).into());
        resources.set("XObject", dictionary! { "Fm" => id });
    });
    assert!(matches!(
        read("a.pdf", &own),
        Err(ExtractError::Broken { .. })
    ));
    // Without resources of its own it would look for itself in the page's.
    let inherited = save(vec![content], |document, resources| {
        let id = document.add_object(Stream::new(
            dictionary! { "Subtype" => "Form" },
            b"/Fm Do".to_vec(),
        ));
        resources.set("XObject", dictionary! { "Fm" => id });
    });
    assert!(matches!(
        read("a.pdf", &inherited),
        Err(ExtractError::Broken { .. })
    ));
}

#[test]
fn page_trees_that_contain_themselves_are_refused() {
    let mut document = Document::load_mem(&pdf(&["70 700 11 Text"])).expect("pdf");
    let (_, id) = document.get_pages().into_iter().next().expect("a page");
    document
        .get_object_mut(id)
        .and_then(Object::as_dict_mut)
        .expect("page")
        .set("Parent", id);
    let mut bytes = Vec::new();
    document.save_to(&mut bytes).expect("saved");
    assert!(matches!(
        read("a.pdf", &bytes),
        Err(ExtractError::Broken { .. })
    ));
}

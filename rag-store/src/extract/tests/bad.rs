//! Bad input: each kind gets its own error, and nothing panics.

use proptest::prelude::*;

use super::*;
use crate::chunk::chunk;

const PROTECTED_PDF: &[u8] = include_bytes!("../../../tests/fixtures/protected.pdf");
const RESTRICTED_PDF: &[u8] = include_bytes!("../../../tests/fixtures/restricted.pdf");
const STREAMS_PDF: &[u8] = include_bytes!("../../../tests/fixtures/streams.pdf");
const PROTECTED_DOCX: &[u8] = include_bytes!("../../../tests/fixtures/protected.docx");
const EXAMPLE_PDF: &[u8] = include_bytes!("../../../../ops/examples/niederschrift-stadtrat.pdf");
const EXAMPLE_DOCX: &[u8] =
    include_bytes!("../../../../ops/examples/dienstanweisung-mobile-arbeit.docx");
const EXAMPLE_ODT: &[u8] = include_bytes!("../../../../ops/examples/verwaltungsgebuehren.odt");
const EXAMPLE_HTML: &[u8] = include_bytes!("../../../../ops/examples/parkgebuehrenordnung.html");
const EXAMPLE_MD: &[u8] = include_bytes!("../../../../ops/examples/buerger-faq.md");

fn broken(result: Result<ExtractedDocument, ExtractError>) -> bool {
    matches!(result, Err(ExtractError::Broken { .. }))
}

#[test]
fn empty_files() {
    for name in ["a.txt", "a.pdf", "a.docx", "a.md", "a"] {
        assert_eq!(read(name, b""), Err(ExtractError::Empty), "{name}");
        assert_eq!(read(name, b" \r\n\t"), Err(ExtractError::Empty), "{name}");
    }
    assert_eq!(read("a.md", b"---\n***\n"), Err(ExtractError::Empty));
    assert_eq!(
        read("a.html", b"<html><script>x</script></html>"),
        Err(ExtractError::Empty)
    );
    assert_eq!(read("a.docx", &docx("<w:p/>")), Err(ExtractError::Empty));
    assert_eq!(read("a.odt", &odt("", "")), Err(ExtractError::Empty));
}

#[test]
fn protected_files() {
    assert_eq!(
        read("a.pdf", PROTECTED_PDF),
        Err(ExtractError::PasswordProtected)
    );
    assert_eq!(
        read("a.docx", PROTECTED_DOCX),
        Err(ExtractError::PasswordProtected)
    );
    let manifest = br#"<manifest:file-entry manifest:full-path="content.xml"><manifest:encryption-data/></manifest:file-entry>"#;
    let odt = package(&[
        ("mimetype", b"application/vnd.oasis.opendocument.text"),
        ("META-INF/manifest.xml", manifest),
        ("content.xml", b"\x8f\x02"),
    ]);
    assert_eq!(read("a.odt", &odt), Err(ExtractError::PasswordProtected));
}

#[test]
fn a_password_against_printing_and_compressed_objects_do_not_hinder_reading() {
    let plain = read("a.pdf", EXAMPLE_PDF).expect("example");
    assert_eq!(read("a.pdf", RESTRICTED_PDF).expect("restricted"), plain);
    assert_eq!(read("a.pdf", STREAMS_PDF).expect("streams"), plain);
}

#[test]
fn broken_files() {
    assert!(broken(read("a.pdf", b"kein PDF")));
    assert!(broken(read("a.pdf", b"%PDF-1.7\nkaputt")));
    assert!(broken(read("a.docx", b"kein ZIP")));
    assert!(broken(read("a.odt", b"kein ZIP")));
    assert!(broken(read("a.docx", b"PK\x03\x04 abgeschnitten")));
    assert!(broken(read(
        "a.docx",
        &EXAMPLE_DOCX[..EXAMPLE_DOCX.len() / 2]
    )));
    assert!(broken(read("a.odt", &EXAMPLE_ODT[..EXAMPLE_ODT.len() / 2])));
    assert!(broken(read("a.docx", &docx("<w:p><w:r></w:p>"))));
    assert!(broken(read(
        "a.docx",
        &package(&[("[Content_Types].xml", b"<x/>")])
    )));
    assert!(broken(read("a.txt", b"Text\0mit Nullen")));
    let half = read("a.pdf", &EXAMPLE_PDF[..EXAMPLE_PDF.len() / 2]);
    assert!(
        matches!(
            half,
            Err(ExtractError::Broken { .. } | ExtractError::NoText)
        ),
        "{half:?}"
    );
}

#[test]
fn unsupported_types_name_what_is_supported() {
    let got = |name: &str, bytes: &[u8]| match read(name, bytes) {
        Err(ExtractError::UnsupportedType { got, supported }) => {
            assert_eq!(supported, SUPPORTED);
            got
        }
        other => panic!("{name}: {other:?}"),
    };
    assert_eq!(got("a.png", b"\x89PNG\r\n\x1a\n"), "PNG");
    assert_eq!(got("bild.pdf", b"\xff\xd8\xff\xe0"), "JPEG");
    assert_eq!(got("a.rtf", b"{\\rtf1 Text}"), "RTF");
    assert_eq!(
        got("a.xlsx", &package(&[("xl/workbook.xml", b"<x/>")])),
        ".xlsx"
    );
    assert_eq!(got("a.zip", &package(&[("datei", b"x")])), ".zip");
    assert_eq!(
        got(
            "a.ods",
            &package(&[(
                "mimetype",
                b"application/vnd.oasis.opendocument.spreadsheet"
            )])
        ),
        ".ods"
    );
    assert_eq!(got("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1alt"), ".doc");
    assert_eq!(got("a.csv", b"a;b"), ".csv");
    assert_eq!(got("a", b"\x00\x01\x02"), "unbekannt");
    let error = read("a.csv", b"a;b").expect_err("unsupported");
    assert_eq!(
        error.message_de(),
        "Der Dateityp .csv wird nicht unterstützt. Möglich sind: .txt, .md, .html, .pdf, .docx, .odt."
    );
}

#[test]
fn content_decides_before_the_name() {
    assert_eq!(read("a.txt", EXAMPLE_PDF).expect("a PDF").pages, Some(2));
    assert_eq!(
        read("a.odt", EXAMPLE_DOCX).expect("a DOCX"),
        read("a.docx", EXAMPLE_DOCX).expect("a DOCX")
    );
    let by_type =
        extract(b"# Titel\n\nText", "upload", "text/markdown; charset=utf-8").expect("markdown");
    assert_eq!(by_type.blocks[0].kind, BlockKind::Heading(1));
}

#[test]
fn too_large_files_and_bombs() {
    let large = vec![b'x'; MAX_DOCUMENT_BYTES as usize + 1];
    let limit = ExtractError::TooLarge {
        limit: MAX_DOCUMENT_BYTES,
        got: MAX_DOCUMENT_BYTES + 1,
    };
    assert_eq!(read("a.txt", &large), Err(limit.clone()));
    assert_eq!(
        limit.message_de(),
        "Das Dokument ist zu groß (64,0 MB; erlaubt sind 64,0 MB). Bitte teilen Sie es in kleinere Dokumente auf."
    );
    let text = vec![b'x'; MAX_TEXT_BYTES + 1];
    assert!(matches!(
        read("a.txt", &text),
        Err(ExtractError::TooLarge { .. })
    ));
    let bomb = package(&[(
        "word/document.xml",
        &vec![b' '; MAX_PART_BYTES as usize + 1],
    )]);
    assert!(bomb.len() < 1 << 20, "{}", bomb.len());
    assert!(matches!(
        read("a.docx", &bomb),
        Err(ExtractError::TooLarge { .. })
    ));
    let names: Vec<String> = (0..=MAX_PACKAGE_ENTRIES).map(|i| format!("n{i}")).collect();
    let entries: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &b""[..])).collect();
    assert!(broken(read("a.docx", &package(&entries))));
    let entities = docx(r#"<w:p><w:r><w:t>&lol; Text</w:t></w:r></w:p>"#);
    assert_eq!(
        read("a.docx", &entities).expect("docx").blocks[0].text,
        "Text"
    );
}

/// What must hold of every document, however strange its file.
fn check(document: &ExtractedDocument) {
    assert!(!document.blocks.is_empty());
    assert!(document.blocks.iter().all(|b| !b.text.trim().is_empty()));
    for c in chunk(document) {
        assert!(document.page_text(c.page).contains(&c.text));
    }
}

/// Without the net that turns panics into errors.
fn read_bare(name: &str, bytes: &[u8]) {
    if let Ok(document) = super::super::read(bytes, name, "", &mut |_| {}) {
        check(&document);
    }
}

fn mutated(original: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    let edits = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..30);
    (edits, any::<prop::sample::Index>(), 0u8..4).prop_map(move |(edits, cut, kind)| {
        let mut bytes = original.to_vec();
        for (at, byte, how) in edits {
            let at = at.index(bytes.len());
            match how {
                0 => drop(bytes.remove(at)),
                1 => bytes.insert(at, byte),
                _ => bytes[at] = byte,
            }
        }
        if kind == 0 {
            bytes.truncate(cut.index(bytes.len()));
        }
        bytes
    })
}

/// A package of well-formed ZIP around damaged XML.
fn mutated_part(body: &'static str) -> impl Strategy<Value = Vec<u8>> {
    mutated(body.as_bytes())
}

const DOCX_BODY: &str = r#"<w:p><w:pPr><w:pStyle w:val="berschrift1"/></w:pPr><w:r><w:t>A</w:t></w:r></w:p><w:tbl><w:tr><w:tc>
    <w:p><w:r><w:t>B &amp; C</w:t><w:br w:type="page"/></w:r></w:p><w:tbl><w:tr><w:tc><w:p/></w:tc></w:tr></w:tbl></w:tc></w:tr></w:tbl>"#;
const ODT_BODY: &str = r#"<text:h text:outline-level="2">A</text:h><text:list><text:list-item><text:p>B<text:s text:c="9"/></text:p>
    </text:list-item></text:list><table:table><table:table-row><table:table-cell><text:p>C<text:soft-page-break/></text:p></table:table-cell></table:table-row></table:table>"#;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), name in "[a-zäöü./§]{0,12}") {
        for name in [name.as_str(), "a.txt", "a.md", "a.html"] {
            read_bare(name, &bytes);
        }
        // Damaged PDFs are read in a child only (tests/extract_child.rs): their parser is not ours.
        for name in ["a.docx", "a.odt"] {
            let _ = read(name, &[b"PK\x03\x04", bytes.as_slice()].concat());
        }
    }

    #[test]
    fn random_text_never_panics(text in "[#*\\-|>`\\[\\]() \n\taA1.§<>/=&;:!_~0-9ä]{0,300}") {
        for name in ["a.txt", "a.md", "a.html"] {
            read_bare(name, text.as_bytes());
        }
    }

    #[test]
    fn mutated_text_never_panics(html in mutated(EXAMPLE_HTML), md in mutated(EXAMPLE_MD)) {
        read_bare("a.html", &html);
        read_bare("a.md", &md);
    }

    #[test]
    fn mutated_packages_never_panic(docx_file in mutated(EXAMPLE_DOCX), odt_file in mutated(EXAMPLE_ODT)) {
        read_bare("a.docx", &docx_file);
        read_bare("a.odt", &odt_file);
    }

    #[test]
    fn mutated_parts_never_panic(word in mutated_part(DOCX_BODY), office in mutated_part(ODT_BODY)) {
        read_bare("a.docx", &docx(&String::from_utf8_lossy(&word)));
        read_bare("a.odt", &odt("", &String::from_utf8_lossy(&office)));
    }
}

#[test]
fn a_heading_of_megabytes_is_a_paragraph_and_goes_into_no_title_and_no_chunks_heading() {
    let line = "Verwaltungsgebührensatzung ".repeat(120_000);
    assert!(line.len() > 3_000_000);
    let text = format!("# {line}\n\nDer Text.\n");
    let document = read("gebuehren.md", text.as_bytes()).expect("markdown");
    assert_eq!(document.title, "gebuehren");
    assert_eq!(
        document.blocks.iter().map(|b| b.kind).collect::<Vec<_>>(),
        [BlockKind::Paragraph; 2]
    );
    let chunks = chunk(&document);
    assert!(chunks.len() > 1000);
    assert!(
        chunks
            .iter()
            .all(|c| c.heading.is_none() && c.text.len() < 4096)
    );
    for (length, kind) in [(300, BlockKind::Heading(1)), (301, BlockKind::Paragraph)] {
        let text = format!("# {}\n", "ä".repeat(length));
        let document = read("a.md", text.as_bytes()).expect("markdown");
        assert_eq!(document.blocks[0].kind, kind, "{length}");
    }
    let named = format!("{}.txt", "n".repeat(1000));
    assert_eq!(read(&named, b"Text").expect("text").title.len(), 300);
}

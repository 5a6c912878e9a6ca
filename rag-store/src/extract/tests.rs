//! What each format yields, and what bad input is told.

mod bad;
mod formats;
mod pdfs;

use std::io::Write;

use super::*;

fn read(name: &str, bytes: &[u8]) -> Result<ExtractedDocument, ExtractError> {
    extract(bytes, name, "")
}

/// Page, kind and text of every block.
fn blocks(document: &ExtractedDocument) -> Vec<(Option<u32>, BlockKind, &str)> {
    document
        .blocks
        .iter()
        .map(|b| (b.page, b.kind, b.text.as_str()))
        .collect()
}

fn package(parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, bytes) in parts {
        writer
            .start_file(*name, zip::write::SimpleFileOptions::default())
            .expect("part");
        writer.write_all(bytes).expect("bytes");
    }
    writer.finish().expect("package").into_inner()
}

fn docx(body: &str) -> Vec<u8> {
    let document = format!(r#"<w:document xmlns:w="w"><w:body>{body}</w:body></w:document>"#);
    let styles = r#"<w:styles xmlns:w="w">
        <w:style w:type="paragraph" w:styleId="berschrift1"><w:name w:val="heading 1"/></w:style>
        <w:style w:type="paragraph" w:styleId="Abschnitt"><w:basedOn w:val="berschrift1"/><w:pPr><w:outlineLvl w:val="1"/></w:pPr></w:style>
        <w:style w:type="paragraph" w:styleId="Kreis"><w:name w:val="Kreis"/><w:basedOn w:val="Kreis"/></w:style>
    </w:styles>"#;
    package(&[
        ("word/document.xml", document.as_bytes()),
        ("word/styles.xml", styles.as_bytes()),
    ])
}

fn odt(styles: &str, body: &str) -> Vec<u8> {
    let content = format!(
        "<office:document-content><office:automatic-styles>{styles}</office:automatic-styles>\
         <office:body><office:text>{body}</office:text></office:body></office:document-content>"
    );
    package(&[
        ("mimetype", b"application/vnd.oasis.opendocument.text"),
        ("content.xml", content.as_bytes()),
    ])
}

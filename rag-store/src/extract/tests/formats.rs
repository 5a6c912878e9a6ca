//! One document a format, with what is special about it.

use super::BlockKind::{Heading, List, Paragraph, Table};
use super::*;

#[test]
fn text_in_every_encoding() {
    let text = "Die Bürgermeisterin prüft die Gebühren für größere Hunde.";
    let utf16 = |bom: [u8; 2], bytes: fn(u16) -> [u8; 2]| {
        bom.into_iter()
            .chain(text.encode_utf16().flat_map(bytes))
            .collect::<Vec<u8>>()
    };
    let latin1: Vec<u8> = text.chars().map(|c| c as u8).collect();
    for bytes in [
        text.as_bytes().to_vec(),
        [b"\xef\xbb\xbf", text.as_bytes()].concat(),
        utf16([0xff, 0xfe], u16::to_le_bytes),
        utf16([0xfe, 0xff], u16::to_be_bytes),
        latin1,
    ] {
        assert_eq!(
            blocks(&read("a.txt", &bytes).expect("text")),
            [(None, Paragraph, text)]
        );
    }
    let windows = b"Geb\xfchr: 5 \x80 \x84heute\x93";
    assert_eq!(
        read("a.txt", windows).expect("text").blocks[0].text,
        "Gebühr: 5 € „heute“"
    );
}

#[test]
fn plain_text_has_headings_lists_and_pages() {
    let text = "SATZUNG\n\n§ 1 Zweck\nDer Zweck ist\nklar, siehe § 2 Abs. 1.\n§ 2 Abs. 1 gilt immer.\n\n- eins\n- zwei\n\x0cStand\n=====\nHeute.";
    let document = read("ordner/Satzung 2025.txt", text.as_bytes()).expect("text");
    assert_eq!(
        blocks(&document),
        [
            (Some(1), Heading(1), "SATZUNG"),
            (Some(1), Heading(3), "§ 1 Zweck"),
            (
                Some(1),
                Paragraph,
                "Der Zweck ist\nklar, siehe § 2 Abs. 1.\n§ 2 Abs. 1 gilt immer."
            ),
            (Some(1), List, "- eins\n- zwei"),
            (Some(2), Heading(1), "Stand"),
            (Some(2), Paragraph, "Heute."),
        ]
    );
    assert_eq!(document.blocks[2].heading_path, ["SATZUNG", "§ 1 Zweck"]);
    assert_eq!(
        (document.title.as_str(), document.pages),
        ("SATZUNG", Some(2))
    );
    assert_eq!(
        read("ordner/Satzung 2025.txt", b"Nur ein Satz.")
            .expect("text")
            .title,
        "Satzung 2025"
    );
}

#[test]
fn markdown_without_its_marks() {
    let text = "---\ntitel: x\n---\n# Rat *und* Hilfe\n\nEin [Verweis](http://example.org) und **fett**,\numbrochen.\n\n\
        1. eins\n2. zwei\n   - tief\n\n| Tag | Zeit |\n| --- | --- |\n| Mo | 8 |\n\n## Ende\n<script>x()</script>\n";
    let document = read("a.md", text.as_bytes()).expect("markdown");
    assert_eq!(
        blocks(&document),
        [
            (None, Heading(1), "Rat und Hilfe"),
            (None, Paragraph, "Ein Verweis und fett, umbrochen."),
            (None, List, "1. eins\n2. zwei\n- tief"),
            (None, Table, "Tag | Zeit\nMo | 8"),
            (None, Heading(2), "Ende"),
        ]
    );
}

#[test]
fn html_as_it_is_shown() {
    let html = "<html><head><title>Nein</title><style>p{}</style></head><body><nav>Start</nav><h1>Parken</h1>lose \
        <b>Worte</b><p>Ein\n  Absatz<br>mit Umbruch &amp; <span>mehr</span></p><div>Kasten<div>innen</div></div>\
        <ol start=3><li>drei<li><p>vier</p></ol><script>document.write('x')</script><p hidden>weg</p>\
        <table><tr><th>Zone<th>Preis<tr><td>I<td><p>1,20</p><table><tr><td>a<td>b</table></table></body></html>";
    let document = read("a.html", html.as_bytes()).expect("html");
    assert_eq!(
        blocks(&document),
        [
            (None, Heading(1), "Parken"),
            (None, Paragraph, "lose Worte"),
            (None, Paragraph, "Ein Absatz\nmit Umbruch & mehr"),
            (None, Paragraph, "Kasten"),
            (None, Paragraph, "innen"),
            (None, List, "3. drei\n4. vier"),
            (None, Table, "Zone | Preis\nI | 1,20 a b"),
        ]
    );
    assert_eq!(
        read("ohne-endung", html.as_bytes())
            .expect("sniffed")
            .blocks
            .len(),
        7
    );
}

#[test]
fn html_may_nest_deeper_than_any_stack() {
    let deep = format!(
        "<html>{}Text{}",
        "<div>".repeat(20_000),
        "</div>".repeat(20_000)
    );
    assert_eq!(
        read("a.html", deep.as_bytes()).expect("html").blocks[0].text,
        "Text"
    );
}

#[test]
fn docx_with_styles_tables_and_pages() {
    let body = r#"
        <w:p><w:pPr><w:pStyle w:val="berschrift1"/></w:pPr><w:r><w:t>Dienst</w:t></w:r><w:r><w:t xml:space="preserve">anweisung </w:t></w:r></w:p>
        <w:p><w:pPr><w:pStyle w:val="Kreis"/></w:pPr><w:r><w:t>Gilt</w:t><w:tab/><w:t>f&#252;r &lt;alle&gt;.</w:t></w:r>
          <w:del><w:r><w:delText>geloescht</w:delText></w:r></w:del><w:ins><w:r><w:t> Neu.</w:t></w:r></w:ins></w:p>
        <w:p><w:pPr><w:numPr><w:ilvl w:val="0"/><w:numId w:val="4"/></w:numPr></w:pPr><w:r><w:t>eins</w:t></w:r></w:p>
        <w:p><w:pPr><w:numPr><w:numId w:val="4"/></w:numPr></w:pPr><w:r><w:t>zwei</w:t></w:r></w:p>
        <w:p><w:pPr><w:pStyle w:val="Abschnitt"/></w:pPr><w:r><w:lastRenderedPageBreak/><w:t>§ 2 Umfang</w:t></w:r></w:p>
        <w:tbl><w:tr><w:tc><w:p><w:r><w:t>Gerät</w:t></w:r></w:p></w:tc><w:tc><w:p><w:r><w:t>Jahre</w:t></w:r></w:p></w:tc></w:tr>
          <w:tr><w:tc><w:p><w:r><w:t>Headset</w:t></w:r></w:p></w:tc><w:tc><w:p><w:r><w:lastRenderedPageBreak/><w:t>3</w:t></w:r></w:p><w:p><w:r><w:t>bis 4</w:t></w:r></w:p></w:tc></w:tr></w:tbl>
        <w:p><w:r><w:t>vorher</w:t><w:br w:type="page"/><w:t>nachher</w:t></w:r></w:p><w:sectPr><w:type w:val="nextPage"/></w:sectPr>"#;
    let document = read("a.docx", &docx(body)).expect("docx");
    assert_eq!(
        blocks(&document),
        [
            (Some(1), Heading(1), "Dienstanweisung"),
            (Some(1), Paragraph, "Gilt für <alle>. Neu."),
            (Some(1), List, "- eins\n- zwei"),
            (Some(2), Heading(2), "§ 2 Umfang"),
            (Some(2), Table, "Gerät | Jahre"),
            (Some(3), Table, "Headset | 3 bis 4"),
            (Some(3), Paragraph, "vorher"),
            (Some(4), Paragraph, "nachher"),
        ]
    );
    assert_eq!(
        document.blocks[5].heading_path,
        ["Dienstanweisung", "§ 2 Umfang"]
    );
    let unpaged = read("a.docx", &docx("<w:p><w:r><w:t>kurz</w:t></w:r></w:p>")).expect("docx");
    assert_eq!((unpaged.blocks[0].page, unpaged.pages), (None, None));
}

#[test]
fn odt_with_headings_tables_and_pages() {
    let styles = r#"<style:style style:name="P1" style:parent-style-name="Title"/>
        <style:style style:name="P2"><style:paragraph-properties fo:break-before="page"/></style:style>"#;
    let body = r#"<text:sequence-decls><text:p>nein</text:p></text:sequence-decls>
        <text:p text:style-name="P1">Gebühren</text:p>
        <text:h text:outline-level="2">1 Melde<text:span>wesen</text:span></text:h>
        <text:p>Ein<text:s text:c="3"/>Satz<office:annotation><text:p>Notiz</text:p></office:annotation><text:note><text:note-citation>1</text:note-citation><text:note-body><text:p>Fußnote</text:p></text:note-body></text:note> zu Ende.</text:p>
        <text:list><text:list-item><text:p>eins</text:p><text:p>mehr</text:p></text:list-item><text:list-item><text:p>zwei</text:p></text:list-item></text:list>
        <table:table><table:table-row><table:table-cell><text:p>Pass</text:p></table:table-cell><table:table-cell><text:p>70 €</text:p></table:table-cell></table:table-row></table:table>
        <text:p text:style-name="P2">Neue <text:soft-page-break/>Seite</text:p>"#;
    let document = read("a.odt", &odt(styles, body)).expect("odt");
    assert_eq!(
        blocks(&document),
        [
            (Some(1), Heading(1), "Gebühren"),
            (Some(1), Heading(2), "1 Meldewesen"),
            (Some(1), Paragraph, "Fußnote"),
            (Some(1), Paragraph, "Ein Satz zu Ende."),
            (Some(1), List, "- eins\nmehr\n- zwei"),
            (Some(1), Table, "Pass | 70 €"),
            (Some(2), Paragraph, "Neue"),
            (Some(3), Paragraph, "Seite"),
        ]
    );
}

#[test]
fn invisible_characters_ligatures_and_parts_of_umlauts() {
    let text =
        "Ver\u{ad}wal\u{200b}tung o\u{fb03}ziell gepru\u{308}ft,\u{a0}A\u{308}nderung\u{feff}";
    assert_eq!(
        read("a.txt", text.as_bytes()).expect("text").blocks[0].text,
        "Verwaltung offiziell geprüft, Änderung"
    );
}

#[test]
fn section_signs_open_sections_only_as_headings() {
    use super::structure::is_section_sign_heading as opens;
    for heading in [
        "§ 5 Steuersatz",
        "§5",
        "§ 12a Höhe der Gebühr",
        "§§ 3 Haftung",
        "Artikel 3 Inkrafttreten",
        "Anlage 2",
        "Abschnitt IV Schluss",
    ] {
        assert!(opens(heading), "{heading}");
    }
    for sentence in [
        "§ 5 Abs. 2 gilt.",
        "§ 5 gilt entsprechend",
        "§ 3 und § 4",
        "Artikel der Satzung",
        "§ a",
        "siehe § 5",
        "§ 7 Satz 1",
        "§ 2, soweit",
        "§",
    ] {
        assert!(!opens(sentence), "{sentence}");
    }
}

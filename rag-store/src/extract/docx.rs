//! DOCX: the main text with headings by style or outline level, tables row by row, pages where Word marked them.
//!
//! Left out: headers and footers, comments, deleted text of tracked changes, field codes.

use std::collections::HashMap;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use super::build::Builder;
use super::flow::{Flow, Kind};
use super::package::{attribute, broken_xml, open, part, resolve};
use super::{ExtractError, fold_line};

/// Elements whose content a reader does not see, or sees elsewhere.
const SKIPPED: [&str; 9] = [
    "del",
    "moveFrom",
    "Fallback",
    "instrText",
    "delText",
    "rPr",
    "tblPr",
    "pPrChange",
    "sectPrChange",
];
/// A style may be based on another; longer chains are cycles.
const MAX_STYLE_CHAIN: usize = 12;

pub(super) fn read(bytes: &[u8], builder: &mut Builder) -> Result<(), ExtractError> {
    let mut package = open(bytes)?;
    let styles = part(&mut package, "word/styles.xml")?
        .map_or_else(Styles::default, |xml| Styles::parse(&xml));
    let xml = part(&mut package, "word/document.xml")?
        .ok_or_else(|| ExtractError::broken("the main text is missing"))?;
    let mut walk = Walk {
        flow: Flow::new(builder),
        styles,
        skipped: 0,
        in_text: false,
        runs: 0,
        section: None,
    };
    let mut reader = Reader::from_str(&xml);
    loop {
        match reader.read_event().map_err(|_| broken_xml())? {
            Event::Start(e) => walk.start(&e)?,
            Event::Empty(e) => {
                walk.start(&e)?;
                walk.end(e.local_name().into_inner())?;
            }
            Event::End(e) => walk.end(e.local_name().into_inner())?,
            Event::Text(t) => walk.text(&t.xml10_content()),
            Event::CData(t) => walk.text(&t.xml10_content()),
            Event::GeneralRef(r) => walk.text(&resolve(&r)),
            Event::Eof => return walk.flow.finish(),
            _ => {}
        }
    }
}

struct Walk<'b> {
    flow: Flow<'b>,
    styles: Styles,
    skipped: usize,
    in_text: bool,
    runs: usize,
    /// Inside a paragraph's section properties: whether the section's end breaks the page.
    section: Option<bool>,
}

impl Walk<'_> {
    fn start(&mut self, e: &BytesStart<'_>) -> Result<(), ExtractError> {
        let name = e.local_name();
        let name = name.into_inner();
        if self.skipped > 0 || SKIPPED.contains(&name) {
            self.skipped += 1;
            return Ok(());
        }
        let value = || attribute(e, "val");
        let on = || !matches!(value().as_deref(), Some("0" | "false" | "off"));
        match name {
            "p" => self.flow.begin(Kind::Body),
            "pStyle" => {
                let kind = value().map_or(Kind::Body, |id| self.styles.kind(&id));
                self.set_kind(kind);
            }
            "outlineLvl" => {
                if let Some(level) = value()
                    .and_then(|v| v.parse::<u8>().ok())
                    .filter(|l| *l < 9)
                {
                    self.flow.set_kind(Kind::Heading(level + 1));
                }
            }
            // A numbering's id 0 takes the paragraph out of the list of its style.
            "numId" if value().as_deref() != Some("0") => self.flow.list_item("- "),
            "pageBreakBefore" if on() => self.flow.page_break()?,
            "sectPr" if self.flow.is_open() => self.section = Some(true),
            "type" if self.section.is_some() => {
                self.section = Some(!matches!(
                    value().as_deref(),
                    Some("continuous" | "nextColumn")
                ));
            }
            "r" => self.runs += 1,
            "t" => self.in_text = true,
            "tab" | "ptab" if self.runs > 0 => self.flow.text(" "),
            "noBreakHyphen" => self.flow.text("-"),
            "cr" => self.flow.text("\n"),
            "br" if attribute(e, "type").as_deref() == Some("page") => self.flow.page_break()?,
            "br" => self.flow.text("\n"),
            "lastRenderedPageBreak" => self.flow.page_break()?,
            "tbl" => self.flow.begin_table()?,
            "tc" => self.flow.begin_cell(),
            _ => {}
        }
        Ok(())
    }

    fn set_kind(&mut self, kind: Kind) {
        match kind {
            Kind::Item => self.flow.list_item("- "),
            other => self.flow.set_kind(other),
        }
    }

    fn text(&mut self, text: &str) {
        if self.in_text && self.skipped == 0 {
            self.flow.text(text);
        }
    }

    fn end(&mut self, name: &str) -> Result<(), ExtractError> {
        if self.skipped > 0 {
            self.skipped -= 1;
            return Ok(());
        }
        match name {
            "p" => {
                self.flow.end()?;
                if self.section.take() == Some(true) {
                    self.flow.page_break()?;
                }
            }
            "r" => self.runs = self.runs.saturating_sub(1),
            "t" => self.in_text = false,
            "tc" => self.flow.end_cell(),
            "tr" => self.flow.end_row(),
            "tbl" => self.flow.end_table()?,
            _ => {}
        }
        Ok(())
    }
}

#[derive(Default)]
struct Style {
    name: String,
    based_on: Option<String>,
    outline: Option<u8>,
    numbered: bool,
}

#[derive(Default)]
struct Styles(HashMap<String, Style>);

impl Styles {
    /// A broken style sheet costs headings, not the document.
    fn parse(xml: &str) -> Self {
        let mut styles = HashMap::new();
        let mut open: Option<(String, Style)> = None;
        let mut reader = Reader::from_str(xml);
        loop {
            match reader.read_event() {
                Ok(Event::Start(e)) | Ok(Event::Empty(e)) => {
                    let value = || attribute(&e, "val");
                    match (e.local_name().into_inner(), &mut open) {
                        ("style", _) => {
                            open = attribute(&e, "styleId").map(|id| (id, Style::default()))
                        }
                        ("name", Some((_, style))) => {
                            style.name = fold_line(&value().unwrap_or_default()).to_lowercase()
                        }
                        ("basedOn", Some((_, style))) => style.based_on = value(),
                        ("outlineLvl", Some((_, style))) => {
                            style.outline = value().and_then(|v| v.parse().ok())
                        }
                        ("numId", Some((_, style))) => style.numbered = true,
                        _ => {}
                    }
                }
                Ok(Event::End(e)) if e.local_name().into_inner() == "style" => {
                    styles.extend(open.take())
                }
                Ok(Event::Eof) | Err(_) => return Self(styles),
                _ => {}
            }
        }
    }

    fn kind(&self, id: &str) -> Kind {
        let mut next = Some(id.to_string());
        let mut numbered = false;
        for _ in 0..MAX_STYLE_CHAIN {
            let Some(id) = next else { break };
            let Some(style) = self.0.get(&id) else {
                return named_heading(&id.to_lowercase()).map_or(Kind::Body, Kind::Heading);
            };
            if let Some(level) = style.outline.filter(|l| *l < 9) {
                return Kind::Heading(level + 1);
            }
            if let Some(level) =
                named_heading(&style.name).or_else(|| named_heading(&id.to_lowercase()))
            {
                return Kind::Heading(level);
            }
            numbered |= style.numbered;
            next = style.based_on.clone();
        }
        if numbered { Kind::Item } else { Kind::Body }
    }
}

/// "heading 2", "Überschrift 2", "berschrift2" (Word drops umlauts in ids), "Title".
fn named_heading(name: &str) -> Option<u8> {
    if matches!(name, "title" | "titel") {
        return Some(1);
    }
    let number = ["heading", "überschrift", "berschrift"]
        .iter()
        .find_map(|word| name.strip_prefix(word))?;
    number
        .trim()
        .parse::<u8>()
        .ok()
        .filter(|n| (1..=9).contains(n))
}

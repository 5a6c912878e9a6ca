//! ODT: the main text with headings by outline level or title style, tables row by row, pages where the writer broke them.
//!
//! Left out: headers and footers, annotations, deleted text of tracked changes, tables of contents.

use std::collections::{HashMap, HashSet};

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use super::ExtractError;
use super::build::Builder;
use super::flow::{Flow, Kind};
use super::package::{attribute, broken_xml, open, part, resolve};

/// Elements whose content a reader does not see, or sees elsewhere.
const SKIPPED: [&str; 11] = [
    "text:tracked-changes",
    "office:annotation",
    "text:note-citation",
    "office:forms",
    "text:sequence-decls",
    "svg:desc",
    "svg:title",
    "text:table-of-content",
    "table:covered-table-cell",
    "text:ruby-text",
    "text:script",
];
/// One `text:s` stands for this many spaces at most; they are folded anyway.
const MAX_SPACES: usize = 8;

pub(super) fn read(bytes: &[u8], builder: &mut Builder) -> Result<(), ExtractError> {
    let mut package = open(bytes)?;
    let xml = part(&mut package, "content.xml")?
        .ok_or_else(|| ExtractError::broken("the main text is missing"))?;
    let mut walk = Walk {
        flow: Flow::new(builder),
        skipped: 0,
        in_body: false,
        list_items: 0,
        item_signed: false,
        parents: HashMap::new(),
        breaking: HashSet::new(),
        style: None,
        begun: false,
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
    skipped: usize,
    in_body: bool,
    list_items: usize,
    item_signed: bool,
    /// Automatic styles: what they derive from, and which begin a new page.
    parents: HashMap<String, String>,
    breaking: HashSet<String>,
    style: Option<String>,
    /// Whether anything stands before: a break before the first paragraph makes no page.
    begun: bool,
}

impl Walk<'_> {
    fn start(&mut self, e: &BytesStart<'_>) -> Result<(), ExtractError> {
        let name = e.local_name();
        let name = name.into_inner();
        if self.skipped > 0 || (self.in_body && SKIPPED.contains(&e.name().as_ref())) {
            self.skipped += 1;
            return Ok(());
        }
        if !self.in_body {
            self.style_start(name, e);
            self.in_body = name == "text" && e.name().as_ref() == "office:text";
            return Ok(());
        }
        match name {
            "h" => {
                self.break_before(e)?;
                let level = attribute(e, "outline-level")
                    .and_then(|l| l.parse().ok())
                    .unwrap_or(1);
                self.flow.begin(Kind::Heading(level));
            }
            "p" => {
                self.break_before(e)?;
                let kind = if self.is_title(e) {
                    Kind::Heading(1)
                } else {
                    Kind::Body
                };
                self.flow.begin(kind);
                if self.list_items > 0 && kind == Kind::Body {
                    self.flow
                        .list_item(if self.item_signed { "" } else { "- " });
                    self.item_signed = true;
                }
            }
            "list-item" | "list-header" => {
                self.list_items += 1;
                self.item_signed = name == "list-header";
            }
            "s" => {
                let count = attribute(e, "c")
                    .and_then(|c| c.parse::<usize>().ok())
                    .unwrap_or(1);
                self.flow.text(&" ".repeat(count.min(MAX_SPACES)));
            }
            "tab" => self.flow.text(" "),
            "line-break" => self.flow.text("\n"),
            "soft-page-break" => self.flow.page_break()?,
            "table" => {
                self.break_before(e)?;
                self.flow.begin_table()?;
            }
            "table-cell" => self.flow.begin_cell(),
            _ => {}
        }
        Ok(())
    }

    fn style_start(&mut self, name: &str, e: &BytesStart<'_>) {
        match name {
            "style" => {
                self.style = attribute(e, "name");
                if let (Some(style), Some(parent)) =
                    (&self.style, attribute(e, "parent-style-name"))
                {
                    self.parents.insert(style.clone(), parent);
                }
            }
            "paragraph-properties" | "table-properties"
                if attribute(e, "break-before").as_deref() == Some("page") =>
            {
                self.breaking.extend(self.style.clone());
            }
            _ => {}
        }
    }

    fn break_before(&mut self, e: &BytesStart<'_>) -> Result<(), ExtractError> {
        let breaks = self.begun
            && attribute(e, "style-name").is_some_and(|style| self.breaking.contains(&style));
        self.begun = true;
        if breaks {
            self.flow.page_break()
        } else {
            Ok(())
        }
    }

    fn is_title(&self, e: &BytesStart<'_>) -> bool {
        let Some(style) = attribute(e, "style-name") else {
            return false;
        };
        style == "Title"
            || self
                .parents
                .get(&style)
                .is_some_and(|parent| parent == "Title")
    }

    fn text(&mut self, text: &str) {
        if self.in_body && self.skipped == 0 {
            // Line breaks in the source are white space.
            self.flow.text(&text.replace(['\n', '\r'], " "));
        }
    }

    fn end(&mut self, name: &str) -> Result<(), ExtractError> {
        if self.skipped > 0 {
            self.skipped -= 1;
            return Ok(());
        }
        match name {
            _ if !self.in_body => {}
            "h" | "p" => self.flow.end()?,
            "list-item" | "list-header" => self.list_items = self.list_items.saturating_sub(1),
            "table-cell" => self.flow.end_cell(),
            "table-row" => self.flow.end_row(),
            "table" => self.flow.end_table()?,
            _ => {}
        }
        Ok(())
    }
}

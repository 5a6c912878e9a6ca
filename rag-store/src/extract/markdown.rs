//! Markdown as its reader sees it: without marks, links by their text, no HTML, nothing fetched.

use pulldown_cmark::{Event, HeadingLevel, Options, Parser, Tag, TagEnd};

use super::build::Builder;
use super::flow::{Flow, Kind};
use super::{ExtractError, plain};

pub(super) fn read(bytes: &[u8], builder: &mut Builder) -> Result<(), ExtractError> {
    let text = plain::decode(bytes);
    let options = Options::ENABLE_TABLES
        | Options::ENABLE_STRIKETHROUGH
        | Options::ENABLE_YAML_STYLE_METADATA_BLOCKS;
    let mut flow = Flow::new(builder);
    let mut lists: Vec<Option<u64>> = Vec::new();
    let mut skipped = 0usize;
    for event in Parser::new_ext(&text, options) {
        match event {
            Event::Start(Tag::MetadataBlock(_)) => skipped += 1,
            Event::End(TagEnd::MetadataBlock(_)) => skipped = skipped.saturating_sub(1),
            _ if skipped > 0 => {}
            Event::Start(Tag::Heading { level, .. }) => {
                flow.end()?;
                flow.begin(Kind::Heading(level_number(level)));
            }
            Event::Start(Tag::Paragraph | Tag::CodeBlock(_) | Tag::HtmlBlock) => {
                if lists.is_empty() {
                    flow.begin(Kind::Body);
                } else if !flow.is_open() {
                    flow.begin(Kind::Item);
                }
            }
            Event::Start(Tag::List(first)) => {
                flow.end()?;
                lists.push(first);
            }
            Event::End(TagEnd::List(_)) => {
                flow.end()?;
                lists.pop();
            }
            Event::Start(Tag::Item) => {
                flow.end()?;
                flow.begin(Kind::Item);
                match lists.last_mut() {
                    Some(Some(number)) => {
                        flow.text(&format!("{number}. "));
                        *number = number.saturating_add(1);
                    }
                    _ => flow.text("- "),
                }
            }
            Event::Start(Tag::Table(_)) => flow.begin_table()?,
            Event::Start(Tag::TableCell) => {
                flow.begin_cell();
                flow.begin(Kind::Body);
            }
            Event::End(TagEnd::TableCell) => {
                flow.end()?;
                flow.end_cell();
            }
            Event::End(TagEnd::TableRow | TagEnd::TableHead) => flow.end_row(),
            Event::End(TagEnd::Table) => flow.end_table()?,
            Event::End(
                TagEnd::Heading(_)
                | TagEnd::Paragraph
                | TagEnd::CodeBlock
                | TagEnd::HtmlBlock
                | TagEnd::Item,
            ) => {
                flow.end()?;
            }
            Event::Text(text) | Event::Code(text) => {
                if !flow.is_open() {
                    flow.begin(Kind::Body);
                }
                flow.text(&text);
            }
            Event::SoftBreak => flow.text(" "),
            Event::HardBreak => flow.text("\n"),
            _ => {}
        }
    }
    flow.finish()
}

fn level_number(level: HeadingLevel) -> u8 {
    level as u8
}

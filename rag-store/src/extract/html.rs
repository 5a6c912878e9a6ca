//! HTML as a browser without scripts shows it. Nothing is fetched; navigation, forms and hidden elements are left out.

use scraper::{Html, Node, node::Element};

use super::build::Builder;
use super::flow::{Flow, Kind};
use super::{ExtractError, plain};

/// What holds no text of the document.
const SKIPPED: [&str; 22] = [
    "script", "style", "noscript", "template", "head", "svg", "math", "iframe", "object", "embed",
    "nav", "form", "button", "select", "input", "textarea", "audio", "video", "canvas", "map",
    "dialog", "menu",
];
/// What runs inside a line; every other element starts a new one.
const INLINE: [&str; 33] = [
    "a", "abbr", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i",
    "ins", "kbd", "label", "mark", "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike",
    "strong", "sub", "sup", "time", "u", "var",
];

pub(super) fn read(bytes: &[u8], builder: &mut Builder) -> Result<(), ExtractError> {
    let html = Html::parse_document(&plain::decode(bytes));
    let mut walk = Walk {
        flow: Flow::new(builder),
        lists: Vec::new(),
        preformatted: 0,
        fresh_item: false,
        kinds: Vec::new(),
    };
    let mut node = html.tree.root();
    // A cursor instead of recursion: documents may nest deeper than a call stack.
    loop {
        let entered = walk.enter(node.value())?;
        if let Some(child) = node.first_child().filter(|_| entered) {
            node = child;
            continue;
        }
        if entered {
            walk.leave(node.value())?;
        }
        loop {
            if let Some(next) = node.next_sibling() {
                node = next;
                break;
            }
            let Some(parent) = node.parent() else {
                return walk.flow.finish();
            };
            node = parent;
            walk.leave(node.value())?;
        }
    }
}

struct Walk<'b> {
    flow: Flow<'b>,
    /// The next number of each open list, `None` for bullets.
    lists: Vec<Option<u32>>,
    preformatted: usize,
    /// An item is open that has nothing but its sign: a paragraph in it goes on its line.
    fresh_item: bool,
    /// Kinds of the open headings and items: text under them takes the innermost.
    kinds: Vec<Kind>,
}

impl Walk<'_> {
    /// Whether to go on to the children.
    fn enter(&mut self, node: &Node) -> Result<bool, ExtractError> {
        match node {
            Node::Text(text) => {
                self.text(text);
                Ok(true)
            }
            Node::Element(element) => self.enter_element(element),
            Node::Document | Node::Fragment => Ok(true),
            _ => Ok(false),
        }
    }

    fn text(&mut self, text: &str) {
        if text.trim().is_empty() && !self.flow.is_open() {
            return;
        }
        if !self.flow.is_open() {
            self.flow
                .begin(self.kinds.last().copied().unwrap_or(Kind::Body));
        }
        self.fresh_item &= text.trim().is_empty();
        if self.preformatted > 0 {
            self.flow.text(text);
        } else {
            // Line breaks in the source are white space.
            self.flow.text(&text.replace(['\n', '\r'], " "));
        }
    }

    fn enter_element(&mut self, element: &Element) -> Result<bool, ExtractError> {
        let name = element.name();
        let hidden =
            element.attr("hidden").is_some() || element.attr("aria-hidden") == Some("true");
        if SKIPPED.contains(&name) || hidden {
            return Ok(false);
        }
        if INLINE.contains(&name) {
            return Ok(true);
        }
        if name == "br" {
            self.flow.text("\n");
            return Ok(true);
        }
        if std::mem::take(&mut self.fresh_item) && matches!(name, "p" | "div") {
            return Ok(true);
        }
        self.flow.end()?;
        match name {
            "h1" | "h2" | "h3" | "h4" | "h5" | "h6" => {
                let digit = name.as_bytes().get(1).copied();
                let level = digit.map_or(1, |digit| digit.saturating_sub(b'0'));
                self.kinds.push(Kind::Heading(level));
            }
            "ul" => self.lists.push(None),
            "ol" => self.lists.push(Some(
                element
                    .attr("start")
                    .and_then(|s| s.parse().ok())
                    .unwrap_or(1),
            )),
            "li" | "dt" | "dd" => {
                self.kinds.push(Kind::Item);
                self.flow.begin(Kind::Item);
                self.fresh_item = true;
                match self.lists.last_mut() {
                    Some(Some(number)) if name == "li" => {
                        self.flow.text(&format!("{number}. "));
                        *number = number.saturating_add(1);
                    }
                    _ if name == "li" => self.flow.text("- "),
                    _ => {}
                }
            }
            "pre" => self.preformatted += 1,
            "table" => self.flow.begin_table()?,
            "td" | "th" => self.flow.begin_cell(),
            _ => {}
        }
        Ok(true)
    }

    fn leave(&mut self, node: &Node) -> Result<(), ExtractError> {
        let Node::Element(element) = node else {
            return Ok(());
        };
        let name = element.name();
        if INLINE.contains(&name) || name == "br" {
            return Ok(());
        }
        self.flow.end()?;
        match name {
            "h1" | "h2" | "h3" | "h4" | "h5" | "h6" | "li" | "dt" | "dd" => {
                self.kinds.pop();
            }
            "ul" | "ol" => {
                self.lists.pop();
            }
            "pre" => self.preformatted = self.preformatted.saturating_sub(1),
            "td" | "th" => self.flow.end_cell(),
            "tr" => self.flow.end_row(),
            "table" => self.flow.end_table()?,
            _ => {}
        }
        Ok(())
    }
}

//! Collects blocks while a reader walks through its format: heading paths, pages, folding of white space, limits.

use super::{Block, BlockKind, ExtractError, ExtractedDocument, Format, MAX_TEXT_BYTES};

/// Levels deeper than this are one level: no text needs them, and paths stay short.
pub(super) const MAX_LEVEL: u8 = 9;

/// Longest heading, in characters; what is longer is a paragraph in a heading's clothes. Every block below a heading repeats it,
/// and so does every chunk.
pub(super) const MAX_HEADING_CHARS: usize = 300;

/// The document under construction.
#[derive(Default)]
pub(super) struct Builder {
    blocks: Vec<Block>,
    path: Vec<(u8, String)>,
    page: Option<u32>,
    pages: Option<u32>,
    text_bytes: usize,
    /// See [`ExtractedDocument::unread_pages`].
    pub unread_pages: Vec<u32>,
}

impl Builder {
    /// From here on blocks stand on this page, counted from 1.
    pub fn page(&mut self, page: u32) {
        self.page = Some(page);
        self.pages = Some(self.pages.unwrap_or(0).max(page));
    }

    /// A page break: the pages before the first one are page 1, also in hindsight.
    pub fn page_break(&mut self) {
        if self.page.is_none() {
            self.blocks.iter_mut().for_each(|b| b.page = Some(1));
        }
        self.page(self.page.unwrap_or(1).saturating_add(1));
    }

    pub fn heading(&mut self, level: u8, text: &str) -> Result<(), ExtractError> {
        let level = level.clamp(1, MAX_LEVEL);
        let text = fold_line(text);
        if text.is_empty() {
            return Ok(());
        }
        if text.chars().nth(MAX_HEADING_CHARS).is_some() {
            return self.push(BlockKind::Paragraph, text);
        }
        while self.path.last().is_some_and(|(above, _)| *above >= level) {
            self.path.pop();
        }
        self.push(BlockKind::Heading(level), text.clone())?;
        self.path.push((level, text));
        Ok(())
    }

    /// Line breaks are kept.
    pub fn paragraph(&mut self, text: &str) -> Result<(), ExtractError> {
        self.push(BlockKind::Paragraph, fold(text))
    }

    /// One line an item; the caller puts the item's sign before it.
    pub fn list(&mut self, items: &[String]) -> Result<(), ExtractError> {
        let lines: Vec<String> = items
            .iter()
            .map(|i| fold_line(i))
            .filter(|i| !i.is_empty())
            .collect();
        self.push(BlockKind::List, lines.join("\n"))
    }

    pub fn table(&mut self, rows: &[Vec<String>]) -> Result<(), ExtractError> {
        let mut lines = Vec::with_capacity(rows.len());
        for row in rows {
            let cells: Vec<String> = row.iter().map(|c| fold_line(c)).collect();
            if cells.iter().any(|c| !c.is_empty()) {
                lines.push(
                    cells
                        .join(" | ")
                        .trim_end_matches([' ', '|'])
                        .trim_start()
                        .to_string(),
                );
            }
        }
        self.push(BlockKind::Table, lines.join("\n"))
    }

    fn push(&mut self, kind: BlockKind, text: String) -> Result<(), ExtractError> {
        if text.is_empty() {
            return Ok(());
        }
        self.text_bytes += text.len();
        if self.text_bytes > MAX_TEXT_BYTES {
            return Err(ExtractError::TooLarge {
                limit: MAX_TEXT_BYTES as u64,
                got: self.text_bytes as u64,
            });
        }
        let heading_path = self.path.iter().map(|(_, text)| text.clone()).collect();
        self.blocks.push(Block {
            page: self.page,
            heading_path,
            kind,
            text,
        });
        Ok(())
    }

    pub fn finish(self, filename: &str, format: Format) -> Result<ExtractedDocument, ExtractError> {
        if !self
            .blocks
            .iter()
            .any(|b| b.text.chars().any(char::is_alphanumeric))
        {
            // A paged document without text was scanned; any other one simply says nothing.
            return Err(if format == Format::Pdf {
                ExtractError::NoText
            } else {
                ExtractError::Empty
            });
        }
        let level = |b: &Block| {
            if let BlockKind::Heading(level) = b.kind {
                Some(level)
            } else {
                None
            }
        };
        let highest = self.blocks.iter().filter_map(level).min();
        let heading = self
            .blocks
            .iter()
            .find(|b| level(b).is_some() && level(b) == highest);
        let title = heading.map_or_else(|| stem(filename), |b| b.text.clone());
        Ok(ExtractedDocument {
            title,
            pages: self.pages,
            unread_pages: self.unread_pages,
            blocks: self.blocks,
        })
    }
}

/// The file name without folders and ending.
fn stem(filename: &str) -> String {
    let name = filename.rsplit(['/', '\\']).next().unwrap_or(filename);
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let stem = fold_line(if stem.is_empty() { name } else { stem });
    stem.chars().take(MAX_HEADING_CHARS).collect()
}

/// Folds white space but keeps line breaks; drops what cannot be seen; composes umlauts and opens ligatures.
pub(super) fn fold(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let line = fold_line(line);
        if !line.is_empty() {
            if !out.is_empty() {
                out.push('\n');
            }
            out.push_str(&line);
        }
    }
    out
}

/// As [`fold`], with line breaks folded too.
pub(super) fn fold_line(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut gap = false;
    for c in text.chars() {
        if c.is_whitespace() || c == '\u{2028}' || c == '\u{2029}' {
            gap = true;
            continue;
        }
        if invisible(c) {
            continue;
        }
        if gap && !out.is_empty() {
            out.push(' ');
        }
        gap = false;
        push_composed(&mut out, c);
    }
    out
}

fn invisible(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2064}' | '\u{feff}')
        || matches!(c, '\u{fff9}'..='\u{fffb}' | '\u{fffe}' | '\u{ffff}')
}

fn push_composed(out: &mut String, c: char) {
    let opened = match c {
        '\u{fb00}' => "ff",
        '\u{fb01}' => "fi",
        '\u{fb02}' => "fl",
        '\u{fb03}' => "ffi",
        '\u{fb04}' => "ffl",
        '\u{fb05}' | '\u{fb06}' => "st",
        '\u{308}' => {
            let umlaut = match out.chars().last() {
                Some('a') => 'ä',
                Some('o') => 'ö',
                Some('u') => 'ü',
                Some('A') => 'Ä',
                Some('O') => 'Ö',
                Some('U') => 'Ü',
                _ => return out.push(c),
            };
            out.pop();
            return out.push(umlaut);
        }
        _ => return out.push(c),
    };
    out.push_str(opened);
}

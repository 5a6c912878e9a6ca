//! From a document to pieces that are found, cited and read by a model.
//!
//! Belongs here: where to cut. Does not belong here: reading formats ([`crate::extract`]), embedding, indexes.
//!
//! A chunk never crosses a page or a heading, and its text is a literal part of its page's text
//! ([`crate::extract::ExtractedDocument::page_text`]): a citation can always be found on the page.

mod size;
mod split;

use serde::{Deserialize, Serialize};

use crate::extract::{BLOCK_SEPARATOR, Block, BlockKind, ExtractedDocument};
use size::Size;

/// A chunk has about this many words at most.
pub const TARGET_WORDS: usize = 220;
/// A chunk never has more tokens of the embedding model (multilingual-e5-small, context 512 with its prefix).
pub const MAX_TOKENS: usize = 480;
/// Longest [`ChunkText::heading`]: nine levels of readers' longest headings in plain letters.
pub const MAX_HEADING_BYTES: usize = 3 * 1024;
/// Parts the headings of [`ChunkText::heading`].
pub const HEADING_SEPARATOR: &str = " › ";

/// A chunk before it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkText {
    /// Place in the document, from 0.
    pub ordinal: u32,
    /// As in [`Block::page`].
    pub page: Option<u32>,
    /// The headings it stands under, outermost first, parted by [`HEADING_SEPARATOR`]; `None` above the first heading.
    pub heading: Option<String>,
    /// Never empty; begins with its heading where that stands on the same page.
    pub text: String,
}

/// Cuts a document. Sections stay whole up to [`TARGET_WORDS`]; larger ones are cut evenly between paragraphs, then table
/// rows, list items, sentences and words.
pub fn chunk(document: &ExtractedDocument) -> Vec<ChunkText> {
    let mut chunks = Vec::new();
    for section in sections(&document.blocks) {
        for piece in cut(section) {
            let ordinal = u32::try_from(chunks.len()).unwrap_or(u32::MAX);
            chunks.push(ChunkText {
                ordinal,
                page: piece.page,
                heading: piece.heading,
                text: piece.text,
            });
        }
    }
    chunks
}

/// Runs of blocks of one page: headings, then what stands under them.
fn sections(blocks: &[Block]) -> Vec<&[Block]> {
    let is_heading = |b: &Block| matches!(b.kind, BlockKind::Heading(_));
    blocks
        .chunk_by(|a, b| {
            // A heading opens a section unless it stands right under another one.
            a.page == b.page
                && (!is_heading(b) || is_heading(a) && b.heading_path.contains(&a.text))
        })
        .collect()
}

struct Piece {
    page: Option<u32>,
    heading: Option<String>,
    text: String,
}

/// A part of a block with what parts it from the part before.
struct Part<'a> {
    text: &'a str,
    separator: &'a str,
    size: Size,
    block: &'a Block,
}

fn cut(section: &[Block]) -> Vec<Piece> {
    let total: Size = section.iter().map(|b| Size::of(&b.text)).sum();
    // Even pieces: 250 words become twice 125, not 220 and 30.
    let target = total.shared_between(total.pieces());
    let parts: Vec<Part<'_>> = section
        .iter()
        .flat_map(|block| {
            let parts = split::split(&block.text, target);
            parts
                .into_iter()
                .enumerate()
                .map(move |(i, (text, separator))| Part {
                    text,
                    separator: if i == 0 { BLOCK_SEPARATOR } else { separator },
                    size: Size::of(text),
                    block,
                })
        })
        .collect();
    let mut pieces: Vec<Piece> = Vec::new();
    let mut filled = Size::default();
    let mut only_headings = true;
    for part in &parts {
        let heading_first = matches!(part.block.kind, BlockKind::Heading(_));
        match pieces.last_mut() {
            Some(piece)
                if (filled + part.size).fits(target)
                    || (only_headings && (filled + part.size).is_allowed()) =>
            {
                piece.text.push_str(part.separator);
                piece.text.push_str(part.text);
                piece.heading = heading_of(part.block);
                filled = filled + part.size;
                only_headings &= heading_first;
            }
            _ => {
                pieces.push(Piece {
                    page: part.block.page,
                    heading: heading_of(part.block),
                    text: part.text.to_string(),
                });
                filled = part.size;
                only_headings = heading_first;
            }
        }
    }
    pieces
}

/// A heading counts to the section that it opens. What a chunk is found, cited and embedded with stays small, whatever a
/// reading child sends.
fn heading_of(block: &Block) -> Option<String> {
    let own = matches!(block.kind, BlockKind::Heading(_)).then_some(&block.text);
    let mut joined = String::new();
    for heading in block.heading_path.iter().chain(own) {
        if !joined.is_empty() {
            joined.push_str(HEADING_SEPARATOR);
        }
        joined.push_str(heading);
        if joined.len() > MAX_HEADING_BYTES {
            joined.truncate(joined.floor_char_boundary(MAX_HEADING_BYTES));
            break;
        }
    }
    (!joined.is_empty()).then_some(joined)
}

#[cfg(test)]
mod tests;

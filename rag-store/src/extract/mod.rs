//! From a file's bytes to its text with pages and headings.
//!
//! Belongs here: deciding what a file is, one reader a format, the limits that every file is held to, and the sandboxed
//! child process in which readers run. Does not belong here: cutting into chunks ([`crate::chunk`]) and anything that
//! stores.
//!
//! A reader never interprets: the text is what a person sees in the document, so that a citation can be found there.
//! White space is folded, invisible characters and line-end hyphens are removed; nothing else is changed.

mod build;
mod child;
mod docx;
mod error;
mod flow;
mod html;
mod markdown;
mod odt;
mod package;
mod pdf;
mod plain;
mod sandbox;
mod sniff;
mod structure;

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::{Deserialize, Serialize};

use build::fold_line;
pub use child::{child_main, in_child, in_child_with_progress};
pub use error::ExtractError;
pub use sniff::{Format, SUPPORTED};

/// The largest file that is read, in bytes.
pub const MAX_DOCUMENT_BYTES: u64 = 64 << 20;
/// The most extracted text, in bytes of UTF-8 (about 8,000 dense pages).
pub const MAX_TEXT_BYTES: usize = 24 << 20;
/// The most pages of a PDF.
pub const MAX_PAGES: usize = 5_000;
/// The most entries of a DOCX or ODT package.
pub const MAX_PACKAGE_ENTRIES: usize = 10_000;
/// The largest part of a DOCX or ODT package that is unpacked, in bytes; more is taken for a decompression bomb.
pub const MAX_PART_BYTES: u64 = 64 << 20;
/// Address space of the child process, in bytes.
pub const CHILD_MEMORY_BYTES: u64 = 1 << 30;
/// Processor time of the child process, in seconds: a 50 MB PDF takes about a minute on a fast machine.
pub const CHILD_CPU_S: u64 = 180;

/// Raises the child's walls around this process and tries them: 0 when all hold. For tests, in a process that then ends.
#[cfg(target_os = "linux")]
#[doc(hidden)]
pub fn sandbox_breaches() -> i32 {
    sandbox::breaches()
}

/// A document as text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtractedDocument {
    /// The document's first and highest heading, or the file name without its ending.
    pub title: String,
    /// Pages of a paged document; `None` where the format knows no pages.
    pub pages: Option<u32>,
    /// Pages of a PDF that could not be read wholly; the others are there.
    pub unread_pages: Vec<u32>,
    /// In reading order; never empty.
    pub blocks: Vec<Block>,
}

/// A piece of a document that belongs together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Counted from 1; `None` where the format knows no pages.
    pub page: Option<u32>,
    /// The headings this block stands under, outermost first; a heading's own text is not in its own path.
    pub heading_path: Vec<String>,
    pub kind: BlockKind,
    /// Never empty. Rows of a table and items of a list are lines; cells are parted by ` | `.
    pub text: String,
}

/// What a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockKind {
    /// With its level, 1 the highest.
    Heading(u8),
    Paragraph,
    Table,
    List,
}

/// What stands between two blocks in [`ExtractedDocument::page_text`] and in a chunk.
pub const BLOCK_SEPARATOR: &str = "\n\n";

impl ExtractedDocument {
    /// A page's text: its blocks, parted by [`BLOCK_SEPARATOR`]. Every chunk is a literal part of one of these.
    pub fn page_text(&self, page: Option<u32>) -> String {
        let texts: Vec<&str> = self
            .blocks
            .iter()
            .filter(|b| b.page == page)
            .map(|b| b.text.as_str())
            .collect();
        texts.join(BLOCK_SEPARATOR)
    }
}

/// Reads a document in this process. `media_type` may be empty. Never panics; a reader's panic is [`ExtractError::Broken`].
///
/// A hostile file may still exhaust memory, stack or time: from the outside, use [`in_child`].
pub fn extract(
    bytes: &[u8],
    filename: &str,
    media_type: &str,
) -> Result<ExtractedDocument, ExtractError> {
    extract_with_progress(bytes, filename, media_type, &mut |_| {})
}

/// As [`extract`]; `progress` is told how far the reader is, from 0 to 1.
pub fn extract_with_progress(
    bytes: &[u8],
    filename: &str,
    media_type: &str,
    progress: &mut dyn FnMut(f32),
) -> Result<ExtractedDocument, ExtractError> {
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(ExtractError::TooLarge {
            limit: MAX_DOCUMENT_BYTES,
            got: bytes.len() as u64,
        });
    }
    let read = catch_unwind(AssertUnwindSafe(|| {
        read(bytes, filename, media_type, progress)
    }));
    read.unwrap_or_else(|_| {
        Err(ExtractError::broken(
            "the reader could not make sense of its structure",
        ))
    })
}

fn read(
    bytes: &[u8],
    filename: &str,
    media_type: &str,
    progress: &mut dyn FnMut(f32),
) -> Result<ExtractedDocument, ExtractError> {
    let format = sniff::sniff(bytes, filename, media_type)?;
    let mut builder = build::Builder::default();
    match format {
        Format::Text => plain::read(bytes, &mut builder)?,
        Format::Markdown => markdown::read(bytes, &mut builder)?,
        Format::Html => html::read(bytes, &mut builder)?,
        Format::Pdf => pdf::read(bytes, &mut builder, progress)?,
        Format::Docx => docx::read(bytes, &mut builder)?,
        Format::Odt => odt::read(bytes, &mut builder)?,
    }
    progress(1.0);
    builder.finish(filename, format)
}

#[cfg(test)]
mod tests;

//! PDF: glyphs by page (`pdf-extract`), put together to lines, paragraphs and headings by their places and sizes.

mod glyphs;
mod guard;
mod layout;

use std::panic::{AssertUnwindSafe, catch_unwind};

use pdf_extract::{Document, Error, output_doc_page};

use super::build::Builder;
use super::{ExtractError, MAX_PAGES};
use glyphs::Glyphs;

pub(super) fn read(
    bytes: &[u8],
    builder: &mut Builder,
    progress: &mut dyn FnMut(f32),
) -> Result<(), ExtractError> {
    let mut document = load(bytes)?;
    guard::disarm(&mut document)?;
    let numbers: Vec<u32> = document.get_pages().into_keys().collect();
    match numbers.len() {
        0 => return Err(ExtractError::broken("the PDF has no pages")),
        n if n > MAX_PAGES => {
            return Err(ExtractError::broken(format!(
                "the PDF has {n} pages, at most {MAX_PAGES} are read"
            )));
        }
        _ => {}
    }
    let mut pages = Vec::with_capacity(numbers.len());
    let mut unread = Vec::new();
    for (i, number) in numbers.iter().enumerate() {
        let mut glyphs = Glyphs::default();
        // pdf-extract panics on what it does not expect; that costs one page, not the document.
        let read = catch_unwind(AssertUnwindSafe(|| {
            output_doc_page(&document, &mut glyphs, *number)
        }));
        if !matches!(read, Ok(Ok(()))) {
            unread.push(*number);
        }
        pages.push(layout::Page {
            number: *number,
            lines: glyphs.into_lines(),
        });
        progress((i + 1) as f32 / (numbers.len() + 1) as f32);
    }
    if unread.len() == numbers.len() && pages.iter().all(|p| p.lines.is_empty()) {
        return Err(ExtractError::broken("none of its pages can be read"));
    }
    builder.unread_pages = unread;
    layout::build(pages, builder)
}

/// An owner's password restricts printing, not reading; a user's password keeps us out.
fn load(bytes: &[u8]) -> Result<Document, ExtractError> {
    let start = super::sniff::find(bytes.get(..1024).unwrap_or(bytes), b"%PDF-").unwrap_or(0);
    let bytes = bytes.get(start..).unwrap_or(bytes);
    let mut document = match Document::load_mem(bytes) {
        Ok(document) => document,
        Err(
            Error::InvalidPassword | Error::Decryption(_) | Error::UnsupportedSecurityHandler(_),
        ) => {
            return Err(ExtractError::PasswordProtected);
        }
        Err(_) => return Err(ExtractError::broken("the PDF's structure cannot be read")),
    };
    if document.is_encrypted() && document.decrypt("").is_err() {
        return Err(ExtractError::PasswordProtected);
    }
    Ok(document)
}

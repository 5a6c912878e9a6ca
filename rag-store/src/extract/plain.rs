//! Plain text in any of the encodings that offices wrote in, with the headings its layout suggests.

use super::ExtractError;
use super::build::Builder;
use super::structure::{
    is_capitals, is_section_sign_heading, is_short_title, numbered_heading_depth, opens_item,
};

pub(super) fn read(bytes: &[u8], builder: &mut Builder) -> Result<(), ExtractError> {
    let text = decode(bytes);
    let paged = text.contains('\u{c}');
    for (i, page) in text.split('\u{c}').enumerate() {
        if paged {
            builder.page(u32::try_from(i + 1).unwrap_or(u32::MAX));
        }
        read_page(page, builder)?;
    }
    Ok(())
}

/// By byte order mark, else UTF-8 if it is valid, else what the bytes look like (Windows-1252 for Latin-1, as browsers do).
pub(super) fn decode(bytes: &[u8]) -> String {
    if let Some((encoding, bom)) = encoding_rs::Encoding::for_bom(bytes) {
        return encoding
            .decode_without_bom_handling(bytes.get(bom..).unwrap_or(&[]))
            .0
            .into_owned();
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        return text.to_string();
    }
    let mut detector = chardetng::EncodingDetector::new();
    detector.feed(bytes, true);
    detector
        .guess(Some(b"de"), true)
        .decode_without_bom_handling(bytes)
        .0
        .into_owned()
}

/// Paragraphs are parted by empty lines; lines stay as they are, for layout in a text file is meant.
fn read_page(page: &str, builder: &mut Builder) -> Result<(), ExtractError> {
    let lines: Vec<&str> = page.lines().map(str::trim_end).collect();
    let mut paragraph: Vec<&str> = Vec::new();
    let mut rest = lines.iter().copied().enumerate();
    while let Some((i, line)) = rest.next() {
        let trimmed = line.trim();
        let below = lines.get(i + 1).map_or("", |l| l.trim());
        if trimmed.is_empty() {
            flush(&mut paragraph, builder)?;
        } else if let Some(level) =
            underline_level(below).filter(|_| paragraph.is_empty() && !trimmed.ends_with('.'))
        {
            builder.heading(level, trimmed)?;
            rest.next();
        } else if let Some(level) = heading_level(trimmed, paragraph.is_empty(), below.is_empty()) {
            flush(&mut paragraph, builder)?;
            builder.heading(level, trimmed)?;
        } else {
            paragraph.push(line);
        }
    }
    flush(&mut paragraph, builder)
}

fn heading_level(line: &str, starts: bool, ends: bool) -> Option<u8> {
    if is_section_sign_heading(line) {
        return Some(3);
    }
    if !starts || line.chars().count() > 90 {
        return None;
    }
    if is_capitals(line) {
        return Some(1);
    }
    numbered_heading_depth(line)
        .filter(|_| ends && is_short_title(line))
        .map(|depth| depth + 2)
}

fn underline_level(line: &str) -> Option<u8> {
    let all = |c| line.len() >= 3 && line.chars().all(|l| l == c);
    if all('=') || all('*') {
        Some(1)
    } else if all('-') {
        Some(2)
    } else {
        None
    }
}

fn flush(paragraph: &mut Vec<&str>, builder: &mut Builder) -> Result<(), ExtractError> {
    let lines = std::mem::take(paragraph);
    // A rule of signs alone is ornament.
    let text: Vec<&str> = lines
        .into_iter()
        .filter(|l| l.chars().any(char::is_alphanumeric))
        .collect();
    let items = text.iter().filter(|l| opens_item(l.trim_start())).count();
    if items >= 2 && items * 2 >= text.len() {
        let owned: Vec<String> = text.iter().map(|l| l.to_string()).collect();
        return builder.list(&owned);
    }
    builder.paragraph(&text.join("\n"))
}

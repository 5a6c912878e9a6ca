//! What a file is: by its first bytes, then by its name, then by what the uploader says.

use super::{ExtractError, package};

/// A format that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Markdown,
    Html,
    Pdf,
    Docx,
    Odt,
}

/// The endings of the formats that are read.
pub const SUPPORTED: [&str; 6] = [".txt", ".md", ".html", ".pdf", ".docx", ".odt"];

/// How far into a file its signature may begin: PDFs in the wild carry mail headers and the like before it.
const SIGNATURE_WINDOW: usize = 1024;
const OLE_SIGNATURE: [u8; 8] = [0xd0, 0xcf, 0x11, 0xe0, 0xa1, 0xb1, 0x1a, 0xe1];
const ZIP_SIGNATURES: [&[u8]; 3] = [b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"];
const BINARY_SIGNATURES: [(&[u8], &str); 12] = [
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"{\\rtf", "RTF"),
    (b"%!PS", "PostScript"),
    (b"\x7fELF", "ELF"),
    (b"MZ", "EXE"),
    (b"\x1f\x8b", "GZIP"),
    (b"7z\xbc\xaf", "7Z"),
    (b"Rar!", "RAR"),
];

pub(super) fn sniff(
    bytes: &[u8],
    filename: &str,
    media_type: &str,
) -> Result<Format, ExtractError> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(ExtractError::Empty);
    }
    let claimed = claimed(filename, media_type);
    let head = bytes.get(..SIGNATURE_WINDOW).unwrap_or(bytes);
    let text_bom = [&b"\xef\xbb\xbf"[..], b"\xff\xfe", b"\xfe\xff"]
        .iter()
        .any(|bom| bytes.starts_with(bom));
    if head.starts_with(b"%PDF-")
        || (find(head, b"%PDF-").is_some() && !matches!(claimed, Claim::Is(f) if f != Format::Pdf))
    {
        return Ok(Format::Pdf);
    }
    if ZIP_SIGNATURES.iter().any(|s| bytes.starts_with(s)) {
        return package::identify(bytes);
    }
    if bytes.starts_with(&OLE_SIGNATURE) {
        return Err(ole(bytes, filename));
    }
    if !text_bom
        && let Some((_, name)) = BINARY_SIGNATURES
            .iter()
            .find(|(s, _)| bytes.starts_with(s) && binary_or_marked(s, bytes))
    {
        return Err(unsupported(name));
    }
    match claimed {
        Claim::Is(Format::Pdf) => Err(ExtractError::broken(
            "a PDF begins with %PDF-, this file does not",
        )),
        Claim::Is(Format::Docx | Format::Odt) => Err(ExtractError::broken(
            "a DOCX or ODT file is a ZIP package, this file is not",
        )),
        Claim::Is(Format::Text) if text_bom || !has_nul(bytes) => Ok(if html_start(bytes) {
            Format::Html
        } else {
            Format::Text
        }),
        Claim::Is(format) if text_bom || !has_nul(bytes) => Ok(format),
        Claim::Nothing if text_bom || !has_nul(bytes) => Ok(if html_start(bytes) {
            Format::Html
        } else {
            Format::Text
        }),
        Claim::Is(_) => Err(ExtractError::broken(
            "the file is named as text, but its content is not text",
        )),
        Claim::Nothing => Err(unsupported("unbekannt")),
        Claim::Other(got) => Err(unsupported(&got)),
    }
}

/// Signatures that are plain letters count only with binary content behind them.
fn binary_or_marked(signature: &[u8], bytes: &[u8]) -> bool {
    !matches!(signature, b"MZ" | b"GIF8" | b"Rar!") || has_nul(bytes)
}

enum Claim {
    Is(Format),
    Other(String),
    Nothing,
}

fn claimed(filename: &str, media_type: &str) -> Claim {
    let name = filename.rsplit(['/', '\\']).next().unwrap_or(filename);
    let ending = name
        .rsplit_once('.')
        .map(|(_, ending)| ending.to_lowercase());
    match ending.as_deref() {
        Some("txt" | "text" | "asc" | "log") => return Claim::Is(Format::Text),
        Some("md" | "markdown") => return Claim::Is(Format::Markdown),
        Some("html" | "htm" | "xhtml") => return Claim::Is(Format::Html),
        Some("pdf") => return Claim::Is(Format::Pdf),
        Some("docx") => return Claim::Is(Format::Docx),
        Some("odt") => return Claim::Is(Format::Odt),
        _ => {}
    }
    let media_type = media_type
        .split(';')
        .next()
        .unwrap_or("")
        .trim()
        .to_lowercase();
    match media_type.as_str() {
        "text/plain" => Claim::Is(Format::Text),
        "text/markdown" => Claim::Is(Format::Markdown),
        "text/html" | "application/xhtml+xml" => Claim::Is(Format::Html),
        "application/pdf" => Claim::Is(Format::Pdf),
        "application/vnd.openxmlformats-officedocument.wordprocessingml.document" => {
            Claim::Is(Format::Docx)
        }
        "application/vnd.oasis.opendocument.text" => Claim::Is(Format::Odt),
        "" | "application/octet-stream" => match ending {
            // A real ending is short; "Protokoll vom 3. Mai" has none.
            Some(e)
                if (1..=5).contains(&e.len()) && e.chars().all(|c| c.is_ascii_alphanumeric()) =>
            {
                Claim::Other(format!(".{e}"))
            }
            _ => Claim::Nothing,
        },
        other => Claim::Other(ending.map_or_else(|| other.to_string(), |e| format!(".{e}"))),
    }
}

/// The container of old Office files and of encrypted new ones.
fn ole(bytes: &[u8], filename: &str) -> ExtractError {
    let utf16 = |name: &str| {
        name.encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect::<Vec<u8>>()
    };
    if find(bytes, &utf16("EncryptedPackage")).is_some()
        || find(bytes, &utf16("EncryptionInfo")).is_some()
    {
        return ExtractError::PasswordProtected;
    }
    if matches!(claimed(filename, ""), Claim::Is(Format::Docx)) {
        return ExtractError::broken(
            "a DOCX file is a ZIP package, this file is an old Office container",
        );
    }
    unsupported(".doc")
}

pub(super) fn unsupported(got: &str) -> ExtractError {
    ExtractError::UnsupportedType {
        got: got.to_string(),
        supported: SUPPORTED.map(String::from).to_vec(),
    }
}

/// Text without a byte order mark holds no NUL.
fn has_nul(bytes: &[u8]) -> bool {
    bytes.contains(&0)
}

fn html_start(bytes: &[u8]) -> bool {
    let head = bytes
        .get(..SIGNATURE_WINDOW)
        .unwrap_or(bytes)
        .trim_ascii_start();
    let head = head
        .strip_prefix(b"\xef\xbb\xbf")
        .unwrap_or(head)
        .trim_ascii_start()
        .to_ascii_lowercase();
    head.starts_with(b"<!doctype html") || head.starts_with(b"<html")
}

pub(super) fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len().max(1))
        .position(|window| window == needle)
}

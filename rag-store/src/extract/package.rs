//! The ZIP packages of DOCX and ODT: which of the two, and one part at a time, with bounds against decompression bombs.

use std::io::{Cursor, Read};

use quick_xml::events::BytesStart;
use zip::ZipArchive;

use super::sniff::unsupported;
use super::{ExtractError, Format, MAX_PACKAGE_ENTRIES, MAX_PART_BYTES, plain};

pub(super) type Package<'a> = ZipArchive<Cursor<&'a [u8]>>;

pub(super) fn open(bytes: &[u8]) -> Result<Package<'_>, ExtractError> {
    let package = ZipArchive::new(Cursor::new(bytes))
        .map_err(|_| ExtractError::broken("the ZIP package cannot be opened"))?;
    if package.len() > MAX_PACKAGE_ENTRIES {
        return Err(ExtractError::broken(format!(
            "the package has more than {MAX_PACKAGE_ENTRIES} entries"
        )));
    }
    Ok(package)
}

/// DOCX or ODT; every other package is not read.
pub(super) fn identify(bytes: &[u8]) -> Result<Format, ExtractError> {
    let mut package = open(bytes)?;
    let has =
        |package: &Package<'_>, name: &str| package.file_names_raw().any(|n| n == name.as_bytes());
    if has(&package, "word/document.xml") {
        return Ok(Format::Docx);
    }
    if has(&package, "mimetype") {
        let mime = part(&mut package, "mimetype")?.unwrap_or_default();
        return match mime.trim() {
            "application/vnd.oasis.opendocument.text"
            | "application/vnd.oasis.opendocument.text-template" => {
                match part(&mut package, "META-INF/manifest.xml")? {
                    Some(manifest) if manifest.contains("encryption-data") => {
                        Err(ExtractError::PasswordProtected)
                    }
                    _ => Ok(Format::Odt),
                }
            }
            "application/vnd.oasis.opendocument.spreadsheet" => Err(unsupported(".ods")),
            "application/vnd.oasis.opendocument.presentation" => Err(unsupported(".odp")),
            "application/epub+zip" => Err(unsupported(".epub")),
            _ => Err(unsupported(".zip")),
        };
    }
    Err(match () {
        () if has(&package, "xl/workbook.xml") => unsupported(".xlsx"),
        () if has(&package, "ppt/presentation.xml") => unsupported(".pptx"),
        () if has(&package, "[Content_Types].xml") => {
            ExtractError::broken("the package has no word/document.xml")
        }
        () => unsupported(".zip"),
    })
}

/// A part's text; `None` when the package has no such part.
pub(super) fn part(package: &mut Package<'_>, name: &str) -> Result<Option<String>, ExtractError> {
    let file = match package.by_name(name) {
        Ok(file) => file,
        Err(zip::result::ZipError::FileNotFound) => return Ok(None),
        Err(_) => {
            return Err(ExtractError::broken(format!(
                "the part {name} cannot be opened"
            )));
        }
    };
    if file.encrypted() {
        return Err(ExtractError::PasswordProtected);
    }
    let mut bytes = Vec::new();
    // The declared size is the sender's word; only what really comes out counts.
    let read = file.take(MAX_PART_BYTES + 1).read_to_end(&mut bytes);
    if bytes.len() as u64 > MAX_PART_BYTES {
        return Err(ExtractError::TooLarge {
            limit: MAX_PART_BYTES,
            got: bytes.len() as u64,
        });
    }
    read.map_err(|_| ExtractError::broken(format!("the part {name} cannot be unpacked")))?;
    Ok(Some(plain::decode(&bytes)))
}

/// An attribute by its local name, unescaped.
pub(super) fn attribute(element: &BytesStart<'_>, local: &str) -> Option<String> {
    element
        .attributes()
        .with_checks(false)
        .flatten()
        .find(|a| a.key.local_name().into_inner() == local)
        .map(|a| {
            quick_xml::escape::unescape(&a.value)
                .map_or_else(|_| a.value.to_string(), |value| value.into_owned())
        })
}

/// What an entity or character reference stands for; unknown ones (from a DTD) for nothing.
pub(super) fn resolve(reference: &quick_xml::events::BytesRef<'_>) -> String {
    if let Ok(Some(c)) = reference.resolve_char_ref() {
        return c.to_string();
    }
    quick_xml::escape::resolve_predefined_entity(reference.as_ref())
        .unwrap_or("")
        .to_string()
}

pub(super) fn broken_xml() -> ExtractError {
    ExtractError::broken("its XML is not well-formed")
}

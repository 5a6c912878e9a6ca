//! Why a document has no text, for programs in English and for people in German.

use serde::{Deserialize, Serialize};

/// Why a document could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum ExtractError {
    #[error("the file is empty; upload a file with content")]
    Empty,
    /// In bytes, of the file or of what it unpacks to.
    #[error("the document has {got} bytes, at most {limit} are read; split it into parts")]
    TooLarge { limit: u64, got: u64 },
    #[error("the document is protected by a password; upload it without protection")]
    PasswordProtected,
    /// `why` never quotes the document.
    #[error(
        "the document is damaged: {why}; open it in its program, save it again and upload that"
    )]
    Broken { why: String },
    #[error("the type {got} is not read; expected one of {}", supported.join(", "))]
    UnsupportedType { got: String, supported: Vec<String> },
    #[error("reading the document took too long; split it into parts")]
    Timeout,
    /// A scan: pages without text.
    #[error(
        "the document has no text, it may be a scan; run text recognition on it and upload the result"
    )]
    NoText,
}

impl ExtractError {
    pub(super) fn broken(why: impl Into<String>) -> Self {
        Self::Broken { why: why.into() }
    }

    /// For the person who uploaded the document: what is wrong and what to do.
    pub fn message_de(&self) -> String {
        match self {
            Self::Empty => "Die Datei ist leer. Bitte laden Sie eine Datei mit Inhalt hoch.".into(),
            Self::TooLarge { limit, got } => format!(
                "Das Dokument ist zu groß ({}; erlaubt sind {}). Bitte teilen Sie es in kleinere Dokumente auf.",
                megabytes_de(*got),
                megabytes_de(*limit)
            ),
            Self::PasswordProtected => "Das Dokument ist mit einem Kennwort geschützt. Bitte speichern Sie es ohne \
                 Kennwortschutz und laden Sie es erneut hoch."
                .into(),
            Self::Broken { .. } => "Das Dokument ist beschädigt und lässt sich nicht lesen. Bitte öffnen Sie es im \
                 ursprünglichen Programm, speichern Sie es neu und laden Sie es erneut hoch."
                .into(),
            Self::UnsupportedType { got, supported } => format!(
                "Der Dateityp {got} wird nicht unterstützt. Möglich sind: {}.",
                supported.join(", ")
            ),
            Self::Timeout => "Das Lesen des Dokuments hat zu lange gedauert. Bitte teilen Sie es in kleinere \
                 Dokumente auf."
                .into(),
            Self::NoText => "Das Dokument enthält keinen Text, vermutlich ist es ein Scan. Bitte führen Sie zuerst \
                 eine Texterkennung durch."
                .into(),
        }
    }
}

/// One decimal, with a German comma.
fn megabytes_de(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1_048_576.0).replace('.', ",")
}

//! What callers see: ids, collections, documents, chunks, hits. Clear text; never logged.

use std::fmt;
use std::str::FromStr;

use coordinator::{Redacted, clock};
use rand::RngCore;
use serde::{Deserialize, Serialize};

use super::Error;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 16]);

        impl $name {
            /// A new id: UUID version 7, so that ids sort by their time of creation.
            pub fn generate() -> Self {
                let mut random = [0; 10];
                rand::rng().fill_bytes(&mut random);
                Self(*uuid::Builder::from_unix_timestamp_millis(clock::now_ms(), &random).into_uuid().as_bytes())
            }

            pub(crate) fn bytes(&self) -> &[u8; 16] {
                &self.0
            }

            pub(crate) fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        /// Anything that is not of the printed form is [`Error::NotFound`]: no such thing can exist.
        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self, Error> {
                let digits = text.strip_prefix($prefix).ok_or(Error::NotFound)?;
                let mut bytes = [0; 16];
                if digits.bytes().any(|b| b.is_ascii_uppercase()) {
                    return Err(Error::NotFound);
                }
                hex::decode_to_slice(digits, &mut bytes).map_err(|_| Error::NotFound)?;
                Ok(Self(bytes))
            }
        }

        /// The printed form where the format is for people (JSON), 16 bytes where it is not (postcard).
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    let text = String::deserialize(deserializer)?;
                    text.parse().map_err(|_| {
                        serde::de::Error::custom(format!("expected {}…32 hex digits, got {text:?}", $prefix))
                    })
                } else {
                    Ok(Self(<[u8; 16]>::deserialize(deserializer)?))
                }
            }
        }
    };
}

id!(
    /// A collection's id; prints as `col_` and 32 hex digits.
    CollectionId, "col_"
);
id!(
    /// A document's id; prints as `doc_` and 32 hex digits.
    DocumentId, "doc_"
);

/// A tenant's knowledge base.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Collection {
    pub id: CollectionId,
    pub name: String,
    pub description: String,
    /// Milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Documents in it, whatever their status.
    pub documents: u64,
}

/// Where a document stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Stored; waits for its turn.
    Queued,
    /// Being extracted, cut or embedded; or waiting for the embedding model.
    Processing,
    /// Its chunks are found by retrieval.
    Ready,
    /// It could not be read; [`Document::error`] says why. The original is kept until it is deleted.
    Failed,
}

/// A document as its owner sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Document {
    pub id: DocumentId,
    pub collection: CollectionId,
    /// File name as uploaded, without folders.
    pub name: String,
    pub media_type: String,
    /// Size of the original.
    pub bytes: u64,
    /// Pages where the format has pages and ingestion has come that far.
    pub pages: Option<u32>,
    pub status: Status,
    /// 0 to 1.
    pub progress: f32,
    /// German, for the person who uploaded it; only when `Failed`.
    pub error: Option<String>,
    /// Milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// Chunks that retrieval can find; 0 until `Ready`.
    pub chunks: u32,
}

/// One chunk of a document that is ready.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DocumentChunk {
    /// 0-based place in the document.
    pub ordinal: u32,
    /// 1-based page it begins on, where the format has pages.
    pub page: Option<u32>,
    /// The headings above it, joined; may be empty.
    pub heading: String,
    /// Literal text of the document.
    pub text: Redacted<String>,
}

/// A question to the permitted collections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RetrieveRequest {
    pub query: Redacted<String>,
    /// Searched collections; each must be the tenant's, else [`Error::NotFound`]. Empty: all of the tenant's.
    pub collections: Vec<CollectionId>,
    /// Most hits wanted, 1 to 100.
    pub top_k: usize,
}

/// A chunk that answers, best first, down to document, page and literal passage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hit {
    pub document_id: DocumentId,
    /// The document's name.
    pub document: String,
    pub page: Option<u32>,
    pub heading: String,
    /// Literal text of the document.
    pub text: Redacted<String>,
    /// 0 to 1, comparable within one answer only.
    pub score: f32,
    pub chunk_ordinal: u32,
}

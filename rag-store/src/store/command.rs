//! What is replicated: commands, their replies, and the records they make. Nonces, ids and times are in the command, never
//! made while it is applied.

use coordinator::ids::TenantId;
use serde::{Deserialize, Serialize};

use super::{CollectionId, DocumentId};
use crate::crypto::Sealed;

/// Bytes of an original in one entry: small enough that heartbeats are never held up behind one.
pub const PART_BYTES: usize = 1024 * 1024;

/// Parts of one original; the record keeps which have come in the bits of a `u64`.
pub const MAX_PARTS: u32 = 64;

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    pub tenant: TenantId,
    pub command: Command,
}

/// A change of the state. Every one may come twice: the second does nothing and answers as the first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Gives the tenant its key unless it has one.
    EnsureTenant {
        wrapped_key: Sealed,
    },
    CreateCollection {
        id: CollectionId,
        name_tag: [u8; 16],
        created_ms: u64,
        about: Sealed,
    },
    /// Removes records and keys at once and leaves marks for [`Command::Sweep`].
    DeleteCollection {
        id: CollectionId,
    },
    BeginDocument {
        id: DocumentId,
        collection: CollectionId,
        created_ms: u64,
        bytes: u64,
        parts: u32,
        wrapped_key: Sealed,
        about: Sealed,
    },
    Part {
        document: DocumentId,
        part: u32,
        sealed: Sealed,
    },
    CommitDocument {
        document: DocumentId,
    },
    /// Begins an ingestion, or begins it anew; earlier attempts can change nothing from here on.
    StartIngestion {
        document: DocumentId,
        attempt: u64,
    },
    Progress {
        document: DocumentId,
        attempt: u64,
        permille: u16,
        pages: Option<u32>,
    },
    /// Chunks that are seen only once [`Command::Ready`] has come.
    Chunks {
        document: DocumentId,
        attempt: u64,
        chunks: Vec<(u32, Sealed)>,
    },
    /// The last chunks, and the flip that makes all visible together; refused unless there are then `count`.
    Ready {
        document: DocumentId,
        attempt: u64,
        pages: Option<u32>,
        count: u32,
        last: Vec<(u32, Sealed)>,
    },
    Fail {
        document: DocumentId,
        attempt: u64,
        reason: Sealed,
    },
    DeleteDocument {
        document: DocumentId,
    },
    /// Removes what deleted documents left.
    Sweep {
        documents: Vec<DocumentId>,
    },
}

/// The answer to whoever proposed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    /// The tenant's key as it is stored, which may be an earlier one than was proposed.
    TenantKey(Sealed),
    NotFound,
    /// Another collection bears this name.
    Exists,
    /// Not in a state that allows this: an attempt that was overtaken, or a document already finished.
    Stale,
    /// Parts or chunks are missing.
    Incomplete,
    /// The entry could not be read.
    Malformed,
}

/// What is kept of a collection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectionRecord {
    pub created_ms: u64,
    pub name_tag: [u8; 16],
    /// [`CollectionAbout`] under the tenant's key.
    pub about: Sealed,
    /// Committed documents.
    pub documents: u64,
}

/// The part of a collection that its tenant wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CollectionAbout {
    pub name: String,
    pub description: String,
}

/// Where a document stands; [`super::Status`] and, before it, `Uploading`, which nobody sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    Uploading,
    Queued,
    Processing,
    Ready,
    Failed,
}

/// What is kept of a document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DocumentRecord {
    pub collection: CollectionId,
    pub created_ms: u64,
    pub bytes: u64,
    pub parts: u32,
    /// Bit n: part n has come.
    pub parts_come: u64,
    pub stage: Stage,
    /// The one ingestion that may change this document.
    pub attempt: u64,
    pub permille: u16,
    pub pages: Option<u32>,
    /// Chunks stored so far; seen once the stage is `Ready`.
    pub chunks: u32,
    /// [`DocumentAbout`] under the document's key.
    pub about: Sealed,
    /// Why it failed, under the document's key.
    pub failure: Option<Sealed>,
}

/// The part of a document that its owner wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DocumentAbout {
    pub name: String,
    pub media_type: String,
}

/// A chunk as it is sealed.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct ChunkRecord {
    pub page: Option<u32>,
    /// The document's own title, where it has one; searched, not shown.
    pub title: String,
    pub heading: String,
    pub text: String,
    /// Half-precision components as their bits.
    pub vector: Vec<u16>,
}

//! What client and service say to each other: postcard in transport frames, one service for one-frame replies and one for lists.

use coordinator::Redacted;
use coordinator::ids::{NodeId, RaftGroupId, TenantId};
use serde::{Deserialize, Serialize};

use crate::store::{
    Collection, CollectionId, Document, DocumentChunk, DocumentId, Error, Hit, RetrieveRequest,
};

/// One request, one reply frame.
pub const SERVICE_CALL: &str = "store.call";
/// One request, reply frames until the list ends.
pub const SERVICE_LIST: &str = "store.list";

/// Entries in one frame of a list.
pub const LIST_BATCH: usize = 1_000;
/// A frame of a list is closed once it holds so much: an entry has some KiB at most, and the transport's limit is 16 MiB.
pub const LIST_FRAME_BYTES: usize = 2 * 1024 * 1024;

/// Longest collection or file name, in characters.
pub const MAX_NAME_CHARS: usize = 200;
/// Longest media type, in bytes; RFC 6838 allows 127 on each side of the slash.
pub const MAX_MEDIA_TYPE_BYTES: usize = 255;
/// Longest question, in bytes; the embedding model reads about 2,000 of them.
pub const MAX_QUERY_BYTES: usize = 32 * 1024;
/// Most hits of one question.
pub const MAX_TOP_K: usize = 100;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub group: RaftGroupId,
    pub tenant: TenantId,
    pub op: Op,
}

/// What is asked. Ids of new things come from the client, so that asking twice makes one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Op {
    CreateCollection {
        id: CollectionId,
        name: String,
    },
    Collection {
        id: CollectionId,
    },
    Collections,
    DeleteCollection {
        id: CollectionId,
    },
    Begin {
        id: DocumentId,
        collection: CollectionId,
        name: String,
        media_type: String,
        bytes: u64,
        parts: u32,
    },
    Part {
        document: DocumentId,
        part: u32,
        bytes: Redacted<Bytes>,
    },
    Commit {
        document: DocumentId,
    },
    Document {
        id: DocumentId,
    },
    DeleteDocument {
        id: DocumentId,
    },
    Retrieve(RetrieveRequest),
    /// List: [`Answer::Documents`].
    Documents {
        collection: CollectionId,
    },
    /// List: [`Answer::Chunks`].
    Chunks {
        document: DocumentId,
    },
    /// List: [`Answer::Document`], then [`Answer::Bytes`].
    Original {
        document: DocumentId,
    },
}

/// A run of bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        crate::crypto::bytes_run::serialize(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::crypto::bytes_run::deserialize(deserializer).map(Bytes)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    Done,
    Collection(Collection),
    Collections(Vec<Collection>),
    Document(Document),
    Documents(Vec<Document>),
    Chunks(Vec<DocumentChunk>),
    Bytes(Redacted<Bytes>),
    Hits(Vec<Hit>),
}

/// The frame that answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    Ok(Answer),
    /// Ask that node, or another one.
    NotLeader {
        leader: Option<NodeId>,
    },
    /// Ask again in a moment; it may have taken effect.
    Again {
        why: String,
    },
    Err(Error),
    /// This node cannot; ask another one. It may have taken effect.
    Elsewhere {
        why: String,
        disk_full: bool,
    },
}

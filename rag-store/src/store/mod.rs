//! The replicated state: records, commands, key layout and the state machine. It holds sealed values only and knows neither
//! network nor indexes.

mod command;
mod error;
pub(crate) mod keys;
pub(crate) mod machine;
pub(crate) mod reader;
mod record;

pub use error::Error;
pub use record::{
    Collection, CollectionId, Document, DocumentChunk, DocumentId, Hit, RetrieveRequest, Status,
};

pub(crate) use command::{
    ChunkRecord, CollectionAbout, Command, DocumentAbout, Entry, PART_BYTES, Reply, Stage,
};

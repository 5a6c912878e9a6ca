//! What a tenant keeps: collections, documents, chunks and their indexes, on three replicas.
//!
//! A document's way: [`client`] sends it in parts to [`service`] on the leader of the tenant's store group; each part is
//! sealed by [`crypto`] and becomes one entry of the replicated [`store`]; [`ingest`] on the leader extracts, cuts and embeds it
//! and commits chunks and vectors; every replica's [`index`] follows; [`retrieve`] answers from it.
//!
//! Invariants: every key begins with its tenant; every value that a user wrote is sealed under a key of its document; another
//! tenant's id answers exactly as an unknown one; nothing that is derived (full text, vectors) is written to disk, because it is
//! clear text; no document text and no query reaches a log.

pub mod chunk;
pub mod client;
pub mod crypto;
pub mod extract;
pub mod index;
pub mod ingest;
pub mod node;
pub mod retrieve;
pub mod service;
pub mod store;

pub use client::StoreClient;
pub use node::{EmbedKind, Embedder, StoreConfig, StoreNode};
pub use store::{
    Collection, CollectionId, Document, DocumentChunk, DocumentId, Error, Hit, RetrieveRequest,
    Status,
};

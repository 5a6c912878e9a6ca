//! What is derived from the store for searching: per tenant, full text and vectors. Both hold clear text in one form or another,
//! so they live in memory only and are built again from the store at every start.

pub mod follow;
pub mod german;
pub mod text;
pub mod vectors;

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use coordinator::ids::TenantId;
use half::f16;

use crate::chunk::HEADING_SEPARATOR;
use crate::extract::BLOCK_SEPARATOR;
use crate::store::{ChunkRecord, CollectionId, DocumentId};
use german::{Analyzer, Dictionary, Terms};
use text::{QueryFacts, TextEntry, TextIndex};
use vectors::Vectors;

/// Where a hit lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkRef {
    pub collection: CollectionId,
    pub document: DocumentId,
    pub ordinal: u32,
}

/// A document to be indexed.
pub struct IndexedDocument {
    pub id: DocumentId,
    pub collection: CollectionId,
    /// File name.
    pub name: String,
    pub chunks: Vec<ChunkRecord>,
}

/// What each arm found, best first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Arms {
    /// With BM25 scores.
    pub text: Vec<(ChunkRef, f32)>,
    /// With cosines; empty when the query has no vector.
    pub dense: Vec<(ChunkRef, f32)>,
    pub facts: QueryFacts,
}

/// One tenant's indexes.
pub(crate) struct TenantIndex {
    text: TextIndex,
    vectors: Vectors,
    chunks: HashMap<u64, ChunkRef>,
    documents: HashMap<DocumentId, (CollectionId, Vec<u64>)>,
    next_key: u64,
}

impl TenantIndex {
    fn new() -> Result<Self, tantivy::TantivyError> {
        Ok(Self {
            text: TextIndex::new()?,
            vectors: Vectors::default(),
            chunks: HashMap::new(),
            documents: HashMap::new(),
            next_key: 0,
        })
    }

    fn forget(&mut self, document: DocumentId) -> Vec<u64> {
        let Some((_, keys)) = self.documents.remove(&document) else {
            return Vec::new();
        };
        for key in &keys {
            self.chunks.remove(key);
            self.vectors.remove(*key);
        }
        keys
    }

    fn update(
        &mut self,
        removed: &[DocumentId],
        added: Vec<Prepared>,
    ) -> Result<(), tantivy::TantivyError> {
        let replaced = added.iter().map(|document| document.id);
        let gone: Vec<u64> = removed
            .iter()
            .copied()
            .chain(replaced)
            .flat_map(|id| self.forget(id))
            .collect();
        let mut entries = Vec::new();
        for document in added {
            let mut keys = Vec::with_capacity(document.chunks.len());
            for chunk in document.chunks {
                let key = self.next_key;
                self.next_key += 1;
                keys.push(key);
                let place = ChunkRef {
                    collection: document.collection,
                    document: document.id,
                    ordinal: chunk.ordinal,
                };
                self.chunks.insert(key, place);
                if !chunk.row.is_empty() && !self.vectors.add(key, &chunk.row) {
                    tracing::warn!(document = %document.id, dims = chunk.row.len(), "vector of another length: not searched");
                }
                entries.push(TextEntry {
                    key,
                    collection: document.collection,
                    head: chunk.head,
                    body: chunk.body,
                });
            }
            self.documents
                .insert(document.id, (document.collection, keys));
        }
        if gone.is_empty() && entries.is_empty() {
            return Ok(());
        }
        self.text.update(&gone, entries)
    }

    fn search(
        &self,
        query: &str,
        vector: Option<&[f32]>,
        permitted: Option<&[CollectionId]>,
        limit: usize,
    ) -> Result<Arms, tantivy::TantivyError> {
        let (text, facts) = self.text.search(query, permitted, limit)?;
        let may = |key: u64| match permitted {
            None => true,
            Some(ids) => self
                .chunks
                .get(&key)
                .is_some_and(|chunk| ids.contains(&chunk.collection)),
        };
        let permitted_rows = match permitted {
            None => self.vectors.rows(),
            Some(ids) => self
                .documents
                .values()
                .filter(|(c, _)| ids.contains(c))
                .map(|(_, keys)| keys.len())
                .sum(),
        };
        let dense = vector.map_or_else(Vec::new, |v| {
            self.vectors.search(v, limit, permitted_rows, may)
        });
        Ok(Arms {
            text: self.placed(text),
            dense: self.placed(dense),
            facts,
        })
    }

    /// Equal scores in the order of the chunks: keys depend on when a replica indexed what.
    fn placed(&self, found: Vec<(u64, f32)>) -> Vec<(ChunkRef, f32)> {
        let mut placed: Vec<(ChunkRef, f32)> = found
            .into_iter()
            .filter_map(|(key, score)| Some((*self.chunks.get(&key)?, score)))
            .collect();
        placed.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        placed
    }
}

/// A document made ready for the index, which takes much longer than bringing it in.
struct Prepared {
    id: DocumentId,
    collection: CollectionId,
    chunks: Vec<PreparedChunk>,
}

struct PreparedChunk {
    ordinal: u32,
    head: Terms,
    body: Terms,
    row: Vec<f16>,
}

fn prepare(document: &IndexedDocument) -> Prepared {
    let own = Dictionary::of_texts(document.chunks.iter().map(|c| c.text.as_str()));
    let mut analyzer = Analyzer::new(own);
    let name = name_as_words(&document.name);
    // Headings rank high and answer nothing; unless the document says nothing else.
    let skip_headings = !document.chunks.iter().all(is_only_headings);
    let chunks = document
        .chunks
        .iter()
        .zip(0u32..)
        .filter(|(chunk, _)| !(skip_headings && is_only_headings(chunk)))
        .map(|(chunk, ordinal)| PreparedChunk {
            ordinal,
            head: analyzer.terms(&format!("{name} {} {}", chunk.title, chunk.heading)),
            body: analyzer.terms(&chunk.text),
            row: chunk
                .vector
                .iter()
                .map(|bits| f16::from_bits(*bits))
                .collect(),
        })
        .collect();
    Prepared {
        id: document.id,
        collection: document.collection,
        chunks,
    }
}

/// Whether every block of the chunk is one of the headings that it stands under.
fn is_only_headings(chunk: &ChunkRecord) -> bool {
    let is_heading = |block: &str| {
        chunk
            .heading
            .split(HEADING_SEPARATOR)
            .any(|heading| heading == block)
    };
    chunk.text.split(BLOCK_SEPARATOR).all(is_heading)
}

/// "hundesteuer_satzung-2024.pdf" as words.
fn name_as_words(name: &str) -> String {
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    stem.replace(['_', '.'], " ")
}

/// The indexes of all tenants of one store group on this node.
#[derive(Default)]
pub struct Indexes {
    tenants: RwLock<HashMap<TenantId, Arc<RwLock<TenantIndex>>>>,
}

impl Indexes {
    /// Removes documents of a tenant and adds others; both are seen together. Adding one that is there replaces it.
    pub fn update(
        &self,
        tenant: &TenantId,
        removed: &[DocumentId],
        added: &[IndexedDocument],
    ) -> Result<(), tantivy::TantivyError> {
        let prepared = added.iter().map(prepare).collect();
        let there = self
            .tenants
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(tenant)
            .cloned();
        let index = match there {
            Some(index) => index,
            None if added.is_empty() => return Ok(()),
            None => {
                let fresh = Arc::new(RwLock::new(TenantIndex::new()?));
                let mut tenants = self.tenants.write().unwrap_or_else(PoisonError::into_inner);
                tenants.entry(tenant.clone()).or_insert(fresh).clone()
            }
        };
        index
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .update(removed, prepared)
    }

    /// Documents of the tenant that are indexed, of one collection or of all.
    pub fn documents(
        &self,
        tenant: &TenantId,
        collection: Option<CollectionId>,
    ) -> Vec<DocumentId> {
        let Some(index) = self.tenant(tenant) else {
            return Vec::new();
        };
        let index = index.read().unwrap_or_else(PoisonError::into_inner);
        let wanted = |c: &CollectionId| collection.is_none_or(|wanted| wanted == *c);
        index
            .documents
            .iter()
            .filter(|(_, (c, _))| wanted(c))
            .map(|(id, _)| *id)
            .collect()
    }

    /// Searches both arms. `permitted` is checked before anything is scored; `None` permits all of the tenant's collections.
    pub fn search(
        &self,
        tenant: &TenantId,
        query: &str,
        vector: Option<&[f32]>,
        permitted: Option<&[CollectionId]>,
        limit: usize,
    ) -> Result<Arms, tantivy::TantivyError> {
        let Some(index) = self.tenant(tenant) else {
            return Ok(Arms::default());
        };
        index
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .search(query, vector, permitted, limit)
    }

    /// Chunks indexed over all tenants.
    pub fn chunks(&self) -> usize {
        let tenants = self.tenants.read().unwrap_or_else(PoisonError::into_inner);
        tenants
            .values()
            .map(|i| {
                i.read()
                    .unwrap_or_else(PoisonError::into_inner)
                    .chunks
                    .len()
            })
            .sum()
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.tenants
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }

    pub(crate) fn tenant(&self, tenant: &TenantId) -> Option<Arc<RwLock<TenantIndex>>> {
        self.tenants
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(tenant)
            .cloned()
    }
}

#[cfg(test)]
mod tests;

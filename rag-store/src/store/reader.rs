//! Reads records out of a consistent view and opens them. Another tenant's id is simply not there: its key begins otherwise.

use coordinator::Redacted;
use coordinator::ids::TenantId;
use coordinator::replication::{self, View};
use serde::de::DeserializeOwned;

use super::command::{
    ChunkRecord, CollectionAbout, CollectionRecord, DocumentAbout, DocumentRecord, Stage,
};
use super::machine::decode;
use super::{Collection, CollectionId, Document, DocumentChunk, DocumentId, Error, Status, keys};
use crate::crypto::{Key, OpenError, Sealed};

/// Why something could not be read here; another replica may still read it, unless it is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadError {
    NotFound,
    /// The replica's disk fails, or the replica was shut down.
    Replica(replication::Error),
    /// What is there cannot be opened or is of another version.
    Unreadable(String),
}

impl From<OpenError> for ReadError {
    fn from(error: OpenError) -> Self {
        Self::Unreadable(error.to_string())
    }
}

impl From<replication::Error> for ReadError {
    fn from(error: replication::Error) -> Self {
        Self::Replica(error)
    }
}

impl std::fmt::Display for ReadError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotFound => std::fmt::Display::fmt(&Error::NotFound, f),
            Self::Replica(error) => std::fmt::Display::fmt(error, f),
            Self::Unreadable(why) => f.write_str(why),
        }
    }
}

/// A document's record with the key that opens its values.
pub struct OpenDocument {
    pub id: DocumentId,
    pub record: DocumentRecord,
    pub key: Key,
}

/// One view and the root key.
pub struct Reader<'a> {
    view: &'a View,
    root: &'a Key,
}

impl<'a> Reader<'a> {
    pub fn new(view: &'a View, root: &'a Key) -> Self {
        Self { view, root }
    }

    fn get<T: DeserializeOwned>(&self, place: &[u8]) -> Result<Option<T>, ReadError> {
        Ok(decode(self.view.get(place)?))
    }

    /// The ids at the ends of the keys with this prefix, in order.
    fn ids(&self, prefix: &[u8]) -> Result<Vec<[u8; 16]>, ReadError> {
        let mut ids = Vec::new();
        for entry in self.view.scan_prefix(prefix) {
            ids.extend(keys::last_id(&entry?.0));
        }
        Ok(ids)
    }

    fn document_ids_at(&self, prefix: &[u8]) -> Result<Vec<DocumentId>, ReadError> {
        Ok(self
            .ids(prefix)?
            .into_iter()
            .map(DocumentId::from_bytes)
            .collect())
    }

    /// Tenants that have ever stored something here.
    pub fn tenants(&self) -> Result<Vec<TenantId>, ReadError> {
        let mut tenants = Vec::new();
        for entry in self.view.scan_prefix(keys::TENANTS) {
            tenants.extend(keys::tenant_of(&entry?.0));
        }
        Ok(tenants)
    }

    /// The tenant's key; `None` before it has stored anything.
    pub fn tenant_key(&self, tenant: &TenantId) -> Result<Option<Key>, ReadError> {
        let place = keys::tenant_key(tenant);
        let Some(wrapped) = self.get::<Sealed>(&place)? else {
            return Ok(None);
        };
        Ok(Some(self.root.unwrap_key(&place, &wrapped)?))
    }

    /// The document's record and key.
    pub fn open(&self, tenant: &TenantId, id: DocumentId) -> Result<OpenDocument, ReadError> {
        let record: DocumentRecord = self
            .get(&keys::document(tenant, id))?
            .ok_or(ReadError::NotFound)?;
        let tenant_key = self.tenant_key(tenant)?.ok_or(ReadError::NotFound)?;
        let place = keys::data_key(tenant, id);
        let wrapped: Sealed = self.get(&place)?.ok_or(ReadError::NotFound)?;
        Ok(OpenDocument {
            id,
            record,
            key: tenant_key.unwrap_key(&place, &wrapped)?,
        })
    }

    pub fn collection(&self, tenant: &TenantId, id: CollectionId) -> Result<Collection, ReadError> {
        let place = keys::collection(tenant, id);
        let record: CollectionRecord = self.get(&place)?.ok_or(ReadError::NotFound)?;
        let key = self.tenant_key(tenant)?.ok_or(ReadError::NotFound)?;
        let about: CollectionAbout = opened(&key, &place, &record.about)?;
        Ok(Collection {
            id,
            name: about.name,
            description: about.description,
            created_ms: record.created_ms,
            documents: record.documents,
        })
    }

    /// Whether the tenant has this collection.
    pub fn has_collection(&self, tenant: &TenantId, id: CollectionId) -> Result<bool, ReadError> {
        Ok(self.view.get(&keys::collection(tenant, id))?.is_some())
    }

    /// All collections, oldest first (ids sort by time).
    pub fn collections(&self, tenant: &TenantId) -> Result<Vec<Collection>, ReadError> {
        self.ids(&keys::collections(tenant))?
            .into_iter()
            .map(|id| self.collection(tenant, CollectionId::from_bytes(id)))
            .collect()
    }

    /// A document as its owner sees it; not there while it is uploading.
    pub fn document(&self, tenant: &TenantId, id: DocumentId) -> Result<Document, ReadError> {
        let open = self.open(tenant, id)?;
        let status = match open.record.stage {
            Stage::Uploading => return Err(ReadError::NotFound),
            Stage::Queued => Status::Queued,
            Stage::Processing => Status::Processing,
            Stage::Ready => Status::Ready,
            Stage::Failed => Status::Failed,
        };
        let about = self.about(tenant, &open)?;
        let error = match &open.record.failure {
            Some(sealed) => {
                let plain = open.key.open(&failure_place(tenant, id), sealed)?;
                Some(String::from_utf8_lossy(&plain).into_owned())
            }
            None => None,
        };
        let record = open.record;
        Ok(Document {
            id,
            collection: record.collection,
            name: about.name,
            media_type: about.media_type,
            bytes: record.bytes,
            pages: record.pages,
            status,
            progress: f32::from(record.permille) / 1000.0,
            error,
            created_ms: record.created_ms,
            // While it is being read, the record counts those that nobody sees yet.
            chunks: if status == Status::Ready {
                record.chunks
            } else {
                0
            },
        })
    }

    /// Name and media type of a document.
    pub fn about(
        &self,
        tenant: &TenantId,
        open: &OpenDocument,
    ) -> Result<DocumentAbout, ReadError> {
        opened(
            &open.key,
            &keys::document(tenant, open.id),
            &open.record.about,
        )
    }

    /// Ids of the documents of a collection, oldest first, those that are uploading included.
    pub fn member_ids(
        &self,
        tenant: &TenantId,
        collection: CollectionId,
    ) -> Result<Vec<DocumentId>, ReadError> {
        self.document_ids_at(&keys::members(tenant, collection))
    }

    /// Ids of all documents of the tenant.
    pub fn document_ids(&self, tenant: &TenantId) -> Result<Vec<DocumentId>, ReadError> {
        self.document_ids_at(&keys::documents(tenant))
    }

    /// Documents that are neither ready nor failed, oldest first.
    pub fn unfinished(
        &self,
        tenant: &TenantId,
    ) -> Result<Vec<(DocumentId, DocumentRecord)>, ReadError> {
        let mut documents = Vec::new();
        for id in self.document_ids_at(&keys::unfinished_all(tenant))? {
            documents.extend(
                self.get(&keys::document(tenant, id))?
                    .map(|record| (id, record)),
            );
        }
        Ok(documents)
    }

    /// How many documents are neither ready nor failed.
    pub fn unfinished_count(&self, tenant: &TenantId) -> Result<usize, ReadError> {
        Ok(self.ids(&keys::unfinished_all(tenant))?.len())
    }

    /// Deleted documents whose parts and chunks still take room.
    pub fn garbage(&self, tenant: &TenantId) -> Result<Vec<DocumentId>, ReadError> {
        self.document_ids_at(&keys::garbage_all(tenant))
    }

    /// One part of the original.
    pub fn part(
        &self,
        tenant: &TenantId,
        open: &OpenDocument,
        part: u32,
    ) -> Result<Vec<u8>, ReadError> {
        let place = keys::original(tenant, open.id, part);
        let sealed = self.view.get(&place)?.ok_or(ReadError::NotFound)?;
        Ok(open.key.open(&place, &Sealed::from_stored(sealed))?)
    }

    /// The whole original.
    pub fn original(&self, tenant: &TenantId, open: &OpenDocument) -> Result<Vec<u8>, ReadError> {
        let mut bytes = Vec::with_capacity(open.record.bytes as usize);
        for part in 0..open.record.parts {
            bytes.extend_from_slice(&self.part(tenant, open, part)?);
        }
        Ok(bytes)
    }

    /// One chunk.
    pub fn chunk(
        &self,
        tenant: &TenantId,
        open: &OpenDocument,
        ordinal: u32,
    ) -> Result<ChunkRecord, ReadError> {
        let place = keys::chunk(tenant, open.id, ordinal);
        let sealed = self.view.get(&place)?.ok_or(ReadError::NotFound)?;
        opened(&open.key, &place, &Sealed::from_stored(sealed))
    }

    /// All chunks of a document that is ready; none otherwise.
    pub fn chunks(
        &self,
        tenant: &TenantId,
        open: &OpenDocument,
    ) -> Result<Vec<ChunkRecord>, ReadError> {
        let count = if open.record.stage == Stage::Ready {
            open.record.chunks
        } else {
            0
        };
        (0..count)
            .map(|ordinal| self.chunk(tenant, open, ordinal))
            .collect()
    }
}

/// What a chunk's reader sees of it.
pub fn visible_chunk(ordinal: u32, record: ChunkRecord) -> DocumentChunk {
    DocumentChunk {
        ordinal,
        page: record.page,
        heading: record.heading,
        text: Redacted::new(record.text),
    }
}

/// Where a reason of failure is sealed for: beside the record, which has the name sealed for its own key.
pub fn failure_place(tenant: &TenantId, id: DocumentId) -> Vec<u8> {
    let mut place = keys::document(tenant, id);
    place.push(b'F');
    place
}

fn opened<T: DeserializeOwned>(key: &Key, place: &[u8], sealed: &Sealed) -> Result<T, ReadError> {
    let plain = key.open(place, sealed)?;
    postcard::from_bytes(&plain).map_err(|e| {
        ReadError::Unreadable(format!(
            "a stored record is of another version ({e}); upgrade this node"
        ))
    })
}

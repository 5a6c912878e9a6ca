//! (state, command) → (state, reply): deterministic, without keys, clock or randomness.

use serde::Serialize;
use serde::de::DeserializeOwned;

use coordinator::ids::TenantId;

use super::command::{CollectionRecord, Command, DocumentRecord, Entry, MAX_PARTS, Reply, Stage};
use super::{CollectionId, DocumentId, keys};
use crate::crypto::Sealed;

/// What the machine needs of a state: a replica's transaction, or a map in tests.
pub trait State {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>>;
    fn put(&mut self, key: &[u8], value: &[u8]);
    fn delete(&mut self, key: &[u8]);
    fn delete_prefix(&mut self, prefix: &[u8]);
    /// Keys with the prefix, in order.
    fn keys(&self, prefix: &[u8]) -> Vec<Vec<u8>>;
}

/// Applies one log entry and returns the encoded [`Reply`].
pub fn apply_bytes(entry: &[u8], state: &mut dyn State) -> Vec<u8> {
    let reply = match postcard::from_bytes::<Entry>(entry) {
        Ok(entry) => apply(entry, state),
        Err(_) => Reply::Malformed,
    };
    encode(&reply)
}

/// The stored form of any record or reply.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("records are plain data, which postcard always encodes")
}

/// A stored record; `None` where there is none, or where it was written by another version.
pub fn decode<T: DeserializeOwned>(bytes: Option<Vec<u8>>) -> Option<T> {
    postcard::from_bytes(&bytes?).ok()
}

/// Applies one command.
pub fn apply(entry: Entry, state: &mut dyn State) -> Reply {
    let mut step = Step {
        tenant: entry.tenant,
        state,
    };
    match entry.command {
        Command::EnsureTenant { wrapped_key } => step.ensure_tenant(wrapped_key),
        Command::CreateCollection {
            id,
            name_tag,
            created_ms,
            about,
        } => step.create_collection(
            id,
            CollectionRecord {
                created_ms,
                name_tag,
                about,
                documents: 0,
            },
        ),
        Command::DeleteCollection { id } => step.delete_collection(id),
        Command::BeginDocument {
            id,
            collection,
            created_ms,
            bytes,
            parts,
            wrapped_key,
            about,
        } => {
            let record = DocumentRecord {
                collection,
                created_ms,
                bytes,
                parts,
                parts_come: 0,
                stage: Stage::Uploading,
                attempt: 0,
                permille: 0,
                pages: None,
                chunks: 0,
                about,
                failure: None,
            };
            step.begin(id, record, wrapped_key)
        }
        Command::Part {
            document,
            part,
            sealed,
        } => step.part(document, part, sealed),
        Command::CommitDocument { document } => step.commit(document),
        Command::StartIngestion { document, attempt } => step.start_ingestion(document, attempt),
        Command::Progress {
            document,
            attempt,
            permille,
            pages,
        } => step.ingesting(document, attempt, |_, record| {
            record.permille = record.permille.max(permille.min(1000));
            record.pages = pages.or(record.pages);
            Reply::Done
        }),
        Command::Chunks {
            document,
            attempt,
            chunks,
        } => step.ingesting(document, attempt, |step, record| {
            step.put_chunks(document, record, &chunks);
            Reply::Done
        }),
        Command::Ready {
            document,
            attempt,
            pages,
            count,
            last,
        } => step.ready(document, attempt, pages, count, &last),
        Command::Fail {
            document,
            attempt,
            reason,
        } => step.ingesting(document, attempt, |step, record| {
            step.state
                .delete_prefix(&keys::chunks(&step.tenant, document));
            step.state.delete(&keys::unfinished(&step.tenant, document));
            record.stage = Stage::Failed;
            record.chunks = 0;
            record.failure = Some(reason);
            Reply::Done
        }),
        Command::DeleteDocument { document } => step.delete_document(document),
        Command::Sweep { documents } => step.sweep(&documents),
    }
}

struct Step<'a> {
    tenant: TenantId,
    state: &'a mut dyn State,
}

impl Step<'_> {
    fn ensure_tenant(&mut self, wrapped_key: Sealed) -> Reply {
        let key = keys::tenant_key(&self.tenant);
        match decode(self.state.get(&key)) {
            Some(stored) => Reply::TenantKey(stored),
            None => {
                self.state.put(&key, &encode(&wrapped_key));
                self.state.put(&keys::tenant(&self.tenant), &[]);
                Reply::TenantKey(wrapped_key)
            }
        }
    }

    fn create_collection(&mut self, id: CollectionId, record: CollectionRecord) -> Reply {
        let name = keys::name(&self.tenant, &record.name_tag);
        match self.state.get(&name) {
            Some(owner) if owner == id.bytes() => Reply::Done,
            Some(_) => Reply::Exists,
            // An id is used again only by mistake; the collection that has it keeps its name and its documents.
            None if self.collection(id).is_some() => Reply::Exists,
            None => {
                self.state.put(&name, id.bytes());
                self.state
                    .put(&keys::collection(&self.tenant, id), &encode(&record));
                Reply::Done
            }
        }
    }

    fn collection(&self, id: CollectionId) -> Option<CollectionRecord> {
        decode(self.state.get(&keys::collection(&self.tenant, id)))
    }

    fn count_documents(&mut self, id: CollectionId, change: impl Fn(u64) -> u64) {
        if let Some(mut record) = self.collection(id) {
            record.documents = change(record.documents);
            self.state
                .put(&keys::collection(&self.tenant, id), &encode(&record));
        }
    }

    fn delete_collection(&mut self, id: CollectionId) -> Reply {
        let Some(record) = self.collection(id) else {
            return Reply::NotFound;
        };
        for member in self.state.keys(&keys::members(&self.tenant, id)) {
            let Some(document) = keys::last_id(&member).map(DocumentId::from_bytes) else {
                continue;
            };
            self.state.delete(&keys::document(&self.tenant, document));
            self.state.delete(&keys::data_key(&self.tenant, document));
            self.state.delete(&keys::unfinished(&self.tenant, document));
            self.state.delete(&member);
            self.state.put(&keys::garbage(&self.tenant, document), &[]);
        }
        self.state
            .delete(&keys::name(&self.tenant, &record.name_tag));
        self.state.delete(&keys::collection(&self.tenant, id));
        Reply::Done
    }

    fn document(&self, id: DocumentId) -> Option<DocumentRecord> {
        decode(self.state.get(&keys::document(&self.tenant, id)))
    }

    fn put_document(&mut self, id: DocumentId, record: &DocumentRecord) {
        self.state
            .put(&keys::document(&self.tenant, id), &encode(record));
    }

    fn begin(&mut self, id: DocumentId, record: DocumentRecord, wrapped_key: Sealed) -> Reply {
        if record.parts == 0 || record.parts > MAX_PARTS {
            return Reply::Malformed;
        }
        if self.collection(record.collection).is_none() {
            return Reply::NotFound;
        }
        if let Some(there) = self.document(id) {
            return if there.collection == record.collection {
                Reply::Done
            } else {
                Reply::NotFound
            };
        }
        // Ids are never reused on purpose; a mark from before must not sweep away what comes now.
        self.sweep(&[id]);
        self.state
            .put(&keys::data_key(&self.tenant, id), &encode(&wrapped_key));
        self.state
            .put(&keys::member(&self.tenant, record.collection, id), &[]);
        self.state.put(&keys::unfinished(&self.tenant, id), &[]);
        self.put_document(id, &record);
        Reply::Done
    }

    fn part(&mut self, id: DocumentId, part: u32, sealed: Sealed) -> Reply {
        let Some(mut record) = self.document(id) else {
            return Reply::NotFound;
        };
        if part >= record.parts {
            return Reply::Malformed;
        }
        if record.stage == Stage::Uploading {
            self.state
                .put(&keys::original(&self.tenant, id, part), sealed.as_bytes());
            record.parts_come |= 1 << part;
            self.put_document(id, &record);
        }
        Reply::Done
    }

    fn commit(&mut self, id: DocumentId) -> Reply {
        let Some(mut record) = self.document(id) else {
            return Reply::NotFound;
        };
        if record.stage != Stage::Uploading {
            return Reply::Done;
        }
        if record.parts_come.count_ones() != record.parts {
            return Reply::Incomplete;
        }
        record.stage = Stage::Queued;
        self.put_document(id, &record);
        self.count_documents(record.collection, |n| n + 1);
        Reply::Done
    }

    fn start_ingestion(&mut self, id: DocumentId, attempt: u64) -> Reply {
        let Some(mut record) = self.document(id) else {
            return Reply::NotFound;
        };
        if !matches!(record.stage, Stage::Queued | Stage::Processing) {
            return Reply::Stale;
        }
        record.stage = Stage::Processing;
        record.attempt = attempt;
        record.permille = 0;
        record.chunks = 0;
        self.state.delete_prefix(&keys::chunks(&self.tenant, id));
        self.put_document(id, &record);
        Reply::Done
    }

    /// Changes a document that is being ingested by this very attempt.
    fn ingesting(
        &mut self,
        id: DocumentId,
        attempt: u64,
        change: impl FnOnce(&mut Self, &mut DocumentRecord) -> Reply,
    ) -> Reply {
        let Some(mut record) = self.document(id) else {
            return Reply::NotFound;
        };
        if record.stage != Stage::Processing || record.attempt != attempt {
            return Reply::Stale;
        }
        let reply = change(self, &mut record);
        if matches!(reply, Reply::Done | Reply::Incomplete) {
            self.put_document(id, &record);
        }
        reply
    }

    /// Counts as it goes, so that [`Command::Ready`] need not read all chunks of a document to know how many there are.
    fn put_chunks(
        &mut self,
        id: DocumentId,
        record: &mut DocumentRecord,
        chunks: &[(u32, Sealed)],
    ) {
        for (ordinal, sealed) in chunks {
            let place = keys::chunk(&self.tenant, id, *ordinal);
            if self.state.get(&place).is_none() {
                record.chunks = record.chunks.saturating_add(1);
            }
            self.state.put(&place, sealed.as_bytes());
        }
    }

    fn ready(
        &mut self,
        id: DocumentId,
        attempt: u64,
        pages: Option<u32>,
        count: u32,
        last: &[(u32, Sealed)],
    ) -> Reply {
        let already = |r: &DocumentRecord| r.stage == Stage::Ready && r.attempt == attempt;
        if self.document(id).as_ref().is_some_and(already) {
            return Reply::Done;
        }
        self.ingesting(id, attempt, |step, record| {
            step.put_chunks(id, record, last);
            if record.chunks != count {
                return Reply::Incomplete;
            }
            step.state.delete(&keys::unfinished(&step.tenant, id));
            record.stage = Stage::Ready;
            record.permille = 1000;
            record.pages = pages.or(record.pages);
            Reply::Done
        })
    }

    fn delete_document(&mut self, id: DocumentId) -> Reply {
        let Some(record) = self.document(id) else {
            return Reply::NotFound;
        };
        self.state.delete(&keys::data_key(&self.tenant, id));
        self.state.delete(&keys::document(&self.tenant, id));
        self.state.delete(&keys::unfinished(&self.tenant, id));
        self.state
            .delete(&keys::member(&self.tenant, record.collection, id));
        self.state.delete_prefix(&keys::originals(&self.tenant, id));
        self.state.delete_prefix(&keys::chunks(&self.tenant, id));
        if record.stage != Stage::Uploading {
            self.count_documents(record.collection, |n| n.saturating_sub(1));
        }
        Reply::Done
    }

    fn sweep(&mut self, documents: &[DocumentId]) -> Reply {
        for &id in documents {
            let mark = keys::garbage(&self.tenant, id);
            if self.state.get(&mark).is_some() {
                self.state.delete_prefix(&keys::originals(&self.tenant, id));
                self.state.delete_prefix(&keys::chunks(&self.tenant, id));
                self.state.delete(&mark);
            }
        }
        Reply::Done
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;

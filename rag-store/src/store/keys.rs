//! The key layout. Every key begins with its tenant and a zero byte (tenant ids have none), then one letter for what it is;
//! only the list of tenants begins with the zero byte itself. Big-endian numbers, so that byte order is their order.

use coordinator::ids::TenantId;

use super::{CollectionId, DocumentId};

fn key(tenant: &TenantId, letter: u8, parts: &[&[u8]]) -> Vec<u8> {
    let mut key = Vec::with_capacity(tenant.as_str().len() + 2 + 36);
    key.extend_from_slice(tenant.as_str().as_bytes());
    key.extend_from_slice(&[0, letter]);
    for part in parts {
        key.extend_from_slice(part);
    }
    key
}

/// Before the list of tenants that have ever stored something.
pub const TENANTS: &[u8] = b"\0tenant\0";

/// This tenant's place in the list of tenants.
pub fn tenant(tenant: &TenantId) -> Vec<u8> {
    [TENANTS, tenant.as_str().as_bytes()].concat()
}

/// The tenant of such a place.
pub fn tenant_of(place: &[u8]) -> Option<TenantId> {
    let name = place.strip_prefix(TENANTS)?;
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// The tenant's key, wrapped by the root key.
pub fn tenant_key(tenant: &TenantId) -> Vec<u8> {
    key(tenant, b'K', &[])
}

/// All collections of the tenant.
pub fn collections(tenant: &TenantId) -> Vec<u8> {
    key(tenant, b'C', &[])
}

/// A collection's record.
pub fn collection(tenant: &TenantId, id: CollectionId) -> Vec<u8> {
    key(tenant, b'C', &[id.bytes()])
}

/// Which collection bears a name.
pub fn name(tenant: &TenantId, tag: &[u8; 16]) -> Vec<u8> {
    key(tenant, b'N', &[tag])
}

/// All documents of the tenant.
pub fn documents(tenant: &TenantId) -> Vec<u8> {
    key(tenant, b'D', &[])
}

/// A document's record.
pub fn document(tenant: &TenantId, id: DocumentId) -> Vec<u8> {
    key(tenant, b'D', &[id.bytes()])
}

/// The documents of one collection.
pub fn members(tenant: &TenantId, collection: CollectionId) -> Vec<u8> {
    key(tenant, b'M', &[collection.bytes()])
}

/// One document in its collection.
pub fn member(tenant: &TenantId, collection: CollectionId, document: DocumentId) -> Vec<u8> {
    key(tenant, b'M', &[collection.bytes(), document.bytes()])
}

/// All wrapped data keys of the tenant.
pub fn data_keys(tenant: &TenantId) -> Vec<u8> {
    key(tenant, b'W', &[])
}

/// A document's data key, wrapped by the tenant's.
pub fn data_key(tenant: &TenantId, id: DocumentId) -> Vec<u8> {
    key(tenant, b'W', &[id.bytes()])
}

/// All parts of an original.
pub fn originals(tenant: &TenantId, id: DocumentId) -> Vec<u8> {
    key(tenant, b'O', &[id.bytes()])
}

/// One part of an original.
pub fn original(tenant: &TenantId, id: DocumentId, part: u32) -> Vec<u8> {
    key(tenant, b'O', &[id.bytes(), &part.to_be_bytes()])
}

/// All chunks of a document.
pub fn chunks(tenant: &TenantId, id: DocumentId) -> Vec<u8> {
    key(tenant, b'T', &[id.bytes()])
}

/// One chunk with its vector.
pub fn chunk(tenant: &TenantId, id: DocumentId, ordinal: u32) -> Vec<u8> {
    key(tenant, b'T', &[id.bytes(), &ordinal.to_be_bytes()])
}

/// Marks of documents that are neither ready nor failed.
pub fn unfinished_all(tenant: &TenantId) -> Vec<u8> {
    key(tenant, b'Q', &[])
}

/// The mark of one such document.
pub fn unfinished(tenant: &TenantId, id: DocumentId) -> Vec<u8> {
    key(tenant, b'Q', &[id.bytes()])
}

/// Marks of documents that are gone, but whose parts and chunks still take room.
pub fn garbage_all(tenant: &TenantId) -> Vec<u8> {
    key(tenant, b'G', &[])
}

/// The mark of one such document.
pub fn garbage(tenant: &TenantId, id: DocumentId) -> Vec<u8> {
    key(tenant, b'G', &[id.bytes()])
}

/// The 16 bytes of an id at the end of a key; `None` where the key is shorter.
pub fn last_id(key: &[u8]) -> Option<[u8; 16]> {
    key.get(key.len().checked_sub(16)?..)?.try_into().ok()
}

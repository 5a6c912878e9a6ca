//! What each request does. Reads see everything acknowledged before; writes check, seal and propose.

use std::ops::Range;

use coordinator::ids::TenantId;
use coordinator::replication::View;
use coordinator::{Redacted, clock};

use super::wire::{
    Answer, Bytes, LIST_BATCH, LIST_FRAME_BYTES, MAX_MEDIA_TYPE_BYTES, MAX_NAME_CHARS,
    MAX_QUERY_BYTES, MAX_TOP_K, Op,
};
use crate::client::MAX_UPLOAD_BYTES;
use crate::crypto::Key;
use crate::index::Arms;
use crate::node::group::{Group, Refusal};
use crate::node::{EmbedKind, Embedder};
use crate::retrieve::{self, unit};
use crate::store::machine::encode;
use crate::store::reader::{OpenDocument, ReadError, Reader, visible_chunk};
use crate::store::{
    CollectionAbout, CollectionId, Command, DocumentAbout, DocumentId, Error, Hit, PART_BYTES,
    RetrieveRequest, Stage, keys,
};

/// Documents of a tenant that may wait for ingestion; an upload above it is told to come later.
const MAX_UNFINISHED: usize = 10_000;

/// How long a question waits until its tenant's newest documents are indexed, or the indexes are built after a start.
const INDEX_WAIT: std::time::Duration = std::time::Duration::from_secs(2);

/// How long a question waits for its vector before full text answers alone.
const QUERY_EMBED_WAIT: std::time::Duration = std::time::Duration::from_secs(5);

/// Frames of a list.
pub type Frames = Box<dyn Iterator<Item = Result<Answer, ReadError>> + Send>;

/// Does a request with one answer.
pub async fn answer(
    group: &Group,
    embedder: &dyn Embedder,
    tenant: &TenantId,
    op: Op,
) -> Result<Answer, Refusal> {
    match op {
        Op::CreateCollection { id, name } => create_collection(group, tenant, id, &name).await,
        Op::Collection { id } => {
            let view = group.fresh_view().await?;
            Ok(Answer::Collection(
                Reader::new(&view, &group.root).collection(tenant, id)?,
            ))
        }
        Op::Collections => {
            let view = group.fresh_view().await?;
            Ok(Answer::Collections(
                Reader::new(&view, &group.root).collections(tenant)?,
            ))
        }
        Op::DeleteCollection { id } => {
            group
                .change(tenant, Command::DeleteCollection { id })
                .await?;
            Ok(Answer::Done)
        }
        Op::Begin {
            id,
            collection,
            name,
            media_type,
            bytes,
            parts,
        } => {
            let about = DocumentAbout { name, media_type };
            begin(group, tenant, id, collection, about, bytes, parts).await
        }
        Op::Part {
            document,
            part,
            bytes,
        } => put_part(group, tenant, document, part, &bytes.into_inner().0).await,
        Op::Commit { document } => {
            group
                .change(tenant, Command::CommitDocument { document })
                .await?;
            let view = group.replica.local_view();
            Ok(Answer::Document(
                Reader::new(&view, &group.root).document(tenant, document)?,
            ))
        }
        Op::Document { id } => {
            let view = group.fresh_view().await?;
            Ok(Answer::Document(
                Reader::new(&view, &group.root).document(tenant, id)?,
            ))
        }
        Op::DeleteDocument { id } => {
            group
                .change(tenant, Command::DeleteDocument { document: id })
                .await?;
            Ok(Answer::Done)
        }
        Op::Retrieve(request) => Ok(Answer::Hits(
            retrieve(group, embedder, tenant, request).await?,
        )),
        Op::Documents { .. } | Op::Chunks { .. } | Op::Original { .. } => {
            Err(Error::invalid("op", "a list is asked for at the service for lists").into())
        }
    }
}

async fn create_collection(
    group: &Group,
    tenant: &TenantId,
    id: CollectionId,
    name: &str,
) -> Result<Answer, Refusal> {
    let name = name.trim();
    check_name("name", name)?;
    group.check_leads()?;
    group.check_space(0)?;
    let key = group.tenant_key(tenant).await?;
    let about = CollectionAbout {
        name: name.to_owned(),
        description: String::new(),
    };
    let command = Command::CreateCollection {
        id,
        name_tag: key.name_tag(name),
        created_ms: clock::now_ms(),
        about: key.seal(&keys::collection(tenant, id), &encode(&about)),
    };
    match group.change(tenant, command).await {
        Err(Refusal::Final(Error::Exists { .. })) => {
            return Err(Error::Exists {
                what: format!("collection {name:?}"),
            }
            .into());
        }
        other => other?,
    }
    let view = group.replica.local_view();
    Ok(Answer::Collection(
        Reader::new(&view, &group.root).collection(tenant, id)?,
    ))
}

fn check_name(param: &str, name: &str) -> Result<(), Error> {
    let chars = name.chars().count();
    if chars == 0 || chars > MAX_NAME_CHARS || name.chars().any(char::is_control) {
        let why = format!("expected 1 to {MAX_NAME_CHARS} printable characters, got {chars}");
        return Err(Error::invalid(param, why));
    }
    Ok(())
}

async fn begin(
    group: &Group,
    tenant: &TenantId,
    id: DocumentId,
    collection: CollectionId,
    about: DocumentAbout,
    bytes: u64,
    parts: u32,
) -> Result<Answer, Refusal> {
    check_name("filename", &about.name)?;
    if about.media_type.len() > MAX_MEDIA_TYPE_BYTES {
        let why = format!(
            "expected at most {MAX_MEDIA_TYPE_BYTES} bytes, got {}",
            about.media_type.len()
        );
        return Err(Error::invalid("media_type", why).into());
    }
    if bytes > MAX_UPLOAD_BYTES {
        return Err(Error::TooLarge {
            limit: MAX_UPLOAD_BYTES,
            got: bytes,
        }
        .into());
    }
    if u64::from(parts) != bytes.div_ceil(PART_BYTES as u64) {
        return Err(
            Error::invalid("parts", format!("{bytes} bytes do not make {parts} parts")).into(),
        );
    }
    group.check_leads()?;
    group.check_space(bytes)?;
    let view = group.replica.local_view();
    if Reader::new(&view, &group.root).unfinished_count(tenant)? >= MAX_UNFINISHED {
        let why = format!("{MAX_UNFINISHED} documents of this tenant are waiting to be read");
        return Err(Error::unavailable(why).into());
    }
    let tenant_key = group.tenant_key(tenant).await?;
    let key = Key::generate();
    let command = Command::BeginDocument {
        id,
        collection,
        created_ms: clock::now_ms(),
        bytes,
        parts,
        wrapped_key: tenant_key.wrap(&keys::data_key(tenant, id), &key),
        about: key.seal(&keys::document(tenant, id), &encode(&about)),
    };
    group.change(tenant, command).await?;
    Ok(Answer::Done)
}

async fn put_part(
    group: &Group,
    tenant: &TenantId,
    document: DocumentId,
    part: u32,
    bytes: &[u8],
) -> Result<Answer, Refusal> {
    let (_, open) = group.open_document(tenant, document).await?;
    let before = u64::from(part) * PART_BYTES as u64;
    let expected = open
        .record
        .bytes
        .saturating_sub(before)
        .min(PART_BYTES as u64);
    if bytes.len() as u64 != expected {
        let why = format!(
            "expected {expected} bytes of part {part}, got {}",
            bytes.len()
        );
        return Err(Error::invalid("part", why).into());
    }
    let sealed = open
        .key
        .seal(&keys::original(tenant, document, part), bytes);
    group
        .change(
            tenant,
            Command::Part {
                document,
                part,
                sealed,
            },
        )
        .await?;
    Ok(Answer::Done)
}

async fn retrieve(
    group: &Group,
    embedder: &dyn Embedder,
    tenant: &TenantId,
    request: RetrieveRequest,
) -> Result<Vec<Hit>, Refusal> {
    let query = request.query.expose().trim().to_owned();
    if query.is_empty() || query.len() > MAX_QUERY_BYTES {
        let why = format!("expected 1 to {MAX_QUERY_BYTES} bytes, got {}", query.len());
        return Err(Error::invalid("query", why).into());
    }
    if !(1..=MAX_TOP_K).contains(&request.top_k) {
        return Err(Error::invalid(
            "top_k",
            format!("expected 1 to {MAX_TOP_K}, got {}", request.top_k),
        )
        .into());
    }
    let view = group.fresh_view().await?;
    for id in &request.collections {
        if !Reader::new(&view, &group.root).has_collection(tenant, *id)? {
            return Err(Error::NotFound.into());
        }
    }
    let follower = &group.machine.follower;
    // What is behind after that is searched as it is: hits are read from the view, and a newer document is found a moment later.
    let _ = tokio::time::timeout(INDEX_WAIT, follower.caught_up_for(tenant)).await;
    if !follower.is_built() {
        return Err(Refusal::Again {
            why: "this node is building its indexes".into(),
        });
    }
    let vector = query_vector(embedder, tenant, &query).await;
    let permitted = (!request.collections.is_empty()).then_some(request.collections);
    let indexes = group.machine.follower.indexes().clone();
    let owner = tenant.clone();
    let search = move || -> Result<Arms, tantivy::TantivyError> {
        indexes.search(
            &owner,
            &query,
            vector.as_deref(),
            permitted.as_deref(),
            retrieve::CANDIDATES,
        )
    };
    let arms = tokio::task::spawn_blocking(search)
        .await
        .map_err(|_| Refusal::elsewhere("a search was broken off"))?
        .map_err(|error| Refusal::elsewhere(format!("the full-text index failed: {error}")))?;
    let (view, root, owner) = (
        group.replica.local_view(),
        group.root.clone(),
        tenant.clone(),
    );
    let top_k = request.top_k;
    let read = move || hits(&view, &root, &owner, &arms, top_k);
    let hits = tokio::task::spawn_blocking(read)
        .await
        .map_err(|_| Refusal::elsewhere("reading the hits was broken off"))??;
    Ok(hits)
}

/// Indexes may be a moment ahead of or behind the view: what the view no longer has is left out, hence some in reserve.
fn hits(
    view: &View,
    root: &Key,
    tenant: &TenantId,
    arms: &Arms,
    top_k: usize,
) -> Result<Vec<Hit>, ReadError> {
    let mut hits = Vec::new();
    for (chunk, score) in retrieve::fuse(arms, top_k + 20) {
        match hit(view, root, tenant, chunk.document, chunk.ordinal, score) {
            Ok(hit) => hits.push(hit),
            Err(ReadError::NotFound) => {}
            Err(error) => return Err(error),
        }
        if hits.len() == top_k {
            break;
        }
    }
    Ok(hits)
}

/// The query's vector; without one, full text answers alone, which is better than no answer.
async fn query_vector(embedder: &dyn Embedder, tenant: &TenantId, query: &str) -> Option<Vec<f32>> {
    let embedding = embedder.embed(
        tenant,
        EmbedKind::Query,
        vec![Redacted::new(query.to_owned())],
    );
    let why = match tokio::time::timeout(QUERY_EMBED_WAIT, embedding).await {
        Ok(Ok(vectors)) => match vectors.into_iter().next().and_then(unit) {
            Some(vector) => return Some(vector),
            None => "the model gave no usable vector".to_owned(),
        },
        Ok(Err(why)) => why,
        Err(_) => format!("no vector within {QUERY_EMBED_WAIT:?}"),
    };
    tracing::warn!(%tenant, why, "searching by words alone");
    None
}

fn hit(
    view: &View,
    root: &Key,
    tenant: &TenantId,
    document: DocumentId,
    ordinal: u32,
    score: f32,
) -> Result<Hit, ReadError> {
    let reader = Reader::new(view, root);
    let open = reader.open(tenant, document)?;
    let chunk = reader.chunk(tenant, &open, ordinal)?;
    Ok(Hit {
        document_id: document,
        document: reader.about(tenant, &open)?.name,
        page: chunk.page,
        heading: chunk.heading,
        text: Redacted::new(chunk.text),
        score,
        chunk_ordinal: ordinal,
    })
}

/// Begins a list; its frames read the view as they go.
pub async fn list(group: &Group, tenant: &TenantId, op: Op) -> Result<Frames, Refusal> {
    let view = group.fresh_view().await?;
    let (root, tenant) = (group.root.clone(), tenant.clone());
    match op {
        Op::Documents { collection } => {
            let reader = Reader::new(&view, &root);
            if !reader.has_collection(&tenant, collection)? {
                return Err(Error::NotFound.into());
            }
            let ids = reader.member_ids(&tenant, collection)?;
            let batches: Vec<Vec<DocumentId>> = ids.chunks(LIST_BATCH).map(<[_]>::to_vec).collect();
            Ok(Box::new(
                batches
                    .into_iter()
                    .map(move |ids| documents(&view, &root, &tenant, &ids)),
            ))
        }
        Op::Chunks { document } => {
            let reader = Reader::new(&view, &root);
            reader.document(&tenant, document)?;
            let open = reader.open(&tenant, document)?;
            let count = match open.record.stage {
                Stage::Ready => open.record.chunks,
                _ => 0,
            };
            let mut next = 0;
            Ok(Box::new(std::iter::from_fn(move || {
                let frame =
                    (next < count).then(|| chunks(&view, &root, &tenant, &open, next..count))?;
                if let Ok(Answer::Chunks(frame)) = &frame {
                    next += frame.len() as u32;
                }
                Some(frame)
            })))
        }
        Op::Original { document } => {
            let reader = Reader::new(&view, &root);
            let head = Answer::Document(reader.document(&tenant, document)?);
            let open: OpenDocument = reader.open(&tenant, document)?;
            let parts = open.record.parts;
            let part = move |n| {
                let bytes = Reader::new(&view, &root).part(&tenant, &open, n)?;
                Ok(Answer::Bytes(Redacted::new(Bytes(bytes))))
            };
            Ok(Box::new(
                std::iter::once(Ok(head)).chain((0..parts).map(part)),
            ))
        }
        _ => Err(Error::invalid("op", "not a list").into()),
    }
}

/// The first of these chunks, as many as one frame holds and at least one.
fn chunks(
    view: &View,
    root: &Key,
    tenant: &TenantId,
    open: &OpenDocument,
    ordinals: Range<u32>,
) -> Result<Answer, ReadError> {
    let reader = Reader::new(view, root);
    let (mut chunks, mut bytes) = (Vec::new(), 0);
    for ordinal in ordinals.take(LIST_BATCH) {
        let chunk = visible_chunk(ordinal, reader.chunk(tenant, open, ordinal)?);
        bytes += chunk.heading.len() + chunk.text.expose().len();
        chunks.push(chunk);
        if bytes >= LIST_FRAME_BYTES {
            break;
        }
    }
    Ok(Answer::Chunks(chunks))
}

fn documents(
    view: &View,
    root: &Key,
    tenant: &TenantId,
    ids: &[DocumentId],
) -> Result<Answer, ReadError> {
    let reader = Reader::new(view, root);
    let mut documents = Vec::with_capacity(ids.len());
    for id in ids {
        match reader.document(tenant, *id) {
            Ok(document) => documents.push(document),
            // Still uploading: nobody sees it yet.
            Err(ReadError::NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Answer::Documents(documents))
}

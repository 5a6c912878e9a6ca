//! The store as other crates see it: finds the leader of the tenant's store group and asks it again, for at most
//! [`RETRY_FOR`], when it changes. Every write carries its id from here, so that asking twice does it once.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use coordinator::Redacted;
use coordinator::clock::monotonic;
use coordinator::control::ControlHandle;
use coordinator::ids::{NodeId, RaftGroupId, TenantId};
use coordinator::transport::{self, Transport};
use futures::StreamExt;
use serde::de::DeserializeOwned;

use crate::service::wire::{self, Answer, Op, Outcome, Request, SERVICE_CALL, SERVICE_LIST};
use crate::store::{
    Collection, CollectionId, Document, DocumentChunk, DocumentId, Error, Hit, PART_BYTES,
    RetrieveRequest,
};

/// How long a call looks for a leader. An election takes about 1 s, detecting a dead process 2 s.
pub const RETRY_FOR: Duration = Duration::from_secs(5);

/// Largest original that the store takes.
pub const MAX_UPLOAD_BYTES: u64 = 50 * 1024 * 1024;

/// One attempt at one node; a node that died is noticed much sooner.
const ATTEMPT: Duration = Duration::from_secs(15);
/// Pause after every member was asked in vain.
const ROUND_PAUSE: Duration = Duration::from_millis(100);
/// Redirections followed at once; more in a row mean that the members do not agree yet.
const REDIRECTIONS: u32 = 3;
/// Parts of one upload under way at once: hides the round trips, holds back little memory.
const PARTS_IN_FLIGHT: usize = 4;

/// Handle to the store; cheap to clone.
#[derive(Clone)]
pub struct StoreClient {
    transport: Transport,
    directory: Arc<dyn Directory>,
    /// Which node answered last for a group.
    leaders: Arc<Mutex<HashMap<RaftGroupId, NodeId>>>,
}

/// Where a tenant's documents are.
pub(crate) trait Directory: Send + Sync {
    /// The tenant's store group with its members' addresses, members that are up first.
    fn group_of(&self, tenant: &TenantId) -> Option<(RaftGroupId, Vec<(NodeId, SocketAddr)>)>;
}

impl Directory for ControlHandle {
    fn group_of(&self, tenant: &TenantId) -> Option<(RaftGroupId, Vec<(NodeId, SocketAddr)>)> {
        let state = self.state();
        let group = state.store_group_of(tenant)?;
        let mut members: Vec<_> = group
            .members
            .iter()
            .filter_map(|id| state.nodes.get(id))
            .collect();
        members.sort_by_key(|node| !node.up);
        Some((
            group.id,
            members
                .into_iter()
                .map(|node| (node.id, node.addr))
                .collect(),
        ))
    }
}

/// What one attempt came to.
enum Attempt<T> {
    Final(Result<T, Error>),
    Redirected(Option<NodeId>),
    /// This member cannot; it may have taken effect.
    Elsewhere {
        why: String,
        disk_full: bool,
    },
    /// `unsure`: it may have taken effect.
    Failed {
        why: String,
        unsure: bool,
    },
}

impl StoreClient {
    /// A client for all tenants; it connects when first asked.
    pub fn new(transport: Transport, control: ControlHandle) -> Self {
        Self::with_directory(transport, Arc::new(control))
    }

    pub(crate) fn with_directory(transport: Transport, directory: Arc<dyn Directory>) -> Self {
        Self {
            transport,
            directory,
            leaders: Arc::default(),
        }
    }

    /// Makes a collection. `Exists` when the tenant has one of this name, `Invalid` when the name is empty or over 200 characters.
    pub async fn create_collection(
        &self,
        tenant: &TenantId,
        name: &str,
    ) -> Result<Collection, Error> {
        let op = Op::CreateCollection {
            id: CollectionId::generate(),
            name: name.to_owned(),
        };
        match self.call(tenant, op).await? {
            Answer::Collection(collection) => Ok(collection),
            _ => Err(strange()),
        }
    }

    /// All collections of the tenant, oldest first.
    pub async fn collections(&self, tenant: &TenantId) -> Result<Vec<Collection>, Error> {
        match self.call(tenant, Op::Collections).await? {
            Answer::Collections(collections) => Ok(collections),
            _ => Err(strange()),
        }
    }

    /// One collection.
    pub async fn collection(
        &self,
        tenant: &TenantId,
        id: CollectionId,
    ) -> Result<Collection, Error> {
        match self.call(tenant, Op::Collection { id }).await? {
            Answer::Collection(collection) => Ok(collection),
            _ => Err(strange()),
        }
    }

    /// Deletes the collection with all its documents.
    pub async fn delete_collection(
        &self,
        tenant: &TenantId,
        id: CollectionId,
    ) -> Result<(), Error> {
        self.delete(tenant, Op::DeleteCollection { id }).await
    }

    /// Stores an original and queues it for ingestion. When this returns, the document survives the loss of any one node.
    /// `TooLarge` above [`MAX_UPLOAD_BYTES`], `DiskFull`, `Invalid` for an empty file or file name.
    pub async fn upload(
        &self,
        tenant: &TenantId,
        collection: CollectionId,
        filename: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Document, Error> {
        let size = bytes.len() as u64;
        if size > MAX_UPLOAD_BYTES {
            return Err(Error::TooLarge {
                limit: MAX_UPLOAD_BYTES,
                got: size,
            });
        }
        if size == 0 {
            return Err(Error::invalid(
                "file",
                "it is empty; upload a file with content",
            ));
        }
        let id = DocumentId::generate();
        let sent = self
            .send(tenant, id, collection, filename, media_type, bytes)
            .await;
        if sent.is_err() {
            // Parts that came take room; without this they are swept after an hour. Nobody waits for it.
            let (client, tenant) = (self.clone(), tenant.clone());
            tokio::spawn(async move {
                let _ = client.delete_document(&tenant, id).await;
            });
        }
        sent
    }

    async fn send(
        &self,
        tenant: &TenantId,
        id: DocumentId,
        collection: CollectionId,
        filename: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<Document, Error> {
        let (name, size) = (base_name(filename), bytes.len() as u64);
        let (media_type, parts) = (
            media_type.to_owned(),
            size.div_ceil(PART_BYTES as u64) as u32,
        );
        self.call(
            tenant,
            Op::Begin {
                id,
                collection,
                name,
                media_type,
                bytes: size,
                parts,
            },
        )
        .await?;
        let part = |n: u32| {
            let from = n as usize * PART_BYTES;
            let to = bytes.len().min(from + PART_BYTES);
            let bytes = Redacted::new(wire::Bytes(bytes[from..to].to_vec()));
            self.call(
                tenant,
                Op::Part {
                    document: id,
                    part: n,
                    bytes,
                },
            )
        };
        let mut sent = futures::stream::iter(0..parts)
            .map(part)
            .buffer_unordered(PARTS_IN_FLIGHT);
        while let Some(answer) = sent.next().await {
            answer?;
        }
        match self.call(tenant, Op::Commit { document: id }).await? {
            Answer::Document(document) => Ok(document),
            _ => Err(strange()),
        }
    }

    /// One document.
    pub async fn document(&self, tenant: &TenantId, id: DocumentId) -> Result<Document, Error> {
        match self.call(tenant, Op::Document { id }).await? {
            Answer::Document(document) => Ok(document),
            _ => Err(strange()),
        }
    }

    /// All documents of a collection, oldest first.
    pub async fn documents(
        &self,
        tenant: &TenantId,
        collection: CollectionId,
    ) -> Result<Vec<Document>, Error> {
        let mut documents = Vec::new();
        for answer in self.list(tenant, Op::Documents { collection }).await? {
            match answer {
                Answer::Documents(more) => documents.extend(more),
                _ => return Err(strange()),
            }
        }
        Ok(documents)
    }

    /// Deletes a document, also while it is being ingested.
    pub async fn delete_document(&self, tenant: &TenantId, id: DocumentId) -> Result<(), Error> {
        self.delete(tenant, Op::DeleteDocument { id }).await
    }

    /// The document and its original bytes.
    pub async fn original(
        &self,
        tenant: &TenantId,
        id: DocumentId,
    ) -> Result<(Document, Bytes), Error> {
        let mut answers = self
            .list(tenant, Op::Original { document: id })
            .await?
            .into_iter();
        let Some(Answer::Document(document)) = answers.next() else {
            return Err(strange());
        };
        let mut original = Vec::with_capacity(document.bytes as usize);
        for answer in answers {
            match answer {
                Answer::Bytes(part) => original.extend_from_slice(&part.expose().0),
                _ => return Err(strange()),
            }
        }
        if original.len() as u64 != document.bytes {
            return Err(strange());
        }
        Ok((document, original.into()))
    }

    /// The chunks of a document in order; empty until it is ready.
    pub async fn chunks(
        &self,
        tenant: &TenantId,
        id: DocumentId,
    ) -> Result<Vec<DocumentChunk>, Error> {
        let mut chunks = Vec::new();
        for answer in self.list(tenant, Op::Chunks { document: id }).await? {
            match answer {
                Answer::Chunks(more) => chunks.extend(more),
                _ => return Err(strange()),
            }
        }
        Ok(chunks)
    }

    /// The best passages, best first.
    pub async fn retrieve(
        &self,
        tenant: &TenantId,
        request: RetrieveRequest,
    ) -> Result<Vec<Hit>, Error> {
        match self.call(tenant, Op::Retrieve(request)).await? {
            Answer::Hits(hits) => Ok(hits),
            _ => Err(strange()),
        }
    }

    async fn call(&self, tenant: &TenantId, op: Op) -> Result<Answer, Error> {
        self.ask(tenant, op, |to, request| self.call_once(to, request))
            .await
            .map_err(|(error, _)| error)
    }

    async fn delete(&self, tenant: &TenantId, op: Op) -> Result<(), Error> {
        let asked = self
            .ask(tenant, op, |to, request| self.call_once(to, request))
            .await;
        match asked {
            Ok(_) => Ok(()),
            Err((Error::NotFound, unsure)) if unsure => Ok(()),
            Err((error, _)) => Err(error),
        }
    }

    async fn list(&self, tenant: &TenantId, op: Op) -> Result<Vec<Answer>, Error> {
        self.ask(tenant, op, |to, request| self.list_once(to, request))
            .await
            .map_err(|(error, _)| error)
    }

    /// Asks one member after the other until one answers, for at most [`RETRY_FOR`]. The error comes with whether an earlier
    /// attempt may have taken effect.
    async fn ask<T, F>(
        &self,
        tenant: &TenantId,
        op: Op,
        once: impl Fn(SocketAddr, Bytes) -> F,
    ) -> Result<T, (Error, bool)>
    where
        F: Future<Output = Attempt<T>>,
    {
        let begun = monotonic();
        let mut unsure_before = false;
        let mut why = format!("no store group is known for tenant {tenant}");
        let mut request: Option<(RaftGroupId, Bytes)> = None;
        let mut hint = None;
        let mut redirections = 0;
        loop {
            let Some((group, members)) = self.directory.group_of(tenant) else {
                if begun.elapsed() >= RETRY_FOR {
                    return Err((Error::unavailable(why), false));
                }
                tokio::time::sleep(ROUND_PAUSE).await;
                continue;
            };
            let bytes = match &request {
                Some((of, bytes)) if *of == group => bytes.clone(),
                _ => {
                    let encoded = postcard::to_stdvec(&Request {
                        group,
                        tenant: tenant.clone(),
                        op: op.clone(),
                    });
                    let bytes = Bytes::from(
                        encoded.map_err(|e| (Error::invalid("request", e.to_string()), false))?,
                    );
                    request = Some((group, bytes.clone()));
                    bytes
                }
            };
            let known = hint.take().or_else(|| self.leader(group));
            let first = members.iter().filter(|(id, _)| Some(*id) == known);
            let others = members.iter().filter(|(id, _)| Some(*id) != known);
            let mut full = Vec::new();
            for (node, addr) in first.chain(others) {
                match once(*addr, bytes.clone()).await {
                    Attempt::Final(result) => {
                        if result.is_ok() {
                            self.leaders
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .insert(group, *node);
                        }
                        return result.map_err(|error| (error, unsure_before));
                    }
                    Attempt::Redirected(leader) => {
                        if leader.is_some_and(|leader| leader != *node)
                            && redirections < REDIRECTIONS
                        {
                            redirections += 1;
                            hint = leader;
                            break;
                        }
                        why = "no member leads the store group".to_owned();
                    }
                    Attempt::Elsewhere {
                        why: reason,
                        disk_full,
                    } => {
                        why = format!("node {node}: {reason}");
                        unsure_before = true;
                        if disk_full {
                            full.push(reason);
                        }
                    }
                    Attempt::Failed {
                        why: reason,
                        unsure,
                    } => {
                        why = format!("node {node}: {reason}");
                        unsure_before |= unsure;
                    }
                }
                if begun.elapsed() >= RETRY_FOR {
                    break;
                }
            }
            // One full disk of three is no reason to refuse; when all are, waiting does not help.
            if !members.is_empty() && full.len() == members.len() {
                return Err((
                    Error::DiskFull {
                        why: full.swap_remove(0),
                    },
                    unsure_before,
                ));
            }
            if begun.elapsed() >= RETRY_FOR {
                return Err((Error::unavailable(why), unsure_before));
            }
            if hint.is_none() {
                redirections = 0;
                tokio::time::sleep(ROUND_PAUSE).await;
            }
        }
    }

    pub(crate) fn leader(&self, group: RaftGroupId) -> Option<NodeId> {
        self.leaders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&group)
            .copied()
    }

    async fn call_once(&self, to: SocketAddr, request: Bytes) -> Attempt<Answer> {
        match self
            .transport
            .call(to, SERVICE_CALL, request, ATTEMPT)
            .await
        {
            Ok(frame) => read(&frame),
            Err(error) => failed(&error),
        }
    }

    async fn list_once(&self, to: SocketAddr, request: Bytes) -> Attempt<Vec<Answer>> {
        let mut frames = match self.transport.open(to, SERVICE_LIST, request).await {
            Ok(frames) => frames,
            Err(error) => return failed(&error),
        };
        let mut answers = Vec::new();
        loop {
            let frame = match tokio::time::timeout(ATTEMPT, frames.next()).await {
                Ok(None) => return Attempt::Final(Ok(answers)),
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(error))) => return failed(&error),
                Err(_) => return failed(&transport::Error::Timeout),
            };
            match read(&frame) {
                Attempt::Final(Ok(answer)) => answers.push(answer),
                Attempt::Final(Err(error)) => return Attempt::Final(Err(error)),
                Attempt::Redirected(leader) => return Attempt::Redirected(leader),
                Attempt::Elsewhere { why, disk_full } => {
                    return Attempt::Elsewhere { why, disk_full };
                }
                Attempt::Failed { why, unsure } => return Attempt::Failed { why, unsure },
            }
        }
    }
}

fn read(frame: &[u8]) -> Attempt<Answer> {
    match decode::<Outcome>(frame) {
        Some(Outcome::Ok(answer)) => Attempt::Final(Ok(answer)),
        Some(Outcome::Err(error)) => Attempt::Final(Err(error)),
        Some(Outcome::NotLeader { leader }) => Attempt::Redirected(leader),
        Some(Outcome::Elsewhere { why, disk_full }) => Attempt::Elsewhere { why, disk_full },
        Some(Outcome::Again { why }) => Attempt::Failed { why, unsure: true },
        None => Attempt::Final(Err(strange())),
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    postcard::from_bytes(bytes).ok()
}

fn failed<T>(error: &transport::Error) -> Attempt<T> {
    let unsure = matches!(error, transport::Error::Timeout | transport::Error::Closed);
    Attempt::Failed {
        why: error.to_string(),
        unsure,
    }
}

fn strange() -> Error {
    Error::unavailable(
        "a store node answered something else than was asked; do all nodes run the same version?",
    )
}

/// The name without folders: browsers and scripts send either kind of slash.
fn base_name(filename: &str) -> String {
    filename
        .rsplit(['/', '\\'])
        .next()
        .unwrap_or(filename)
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests;

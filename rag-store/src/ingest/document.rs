//! One document: read in a child process, cut, embedded, committed.

use std::time::Duration;

use coordinator::Redacted;
use coordinator::ids::TenantId;
use half::f16;
use tokio::sync::watch;

use super::Ingest;
use crate::chunk::{ChunkText, chunk};
use crate::extract::{ExtractError, ExtractedDocument, in_child_with_progress};
use crate::node::EmbedKind;
use crate::node::group::{Group, Refusal};
use crate::retrieve::unit;
use crate::store::machine::encode;
use crate::store::reader::{OpenDocument, ReadError, Reader, failure_place};
use crate::store::{
    ChunkRecord, Command, DocumentAbout, DocumentId, Error, PART_BYTES, Reply, Stage,
};

/// The longest that reading one document may take; a 50 MB PDF takes about a minute.
const EXTRACT_TIMEOUT: Duration = Duration::from_secs(300);
/// Texts embedded in one request: about a second of a CPU rank, so that deletion and progress are prompt.
const EMBED_BATCH: usize = 16;
/// The longest that one batch of vectors may take: a model that hangs must not hold up deletion and progress.
const EMBED_WAIT: Duration = Duration::from_secs(30);
/// What a document says when the store refused it again and again.
const REFUSED_DE: &str = "Das Dokument ließ sich nicht speichern: Der Speicher hat es mehrmals abgelehnt. Bitte teilen Sie es in \
    kleinere Dokumente auf oder wenden Sie sich an die Administration.";
/// Longest title taken over from a reading child, in characters; it goes into every chunk. A sound child sends no longer one.
const MAX_TITLE_CHARS: usize = 300;
/// Pause while no embedding model answers, and the longest it grows to.
const EMBED_PAUSE: Duration = Duration::from_millis(500);
const EMBED_PAUSE_MOST: Duration = Duration::from_secs(5);
/// Progress becomes a log entry; so often at most.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// Times that an entry is proposed again after the group could not say whether it was committed.
const PROPOSE_AGAIN: u32 = 10;
/// Share of the whole that reading takes.
const READING_PERMILLE: f32 = 300.0;

/// How an attempt ended.
enum Ended {
    Done,
    /// Deleted, finished or overtaken meanwhile.
    Gone,
}

impl Ingest {
    /// Takes a document to ready or failed. `Err`: the store refused; the document stays in the queue.
    pub(super) async fn ingest(&self, tenant: &TenantId, id: DocumentId) -> Result<(), Refusal> {
        let Some(job) = self.begin(tenant, id).await? else {
            return Ok(());
        };
        if let Ended::Done = job.run().await? {
            tracing::info!(%tenant, document = %id, "ingested");
        }
        Ok(())
    }

    /// Fails a document that the store refuses whenever it is tried.
    pub(super) async fn give_up(&self, tenant: &TenantId, id: DocumentId) -> Result<(), Refusal> {
        if let Some(job) = self.begin(tenant, id).await? {
            tracing::error!(%tenant, document = %id, "given up: the store refused it again and again");
            job.fail_because(REFUSED_DE).await?;
        }
        Ok(())
    }

    /// A new attempt; `None` when the document is gone or finished.
    async fn begin<'a>(
        &'a self,
        tenant: &'a TenantId,
        id: DocumentId,
    ) -> Result<Option<Job<'a>>, Refusal> {
        let attempt = rand::random();
        if self
            .step(
                tenant,
                Command::StartIngestion {
                    document: id,
                    attempt,
                },
            )
            .await?
            .is_none()
        {
            return Ok(None);
        }
        Ok(Some(Job {
            ingest: self,
            tenant,
            id,
            attempt,
        }))
    }

    /// Proposes; `None` when the document is gone or this attempt was overtaken.
    async fn step(&self, tenant: &TenantId, command: Command) -> Result<Option<()>, Refusal> {
        for again in 0.. {
            match self.group.propose(tenant, command.clone()).await {
                Ok(Reply::Done) => return Ok(Some(())),
                Ok(Reply::NotFound | Reply::Stale) => return Ok(None),
                Ok(Reply::Malformed) => {
                    let why = "the nodes run different versions; upgrade all of them";
                    return Err(Refusal::elsewhere(why));
                }
                Ok(other) => {
                    return Err(Error::unavailable(format!("the store answered {other:?}")).into());
                }
                // Proposing again is harmless, and minutes of embedding hang on it.
                Err(Refusal::Again { .. }) if again < PROPOSE_AGAIN => {
                    tokio::time::sleep(EMBED_PAUSE).await
                }
                Err(refusal) => return Err(refusal),
            }
        }
        Ok(None)
    }
}

struct Job<'a> {
    ingest: &'a Ingest,
    tenant: &'a TenantId,
    id: DocumentId,
    attempt: u64,
}

impl Job<'_> {
    fn group(&self) -> &Group {
        &self.ingest.group
    }

    async fn run(&self) -> Result<Ended, Refusal> {
        let (about, bytes) = match self.original().await {
            Ok(original) => original,
            Err(Refusal::Final(Error::NotFound)) => return Ok(Ended::Gone),
            Err(refusal) => return Err(refusal),
        };
        if !self.ingest.program.exists() {
            let why = format!(
                "{} is missing: documents cannot be read; install it again",
                self.ingest.program.display()
            );
            return Err(Refusal::elsewhere(why));
        }
        let document = match self.extract(&about, &bytes).await? {
            Some(Ok(document)) => document,
            Some(Err(error)) => return self.fail(&error).await,
            None => return Ok(Ended::Gone),
        };
        drop(bytes);
        let pages = document.pages;
        let title: String = document.title.chars().take(MAX_TITLE_CHARS).collect();
        let cut = tokio::task::spawn_blocking(move || chunk(&document)).await;
        let chunks = match cut {
            Ok(chunks) if chunks.is_empty() => return self.fail(&ExtractError::NoText).await,
            Ok(chunks) => chunks,
            Err(_) => {
                return self
                    .fail(&ExtractError::Broken {
                        why: "cutting it failed".into(),
                    })
                    .await;
            }
        };
        let Some(vectors) = self.embed(&title, &chunks, pages).await? else {
            return Ok(Ended::Gone);
        };
        self.commit(title, chunks, vectors, pages).await
    }

    async fn original(&self) -> Result<(DocumentAbout, Vec<u8>), Refusal> {
        let (view, open) = self.group().open_document(self.tenant, self.id).await?;
        let (root, tenant) = (self.group().root.clone(), self.tenant.clone());
        let read = move || -> Result<_, ReadError> {
            let reader = Reader::new(&view, &root);
            Ok((
                reader.about(&tenant, &open)?,
                reader.original(&tenant, &open)?,
            ))
        };
        let read = tokio::task::spawn_blocking(read).await;
        Ok(read.map_err(|_| Refusal::elsewhere("reading an original was broken off"))??)
    }

    async fn extract(
        &self,
        about: &DocumentAbout,
        bytes: &[u8],
    ) -> Result<Option<Result<ExtractedDocument, ExtractError>>, Refusal> {
        let (done, mut progress) = watch::channel(0.0f32);
        let child = in_child_with_progress(
            &self.ingest.program,
            bytes,
            &about.name,
            &about.media_type,
            EXTRACT_TIMEOUT,
            move |share| {
                done.send_replace(share);
            },
        );
        tokio::pin!(child);
        loop {
            tokio::select! {
                extracted = &mut child => return Ok(Some(extracted)),
                () = tokio::time::sleep(PROGRESS_EVERY) => {}
            }
            let share = *progress.borrow_and_update();
            if self
                .progress(share * READING_PERMILLE, None)
                .await?
                .is_none()
            {
                return Ok(None);
            }
        }
    }

    async fn progress(&self, permille: f32, pages: Option<u32>) -> Result<Option<()>, Refusal> {
        let permille = permille.clamp(0.0, 1000.0) as u16;
        let command = Command::Progress {
            document: self.id,
            attempt: self.attempt,
            permille,
            pages,
        };
        self.ingest.step(self.tenant, command).await
    }

    /// Whether this attempt is still the one that counts, as far as this replica knows.
    fn current(&self) -> bool {
        let view = self.group().replica.local_view();
        let open = Reader::new(&view, &self.group().root).open(self.tenant, self.id);
        open.is_ok_and(|open| {
            open.record.attempt == self.attempt && open.record.stage == Stage::Processing
        })
    }

    /// One vector a chunk. Waits as long as no model answers: that is no fault of the document.
    async fn embed(
        &self,
        title: &str,
        chunks: &[ChunkText],
        pages: Option<u32>,
    ) -> Result<Option<Vec<Vec<f32>>>, Refusal> {
        let mut vectors: Vec<Vec<f32>> = Vec::with_capacity(chunks.len());
        let mut pause = EMBED_PAUSE;
        let mut told = coordinator::clock::monotonic();
        while vectors.len() < chunks.len() {
            if !self.current() {
                return Ok(None);
            }
            let batch = &chunks[vectors.len()..chunks.len().min(vectors.len() + EMBED_BATCH)];
            let texts = batch
                .iter()
                .map(|c| Redacted::new(embedded_text(title, c)))
                .collect();
            let embedding = self
                .ingest
                .embedder
                .embed(self.tenant, EmbedKind::Passage, texts);
            let vectors_come = tokio::time::timeout(EMBED_WAIT, embedding)
                .await
                .unwrap_or_else(|_| Err(format!("no vectors within {EMBED_WAIT:?}")))
                .and_then(|v| usable(v, batch.len()));
            match vectors_come {
                Ok(new) => {
                    vectors.extend(new);
                    pause = EMBED_PAUSE;
                }
                Err(why) => {
                    tracing::warn!(document = %self.id, why, "waiting for the embedding model");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(EMBED_PAUSE_MOST);
                }
            }
            if told.elapsed() >= PROGRESS_EVERY {
                told = coordinator::clock::monotonic();
                let share = vectors.len() as f32 / chunks.len() as f32;
                let permille = READING_PERMILLE + share * (990.0 - READING_PERMILLE);
                if self.progress(permille, pages).await?.is_none() {
                    return Ok(None);
                }
            }
        }
        Ok(Some(vectors))
    }

    async fn commit(
        &self,
        title: String,
        chunks: Vec<ChunkText>,
        vectors: Vec<Vec<f32>>,
        pages: Option<u32>,
    ) -> Result<Ended, Refusal> {
        let (_, open) = match self.group().open_document(self.tenant, self.id).await {
            Err(Refusal::Final(Error::NotFound)) => return Ok(Ended::Gone),
            other => other?,
        };
        let (document, attempt, count) = (self.id, self.attempt, chunks.len() as u32);
        let mut part = Vec::new();
        let mut part_bytes = 0;
        for (chunk, vector) in chunks.into_iter().zip(vectors) {
            let ordinal = chunk.ordinal;
            let sealed = self.sealed(&open, &title, chunk, &vector);
            if part_bytes + sealed.as_bytes().len() > PART_BYTES {
                let chunks = std::mem::take(&mut part);
                part_bytes = 0;
                if self
                    .ingest
                    .step(
                        self.tenant,
                        Command::Chunks {
                            document,
                            attempt,
                            chunks,
                        },
                    )
                    .await?
                    .is_none()
                {
                    return Ok(Ended::Gone);
                }
            }
            part_bytes += sealed.as_bytes().len();
            part.push((ordinal, sealed));
        }
        let ready = Command::Ready {
            document,
            attempt,
            pages,
            count,
            last: part,
        };
        Ok(self
            .ingest
            .step(self.tenant, ready)
            .await?
            .map_or(Ended::Gone, |()| Ended::Done))
    }

    fn sealed(
        &self,
        open: &OpenDocument,
        title: &str,
        chunk: ChunkText,
        vector: &[f32],
    ) -> crate::crypto::Sealed {
        let record = ChunkRecord {
            page: chunk.page,
            title: title.to_owned(),
            heading: chunk.heading.unwrap_or_default(),
            text: chunk.text,
            vector: vector.iter().map(|x| f16::from_f32(*x).to_bits()).collect(),
        };
        Group::seal_chunk(self.tenant, open, chunk.ordinal, &encode(&record))
    }

    async fn fail(&self, error: &ExtractError) -> Result<Ended, Refusal> {
        // The error's text never quotes the document.
        tracing::info!(tenant = %self.tenant, document = %self.id, %error, "cannot be read");
        self.fail_because(&error.message_de()).await
    }

    async fn fail_because(&self, reason: &str) -> Result<Ended, Refusal> {
        let (_, open) = match self.group().open_document(self.tenant, self.id).await {
            Err(Refusal::Final(Error::NotFound)) => return Ok(Ended::Gone),
            other => other?,
        };
        let reason = open
            .key
            .seal(&failure_place(self.tenant, self.id), reason.as_bytes());
        let command = Command::Fail {
            document: self.id,
            attempt: self.attempt,
            reason,
        };
        Ok(self
            .ingest
            .step(self.tenant, command)
            .await?
            .map_or(Ended::Gone, |()| Ended::Done))
    }
}

/// What the embedding model reads of a chunk: its place in the document, then its text.
pub fn embedded_text(title: &str, chunk: &ChunkText) -> String {
    let heading = chunk.heading.as_deref().unwrap_or_default();
    format!("{title}\n{heading}\n{}", chunk.text)
}

/// The vectors at length 1, if there is one of a common length for each text.
fn usable(vectors: Vec<Vec<f32>>, texts: usize) -> Result<Vec<Vec<f32>>, String> {
    let dims = vectors.first().map_or(0, Vec::len);
    if vectors.len() != texts || vectors.iter().any(|v| v.len() != dims) {
        return Err(format!(
            "expected {texts} vectors of one length, got {} of about {dims}",
            vectors.len()
        ));
    }
    vectors
        .into_iter()
        .map(unit)
        .collect::<Option<_>>()
        .ok_or_else(|| "a vector is zero or not finite".into())
}

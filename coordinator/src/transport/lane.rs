//! One-way messages: one lane for each peer and service, in order, several messages a write.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use quinn::SendStream;
use tokio::sync::mpsc;

use super::Inner;
use super::limits::{LANE_BATCH, LANE_IDLE, MAX_FRAME_BYTES, MAX_LANE_BYTES, MAX_LANE_MESSAGES};
use super::wire::{Kind, header, write_service};

type Key = (SocketAddr, String);

/// The lanes of one endpoint.
#[derive(Default)]
pub(super) struct Lanes(Mutex<HashMap<Key, Lane>>);

#[derive(Clone)]
struct Lane {
    queue: mpsc::Sender<Bytes>,
    waiting_bytes: Arc<AtomicUsize>,
}

impl Lanes {
    /// Queues a message; false when it was dropped.
    pub(super) fn send(
        &self,
        inner: &Arc<Inner>,
        to: SocketAddr,
        service: &str,
        message: Bytes,
    ) -> bool {
        let bytes = message.len();
        if bytes > MAX_FRAME_BYTES || inner.stopping.is_cancelled() {
            return false;
        }
        let mut lanes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (to, service.to_owned());
        let lane = lanes.entry(key.clone()).or_insert_with(|| {
            let (queue, messages) = mpsc::channel(MAX_LANE_MESSAGES);
            let waiting_bytes = Arc::new(AtomicUsize::new(0));
            let run = run(inner.clone(), key, messages, waiting_bytes.clone());
            let stopping = inner.stopping.clone();
            inner.tasks.spawn(async move {
                let _ = stopping.run_until_cancelled_owned(run).await;
            });
            Lane {
                queue,
                waiting_bytes,
            }
        });
        if lane.waiting_bytes.load(Ordering::Relaxed) + bytes > MAX_LANE_BYTES {
            return false;
        }
        let queued = lane.queue.try_send(message).is_ok();
        if queued {
            lane.waiting_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        queued
    }

    /// Ends an idle lane, unless a message came in the meantime.
    fn end(&self, key: &Key, messages: &mut mpsc::Receiver<Bytes>) -> Option<Bytes> {
        let mut lanes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let late = messages.try_recv().ok();
        if late.is_none() {
            lanes.remove(key);
        }
        late
    }

    pub(super) fn clear(&self) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

async fn run(
    inner: Arc<Inner>,
    key: Key,
    mut messages: mpsc::Receiver<Bytes>,
    waiting_bytes: Arc<AtomicUsize>,
) {
    let (to, service) = (key.0, key.1.as_str());
    let mut stream: Option<SendStream> = None;
    loop {
        let first = match tokio::time::timeout(LANE_IDLE, messages.recv()).await {
            Ok(Some(message)) => message,
            Ok(None) => return,
            Err(_) => match inner.lanes.end(&key, &mut messages) {
                Some(message) => message,
                None => return,
            },
        };
        let mut batch = vec![first];
        while batch.len() < LANE_BATCH
            && let Ok(message) = messages.try_recv()
        {
            batch.push(message);
        }
        let bytes: usize = batch.iter().map(Bytes::len).sum();
        if inner.is_self(to) {
            for message in batch {
                inner.handle_one_way(inner.node, service, message).await;
            }
        } else {
            stream = write(&inner, to, service, stream, &batch).await;
            if stream.is_none() {
                tracing::debug!(%to, service, messages = batch.len(), "one-way messages were lost");
            }
        }
        waiting_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Writes a batch on the lane's stream, or on a new one; `None` when it was lost.
async fn write(
    inner: &Inner,
    to: SocketAddr,
    service: &str,
    stream: Option<SendStream>,
    batch: &[Bytes],
) -> Option<SendStream> {
    if let Some(stream) = stream
        && let Some(stream) = write_batch(stream, batch).await
    {
        return Some(stream);
    }
    let connection = inner.dialler.connection(to).await.ok()?;
    let mut stream = connection.open_uni().await.ok()?;
    write_service(&mut stream, service).await.ok()?;
    write_batch(stream, batch).await
}

async fn write_batch(mut stream: SendStream, batch: &[Bytes]) -> Option<SendStream> {
    let mut pieces: Vec<Bytes> = batch
        .iter()
        .flat_map(|message| {
            [
                Bytes::copy_from_slice(&header(Kind::Data, message.len())),
                message.clone(),
            ]
        })
        .collect();
    stream.write_all_chunks(&mut pieces).await.ok()?;
    Some(stream)
}

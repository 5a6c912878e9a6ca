//! Snapshots travel apart from Raft's messages: Raft says that one is needed, and the member that needs it fetches the
//! leader's newest state as a stream of frames.
//!
//! The first frame is a [`Header`]; the frames after it, put together, are records of u32-LE key length, u32-LE value
//! length, key, value; the reply's end marks completeness, and the header's count of records is checked against it.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use raft::eraftpb::ConfState;
use serde::{Deserialize, Serialize};

use super::Error;
use super::store::{Position, Store};
use super::view::View;
use crate::transport::{ErrorCode, RemoteError, Reply, Transport};

/// Large enough to fill the connection, small enough to hold a few.
const FRAME_BYTES: usize = 1024 * 1024;

/// Keys and values together; commands of 4 MiB cannot make a larger value at once.
const MAX_RECORD_BYTES: usize = 256 * 1024 * 1024;

/// What a snapshot shows.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) position: Position,
    voters: Vec<u64>,
    voters_outgoing: Vec<u64>,
    learners: Vec<u64>,
    learners_next: Vec<u64>,
    auto_leave: bool,
}

impl Header {
    fn of(view: &View) -> Self {
        let conf = view.conf();
        Self {
            position: view.position(),
            voters: conf.get_voters().to_vec(),
            voters_outgoing: conf.get_voters_outgoing().to_vec(),
            learners: conf.get_learners().to_vec(),
            learners_next: conf.get_learners_next().to_vec(),
            auto_leave: conf.get_auto_leave(),
        }
    }

    pub(super) fn conf(&self) -> ConfState {
        let mut conf = ConfState::default();
        conf.set_voters(self.voters.clone());
        conf.set_voters_outgoing(self.voters_outgoing.clone());
        conf.set_learners(self.learners.clone());
        conf.set_learners_next(self.learners_next.clone());
        conf.set_auto_leave(self.auto_leave);
        conf
    }
}

/// The stream's last frame.
#[derive(Debug, Serialize, Deserialize)]
struct Trailer {
    records: u64,
}

/// Sends the state that `view` shows; true when all of it was sent. `alive` is called at every frame.
pub(super) async fn serve(view: View, mut reply: Reply, alive: impl Fn() + Send + 'static) -> bool {
    let (frames, mut queue) = tokio::sync::mpsc::channel::<Result<Bytes, Error>>(2);
    let reader = tokio::task::spawn_blocking(move || {
        let outcome = read_out(&view, &mut |frame| frames.blocking_send(Ok(frame)).is_ok());
        if let Err(error) = outcome {
            // Fails only when the caller has gone.
            let _ = frames.blocking_send(Err(error));
        }
    });
    while let Some(frame) = queue.recv().await {
        match frame {
            Ok(frame) => {
                alive();
                if reply.send(frame).await.is_err() {
                    return false;
                }
            }
            Err(error) => {
                reply
                    .fail(RemoteError::new(ErrorCode::Storage, error.to_string()))
                    .await;
                return false;
            }
        }
    }
    // A reader that panicked has not sent the trailer, which the far side then misses.
    let complete = reader.await.is_ok();
    reply.finish().await;
    complete
}

/// Reads the whole state in frames; `send` says whether to go on.
fn read_out(view: &View, send: &mut dyn FnMut(Bytes) -> bool) -> Result<(), Error> {
    let encode = |e: postcard::Error| Error::Storage { why: e.to_string() };
    if !send(
        postcard::to_stdvec(&Header::of(view))
            .map_err(encode)?
            .into(),
    ) {
        return Ok(());
    }
    let mut buffer = BytesMut::with_capacity(FRAME_BYTES);
    let mut records = 0;
    for row in view.scan_prefix(&[]) {
        let (key, value) = row?;
        for part in [&key, &value] {
            buffer.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_le_bytes());
        }
        buffer.extend_from_slice(&key);
        buffer.extend_from_slice(&value);
        records += 1;
        while buffer.len() >= FRAME_BYTES {
            if !send(buffer.split_to(FRAME_BYTES).freeze()) {
                return Ok(());
            }
        }
    }
    if !buffer.is_empty() && !send(buffer.freeze()) {
        return Ok(());
    }
    send(
        postcard::to_stdvec(&Trailer { records })
            .map_err(encode)?
            .into(),
    );
    Ok(())
}

/// Fetches the newest state from the member at `from` into a new generation of `store`.
pub(super) async fn fetch(
    transport: &Transport,
    from: SocketAddr,
    service: &str,
    store: &Arc<Store>,
) -> Result<(Header, u64), String> {
    let mut stream = transport
        .open(from, service, Bytes::new())
        .await
        .map_err(|e| e.to_string())?;
    let first = stream
        .next()
        .await
        .ok_or("it was empty")?
        .map_err(|e| e.to_string())?;
    let header: Header = postcard::from_bytes(&first).map_err(|e| e.to_string())?;
    let generation = on_disk(store, |store| store.begin_generation()).await?;
    let filled = fill(&mut stream, store, generation).await;
    if filled.is_err() {
        store.drop_generation(generation);
    }
    filled.map(|()| (header, generation))
}

async fn fill(
    stream: &mut crate::transport::FrameStream,
    store: &Arc<Store>,
    generation: u64,
) -> Result<(), String> {
    let mut buffer = BytesMut::new();
    let mut records = 0u64;
    // The last frame is the trailer, so each frame is used when the next has come.
    let mut held: Option<Bytes> = None;
    while let Some(frame) = stream.next().await {
        let frame = frame.map_err(|e| e.to_string())?;
        let Some(part) = held.replace(frame) else {
            continue;
        };
        buffer.extend_from_slice(&part);
        let (rest, count) =
            on_disk(store, move |store| write_records(store, generation, buffer)).await?;
        buffer = rest;
        records += count;
    }
    let trailer: Trailer = postcard::from_bytes(&held.ok_or("it has no end")?)
        .map_err(|e| format!("it has no end: {e}"))?;
    if !buffer.is_empty() || trailer.records != records {
        return Err(format!(
            "expected {} records, got {records}",
            trailer.records
        ));
    }
    on_disk(store, move |store| store.flush_generation(generation)).await
}

/// Writes the whole records at the buffer's beginning; returns what is left, and their number.
fn write_records(
    store: &Store,
    generation: u64,
    buffer: BytesMut,
) -> Result<(BytesMut, u64), Error> {
    let mut pairs = Vec::new();
    let mut at = 0;
    while let Some(mut head) = buffer.get(at..at + 8) {
        let (key, value) = (head.get_u32_le() as usize, head.get_u32_le() as usize);
        if key.saturating_add(value) > MAX_RECORD_BYTES {
            return Err(Error::Storage {
                why: format!("a snapshot's record claims {key} and {value} bytes"),
            });
        }
        let Some(record) = buffer.get(at + 8..at + 8 + key + value) else {
            break;
        };
        pairs.push(record.split_at(key));
        at += 8 + key + value;
    }
    store.fill_generation(generation, &pairs)?;
    let count = pairs.len() as u64;
    drop(pairs);
    let mut rest = buffer;
    rest.advance(at);
    Ok((rest, count))
}

async fn on_disk<T: Send + 'static>(
    store: &Arc<Store>,
    work: impl FnOnce(&Store) -> Result<T, Error> + Send + 'static,
) -> Result<T, String> {
    let store = store.clone();
    let done = tokio::task::spawn_blocking(move || work(&store))
        .await
        .map_err(|e| e.to_string())?;
    done.map_err(|e| e.to_string())
}

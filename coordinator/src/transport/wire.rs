//! The protocol `verbund/1`. Every frame is a u32-LE length, one byte of kind, and the payload of that length.
//! A request stream carries a service frame and a data frame one way, data frames and one end or fail frame the other;
//! a lane carries a service frame and then data frames.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use quinn::{ReadError, RecvStream, SendStream, WriteError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::limits::{MAX_FRAME_BYTES, MAX_REQUEST_BYTES_PER_NODE, UNCOUNTED_BYTES};

pub(crate) const ALPN: &[u8] = b"verbund/1";
pub(crate) const ALPN_JOIN: &[u8] = b"verbund-join/1";

pub(crate) const HEADER_BYTES: usize = 5;

/// Largest piece taken from the connection at once.
const READ_BYTES: usize = 64 * 1024;

/// Memory is counted in pieces of this size.
const BUDGET_UNIT_BYTES: usize = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Data = 0,
    /// Payload: a [`super::RemoteError`].
    Fail = 1,
    End = 2,
    /// Payload: a service's name.
    Service = 3,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Kind::Data, Kind::Fail, Kind::End, Kind::Service]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// Why a frame could not be read.
#[derive(Debug)]
pub(crate) enum ReadFault {
    /// The stream or connection broke off.
    Broken,
    TooLarge(usize),
    /// The bytes are not the protocol's.
    Malformed,
}

impl From<ReadError> for ReadFault {
    fn from(_: ReadError) -> Self {
        ReadFault::Broken
    }
}

/// How much of a node's requests may lie in memory.
#[derive(Clone)]
pub(crate) struct Budget(Arc<Semaphore>);

impl Budget {
    pub(crate) fn new() -> Self {
        Budget(Arc::new(Semaphore::new(
            MAX_REQUEST_BYTES_PER_NODE / BUDGET_UNIT_BYTES,
        )))
    }

    async fn take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.div_ceil(BUDGET_UNIT_BYTES)).unwrap_or(u32::MAX);
        self.0.clone().acquire_many_owned(units).await.ok()
    }
}

/// A frame's bytes; gives its share of the budget back when the last handle is dropped.
struct Counted {
    bytes: Bytes,
    _share: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Reads frames from a stream. [`FrameReader::next`] may be dropped at any time without loss.
pub(crate) struct FrameReader {
    stream: RecvStream,
    buffer: BytesMut,
    limit: usize,
    budget: Option<Budget>,
    share: Option<OwnedSemaphorePermit>,
}

impl FrameReader {
    pub(crate) fn new(stream: RecvStream, limit: usize, budget: Option<Budget>) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            limit,
            budget,
            share: None,
        }
    }

    /// The next frame; `None` when the stream ended between two frames.
    pub(crate) async fn next(&mut self) -> Result<Option<(Kind, Bytes)>, ReadFault> {
        while self.buffer.len() < HEADER_BYTES {
            if !self.fill().await? {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(ReadFault::Malformed)
                };
            }
        }
        let length = u32::from_le_bytes([
            self.buffer[0],
            self.buffer[1],
            self.buffer[2],
            self.buffer[3],
        ]) as usize;
        let kind = Kind::from_byte(self.buffer[4]).ok_or(ReadFault::Malformed)?;
        if length > self.limit {
            return Err(ReadFault::TooLarge(length));
        }
        if let Some(budget) = &self.budget
            && length > UNCOUNTED_BYTES
            && self.share.is_none()
        {
            self.share = budget.take(length).await;
        }
        let whole = HEADER_BYTES + length;
        if self.buffer.len() < whole {
            self.buffer.reserve(whole - self.buffer.len());
        }
        while self.buffer.len() < whole {
            if !self.fill().await? {
                return Err(ReadFault::Malformed);
            }
        }
        let payload = self.buffer.split_to(whole).freeze().slice(HEADER_BYTES..);
        let payload = match self.share.take() {
            Some(share) => Bytes::from_owner(Counted {
                bytes: payload,
                _share: share,
            }),
            None => payload,
        };
        Ok(Some((kind, payload)))
    }

    /// Takes what has come; false at the end of the stream.
    async fn fill(&mut self) -> Result<bool, ReadFault> {
        match self.stream.read_chunk(READ_BYTES, true).await? {
            Some(chunk) => {
                self.buffer.extend_from_slice(&chunk.bytes);
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

/// The header of a frame.
pub(crate) fn header(kind: Kind, length: usize) -> [u8; HEADER_BYTES] {
    // Callers have checked `length` against MAX_FRAME_BYTES.
    let [a, b, c, d] = u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
    [a, b, c, d, kind as u8]
}

/// A whole small frame.
pub(crate) fn small_frame(kind: Kind, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEADER_BYTES + payload.len());
    frame.put_slice(&header(kind, payload.len()));
    frame.put_slice(payload);
    frame.freeze()
}

/// Writes one data frame; the payload is not copied.
pub(crate) async fn write_data(stream: &mut SendStream, payload: Bytes) -> Result<(), WriteError> {
    debug_assert!(payload.len() <= MAX_FRAME_BYTES);
    let head = Bytes::copy_from_slice(&header(Kind::Data, payload.len()));
    stream.write_all_chunks(&mut [head, payload]).await
}

/// Writes the beginning of a request or lane: the service's name.
pub(crate) async fn write_service(
    stream: &mut SendStream,
    service: &str,
) -> Result<(), WriteError> {
    stream
        .write_chunk(small_frame(Kind::Service, service.as_bytes()))
        .await
}

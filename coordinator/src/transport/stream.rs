//! Both ends of a request: [`Reply`] at the handler, [`FrameStream`] at the caller.

use bytes::Bytes;
use futures::FutureExt;
use quinn::{Connection, SendStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::dial::connection_fault;
use super::limits::{DRAIN_TIMEOUT, MAX_FRAME_BYTES};
use super::wire::{FrameReader, Kind, ReadFault, small_frame, write_data};
use super::{Closed, Error, RemoteError};

/// QUIC's code for a reply that its handler did not finish.
const ABANDONED: u32 = 1;

/// A frame between a caller and a handler of the same process.
pub(super) enum LocalFrame {
    Data(Bytes),
    Fail(RemoteError),
    End,
}

/// The way back to a caller. Dropped without [`Reply::finish`] or [`Reply::fail`] the caller sees [`Error::Closed`].
pub struct Reply {
    way: Way,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

enum Way {
    /// One-way message: nobody listens.
    Nowhere,
    Remote(SendStream),
    Local(mpsc::Sender<LocalFrame>),
}

impl Reply {
    pub(super) fn nowhere(stopping: CancellationToken, tasks: TaskTracker) -> Self {
        Self {
            way: Way::Nowhere,
            stopping,
            tasks,
        }
    }

    pub(super) fn remote(
        stream: SendStream,
        stopping: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        Self {
            way: Way::Remote(stream),
            stopping,
            tasks,
        }
    }

    pub(super) fn local(
        to: mpsc::Sender<LocalFrame>,
        stopping: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        Self {
            way: Way::Local(to),
            stopping,
            tasks,
        }
    }

    /// Sends one frame; waits while the caller is slow.
    ///
    /// # Errors
    /// [`Closed`] when the caller went away, or the frame exceeds [`MAX_FRAME_BYTES`].
    pub async fn send(&mut self, frame: Bytes) -> Result<(), Closed> {
        if frame.len() > MAX_FRAME_BYTES {
            tracing::error!(
                bytes = frame.len(),
                limit = MAX_FRAME_BYTES,
                "a reply frame is too large to be sent"
            );
            self.abandon();
            return Err(Closed);
        }
        match &mut self.way {
            Way::Nowhere => Err(Closed),
            Way::Remote(stream) => write_data(stream, frame).await.map_err(|_| Closed),
            Way::Local(to) => to.send(LocalFrame::Data(frame)).await.map_err(|_| Closed),
        }
    }

    /// Ends the reply with an error.
    pub async fn fail(mut self, error: RemoteError) {
        match std::mem::replace(&mut self.way, Way::Nowhere) {
            Way::Nowhere => {}
            Way::Remote(stream) => {
                let payload = postcard::to_stdvec(&error).unwrap_or_default();
                self.end(stream, small_frame(Kind::Fail, &payload)).await;
            }
            Way::Local(to) => drop(to.send(LocalFrame::Fail(error)).await),
        }
    }

    /// Ends the reply.
    pub async fn finish(mut self) {
        match std::mem::replace(&mut self.way, Way::Nowhere) {
            Way::Nowhere => {}
            Way::Remote(stream) => self.end(stream, small_frame(Kind::End, &[])).await,
            Way::Local(to) => drop(to.send(LocalFrame::End).await),
        }
    }

    /// Sends one frame and ends the reply; the usual answer to [`super::Transport::call`].
    pub async fn answer(mut self, frame: Bytes) {
        if self.send(frame).await.is_ok() {
            self.finish().await;
        }
    }

    /// Resolves when the caller went away, or when this node shuts down. At once for a one-way message.
    pub async fn closed(&mut self) {
        let gone = async {
            match &self.way {
                Way::Nowhere => {}
                Way::Remote(stream) => drop(stream.stopped().await),
                Way::Local(to) => to.closed().await,
            }
        };
        tokio::select! {
            () = gone => {}
            () = self.stopping.cancelled() => {}
        }
    }

    /// Whether the caller went away, or this node shuts down.
    pub fn is_closed(&self) -> bool {
        self.stopping.is_cancelled()
            || match &self.way {
                Way::Nowhere => true,
                Way::Remote(stream) => stream.stopped().now_or_never().is_some(),
                Way::Local(to) => to.is_closed(),
            }
    }

    async fn end(&self, mut stream: SendStream, last: Bytes) {
        if stream.write_chunk(last).await.is_err() || stream.finish().is_err() {
            return;
        }
        // A shutdown waits until the caller has everything.
        let read = stream.stopped();
        self.tasks
            .spawn(async move { drop(tokio::time::timeout(DRAIN_TIMEOUT, read).await) });
    }

    fn abandon(&mut self) {
        if let Way::Remote(mut stream) = std::mem::replace(&mut self.way, Way::Nowhere) {
            // Fails only when the stream is over anyway.
            let _ = stream.reset(ABANDONED.into());
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        self.abandon();
    }
}

/// Reply frames as they come; dropping it cancels the request at the far side.
pub struct FrameStream {
    source: Source,
}

enum Source {
    Remote {
        reader: FrameReader,
        connection: Connection,
    },
    Local(mpsc::Receiver<LocalFrame>),
    Over,
}

impl FrameStream {
    pub(super) fn remote(reader: FrameReader, connection: Connection) -> Self {
        Self {
            source: Source::Remote { reader, connection },
        }
    }

    pub(super) fn local(from: mpsc::Receiver<LocalFrame>) -> Self {
        Self {
            source: Source::Local(from),
        }
    }

    /// The next frame; `None` after the far side finished. After an error nothing more comes. The future may be
    /// dropped and called again without loss.
    pub async fn next(&mut self) -> Option<Result<Bytes, Error>> {
        let item = match &mut self.source {
            Source::Over => return None,
            Source::Local(from) => match from.recv().await {
                Some(LocalFrame::Data(frame)) => Some(Ok(frame)),
                Some(LocalFrame::Fail(error)) => Some(Err(Error::Refused(error))),
                Some(LocalFrame::End) => None,
                None => Some(Err(Error::Closed)),
            },
            Source::Remote { reader, connection } => match reader.next().await {
                Ok(Some((Kind::Data, frame))) => Some(Ok(frame)),
                Ok(Some((Kind::End, _))) => None,
                Ok(Some((Kind::Fail, payload))) => {
                    match postcard::from_bytes::<RemoteError>(&payload) {
                        Ok(error) => Some(Err(Error::Refused(error))),
                        Err(_) => Some(Err(Error::Closed)),
                    }
                }
                Err(ReadFault::TooLarge(bytes)) => Some(Err(Error::FrameTooLarge { bytes })),
                Ok(_) | Err(ReadFault::Malformed) => Some(Err(Error::Closed)),
                Err(ReadFault::Broken) => Some(Err(connection_fault(connection))),
            },
        };
        if !matches!(item, Some(Ok(_))) {
            self.source = Source::Over;
        }
        item
    }
}

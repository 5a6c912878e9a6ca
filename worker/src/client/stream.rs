//! A generation as its caller sees it.

use coordinator::transport::{self, FrameStream};
use futures::Stream;

use super::wire::Frame;
use super::{Event, InferError, not_begun};

/// Events as they come. Ends after [`Event::Finished`] or an error. Dropping it cancels the generation.
pub struct GenerateStream {
    frames: FrameStream,
    first: Option<Event>,
    ended: bool,
}

impl GenerateStream {
    /// Waits for the first event, so that a refusal is an error of the call.
    pub(super) async fn begin(mut frames: FrameStream) -> Result<Self, InferError> {
        match frames.next().await {
            Some(Ok(bytes)) => match decode(&bytes)? {
                Frame::Event(event) => Ok(Self {
                    frames,
                    first: Some(event),
                    ended: false,
                }),
                Frame::Error(error) => Err(error),
            },
            Some(Err(error)) => Err(not_begun(error)),
            None => Err(broken_off(&transport::Error::Closed)),
        }
    }

    /// The next event; `None` after the last. A stream never ends without [`Event::Finished`] or an error.
    pub async fn next(&mut self) -> Option<Result<Event, InferError>> {
        if let Some(event) = self.first.take() {
            return Some(Ok(event));
        }
        if self.ended {
            return None;
        }
        let next = match self.frames.next().await {
            Some(Ok(bytes)) => decode(&bytes).and_then(|frame| match frame {
                Frame::Event(event) => Ok(event),
                Frame::Error(error) => Err(error),
            }),
            Some(Err(error)) => Err(broken_off(&error)),
            None => Err(broken_off(&transport::Error::Closed)),
        };
        self.ended = matches!(next, Err(_) | Ok(Event::Finished { .. }));
        Some(next)
    }

    /// As a [`Stream`].
    pub fn into_stream(self) -> impl Stream<Item = Result<Event, InferError>> + Send {
        futures::stream::unfold(self, |mut stream| async move {
            stream.next().await.map(|item| (item, stream))
        })
    }
}

fn decode(bytes: &[u8]) -> Result<Frame, InferError> {
    postcard::from_bytes(bytes).map_err(|e| InferError::Internal {
        why: format!("the worker runs another version: {e}"),
    })
}

fn broken_off(error: &transport::Error) -> InferError {
    InferError::Interrupted {
        why: error.to_string(),
    }
}

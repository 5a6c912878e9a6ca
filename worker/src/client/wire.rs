//! What travels between client and service; postcard.

use coordinator::ids::{Epoch, GroupId};
use serde::{Deserialize, Serialize};

use super::{Event, InferError};

/// Takes a [`Call`] of a `GenerateRequest`, answers [`Frame`]s.
pub const SERVICE_GENERATE: &str = "infer.generate";
/// Takes a [`Call`] of an `EmbedRequest`, answers one `Result<Embeddings, InferError>`.
pub const SERVICE_EMBED: &str = "infer.embed";
/// Takes a [`Call`] of a text, answers one `Result<Vec<u32>, InferError>`.
pub const SERVICE_TOKENIZE: &str = "infer.tokenize";

/// Takes a `TenantId`, answers `()` when no group on the node finds again what it computed for that tenant.
pub const SERVICE_FORGET: &str = "infer.forget";

/// A request to one group in one epoch; any other epoch is refused.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call<T> {
    pub group: GroupId,
    pub epoch: Epoch,
    pub request: T,
}

/// One frame of a generation. An error is the last.
#[derive(Debug, Serialize, Deserialize)]
pub enum Frame {
    Event(Event),
    Error(InferError),
}

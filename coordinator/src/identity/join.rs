//! Join tokens and the messages of the join handshake.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Error;
use crate::Redacted;
use crate::ids::{Device, NodeId, Role};

const PREFIX: &str = "vbj1-";

/// Tells typing errors from wrong tokens.
const CHECKSUM_BYTES: usize = 4;

/// What an operator carries to a new node: where the cluster is, how to know it, and the right to join once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    pub secret: [u8; 32],
    pub ca_fingerprint: [u8; 32],
    /// Transports of nodes that take joins.
    pub addrs: Vec<SocketAddr>,
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = postcard::to_stdvec(self).map_err(|_| fmt::Error)?;
        let sum = Sha256::digest(&bytes);
        bytes.extend_from_slice(&sum[..CHECKSUM_BYTES]);
        write!(f, "{PREFIX}{}", hex::encode(bytes))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("addrs", &self.addrs)
            .finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let token = |why| Error::Token { why };
        let digits = text
            .trim()
            .strip_prefix(PREFIX)
            .ok_or(token("it does not begin with vbj1-"))?;
        let bytes =
            hex::decode(digits).map_err(|_| token("it has other characters than 0-9 and a-f"))?;
        let body = bytes
            .len()
            .checked_sub(CHECKSUM_BYTES)
            .ok_or(token("it is too short"))?;
        let (body, sum) = bytes.split_at(body);
        if Sha256::digest(body)[..CHECKSUM_BYTES] != *sum {
            return Err(token(
                "its check sum is wrong, part of it is missing or mistyped",
            ));
        }
        postcard::from_bytes(body).map_err(|_| token("its content cannot be read"))
    }
}

/// What a new node says about itself.
#[derive(Clone, Serialize, Deserialize)]
pub struct JoinRequest {
    /// From the join token.
    pub secret: [u8; 32],
    /// From [`super::PendingIdentity::csr_pem`].
    pub csr_pem: String,
    pub name: String,
    pub roles: BTreeSet<Role>,
    /// Where its transport will listen.
    pub addr: SocketAddr,
    /// Where its collectives will listen; workers only.
    pub data_addr: Option<SocketAddr>,
    pub devices: Vec<Device>,
    pub version: String,
}

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinRequest")
            .field("name", &self.name)
            .field("addr", &self.addr)
            .finish_non_exhaustive()
    }
}

/// What a new node gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinReply {
    pub node_id: NodeId,
    pub cert_pem: String,
    pub ca_pem: String,
    /// Transports of the coordinators, to connect to from now on.
    pub seeds: Vec<SocketAddr>,
    /// For coordinator and store roles: wraps the tenants' keys.
    pub cluster_key: Option<Redacted<[u8; 32]>>,
    /// For the coordinator role: lets it sign joins itself.
    pub ca_key_pem: Option<Redacted<String>>,
}

/// Decides who joins; control implements it.
pub trait JoinAuthority: Send + Sync {
    /// Answers one request; the text of a refusal is shown to the operator of the new node.
    fn admit(&self, request: JoinRequest) -> BoxFuture<'_, Result<JoinReply, String>>;
}

//! Outgoing connections: one an address, kept, and dialled again when dead.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use quinn::{Connection, ConnectionError, Endpoint};

use super::Error;
use super::limits::{DIAL_TIMEOUT, REDIAL_AFTER};
use super::listen::peer_of;
use crate::clock::{Instant, monotonic};
use crate::identity::SERVER_NAME;
use crate::ids::NodeId;

/// The connections of one endpoint.
pub(super) struct Dialler {
    endpoint: Endpoint,
    peers: Mutex<HashMap<SocketAddr, Arc<tokio::sync::Mutex<Peer>>>>,
    revoked: Arc<RwLock<HashSet<NodeId>>>,
}

#[derive(Default)]
struct Peer {
    connection: Option<Connection>,
    failure: Option<(Instant, String)>,
}

impl Dialler {
    pub(super) fn new(endpoint: Endpoint, revoked: Arc<RwLock<HashSet<NodeId>>>) -> Self {
        Self {
            endpoint,
            peers: Mutex::default(),
            revoked,
        }
    }

    /// A live connection to the address.
    pub(super) async fn connection(&self, to: SocketAddr) -> Result<Connection, Error> {
        let peer = self
            .peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entry(to)
            .or_default()
            .clone();
        let mut peer = peer.lock().await;
        if let Some(connection) = &peer.connection
            && connection.close_reason().is_none()
        {
            return Ok(connection.clone());
        }
        if let Some((when, why)) = &peer.failure
            && when.elapsed() < REDIAL_AFTER
        {
            return Err(Error::Unreachable {
                addr: to,
                why: why.clone(),
            });
        }
        peer.connection = None;
        match self.dial(to).await {
            Ok(connection) => {
                peer.failure = None;
                peer.connection = Some(connection.clone());
                Ok(connection)
            }
            Err(why) => {
                peer.failure = Some((monotonic(), why.clone()));
                Err(Error::Unreachable { addr: to, why })
            }
        }
    }

    async fn dial(&self, to: SocketAddr) -> Result<Connection, String> {
        let connecting = self
            .endpoint
            .connect(to, SERVER_NAME)
            .map_err(|e| e.to_string())?;
        let connection = tokio::time::timeout(DIAL_TIMEOUT, connecting)
            .await
            .map_err(|_| format!("nobody answered within {} ms", DIAL_TIMEOUT.as_millis()))?
            .map_err(|e| e.to_string())?;
        let revoked = |node| {
            self.revoked
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .contains(&node)
        };
        match peer_of(&connection) {
            Some(node) if !revoked(node) => Ok(connection),
            Some(node) => Err(format!("node {node} was removed from the cluster")),
            None => Err("its certificate names no node".to_owned()),
        }
    }

    /// Closes the connections to nodes that were revoked.
    pub(super) async fn drop_revoked(&self) {
        let peers: Vec<_> = self
            .peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect();
        for peer in peers {
            let mut peer = peer.lock().await;
            let revoked = |node| {
                self.revoked
                    .read()
                    .unwrap_or_else(PoisonError::into_inner)
                    .contains(&node)
            };
            if let Some(connection) = &peer.connection
                && peer_of(connection).is_none_or(revoked)
            {
                connection.close(super::listen::FORBIDDEN.into(), b"removed from the cluster");
                peer.connection = None;
            }
        }
    }
}

/// What it means for a caller that its connection broke off.
pub(super) fn connection_fault(connection: &Connection) -> Error {
    match connection.close_reason() {
        // Refused before any request was looked at: no certificate, foreign CA, revoked.
        Some(ConnectionError::ConnectionClosed(close)) => Error::Unreachable {
            addr: connection.remote_address(),
            why: close.to_string(),
        },
        Some(ConnectionError::ApplicationClosed(close))
            if close.error_code == quinn::VarInt::from_u32(super::listen::FORBIDDEN) =>
        {
            Error::Unreachable {
                addr: connection.remote_address(),
                why: close.to_string(),
            }
        }
        _ => Error::Closed,
    }
}

//! Joining: one-time tokens, and who is let in.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use futures::future::BoxFuture;
use tracing::{info, warn};

use super::command::{AdmitRequest, Command, Outcome};
use super::handle::ControlHandle;
use super::keys::{random_secret, sha256};
use super::state::JoinTokenRecord;
use crate::Redacted;
use crate::clock::now_ms;
use crate::identity::{Ca, JoinAuthority, JoinReply, JoinRequest, JoinToken};
use crate::ids::{NodeId, Role};

/// A new token and the command that makes it valid until `expires_ms` (milliseconds since the Unix epoch).
pub fn new_join_token(
    ca_fingerprint: [u8; 32],
    addrs: Vec<SocketAddr>,
    roles: BTreeSet<Role>,
    expires_ms: u64,
) -> (JoinToken, Command) {
    let secret = random_secret();
    let record = JoinTokenRecord { roles, expires_ms };
    let command = Command::CreateJoinToken {
        secret_sha256: sha256(&secret),
        record,
    };
    (
        JoinToken {
            secret,
            ca_fingerprint,
            addrs,
        },
        command,
    )
}

/// Lets nodes with a valid token in: uses the token up, gives out a node id, signs the certificate.
pub struct Admission {
    ca: Arc<Ca>,
    control: ControlHandle,
    cluster_key: Redacted<[u8; 32]>,
}

impl Admission {
    /// `cluster_key` is handed to nodes that keep data or coordinate.
    pub fn new(ca: Arc<Ca>, control: ControlHandle, cluster_key: Redacted<[u8; 32]>) -> Admission {
        Admission {
            ca,
            control,
            cluster_key,
        }
    }

    async fn decide(&self, request: JoinRequest) -> Result<JoinReply, String> {
        // A request that cannot be signed must not use the token up.
        self.ca
            .sign_csr(&request.csr_pem, NodeId(1))
            .map_err(|e| e.to_string())?;
        let name = request.name.clone();
        let keeps_data = request
            .roles
            .iter()
            .any(|r| matches!(r, Role::Coordinator | Role::Store));
        let coordinates = request.roles.contains(&Role::Coordinator);
        let admit = AdmitRequest {
            secret_sha256: sha256(&request.secret),
            name: request.name,
            addr: request.addr,
            roles: request.roles,
            data_addr: request.data_addr,
            devices: request.devices,
            version: request.version,
            now_ms: now_ms(),
        };
        let node_id = match self.control.propose(Command::AdmitNode(admit)).await {
            Ok(Outcome::Admitted { node }) => node,
            Ok(other) => return Err(format!("unexpected outcome {other:?}")),
            Err(error) => {
                warn!(%name, %error, "join refused");
                return Err(error.to_string());
            }
        };
        let cert_pem = self
            .ca
            .sign_csr(&request.csr_pem, node_id)
            .map_err(|e| e.to_string())?;
        info!(node = node_id.0, %name, "node joined");
        let state = self.control.state();
        Ok(JoinReply {
            node_id,
            cert_pem,
            ca_pem: self.ca.cert_pem().to_owned(),
            seeds: state
                .nodes_with(Role::Coordinator)
                .filter(|n| n.id != node_id)
                .map(|n| n.addr)
                .collect(),
            cluster_key: keeps_data.then(|| self.cluster_key.clone()),
            ca_key_pem: coordinates.then(|| Redacted::from(self.ca.key_pem().to_owned())),
        })
    }
}

impl JoinAuthority for Admission {
    fn admit(&self, request: JoinRequest) -> BoxFuture<'_, Result<JoinReply, String>> {
        Box::pin(self.decide(request))
    }
}

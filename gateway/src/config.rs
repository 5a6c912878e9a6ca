//! What an operator can set about a gateway.

use std::net::SocketAddr;

use coordinator::ids::TenantId;
use serde::{Deserialize, Serialize};

/// How a gateway serves. Every field has a default; unknown fields are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewayConfig {
    /// Address and port of the HTTP server. TLS is the reverse proxy's in front of it.
    pub listen: SocketAddr,
    /// Largest document that may be uploaded, in bytes; at most what the store takes.
    pub max_upload_bytes: u64,
    /// Connections served at the same time; more wait until one closes.
    pub max_connections: usize,
    /// Documents being uploaded at the same time; each holds up to `max_upload_bytes` of memory.
    pub max_uploads: usize,
    /// Seconds that open answers get to finish when the gateway stops.
    pub drain_s: u64,
    /// The tenant whose admin keys may see and make tenants and read the cluster's state. Without one, an admin key
    /// administers its own tenant only, and tenants are made with `verbund tenant`.
    pub operator_tenant: Option<TenantId>,
    /// Lets `/metrics` be read from other machines without an operator's key.
    pub metrics_public: bool,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            max_upload_bytes: rag_store::client::MAX_UPLOAD_BYTES,
            max_connections: 1024,
            max_uploads: 4,
            drain_s: 10,
            operator_tenant: None,
            metrics_public: false,
        }
    }
}

//! TLS and QUIC settings: who may connect, and how much they may send.

use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, EndpointConfig, IdleTimeout, ServerConfig, TransportConfig, VarInt};
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use sha2::{Digest, Sha256};

use super::limits::{
    CONNECTION_WINDOW_BYTES, IDLE_TIMEOUT, INITIAL_RTT, KEEP_ALIVE, MAX_LANES_PER_CONNECTION,
    MAX_REQUESTS_PER_CONNECTION, STREAM_WINDOW_BYTES,
};
use super::wire::{ALPN, ALPN_JOIN};
use crate::identity::{self, Identity};

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The three configurations of an endpoint.
pub(super) struct Settings {
    pub(super) endpoint: EndpointConfig,
    pub(super) server: ServerConfig,
    pub(super) client: ClientConfig,
}

pub(super) fn settings(identity: &Identity) -> Result<Settings, identity::Error> {
    let node = |e: &dyn std::fmt::Display| identity::Error::Invalid {
        what: "the node certificate or key",
        why: e.to_string(),
    };
    let ca = CertificateDer::from_pem_slice(identity.ca_pem.as_bytes()).map_err(|e| {
        identity::Error::Invalid {
            what: "the CA certificate",
            why: e.to_string(),
        }
    })?;
    let cert =
        CertificateDer::from_pem_slice(identity.cert_pem.as_bytes()).map_err(|e| node(&e))?;
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).map_err(|e| node(&e))?;
    let mut roots = RootCertStore::empty();
    roots
        .add(ca.clone())
        .map_err(|e| identity::Error::Invalid {
            what: "the CA certificate",
            why: e.to_string(),
        })?;
    let roots = Arc::new(roots);
    // The CA goes along, since a joining node knows only its fingerprint.
    let chain = vec![cert, ca];

    // Strangers pass here only because a joining node has no certificate yet; `listen` turns away whoever has none and
    // does not speak the join protocol.
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|e| node(&e))?;
    let mut server = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| node(&e))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(|e| node(&e))?;
    server.alpn_protocols = vec![ALPN.to_vec(), ALPN_JOIN.to_vec()];
    // Every connection shows its certificate anew, so that a revoked node cannot come back on an old ticket.
    server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    server.send_tls13_tickets = 0;

    let mut client = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| node(&e))?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(|e| node(&e))?;
    client.alpn_protocols = vec![ALPN.to_vec()];
    client.resumption = Resumption::disabled();

    let mut quic_server = ServerConfig::with_crypto(Arc::new(
        QuicServerConfig::try_from(server).map_err(|e| node(&e))?,
    ));
    quic_server.transport_config(Arc::new(server_transport()));
    quic_server.migration(false);
    let mut quic_client = ClientConfig::new(Arc::new(
        QuicClientConfig::try_from(client).map_err(|e| node(&e))?,
    ));
    quic_client.transport_config(Arc::new(client_transport()));

    // The same after a restart, so that a process that comes back on its old address can tell its peers at once that
    // their connections are gone.
    let reset_key: [u8; 32] = Sha256::new()
        .chain_update(b"verbund stateless reset\0")
        .chain_update(&identity.key_pem)
        .finalize()
        .into();
    let endpoint = EndpointConfig::new(Arc::new(ring::hmac::Key::new(
        ring::hmac::HMAC_SHA256,
        &reset_key,
    )));
    Ok(Settings {
        endpoint,
        server: quic_server,
        client: quic_client,
    })
}

fn server_transport() -> TransportConfig {
    let mut config = client_transport();
    config.max_concurrent_bidi_streams(VarInt::from_u32(MAX_REQUESTS_PER_CONNECTION));
    config.max_concurrent_uni_streams(VarInt::from_u32(MAX_LANES_PER_CONNECTION));
    config
}

/// Callers accept no streams: whoever wants something dials.
pub(crate) fn client_transport() -> TransportConfig {
    let mut config = TransportConfig::default();
    let idle_ms = u32::try_from(IDLE_TIMEOUT.as_millis()).unwrap_or(u32::MAX);
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(idle_ms))))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(INITIAL_RTT)
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(u64::from(CONNECTION_WINDOW_BYTES))
        .datagram_receive_buffer_size(None);
    config
}

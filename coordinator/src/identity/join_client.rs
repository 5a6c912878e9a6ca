//! The new node's side of the join handshake. It knows the cluster by the fingerprint of its CA alone.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::{Error, JoinReply, JoinRequest, JoinToken, SERVER_NAME};
use crate::transport::wire::{ALPN_JOIN, FrameReader, Kind, write_data};
use crate::transport::{DIAL_TIMEOUT, JOIN_TIMEOUT, MAX_JOIN_BYTES, RemoteError, tls};

/// Asks the node at `addr` to let this node into the cluster that `token` names. The request's secret is taken from
/// the token.
///
/// # Errors
/// [`Error::JoinUnreachable`] when nobody of that cluster answers there, [`Error::JoinRefused`] with the reason.
pub async fn join(
    addr: SocketAddr,
    token: &JoinToken,
    mut request: JoinRequest,
) -> Result<JoinReply, Error> {
    request.secret = token.secret;
    let unreachable = |why: String| Error::JoinUnreachable { addr, why };
    let body = postcard::to_stdvec(&request).map_err(|e| Error::invalid("the join request", e))?;
    if body.len() > MAX_JOIN_BYTES {
        let why = format!("{} bytes, the limit is {MAX_JOIN_BYTES}", body.len());
        return Err(Error::invalid("the join request", why));
    }
    let local: SocketAddr = match addr {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let endpoint = Endpoint::client(local).map_err(|e| unreachable(e.to_string()))?;
    let config = stranger_config(token.ca_fingerprint, ALPN_JOIN)?;
    let exchange = async {
        let connecting = endpoint
            .connect_with(config, addr, SERVER_NAME)
            .map_err(|e| unreachable(e.to_string()))?;
        let connection = tokio::time::timeout(DIAL_TIMEOUT * 5, connecting)
            .await
            .map_err(|_| unreachable("nobody answered".to_owned()))?
            .map_err(|e| unreachable(e.to_string()))?;
        let broken = |_| {
            unreachable(
                connection
                    .close_reason()
                    .map_or("broken off".to_owned(), |e| e.to_string()),
            )
        };
        let (mut send, receive) = connection
            .open_bi()
            .await
            .map_err(|e| unreachable(e.to_string()))?;
        write_data(&mut send, Bytes::from(body))
            .await
            .map_err(|e| unreachable(e.to_string()))?;
        // Fails only when the stream is over, which the reader then says.
        let _ = send.finish();
        let mut reader = FrameReader::new(receive, MAX_JOIN_BYTES, None);
        match reader.next().await.map_err(broken)? {
            Some((Kind::Data, reply)) => postcard::from_bytes::<JoinReply>(&reply).map_err(|_| {
                unreachable("its answer is of another version of the program".to_owned())
            }),
            Some((Kind::Fail, error)) => Err(Error::JoinRefused {
                why: postcard::from_bytes::<RemoteError>(&error)
                    .map_or("no reason given".to_owned(), |e| e.message),
            }),
            _ => Err(unreachable("it sent no answer".to_owned())),
        }
    };
    let reply = tokio::time::timeout(JOIN_TIMEOUT, exchange)
        .await
        .unwrap_or_else(|_| {
            Err(unreachable(format!(
                "no answer within {} s",
                JOIN_TIMEOUT.as_secs()
            )))
        });
    endpoint.close(0u32.into(), b"done");
    // Lets the close travel, so that the far side frees its place at once.
    drop(tokio::time::timeout(DIAL_TIMEOUT, endpoint.wait_idle()).await);
    reply
}

/// A client without a certificate.
pub(crate) fn stranger_config(
    ca_fingerprint: [u8; 32],
    alpn: &[u8],
) -> Result<ClientConfig, Error> {
    let invalid = |e: &dyn std::fmt::Display| Error::invalid("the TLS configuration", e);
    let verifier = PinnedCa {
        ca_fingerprint,
        provider: tls::provider(),
    };
    let mut client = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| invalid(&e))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    client.alpn_protocols = vec![alpn.to_vec()];
    let mut config = ClientConfig::new(Arc::new(
        QuicClientConfig::try_from(client).map_err(|e| invalid(&e))?,
    ));
    config.transport_config(Arc::new(tls::client_transport()));
    Ok(config)
}

/// Trusts the one CA with this fingerprint, which the far side sends along with its own certificate.
#[derive(Debug)]
struct PinnedCa {
    ca_fingerprint: [u8; 32],
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let pinned = |cert: &&CertificateDer<'_>| {
            let fingerprint: [u8; 32] = Sha256::digest(cert).into();
            bool::from(fingerprint.ct_eq(&self.ca_fingerprint))
        };
        let Some(ca) = intermediates.iter().find(pinned) else {
            return Err(rustls::Error::General(
                "it belongs to another cluster than the join token; check the address, or make a new token".to_owned(),
            ));
        };
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
                .build()
                .map_err(|e| rustls::Error::General(e.to_string()))?;
        verifier.verify_server_cert(end_entity, &[], server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

//! Incoming connections: who they are, and what they ask.

use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, Endpoint, Incoming, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use tokio::time::timeout;

use super::limits::{
    HANDSHAKE_TIMEOUT, JOIN_TIMEOUT, MAX_CONNECTIONS, MAX_FRAME_BYTES, MAX_JOIN_BYTES,
    MAX_SERVICE_BYTES, REQUEST_TIMEOUT,
};
use super::wire::{ALPN, ALPN_JOIN, Budget, FrameReader, Kind, ReadFault};
use super::{ErrorCode, Inner, RemoteError, Reply};
use crate::identity::{JoinRequest, node_id_of};
use crate::ids::NodeId;

/// QUIC's code for a connection that may not be here.
pub(super) const FORBIDDEN: u32 = 2;

/// What a revoked node is told.
const REMOVED: &[u8] = b"this node was removed from the cluster";

/// QUIC's code for a stream that breaks the protocol.
const MALFORMED: u32 = 3;

pub(super) async fn accept(inner: Arc<Inner>, endpoint: Endpoint) {
    while let Some(Some(incoming)) = inner.stopping.run_until_cancelled(endpoint.accept()).await {
        if endpoint.open_connections() > MAX_CONNECTIONS {
            tracing::warn!(
                limit = MAX_CONNECTIONS,
                "too many connections, refusing one"
            );
            incoming.refuse();
            continue;
        }
        let stopping = inner.stopping.clone();
        let greet = greet(inner.clone(), incoming);
        inner.tasks.spawn(async move {
            let _ = stopping.run_until_cancelled_owned(greet).await;
        });
    }
}

async fn greet(inner: Arc<Inner>, incoming: Incoming) {
    let from = incoming.remote_address();
    let connection = match incoming.accept() {
        Ok(connecting) => match timeout(HANDSHAKE_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(why)) => return tracing::info!(%from, %why, "a handshake failed"),
            Err(_) => return tracing::info!(%from, "a handshake took too long"),
        },
        Err(why) => return tracing::info!(%from, %why, "a handshake failed"),
    };
    let protocol = connection
        .handshake_data()
        .and_then(|data| data.downcast::<HandshakeData>().ok())
        .and_then(|data| data.protocol);
    if protocol.as_deref() == Some(ALPN_JOIN) {
        return serve_join(&inner, &connection).await;
    }
    let refusal: &[u8] = match peer_of(&connection) {
        _ if protocol.as_deref() != Some(ALPN) => b"unknown protocol",
        None => b"a certificate of this cluster is required",
        Some(node) if inner.is_revoked(node) => REMOVED,
        Some(node) => return serve(inner, connection, node).await,
    };
    tracing::warn!(%from, why = %String::from_utf8_lossy(refusal), "a connection was refused");
    connection.close(FORBIDDEN.into(), refusal);
}

/// The node at the far end, as its verified certificate says.
pub(super) fn peer_of(connection: &Connection) -> Option<NodeId> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    node_id_of(chain.first()?)
}

async fn serve(inner: Arc<Inner>, connection: Connection, from: NodeId) {
    let budget = inner.budget(from);
    let mut revocation = inner.revocation.subscribe();
    loop {
        // At every turn, so that neither a revocation between two turns nor a stream that came with it slips through.
        if inner.is_revoked(from) {
            return connection.close(FORBIDDEN.into(), REMOVED);
        }
        let fault = tokio::select! {
            stream = connection.accept_bi() => match stream {
                Ok(_) if inner.is_revoked(from) => continue,
                Ok((send, receive)) => {
                    let reader = FrameReader::new(receive, MAX_FRAME_BYTES, Some(budget.clone()));
                    inner.tasks.spawn(request(inner.clone(), from, send, reader));
                    continue;
                }
                Err(fault) => fault,
            },
            stream = connection.accept_uni() => match stream {
                Ok(_) if inner.is_revoked(from) => continue,
                Ok(receive) => {
                    let stopping = inner.stopping.clone();
                    let lane = lane(inner.clone(), from, receive, budget.clone());
                    inner.tasks.spawn(async move { let _ = stopping.run_until_cancelled_owned(lane).await; });
                    continue;
                }
                Err(fault) => fault,
            },
            // Fails only when the transport is gone, and with it this connection.
            Ok(()) = revocation.changed() => continue,
        };
        return tracing::debug!(%from, %fault, "a connection ended");
    }
}

/// Reads the service's name, with which every stream begins.
async fn service_name(reader: &mut FrameReader) -> Result<String, ReadFault> {
    match reader.next().await? {
        Some((Kind::Service, name)) if name.len() <= MAX_SERVICE_BYTES => {
            String::from_utf8(name.into()).map_err(|_| ReadFault::Malformed)
        }
        _ => Err(ReadFault::Malformed),
    }
}

async fn request(inner: Arc<Inner>, from: NodeId, send: SendStream, mut reader: FrameReader) {
    let reply = Reply::remote(send, inner.stopping.clone(), inner.tasks.clone());
    let read = async {
        let service = service_name(&mut reader).await?;
        match reader.next().await? {
            Some((Kind::Data, request)) => Ok((service, request)),
            _ => Err(ReadFault::Malformed),
        }
    };
    let (service, request) = match timeout(REQUEST_TIMEOUT, read).await {
        Ok(Ok(request)) => request,
        Ok(Err(ReadFault::TooLarge(bytes))) => {
            let text = format!("a request of {bytes} bytes exceeds the limit of {MAX_FRAME_BYTES}");
            return reply
                .fail(RemoteError::new(ErrorCode::TooLarge, text))
                .await;
        }
        Ok(Err(fault)) => return tracing::debug!(%from, ?fault, "a request did not arrive"),
        Err(_) => return tracing::debug!(%from, "a request took too long to arrive"),
    };
    inner.handle(from, &service, request, reply).await;
}

async fn lane(inner: Arc<Inner>, from: NodeId, receive: RecvStream, budget: Budget) {
    let mut reader = FrameReader::new(receive, MAX_FRAME_BYTES, Some(budget));
    let Ok(service) = service_name(&mut reader).await else {
        return tracing::debug!(%from, "a lane without a service's name was closed");
    };
    while let Ok(Some((Kind::Data, message))) = reader.next().await {
        inner.handle_one_way(from, &service, message).await;
    }
}

/// The join protocol: one request, one reply, on a connection of its own.
async fn serve_join(inner: &Inner, connection: &Connection) {
    let from = connection.remote_address();
    let authority = inner
        .join_authority
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let Ok(_place) = inner.joins.try_acquire() else {
        return connection.close(FORBIDDEN.into(), b"too many joins at once, try again");
    };
    let answer = async {
        let (send, receive) = connection.accept_bi().await.ok()?;
        let mut reply = Reply::remote(send, inner.stopping.clone(), inner.tasks.clone());
        let mut reader = FrameReader::new(receive, MAX_JOIN_BYTES, None);
        let Ok(Some((Kind::Data, request))) = reader.next().await else {
            return None;
        };
        let refuse = |code, text: &str| RemoteError::new(code, text);
        let answer = match (authority, postcard::from_bytes::<JoinRequest>(&request)) {
            (None, _) => Err(refuse(
                ErrorCode::Unavailable,
                "this node takes no joins; ask a coordinator",
            )),
            (_, Err(_)) => Err(refuse(
                ErrorCode::BadRequest,
                "the join request is of another version",
            )),
            (Some(authority), Ok(request)) => authority
                .admit(request)
                .await
                .map_err(|text: String| refuse(ErrorCode::Forbidden, &text)),
        };
        match answer.map(|reply| postcard::to_stdvec(&reply)) {
            Ok(Ok(bytes)) => {
                tracing::info!(%from, "a node was admitted");
                reply.send(Bytes::from(bytes)).await.ok()?;
                reply.finish().await;
            }
            Ok(Err(_)) => {
                reply
                    .fail(refuse(
                        ErrorCode::Internal,
                        "the join reply cannot be written",
                    ))
                    .await
            }
            Err(error) => {
                tracing::warn!(%from, why = %error, "a join was refused");
                reply.fail(error).await;
            }
        }
        Some(())
    };
    if timeout(JOIN_TIMEOUT, answer).await.ok().flatten().is_none() {
        return connection.close(MALFORMED.into(), b"no join request came");
    }
    // The joining node closes the connection once it has read the reply.
    drop(timeout(HANDSHAKE_TIMEOUT, connection.closed()).await);
}

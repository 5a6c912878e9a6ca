//! Transport: how nodes talk. QUIC with mutual TLS under the cluster's CA; one bidirectional stream a request, one
//! unidirectional stream for all one-way messages to the same service.
//!
//! Here belong connections, framing, limits and cancellation. Not here: what is said (each service's own room), who
//! the nodes are (room `identity`), and the ranks' collectives (crate `worker`; they use plain TCP).

mod dial;
mod error;
mod lane;
mod limits;
mod listen;
mod stream;
#[cfg(test)]
mod tests;
pub(crate) mod tls;
pub(crate) mod wire;

use std::collections::{HashMap, HashSet};
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockWriteGuard};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use quinn::{Connection, Endpoint, TokioRuntime};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use error::{Closed, Error, ErrorCode, RemoteError};
pub use limits::MAX_FRAME_BYTES;
pub(crate) use limits::{DIAL_TIMEOUT, JOIN_TIMEOUT, MAX_JOIN_BYTES};
pub use stream::{FrameStream, Reply};

use crate::identity::{Identity, JoinAuthority};
use crate::ids::NodeId;
use dial::{Dialler, connection_fault};
use lane::Lanes;
use limits::{DRAIN_TIMEOUT, LOCAL_FRAMES, MAX_JOINS, MAX_SERVICE_BYTES};
use wire::{Budget, FrameReader};

/// Answers the requests of one service. Shared by all connections.
pub trait Handler: Send + Sync {
    /// Answers one request of node `from` (as its certificate says). For a one-way message `reply` leads nowhere; such
    /// messages of one peer to one service are handled in the order of sending, each after the one before is done.
    fn handle(&self, from: NodeId, request: Bytes, reply: Reply) -> BoxFuture<'static, ()>;
}

impl<F> Handler for F
where
    F: Fn(NodeId, Bytes, Reply) -> BoxFuture<'static, ()> + Send + Sync,
{
    fn handle(&self, from: NodeId, request: Bytes, reply: Reply) -> BoxFuture<'static, ()> {
        self(from, request, reply)
    }
}

/// A node's end of all its connections. Cheap to clone; lives until [`Transport::shutdown`].
#[derive(Clone)]
pub struct Transport {
    inner: Arc<Inner>,
    endpoint: Endpoint,
}

/// What connections, lanes and requests share.
pub(crate) struct Inner {
    node: NodeId,
    local_addr: SocketAddr,
    services: RwLock<HashMap<String, Arc<dyn Handler>>>,
    join_authority: RwLock<Option<Arc<dyn JoinAuthority>>>,
    joins: Semaphore,
    budgets: Mutex<HashMap<NodeId, Budget>>,
    revoked: Arc<RwLock<HashSet<NodeId>>>,
    /// Changes whenever `revoked` does.
    revocation: watch::Sender<()>,
    dialler: Dialler,
    lanes: Lanes,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl Transport {
    /// Listens, and is ready to call others. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Bind`] when the address is taken; [`Error::Identity`] when the certificate is unusable.
    pub fn bind(identity: &Identity, listen: SocketAddr) -> Result<Transport, Error> {
        let settings = tls::settings(identity)?;
        let bind = |why| Error::Bind { addr: listen, why };
        let socket = UdpSocket::bind(listen).map_err(bind)?;
        let mut endpoint = Endpoint::new(
            settings.endpoint,
            Some(settings.server),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(bind)?;
        endpoint.set_default_client_config(settings.client);
        let revoked = Arc::<RwLock<HashSet<NodeId>>>::default();
        let inner = Arc::new(Inner {
            node: identity.node_id,
            local_addr: endpoint.local_addr().map_err(bind)?,
            services: RwLock::default(),
            join_authority: RwLock::default(),
            joins: Semaphore::new(MAX_JOINS),
            budgets: Mutex::default(),
            revoked: revoked.clone(),
            revocation: watch::Sender::new(()),
            dialler: Dialler::new(endpoint.clone(), revoked),
            lanes: Lanes::default(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        inner
            .tasks
            .spawn(listen::accept(inner.clone(), endpoint.clone()));
        Ok(Transport { inner, endpoint })
    }

    /// The address listened on, with the real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.inner.local_addr
    }

    pub fn node_id(&self) -> NodeId {
        self.inner.node
    }

    /// Offers a service under a name; replaces the one before.
    pub fn register(&self, service: &'static str, handler: Arc<dyn Handler>) {
        self.register_named(service.to_owned(), handler);
    }

    /// As [`Transport::register`], for names that are made at run time (at most 64 bytes).
    pub fn register_named(&self, service: String, handler: Arc<dyn Handler>) {
        debug_assert!(service.len() <= MAX_SERVICE_BYTES);
        // A handler's end may unregister others: it must come after the lock's. So below.
        let before = self.inner.services_mut().insert(service, handler);
        drop(before);
    }

    /// Offers the service no longer; running requests end as they like.
    pub fn unregister(&self, service: &str) {
        let before = self.inner.services_mut().remove(service);
        drop(before);
    }

    /// Takes join requests (on their own protocol name) and asks `authority` about each.
    pub fn serve_join(&self, authority: Arc<dyn JoinAuthority>) {
        *self
            .inner
            .join_authority
            .write()
            .unwrap_or_else(PoisonError::into_inner) = Some(authority);
    }

    /// Refuses these nodes from now on, whatever their certificate says, and closes their connections. Those that were
    /// refused before and are not among them are taken again.
    pub fn set_revoked(&self, nodes: HashSet<NodeId>) {
        self.change_revoked(|revoked| *revoked = nodes);
    }

    /// Refuses these nodes too. A list that is older than one heard before takes nobody back.
    pub fn revoke(&self, nodes: impl IntoIterator<Item = NodeId>) {
        self.change_revoked(|revoked| revoked.extend(nodes));
    }

    /// Whether the node was revoked here.
    pub fn is_revoked(&self, node: NodeId) -> bool {
        self.inner.is_revoked(node)
    }

    fn change_revoked(&self, change: impl FnOnce(&mut HashSet<NodeId>)) {
        {
            let mut revoked = self
                .inner
                .revoked
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            let before = revoked.clone();
            change(&mut revoked);
            if *revoked == before {
                return;
            }
        }
        self.inner.revocation.send_replace(());
        let inner = self.inner.clone();
        self.inner
            .tasks
            .spawn(async move { inner.dialler.drop_revoked().await });
    }

    /// Sends a request and waits for exactly one reply frame. Dropping the future cancels.
    ///
    /// # Errors
    /// See [`Error`]; after [`Error::Timeout`] and [`Error::Closed`] the request may have taken effect.
    pub async fn call(
        &self,
        to: SocketAddr,
        service: &str,
        request: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, Error> {
        let answer = async {
            let mut stream = self.open(to, service, request).await?;
            stream.next().await.unwrap_or(Err(Error::Closed))
        };
        tokio::time::timeout(timeout, answer)
            .await
            .unwrap_or(Err(Error::Timeout))
    }

    /// Sends a request whose reply is many frames.
    ///
    /// # Errors
    /// [`Error::Unreachable`], [`Error::FrameTooLarge`], [`Error::Closed`].
    pub async fn open(
        &self,
        to: SocketAddr,
        service: &str,
        request: Bytes,
    ) -> Result<FrameStream, Error> {
        if request.len() > MAX_FRAME_BYTES {
            return Err(Error::FrameTooLarge {
                bytes: request.len(),
            });
        }
        if self.inner.stopping.is_cancelled() {
            return Err(Error::Closed);
        }
        if self.inner.is_self(to) {
            return Ok(self.open_local(service, request));
        }
        let (connection, mut send, receive) = self.request_stream(to).await?;
        let written = async {
            wire::write_service(&mut send, service).await?;
            wire::write_data(&mut send, request).await
        };
        if written.await.is_err() {
            return Err(connection_fault(&connection));
        }
        // Fails only when the stream is over, which the reader then says.
        let _ = send.finish();
        Ok(FrameStream::remote(
            FrameReader::new(receive, MAX_FRAME_BYTES, None),
            connection,
        ))
    }

    /// A stream to write a request on; a connection that turns out dead is dialled again once.
    async fn request_stream(
        &self,
        to: SocketAddr,
    ) -> Result<(Connection, quinn::SendStream, quinn::RecvStream), Error> {
        let connection = self.inner.dialler.connection(to).await?;
        if let Ok((send, receive)) = connection.open_bi().await {
            return Ok((connection, send, receive));
        }
        let connection = self.inner.dialler.connection(to).await?;
        match connection.open_bi().await {
            Ok((send, receive)) => Ok((connection, send, receive)),
            Err(why) => Err(Error::Unreachable {
                addr: to,
                why: why.to_string(),
            }),
        }
    }

    /// A request to this very node takes no network.
    fn open_local(&self, service: &str, request: Bytes) -> FrameStream {
        let (to, from) = mpsc::channel(LOCAL_FRAMES);
        let inner = self.inner.clone();
        let reply = Reply::local(to, inner.stopping.clone(), inner.tasks.clone());
        let service = service.to_owned();
        self.inner
            .tasks
            .spawn(async move { inner.handle(inner.node, &service, request, reply).await });
        FrameStream::local(from)
    }

    /// Sends one way, best effort: in order, batched, dropped when the peer is away or too slow.
    pub fn send(&self, to: SocketAddr, service: &str, request: Bytes) {
        if !self.inner.lanes.send(&self.inner, to, service, request) {
            tracing::debug!(%to, service, "a one-way message was dropped");
        }
    }

    /// Takes no new request, lets running ones end for a moment, then closes every connection.
    pub async fn shutdown(&self) {
        self.inner.stopping.cancel();
        self.endpoint.set_server_config(None);
        self.inner.tasks.close();
        drop(tokio::time::timeout(DRAIN_TIMEOUT, self.inner.tasks.wait()).await);
        self.endpoint.close(0u32.into(), b"the node shuts down");
        drop(tokio::time::timeout(DRAIN_TIMEOUT, self.endpoint.wait_idle()).await);
        // Handlers often hold this transport; without this neither would ever be freed.
        let services = std::mem::take(&mut *self.inner.services_mut());
        drop(services);
        let authority = self
            .inner
            .join_authority
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(authority);
        self.inner.lanes.clear();
    }
}

impl Inner {
    fn is_self(&self, to: SocketAddr) -> bool {
        to == self.local_addr
            || (self.local_addr.ip().is_unspecified()
                && to.ip().is_loopback()
                && to.port() == self.local_addr.port())
    }

    fn is_revoked(&self, node: NodeId) -> bool {
        self.revoked
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&node)
    }

    fn budget(&self, node: NodeId) -> Budget {
        let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        budgets.entry(node).or_insert_with(Budget::new).clone()
    }

    fn services_mut(&self) -> RwLockWriteGuard<'_, HashMap<String, Arc<dyn Handler>>> {
        self.services
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn handler(&self, service: &str) -> Option<Arc<dyn Handler>> {
        self.services
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(service)
            .cloned()
    }

    async fn handle(&self, from: NodeId, service: &str, request: Bytes, reply: Reply) {
        match self.handler(service) {
            Some(handler) => handler.handle(from, request, reply).await,
            None => {
                let text = format!("node {} offers no service {service:?}", self.node);
                reply
                    .fail(RemoteError::new(ErrorCode::UnknownService, text))
                    .await;
            }
        }
    }

    async fn handle_one_way(&self, from: NodeId, service: &str, message: Bytes) {
        if let Some(handler) = self.handler(service) {
            handler
                .handle(
                    from,
                    message,
                    Reply::nowhere(self.stopping.clone(), self.tasks.clone()),
                )
                .await;
        }
    }
}

//! What people and programs talk to: the HTTP APIs, answers with sources, and the web page.
//!
//! A request's way: [`http`] takes the connection, gives it an id and limits it, and finds out whose key it carries; the
//! [`router`] knows all routes; rooms `openai` and `api` do what a route is for; `sources` makes answers from documents;
//! [`error`] is how everything can fail.
//!
//! Invariants: a gateway keeps nothing between requests, so that any number may run; every request acts for exactly the tenant
//! of its key; another tenant's id answers as an unknown one; no prompt, answer or document text reaches a log or a metric;
//! it connects to nothing but the cluster's nodes.

pub mod api;
mod app;
pub mod config;
pub mod error;
mod health;
pub mod http;
mod metrics;
pub mod openai;
mod page;
pub mod router;
pub mod sources;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use coordinator::control::ControlHandle;
use rag_store::StoreClient;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use worker::client::InferenceClient;

pub use app::App;
pub use config::GatewayConfig;

/// Why a gateway cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address could not be taken.
    #[error("cannot listen on {addr}: {source}; {}", remedy(.source))]
    Listen {
        /// The configured address.
        addr: SocketAddr,
        source: io::Error,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another program uses this port: stop it, or choose another port"
        }
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need a privilege: choose a port above, or grant CAP_NET_BIND_SERVICE"
        }
        io::ErrorKind::AddrNotAvailable => {
            "no interface of this machine has this address: correct `listen`"
        }
        _ => "check `listen` in the gateway's configuration",
    }
}

/// A gateway whose port is taken and which does not answer yet.
pub struct Gateway {
    listener: TcpListener,
    config: GatewayConfig,
}

impl Gateway {
    /// Takes the port.
    ///
    /// # Errors
    /// [`Error::Listen`] with what to do about it.
    pub async fn bind(config: GatewayConfig) -> Result<Self, Error> {
        let addr = config.listen;
        let listener = TcpListener::bind(addr)
            .await
            .map_err(|source| Error::Listen { addr, source })?;
        Ok(Self { listener, config })
    }

    /// Where it listens; of use when port 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.listener.local_addr().unwrap_or(self.config.listen)
    }

    /// Answers until `shutdown`, then lets open answers finish for the configured time.
    pub async fn run(
        self,
        control: ControlHandle,
        inference: InferenceClient,
        store: StoreClient,
        shutdown: CancellationToken,
    ) {
        let drain = Duration::from_secs(self.config.drain_s);
        let max_connections = self.config.max_connections;
        tracing::info!(listen = %self.local_addr(), "gateway serves");
        let app = App::new(self.config, control, inference, store);
        http::server::run(
            self.listener,
            router::router(app),
            max_connections,
            drain,
            shutdown,
        )
        .await;
        tracing::info!("gateway stopped");
    }
}

/// Serves until `shutdown`.
///
/// # Errors
/// [`Error::Listen`] when the port cannot be taken.
pub async fn serve(
    config: GatewayConfig,
    control: ControlHandle,
    inference: InferenceClient,
    store: StoreClient,
    shutdown: CancellationToken,
) -> Result<(), Error> {
    Gateway::bind(config)
        .await?
        .run(control, inference, store, shutdown)
        .await;
    Ok(())
}

//! `verbund node`: one server process, in whatever roles its configuration gives it.
//!
//! Here belongs the wiring: which parts run, in which order they start and end. Not here: what the parts do.

mod admin;
mod embedder;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use coordinator::Redacted;
use coordinator::clock::now_ms;
use coordinator::control::{ControlHandle, Coordinator, CoordinatorConfig, Node, Role};
use coordinator::transport::Transport;
use gateway::Gateway;
use rag_store::{StoreClient, StoreConfig, StoreNode};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use worker::client::InferenceClient;
use worker::service::{WorkerConfig, WorkerNode};

use crate::config::NodeConfig;
use crate::credentials::NodeSecrets;
use crate::{logs, machine};

/// Everything must have ended this long after open answers have; what has not is cut off.
const SHUTDOWN_WITHIN: Duration = Duration::from_secs(5);
/// Threads that carry connections and services; computing has its own.
const RUNTIME_THREADS: usize = 2;

/// Runs the node of the configuration at `path` until a signal ends it.
///
/// # Errors
/// Whatever keeps it from starting.
pub fn run(path: &Path) -> Result<()> {
    let config = NodeConfig::load(path)?;
    logs::init(&config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .enable_all()
        .build()?;
    let result = runtime.block_on(serve(config));
    if let Err(error) = &result {
        error!(error = %format!("{error:#}"), "the node ends");
    }
    runtime.shutdown_timeout(Duration::from_millis(500));
    result
}

async fn serve(config: NodeConfig) -> Result<()> {
    let stop = CancellationToken::new();
    let signals = tokio::spawn(stop_on_signal(stop.clone())?);
    let within = SHUTDOWN_WITHIN + Duration::from_secs(config.gateway.drain_s);
    let mut parts = Parts::start(config, stop.clone()).await?;
    let result = tokio::select! {
        () = stop.cancelled() => Ok(()),
        ended = parts.ended() => ended,
    };
    stop.cancel();
    if timeout(within, parts.shutdown()).await.is_err() {
        warn!("not everything ended in time; cutting it off");
    }
    signals.abort();
    info!("ended");
    result
}

fn stop_on_signal(stop: CancellationToken) -> Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        info!("asked to end");
        stop.cancel();
    })
}

/// What runs in this process, in the order of starting.
struct Parts {
    transport: Transport,
    coordinator: Option<Coordinator>,
    store: Option<StoreNode>,
    worker: Option<WorkerNode>,
    gateway: Option<JoinHandle<()>>,
    /// Registration and heartbeats; ends only when the cluster refuses this node.
    member: JoinHandle<Result<(), coordinator::control::Error>>,
}

impl Parts {
    async fn start(config: NodeConfig, stop: CancellationToken) -> Result<Parts> {
        let secrets = NodeSecrets::load(&config.node.data)?;
        let id = secrets.identity.node_id;
        let has = |role| config.node.roles.contains(&role);
        // The port first: an address in use is the likeliest mistake.
        let gateway = match has(Role::Gateway) {
            true => Some(Gateway::bind(config.gateway.clone()).await?),
            false => None,
        };
        let transport = Transport::bind(&secrets.identity, config.node.listen)?;
        let control = ControlHandle::connect(transport.clone(), config.seeds());
        info!(node = id.0, name = %config.node.name, listen = %transport.local_addr(), "node starts");

        let coordinator = match has(Role::Coordinator) {
            true => Some(start_coordinator(&config, &secrets, &transport, &control)?),
            false => None,
        };
        let inference = InferenceClient::new(transport.clone(), control.clone());
        let store = match has(Role::Store) {
            true => {
                let dir = config.node.data.join("store");
                let store_config = StoreConfig::new(dir, id, secrets.cluster_key()?);
                let embedder = Arc::new(embedder::Inference(inference.clone()));
                Some(
                    StoreNode::start(store_config, transport.clone(), control.clone(), embedder)
                        .await?,
                )
            }
            false => None,
        };
        let mut node = Node {
            id,
            name: config.node.name.clone(),
            addr: config.advertised(),
            data_addr: None,
            roles: config.node.roles.clone(),
            devices: Vec::new(),
            up: true,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            // The clock only grows between two starts of a node, unless it is set back by hand.
            incarnation: now_ms(),
        };
        let worker = match has(Role::Worker) {
            true => Some(start_worker(&config, &mut node, &transport, &control)?),
            false => None,
        };
        let gateway = gateway.map(|bound| {
            let client = StoreClient::new(transport.clone(), control.clone());
            tokio::spawn(bound.run(control.clone(), inference.clone(), client, stop.clone()))
        });
        if let Some(listen) = config.node.admin_listen {
            admin::serve(
                listen,
                config.node.name.clone(),
                control.clone(),
                stop.clone(),
            )
            .await?;
        }
        let member = tokio::spawn(async move { control.run_member(node).await });
        Ok(Parts {
            transport,
            coordinator,
            store,
            worker,
            gateway,
            member,
        })
    }

    /// Resolves when something ended that should run as long as the node.
    async fn ended(&mut self) -> Result<()> {
        let gateway = async {
            match self.gateway.as_mut() {
                Some(task) => task.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            refused = &mut self.member => match refused {
                Ok(Ok(())) => Ok(()),
                Ok(Err(refused)) => Err(anyhow!(refused)).context("the cluster refuses this node"),
                Err(panic) => Err(anyhow!(panic)).context("heartbeats ended"),
            },
            ended = gateway => ended.context("the gateway ended"),
        }
    }

    /// Takes no more requests, finishes what is under way, closes what is on disk.
    async fn shutdown(self) {
        if let Some(gateway) = self.gateway
            && !gateway.is_finished()
        {
            let _ = gateway.await;
        }
        self.member.abort();
        if let Some(worker) = self.worker {
            worker.shutdown().await;
        }
        if let Some(store) = self.store {
            store.shutdown().await;
        }
        if let Some(coordinator) = self.coordinator {
            coordinator.shutdown().await;
        }
        self.transport.shutdown().await;
    }
}

fn start_coordinator(
    config: &NodeConfig,
    secrets: &NodeSecrets,
    transport: &Transport,
    control: &ControlHandle,
) -> Result<Coordinator> {
    let coordinator_config = CoordinatorConfig {
        node: secrets.identity.node_id,
        dir: config.node.data.join("control"),
        cluster_name: config.cluster.name.clone(),
        bootstrap: config.bootstrap(),
        ca: Arc::new(secrets.ca()?),
        cluster_key: Redacted::new(secrets.cluster_key()?),
    };
    Ok(Coordinator::start(
        coordinator_config,
        transport.clone(),
        control.clone(),
    )?)
}

fn start_worker(
    config: &NodeConfig,
    node: &mut Node,
    transport: &Transport,
    control: &ControlHandle,
) -> Result<WorkerNode> {
    let device = machine::cpu_device(&config.worker);
    let listen = config
        .worker
        .data_listen
        .unwrap_or_else(|| (config.node.listen.ip(), 0).into());
    let count = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    let limit = |n: u32| if n == 0 { usize::MAX } else { count(n) };
    let worker_config = WorkerConfig {
        wire: config.worker.wire,
        kv_format: config.worker.kv_format,
        speculate: config.worker.speculate,
        max_waiting: count(config.worker.max_waiting),
        mixed_rows: count(config.worker.mixed_rows),
        tenant_running: limit(config.worker.tenant_running),
        tenant_waiting: limit(config.worker.tenant_waiting),
        tenant_weights: config.tenant_weights(),
        ..WorkerConfig::new(node.incarnation, listen)
    };
    let worker = WorkerNode::start(worker_config, transport.clone(), control.clone())?;
    let mut data_addr = config
        .worker
        .data_advertise
        .unwrap_or_else(|| worker.data_addr());
    if data_addr.ip().is_unspecified() {
        data_addr.set_ip(node.addr.ip());
    }
    node.data_addr = Some(data_addr);
    node.devices = vec![device];
    Ok(worker)
}

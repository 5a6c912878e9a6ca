//! `verbund up`: a whole cluster on one machine, each node a process of its own.
//!
//! Here belong the directory's layout, the processes, and bringing the cluster to readiness. Not here: what a node does
//! (room `node`), what an operator asks (room `operator`). Nothing of a cluster's state is kept in this process: it may
//! die at any moment, and the next start finds everything.

mod demo;
mod examples;
mod layout;
mod leftovers;
mod process;
mod ready;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::models;
use demo::Demo;
use layout::{Claim, Layout, RankShare};
use process::Event;

pub use layout::{MAX_WORKERS, write_whole};
pub use process::EXIT_CONFIG;

/// What `verbund up` was asked for.
pub struct Options {
    pub data: PathBuf,
    pub port: u16,
    pub ranks: u32,
    /// The default model when absent.
    pub model: Option<PathBuf>,
    /// Documents for the collection of examples.
    pub examples: Option<PathBuf>,
}

/// What the cluster shall serve.
pub struct Served {
    pub generate: PathBuf,
    /// Absent when its file is: answers from documents then wait for one.
    pub embed: Option<PathBuf>,
    pub ranks: u32,
}

/// Runs until a signal ends it or the cluster cannot work.
///
/// # Errors
/// Says what was expected, what came, what to do.
pub fn run(options: Options) -> Result<()> {
    // One thread: children live as long as the thread that starts them.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(go(options))
}

async fn go(options: Options) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let served = check_models(&options)?;
    if let Some(folder) = options.examples.as_deref().filter(|f| !f.is_dir()) {
        bail!(
            "--examples: expected a folder of documents, got {}",
            folder.display()
        );
    }
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, options.port));
    let claim = Claim::take(&options.data)?;
    tokio::select! {
        ended = leftovers::ended(&claim.dir) => ended?,
        _ = interrupt.recv() => return Ok(()),
        _ = terminate.recv() => return Ok(()),
    }
    check_port(listen)?;
    let layout = Layout::open(claim, listen, options.ranks, rank_share(options.ranks))?;
    say(&format!(
        "{} a cluster in {}",
        if layout.fresh { "Making" } else { "Starting" },
        layout.dir.display()
    ));

    let mut cluster = Cluster::start(layout, format!("http://{listen}"))?;
    let examples = options.examples.clone();
    let task = ready::BringUp {
        data: cluster.layout.dir.clone(),
        keys: cluster.layout.keys.clone(),
        former: std::mem::take(&mut cluster.layout.former),
        gateway: listen,
        served,
        examples,
    };
    let mut bring_up: Option<JoinHandle<Result<()>>> = Some(tokio::spawn(task.run()));
    let ended: Result<()> = loop {
        let brought_up = async {
            match bring_up.as_mut() {
                Some(task) => task.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            result = brought_up => {
                bring_up = None;
                match result {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => break Err(error),
                    Err(panic) => break Err(anyhow!("bringing the cluster up was cut off: {panic}")),
                }
            }
            event = cluster.events.recv() => {
                if let Some(event) = event
                    && let Err(error) = cluster.handle(event)
                {
                    break Err(error);
                }
            }
            _ = interrupt.recv() => break Ok(()),
            _ = terminate.recv() => break Ok(()),
        }
    };
    if let Some(task) = bring_up {
        task.abort();
    }
    say("Stopping");
    cluster.stop().await;
    ended
}

/// The processes and their supervision.
struct Cluster {
    layout: Layout,
    base_url: String,
    pids: BTreeMap<String, u32>,
    events: UnboundedReceiver<Event>,
    /// In the order of stopping: what depends on others first.
    stops: Vec<(CancellationToken, JoinHandle<()>)>,
}

impl Cluster {
    fn start(layout: Layout, base_url: String) -> Result<Cluster> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let (tell, events) = unbounded_channel();
        let mut stops = Vec::new();
        for member in &layout.members {
            let stop = CancellationToken::new();
            let task =
                process::supervise(member.clone(), program.clone(), stop.clone(), tell.clone());
            stops.push((stop, tokio::spawn(task)));
        }
        stops.reverse();
        Ok(Cluster {
            layout,
            base_url,
            pids: BTreeMap::new(),
            events,
            stops,
        })
    }

    fn handle(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Started { name, pid } => {
                self.pids.insert(name, pid);
                // A full disk is no reason to stop what runs.
                if let Err(error) = self.write_demo() {
                    say(&format!("demo.json is not up to date: {error:#}"));
                }
                Ok(())
            }
            Event::Died { name, why, pause } => {
                say(&format!(
                    "{name} {why}; starting it again in {} ms",
                    pause.as_millis()
                ));
                Ok(())
            }
            Event::Hopeless { name, why } => bail!("{name} cannot start: {why}"),
        }
    }

    fn write_demo(&self) -> Result<()> {
        Demo::new(
            &self.base_url,
            &self.layout.keys,
            &self.layout.members,
            &self.pids,
        )
        .write(&self.layout.dir)
    }

    /// Gateway, then workers, then the nodes that keep the data, which may end side by side.
    async fn stop(self) {
        let mut nodes = Vec::new();
        for ((stop, task), member) in self.stops.into_iter().zip(self.layout.members.iter().rev()) {
            stop.cancel();
            if member.role == "coordinator+store" {
                nodes.push(task);
            } else {
                let _ = task.await;
            }
        }
        for task in nodes {
            let _ = task.await;
        }
    }
}

/// Opens the model before anything is started, so that what is wrong with it is said at once.
fn check_models(options: &Options) -> Result<Served> {
    let generate = options
        .model
        .clone()
        .unwrap_or_else(models::default_generate);
    let generate = generate.canonicalize().with_context(|| {
        format!(
            "no model at {}; give one with --model, or fetch the default with `ops/setup models`",
            generate.display()
        )
    })?;
    models::check(
        &generate,
        options.ranks,
        rank_share(options.ranks).memory_bytes,
    )?;
    let embed = models::default_embed();
    let embed = embed.canonicalize().ok();
    if embed.is_none() {
        say(&format!(
            "No embedding model at {}; answers from documents need one (`ops/setup models`)",
            models::default_embed().display()
        ));
    }
    Ok(Served {
        generate,
        embed,
        ranks: options.ranks,
    })
}

fn check_port(listen: SocketAddr) -> Result<()> {
    TcpListener::bind(listen).map(drop).with_context(|| {
        format!(
            "port {} is not free; stop the program that holds it, or choose another with --port",
            listen.port()
        )
    })
}

/// Cores and half of the free memory, shared equally; equal ranks get equal shards.
fn rank_share(ranks: u32) -> RankShare {
    let ranks = ranks.max(1);
    let cores = std::thread::available_parallelism()
        .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    RankShare {
        threads: (cores / ranks).max(1),
        memory_bytes: crate::machine::available_bytes() / 2 / u64::from(ranks),
        read_bytes_per_s: 10_000_000_000,
    }
}

/// One line for the person at the terminal.
pub fn say(line: &str) {
    println!("verbund: {line}");
}

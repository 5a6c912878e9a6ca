//! One rank on this node, from its assignment to its end: a thread that loads, joins, serves and leaves.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use coordinator::control::{
    Command, ControlHandle, DeviceKind, Error as ControlError, Group, GroupHealth, ModelKind,
    Outcome, RankAssignment, ShardReport,
};
use coordinator::ids::{Epoch, GroupId, Rank};
use kernels::{Cpu, Isa, KvFormat};
use tokio_util::sync::CancellationToken;

use super::Shared;
use crate::collective::{Collective, GroupConfig, Interrupter, Local, Sealing, Shm, Tcp};
use crate::embed::Embedder;
use crate::engine::{Engine, EngineConfig};
use crate::file::ModelFile;
use crate::load::ShardNumbers;
use crate::model::{self, RankModel, follow};
use crate::plan::{RankCapacity, plan};
use crate::scheduler::Limits;
use crate::speculation::Speculation;
use crate::text;

/// How long a rank waits for the others of its group. Processes that run meet within a second; loading comes after.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Between two attempts to tell control something that it must know; each looks for a leader for some seconds itself.
const REPORT_RETRY: Duration = Duration::from_secs(1);

/// A rank that this node hosts.
pub(super) struct Hosted {
    pub group: GroupId,
    pub epoch: Epoch,
    pub rank: Rank,
    state: Mutex<State>,
    /// Ends what the rank does together with others, joining included.
    interrupter: Interrupter,
    left: CancellationToken,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

/// What the rank is doing.
enum State {
    Loading,
    /// Leader of a generating group.
    Engine(Arc<Engine>),
    Embedder(Arc<Embedder>),
    Following,
    /// Cannot go on in this epoch.
    Broken(String),
    /// Could not be loaded. Control is told so as a reason that people can read.
    Failed {
        why: String,
        /// The first attempt to tell control is over. Before, a heartbeat that calls the group broken could overtake the reason.
        told: bool,
    },
}

/// What a handler may use.
pub(super) enum Serving {
    Engine(Arc<Engine>),
    Embedder(Arc<Embedder>),
}

/// Why a rank's thread ended.
pub(super) enum End {
    /// It was told to leave.
    Left,
    /// Loading cannot succeed here, whoever the others are.
    Failed(String),
    /// This epoch is over; another may succeed.
    Broken(String),
}

impl From<model::Error> for End {
    fn from(error: model::Error) -> Self {
        match error {
            model::Error::Collective(error) => End::Broken(error.to_string()),
            error => End::Failed(error.to_string()),
        }
    }
}

impl From<crate::collective::Error> for End {
    fn from(error: crate::collective::Error) -> Self {
        End::Broken(error.to_string())
    }
}

fn failed(error: impl std::fmt::Display) -> End {
    End::Failed(error.to_string())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hosted {
    /// Starts the thread. It first waits for the end of `before`, so that two shards never share the memory of one.
    pub fn start(
        shared: Arc<Shared>,
        group: Group,
        assignment: RankAssignment,
        before: Option<Arc<Hosted>>,
    ) -> Arc<Self> {
        let host = Arc::new(Self {
            group: group.id,
            epoch: group.epoch,
            rank: assignment.rank,
            state: Mutex::new(State::Loading),
            interrupter: Interrupter::default(),
            left: CancellationToken::new(),
            thread: Mutex::new(None),
        });
        let (own, runtime) = (host.clone(), tokio::runtime::Handle::current());
        let body = move || {
            if let Some(before) = before {
                before.join();
            }
            own.run(&shared, &group, &assignment, &runtime);
        };
        match thread::Builder::new()
            .name(format!("rank-{}", host.rank))
            .spawn(body)
        {
            Ok(thread) => *lock(&host.thread) = Some(thread),
            Err(error) => {
                *lock(&host.state) = State::Broken(format!("no thread for the rank: {error}"))
            }
        }
        host
    }

    /// A rank that serves `engine` and has no thread.
    #[cfg(test)]
    pub fn serving_engine(group: GroupId, epoch: Epoch, engine: Engine) -> Arc<Self> {
        Arc::new(Self {
            group,
            epoch,
            rank: Rank(0),
            state: Mutex::new(State::Engine(Arc::new(engine))),
            interrupter: Interrupter::default(),
            left: CancellationToken::new(),
            thread: Mutex::new(None),
        })
    }

    /// Tells the rank to leave its group; returns at once.
    pub fn leave(&self) {
        self.left.cancel();
        self.interrupter.interrupt();
        // The engine's thread ends when its handle is gone.
        *lock(&self.state) = State::Broken("this node has left the group".into());
    }

    /// Waits until the thread has ended and its memory is free.
    pub fn join(&self) {
        let thread = lock(&self.thread).take();
        if thread.is_some_and(|t| t.join().is_err()) {
            tracing::error!(group = %self.group, epoch = %self.epoch, "the rank's thread panicked");
        }
    }

    pub fn health(&self) -> GroupHealth {
        let (active_requests, broken) = match &*lock(&self.state) {
            State::Loading | State::Following | State::Embedder(_) => (0, None),
            State::Engine(engine) => (engine.active(), engine.broken()),
            State::Broken(why) => (0, Some(why.clone())),
            State::Failed { why, told } => (0, told.then(|| why.clone())),
        };
        GroupHealth {
            group: self.group,
            epoch: self.epoch,
            rank: self.rank,
            active_requests,
            broken,
        }
    }

    /// What this rank serves now, or why it does not.
    pub fn serving(&self) -> Result<Serving, String> {
        match &*lock(&self.state) {
            State::Engine(engine) => Ok(Serving::Engine(engine.clone())),
            State::Embedder(embedder) => Ok(Serving::Embedder(embedder.clone())),
            State::Loading => Err("the model is loading".into()),
            State::Following => Err("this node is not the group's leader".into()),
            State::Broken(why) | State::Failed { why, .. } => Err(why.clone()),
        }
    }

    fn left(&self) -> bool {
        self.left.is_cancelled()
    }

    /// Nothing changes any more once the rank was told to leave.
    fn set_state(&self, state: State) -> Result<(), End> {
        let mut held = lock(&self.state);
        if self.left() {
            return Err(End::Left);
        }
        *held = state;
        Ok(())
    }

    fn run(
        &self,
        shared: &Shared,
        group: &Group,
        assignment: &RankAssignment,
        runtime: &tokio::runtime::Handle,
    ) {
        let tell = |command: Command| runtime.block_on(self.tell(&shared.control, command));
        let result = match group.kind {
            ModelKind::Generate => self.generate(shared, group, assignment, &tell),
            ModelKind::Embed => self.embed(shared, group, assignment, &tell),
        };
        let (group, epoch, rank) = (self.group, self.epoch, self.rank);
        match result {
            Ok(()) | Err(End::Left) => tracing::info!(%group, %epoch, %rank, "rank ended"),
            // What breaks while it leaves was broken off on purpose.
            Err(_) if self.left() => tracing::info!(%group, %epoch, %rank, "rank ended"),
            Err(End::Broken(why)) => {
                tracing::warn!(%group, %epoch, %rank, why, "the group is broken");
                let _ = self.set_state(State::Broken(why));
            }
            Err(End::Failed(why)) => {
                tracing::error!(%group, %epoch, %rank, why, "the rank cannot be loaded");
                let told = false;
                let _ = self.set_state(State::Failed {
                    why: why.clone(),
                    told,
                });
                let reason = why;
                // If nobody takes the reason, the heartbeats' word that the group is broken must do.
                let _ = tell(Command::RankFailed {
                    group,
                    epoch,
                    rank,
                    reason,
                });
            }
        }
    }

    /// Has control take `command`, however long that takes, unless the rank is told to leave.
    ///
    /// # Errors
    /// [`End::Left`], or [`End::Broken`] when the rules forbid it: then the control state has gone on without this rank.
    async fn tell(&self, control: &ControlHandle, command: Command) -> Result<Outcome, End> {
        loop {
            let answer = tokio::select! {
                answer = control.propose(command.clone()) => answer,
                () = self.left.cancelled() => return Err(End::Left),
            };
            if let State::Failed { told, .. } = &mut *lock(&self.state) {
                *told = true;
            }
            match answer {
                Ok(outcome) => return Ok(outcome),
                Err(error @ ControlError::Rejected(_)) => {
                    return Err(End::Broken(error.to_string()));
                }
                Err(error) => {
                    tracing::warn!(%error, group = %self.group, epoch = %self.epoch, "control could not be told; trying again");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(REPORT_RETRY) => {}
                () = self.left.cancelled() => return Err(End::Left),
            }
        }
    }

    fn generate(
        &self,
        shared: &Shared,
        group: &Group,
        assignment: &RankAssignment,
        tell: &dyn Fn(Command) -> Result<Outcome, End>,
    ) -> Result<(), End> {
        let file = ModelFile::open(&group.path).map_err(failed)?;
        let config = file.config().map_err(failed)?;
        let context = match group.context_tokens as usize {
            0 => config.context_tokens,
            asked => asked,
        };
        let capacity = |r: &RankAssignment| RankCapacity {
            memory_bytes: r.device.memory_bytes,
            read_bytes_per_s: r.device.read_bytes_per_s,
        };
        let capacities: Vec<RankCapacity> = group.ranks.iter().map(capacity).collect();
        let plan = |format| plan(&config, &capacities, context, format).map_err(failed);
        let own_format = shared.config.kv_format;
        // The leader plans and reads its tokenizer before anybody loads: what is wrong with them is told at once.
        let leads = self.rank == Rank(0);
        let text = if leads {
            plan(own_format)?;
            Some(text::load(&file).map_err(failed)?)
        } else {
            None
        };
        let device = device(shared, assignment)?;
        let mut collective = self.join_group(shared, group)?;
        let kv_format = agree(collective.as_mut(), own_format)?;
        if kv_format != own_format {
            let (group, epoch, rank) = (self.group, self.epoch, self.rank);
            tracing::warn!(%group, %epoch, %rank, %own_format, %kv_format, "the leader's worker.kv_format holds");
        }
        let plan = plan(kv_format)?;
        if self.left() {
            return Err(End::Left);
        }
        let mut rank = RankModel::load(&file, &plan, collective, device)?;
        let report = Command::RankReady {
            group: self.group,
            epoch: self.epoch,
            rank: self.rank,
            report: report(rank.numbers()),
        };
        let Some(text) = text else {
            self.set_state(State::Following)?;
            tell(report)?;
            return follow(&mut rank).map_err(|error| {
                if self.left() {
                    End::Left
                } else {
                    End::Broken(error.to_string())
                }
            });
        };
        let limits = Limits {
            max_sequences: shared.config.max_sequences,
            max_waiting: shared.config.max_waiting,
            step_rows: shared.config.step_rows,
            mixed_rows: shared.config.mixed_rows,
            context_tokens: plan.context_tokens,
            blocks: plan.kv_blocks,
            tenant_running: shared.config.tenant_running,
            tenant_waiting: shared.config.tenant_waiting,
        };
        let config = EngineConfig {
            model: group.model.clone(),
            limits,
        };
        let (engine, runner) = Engine::new(
            rank,
            Arc::new(text.tokenizer),
            text.template.map(Arc::new),
            config,
        );
        let runner = runner.with_weights(shared.config.tenant_weights.clone());
        // Ready before the first request asks; that one would only wait longer if there were no thread.
        let constrainer = engine.constrainer().clone();
        let _ = std::thread::Builder::new()
            .name("constrain".into())
            .spawn(move || constrainer.warm());
        let runner = match shared.config.speculate {
            true => runner.with_drafter(Box::new(Speculation::new(limits.step_rows))),
            false => runner,
        };
        let engine = Arc::new(engine);
        self.set_state(State::Engine(engine.clone()))?;
        // The runner ends when the last handle is gone; only the state's may keep it.
        let shared_state = Arc::downgrade(&engine);
        drop(engine);
        tell(report)?;
        runner.run();
        let why = shared_state
            .upgrade()
            .and_then(|e| e.broken())
            .unwrap_or_else(|| "the engine has ended".into());
        if self.left() {
            Err(End::Left)
        } else {
            Err(End::Broken(why))
        }
    }

    fn join_group(&self, shared: &Shared, group: &Group) -> Result<Box<dyn Collective>, End> {
        if group.ranks.len() == 1 {
            return Ok(Box::new(Local::with(self.interrupter.clone())));
        }
        let config = GroupConfig {
            group: self.group.0,
            epoch: self.epoch.0,
            rank: self.rank.0 as usize,
            peers: group.ranks.iter().map(|r| r.data_addr).collect(),
            key: group.key,
            wire: shared.config.wire,
            sealing: Sealing::Encrypted,
            overlap: true,
        };
        let interrupter = self.interrupter.clone();
        let tcp = Tcp::join_with(&shared.hub, config, JOIN_TIMEOUT, interrupter)?;
        Ok(Shm::upgrade(tcp)?)
    }

    fn embed(
        &self,
        shared: &Shared,
        group: &Group,
        assignment: &RankAssignment,
        tell: &dyn Fn(Command) -> Result<Outcome, End>,
    ) -> Result<(), End> {
        let file = ModelFile::open(&group.path).map_err(failed)?;
        let embedder = Embedder::load(&file, threads(shared, assignment)).map_err(failed)?;
        let (heads, all) = (embedder.heads() as u32, |n: usize| (0, n as u32));
        let report = ShardReport {
            query_heads: (0, heads),
            kv_heads: (0, heads),
            ffn_columns: all(embedder.ffn()),
            vocab_rows: all(embedder.vocabulary()),
            layers: embedder.layers() as u32,
            weight_bytes: embedder.weight_bytes(),
            mapped_bytes: embedder.weight_bytes(),
            kv_bytes: 0,
            context_tokens: embedder.context_tokens() as u32,
        };
        self.set_state(State::Embedder(Arc::new(embedder)))?;
        let ready = Command::RankReady {
            group: self.group,
            epoch: self.epoch,
            rank: self.rank,
            report,
        };
        tell(ready)?;
        Ok(())
    }
}

/// How the group keeps keys and values: as the leader's node says, since blocks and their number must be the same on every rank.
pub(super) fn agree(group: &mut dyn Collective, own: KvFormat) -> Result<KvFormat, End> {
    let mut name = own.name().as_bytes().to_vec();
    group.broadcast(&mut name)?;
    let name = String::from_utf8_lossy(&name);
    let unknown = |why| {
        End::Broken(format!(
            "the leader keeps keys and values in an unknown way ({why}); run the same version on all nodes"
        ))
    };
    format!("{name:.20}").parse().map_err(unknown)
}

fn threads(shared: &Shared, assignment: &RankAssignment) -> usize {
    match (shared.config.threads, assignment.device.threads as usize) {
        (0, 0) => thread::available_parallelism().map_or(1, |n| n.get()),
        (0, threads) | (threads, _) => threads,
    }
}

fn device(shared: &Shared, assignment: &RankAssignment) -> Result<Cpu, End> {
    match assignment.device.kind {
        DeviceKind::Cpu => Ok(Cpu::new(threads(shared, assignment), Isa::detect())),
        DeviceKind::Cuda => Err(End::Failed(format!(
            "device {} is a GPU, which this version cannot compute on; register the node with its processor",
            assignment.device.name
        ))),
    }
}

fn report(numbers: &ShardNumbers) -> ShardReport {
    let range = |r: &std::ops::Range<usize>| (r.start as u32, r.end as u32);
    ShardReport {
        query_heads: range(&numbers.query_heads),
        kv_heads: range(&numbers.kv_heads),
        ffn_columns: range(&numbers.ffn_columns),
        vocab_rows: range(&numbers.vocab_rows),
        layers: numbers.layers as u32,
        weight_bytes: numbers.weight_bytes,
        mapped_bytes: numbers.mapped_bytes,
        kv_bytes: numbers.kv_bytes,
        context_tokens: numbers.context_tokens as u32,
    }
}

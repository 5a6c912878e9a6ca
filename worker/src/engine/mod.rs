//! The engine: one thread on the leader that owns its rank's model, turns requests into steps and streams what comes.
//!
//! Belongs here: the life of a generation between its tokens in and its events out. How steps are chosen is
//! `scheduler`, how they are computed `model`, who may ask and how the stream travels `service`.

mod draw;
mod metrics;
mod prepare;
mod run;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coordinator::ids::TenantId;
use kernels::Device;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::client::{Event, GenerateRequest, InferError};
use crate::constrain::Constrainer;
use crate::model::{self, Candidates, RankModel, StepBatch};
use crate::scheduler::{Limits, SequenceId};
use crate::text::{ChatTemplate, Tokenizer};

pub use metrics::METRICS;
pub use prepare::{Prepared, prepare};

/// Requests between the callers and the engine's thread; it empties them at every step.
const INBOX: usize = 1024;
/// What a client that found the inbox full is told to wait: it is emptied at every step.
const RETRY_AFTER_S: u32 = 2;

/// What the engine needs of a group of ranks; [`RankModel`] is it.
pub trait Stepper: Send + 'static {
    /// Candidates for each of the batch's `logits_rows`.
    fn step(&mut self, batch: &StepBatch) -> Result<Vec<Candidates>, model::Error>;
    /// Called about once a second while there is nothing to do; notices dead followers.
    fn idle(&mut self) -> Result<(), model::Error>;
    /// Sends the followers home.
    fn stop(&mut self);
}

impl<D: Device> Stepper for RankModel<D>
where
    RankModel<D>: Send,
{
    fn step(&mut self, batch: &StepBatch) -> Result<Vec<Candidates>, model::Error> {
        Ok(RankModel::step(self, batch)?.unwrap_or_default())
    }

    fn idle(&mut self) -> Result<(), model::Error> {
        RankModel::idle(self)
    }

    fn stop(&mut self) {
        if let Err(error) = RankModel::stop(self) {
            tracing::debug!(%error, "followers could not be told to stop");
        }
    }
}

/// Guesses how sequences go on. What it guesses changes the speed of an answer, never its tokens: the engine draws each
/// token from the model's own logits and keeps a guess only where it is that token.
pub trait Drafter: Send + 'static {
    /// A sequence comes, with its whole prompt.
    fn begin(&mut self, id: SequenceId, prompt: &[u32]);
    /// The tokens that may follow now, for any of the sequences that decode in the next step; called before each. Nothing is fine.
    fn draft(&mut self, decoding: &[SequenceId]) -> Vec<(SequenceId, Vec<u32>)>;
    /// The sequence went on with `tokens`; `drafts` are the guesses that the step had taken up (some of the front of what was
    /// offered), of which the first `tokens.len() - 1` were right.
    fn took(&mut self, id: SequenceId, tokens: &[u32], drafts: &[u32]);
    /// A step of `rows` rows took `seconds`. Steps that compute any of a prompt are not told.
    fn stepped(&mut self, rows: usize, seconds: f64);
    /// The sequence is over.
    fn end(&mut self, id: SequenceId);
}

/// What an engine is given besides its ranks.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// The model's id, for metrics.
    pub model: String,
    pub limits: Limits,
}

/// A running engine. Dropping it ends its thread after the step under way; open streams then end with
/// [`InferError::Interrupted`].
pub struct Engine {
    inbox: SyncSender<run::Submission>,
    tokenizer: Arc<Tokenizer>,
    template: Option<Arc<ChatTemplate>>,
    constrainer: Arc<Constrainer>,
    shared: Arc<Shared>,
}

/// What the thread and its handle both see.
#[derive(Debug, Default)]
struct Shared {
    /// Generations taken and not yet ended.
    active: AtomicU32,
    /// Tenants whose prompts the thread shall forget before its next step.
    forget: Mutex<BTreeSet<TenantId>>,
    broken: Mutex<Option<String>>,
}

/// Counts a generation as active for as long as it is held, wherever it ends.
#[derive(Debug)]
struct Ticket(Arc<Shared>);

impl Ticket {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.active.fetch_add(1, Ordering::Relaxed);
        Self(shared.clone())
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    fn forget(&self) -> MutexGuard<'_, BTreeSet<TenantId>> {
        self.forget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn broken(&self) -> Option<String> {
        self.broken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set_broken(&self, why: String) {
        self.broken
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(why);
    }
}

/// The engine's work, to be run on one thread.
pub struct Runner<S> {
    stepper: S,
    drafter: Option<Box<dyn Drafter>>,
    weights: BTreeMap<TenantId, u32>,
    tokenizer: Arc<Tokenizer>,
    config: EngineConfig,
    submissions: std::sync::mpsc::Receiver<run::Submission>,
    shared: Arc<Shared>,
}

impl<S: Stepper> Runner<S> {
    /// Has `drafter` guess; without one every step gives one token a sequence.
    pub fn with_drafter(mut self, drafter: Box<dyn Drafter>) -> Self {
        self.drafter = Some(drafter);
        self
    }

    /// Gives tenants other shares than the 1 that everybody has.
    pub fn with_weights(mut self, weights: BTreeMap<TenantId, u32>) -> Self {
        self.weights = weights;
        self
    }

    /// Serves until the handle is dropped or the group breaks; [`Engine::broken`] tells why it ended.
    pub fn run(self) {
        run::run(self);
    }
}

impl Engine {
    /// Starts the engine on a thread of its own.
    ///
    /// # Errors
    /// The operating system gives no thread.
    pub fn start(
        stepper: impl Stepper,
        tokenizer: Arc<Tokenizer>,
        template: Option<Arc<ChatTemplate>>,
        config: EngineConfig,
    ) -> std::io::Result<Self> {
        let (engine, runner) = Self::new(stepper, tokenizer, template, config);
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(|| runner.run())?;
        Ok(engine)
    }

    /// An engine and what runs it, for a caller that has a thread already.
    pub fn new<S: Stepper>(
        stepper: S,
        tokenizer: Arc<Tokenizer>,
        template: Option<Arc<ChatTemplate>>,
        config: EngineConfig,
    ) -> (Self, Runner<S>) {
        let constrainer = Arc::new(Constrainer::new(tokenizer.clone()));
        let (inbox, submissions) = sync_channel(INBOX);
        let shared = Arc::new(Shared::default());
        let runner = Runner {
            stepper,
            drafter: None,
            weights: BTreeMap::new(),
            tokenizer: tokenizer.clone(),
            config,
            submissions,
            shared: shared.clone(),
        };
        (
            Self {
                inbox,
                tokenizer,
                template,
                constrainer,
                shared,
            },
            runner,
        )
    }

    /// Checks and tokenises a request, and queues it. Blocks for as long as tokenising takes: call it where blocking is
    /// allowed. Dropping the receiver cancels the generation within a step.
    ///
    /// # Errors
    /// What [`prepare`] finds, or [`InferError::Overloaded`], or [`InferError::Interrupted`] when the group is broken.
    pub fn generate(
        &self,
        request: &GenerateRequest,
    ) -> Result<UnboundedReceiver<Result<Event, InferError>>, InferError> {
        let now_ms = coordinator::clock::now_ms();
        self.submit(prepare(
            request,
            &self.tokenizer,
            self.template.as_deref(),
            &self.constrainer,
            now_ms,
        )?)
    }

    /// Queues a request whose prompt is in tokens already.
    ///
    /// # Errors
    /// [`InferError::Overloaded`], or [`InferError::Interrupted`] when the group is broken.
    pub fn submit(
        &self,
        prepared: Prepared,
    ) -> Result<UnboundedReceiver<Result<Event, InferError>>, InferError> {
        let (events, receiver) = unbounded_channel();
        let submission = run::Submission {
            prepared,
            events,
            ticket: Ticket::new(&self.shared),
        };
        match self.inbox.try_send(submission) {
            Ok(()) => Ok(receiver),
            Err(TrySendError::Full(_)) => Err(InferError::Overloaded {
                retry_after_s: RETRY_AFTER_S,
            }),
            Err(TrySendError::Disconnected(_)) => {
                let why = self
                    .broken()
                    .unwrap_or_else(|| "the engine has stopped".into());
                Err(InferError::Interrupted { why })
            }
        }
    }

    /// Has no request that comes after this find what was computed for a tenant before: the prompts of a tenant that is gone,
    /// or that may hold a document that was deleted.
    pub fn forget(&self, tenant: &TenantId) {
        self.shared.forget().insert(tenant.clone());
    }

    /// Generations under way or waiting.
    pub fn active(&self) -> u32 {
        self.shared.active.load(Ordering::Relaxed)
    }

    /// Why the group can take no more steps, once it cannot.
    pub fn broken(&self) -> Option<String> {
        self.shared.broken()
    }

    /// What compiles constraints for this model.
    pub fn constrainer(&self) -> &Arc<Constrainer> {
        &self.constrainer
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }
}

#[cfg(test)]
mod tests;

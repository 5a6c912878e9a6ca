//! Two engines over one model that take turns step by step, so that whatever else the machine does meets both alike: between
//! two answers one after the other it changes by more than what is to be measured.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kernels::{BLOCK_TOKENS, Cpu, Isa};
use tokio::sync::mpsc::UnboundedReceiver;
use worker::client::{Event, GenerateRequest, InferError};
use worker::collective::Local;
use worker::engine::{Drafter, Engine, EngineConfig, Stepper};
use worker::file::ModelFile;
use worker::model::{self, Candidates, RankModel, StepBatch};
use worker::plan::ShardPlan;
use worker::scheduler::{Limits, SequenceId};

/// Positions of the longest sequence.
const CONTEXT: usize = 1024;
/// Rows of a step at most.
pub const STEP_ROWS: usize = 256;
/// After so long without the other's step, one goes on alone: it must have died.
const PATIENCE: Duration = Duration::from_secs(60);

/// An answer.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub text: String,
    /// Tokens after the first, which belongs to the prompt.
    pub tokens: usize,
    /// What all steps after the prompt's took.
    pub seconds: f64,
    pub drafts_right: u64,
    pub drafts_wrong: u64,
}

/// The two engines; what they say can be dictated.
pub struct Pair {
    engines: [Option<Engine>; 2],
    threads: Vec<JoinHandle<()>>,
    turns: Arc<Turns>,
    script: Arc<Mutex<Vec<u32>>>,
}

impl Pair {
    /// Each engine with its drafter, if it has one.
    pub fn start(
        path: &Path,
        threads: usize,
        drafters: [Option<Box<dyn Drafter>>; 2],
    ) -> Result<Self> {
        let file = ModelFile::open(path)?;
        let mut plan = ShardPlan::whole(&file.config()?, CONTEXT)?;
        let blocks = plan.kv_blocks;
        plan.kv_blocks *= 2;
        let device = Cpu::new(threads, Isa::detect());
        let rank = RankModel::load(&file, &plan, Box::new(Local::default()), device)?;
        let side = worker::text::load(&file)?;
        let (tokenizer, template) = (Arc::new(side.tokenizer), side.template.map(Arc::new));
        let rank = Arc::new(Mutex::new(rank));
        let mut pair = Self {
            engines: [None, None],
            threads: Vec::new(),
            turns: Arc::default(),
            script: Arc::default(),
        };
        for (side, drafter) in drafters.into_iter().enumerate() {
            let stepper = Half {
                rank: rank.clone(),
                first_block: (side * blocks) as u32,
                script: pair.script.clone(),
            };
            let drafter = InTurns {
                side,
                turns: pair.turns.clone(),
                inner: drafter,
            };
            let limits = Limits {
                max_sequences: 1,
                max_waiting: 8,
                step_rows: STEP_ROWS,
                context_tokens: CONTEXT,
                blocks,
                ..Limits::default()
            };
            let config = EngineConfig {
                model: "bench".into(),
                limits,
            };
            let (engine, runner) =
                Engine::new(stepper, tokenizer.clone(), template.clone(), config);
            let runner = runner.with_drafter(Box::new(drafter));
            pair.engines[side] = Some(engine);
            pair.threads.push(
                std::thread::Builder::new()
                    .name("engine".into())
                    .spawn(move || runner.run())?,
            );
        }
        Ok(pair)
    }

    pub fn engine(&self, side: usize) -> Result<&Engine> {
        let engine = self.engines.get(side).and_then(Option::as_ref);
        engine.context("the engine has ended")
    }

    /// From now on sequences are made to be these tokens, prompt and answer; none: the model decides.
    pub fn dictate(&self, tokens: Vec<u32>) {
        *lock(&self.script) = tokens;
    }

    /// Has each engine answer its request. The engine `first` begins: let it be either as often as the other.
    pub fn answer(&self, requests: [&GenerateRequest; 2], first: usize) -> Result<[Answer; 2]> {
        self.turns.begin(first);
        let mut events = Vec::new();
        for (side, request) in requests.into_iter().enumerate() {
            events.push(self.engine(side)?.generate(request)?);
        }
        let mut answers = <[Answer; 2]>::default();
        for (answer, events) in answers.iter_mut().zip(&mut events) {
            let (text, tokens) = whole(events)?;
            (answer.text, answer.tokens) = (text, tokens.saturating_sub(1));
        }
        for (side, answer) in answers.iter_mut().enumerate() {
            answer.seconds = self.turns.seconds(side);
            [answer.drafts_right, answer.drafts_wrong] = self.turns.drafts(side);
        }
        Ok(answers)
    }
}

/// The answer with its tokens' number.
fn whole(events: &mut UnboundedReceiver<Result<Event, InferError>>) -> Result<(String, usize)> {
    let (mut text, mut count) = (String::new(), 0);
    while let Some(event) = events.blocking_recv() {
        match event? {
            Event::Text {
                text: piece,
                tokens,
                ..
            } => {
                text.push_str(piece.expose());
                count += tokens.len();
            }
            Event::Finished { .. } => return Ok((text, count)),
            Event::Started { .. } => {}
        }
    }
    bail!("the answer ended without its end")
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.engines = [None, None];
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whose step it is, and the time that each side took.
#[derive(Default)]
struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    turn: usize,
    sides: [Side; 2],
}

#[derive(Default, Clone, Copy)]
struct Side {
    phase: Phase,
    /// When its turn began, if it is on.
    since: Option<Instant>,
    seconds: f64,
    /// Drafts that came out right and wrong.
    drafts: [u64; 2],
}

#[derive(Default, Clone, Copy, PartialEq)]
enum Phase {
    #[default]
    Prompt,
    Decoding,
    Over,
}

impl State {
    /// The side's turn is over, if it was its.
    fn pass(&mut self, side: usize) {
        if let Some(since) = self.sides[side].since.take() {
            self.sides[side].seconds += since.elapsed().as_secs_f64();
            self.turn = 1 - side;
        }
    }

    fn may_go(&self, side: usize) -> bool {
        match self.sides[1 - side].phase {
            Phase::Prompt => false,
            Phase::Decoding => self.turn == side,
            Phase::Over => true,
        }
    }
}

impl Turns {
    /// For the next answer, that `first` begins.
    fn begin(&self, first: usize) {
        *lock(&self.state) = State {
            turn: first,
            ..State::default()
        };
    }

    /// Called before each step that decodes: lets the other do its own. No step begins before both prompts are done.
    fn step(&self, side: usize) {
        let mut state = lock(&self.state);
        state.pass(side);
        state.sides[side].phase = Phase::Decoding;
        self.changed.notify_all();
        let wait = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| !state.may_go(side));
        let (mut state, _) = wait.unwrap_or_else(PoisonError::into_inner);
        state.sides[side].since = Some(Instant::now());
    }

    fn over(&self, side: usize) {
        let mut state = lock(&self.state);
        state.pass(side);
        state.sides[side].phase = Phase::Over;
        self.changed.notify_all();
    }

    fn drafted(&self, side: usize, right: usize, all: usize) {
        let drafts = &mut lock(&self.state).sides[side].drafts;
        drafts[0] += right as u64;
        drafts[1] += all.saturating_sub(right) as u64;
    }

    fn drafts(&self, side: usize) -> [u64; 2] {
        lock(&self.state).sides[side].drafts
    }

    fn seconds(&self, side: usize) -> f64 {
        lock(&self.state).sides[side].seconds
    }
}

/// The model with one side's half of its blocks, made to say what the script says.
struct Half {
    rank: Arc<Mutex<RankModel<Cpu>>>,
    first_block: u32,
    script: Arc<Mutex<Vec<u32>>>,
}

impl Stepper for Half {
    fn step(&mut self, batch: &StepBatch) -> Result<Vec<Candidates>, model::Error> {
        let mut batch = batch.clone();
        for block in batch.spans.iter_mut().flat_map(|span| &mut span.blocks) {
            *block += self.first_block;
        }
        for slot in &mut batch.slots {
            *slot += self.first_block * BLOCK_TOKENS as u32;
        }
        let mut rows = lock(&self.rank).step(&batch)?.unwrap_or_default();
        let script = lock(&self.script);
        for (candidates, &row) in rows.iter_mut().zip(&batch.logits_rows) {
            // A draft may reach beyond the end of the script; nobody reads that row then.
            let next = batch.positions[row as usize] as usize + 1;
            if let Some(&token) = script.get(next) {
                candidates.top = vec![(token, candidates.log_sum_exp)];
            }
        }
        Ok(rows)
    }

    fn idle(&mut self) -> Result<(), model::Error> {
        lock(&self.rank).idle()
    }

    fn stop(&mut self) {
        Stepper::stop(&mut *lock(&self.rank));
    }
}

/// Waits for its side's turn before each step.
struct InTurns {
    side: usize,
    turns: Arc<Turns>,
    inner: Option<Box<dyn Drafter>>,
}

impl Drafter for InTurns {
    fn begin(&mut self, id: SequenceId, prompt: &[u32]) {
        if let Some(inner) = &mut self.inner {
            inner.begin(id, prompt);
        }
    }

    fn draft(&mut self, decoding: &[SequenceId]) -> Vec<(SequenceId, Vec<u32>)> {
        self.turns.step(self.side);
        match &mut self.inner {
            Some(inner) => inner.draft(decoding),
            None => Vec::new(),
        }
    }

    fn took(&mut self, id: SequenceId, tokens: &[u32], drafts: &[u32]) {
        let right = tokens.len().saturating_sub(1);
        self.turns.drafted(self.side, right, drafts.len());
        if let Some(inner) = &mut self.inner {
            inner.took(id, tokens, drafts);
        }
    }

    fn stepped(&mut self, rows: usize, seconds: f64) {
        if let Some(inner) = &mut self.inner {
            inner.stepped(rows, seconds);
        }
    }

    fn end(&mut self, id: SequenceId) {
        if let Some(inner) = &mut self.inner {
            inner.end(id);
        }
        self.turns.over(self.side);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_step_in_turn_and_the_longer_one_goes_on_alone() {
        let (turns, order) = (Turns::default(), Mutex::new(Vec::new()));
        turns.begin(1);
        std::thread::scope(|scope| {
            for (side, steps) in [(0, 3), (1, 5)] {
                let (turns, order) = (&turns, &order);
                scope.spawn(move || {
                    for _ in 0..steps {
                        turns.step(side);
                        lock(order).push(side);
                    }
                    turns.over(side);
                });
            }
        });
        assert_eq!(*lock(&order), [1, 0, 1, 0, 1, 0, 1, 1]);
        assert!(turns.seconds(0) > 0.0 && turns.seconds(1) > 0.0);
    }
}

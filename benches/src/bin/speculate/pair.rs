//! Two engines over one model, one that guesses and one that does not. They take turns step by step, so that whatever else the
//! machine does meets both alike: between two answers one after the other it changes by more than what is measured.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kernels::{Cpu, Isa};
use tokio::sync::mpsc::UnboundedReceiver;
use worker::client::{Event, GenerateRequest, InferError, Prompt};
use worker::collective::Local;
use worker::engine::{Drafter, Engine, EngineConfig, Stepper};
use worker::file::ModelFile;
use worker::kv::BLOCK_TOKENS;
use worker::model::{self, Candidates, RankModel, StepBatch};
use worker::plan::ShardPlan;
use worker::scheduler::{Limits, SequenceId};
use worker::speculation::Speculation;
use worker::text::Parse;

/// Positions of the longest sequence.
const CONTEXT: usize = 1024;
/// Rows of a step at most.
const STEP_ROWS: usize = 256;
/// After so long without the other's step, one goes on alone: it must have died.
const PATIENCE: Duration = Duration::from_secs(60);
/// The sides.
const PLAIN: usize = 0;
const SPECULATING: usize = 1;

/// One answer, taken both ways.
#[derive(Debug)]
pub struct Compared {
    pub text: String,
    /// Tokens whose time was taken: the first belongs to the prompt.
    pub tokens: usize,
    /// Seconds of all steps after the first token.
    pub plain: f64,
    pub speculating: f64,
    pub drafts_right: u64,
    pub drafts_wrong: u64,
}

/// The two engines, whose tokens can be dictated.
pub struct Pair {
    engines: [Option<Engine>; 2],
    threads: Vec<JoinHandle<()>>,
    turns: Arc<Turns>,
    drafts: Arc<Drafts>,
    /// The whole sequence as it shall be, empty if the model decides.
    script: Arc<Mutex<Vec<u32>>>,
}

impl Pair {
    pub fn start(path: &Path, threads: usize) -> Result<Self> {
        eprintln!("Loading {}", path.display());
        let file = ModelFile::open(path)?;
        let mut plan = ShardPlan::whole(&file.config()?, CONTEXT)?;
        let blocks = plan.kv_blocks;
        plan.kv_blocks *= 2;
        let device = Cpu::new(threads, Isa::detect());
        let rank = RankModel::load(&file, &plan, Box::new(Local::default()), device)?;
        let side = worker::text::load(&file)?;
        let (tokenizer, template) = (Arc::new(side.tokenizer), side.template.map(Arc::new));
        let rank = Arc::new(Mutex::new(rank));
        let (turns, drafts) = (Arc::<Turns>::default(), Arc::<Drafts>::default());
        let script = Arc::<Mutex<Vec<u32>>>::default();
        let limits = Limits {
            max_sequences: 1,
            max_waiting: 1,
            step_rows: STEP_ROWS,
            context_tokens: CONTEXT,
            blocks,
            ..Limits::default()
        };
        let mut pair = Self {
            engines: [None, None],
            threads: Vec::new(),
            turns: turns.clone(),
            drafts: drafts.clone(),
            script: script.clone(),
        };
        for side in [PLAIN, SPECULATING] {
            let stepper = Dictated {
                rank: rank.clone(),
                first_block: (side * blocks) as u32,
                script: script.clone(),
            };
            let drafter = InTurns {
                side,
                turns: turns.clone(),
                inner: (side == SPECULATING).then(|| Speculation::new(STEP_ROWS)),
                drafts: drafts.clone(),
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

    /// Runs the request both ways; with an `answer`, the model is made to give it. `turn` decides who begins: let it be even
    /// as often as odd.
    pub fn compare(
        &self,
        request: &serde_json::Value,
        answer: Option<&str>,
        turn: usize,
    ) -> Result<Compared> {
        let mut request: GenerateRequest = serde_json::from_value(request.clone())?;
        let mut script = Vec::new();
        if let Some(answer) = answer {
            let Prompt::Text(prompt) = &request.prompt else {
                bail!("only what continues a text can be dictated");
            };
            let tokenizer = self.engine(PLAIN)?.tokenizer();
            script = tokenizer.encode_prompt(prompt.expose())?;
            let answer = tokenizer.encode(answer, Parse::Plain)?;
            let most = request.max_tokens.map_or(usize::MAX, |most| most as usize);
            let answer = &answer[..answer.len().min(most)];
            request.max_tokens = Some(answer.len() as u32);
            script.extend_from_slice(answer);
        }
        *lock(&self.script) = script;
        self.turns.begin(turn % 2);
        let before = self.drafts.counts();
        let mut events = Vec::new();
        for side in [PLAIN, SPECULATING] {
            events.push(self.engine(side)?.generate(&request)?);
        }
        let mut texts = Vec::new();
        for events in &mut events {
            texts.push(whole(events)?);
        }
        if texts[PLAIN] != texts[SPECULATING] {
            bail!("speculation changed an answer: {texts:?}");
        }
        let (text, tokens) = texts.swap_remove(PLAIN);
        let [plain, speculating] = self.turns.seconds();
        let after = self.drafts.counts();
        Ok(Compared {
            text,
            tokens: tokens.saturating_sub(1),
            plain,
            speculating,
            drafts_right: after[0] - before[0],
            drafts_wrong: after[1] - before[1],
        })
    }

    fn engine(&self, side: usize) -> Result<&Engine> {
        self.engines[side].as_ref().context("the engine has ended")
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

    fn seconds(&self) -> [f64; 2] {
        lock(&self.state).sides.map(|side| side.seconds)
    }
}

/// Drafts that came out right and wrong.
#[derive(Default)]
struct Drafts([AtomicU64; 2]);

impl Drafts {
    fn counts(&self) -> [u64; 2] {
        [0, 1].map(|i| self.0[i].load(Ordering::Relaxed))
    }

    fn add(&self, right: usize, wrong: usize) {
        self.0[0].fetch_add(right as u64, Ordering::Relaxed);
        self.0[1].fetch_add(wrong as u64, Ordering::Relaxed);
    }
}

/// The model with one side's half of its blocks, made to say what the script says. One sequence at a time.
struct Dictated {
    rank: Arc<Mutex<RankModel<Cpu>>>,
    first_block: u32,
    script: Arc<Mutex<Vec<u32>>>,
}

impl Stepper for Dictated {
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

/// Waits for its side's turn before each step; on the speculating side it guesses besides.
struct InTurns {
    side: usize,
    turns: Arc<Turns>,
    inner: Option<Speculation>,
    drafts: Arc<Drafts>,
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
        self.drafts.add(right, drafts.len().saturating_sub(right));
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

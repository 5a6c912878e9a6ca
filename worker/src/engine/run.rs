//! The engine's thread.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::Duration;

use coordinator::Redacted;
use coordinator::clock::{Instant, monotonic};
use tokio::sync::mpsc::UnboundedSender;

use super::draw::{draw, logprob, wants};
use super::{Drafter, METRICS, Prepared, Runner, Shared, Stepper, Ticket};
use crate::client::{Event, FinishReason, InferError};
use crate::constrain::{Exceeded, Matcher};
use crate::model::{self, Candidates};
use crate::sampling::Sampler;
use crate::scheduler::{Planned, Refused, Request, Sample, Scheduler, SequenceId};
use crate::text::{Detokenizer, StopMatcher, StopOutcome, Tokenizer};

/// How often an idle engine makes sure that its followers live, and looks whether its handle is gone.
const IDLE: Duration = Duration::from_millis(500);

/// A request on its way to the thread.
pub(super) struct Submission {
    pub prepared: Prepared,
    pub events: UnboundedSender<Result<Event, InferError>>,
    pub ticket: Ticket,
}

/// A generation under way.
struct Generation {
    events: UnboundedSender<Result<Event, InferError>>,
    sampler: Sampler,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    matcher: Option<Matcher>,
    logprobs: Option<u8>,
    prompt_tokens: u32,
    cached_tokens: u32,
    completion_tokens: u32,
    timeout_ms: Option<u32>,
    /// Tokens after which the answer ends.
    max_tokens: u32,
    _ticket: Ticket,
}

struct EngineLoop<S> {
    stepper: S,
    drafter: Option<Box<dyn Drafter>>,
    tokenizer: Arc<Tokenizer>,
    scheduler: Scheduler,
    generations: BTreeMap<SequenceId, Generation>,
    next_id: u64,
    model: String,
    shared: Arc<Shared>,
    /// The scheduler's time begins here.
    began: Instant,
    told: Told,
}

/// What the counters were told so far.
#[derive(Default)]
struct Told {
    preemptions: u64,
    evictions: u64,
}

/// Serves until the handle is dropped or the group breaks.
pub(super) fn run<S: Stepper>(runner: Runner<S>) {
    let Runner {
        stepper,
        drafter,
        weights,
        tokenizer,
        config,
        submissions,
        shared,
    } = runner;
    let _guard = DeathNotice(shared.clone());
    let mut scheduler = Scheduler::new(config.limits);
    for (tenant, weight) in &weights {
        scheduler.set_weight(tenant, *weight);
    }
    let mut engine = EngineLoop {
        stepper,
        drafter,
        tokenizer,
        scheduler,
        generations: BTreeMap::new(),
        next_id: 0,
        model: config.model,
        shared,
        began: monotonic(),
        told: Told::default(),
    };
    let why = engine.serve(&submissions);
    engine.shared.set_broken(why.clone());
    engine.stepper.stop();
    for (_, generation) in std::mem::take(&mut engine.generations) {
        engine.fail(generation, InferError::Interrupted { why: why.clone() });
    }
    // What was queued while the thread ended must not be left without an answer.
    while let Ok(submission) = submissions.try_recv() {
        let _ = submission
            .events
            .send(Err(InferError::Interrupted { why: why.clone() }));
    }
    engine.tell_metrics();
}

/// Tells the handle when the thread ends, also by a panic.
struct DeathNotice(Arc<Shared>);

impl Drop for DeathNotice {
    fn drop(&mut self) {
        self.0.set_broken("the engine's thread has ended".into());
    }
}

fn refusal(refused: Refused) -> InferError {
    match refused {
        Refused::TooLong { tokens, context } => InferError::PromptTooLong { tokens, context },
        Refused::Empty => InferError::invalid("prompt", "must not be empty".into()),
        Refused::Full { retry_after_s } => InferError::Overloaded { retry_after_s },
    }
}

impl<S: Stepper> EngineLoop<S> {
    /// Returns why it ended.
    fn serve(&mut self, submissions: &Receiver<Submission>) -> String {
        const STOPPED: &str = "the engine was stopped";
        loop {
            if self.generations.is_empty() {
                match submissions.recv_timeout(IDLE) {
                    Ok(submission) => self.admit(submission),
                    Err(RecvTimeoutError::Disconnected) => return STOPPED.into(),
                    Err(RecvTimeoutError::Timeout) => {
                        if let Err(error) = self.stepper.idle() {
                            return error.to_string();
                        }
                    }
                }
            }
            loop {
                match submissions.try_recv() {
                    Ok(submission) => self.admit(submission),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return STOPPED.into(),
                }
            }
            self.drop_cancelled();
            self.drop_expired();
            self.forget_tenants();
            self.draft();
            if let Some(planned) = self.scheduler.plan(self.now_ms())
                && let Err(why) = self.step(planned)
            {
                return why;
            }
            // Also when there was nothing to compute: the last generation may have gone away.
            self.tell_metrics();
        }
    }

    fn admit(&mut self, submission: Submission) {
        // Who came after the order begins anew.
        self.forget_tenants();
        let Submission {
            prepared,
            events,
            ticket,
        } = submission;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let prompt_tokens = prepared.tokens.len();
        let sampler = Sampler::new(&prepared.sampling, prepared.seed, &prepared.tokens);
        let capacity = self.scheduler.capacity_tokens();
        let generation = Generation {
            sampler,
            detokenizer: Detokenizer::new(),
            stop: StopMatcher::new(&prepared.stop),
            matcher: prepared.matcher,
            logprobs: prepared.logprobs,
            prompt_tokens: prompt_tokens as u32,
            cached_tokens: 0,
            completion_tokens: 0,
            timeout_ms: prepared.timeout_ms,
            max_tokens: prepared
                .max_tokens
                .unwrap_or(u32::MAX)
                .min(capacity.saturating_sub(prompt_tokens) as u32),
            events,
            _ticket: ticket,
        };
        if let Some(drafter) = &mut self.drafter {
            drafter.begin(id, &prepared.tokens);
        }
        let now_ms = self.now_ms();
        let request = Request {
            tenant: prepared.tenant,
            class: prepared.class,
            tokens: prepared.tokens,
            deadline_ms: prepared.timeout_ms.map(|t| now_ms + u64::from(t)),
        };
        match self.scheduler.submit(id, request, now_ms) {
            Ok(()) => {
                let _ = generation.events.send(Ok(Event::Started {
                    prompt_tokens: prompt_tokens as u32,
                }));
                if let Some(text) = prepared.echo {
                    let _ = generation.events.send(Ok(Event::Text {
                        text,
                        tokens: Vec::new(),
                        logprobs: Vec::new(),
                    }));
                }
                self.generations.insert(id, generation);
            }
            Err(refused) => {
                self.forget(id);
                self.fail(generation, refusal(refused));
            }
        }
    }

    /// Has the drafter guess for every sequence that decodes.
    fn draft(&mut self) {
        let Some(drafter) = &mut self.drafter else {
            return;
        };
        let decoding: Vec<SequenceId> = self.scheduler.decoding().collect();
        if decoding.is_empty() {
            return;
        }
        for (id, drafts) in drafter.draft(&decoding) {
            self.scheduler.draft(id, &drafts);
        }
    }

    fn forget_tenants(&mut self) {
        for tenant in std::mem::take(&mut *self.shared.forget()) {
            self.scheduler.forget(&tenant);
        }
    }

    fn forget(&mut self, id: SequenceId) {
        if let Some(drafter) = &mut self.drafter {
            drafter.end(id);
        }
    }

    fn drop_cancelled(&mut self) {
        let gone: Vec<SequenceId> = self
            .generations
            .iter()
            .filter(|(_, g)| g.events.is_closed())
            .map(|(&id, _)| id)
            .collect();
        for id in gone {
            self.finish(id, FinishReason::Cancelled);
        }
    }

    /// Ends whatever took longer than its request allowed.
    fn drop_expired(&mut self) {
        for id in self.scheduler.expired(self.now_ms()) {
            if let Some(generation) = self.take(id) {
                let timeout_ms = generation.timeout_ms.unwrap_or_default();
                self.fail(generation, InferError::TimedOut { timeout_ms });
            }
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// `Err` when the group is broken.
    fn step(&mut self, mut planned: Planned) -> Result<(), String> {
        self.want(&mut planned);
        for admitted in &planned.admitted {
            if let Some(generation) = self.generations.get_mut(&admitted.id) {
                generation.cached_tokens = admitted.cached_tokens as u32;
            }
            if let Some(metrics) = METRICS.as_ref() {
                metrics
                    .queue_seconds
                    .with_label_values(&[self.model.as_str()])
                    .observe(admitted.waited_ms as f64 / 1000.0);
            }
        }
        let started = monotonic();
        let result = self.stepper.step(&planned.batch);
        let rows = planned.batch.tokens.len();
        if let Some(drafter) = &mut self.drafter
            && rows == planned.samples.iter().map(Sample::rows).sum::<usize>()
        {
            drafter.stepped(rows, started.elapsed().as_secs_f64());
        }
        if let Some(metrics) = METRICS.as_ref() {
            let model = [self.model.as_str()];
            metrics
                .step_seconds
                .with_label_values(&model)
                .observe(started.elapsed().as_secs_f64());
            metrics
                .step_rows
                .with_label_values(&model)
                .observe(planned.batch.tokens.len() as f64);
            metrics
                .tokens
                .with_label_values(&[self.model.as_str(), "prompt"])
                .inc_by(planned.prompt_rows as u64);
        }
        match result {
            Ok(candidates) if candidates.len() == planned.batch.logits_rows.len() => {
                self.scheduler.done();
                let mut rest = candidates.as_slice();
                for sample in &planned.samples {
                    let (rows, others) = rest.split_at(sample.rows());
                    rest = others;
                    self.sample_rows(sample, rows);
                }
                Ok(())
            }
            Ok(candidates) => Err(format!(
                "a step gave {} rows of logits, expected {}",
                candidates.len(),
                planned.batch.logits_rows.len()
            )),
            // Nothing was computed and the ranks are in step: only the sequences of this step are lost.
            Err(error @ (model::Error::Step { .. } | model::Error::NotFinite)) => {
                tracing::error!(%error, rows = planned.batch.tokens.len(), "a step failed");
                let why = error.to_string();
                for id in planned.owners {
                    if let Some(generation) = self.take(id) {
                        self.fail(generation, InferError::Internal { why: why.clone() });
                    }
                }
                Ok(())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Says what the step's rows must bring for their draws. A sequence whose constraint cannot be followed ends here; its
    /// rows are computed for nobody.
    fn want(&mut self, planned: &mut Planned) {
        let mut row = 0;
        for sample in &planned.samples {
            let first = row;
            row += sample.rows();
            let Some(generation) = self.generations.get_mut(&sample.id) else {
                continue;
            };
            let (sampler, matcher) = (&generation.sampler, generation.matcher.as_mut());
            let batch = &mut planned.batch;
            if let Err(exceeded) = wants(sampler, matcher, first, &sample.drafts, &mut batch.wants)
            {
                self.exceed(sample.id, exceeded);
            }
        }
    }

    fn exceed(&mut self, id: SequenceId, exceeded: Exceeded) {
        let Exceeded { param, why } = exceeded;
        if let Some(generation) = self.take(id) {
            self.fail(generation, InferError::Invalid { param, why });
        }
    }

    fn is_held(&self, id: SequenceId) -> bool {
        let matcher = self.generations.get(&id).and_then(|g| g.matcher.as_ref());
        matcher.is_some_and(Matcher::is_held)
    }

    /// Takes a sequence's tokens from its rows: each as plain decoding would, the next row only if its draft was right.
    fn sample_rows(&mut self, sample: &Sample, rows: &[Candidates]) {
        let id = sample.id;
        let Some(first) = self.scheduler.length(id) else {
            return;
        };
        let held = self.is_held(id);
        let mut taken = Vec::with_capacity(rows.len());
        for (i, candidates) in rows.iter().enumerate() {
            let Some(token) = self.sample(id, first + i, candidates) else {
                return;
            };
            taken.push(token);
            // A call that has just begun decides the next token, for which the row was not masked.
            if sample.drafts.get(i) != Some(&token) || held != self.is_held(id) {
                break;
            }
        }
        if let Some(drafter) = &mut self.drafter {
            drafter.took(id, &taken, &sample.drafts);
            self.count_drafts(taken.len() - 1, sample.drafts.len());
        }
        self.scheduler.accept(id, &taken);
    }

    fn count_drafts(&self, right: usize, all: usize) {
        let Some(metrics) = METRICS.as_ref().filter(|_| all > 0) else {
            return;
        };
        for (outcome, drafts) in [("right", right), ("wrong", all - right)] {
            metrics
                .drafts
                .with_label_values(&[self.model.as_str(), outcome])
                .inc_by(drafts as u64);
        }
    }

    /// Draws the token at `position` and tells it. `None` when the generation is over.
    fn sample(&mut self, id: SequenceId, position: usize, candidates: &Candidates) -> Option<u32> {
        let generation = self.generations.get_mut(&id)?;
        let token = draw(&generation.sampler, candidates, position);
        let Some(token) = token else {
            if let Some(matcher) = &generation.matcher
                && candidates.log_sum_exp.is_finite()
            {
                let exceeded = matcher.nothing_follows();
                self.exceed(id, exceeded);
                return None;
            }
            let why = model::Error::NotFinite.to_string();
            tracing::error!(%why, position, "a sequence failed");
            if let Some(generation) = self.take(id) {
                self.fail(generation, InferError::Internal { why });
            }
            return None;
        };
        if self.tokenizer.is_end(token) {
            self.finish(id, FinishReason::Stop);
            return None;
        }
        generation.completion_tokens += 1;
        generation.sampler.accept(token);
        let logprobs = generation
            .logprobs
            .map(|others| logprob(&self.tokenizer, candidates, token, others));
        let mut over = false;
        if let Some(matcher) = &mut generation.matcher {
            if let Err(exceeded) = matcher.accept(token) {
                self.exceed(id, exceeded);
                return None;
            }
            over = matcher.is_over();
        }
        let text = generation
            .detokenizer
            .push(self.tokenizer.token_bytes(token));
        let (text, stopped) = match generation.stop.push(&text) {
            StopOutcome::Continue(text) => (text, false),
            StopOutcome::Stopped(text) => (text, true),
        };
        let _ = generation.events.send(Ok(Event::Text {
            text: Redacted::new(text),
            tokens: vec![token],
            logprobs: logprobs.into_iter().collect(),
        }));
        let ended = generation.completion_tokens >= generation.max_tokens;
        if stopped {
            generation.stop = StopMatcher::new(&[]);
            generation.detokenizer = Detokenizer::new();
        }
        if stopped || over {
            self.finish(id, FinishReason::Stop);
        } else if ended {
            self.finish(id, FinishReason::Length);
        } else {
            return Some(token);
        }
        None
    }

    fn take(&mut self, id: SequenceId) -> Option<Generation> {
        self.scheduler.remove(id);
        self.forget(id);
        self.generations.remove(&id)
    }

    /// Ends a generation with what its detokenizer and stop matcher still hold.
    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        let Some(mut generation) = self.take(id) else {
            return;
        };
        let last = generation.detokenizer.finish();
        let (mut rest, reason) = match generation.stop.push(&last) {
            StopOutcome::Continue(text) => (text, reason),
            StopOutcome::Stopped(text) => (text, FinishReason::Stop),
        };
        rest.push_str(&generation.stop.finish());
        if !rest.is_empty() {
            let _ = generation.events.send(Ok(Event::Text {
                text: Redacted::new(rest),
                tokens: Vec::new(),
                logprobs: Vec::new(),
            }));
        }
        let completion_tokens = generation.completion_tokens;
        let _ = generation.events.send(Ok(Event::Finished {
            reason,
            prompt_tokens: generation.prompt_tokens,
            cached_tokens: generation.cached_tokens,
            completion_tokens,
        }));
        let code = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        };
        self.ended(code, completion_tokens);
    }

    fn fail(&self, generation: Generation, error: InferError) {
        let code = match &error {
            InferError::PromptTooLong { .. } | InferError::Invalid { .. } => "invalid",
            InferError::Overloaded { .. } => "overloaded",
            InferError::TimedOut { .. } => "timeout",
            InferError::Interrupted { .. } => "interrupted",
            _ => "internal",
        };
        let _ = generation.events.send(Err(error));
        self.ended(code, generation.completion_tokens);
    }

    fn ended(&self, code: &str, completion_tokens: u32) {
        if let Some(metrics) = METRICS.as_ref() {
            metrics
                .requests
                .with_label_values(&[self.model.as_str(), code])
                .inc();
            let completion = u64::from(completion_tokens);
            metrics
                .tokens
                .with_label_values(&[self.model.as_str(), "completion"])
                .inc_by(completion);
        }
    }

    fn tell_metrics(&mut self) {
        let Some(metrics) = METRICS.as_ref() else {
            return;
        };
        let set = |family: &prometheus::IntGaugeVec, state: &str, value: usize| {
            family
                .with_label_values(&[self.model.as_str(), state])
                .set(value as i64);
        };
        set(&metrics.sequences, "running", self.scheduler.running());
        set(&metrics.sequences, "waiting", self.scheduler.waiting());
        set(&metrics.kv_blocks, "used", self.scheduler.used_blocks());
        set(&metrics.kv_blocks, "cached", self.scheduler.cached_blocks());
        set(&metrics.kv_blocks, "total", self.scheduler.total_blocks());
        let preemptions = self.scheduler.preemptions();
        metrics
            .preemptions
            .with_label_values(&[self.model.as_str()])
            .inc_by(preemptions - self.told.preemptions);
        self.told.preemptions = preemptions;
        let evictions = self.scheduler.evictions();
        metrics
            .evictions
            .with_label_values(&[self.model.as_str()])
            .inc_by(evictions - self.told.evictions);
        self.told.evictions = evictions;
        for (tenant, served) in self.scheduler.take_served() {
            for (kind, tokens) in [
                ("prompt", served.prompt),
                ("cached", served.cached),
                ("completion", served.answer),
            ] {
                metrics
                    .tenant_tokens
                    .with_label_values(&[self.model.as_str(), tenant.as_str(), kind])
                    .inc_by(tokens);
            }
        }
    }
}

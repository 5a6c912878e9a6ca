//! The life of generations, against ranks that do what a script says, and once against a real small model.

mod constrained;
mod drafting;
mod failing;
mod preparing;
mod schedules;
mod serving;
mod speculating;

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use coordinator::Redacted;
use coordinator::ids::TenantId;
use kernels::{BLOCK_TOKENS, Cpu, Isa, KvFormat};

use super::*;
use crate::client::{Class, FinishReason, Prompt, Sampling};
use crate::collective::{self, Local};
use crate::file::ModelFile;
use crate::plan::ShardPlan;
use crate::text::{TokenKind, Vocabulary};

/// Far more than anything here takes; a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(30);
const END: u32 = 2;
/// Letters a to z are the tokens from here.
const A: u32 = 3;
/// Tokens of more than a letter, and the two bytes of ä.
const SPACE: u32 = A + 26;
const ST: u32 = SPACE + 1;
const OP: u32 = SPACE + 2;
const BYTE_C3: u32 = SPACE + 3;
const BYTE_A4: u32 = SPACE + 4;

/// A few tokens whose texts are known; `ends` says whether `</s>` ends an answer.
fn vocabulary(ends: bool) -> Vocabulary {
    let mut tokens: Vec<String> = ["<unk>", "<s>", if ends { "</s>" } else { "<x>" }]
        .map(str::to_owned)
        .into();
    let mut kinds = vec![TokenKind::Unknown, TokenKind::Control, TokenKind::Control];
    tokens.extend(('a'..='z').map(String::from));
    tokens.extend(["\u{2581}", "ST", "OP"].map(str::to_owned));
    kinds.resize(tokens.len(), TokenKind::Normal);
    tokens.extend(["<0xC3>", "<0xA4>"].map(str::to_owned));
    kinds.resize(tokens.len(), TokenKind::Byte);
    Vocabulary {
        model: "llama".into(),
        scores: vec![0.0; tokens.len()],
        tokens,
        kinds,
        bos: Some(1),
        eos: ends.then_some(END),
        unknown: Some(0),
        add_space_prefix: Some(false),
        ..Vocabulary::default()
    }
}

fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_vocabulary(&vocabulary(true)).unwrap())
}

fn limits() -> Limits {
    Limits {
        max_sequences: 4,
        max_waiting: 512,
        step_rows: 64,
        context_tokens: 128,
        blocks: 16,
        ..Limits::default()
    }
}

fn prompt(len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| A + i % 26).collect()
}

fn prepared(tokens: Vec<u32>) -> Prepared {
    Prepared {
        tenant: TenantId::new("t1").unwrap(),
        tokens,
        sampling: Sampling::greedy(),
        seed: 7,
        stop: Vec::new(),
        max_tokens: None,
        echo: None,
        matcher: None,
        logprobs: None,
        class: Class::Interactive,
        timeout_ms: None,
    }
}

fn start(stepper: impl Stepper, limits: Limits) -> Engine {
    let config = EngineConfig {
        model: "test".into(),
        limits,
    };
    Engine::start(stepper, tokenizer(), None, config).unwrap()
}

/// What the ranks give for a row after which `token` comes.
fn certain(token: u32) -> Candidates {
    Candidates {
        top: vec![(token, 1.0)],
        log_sum_exp: 1.0,
        full: None,
    }
}

/// What the ranks give for a row that is not finite.
fn not_finite() -> Candidates {
    Candidates {
        top: Vec::new(),
        log_sum_exp: f32::NAN,
        full: None,
    }
}

fn lost() -> model::Error {
    let why = "connection closed".into();
    collective::Error::PeerLost { rank: 1, why }.into()
}

type Answer = Result<Vec<Candidates>, model::Error>;

/// Ranks that compute each row by a function of its token and position.
struct Scripted<F>(F);

impl<F: FnMut(u32, u32) -> Candidates + Send + 'static> Stepper for Scripted<F> {
    fn step(&mut self, batch: &StepBatch) -> Answer {
        let row = |&row: &u32| (self.0)(batch.tokens[row as usize], batch.positions[row as usize]);
        Ok(batch.logits_rows.iter().map(row).collect())
    }

    fn idle(&mut self) -> Result<(), model::Error> {
        Ok(())
    }

    fn stop(&mut self) {}
}

/// Ranks that show the test each step and wait for its answer.
struct Gated {
    steps: Sender<StepBatch>,
    answers: Receiver<Answer>,
    stopped: Sender<()>,
}

impl Stepper for Gated {
    fn step(&mut self, batch: &StepBatch) -> Answer {
        let _ = self.steps.send(batch.clone());
        self.answers.recv_timeout(PATIENCE).unwrap_or(Err(lost()))
    }

    fn idle(&mut self) -> Result<(), model::Error> {
        Ok(())
    }

    fn stop(&mut self) {
        let _ = self.stopped.send(());
    }
}

/// The test's end of [`Gated`].
struct Gate {
    steps: Receiver<StepBatch>,
    answers: Sender<Answer>,
    stopped: Receiver<()>,
}

impl Gate {
    /// The next step; it computes until it is answered.
    fn step(&self) -> StepBatch {
        self.steps.recv_timeout(PATIENCE).unwrap()
    }

    fn answer(&self, tokens: &[u32]) {
        self.give(Ok(tokens.iter().map(|&t| certain(t)).collect()));
    }

    fn give(&self, answer: Answer) {
        self.answers.send(answer).unwrap();
    }
}

fn gated() -> (Gated, Gate) {
    let (steps, seen) = channel();
    let (answers, answered) = channel();
    let (stopped, stop) = channel();
    let ranks = Gated {
        steps,
        answers: answered,
        stopped,
    };
    let gate = Gate {
        steps: seen,
        answers,
        stopped: stop,
    };
    (ranks, gate)
}

type Stream = UnboundedReceiver<Result<Event, InferError>>;

/// Waits for `condition`, which another thread brings about.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "never came: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A whole stream.
#[derive(Debug, PartialEq)]
struct Outcome {
    text: String,
    tokens: Vec<u32>,
    /// Why it ended, with prompt and completion tokens.
    end: Result<(FinishReason, u32, u32), InferError>,
}

fn read(mut stream: Stream) -> Outcome {
    let (mut text, mut tokens, mut end) = (String::new(), Vec::new(), None);
    let mut started = None;
    eventually("the end of the stream", || {
        while let Ok(event) = stream.try_recv() {
            assert_eq!(end, None, "nothing comes after the end");
            match event {
                Ok(Event::Started { prompt_tokens }) => {
                    assert_eq!(started.replace(prompt_tokens), None);
                }
                Ok(Event::Text {
                    text: t, tokens: n, ..
                }) => {
                    assert!(started.is_some(), "text before the start");
                    text += t.expose();
                    tokens.extend(n);
                }
                Ok(Event::Finished {
                    reason,
                    prompt_tokens,
                    cached_tokens,
                    completion_tokens,
                }) => {
                    assert!(cached_tokens < prompt_tokens);
                    assert_eq!(started, Some(prompt_tokens));
                    end = Some(Ok((reason, prompt_tokens, completion_tokens)));
                }
                Err(error) => end = Some(Err(error)),
            }
        }
        stream.is_closed() && stream.is_empty()
    });
    Outcome {
        text,
        tokens,
        end: end.expect("a stream ends with a reason"),
    }
}

fn assert_idle(engine: &Engine) {
    eventually("no active generation", || engine.active() == 0);
}

#[test]
fn sequences_join_and_leave_between_steps() {
    let (ranks, gate) = gated();
    let engine = start(ranks, limits());
    let first = engine.submit(prepared(prompt(2))).unwrap();
    let step = gate.step();
    assert_eq!(step.tokens, prompt(2));
    assert_eq!(step.logits_rows, [1]);
    // Comes while the step is computed, and is in the next.
    let second = engine.submit(prepared(prompt(3))).unwrap();
    assert_eq!(engine.active(), 2);
    gate.answer(&[A + 10]);
    let step = gate.step();
    assert_eq!(step.tokens, [vec![A + 10], prompt(3)].concat());
    assert_eq!(step.positions, [2, 0, 1, 2]);
    assert_eq!(step.logits_rows, [0, 3]);
    // The first ends; the second goes on alone.
    gate.answer(&[END, A + 11]);
    let step = gate.step();
    assert_eq!((step.tokens, step.positions), (vec![A + 11], vec![3]));
    gate.answer(&[END]);
    let first = read(first);
    assert_eq!((first.text.as_str(), first.tokens), ("k", vec![A + 10]));
    assert_eq!(first.end, Ok((FinishReason::Stop, 2, 1)));
    assert_eq!(read(second).end, Ok((FinishReason::Stop, 3, 1)));
    assert_idle(&engine);
}

#[test]
fn a_long_prompt_goes_in_chunks_while_others_decode() {
    let (ranks, gate) = gated();
    let limits = Limits {
        step_rows: 8,
        ..limits()
    };
    let engine = start(ranks, limits);
    let _short = engine.submit(prepared(prompt(1))).unwrap();
    gate.step();
    let long = engine.submit(prepared(prompt(17))).unwrap();
    let mut rows = Vec::new();
    for samples in [1, 1, 1, 2] {
        gate.answer(&vec![A; samples]);
        let step = gate.step();
        assert_eq!(step.spans[0].rows, 1, "the one that decodes comes first");
        rows.push(step.spans.get(1).map_or(0, |s| s.rows));
    }
    assert_eq!(rows, [7, 7, 3, 1]);
    gate.answer(&[END, END]);
    assert_eq!(read(long).end, Ok((FinishReason::Stop, 17, 1)));
}

/// The small random Llama of the reference test on one thread.
fn tiny_llama() -> RankModel<Cpu> {
    tiny_llama_in(KvFormat::F16)
}

/// [`tiny_llama`] with keys and values in `format`.
fn tiny_llama_in(format: KvFormat) -> RankModel<Cpu> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama-tiny");
    let file = ModelFile::open(folder).unwrap();
    let plan = ShardPlan::whole_in(format, &file.config().unwrap(), 128).unwrap();
    let device = Cpu::new(1, Isa::detect());
    RankModel::load(&file, &plan, Box::new(Local::default()), device).unwrap()
}

#[test]
fn a_resumed_request_gives_the_answer_that_would_have_come() {
    const TOKENS: u32 = 24;
    let ranks = tiny_llama();
    let limits = Limits {
        blocks: ranks.plan().kv_blocks,
        ..limits()
    };
    let config = EngineConfig {
        model: "tiny".into(),
        limits,
    };
    // Nothing ends an answer here, so that there is something to cut at any place.
    let endless = Arc::new(Tokenizer::from_vocabulary(&vocabulary(false)).unwrap());
    let engine = Engine::start(ranks, endless, None, config).unwrap();
    let request = |history: &[u32], seed: Option<u64>| Prepared {
        sampling: Sampling {
            temperature: 1.2,
            top_p: 0.9,
            seed,
            ..Sampling::default()
        },
        max_tokens: Some(TOKENS - history.len() as u32),
        ..prepared([&[5, 6, 7, 300, 9], history].concat())
    };
    let whole = read(engine.submit(request(&[], None)).unwrap());
    assert_eq!(whole.end, Ok((FinishReason::Length, 5, TOKENS)));
    let distinct: std::collections::BTreeSet<_> = whole.tokens.iter().collect();
    assert!(distinct.len() > 4, "not much of an answer: {whole:?}");
    // All at once, so that their steps are made up differently than the first time.
    let cuts = [1, 7, 16, 23];
    let resumed: Vec<Stream> = cuts
        .iter()
        .map(|&cut| engine.submit(request(&whole.tokens[..cut], None)).unwrap())
        .collect();
    for (cut, stream) in cuts.into_iter().zip(resumed) {
        assert_eq!(read(stream).tokens, whole.tokens[cut..], "cut at {cut}");
    }
    let other = read(engine.submit(request(&[], Some(8))).unwrap());
    assert_ne!(other.tokens, whole.tokens, "the seed counts");
}

#[test]
fn a_stop_string_over_two_tokens_ends_the_answer_before_it() {
    let answer = [A, ST, OP, A + 1, END];
    let ranks = move |_: u32, position: u32| certain(answer[position as usize - 1]);
    let engine = start(Scripted(ranks), limits());
    let stopped = |stop: &str| {
        let stop = vec![stop.to_owned()];
        let request = Prepared {
            stop,
            ..prepared(prompt(2))
        };
        read(engine.submit(request).unwrap())
    };
    let outcome = stopped("STOP");
    assert_eq!(outcome.text, "a");
    assert_eq!(outcome.tokens, [A, ST, OP], "what was generated is told");
    assert_eq!(outcome.end, Ok((FinishReason::Stop, 2, 3)));
    // Begun but never completed: nothing is lost.
    let outcome = stopped("OPx");
    assert_eq!(outcome.text, "aSTOPb");
    assert_eq!(outcome.end, Ok((FinishReason::Stop, 2, 4)));
    assert_eq!(stopped("bx").text, "aSTOPb", "also at the very end");
    assert_idle(&engine);
}

#[test]
fn characters_come_whole() {
    let answer = [BYTE_C3, BYTE_A4, SPACE, BYTE_C3, END];
    let ranks = move |_: u32, position: u32| certain(answer[position as usize - 1]);
    let engine = start(Scripted(ranks), limits());
    let outcome = read(engine.submit(prepared(prompt(2))).unwrap());
    assert_eq!(outcome.text, "ä \u{fffd}");
    assert_eq!(outcome.tokens, answer[..4]);
}

#[test]
fn an_answer_has_at_most_max_tokens() {
    let engine = start(Scripted(|_, _| certain(A)), limits());
    for most in [1, 5] {
        let request = Prepared {
            max_tokens: Some(most),
            ..prepared(prompt(3))
        };
        let outcome = read(engine.submit(request).unwrap());
        assert_eq!(outcome.tokens, vec![A; most as usize]);
        assert_eq!(outcome.end, Ok((FinishReason::Length, 3, most)));
    }
    assert_idle(&engine);
}

#[test]
fn an_answer_ends_where_the_context_ends() {
    // Once by the context itself, once by the blocks that there are.
    for (context_tokens, blocks) in [(40, 16), (128, 2)] {
        let limits = Limits {
            context_tokens,
            blocks,
            ..limits()
        };
        let capacity = context_tokens.min(blocks * BLOCK_TOKENS) as u32;
        let engine = start(Scripted(|_, _| certain(A)), limits);
        for (asked, len) in [(None, 10), (Some(1000), 10), (None, capacity - 1)] {
            let request = Prepared {
                max_tokens: asked,
                ..prepared(prompt(len as usize))
            };
            let outcome = read(engine.submit(request).unwrap());
            let answer = capacity - len;
            assert_eq!(outcome.end, Ok((FinishReason::Length, len, answer)));
            assert_eq!(outcome.tokens.len(), answer as usize);
        }
    }
}

#[test]
fn a_prompt_that_fills_the_context_or_is_empty_is_refused() {
    let engine = start(Scripted(|_, _| certain(A)), limits());
    let outcome = read(engine.submit(prepared(prompt(128))).unwrap());
    let expected = InferError::PromptTooLong {
        tokens: 128,
        context: 128,
    };
    assert_eq!(outcome.end, Err(expected));
    assert!(matches!(
        read(engine.submit(prepared(Vec::new())).unwrap()).end,
        Err(InferError::Invalid { param, .. }) if param == "prompt"
    ));
    assert_idle(&engine);
}

#[test]
fn echo_sends_the_prompts_text_before_the_answer() {
    let engine = start(Scripted(|_, _| certain(A + 25)), limits());
    let request = |echo| GenerateRequest {
        tenant: TenantId::new("t1").unwrap(),
        model: "test".into(),
        prompt: Prompt::Text(Redacted::new("ab c".into())),
        max_tokens: Some(2),
        sampling: Sampling::greedy(),
        stop: Vec::new(),
        echo,
        constraint: None,
        logprobs: None,
        priority: Class::Interactive,
        timeout_ms: None,
    };
    let outcome = read(engine.generate(&request(true)).unwrap());
    assert_eq!(outcome.text, "ab czz");
    assert_eq!(outcome.tokens, [A + 25; 2], "the prompt is no answer");
    assert_eq!(outcome.end, Ok((FinishReason::Length, 5, 2)));
    assert_eq!(read(engine.generate(&request(false)).unwrap()).text, "zz");
}

#[test]
fn a_dropped_receiver_frees_its_blocks() {
    let (ranks, gate) = gated();
    let limits = Limits {
        blocks: 4,
        ..limits()
    };
    let engine = start(ranks, limits);
    let gone = engine.submit(prepared(prompt(2 * BLOCK_TOKENS))).unwrap();
    gate.step();
    let other: Vec<u32> = prompt(3 * BLOCK_TOKENS + 2)[1..].to_vec();
    // Has nothing in common with the first. Needs all four blocks, so it can run only when the first has given its own back.
    let next = engine.submit(prepared(other.clone())).unwrap();
    gate.answer(&[A]);
    let step = gate.step();
    assert_eq!(step.tokens, [A], "the second waits");
    drop(gone);
    gate.answer(&[A]);
    let step = gate.step();
    assert_eq!(step.tokens, other);
    assert_eq!(step.spans[0].blocks.len(), 4);
    assert_eq!(engine.active(), 1);
    gate.answer(&[END]);
    assert_eq!(read(next).end, Ok((FinishReason::Stop, 49, 0)));
    assert_idle(&engine);
}

#[test]
fn the_gauges_fall_back_when_the_last_receiver_is_dropped() {
    let (ranks, gate) = gated();
    let config = EngineConfig {
        model: "gauges".into(),
        limits: limits(),
    };
    let engine = Engine::start(ranks, tokenizer(), None, config).unwrap();
    let metrics = METRICS.as_ref().unwrap();
    let gauges = || {
        [
            metrics.kv_blocks.with_label_values(&["gauges", "used"]),
            metrics.sequences.with_label_values(&["gauges", "running"]),
        ]
        .map(|g| g.get())
    };
    let stream = engine.submit(prepared(prompt(20))).unwrap();
    gate.step();
    gate.answer(&[A]);
    gate.step();
    assert_eq!(gauges(), [2, 1]);
    drop(stream);
    gate.answer(&[A]);
    eventually("empty gauges", || gauges() == [0, 0]);
    assert_idle(&engine);
}

#[test]
fn more_requests_than_may_wait_are_told_to_come_later() {
    let (ranks, gate) = gated();
    let limits = Limits {
        max_sequences: 1,
        max_waiting: 1,
        ..limits()
    };
    let engine = start(ranks, limits);
    let runs = engine.submit(prepared(prompt(2))).unwrap();
    gate.step();
    let waits = engine.submit(prepared(prompt(2))).unwrap();
    let refused = engine.submit(prepared(prompt(2))).unwrap();
    gate.answer(&[A]);
    let overloaded = InferError::Overloaded { retry_after_s: 1 };
    assert_eq!(read(refused).end, Err(overloaded));
    gate.step();
    gate.answer(&[END]);
    assert_eq!(read(runs).end, Ok((FinishReason::Stop, 2, 1)));
    gate.step();
    gate.answer(&[END]);
    assert_eq!(read(waits).end, Ok((FinishReason::Stop, 2, 0)));
    assert_idle(&engine);
}

#[test]
fn a_full_inbox_refuses_at_once_and_counts_only_what_it_took() {
    let (ranks, gate) = gated();
    let engine = start(ranks, limits());
    let runs = engine.submit(prepared(prompt(2))).unwrap();
    gate.step();
    let taken: Vec<Stream> = (0..INBOX)
        .map(|_| engine.submit(prepared(prompt(2))).unwrap())
        .collect();
    for _ in 0..3 {
        let refused = engine.submit(prepared(prompt(2))).err();
        assert!(matches!(refused, Some(InferError::Overloaded { .. })));
    }
    assert_eq!(engine.active(), 1 + INBOX as u32);
    // What lies in the inbox when the group breaks is told so, too.
    gate.give(Err(lost()));
    for stream in taken.into_iter().chain([runs]) {
        let end = read(stream).end;
        assert!(
            matches!(end, Err(InferError::Interrupted { .. })),
            "{end:?}"
        );
    }
    assert_idle(&engine);
}

//! Every answer that a schema constrains satisfies it, judged by Python's jsonschema, which shares nothing with what made it.

mod support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use coordinator::Redacted;
use coordinator::ids::TenantId;
use kernels::{BLOCK_TOKENS, Cpu, Isa};
use serde::Deserialize;
use serde_json::{Value, json};
use support::smollm2;
use worker::client::{
    Constraint, Event, FinishReason, Format, GenerateRequest, InferError, Message, Prompt, Sampling,
};
use worker::collective::Local;
use worker::engine::{Engine, EngineConfig, Stepper};
use worker::file::ModelFile;
use worker::model::{self, CANDIDATES, Candidates, RankModel, StepBatch};
use worker::plan::ShardPlan;
use worker::scheduler::Limits;
use worker::text::{TextSide, Tokenizer};

/// What the issue asks for.
const SCHEMAS_AT_LEAST: usize = 100;
const CONTEXT: usize = 1024;

#[derive(Debug, Deserialize)]
struct Case {
    name: String,
    schema: Value,
}

fn cases() -> Vec<Case> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/schemas");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let cases: Vec<Case> = files
        .iter()
        .flat_map(|file| {
            let text = std::fs::read_to_string(file).unwrap();
            serde_json::from_str::<Vec<Case>>(&text)
                .unwrap_or_else(|e| panic!("{}: {e}", file.display()))
        })
        .collect();
    assert!(cases.len() >= SCHEMAS_AT_LEAST);
    cases
}

/// A model without sense: its logits are noise with exponential tails, so that tokens come all over the vocabulary, and a
/// liking for signs that end things, so that answers end.
struct Noise {
    tail: Vec<f32>,
    liking: Vec<f32>,
    state: u64,
}

impl Noise {
    fn new(tokenizer: &Tokenizer) -> Self {
        let liking = |id: u32| {
            let ends = |b: &u8| matches!(b, b'"' | b'}' | b']');
            if tokenizer.is_end(id) || tokenizer.token_bytes(id).iter().any(ends) {
                2.0
            } else {
                0.0
            }
        };
        let mut noise = Self {
            tail: Vec::new(),
            liking: (0..tokenizer.vocab_size() as u32).map(liking).collect(),
            state: 0x9e37_79b9_7f4a_7c15,
        };
        noise.tail = (0..1 << 16)
            .map(|_| -((noise.next() >> 11) as f32 / (1u64 << 53) as f32 + 1e-9).ln())
            .collect();
        noise
    }

    fn next(&mut self) -> u64 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.state ^ (self.state >> 29)
    }

    fn row(&mut self, mask: Option<&[u32]>) -> Candidates {
        let (from, stride) = (self.next() as usize, self.next() as usize | 1);
        let allowed = |id: usize| {
            mask.is_none_or(|mask| {
                mask.get(id / 32)
                    .is_some_and(|word| word >> (id % 32) & 1 == 1)
            })
        };
        let mut top: Vec<(u32, f32)> = (0..self.liking.len())
            .filter(|&id| allowed(id))
            .map(|id| {
                let at = from.wrapping_add(id.wrapping_mul(stride)) % self.tail.len();
                (id as u32, self.liking[id] + self.tail[at])
            })
            .collect();
        top.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        top.truncate(CANDIDATES);
        Candidates {
            top,
            log_sum_exp: 20.0,
            full: None,
        }
    }
}

impl Stepper for Noise {
    fn step(&mut self, batch: &StepBatch) -> Result<Vec<Candidates>, model::Error> {
        let mut wants = batch.wants.iter().peekable();
        Ok((0..batch.logits_rows.len())
            .map(|row| {
                let want = wants.next_if(|want| want.row == row);
                self.row(want.and_then(|want| want.mask.as_deref()))
            })
            .collect())
    }

    fn idle(&mut self) -> Result<(), model::Error> {
        Ok(())
    }

    fn stop(&mut self) {}
}

fn config() -> EngineConfig {
    EngineConfig {
        model: "test".into(),
        limits: Limits {
            max_sequences: 8,
            max_waiting: 512,
            step_rows: 512,
            context_tokens: CONTEXT,
            blocks: 8 * CONTEXT / BLOCK_TOKENS,
            ..Limits::default()
        },
    }
}

fn request(prompt: Prompt, case: &Case, max_tokens: u32, seed: u64) -> GenerateRequest {
    GenerateRequest {
        tenant: TenantId::new("musterstadt").unwrap(),
        model: "test".into(),
        prompt,
        max_tokens: Some(max_tokens),
        sampling: Sampling {
            seed: Some(seed),
            ..Sampling::default()
        },
        stop: Vec::new(),
        echo: false,
        priority: Default::default(),
        timeout_ms: None,
        constraint: Some(Constraint {
            format: Some(Format::Schema {
                schema: Redacted::new(case.schema.to_string()),
                param: "schema".into(),
            }),
            calls: None,
        }),
        logprobs: None,
    }
}

/// The answer, and whether it came to its end.
fn answer(engine: &Engine, request: &GenerateRequest) -> Result<(String, bool, u32), InferError> {
    let mut events = engine.generate(request)?;
    let mut text = String::new();
    while let Some(event) = events.blocking_recv() {
        match event? {
            Event::Text { text: part, .. } => text.push_str(part.expose()),
            Event::Finished {
                reason,
                completion_tokens,
                ..
            } => return Ok((text, reason == FinishReason::Stop, completion_tokens)),
            Event::Started { .. } => {}
        }
    }
    panic!("the stream ended without its end");
}

/// Panics with what does not hold.
fn judge(answers: &[Value]) {
    let python = std::env::var("VERBUND_PYTHON").unwrap_or_else(|_| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/validate.py");
    let mut judge = Command::new(python)
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python");
    let input = serde_json::to_vec(answers).unwrap();
    judge.stdin.take().unwrap().write_all(&input).unwrap();
    let done = judge.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    println!("{said}");
    assert!(done.status.success(), "{said}");
}

/// Answers to every schema, each `repeats` times; the share that must come to an end within `max_tokens`.
fn run(
    engine: &Engine,
    prompt: impl Fn(&Case) -> Prompt,
    repeats: u64,
    max_tokens: u32,
    finished_at_least: f64,
) {
    let mut answers = Vec::new();
    let (mut asked, mut tokens) = (0, 0);
    for case in cases() {
        for seed in 0..repeats {
            let request = request(prompt(&case), &case, max_tokens, seed);
            let (output, finished, count) =
                answer(engine, &request).unwrap_or_else(|e| panic!("{}: {e}", case.name));
            asked += 1;
            tokens += count;
            if finished {
                answers.push(json!({"name": case.name, "schema": case.schema, "output": output}));
            } else {
                println!("{} did not end within {max_tokens} tokens", case.name);
            }
        }
    }
    println!(
        "{} of {asked} answers of {tokens} tokens came to an end",
        answers.len()
    );
    judge(&answers);
    assert!(
        answers.len() as f64 >= finished_at_least * f64::from(asked),
        "only {} of {asked} came to an end",
        answers.len()
    );
}

#[test]
fn noise_constrained_by_any_schema_satisfies_it() {
    let file = ModelFile::open(smollm2()).unwrap();
    let tokenizer = Arc::new(worker::text::load(&file).unwrap().tokenizer);
    let engine = Engine::start(Noise::new(&tokenizer), tokenizer, None, config()).unwrap();
    let prompt = |_: &Case| Prompt::Text(Redacted::new("Antwort:".into()));
    run(&engine, prompt, 1, 600, 0.95);
}

#[test]
#[ignore = "some hundred answers of a real model: minutes"]
fn a_real_model_constrained_by_any_schema_satisfies_it() {
    let file = ModelFile::open(smollm2()).unwrap();
    let TextSide {
        tokenizer,
        template,
    } = worker::text::load(&file).unwrap();
    let plan = ShardPlan::whole(&file.config().unwrap(), 8 * CONTEXT).unwrap();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let device = Cpu::new(threads, Isa::detect());
    let rank = RankModel::load(&file, &plan, Box::new(Local::default()), device).unwrap();
    let template = template.map(Arc::new);
    let engine = Engine::start(rank, Arc::new(tokenizer), template, config()).unwrap();
    let prompt = |case: &Case| Prompt::Chat {
        messages: vec![Message::new(
            "user",
            format!(
                "Erfinde ein Beispiel in JSON: {}",
                case.name.replace('_', " ")
            ),
        )],
        tools: None,
    };
    run(&engine, prompt, 2, 400, 0.8);
}

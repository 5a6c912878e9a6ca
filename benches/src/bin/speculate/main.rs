//! Decoding with and without speculation, in turns on one engine, one sequence at a time.
//!
//! `speculate --threads 2 --json`
//!
//! Quotes: a passage of an example document and a question; the answer is one that a clerk could give, partly in the passage's
//! words (`answers.jsonl`). No model here gives such answers, so it is dictated: each step is computed by the model as it is, and then
//! the answer's next token put in place of the model's. The time of a step, the guesses and which of them are right are real;
//! that the model would have said this is assumed. Own words: what SmolLM2 itself says to the same prompts, greedily. Open: what
//! SmolLM2 says to questions without a source, sampled; for the shape of random weights these texts are dictated too.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use benches::report::speculation::{QUOTES, Row, Speculation as Report};
use clap::Parser;
use kernels::{Cpu, Isa};
use serde::Deserialize;
use serde_json::json;
use worker::client::{Event, GenerateRequest, Sampling};
use worker::collective::Local;
use worker::engine::{Drafter, Engine, EngineConfig, Stepper};
use worker::file::ModelFile;
use worker::model::{self, Candidates, RankModel, StepBatch};
use worker::plan::ShardPlan;
use worker::scheduler::{Limits, SequenceId};
use worker::speculation::Speculation;

/// Positions of the longest sequence.
const CONTEXT: usize = 1024;
/// Characters of a passage, about as retrieval gives in one chunk or two.
const PASSAGE_CHARS: usize = 1600;
/// Tokens, all rounds together, from which on an answer's own ratio says something.
const LEAST_TOKENS: usize = 32;
const ANSWERS: &str = include_str!("answers.jsonl");
/// Questions that no source is given for.
const OPEN: [&str; 6] = [
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Explain how bread rises and why it sometimes does not.",
    "What should I think about before I move to another town?",
    "Describe a market square on a winter morning.",
    "Give advice to somebody who speaks in front of a council for the first time.",
    "Tell me about the history of bicycles.",
];

#[derive(Parser)]
struct Options {
    /// The small model that speaks for itself
    #[arg(long, env = "VERBUND_MODELS", value_parser = in_models)]
    model: PathBuf,
    /// A model whose weights do not fit into the cache, of random weights
    #[arg(long, env = "VERBUND_SHAPES", value_parser = in_shapes)]
    shape: PathBuf,
    /// Folder of the example documents
    #[arg(long, default_value = "ops/examples")]
    examples: PathBuf,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 160)]
    tokens: usize,
    /// Answers of each kind; all when absent
    #[arg(long)]
    answers: Option<usize>,
    /// Passes over the answers that have a source
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Passes over the open ones: whether one of them loses 3 % is seen only over several
    #[arg(long, default_value_t = 6)]
    open_rounds: usize,
    /// Print JSON for programs
    #[arg(long)]
    json: bool,
}

/// A file, or what the set-up put into this folder.
fn within(path: &str, name: &str) -> Result<PathBuf> {
    let path = Path::new(path);
    Ok(if path.is_dir() {
        path.join(name)
    } else {
        path.to_owned()
    })
}

fn in_models(path: &str) -> Result<PathBuf> {
    within(path, "SmolLM2-135M-Instruct.Q4_1.gguf")
}

fn in_shapes(path: &str) -> Result<PathBuf> {
    within(path, "llama-1b-shape.Q4_0.gguf")
}

/// A line of `answers.jsonl`.
#[derive(Deserialize)]
struct Example {
    source: String,
    /// Where the passage begins.
    from: String,
    question: String,
    answer: String,
}

/// What came out for one kind of answer.
#[derive(Debug, Default)]
struct Sums {
    /// Of each answer its rounds: tokens, and seconds plain and speculating.
    answers: BTreeMap<usize, Vec<(usize, f64, f64)>>,
    drafts_right: u64,
    drafts_wrong: u64,
}

impl Sums {
    fn row(&self) -> Row {
        let (mut tokens, mut plain, mut speculating) = (0, 0.0, 0.0);
        let mut lowest: Option<f64> = None;
        for rounds in self.answers.values() {
            let mut ratios = Vec::new();
            let mut own_tokens = 0;
            for &(count, without, with) in rounds {
                own_tokens += count;
                plain += without;
                speculating += with;
                ratios.push(without / with);
            }
            tokens += own_tokens;
            if own_tokens >= LEAST_TOKENS {
                let one = median(ratios);
                lowest = Some(lowest.map_or(one, |least| least.min(one)));
            }
        }
        let ratio = plain / speculating;
        Row {
            answers: self.answers.len(),
            tokens,
            plain_tokens_per_s: tokens as f64 / plain,
            speculating_tokens_per_s: tokens as f64 / speculating,
            ratio,
            lowest_ratio: lowest.unwrap_or(ratio),
            drafts_right: self.drafts_right,
            drafts_wrong: self.drafts_wrong,
        }
    }
}

/// Of an even number the mean of the two in the middle: half of the pairs began with one side, half with the other.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    let n = values.len();
    (at(n.saturating_sub(1) / 2) + at(n / 2)) / 2.0
}

fn main() -> Result<()> {
    let options = Options::parse();
    let began = load();
    let examples: Vec<Example> = ANSWERS
        .lines()
        .take(options.answers.unwrap_or(usize::MAX))
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .context("answers.jsonl")?;
    let quoting: Vec<(String, String)> = examples
        .into_iter()
        .map(|example| Ok((prompt(&options.examples, &example)?, example.answer)))
        .collect::<Result<_>>()?;
    let open = &OPEN[..OPEN.len().min(options.answers.unwrap_or(OPEN.len()))];
    let mut rows: BTreeMap<String, BTreeMap<String, Row>> = BTreeMap::new();

    let small = Bench::start(&options.model, options.threads)?;
    let mut said = Vec::new();
    let [mut own, mut dictated, mut sampled] = <[Sums; 3]>::default();
    for round in 0..options.rounds {
        for (i, (prompt, answer)) in quoting.iter().enumerate() {
            let request = chat(prompt, &options, None);
            small.compare(&request, None, (round, i), &mut own)?;
            let request = text(prompt, &options);
            small.compare(&request, Some(answer), (round, i), &mut dictated)?;
        }
    }
    for round in 0..options.open_rounds {
        for (i, question) in open.iter().enumerate() {
            let request = chat(question, &options, Some(i));
            let answer = small.compare(&request, None, (round, i), &mut sampled)?;
            if round == 0 {
                said.push((*question, answer));
            }
        }
    }
    let name = |path: &Path| {
        path.file_stem()
            .map_or_else(String::new, |n| n.to_string_lossy().into_owned())
    };
    let kinds = [("own words", own), (QUOTES, dictated), ("open", sampled)];
    rows.insert(
        name(&options.model),
        kinds.map(|(k, sums)| (k.to_owned(), sums.row())).into(),
    );
    drop(small);

    let large = Bench::start(&options.shape, options.threads)?;
    let [mut quotes, mut open] = <[Sums; 2]>::default();
    for round in 0..options.rounds {
        for (i, (prompt, answer)) in quoting.iter().enumerate() {
            let request = text(prompt, &options);
            large.compare(&request, Some(answer), (round, i), &mut quotes)?;
        }
    }
    for round in 0..options.open_rounds {
        for (i, (question, answer)) in said.iter().enumerate() {
            let request = text(question, &options);
            large.compare(&request, Some(answer), (round, i), &mut open)?;
        }
    }
    let kinds = [(QUOTES, quotes), ("open", open)];
    rows.insert(
        name(&options.shape),
        kinds.map(|(k, sums)| (k.to_owned(), sums.row())).into(),
    );

    let report = Report {
        threads: options.threads,
        isa: Isa::detect().name().into(),
        load: [began, load()],
        rows,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    println!(
        "{} threads · {} · load {:.1} to {:.1}",
        report.threads, report.isa, report.load[0], report.load[1]
    );
    for (model, kinds) in &report.rows {
        for (kind, row) in kinds {
            println!(
                "{model:<32} {kind:<10} {:>7.1} tokens/s plain {:>7.1} speculating · {:.2}× (lowest {:.2}×) · {} of {} drafts right",
                row.plain_tokens_per_s,
                row.speculating_tokens_per_s,
                row.ratio,
                row.lowest_ratio,
                row.drafts_right,
                row.drafts_right + row.drafts_wrong
            );
        }
    }
    Ok(())
}

/// Processes that want to run, mean of the last minute; NaN where the system does not tell.
fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split(' ').next().and_then(|n| n.parse().ok());
    first.unwrap_or(f64::NAN)
}

/// A passage of the document and the question, as a chat with sources puts them.
fn prompt(folder: &Path, example: &Example) -> Result<String> {
    let path = folder.join(&example.source);
    let whole = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let whole = if example.source.ends_with(".html") {
        without_tags(&whole)
    } else {
        whole
    };
    let from = whole
        .find(&example.from)
        .with_context(|| format!("{} has no {:?}", path.display(), example.from))?;
    let passage: String = whole[from..].chars().take(PASSAGE_CHARS).collect();
    Ok(format!(
        "Quelle [1]:\n{passage}\n\nFrage: {}\n\nAntwort:",
        example.question
    ))
}

fn without_tags(html: &str) -> String {
    let mut text = String::new();
    for piece in html.split('<') {
        let (tag, rest) = piece.split_once('>').unwrap_or(("", piece));
        text.push_str(if tag == "/td" { " " } else { "" });
        text.push_str(rest);
    }
    text
}

/// To be continued greedily as it stands.
fn text(prompt: &str, options: &Options) -> serde_json::Value {
    request(json!({ "Text": format!("{prompt} ") }), options, None)
}

/// To be answered by the model's own template, greedily or with a seed.
fn chat(prompt: &str, options: &Options, seed: Option<usize>) -> serde_json::Value {
    let message = json!({ "role": "user", "content": prompt });
    let prompt = json!({ "Chat": { "messages": [message] } });
    request(prompt, options, seed)
}

/// As a gateway sends it; through JSON, because the engine's caller needs no type of the coordinator's then.
fn request(prompt: serde_json::Value, options: &Options, seed: Option<usize>) -> serde_json::Value {
    let sampling = Sampling {
        temperature: if seed.is_some() { 0.8 } else { 0.0 },
        top_p: 0.95,
        seed: seed.map(|seed| seed as u64),
        ..Sampling::default()
    };
    json!({
        "tenant": "bench",
        "model": "bench",
        "prompt": prompt,
        "max_tokens": options.tokens,
        "sampling": sampling,
        "stop": [],
        "echo": false,
        "priority": "Interactive",
    })
}

/// An engine whose drafter can be switched, and whose tokens can be dictated.
struct Bench {
    engine: Option<Engine>,
    thread: Option<std::thread::JoinHandle<()>>,
    switch: Arc<Switch>,
    /// The whole sequence as it shall be, empty if the model decides.
    script: Arc<Mutex<Vec<u32>>>,
}

#[derive(Default)]
struct Switch {
    on: AtomicBool,
    right: AtomicU64,
    wrong: AtomicU64,
}

impl Bench {
    fn start(path: &Path, threads: usize) -> Result<Self> {
        eprintln!("Loading {}", path.display());
        let file = ModelFile::open(path)?;
        let plan = ShardPlan::whole(&file.config()?, CONTEXT)?;
        let device = Cpu::new(threads, Isa::detect());
        let rank = RankModel::load(&file, &plan, Box::new(Local::default()), device)?;
        let side = worker::text::load(&file)?;
        let limits = Limits {
            max_sequences: 1,
            max_waiting: 1,
            step_rows: 256,
            context_tokens: CONTEXT,
            blocks: rank.plan().kv_blocks,
            ..Limits::default()
        };
        let config = EngineConfig {
            model: "bench".into(),
            limits,
        };
        let (switch, script) = (Arc::<Switch>::default(), Arc::<Mutex<Vec<u32>>>::default());
        let dictated = Dictated {
            inner: rank,
            script: script.clone(),
        };
        let drafter = Switched {
            inner: Speculation::new(limits.step_rows),
            switch: switch.clone(),
        };
        let tokenizer = Arc::new(side.tokenizer);
        let (engine, runner) =
            Engine::new(dictated, tokenizer, side.template.map(Arc::new), config);
        let runner = runner.with_drafter(Box::new(drafter));
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || runner.run())?;
        Ok(Self {
            engine: Some(engine),
            thread: Some(thread),
            switch,
            script,
        })
    }

    /// Runs the request both ways, in an order that changes from answer to answer and from round to round, and adds to `sums`.
    /// Returns the answer's text.
    fn compare(
        &self,
        request: &serde_json::Value,
        answer: Option<&str>,
        (round, number): (usize, usize),
        sums: &mut Sums,
    ) -> Result<String> {
        let mut seconds = [0.0; 2];
        let mut texts: [(String, usize); 2] = Default::default();
        for speculating in if (round + number).is_multiple_of(2) {
            [false, true]
        } else {
            [true, false]
        } {
            self.switch.on.store(speculating, Ordering::Relaxed);
            let counts =
                || [&self.switch.right, &self.switch.wrong].map(|c| c.load(Ordering::Relaxed));
            let before = counts();
            let which = usize::from(speculating);
            (texts[which], seconds[which]) = self.run(request, answer)?;
            let after = counts();
            sums.drafts_right += after[0] - before[0];
            sums.drafts_wrong += after[1] - before[1];
        }
        if texts[0] != texts[1] {
            bail!("speculation changed an answer: {texts:?}");
        }
        let [plain, speculating] = seconds;
        let tokens = texts[0].1.saturating_sub(1);
        let sum = sums.answers.entry(number).or_default();
        sum.push((tokens, plain, speculating));
        let [(text, _), _] = texts;
        Ok(text)
    }

    /// The answer with its tokens' number, and seconds from its first token to its end.
    fn run(
        &self,
        request: &serde_json::Value,
        answer: Option<&str>,
    ) -> Result<((String, usize), f64)> {
        let engine = self.engine.as_ref().context("the engine has ended")?;
        let mut request: GenerateRequest = serde_json::from_value(request.clone())?;
        let mut script = Vec::new();
        if let Some(answer) = answer {
            let worker::client::Prompt::Text(prompt) = &request.prompt else {
                bail!("only what continues a text can be dictated");
            };
            script = engine.tokenizer().encode_prompt(prompt.expose())?;
            let answer = engine
                .tokenizer()
                .encode(answer, worker::text::Parse::Plain)?;
            let most = request.max_tokens.map_or(usize::MAX, |most| most as usize);
            let answer = &answer[..answer.len().min(most)];
            request.max_tokens = Some(answer.len() as u32);
            script.extend_from_slice(answer);
        }
        *self.script.lock().unwrap_or_else(PoisonError::into_inner) = script;
        let mut events = engine.generate(&request)?;
        let (mut text, mut count, mut first) = (String::new(), 0, None);
        while let Some(event) = events.blocking_recv() {
            match event? {
                Event::Text {
                    text: piece,
                    tokens,
                    ..
                } => {
                    text.push_str(piece.expose());
                    count += tokens.len();
                    first.get_or_insert_with(Instant::now);
                }
                Event::Finished { .. } => {
                    let seconds = first.map_or(0.0, |f| f.elapsed().as_secs_f64());
                    return Ok(((text, count), seconds));
                }
                Event::Started { .. } => {}
            }
        }
        bail!("the answer ended without its end")
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        drop(self.engine.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A model that is made to say what the script says. One sequence at a time.
struct Dictated {
    inner: RankModel<Cpu>,
    script: Arc<Mutex<Vec<u32>>>,
}

impl Stepper for Dictated {
    fn step(&mut self, batch: &StepBatch) -> Result<Vec<Candidates>, model::Error> {
        let mut rows = self.inner.step(batch)?.unwrap_or_default();
        let script = self.script.lock().unwrap_or_else(PoisonError::into_inner);
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
        self.inner.idle()
    }

    fn stop(&mut self) {
        Stepper::stop(&mut self.inner);
    }
}

/// Speculation that can be switched off between two answers; then it does not even keep count.
struct Switched {
    inner: Speculation,
    switch: Arc<Switch>,
}

impl Switched {
    fn on(&self) -> bool {
        self.switch.on.load(Ordering::Relaxed)
    }
}

impl Drafter for Switched {
    fn begin(&mut self, id: SequenceId, prompt: &[u32]) {
        if self.on() {
            self.inner.begin(id, prompt);
        }
    }

    fn draft(&mut self, decoding: &[SequenceId]) -> Vec<(SequenceId, Vec<u32>)> {
        if self.on() {
            self.inner.draft(decoding)
        } else {
            Vec::new()
        }
    }

    fn took(&mut self, id: SequenceId, tokens: &[u32], drafts: &[u32]) {
        let right = tokens.len() as u64 - 1;
        self.switch.right.fetch_add(right, Ordering::Relaxed);
        self.switch
            .wrong
            .fetch_add(drafts.len() as u64 - right, Ordering::Relaxed);
        if self.on() {
            self.inner.took(id, tokens, drafts);
        }
    }

    fn stepped(&mut self, rows: usize, seconds: f64) {
        if self.on() {
            self.inner.stepped(rows, seconds);
        }
    }

    fn end(&mut self, id: SequenceId) {
        if self.on() {
            self.inner.end(id);
        }
    }
}

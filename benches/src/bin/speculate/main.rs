//! Decoding with and without speculation, in turns from step to step, one sequence each.
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

use anyhow::{Context, Result, bail};
use benches::pair::{Answer, Pair, STEP_ROWS};
use benches::report::speculation::{QUOTES, Row, Speculation as Report};
use clap::Parser;
use kernels::Isa;
use serde::Deserialize;
use serde_json::json;
use worker::client::{GenerateRequest, Prompt, Sampling};
use worker::engine::Drafter;
use worker::speculation::Speculation;
use worker::text::Parse;

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
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Passes over the open ones: whether one of them loses 3 % is seen only over several
    #[arg(long, default_value_t = 3)]
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
    fn add(&mut self, number: usize, [plain, speculating]: &[Answer; 2]) {
        let ratio = plain.seconds / speculating.seconds;
        let (right, wrong) = (speculating.drafts_right, speculating.drafts_wrong);
        eprintln!(
            "answer {number}: {} tokens, {ratio:.2}×, {right} of {} drafts right",
            plain.tokens,
            right + wrong
        );
        self.drafts_right += right;
        self.drafts_wrong += wrong;
        let rounds = self.answers.entry(number).or_default();
        rounds.push((plain.tokens, plain.seconds, speculating.seconds));
    }

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

    let small = start(&options.model, options.threads)?;
    let mut said = Vec::new();
    let [mut own, mut dictated, mut sampled] = <[Sums; 3]>::default();
    for round in 0..options.rounds {
        for (i, (prompt, answer)) in quoting.iter().enumerate() {
            let request = chat(prompt, &options, None);
            own.add(i, &compare(&small, &request, None, round + i)?);
            let request = text(prompt, &options);
            dictated.add(i, &compare(&small, &request, Some(answer), round + i)?);
        }
    }
    for round in 0..options.open_rounds {
        for (i, question) in open.iter().enumerate() {
            let request = chat(question, &options, Some(i));
            let compared = compare(&small, &request, None, round + i)?;
            sampled.add(i, &compared);
            if round == 0 {
                let [answer, _] = compared;
                said.push((*question, answer.text));
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

    let large = start(&options.shape, options.threads)?;
    let [mut quotes, mut open] = <[Sums; 2]>::default();
    for round in 0..options.rounds {
        for (i, (prompt, answer)) in quoting.iter().enumerate() {
            let request = text(prompt, &options);
            quotes.add(i, &compare(&large, &request, Some(answer), round + i)?);
        }
    }
    for round in 0..options.open_rounds {
        for (i, (question, answer)) in said.iter().enumerate() {
            let request = text(question, &options);
            open.add(i, &compare(&large, &request, Some(answer), round + i)?);
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

/// An engine without and one with speculation.
fn start(path: &Path, threads: usize) -> Result<Pair> {
    eprintln!("Loading {}", path.display());
    let speculation: Box<dyn Drafter> = Box::new(Speculation::new(STEP_ROWS));
    Pair::start(path, threads, [None, Some(speculation)])
}

/// Runs the request without and with speculation; with an `answer`, the model is made to give it.
fn compare(
    pair: &Pair,
    request: &serde_json::Value,
    answer: Option<&str>,
    turn: usize,
) -> Result<[Answer; 2]> {
    let mut request: GenerateRequest = serde_json::from_value(request.clone())?;
    let mut script = Vec::new();
    if let Some(answer) = answer {
        let Prompt::Text(prompt) = &request.prompt else {
            bail!("only what continues a text can be dictated");
        };
        let tokenizer = pair.engine(0)?.tokenizer();
        script = tokenizer.encode_prompt(prompt.expose())?;
        let answer = tokenizer.encode(answer, Parse::Plain)?;
        let most = request.max_tokens.map_or(usize::MAX, |most| most as usize);
        let answer = &answer[..answer.len().min(most)];
        request.max_tokens = Some(answer.len() as u32);
        script.extend_from_slice(answer);
    }
    pair.dictate(script);
    let answers = pair.answer([&request, &request], turn % 2)?;
    if answers[0].text != answers[1].text {
        bail!("speculation changed an answer: {answers:?}");
    }
    Ok(answers)
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

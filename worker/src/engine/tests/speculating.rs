//! Look-up and payoff on real models: the tokens of plain decoding, in fewer steps.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::speculation::Speculation;
use crate::text::Parse;

const PROMPTS: usize = 200;

/// Counts of drafts and steps.
#[derive(Default)]
struct Counts {
    steps: AtomicUsize,
    right: AtomicUsize,
    wrong: AtomicUsize,
}

/// Speculation that is told a time of the test's choice.
struct Timed {
    inner: Speculation,
    /// Seconds of a step by its rows, or the measured ones.
    cost: Option<fn(usize) -> f64>,
    counts: Arc<Counts>,
}

impl Drafter for Timed {
    fn begin(&mut self, id: SequenceId, prompt: &[u32]) {
        self.inner.begin(id, prompt);
    }

    fn draft(&mut self, decoding: &[SequenceId]) -> Vec<(SequenceId, Vec<u32>)> {
        self.counts.steps.fetch_add(1, Ordering::Relaxed);
        self.inner.draft(decoding)
    }

    fn took(&mut self, id: SequenceId, tokens: &[u32], drafts: &[u32]) {
        let right = tokens.len() - 1;
        self.counts.right.fetch_add(right, Ordering::Relaxed);
        self.counts
            .wrong
            .fetch_add(drafts.len() - right, Ordering::Relaxed);
        self.inner.took(id, tokens, drafts);
    }

    fn stepped(&mut self, rows: usize, seconds: f64) {
        self.inner
            .stepped(rows, self.cost.map_or(seconds, |cost| cost(rows)));
    }

    fn end(&mut self, id: SequenceId) {
        self.inner.end(id);
    }
}

/// The answers to all `prompts`, every second one sampled with penalties, `at_once` at a time.
fn answers(
    ranks: RankModel<Cpu>,
    tokenizer: Arc<Tokenizer>,
    prompts: &[Vec<u32>],
    (at_once, max_tokens): (usize, u32),
    drafter: Option<Timed>,
) -> Vec<Vec<u32>> {
    let limits = Limits {
        max_sequences: at_once,
        blocks: ranks
            .plan()
            .kv_blocks
            .min(at_once * ranks.plan().context_tokens / BLOCK_TOKENS),
        context_tokens: ranks.plan().context_tokens,
        ..limits()
    };
    let config = EngineConfig {
        model: "speculating".into(),
        limits,
    };
    let (engine, runner) = Engine::new(ranks, tokenizer, None, config);
    let runner = match drafter {
        Some(timed) => runner.with_drafter(Box::new(timed)),
        None => runner,
    };
    let thread = std::thread::spawn(|| runner.run());
    let sampled = Sampling {
        temperature: 0.7,
        top_p: 0.95,
        frequency_penalty: 0.2,
        presence_penalty: 0.1,
        repetition_penalty: 1.05,
        ..Sampling::default()
    };
    let request = |(i, prompt): (usize, &Vec<u32>)| Prepared {
        sampling: if i % 2 == 0 {
            Sampling::greedy()
        } else {
            sampled.clone()
        },
        seed: i as u64,
        max_tokens: Some(max_tokens),
        ..prepared(prompt.clone())
    };
    let requests = prompts.iter().enumerate().map(request);
    let streams: Vec<Stream> = requests.map(|r| engine.submit(r).unwrap()).collect();
    let answers = streams.into_iter().map(|s| read(s).tokens).collect();
    drop(engine);
    thread.join().unwrap();
    answers
}

#[test]
fn two_hundred_answers_are_those_of_plain_decoding() {
    let endless = Arc::new(Tokenizer::from_vocabulary(&vocabulary(false)).unwrap());
    // Some repeat themselves, and so do their answers.
    let prompt = |i: u32| (0..4 + i % 30).map(move |t| 5 + (t % (3 + i % 11) * 37 + i * 7) % 300);
    let prompts: Vec<Vec<u32>> = (0..PROMPTS as u32).map(|i| prompt(i).collect()).collect();
    let plain = answers(tiny_llama(), endless.clone(), &prompts, (8, 40), None);
    assert!(plain.iter().all(|a| a.len() == 40));
    let counts = Arc::new(Counts::default());
    let timed = Timed {
        inner: Speculation::new(64),
        // As where reading the weights takes the time.
        cost: Some(|rows| 0.010 + 0.0002 * rows as f64),
        counts: counts.clone(),
    };
    let drafted = answers(tiny_llama(), endless, &prompts, (8, 40), Some(timed));
    for (i, (drafted, plain)) in drafted.iter().zip(&plain).enumerate() {
        assert_eq!(drafted, plain, "prompt {i}");
    }
    let [steps, right, wrong] =
        [&counts.steps, &counts.right, &counts.wrong].map(|c| c.load(Ordering::Relaxed));
    // Of 8000 tokens; how many depends on who decodes beside whom.
    assert!(right > 400 && wrong > 100, "{right} right, {wrong} wrong");
    assert!(steps < PROMPTS * 40 / 8, "{steps} steps");
}

#[test]
#[ignore = "minutes: 200 answers of SmolLM2, twice"]
fn two_hundred_answers_of_smollm2_are_those_of_plain_decoding() {
    let folder = std::env::var_os("VERBUND_MODELS").map(PathBuf::from);
    let path = folder
        .expect("VERBUND_MODELS; run with `ops/setup env`")
        .join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let file = ModelFile::open(path).unwrap();
    let tokenizer = Arc::new(crate::text::load(&file).unwrap().tokenizer);
    let load = || {
        let plan = ShardPlan::whole(&file.config().unwrap(), 512).unwrap();
        let device = Cpu::new(2, Isa::detect());
        RankModel::load(&file, &plan, Box::new(Local::default()), device).unwrap()
    };
    let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/../ops/examples/");
    // One of them is in Latin-1, as such files are.
    let read = |name: &str| {
        let bytes = std::fs::read(format!("{examples}{name}")).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let questions = read("questions.jsonl");
    let text = read("buerger-faq.md") + &read("benutzungsordnung-buergerhaus.txt");
    let words: Vec<&str> = text.split_inclusive(char::is_whitespace).collect();
    let prompts: Vec<Vec<u32>> = (0..PROMPTS)
        .map(|i| {
            let from = i * 13 % (words.len() - 80);
            let passage = words[from..from + 30 + i % 50].concat();
            let line = questions
                .lines()
                .nth(i % questions.lines().count())
                .unwrap();
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let question = line["question"].as_str().unwrap();
            let prompt = format!("{passage}\n\n{question}\n\nZitat: ");
            tokenizer.encode(&prompt, Parse::Plain).unwrap()
        })
        .collect();
    let plain = answers(load(), tokenizer.clone(), &prompts, (4, 48), None);
    for cost in [
        None,
        Some((|rows| 0.010 + 0.0002 * rows as f64) as fn(usize) -> f64),
    ] {
        let counts = Arc::new(Counts::default());
        let timed = Timed {
            inner: Speculation::new(64),
            cost,
            counts: counts.clone(),
        };
        let drafted = answers(load(), tokenizer.clone(), &prompts, (4, 48), Some(timed));
        let differ = drafted.iter().zip(&plain).filter(|(d, p)| d != p).count();
        let [steps, right, wrong] =
            [&counts.steps, &counts.right, &counts.wrong].map(|c| c.load(Ordering::Relaxed));
        println!("{steps} steps, {right} right, {wrong} wrong");
        assert_eq!(differ, 0);
        assert!(cost.is_none() || right > 1000, "{right} right");
    }
}

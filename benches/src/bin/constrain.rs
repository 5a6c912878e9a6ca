//! What keeping to a form costs a token: two engines over one model, one held to it, in turns from step to step.
//!
//! `cargo run --locked --workspace --bin constrain -- --model F --threads 2`
//!
//! The constrained answers are long enough to decode as many tokens as the free ones. The time is that of the steps after the
//! prompt's, so that neither prefill nor compilation is in it; compilation is told by itself.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use benches::pair::Pair;
use benches::report::constrained::{Constrained, Kind};
use clap::Parser;
use coordinator::Redacted;
use coordinator::ids::TenantId;
use serde_json::json;
use worker::client::{Constraint, Format, GenerateRequest, Prompt, Sampling};

#[derive(Parser)]
struct Options {
    /// A GGUF file.
    #[arg(long)]
    model: PathBuf,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Tokens of each answer.
    #[arg(short = 'n', long, default_value_t = 200)]
    tokens: u32,
    /// Turns of each kind.
    #[arg(long, default_value_t = 7)]
    turns: usize,
}

/// Forms that no answer of a few hundred tokens completes.
fn kinds() -> Vec<(&'static str, Format)> {
    let schema = |schema: serde_json::Value| Format::Schema {
        schema: Redacted::new(schema.to_string()),
        param: "schema".into(),
    };
    let text = json!({"type": "string", "minLength": 5000});
    let record = json!({
        "type": "object", "additionalProperties": false,
        "properties": {
            "aktenzeichen": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,6}$"},
            "art": {"enum": ["Antrag", "Beschwerde", "Auskunft"]},
            "frist": {"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]},
            "betreff": {"type": "string", "maxLength": 60},
            "gebuehr": {"type": "number", "minimum": 0, "maximum": 1000}
        },
        "required": ["aktenzeichen", "art", "frist", "betreff", "gebuehr"]
    });
    let records = json!({"type": "array", "items": record, "minItems": 100});
    let pattern = Redacted::new("([a-zäöüß]{1,12} ){1000}".to_owned());
    vec![
        ("long text in JSON", schema(text)),
        ("records", schema(records)),
        (
            "regular expression",
            Format::Regex {
                pattern,
                param: "pattern".into(),
            },
        ),
    ]
}

fn main() -> Result<()> {
    let options = Options::parse();
    let pair = Pair::start(&options.model, options.threads, [None, None])?;
    let engine = pair.engine(0)?;
    let vocabulary_tokens = engine.tokenizer().vocab_size();
    let started = Instant::now();
    engine.constrainer().warm();
    let vocabulary_ms = millis(started);

    let mut report = Constrained {
        vocabulary_tokens,
        vocabulary_ms,
        free_ms_per_token: 0.0,
        tokens: options.tokens,
        turns: options.turns,
        kinds: Vec::new(),
    };
    let mut free_times = Vec::new();
    for (name, format) in kinds() {
        let request = request(Some(format), options.tokens);
        let started = Instant::now();
        // Cancelled at once; the grammar is kept.
        drop(engine.generate(&request)?);
        let compile_ms = millis(started);
        let free = self::request(None, options.tokens);
        let (mut times, mut overheads) = (Vec::new(), Vec::new());
        for turn in 0..options.turns {
            // Who goes first changes, so that a machine that warms up or slows down favours nobody.
            let [held_ms, free_ms] = ms_per_token(&pair, [&request, &free], turn % 2)?;
            times.push(held_ms);
            free_times.push(free_ms);
            overheads.push((held_ms / free_ms - 1.0) * 100.0);
        }
        report.kinds.push(Kind {
            name: name.into(),
            compile_ms,
            ms_per_token: median(&mut times),
            overhead_percent: median(&mut overheads),
        });
    }
    report.free_ms_per_token = median(&mut free_times);
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

fn request(format: Option<Format>, tokens: u32) -> GenerateRequest {
    GenerateRequest {
        tenant: TenantId::new("bench").unwrap_or_else(|_| unreachable!("a tenant's id")),
        model: "bench".into(),
        prompt: Prompt::Text(Redacted::new(
            "Die Stadt beschließt folgende Satzung:".into(),
        )),
        max_tokens: Some(tokens),
        sampling: Sampling::greedy(),
        stop: Vec::new(),
        echo: false,
        priority: Default::default(),
        timeout_ms: None,
        constraint: format.map(|format| Constraint {
            format: Some(format),
            calls: None,
        }),
        logprobs: None,
    }
}

/// Milliseconds a token of each.
fn ms_per_token(pair: &Pair, requests: [&GenerateRequest; 2], first: usize) -> Result<[f64; 2]> {
    let answers = pair.answer(requests, first)?;
    for (answer, request) in answers.iter().zip(requests) {
        let wanted = request.max_tokens.unwrap_or_default() as usize - 1;
        let tokens = answer.tokens;
        ensure!(
            tokens == wanted,
            "an answer ended {tokens} tokens after its first, expected {wanted}"
        );
    }
    Ok(answers.map(|answer| answer.seconds * 1000.0 / answer.tokens as f64))
}

fn millis(started: Instant) -> f64 {
    started.elapsed().as_secs_f64() * 1000.0
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

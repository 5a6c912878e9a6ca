//! What guessing ahead gains: answers with and without it, by kind, as the program `speculate` measures them.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::Setting;
use super::engine::json_of;

/// The kind of answers drawn from documents; every other kind has nothing to gain.
pub const QUOTES: &str = "quotes";
/// Goals: of answers from documents, and of the slowest of all other answers.
const GAIN: f64 = 1.5;
const LOSS: f64 = 0.97;

/// What came out for one kind of answer.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Row {
    /// Different answers; each was taken in every round.
    pub answers: usize,
    /// Tokens whose time was taken: the first of each answer belongs to its prompt.
    pub tokens: usize,
    pub plain_tokens_per_s: f64,
    pub speculating_tokens_per_s: f64,
    /// Speculating over plain, all answers together; over 1 is faster.
    pub ratio: f64,
    /// Of the one answer that gained least, in the median of its rounds.
    pub lowest_ratio: f64,
    pub drafts_right: u64,
    pub drafts_wrong: u64,
}

/// All that the program reports.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Speculation {
    pub threads: usize,
    pub isa: String,
    /// Processes that wanted to run when it began and when it ended, over one minute.
    pub load: [f64; 2],
    /// By model and kind of answer.
    pub rows: BTreeMap<String, BTreeMap<String, Row>>,
}

/// Runs the program that stands beside this one.
pub fn run(setting: &Setting) -> Result<Speculation> {
    let program = std::env::current_exe()?.with_file_name("speculate");
    let (shape, tokens, rounds, open_rounds) = if setting.quick {
        ("llama-tiny-shape.Q8_0.gguf", 24, 1, 1)
    } else {
        ("llama-1b-shape.Q4_0.gguf", 96, 1, 3)
    };
    let mut command = Command::new(program);
    command
        .args(["--json", "--model"])
        .arg(setting.default_model())
        .arg("--shape")
        .arg(setting.shape(shape))
        .arg("--examples")
        .arg(setting.root.join("ops/examples"))
        .args(["--threads", &setting.threads.to_string()])
        .args(["--tokens", &tokens.to_string()])
        .args(["--rounds", &rounds.to_string()])
        .args(["--open-rounds", &open_rounds.to_string()]);
    if setting.quick {
        command.args(["--answers", "2"]);
    }
    json_of(&mut command)
}

/// The table.
pub fn table(speculation: &Speculation) -> String {
    let mut text = String::from(
        "One stream, every answer with and without guessing ahead, both at once, one step of this and one of that, so that the \
         machine's load meets both alike; both answers were compared and are the same. *Quotes* are answers from the example \
         documents as a clerk could give them, dictated to the model token by token; *own words* what SmolLM2 itself says to the \
         same prompts; *open* what it says to questions without a source, sampled (dictated to the 1B shape). \"Lowest\" is the one \
         answer that gained least, in the median of its rounds (open: three, else one).\n\n\
         | model | answers | number | plain | guessing | ratio | lowest | right guesses | goal |\n\
         | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for (model, kinds) in &speculation.rows {
        for (kind, row) in kinds {
            let (goal, ok) = if kind == QUOTES {
                (format!("≥ {GAIN}"), row.ratio >= GAIN)
            } else {
                (format!("lowest ≥ {LOSS}"), row.lowest_ratio >= LOSS)
            };
            let drafts = row.drafts_right + row.drafts_wrong;
            let right = match drafts {
                0 => "none made".into(),
                n => format!("{:.0} % of {n}", 100.0 * row.drafts_right as f64 / n as f64),
            };
            text.push_str(&format!(
                "| {model} | {kind} | {} | {:.1} | {:.1} | {:.2} | {:.2} | {right} | {goal} {} |\n",
                row.answers,
                row.plain_tokens_per_s,
                row.speculating_tokens_per_s,
                row.ratio,
                row.lowest_ratio,
                if ok { "✓" } else { "✗" }
            ));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_must_gain_and_nothing_else_may_lose() {
        let row = |ratio, lowest_ratio| Row {
            answers: 3,
            ratio,
            lowest_ratio,
            drafts_right: 3,
            drafts_wrong: 1,
            ..Row::default()
        };
        let kinds = [(QUOTES, row(1.6, 0.8)), ("open", row(1.1, 0.96))];
        let kinds: BTreeMap<_, _> = kinds.map(|(k, r)| (k.to_owned(), r)).into();
        let text = table(&Speculation {
            threads: 2,
            isa: "avx2".into(),
            load: [0.0; 2],
            rows: [("small".to_owned(), kinds)].into(),
        });
        let line = |kind: &str| {
            let found = text.lines().find(|l| l.contains(&format!("| {kind} |")));
            found.unwrap_or_default().to_owned()
        };
        assert!(line("quotes").ends_with("75 % of 4 | ≥ 1.5 ✓ |"), "{text}");
        assert!(line("open").ends_with("lowest ≥ 0.97 ✗ |"), "{text}");
    }
}

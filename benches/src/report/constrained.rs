//! What keeping to a form costs a token: answers of the same model held to a schema and free, in turns, as the program
//! `constrain` measures them.

use std::process::Command;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::Setting;
use super::engine::json_of;

/// Most that a form may cost, percent a token.
const GOAL_PERCENT: f64 = 5.0;

/// All that the program reports.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Constrained {
    pub vocabulary_tokens: usize,
    /// What preparing the vocabulary takes, once a model.
    pub vocabulary_ms: f64,
    pub free_ms_per_token: f64,
    /// Of each answer.
    pub tokens: u32,
    /// Pairs of a held and a free answer, of each form.
    pub turns: usize,
    pub kinds: Vec<Kind>,
}

/// A form.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kind {
    pub name: String,
    /// Until its first request is queued, once a form.
    pub compile_ms: f64,
    pub ms_per_token: f64,
    /// Over the free answer of the same turn, in percent: the median of the turns.
    pub overhead_percent: f64,
}

/// Runs the program that stands beside this one, with the small model: the shorter a step, the more a mask weighs.
pub fn run(setting: &Setting) -> Result<Constrained> {
    let model = setting.default_model();
    ensure!(
        model.is_file(),
        "{} is not there; `ops/setup models` fetches it",
        model.display()
    );
    let program = std::env::current_exe()?.with_file_name("constrain");
    let (tokens, turns) = if setting.quick {
        ("40", "1")
    } else {
        ("200", "15")
    };
    let mut command = Command::new(program);
    command
        .arg("--model")
        .arg(model)
        .args(["--threads", &setting.threads.to_string()])
        .args(["-n", tokens, "--turns", turns]);
    json_of(&mut command)
}

/// The table.
pub fn table(c: &Constrained) -> String {
    let mut text = format!(
        "SmolLM2 135M Q4_1, one stream without speculation, {} tokens an answer; {} pairs of a held and a free answer in turns, the \
         median of their ratios. Free: {:.2} ms a token. Preparing the vocabulary of {} tokens takes {:.0} ms, once a model.\n\n\
         | form | compiled, once | a token | overhead | goal |\n| --- | ---: | ---: | ---: | ---: |\n",
        c.tokens, c.turns, c.free_ms_per_token, c.vocabulary_tokens, c.vocabulary_ms
    );
    for kind in &c.kinds {
        text.push_str(&format!(
            "| {} | {:.1} ms | {:.2} ms | {:.1} % | ≤ {GOAL_PERCENT} % {} |\n",
            kind.name,
            kind.compile_ms,
            kind.ms_per_token,
            kind.overhead_percent,
            if kind.overhead_percent <= GOAL_PERCENT {
                "✓"
            } else {
                "✗"
            }
        ));
    }
    text
}

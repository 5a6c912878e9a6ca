//! What ranks pay for being several: the `allreduce` program's tables, and a model on two ranks beside one.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Setting;

/// Most seconds for the sums.
const SUMS_S: &str = "330";
/// What ranks must reach of one process.
const SHARE: f64 = 0.95;

/// What the program reported.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Collectives {
    /// Its tables, as it wrote them, or why there are none.
    pub sums: Result<String, String>,
    /// What each format does to a model's predictions, as a table.
    pub quality: Result<String, String>,
    pub model: String,
    /// Best prefill and decode tokens a second by set-up (`one`, `shm`, `tcp`).
    pub ranks: Result<BTreeMap<String, (f64, f64)>, String>,
}

/// Runs both halves of the program that stands beside this one.
pub fn run(setting: &Setting) -> Result<Collectives> {
    let program = std::env::current_exe()?.with_file_name("allreduce");
    let (model, name) = if setting.quick {
        (setting.default_model(), "SmolLM2 135M Q4_1")
    } else {
        (setting.shape("llama-1b-shape.Q4_0.gguf"), "1B Q4_0")
    };
    let said = |e: anyhow::Error| format!("{e:#}");
    Ok(Collectives {
        sums: sums(setting, &program).map_err(said),
        quality: quality(setting, &program).map_err(said),
        model: name.into(),
        ranks: ranks(setting, &program, &model).map_err(said),
    })
}

fn sums(setting: &Setting, program: &Path) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let markdown = folder.path().join("tables.md");
    let mut command = Command::new(program);
    command
        .args(["net", "--realtime", "--most-s", SUMS_S, "--markdown"])
        .arg(&markdown)
        .arg("--svg")
        .arg(&setting.results);
    if setting.quick {
        command.arg("--quick");
    }
    output_of(&mut command)?;
    Ok(std::fs::read_to_string(&markdown)?)
}

fn quality(setting: &Setting, program: &Path) -> Result<String> {
    let mut command = Command::new(program);
    command
        .args(["quality", "--model"])
        .arg(setting.default_model())
        .arg("--text")
        .arg(setting.root.join("LICENSE"))
        .args(["--threads", &setting.threads.to_string()])
        .args(["--chunks", if setting.quick { "1" } else { "8" }]);
    output_of(&mut command)
}

fn ranks(setting: &Setting, program: &Path, model: &Path) -> Result<BTreeMap<String, (f64, f64)>> {
    let (prefill, decode) = if setting.quick {
        ("32", "4")
    } else {
        ("512", "64")
    };
    let mut command = Command::new(program);
    command
        .args(["ranks", "--model"])
        .arg(model)
        .args(["--threads", &setting.threads.to_string()])
        .args(["--rounds", &setting.rounds.to_string()])
        .args(["-p", prefill, "-n", decode]);
    let best = best_of(&output_of(&mut command)?);
    ensure!(!best.is_empty(), "the program reported no set-up");
    Ok(best)
}

fn output_of(command: &mut Command) -> Result<String> {
    let out = command
        .output()
        .with_context(|| format!("{:?} does not start", command.get_program()))?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{}: {}", out.status, said.trim());
    Ok(String::from_utf8(out.stdout)?)
}

/// Reads lines as `round 0 shm: prefill 61.5 decode 7.9 tokens/s`.
fn best_of(text: &str) -> BTreeMap<String, (f64, f64)> {
    let mut best = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, _, name, "prefill", prefill, "decode", decode, ..] = words.as_slice() else {
            continue;
        };
        if let (Ok(prefill), Ok(decode)) = (prefill.parse(), decode.parse()) {
            let kept = best
                .entry(name.trim_end_matches(':').to_owned())
                .or_insert((0.0f64, 0.0f64));
            *kept = (kept.0.max(prefill), kept.1.max(decode));
        }
    }
    best
}

/// Both tables.
pub fn table(collectives: &Collectives) -> String {
    let mut text = String::new();
    match &collectives.ranks {
        Ok(ranks) => {
            text.push_str(&format!(
                "{}, tokens/s; goal: at least {SHARE} of one process in both.\n\n| set-up | prefill | decode | of one process |\n| --- | ---: | ---: | ---: |\n",
                collectives.model
            ));
            let one = ranks.get("one").copied();
            for (name, &(prefill, decode)) in ranks {
                let share = one.filter(|_| name != "one").map_or("".into(), |(p, d)| {
                    let (p, d) = (prefill / p, decode / d);
                    format!(
                        "{p:.2} / {d:.2} {}",
                        if p.min(d) >= SHARE { "✓" } else { "✗" }
                    )
                });
                let name = match name.as_str() {
                    "one" => "one process of all threads",
                    "shm" => "ranks of one thread, shared memory",
                    "tcp" => "ranks of one thread, TCP on loopback",
                    other => other,
                };
                text.push_str(&format!(
                    "| {name} | {prefill:.1} | {decode:.1} | {share} |\n"
                ));
            }
        }
        Err(why) => text.push_str(&format!("Ranks not measured: {why}\n")),
    }
    match &collectives.sums {
        Ok(tables) => {
            for ranks in 2..=4 {
                text.push_str(&format!(
                    "\n![Time of a sum of {ranks} ranks over message size](benchmarks/allreduce-{ranks}.svg)\n"
                ));
            }
            text.push('\n');
            text.push_str(tables.trim());
            text.push('\n');
        }
        Err(why) => text.push_str(&format!("\nSums not measured: {why}\n")),
    }
    match &collectives.quality {
        Ok(table) => text.push_str(&format!(
            "\n**What the formats do to the predictions of SmolLM2 135M on the licence's text, 2 ranks**\n\n{}\n",
            table.trim()
        )),
        Err(why) => text.push_str(&format!("\nFormats not compared: {why}\n")),
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_best_of_the_rounds_counts() {
        let best = super::best_of(
            "round 0 one: prefill 100.0 decode 10.0 tokens/s\nround 1 one: prefill 90 decode 11 tokens/s\nround 0 tcp: prefill 95.0 decode NaN tokens/s\nother",
        );
        assert_eq!(best["one"], (100.0, 11.0));
        assert_eq!(best["tcp"].0, 95.0);
    }
}

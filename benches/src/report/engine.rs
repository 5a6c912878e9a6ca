//! Prefill and decode of one process, beside llama.cpp on the same file and threads, and beside the machine's limits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use worker::bench::{BenchReport, Limits};

use super::Setting;

/// What is run on a model.
#[derive(Debug, Clone)]
struct Case {
    name: &'static str,
    path: PathBuf,
    prefill: usize,
    decode: usize,
    batches: &'static [usize],
    /// How often it is measured, ours and the peer's in turn.
    rounds: usize,
}

impl Case {
    /// Tokens that each of so many sequences decodes: several need fewer to be measured as well as one.
    fn decode_of(&self, batch: usize) -> usize {
        if batch == 1 {
            self.decode
        } else {
            self.decode.div_ceil(2)
        }
    }
}

/// Tokens a second, best of the rounds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Rates {
    pub prefill: Option<f64>,
    /// By the number of sequences at once, all together.
    pub decode: BTreeMap<usize, f64>,
}

impl Rates {
    fn keep_best(&mut self, other: Rates) {
        self.prefill = self
            .prefill
            .into_iter()
            .chain(other.prefill)
            .reduce(f64::max);
        for (batch, rate) in other.decode {
            let kept = self.decode.entry(batch).or_insert(rate);
            *kept = kept.max(rate);
        }
    }
}

/// A model's figures.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    pub model: String,
    pub prefill_tokens: usize,
    pub decode_tokens: usize,
    pub ours: Rates,
    /// Or why there are none.
    pub peer: Result<Rates, String>,
    pub candle: Option<Rates>,
    /// In the mean.
    pub limits: Option<Limits>,
    /// Ours over what the 8-bit peak allowed just before and after.
    pub prefill_share: Option<f64>,
    /// Ours, of one sequence, over what reading the weights allowed just before and after.
    pub decode_share: Option<f64>,
}

/// The middle one.
fn middle(mut all: Vec<f64>) -> Option<f64> {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied()
}

/// Every model's figures, or why a model has none.
pub type Engine = Vec<Result<Row, String>>;

/// Measures all models, ours and the peer in turn.
pub fn run(setting: &Setting) -> Engine {
    let shape = |name: &str| setting.shape(name);
    let (prefill, decode) = if setting.quick { (32, 4) } else { (512, 64) };
    let case = |name, path, prefill, decode, batches| Case {
        name,
        path,
        prefill,
        decode,
        batches,
        rounds: setting.rounds,
    };
    let many: &[usize] = &[1, 4, 8, 16];
    let mut cases = vec![case(
        "SmolLM2 135M Q4_1",
        setting.default_model(),
        prefill,
        decode,
        many,
    )];
    if setting.quick {
        cases.push(case(
            "tiny Q8_0",
            shape("llama-tiny-shape.Q8_0.gguf"),
            prefill,
            decode,
            many,
        ));
    } else {
        for (name, file) in [
            ("1B Q4_0", "llama-1b-shape.Q4_0.gguf"),
            ("1B Q4_K_M", "llama-1b-shape.Q4_K_M.gguf"),
            ("1B Q8_0", "llama-1b-shape.Q8_0.gguf"),
        ] {
            cases.push(case(name, shape(file), 512, 64, &[1, 4, 8]));
        }
        let file = shape("llama-8b-shape.Q4_0.gguf");
        // One round of it takes as long as two of the others.
        cases.push(Case {
            rounds: setting.rounds.div_ceil(2),
            ..case("8B Q4_0", file, 128, 16, &[1, 8])
        });
    }
    let one = |case: &Case| {
        eprintln!("engine: {}", case.name);
        measure(setting, case).map_err(|e| format!("{}: {e:#}", case.name))
    };
    cases.iter().map(one).collect()
}

fn measure(setting: &Setting, case: &Case) -> Result<Row> {
    ensure!(
        case.path.is_file(),
        "{} is not there; `ops/setup bench` makes it",
        case.path.file_name().unwrap_or_default().to_string_lossy()
    );
    let (mut ours, mut reports) = (Rates::default(), Vec::new());
    let mut peer = Ok(Rates::default());
    let mut candle: Option<Rates> = None;
    for _ in 0..case.rounds {
        for (batch, report) in run_ours(setting, case)? {
            ours.keep_best(Rates {
                prefill: report.prefill_tokens_per_s,
                decode: report
                    .decode_tokens_per_s
                    .map(|rate| (batch, rate))
                    .into_iter()
                    .collect(),
            });
            reports.push((batch, report));
        }
        match run_peer(setting, case) {
            Ok(rates) => {
                if let Ok(peer) = &mut peer {
                    peer.keep_best(rates);
                }
            }
            Err(error) => peer = Err(format!("{error:#}")),
        }
        if let Some(rates) = setting
            .candle
            .as_ref()
            .map(|c| run_candle(c, setting, case))
        {
            match rates {
                Ok(rates) => candle.get_or_insert_default().keep_best(rates),
                Err(error) => eprintln!("candle: {error:#}"),
            }
        }
    }
    Ok(Row {
        model: case.name.into(),
        prefill_tokens: case.prefill,
        decode_tokens: case.decode,
        ours,
        peer,
        candle,
        limits: mean_limits(&reports),
        prefill_share: middle(
            reports
                .iter()
                .filter_map(|(_, report)| report.prefill_share_of_peak)
                .collect(),
        ),
        decode_share: middle(
            reports
                .iter()
                .filter(|(batch, _)| *batch == 1)
                .filter_map(|(_, report)| report.decode_share_of_bandwidth)
                .collect(),
        ),
    })
}

/// The mean of what was measured beside each rate.
fn mean_limits(reports: &[(usize, BenchReport)]) -> Option<Limits> {
    let mean = |of: fn(&Limits) -> f64| {
        reports.iter().map(|(_, r)| of(&r.limits)).sum::<f64>() / reports.len() as f64
    };
    (!reports.is_empty()).then(|| Limits {
        read_bytes_per_s: mean(|l| l.read_bytes_per_s),
        decode_steps_per_s: mean(|l| l.decode_steps_per_s),
        int8_ops_per_s: mean(|l| l.int8_ops_per_s),
        prefill_tokens_per_s: mean(|l| l.prefill_tokens_per_s),
    })
}

/// A report for each number of sequences at once.
fn run_ours(setting: &Setting, case: &Case) -> Result<Vec<(usize, BenchReport)>> {
    let one = |(i, &batch): (usize, &usize)| {
        // Prefill once a round.
        let prefill = if i == 0 { case.prefill } else { 0 };
        let mut command = Command::new(&setting.verbund);
        command
            .args(["bench", "--json", "--model"])
            .arg(&case.path)
            .args(["--threads", &setting.threads.to_string()])
            .args(["-p", &prefill.to_string()])
            .args(["-n", &case.decode_of(batch).to_string()])
            .args(["--batch", &batch.to_string()]);
        Ok((batch, json_of(&mut command)?))
    };
    case.batches.iter().enumerate().map(one).collect()
}

#[derive(Deserialize)]
struct PeerReport {
    prefill_tokens_per_s: Option<f64>,
    batches: BTreeMap<usize, f64>,
}

fn run_peer(setting: &Setting, case: &Case) -> Result<Rates> {
    ensure!(
        setting.peer_python.exists(),
        "llama.cpp is not here; `ops/setup bench` compiles it"
    );
    let sizes: Vec<String> = case.batches.iter().map(usize::to_string).collect();
    let mut command = Command::new(&setting.peer_python);
    command
        .arg(setting.root.join("benches/peer.py"))
        .arg("--model")
        .arg(&case.path)
        .args(["--threads", &setting.threads.to_string()])
        .args(["-p", &case.prefill.to_string()])
        .args(["-n", &case.decode.to_string()])
        .args(["--decode-many", &case.decode_of(2).to_string()])
        .args(["--batch", &sizes.join(","), "--repeats", "3"]);
    let report: PeerReport = json_of(&mut command)?;
    Ok(Rates {
        prefill: report.prefill_tokens_per_s,
        decode: report.batches,
    })
}

fn run_candle(engine: &Path, setting: &Setting, case: &Case) -> Result<Rates> {
    #[derive(Deserialize)]
    struct Report {
        prefill_tokens_per_s: f64,
        decode_tokens_per_s: f64,
    }
    let mut command = Command::new(engine);
    command
        .env("RAYON_NUM_THREADS", setting.threads.to_string())
        .args(["--peer", "--model"])
        .arg(&case.path)
        .args(["--prefill", &case.prefill.to_string()])
        .args(["--decode", &case.decode.to_string()]);
    let report: Report = json_of(&mut command)?;
    Ok(Rates {
        prefill: Some(report.prefill_tokens_per_s),
        decode: BTreeMap::from([(1, report.decode_tokens_per_s)]),
    })
}

/// Runs a program that prints one JSON object.
pub(super) fn json_of<T: serde::de::DeserializeOwned>(command: &mut Command) -> Result<T> {
    let out = command
        .output()
        .with_context(|| format!("{:?} does not start", command.get_program()))?;
    let said = String::from_utf8_lossy(&out.stderr);
    let last: Vec<&str> = said.lines().rev().take(3).collect();
    ensure!(out.status.success(), "{}: {}", out.status, last.join(" / "));
    serde_json::from_slice(&out.stdout).context("the output is not the expected JSON")
}

/// The goals, as ratios to llama.cpp: prefill, decode, eight at once.
fn goals(model: &str) -> Option<[f64; 3]> {
    match model {
        "1B Q4_0" | "1B Q4_K_M" | "8B Q4_0" => Some([2.5, 1.9, 4.0]),
        "SmolLM2 135M Q4_1" => Some([1.5; 3]),
        _ => None,
    }
}

/// The part of the machine's read bandwidth that one sequence's decoding shall reach.
fn bandwidth_goal(model: &str) -> Option<f64> {
    match model {
        "1B Q4_0" | "1B Q4_K_M" | "8B Q4_0" => Some(0.80),
        "1B Q8_0" => Some(0.85),
        _ => None,
    }
}

/// A table of all models.
pub fn table(engine: &Engine) -> String {
    let mut text = String::from(
        "| model | what | ours | of the limit | llama.cpp | of the limit | ratio | goal |\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    let mut notes = Vec::new();
    for row in engine {
        match row {
            Ok(row) => {
                rows(row, &mut text);
                if let Err(why) = &row.peer {
                    notes.push(format!("{}: no peer: {why}", row.model));
                }
            }
            Err(why) => notes.push(format!("Not measured: {why}")),
        }
    }
    for note in notes {
        text.push_str(&format!("\n{note}\n"));
    }
    text
}

fn rows(row: &Row, text: &mut String) {
    let goals = goals(&row.model);
    let peer = row.peer.as_ref().ok();
    let mut line = |what: String,
                    ours: Option<f64>,
                    peer: Option<f64>,
                    (our_share, of_limit): (Option<f64>, Option<f64>),
                    goal: Option<f64>| {
        let rate = |r: Option<f64>| r.map_or("–".into(), |r| format!("{r:.1}"));
        let share = |s: Option<f64>| s.map_or("–".into(), |s| format!("{:.0} %", 100.0 * s));
        let ratio = ours.zip(peer).map(|(o, p)| o / p);
        let peer_share = our_share.zip(ratio).map(|(share, ratio)| share / ratio);
        let met = |seen: Option<f64>, goal: Option<f64>| match (seen, goal) {
            (Some(seen), Some(goal)) if seen >= goal => " ✓",
            (Some(_), Some(_)) => " ✗",
            _ => "",
        };
        let goals = [
            goal.map(|g| format!("{g}")),
            of_limit.map(|g| format!("{:.0} % of the limit", 100.0 * g)),
        ];
        let goals: Vec<String> = goals.into_iter().flatten().collect();
        text.push_str(&format!(
            "| {} | {what} | {} | {}{} | {} | {} | {}{} | {} |\n",
            row.model,
            rate(ours),
            share(our_share),
            met(our_share, of_limit),
            rate(peer),
            share(peer_share),
            ratio.map_or("–".into(), |r| format!("{r:.2}")),
            met(ratio, goal),
            goals.join(", "),
        ));
    };
    line(
        format!("prefill {}", row.prefill_tokens),
        row.ours.prefill,
        peer.and_then(|p| p.prefill),
        (row.prefill_share, None),
        goals.map(|g| g[0]),
    );
    for (&batch, &rate) in &row.ours.decode {
        // Of many sequences at once, weights read once a step are no limit any more.
        let share = row.decode_share.filter(|_| batch == 1);
        let goal = goals.and_then(|g| match batch {
            1 => Some(g[1]),
            8 => Some(g[2]),
            _ => None,
        });
        line(
            format!("decode, {batch} at once"),
            Some(rate),
            peer.and_then(|p| p.decode.get(&batch).copied()),
            (share, share.and(bandwidth_goal(&row.model))),
            goal,
        );
    }
    if let Some(candle) = &row.candle {
        let rate = |r: Option<f64>| r.map_or("–".into(), |r| format!("{r:.1}"));
        text.push_str(&format!(
            "| {} | candle, prefill / decode × 1 | {} / {} | | | | {} / {} | |\n",
            row.model,
            rate(candle.prefill),
            rate(candle.decode.get(&1).copied()),
            rate(row.ours.prefill.zip(candle.prefill).map(|(o, c)| o / c)),
            rate(
                row.ours
                    .decode
                    .get(&1)
                    .zip(candle.decode.get(&1))
                    .map(|(o, c)| o / c)
            ),
        ));
    }
}

/// The limits measured beside the figures.
pub fn limits(engine: &Engine) -> String {
    let limits: Vec<Limits> = engine.iter().flatten().filter_map(|r| r.limits).collect();
    let span = |of: fn(&Limits) -> f64| {
        let all = || limits.iter().map(|l| of(l) / 1e9);
        (
            all().fold(f64::INFINITY, f64::min),
            all().fold(0.0, f64::max),
        )
    };
    if limits.is_empty() {
        return String::new();
    }
    let (read, peak) = (span(|l| l.read_bytes_per_s), span(|l| l.int8_ops_per_s));
    format!(
        "Limits, measured for a third of a second before and after each of our rates: {:.1} to {:.1} GB/s streaming read, {:.0} to {:.0} G \
         operations a second of 8-bit products, in the mean of each model. A share is that of a rate in what was measured around it; the \
         peer's is the same divided by the ratio.\n",
        read.0, read.1, peak.0, peak.1
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_says_what_was_met_and_what_could_not_run() {
        let row = Row {
            model: "1B Q4_0".into(),
            prefill_tokens: 512,
            decode_tokens: 64,
            ours: Rates {
                prefill: Some(300.0),
                decode: BTreeMap::from([(1, 19.0), (8, 100.0)]),
            },
            peer: Ok(Rates {
                prefill: Some(100.0),
                decode: BTreeMap::from([(1, 15.0), (8, 20.0)]),
            }),
            candle: None,
            limits: Some(Limits {
                read_bytes_per_s: 1e10,
                decode_steps_per_s: 38.0,
                int8_ops_per_s: 1e12,
                prefill_tokens_per_s: 600.0,
            }),
            prefill_share: Some(0.5),
            decode_share: Some(0.5),
        };
        let text = table(&vec![Ok(row), Err("8B Q4_0: no file".into())]);
        for line in [
            "| 1B Q4_0 | prefill 512 | 300.0 | 50 % | 100.0 | 17 % | 3.00 ✓ | 2.5 |",
            "| 1B Q4_0 | decode, 1 at once | 19.0 | 50 % ✗ | 15.0 | 39 % | 1.27 ✗ | 1.9, 80 % of the limit |",
            "| 1B Q4_0 | decode, 8 at once | 100.0 | – | 20.0 | – | 5.00 ✓ | 4 |",
            "Not measured: 8B Q4_0: no file",
        ] {
            assert!(text.contains(line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn the_best_of_the_rounds_is_kept() {
        let mut best = Rates::default();
        for (prefill, decode) in [(10.0, 5.0), (12.0, 4.0)] {
            best.keep_best(Rates {
                prefill: Some(prefill),
                decode: BTreeMap::from([(1, decode)]),
            });
        }
        assert_eq!((best.prefill, best.decode[&1]), (Some(12.0), 5.0));
    }
}

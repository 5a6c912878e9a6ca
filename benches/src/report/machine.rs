//! What a figure depends on besides the code: machine, commit, and what else was running.

use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// Where and when a part was measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    pub cpu: String,
    pub isa: String,
    pub cores: usize,
    pub memory_gib: f64,
    pub threads: usize,
    pub commit: String,
    /// Day of the run, UTC.
    pub day: String,
    /// Processes that wanted to run in the minute before the part began (1-minute load average).
    pub load_before: f64,
    /// What the part took; 0 where it was not noted.
    #[serde(default)]
    pub seconds: f64,
}

impl Provenance {
    /// Of this machine, now.
    pub fn now(root: &Path, threads: usize) -> Self {
        let field = |path: &str, name: &str| {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let line = text.lines().find(|l| l.starts_with(name)).unwrap_or("");
            line.split_once(':')
                .map_or("", |(_, v)| v)
                .trim()
                .to_owned()
        };
        let said = |program: &str, arguments: &[&str]| {
            let out = Command::new(program)
                .args(arguments)
                .current_dir(root)
                .output();
            let out = out.map(|o| o.stdout).unwrap_or_default();
            String::from_utf8_lossy(&out).trim().to_owned()
        };
        let kib = field("/proc/meminfo", "MemTotal");
        let kib: f64 = kib.trim_end_matches(" kB").parse().unwrap_or(0.0);
        let changed = !said("git", &["status", "--porcelain", "--", ":!docs"]).is_empty();
        let commit = said("git", &["rev-parse", "--short=10", "HEAD"]);
        Provenance {
            cpu: field("/proc/cpuinfo", "model name"),
            isa: kernels::Isa::detect().name().into(),
            cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            memory_gib: kib / (1024.0 * 1024.0),
            threads,
            commit: if changed {
                format!("{commit} with changes")
            } else {
                commit
            },
            day: said("date", &["-u", "+%F"]),
            load_before: load(),
            seconds: 0.0,
        }
    }

    /// One line under a table.
    pub fn line(&self) -> String {
        format!(
            "*{}, {} cores, {}, {:.0} GiB, {} threads; commit {}, {}; load average {:.1} when it began{}{}.*",
            self.cpu,
            self.cores,
            self.isa,
            self.memory_gib,
            self.threads,
            self.commit,
            self.day,
            self.load_before,
            match self.seconds {
                0.0 => String::new(),
                seconds => format!(", {:.1} minutes", seconds / 60.0),
            },
            if self.load_before > 0.5 * self.cores as f64 {
                " — **the machine was busy with other work**"
            } else {
                ""
            }
        )
    }
}

/// The 1-minute load average.
pub fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let first = text.split(' ').next().unwrap_or_default();
    first.parse().unwrap_or(f64::NAN)
}

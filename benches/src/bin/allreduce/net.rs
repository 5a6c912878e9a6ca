//! The all-reduce over every kind of connection, beside its floors: what is measured, and how it is written down.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use benches::plot::{self, Series};
use clap::Args;
use serde::Serialize;
use worker::collective::{Sealing, Wire};

use crate::measure::{self, Cell, Setting, Transport};
use crate::relay::Line;

const DELAYS_MS: [f64; 3] = [0.05, 0.2, 1.0];
const RATES_GBIT: [f64; 2] = [1.0, 10.0];
const SIZES: [usize; 8] = [
    1 << 10,
    4 << 10,
    16 << 10,
    64 << 10,
    256 << 10,
    1 << 20,
    4 << 20,
    16 << 20,
];
/// Largest sum over a slow line: each call takes its time whatever is measured, and larger ones follow the same line.
const SLOW_BYTES: usize = 4 << 20;
const RANKS: [usize; 3] = [2, 3, 4];
/// Time for the calls of one cell, about.
const BUDGET: Duration = Duration::from_millis(60);
/// What a rank may add to the way of a small message.
const ALLOWED_US: f64 = 15.0;
/// Sums up to this size count as small.
const SMALL_BYTES: usize = 64 << 10;

#[derive(Args)]
pub struct Options {
    /// Fewer sizes, formats and lines: under a minute
    #[arg(long)]
    quick: bool,
    /// Begin no further group after so many seconds; what is left out is said
    #[arg(long, default_value_t = 1200, value_name = "SECONDS")]
    most_s: u64,
    /// Only this many ranks
    #[arg(long)]
    ranks: Option<usize>,
    /// Only connections whose name contains this, as "shm" or "0.2 ms"
    #[arg(long)]
    only: Option<String>,
    /// Keep other programs off the cores while ranks want them, to measure on a busy machine (needs root)
    #[arg(long)]
    realtime: bool,
    /// Every cell as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Tables; on standard output when absent
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Pictures over message size, as allreduce-2.svg for 2 ranks, in this folder
    #[arg(long, value_name = "FOLDER")]
    svg: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    seconds: f64,
    realtime: bool,
    cells: Vec<Cell>,
    /// Why kinds of connection are missing.
    left_out: Vec<String>,
}

pub fn run(options: &Options) -> Result<()> {
    let start = Instant::now();
    let (mut cells, mut left_out) = (Vec::new(), Vec::new());
    for transport in transports(options.quick) {
        let name = transport.name();
        if options
            .only
            .as_ref()
            .is_some_and(|part| !name.contains(part))
        {
            continue;
        }
        for ranks in RANKS {
            if options.ranks.is_some_and(|only| only != ranks) {
                continue;
            }
            if start.elapsed() > Duration::from_secs(options.most_s) {
                let most_s = options.most_s;
                left_out.push(format!("{ranks} ranks, {name}: {most_s} s were over"));
                continue;
            }
            let settings = settings(transport, options.quick);
            let sizes: Vec<usize> = SIZES
                .into_iter()
                .filter(|&size| !options.quick || [4 << 10, 64 << 10, 1 << 20].contains(&size))
                .filter(|&size| !transport.is_slow() || size <= SLOW_BYTES)
                .collect();
            match measure::group(
                transport,
                ranks,
                &settings,
                &sizes,
                BUDGET,
                options.realtime,
            ) {
                Ok(measured) => cells.extend(measured),
                Err(error) => left_out.push(format!("{ranks} ranks, {name}: {error:#}")),
            }
        }
    }
    plain_exchanges(&mut cells);
    let report = Report {
        seconds: start.elapsed().as_secs_f64(),
        realtime: options.realtime,
        cells,
        left_out,
    };
    let write = |path: &PathBuf, text: &str| {
        std::fs::write(path, text).with_context(|| path.display().to_string())
    };
    if let Some(path) = &options.json {
        write(path, &serde_json::to_string_pretty(&report)?)?;
    }
    if let Some(folder) = &options.svg {
        for ranks in RANKS {
            if report.cells.iter().any(|c| c.ranks == ranks) {
                let path = folder.join(format!("allreduce-{ranks}.svg"));
                write(&path, &picture(&report.cells, ranks)?)?;
            }
        }
    }
    let text = markdown(&report);
    match &options.markdown {
        Some(path) => write(path, &text),
        None => {
            print!("{text}");
            Ok(())
        }
    }
}

fn transports(quick: bool) -> Vec<Transport> {
    let mut all = vec![Transport::Shm, Transport::Loopback];
    for delay_ms in DELAYS_MS {
        for gbit in RATES_GBIT {
            if quick && (delay_ms, gbit) != (0.05, 10.0) {
                continue;
            }
            all.push(Transport::Line(Line {
                delay: Duration::from_secs_f64(delay_ms / 1e3),
                bits_per_s: gbit * 1e9,
            }));
        }
    }
    all
}

fn settings(transport: Transport, quick: bool) -> Vec<Setting> {
    let encrypted = |wire| Setting {
        wire,
        sealing: Sealing::Encrypted,
    };
    // Nothing of these travels through memory.
    if transport == Transport::Shm {
        return vec![encrypted(Wire::Exact)];
    }
    let formats = Wire::ALL.into_iter();
    let mut all: Vec<Setting> = formats
        .filter(|&wire| !quick || [Wire::Exact, Wire::Int8].contains(&wire))
        .map(encrypted)
        .collect();
    all.push(Setting {
        wire: Wire::Exact,
        sealing: Sealing::ClearForMeasuring,
    });
    all
}

/// Writes beside each sum what a plain exchange of as many bytes took over the same kind of connection, by a line through its sizes. On
/// loopback, which has neither a known delay nor a rate, that is the floor.
fn plain_exchanges(cells: &mut [Cell]) {
    let mut names: Vec<String> = cells.iter().map(|c| c.transport.clone()).collect();
    names.dedup();
    for name in names {
        let mut bare: Vec<(f64, f64)> = cells
            .iter()
            .filter(|c| c.format == "bare" && c.transport == name)
            .map(|c| (c.wire_bytes as f64, c.median_us))
            .collect();
        bare.sort_by(|a, b| a.0.total_cmp(&b.0));
        let at = |bytes: f64| {
            let pair = bare
                .windows(2)
                .find(|pair| bytes <= pair[1].0)
                .or(bare.windows(2).last())?;
            let slope = (pair[1].1 - pair[0].1) / (pair[1].0 - pair[0].0);
            Some((pair[0].1 + slope * (bytes - pair[0].0)).max(bare[0].1))
        };
        for cell in cells
            .iter_mut()
            .filter(|c| c.format != "bare" && c.transport == name)
        {
            cell.bare_us = at(((cell.ranks - 1) * cell.wire_bytes) as f64);
            if name == "loopback" {
                cell.floor_us = cell.bare_us;
            }
        }
    }
}

fn markdown(report: &Report) -> String {
    let mut out = String::new();
    let cells = &report.cells;
    let _ = writeln!(
        out,
        "Size: the summed numbers as f32. Floor: one-way delay + bytes/rate of the faster way (one hop, or shares); on loopback a \
         plain, busy-polled TCP exchange of as many bytes. Times in µs: median / p99 (× floor), of each call the mean of all ranks. Lines are a relay \
         between namespaces in the measuring process: it shares the cores with the ranks. Measured in {:.0} s{}.\n",
        report.seconds,
        if report.realtime {
            ", with real-time priority"
        } else {
            ""
        }
    );
    for ranks in RANKS {
        let of = |c: &&Cell| c.ranks == ranks && c.format == "exact" && c.encrypted;
        let mut names: Vec<&str> = Vec::new();
        let mut sizes: Vec<usize> = Vec::new();
        for cell in cells.iter().filter(of) {
            if !names.contains(&cell.transport.as_str()) {
                names.push(&cell.transport);
            }
            if !sizes.contains(&cell.bytes) {
                sizes.push(cell.bytes);
            }
        }
        if names.is_empty() {
            continue;
        }
        let _ = writeln!(out, "**{ranks} ranks, `exact`, encrypted**\n");
        let _ = writeln!(out, "| size | {} |", names.join(" | "));
        let _ = writeln!(out, "| ---: |{}", " ---: |".repeat(names.len()));
        for &bytes in &sizes {
            let _ = write!(out, "| {} |", size(bytes));
            for name in &names {
                let found = cells
                    .iter()
                    .filter(of)
                    .find(|c| c.bytes == bytes && c.transport == *name);
                let _ = write!(out, " {} |", found.map_or(String::new(), times));
            }
            let _ = writeln!(out);
        }
        let _ = writeln!(out);
    }
    formats(&mut out, cells);
    encryption(&mut out, cells);
    small(&mut out, cells);
    for why in &report.left_out {
        let _ = writeln!(out, "Not measured: {why}");
    }
    out
}

fn times(cell: &Cell) -> String {
    let ratio = cell
        .floor_us
        .map(|floor| format!(" (×{:.2})", cell.median_us / floor));
    format!(
        "{:.0} / {:.0}{}",
        cell.median_us,
        cell.p99_us,
        ratio.unwrap_or_default()
    )
}

/// Each format beside the exact one.
fn formats(out: &mut String, cells: &[Cell]) {
    let _ = writeln!(out, "**Formats, 2 ranks, encrypted: median in µs**\n");
    let _ = writeln!(
        out,
        "| connection | size | plain TCP | exact | f32 | bf16 | int8 |"
    );
    let _ = writeln!(out, "| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for base in cells
        .iter()
        .filter(|c| c.ranks == 2 && c.format == "exact" && c.encrypted)
    {
        if base.transport == "shm" || ![16 << 10, 64 << 10, 1 << 20, 4 << 20].contains(&base.bytes)
        {
            continue;
        }
        let median = |format: &str| {
            let same = |c: &&Cell| {
                (c.ranks, c.bytes, &c.transport) == (2, base.bytes, &base.transport)
                    && c.format == format
                    && (c.encrypted || format == "bare")
            };
            cells
                .iter()
                .find(same)
                .map_or("–".into(), |c| format!("{:.0}", c.median_us))
        };
        let columns = ["bare", "exact", "f32", "bf16", "int8"].map(median);
        let _ = writeln!(
            out,
            "| {} | {} | {} |",
            base.transport,
            size(base.bytes),
            columns.join(" | ")
        );
    }
    let _ = writeln!(out);
}

/// What encryption costs where nothing else does.
fn encryption(out: &mut String, cells: &[Cell]) {
    let _ = writeln!(
        out,
        "**Encryption, loopback, `exact`: median in µs without → with**\n"
    );
    let _ = writeln!(out, "| size | 2 ranks | 3 ranks | 4 ranks |");
    let _ = writeln!(out, "| ---: | ---: | ---: | ---: |");
    for bytes in SIZES {
        let pair = |ranks: usize| {
            let median = |encrypted: bool| {
                let same = |c: &&Cell| {
                    (c.ranks, c.bytes, c.encrypted) == (ranks, bytes, encrypted)
                        && c.transport == "loopback"
                        && c.format == "exact"
                };
                cells.iter().find(same).map(|c| c.median_us)
            };
            Some(format!("{:.0} → {:.0}", median(false)?, median(true)?))
        };
        let pairs = RANKS.map(|ranks| pair(ranks).unwrap_or_else(|| "–".into()));
        if pairs.iter().any(|p| p != "–") {
            let _ = writeln!(out, "| {} | {} |", size(bytes), pairs.join(" | "));
        }
    }
    let _ = writeln!(out);
}

/// How many small sums keep what was promised.
fn small(out: &mut String, cells: &[Cell]) {
    let small = || {
        cells.iter().filter(|c| {
            c.bytes <= SMALL_BYTES && c.format != "bare" && c.encrypted && c.gbit_per_s.is_some()
        })
    };
    for ranks in RANKS {
        let of = || small().filter(|c| c.ranks == ranks);
        let floor = |c: &Cell| c.floor_us.unwrap_or(f64::NAN) + ALLOWED_US;
        let count = of().count();
        if count == 0 {
            continue;
        }
        let median = of().filter(|c| c.median_us <= floor(c)).count();
        let p99 = of().filter(|c| c.p99_us <= 2.0 * floor(c)).count();
        let mut over: Vec<f64> = of().map(|c| c.median_us + ALLOWED_US - floor(c)).collect();
        over.sort_by(f64::total_cmp);
        let _ = writeln!(
            out,
            "{ranks} ranks over lines, up to {}: median at most floor + {ALLOWED_US:.0} µs in {median} of {count} cells (the middle one is \
             {:.0} µs above its floor), p99 at most twice that in {p99}.\n",
            size(SMALL_BYTES),
            over[over.len() / 2]
        );
        let above = |c: &Cell| Some((c.median_us - c.bare_us?, c.bare_us? - c.floor_us?));
        let (mut ours, mut bare): (Vec<f64>, Vec<f64>) = of().filter_map(above).unzip();
        ours.sort_by(f64::total_cmp);
        bare.sort_by(f64::total_cmp);
        if let (Some(middle), Some(bare)) = (ours.get(ours.len() / 2), bare.get(bare.len() / 2)) {
            let kept = ours.iter().filter(|&&us| us <= ALLOWED_US).count();
            let _ = writeln!(
                out,
                "A plain TCP exchange of as many bytes over the same lines is itself {bare:.0} µs above that floor in the middle, which is the \
                 relay's and the kernel's part: median at most that + {ALLOWED_US:.0} µs in {kept} of {count} cells (the middle one is \
                 {middle:.0} µs above it).\n"
            );
        }
    }
}

fn size(bytes: usize) -> String {
    match bytes {
        b if b >= 1 << 20 => format!("{} MiB", b >> 20),
        b => format!("{} KiB", b >> 10),
    }
}

/// Medians of exact sums over size: a line for each kind of connection, the floors of those with a rate dashed.
fn picture(cells: &[Cell], ranks: usize) -> Result<String> {
    let mut series: Vec<Series> = Vec::new();
    let shown = [
        "shm",
        "loopback",
        "0.05 ms, 10 Gbit/s",
        "0.2 ms, 1 Gbit/s",
        "1 ms, 1 Gbit/s",
    ];
    for name in shown {
        let of: Vec<&Cell> = cells
            .iter()
            .filter(|c| {
                (c.ranks, c.transport.as_str()) == (ranks, name)
                    && c.format == "exact"
                    && c.encrypted
            })
            .collect();
        if of.is_empty() {
            continue;
        }
        let measured = of.iter().map(|c| (c.bytes as f64, c.median_us));
        series.push(Series {
            name: name.into(),
            points: measured.collect(),
            dashed: false,
        });
        if name.contains("Gbit") {
            let floors = of
                .iter()
                .filter_map(|c| Some((c.bytes as f64, c.floor_us?)));
            series.push(Series {
                name: format!("{name}, floor"),
                points: floors.collect(),
                dashed: true,
            });
        }
    }
    plot::lines(
        &format!("All-reduce of {ranks} ranks, exact, encrypted: median"),
        "bytes of the summed numbers as f32",
        "µs",
        true,
        true,
        &series,
    )
}

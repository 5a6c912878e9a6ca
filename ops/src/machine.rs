//! What this machine has: memory, and how fast it reads it.

use std::fs;
use std::hint::black_box;

use coordinator::clock;
use coordinator::ids::{Device, DeviceKind};

/// Read to measure; larger than the caches of one core, small enough to take milliseconds.
const PROBE_BYTES: usize = 64 << 20;

/// Bytes that programs can still take, by the kernel's estimate; 1 GiB where it gives none.
pub fn available_bytes() -> u64 {
    meminfo("MemAvailable:").unwrap_or(1 << 30)
}

/// All of the machine's memory; 1 GiB where the kernel does not say.
pub fn total_bytes() -> u64 {
    meminfo("MemTotal:").unwrap_or(1 << 30)
}

fn meminfo(field: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with(field))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Streaming read of the memory with one thread, in bytes per second: the best of three passes.
pub fn read_bytes_per_s() -> u64 {
    let words = vec![1_u64; PROBE_BYTES / 8];
    let pass = || {
        let start = clock::monotonic();
        black_box(
            words
                .iter()
                .fold(0_u64, |sum, word| sum.wrapping_add(*word)),
        );
        start.elapsed().as_secs_f64()
    };
    let best = (0..3)
        .map(|_| pass())
        .fold(f64::INFINITY, f64::min)
        .max(1e-6);
    (PROBE_BYTES as f64 / best) as u64
}

/// The processor's name, for tables.
pub fn cpu_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|l| {
        l.strip_prefix("model name")?
            .split_once(':')
            .map(|(_, n)| n.trim().to_owned())
    });
    name.unwrap_or_else(|| "CPU".to_owned())
}

/// The CPU as a device for a rank; what `section` leaves open is measured.
pub fn cpu_device(section: &crate::config::WorkerSection) -> Device {
    let cores = std::thread::available_parallelism()
        .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
    let or = |given: u64, measure: fn() -> u64| if given == 0 { measure() } else { given };
    Device {
        kind: DeviceKind::Cpu,
        name: cpu_name(),
        memory_bytes: or(section.memory_bytes, || total_bytes() / 4 * 3),
        read_bytes_per_s: or(section.read_bytes_per_s, read_bytes_per_s),
        threads: if section.threads == 0 {
            cores
        } else {
            section.threads
        },
    }
}

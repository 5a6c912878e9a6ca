//! Microbenchmark of the kernels against this machine's measured floors.
//!
//! `kernels [THREADS] [PART OF A NAME]` prints, for the matrix shapes of SmolLM2 and of Llama 3.2 1B in each format: how fast one row
//! is multiplied (decode: bytes of weights a second, and the share of the measured reading speed), and how fast several (answers at
//! once) and 512 are (prefill: operations a second, and the share of the measured 8-bit peak). Matrices for all but prefill are as many
//! as exceed the caches, except SmolLM2's, whose whole model fits in them.

use std::time::Instant;

use kernels::{BLOCK_TOKENS, Cpu, Device, Format, Isa, KvFormat, SeqSpan, WeightRows, measure};

const PREFILL_ROWS: usize = 512;
const FEW_ROWS: [usize; 5] = [2, 4, 8, 16, 64];
/// Seconds that each measurement may take.
const BUDGET_S: f64 = 0.3;
/// Weights that are cycled through in decode.
const DECODE_BYTES: usize = 128 << 20;

fn main() {
    let threads = std::env::args()
        .nth(1)
        .and_then(|a| a.parse().ok())
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
    let part = std::env::args().nth(2).unwrap_or_default();
    let cpu = Cpu::new(threads, Isa::detect());
    let (read, peak) = (
        measure::read_bandwidth(threads),
        measure::int8_peak(threads),
    );
    println!(
        "{threads} threads, {}: reads {:.1} GB/s, 8-bit products {:.0} GOPS",
        cpu.isa(),
        read / 1e9,
        peak / 1e9
    );
    print!(
        "{:<30} {:>12} {:>6}",
        "shape, format", "decode GB/s", "share"
    );
    for rows in FEW_ROWS {
        print!(" {:>7}", format!("{rows} rows"));
    }
    println!(" {:>14} {:>6}", "512 rows, GOPS", "share");
    let smol = [Format::Q4_1, Format::Q8_0, Format::F16];
    let large = [
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q8_0,
        Format::Q4_K,
        Format::Q5_K,
        Format::Q6_K,
        Format::F16,
        Format::BF16,
        Format::F32,
    ];
    let shapes: [(&str, usize, usize, &[Format], usize); 7] = [
        ("SmolLM2 576x576", 576, 576, &smol, 0),
        ("SmolLM2 gate 1536x576", 1536, 576, &smol, 0),
        ("SmolLM2 down 576x1536", 576, 1536, &smol, 0),
        ("1B gate 8192x2048", 8192, 2048, &large, DECODE_BYTES),
        ("1B key 512x2048", 512, 2048, &large, DECODE_BYTES),
        (
            "1B output 2048x2048",
            2048,
            2048,
            &[Format::Q4_0, Format::Q4_K],
            DECODE_BYTES,
        ),
        (
            "1B down 2048x8192",
            2048,
            8192,
            &[Format::Q4_0, Format::Q4_K],
            DECODE_BYTES,
        ),
    ];
    for (name, rows, cols, formats, bytes) in shapes {
        for &format in formats {
            let name = format!("{name} {format:?}");
            if !name.contains(&part) {
                continue;
            }
            let rates = matmul(&cpu, format, rows, cols, bytes);
            print!(
                "{name:<30} {:>12.2} {:>5.0}%",
                rates.decode / 1e9,
                100.0 * rates.decode / rates.read
            );
            for few in rates.few {
                print!(" {:>7.0}", few / 1e9);
            }
            println!(
                " {:>14.0} {:>5.0}%",
                rates.prefill / 1e9,
                100.0 * rates.prefill / peak
            );
        }
    }
    if "attention".contains(&part) {
        attention(&cpu);
    }
}

/// Calls `f` until the budget is used up; the best time of one call.
fn best(mut f: impl FnMut()) -> f64 {
    let (begin, mut best) = (Instant::now(), f64::INFINITY);
    while begin.elapsed().as_secs_f64() < BUDGET_S {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

struct Rates {
    /// Bytes a second that are read at most, before and after the next in the mean: memory may be twice as fast a minute later.
    read: f64,
    /// Bytes of weights a second, with one row.
    decode: f64,
    /// Operations a second with [`FEW_ROWS`].
    few: [f64; FEW_ROWS.len()],
    /// The same with [`PREFILL_ROWS`].
    prefill: f64,
}

fn matmul(cpu: &Cpu, format: Format, rows: usize, cols: usize, bytes: usize) -> Rates {
    // Zero scales and codes: no kernel's speed depends on the values.
    let data = vec![0u8; rows * format.row_bytes(cols)];
    let copies = bytes.div_ceil(data.len()).max(1);
    let packed: Vec<_> = (0..copies)
        .map(|_| {
            cpu.pack(WeightRows::new(format, rows, cols, &data))
                .expect("memory for the weights")
        })
        .collect();
    let x: Vec<f32> = (0..PREFILL_ROWS * cols)
        .map(|i| ((i * 31 % 127) as f32 - 63.0) / 64.0)
        .collect();
    let mut out = vec![0.0; PREFILL_ROWS * rows];
    let mut all = |count: usize| {
        best(|| {
            packed
                .iter()
                .for_each(|w| cpu.matmul(&[w], &x, count, &mut [&mut out]))
        })
    };
    let threads = cpu.threads();
    let before = measure::read_bandwidth(threads);
    let decode = all(1);
    let read = (before + measure::read_bandwidth(threads)) / 2.0;
    let few = FEW_ROWS.map(|count| (2 * rows * cols * count * copies) as f64 / all(count));
    let prefill = best(|| cpu.matmul(&[&packed[0]], &x, PREFILL_ROWS, &mut [&mut out]));
    let weights: usize = packed.iter().map(|w| cpu.matrix_bytes(w)).sum();
    Rates {
        read,
        decode: weights as f64 / decode,
        few,
        prefill: (2 * rows * cols * PREFILL_ROWS) as f64 / prefill,
    }
}

fn attention(cpu: &Cpu) {
    let shapes = [(9, 3, 64, 2048), (32, 8, 64, 2048), (64, 8, 128, 8192)];
    for (format, (heads, kv_heads, dim, context)) in shapes
        .into_iter()
        .flat_map(|shape| KvFormat::ALL.map(|format| (format, shape)))
    {
        let blocks: Vec<u32> = (0..(context as u32 + 512) / 16).collect();
        let kv = cpu
            .kv_alloc(format, 1, kv_heads, dim, blocks.len())
            .expect("memory for the cache");
        let q = vec![0.1; 512 * heads * dim];
        let mut out = q.clone();
        let mut time = |rows, context| {
            let span = SeqSpan {
                first_row: 0,
                rows,
                context,
                blocks: &blocks,
            };
            best(|| cpu.attention(&q, &kv, 0, heads, &[span], &mut out))
        };
        let (decode, prefill) = (time(1, context), time(512, 0));
        let bytes = (format.head_block_bytes(dim) * kv_heads * context / BLOCK_TOKENS) as f64;
        println!(
            "attention {heads}/{kv_heads} heads of {dim}, {format}: one row over {context}: {:.0} µs, {:.1} GB/s; 512 rows: {:.1} ms, {:.0} GFLOPS",
            decode * 1e6,
            bytes / decode / 1e9,
            prefill * 1e3,
            (2 * 512 * 512 * heads * dim) as f64 / prefill / 1e9
        );
    }
}

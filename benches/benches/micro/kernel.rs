//! Matrices of every format times one to many rows, and attention over contexts of several lengths.

use std::fmt;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use kernels::{BLOCK_TOKENS, Cpu, Device, Format, Isa, KvFormat, SeqSpan, WeightRows};

/// A part of Llama 3.2 1B's gate matrix: the cache holds none of its copies.
const ROWS: usize = 2048;
const COLS: usize = 2048;
/// Weights that are cycled through, so that they come from memory as they do when a model decodes.
const CYCLED_BYTES: usize = 96 << 20;

fn cpu() -> Cpu {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    Cpu::new(threads, Isa::detect())
}

#[derive(Clone, Copy)]
struct Product {
    format: Format,
    rows: usize,
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} × {}", self.format, self.rows)
    }
}

fn products() -> Vec<Product> {
    use Format::{F16, Q4_0, Q4_1, Q4_K, Q6_K, Q8_0};
    [Q4_0, Q4_1, Q4_K, Q6_K, Q8_0, F16]
        .into_iter()
        .flat_map(|format| [1, 2, 4, 8, 16, 32, 64, 512].map(|rows| Product { format, rows }))
        .collect()
}

/// Items are multiply-and-add pairs, bytes those of the weights.
#[divan::bench(args = products(), sample_count = 20)]
fn matmul(bencher: Bencher, product: Product) {
    let Product { format, rows } = product;
    let cpu = cpu();
    // Zero scales and codes: no kernel's speed depends on the values.
    let data = vec![0u8; ROWS * format.row_bytes(COLS)];
    let copies = CYCLED_BYTES.div_ceil(data.len());
    let packed: Vec<_> = (0..copies)
        .map(|_| cpu.pack(WeightRows::new(format, ROWS, COLS, &data)))
        .map(|matrix| matrix.expect("memory for the weights"))
        .collect();
    let x: Vec<f32> = (0..rows * COLS)
        .map(|i| ((i * 31 % 127) as f32 - 63.0) / 64.0)
        .collect();
    let mut out = vec![0.0; rows * ROWS];
    let mut next = packed.iter().cycle();
    bencher
        .counter(ItemsCount::new(ROWS * COLS * rows))
        .counter(BytesCount::new(cpu.matrix_bytes(&packed[0])))
        .bench_local(|| {
            if let Some(matrix) = next.next() {
                cpu.matmul(&[matrix], &x, rows, &mut [&mut out]);
            }
        });
}

/// A number of positions, kept in a format.
#[derive(Clone, Copy)]
struct Cached {
    format: KvFormat,
    positions: usize,
}

impl fmt::Display for Cached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {}", self.format, self.positions)
    }
}

fn cached<const N: usize>(positions: [usize; N]) -> impl Iterator<Item = Cached> {
    let of = move |format| positions.map(|positions| Cached { format, positions });
    KvFormat::ALL.into_iter().flat_map(of)
}

/// One row of each of several sequences, over the heads of Llama 3.2 1B; bytes are those of the cache that is read.
#[divan::bench(args = cached([128, 1024, 8192]), consts = [1, 8], sample_count = 20)]
fn attention_decode<const SEQUENCES: usize>(bencher: Bencher, context: Cached) {
    attention(bencher, context.format, SEQUENCES, 1, context.positions);
}

/// A whole prompt that attends to itself.
#[divan::bench(args = cached([128, 512]), sample_count = 10)]
fn attention_prefill(bencher: Bencher, prompt: Cached) {
    attention(bencher, prompt.format, 1, prompt.positions, 0);
}

fn attention(bencher: Bencher, format: KvFormat, sequences: usize, rows: usize, context: usize) {
    const HEADS: usize = 32;
    const KV_HEADS: usize = 8;
    const DIM: usize = 64;
    let cpu = cpu();
    let blocks = (context + rows).div_ceil(BLOCK_TOKENS);
    let kv = cpu
        .kv_alloc(format, 1, KV_HEADS, DIM, sequences * blocks)
        .expect("memory for the cache");
    let tables: Vec<Vec<u32>> = (0..sequences)
        .map(|s| (s * blocks..(s + 1) * blocks).map(|b| b as u32).collect())
        .collect();
    let spans: Vec<SeqSpan> = tables
        .iter()
        .enumerate()
        .map(|(s, blocks)| SeqSpan {
            first_row: s * rows,
            rows,
            context,
            blocks,
        })
        .collect();
    let q = vec![0.1; sequences * rows * HEADS * DIM];
    let mut out = q.clone();
    let read = sequences * blocks * KV_HEADS * format.head_block_bytes(DIM);
    bencher
        .counter(BytesCount::new(read))
        .bench_local(|| cpu.attention(&q, &kv, 0, HEADS, &spans, &mut out));
}

//! What this machine can do at most, in the units in which a kernel's speed is reported.
//!
//! Each takes some tenths of a second; run it at start-up, not beside work that is being timed.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use crate::cpu::bytes::{Bytes, Pages};
use crate::cpu::simd::{Job, Simd, dispatch};
use crate::isa::Isa;

/// Bytes that all threads together stream through: more than any cache of today's servers holds per core used.
const STREAM_BYTES: usize = 256 << 20;
/// Times each measurement is taken where the best counts, since the machine may be busy otherwise.
const ROUNDS: usize = 3;
/// Times where the mean counts: about a third of a second, so that it sees the same neighbours as the work beside which it is taken.
const STEADY_ROUNDS: usize = 40;

/// Bytes a second that `threads` threads read together from memory at best.
pub fn read_bandwidth(threads: usize) -> f64 {
    read(threads, ROUNDS, best)
}

/// The same in the mean of some tenths of a second.
pub fn steady_read_bandwidth(threads: usize) -> f64 {
    read(threads, STEADY_ROUNDS, mean)
}

fn best(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(f64::INFINITY, f64::min)
}

fn mean(seconds: &[f64]) -> f64 {
    seconds.iter().sum::<f64>() / seconds.len().max(1) as f64
}

fn read(threads: usize, rounds: usize, of: fn(&[f64]) -> f64) -> f64 {
    let threads = threads.max(1);
    let isa = Isa::detect();
    let words = STREAM_BYTES / 4 / threads / 64 * 64;
    let failed = AtomicBool::new(false);
    // In huge pages, as weights are, and written once, or all of it would be the one page of zeros.
    let part = || {
        let part = Bytes::zeroed(4 * words, "a measurement", Pages::Huge);
        part.map(|mut part| {
            part.fill(1);
            part
        })
    };
    let seconds = slowest(threads, rounds, part, |part| match part {
        Ok(part) => {
            let sum = Sum(bytemuck::cast_slice(part));
            // SAFETY: `detect` gives an available instruction set; the slice is valid.
            black_box(unsafe { dispatch(isa, sum) });
        }
        Err(_) => failed.store(true, Relaxed),
    });
    if failed.into_inner() {
        // Without the memory to measure with there is nothing to promise.
        return 1.0;
    }
    (words * 4 * threads) as f64 / of(&seconds)
}

/// Operations a second (a multiply and an add counted as two) of 8-bit products with 32-bit sums, all operands in registers, at best.
pub fn int8_peak(threads: usize) -> f64 {
    products(threads, ROUNDS, best)
}

/// The same in the mean of some tenths of a second.
pub fn steady_int8_peak(threads: usize) -> f64 {
    products(threads, STEADY_ROUNDS, mean)
}

fn products(threads: usize, rounds: usize, of: fn(&[f64]) -> f64) -> f64 {
    let threads = threads.max(1);
    let isa = Isa::detect();
    let operations = AtomicU64::new(0);
    let seconds = slowest(
        threads,
        rounds,
        || (),
        |()| {
            // SAFETY: `detect` gives an available instruction set.
            let done = unsafe { dispatch(isa, Dots) };
            operations.store(done as u64, Relaxed);
        },
    );
    (operations.into_inner() as usize * threads) as f64 / of(&seconds)
}

/// Each round's seconds until the last of `threads` threads has done `work` on what `make` gave it.
fn slowest<T: Send>(
    threads: usize,
    rounds: usize,
    make: impl Fn() -> T + Sync,
    work: impl Fn(&T) + Sync,
) -> Vec<f64> {
    let barrier = Barrier::new(threads);
    let thread = || {
        let part = make();
        let mut all = Vec::with_capacity(rounds);
        for _ in 0..rounds {
            barrier.wait();
            let start = Instant::now();
            work(&part);
            all.push(start.elapsed().as_secs_f64());
        }
        all
    };
    let all: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(thread)).collect();
        handles
            .into_iter()
            .filter_map(|handle| handle.join().ok())
            .collect()
    });
    let round = |i: usize| all.iter().map(|seconds| seconds[i]).fold(1e-9, f64::max);
    (0..rounds).map(round).collect()
}

struct Sum<'a>(&'a [f32]);

impl Job for Sum<'_> {
    type Out = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: 64 floats a chunk are whole vectors.
        unsafe {
            let mut sums = [S::splat(0.0); 4];
            for chunk in self.0.chunks_exact(64) {
                for i in (0..64).step_by(S::LANES) {
                    let sum = &mut sums[i / S::LANES % 4];
                    *sum = S::add(*sum, S::load(chunk.as_ptr().add(i)));
                }
            }
            S::sum(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
        }
    }
}

/// Vectors of weights and, at most, of activations: their products are independent sums, enough to hide a latency.
const WEIGHTS: usize = 3;
const ACTIVATIONS: usize = 4;
const DOT_LOOPS: usize = 4 << 20;

/// Products a loop, as many as there are registers for.
const fn chains(wide: bool) -> usize {
    WEIGHTS * if wide { ACTIVATIONS } else { ACTIVATIONS / 2 }
}

struct Dots;

impl Job for Dots {
    /// Operations done.
    type Out = f64;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f64 {
        let bytes = black_box([1u8; 64 * ACTIVATIONS]);
        // SAFETY: 64 bytes are a whole vector.
        unsafe {
            let w = [
                S::splat_byte(black_box(1)),
                S::splat_byte(black_box(2)),
                S::splat_byte(black_box(3)),
            ];
            let mut sums = [[S::splat_int(0); WEIGHTS]; ACTIVATIONS];
            for _ in 0..DOT_LOOPS {
                // Read again each time, or the products would be computed once.
                let x = black_box(bytes.as_ptr());
                for (i, sums) in sums[..chains(S::WIDE_TILE) / WEIGHTS]
                    .iter_mut()
                    .enumerate()
                {
                    let x = S::load_bytes(x.add(64 * i));
                    for (sum, &w) in sums.iter_mut().zip(&w) {
                        *sum = S::dot(*sum, w, x);
                    }
                }
            }
            let mut total = 0.0;
            for sum in sums.as_flattened() {
                total += S::sum(S::int_to_float(S::widen(*sum)));
            }
            black_box(total);
            (DOT_LOOPS * chains(S::WIDE_TILE) * S::LANES * 4 * 2) as f64
        }
    }
}

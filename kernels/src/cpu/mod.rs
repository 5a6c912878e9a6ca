//! The processor as a [`Device`]: this file cuts operations into tasks; what a task computes is in the other rooms.
//!
//! [`layout`]: packed weights. [`activations`]: rows as bytes. [`matmul_int`], [`matmul_float`], [`output`], [`kv`],
//! [`attention`], [`layer`], [`candidates`]: kernels, written once over [`simd`]'s vectors. [`pool`]: the threads. No model and no file format is known here.

mod activations;
mod attention;
pub(crate) mod bytes;
mod candidates;
mod kv;
mod layer;
mod layout;
mod matmul_float;
mod matmul_int;
mod output;
mod pool;
pub(crate) mod simd;

use std::sync::{Mutex, PoisonError};

pub use kv::Kv;
pub use layout::Matrix;

use activations::{Quantise, XBlock};
use candidates::Summarise;
use layer::{AddSum, Angles, RmsNorm, Rotate, SiluGate};
use layout::{BLOCK, STRIP, parts};
use matmul_float::MultiplyFloats;
use matmul_int::{MultiplyInts, wants_strips};
use output::Output;
use pool::Pool;
use simd::{Job, dispatch};

use crate::candidates::{Allowed, Head};
use crate::device::{Device, Error, KvFormat, Rope, SeqSpan, WeightRows};
use crate::isa::Isa;

/// Floats for which an elementwise operation is worth another thread (about 5 µs of work).
const TASK_FLOATS: usize = 16 << 10;
/// The same for products of a matrix or of attention.
const TASK_PRODUCTS: usize = 32 << 10;

/// The processor: an instruction set and some threads.
pub struct Cpu {
    isa: Isa,
    pool: Pool,
    /// Where packed matrices lie.
    weights: bytes::Arena,
    /// The activations of the matmul under way, kept for its memory.
    quantised: Mutex<Vec<XBlock>>,
    /// The angles of the step under way: every layer rotates by the same.
    angles: Mutex<std::sync::Arc<Angles>>,
}

impl Cpu {
    /// A processor of `threads` threads (at least one, the caller's included) that uses `isa`, or the best it has where it
    /// lacks that.
    pub fn new(threads: usize, isa: Isa) -> Cpu {
        let available = Isa::available();
        let isa = if available.contains(&isa) {
            isa
        } else {
            *available.last().unwrap_or(&Isa::Scalar)
        };
        Cpu {
            isa,
            pool: Pool::new(threads.max(1)),
            weights: bytes::Arena::default(),
            quantised: Mutex::default(),
            angles: Mutex::default(),
        }
    }

    /// Threads that work on one operation.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// # Safety
    /// The job's pointers are valid as it says.
    unsafe fn run<J: Job>(&self, job: J) -> J::Out {
        // SAFETY: `new` took only an available instruction set; the rest is passed on to the caller.
        unsafe { dispatch(self.isa, job) }
    }

    /// Cuts `rows` of `width` floats into tasks of whole rows: calls `f(first, count)`.
    fn by_rows(&self, rows: usize, width: usize, f: impl Fn(usize, usize) + Sync) {
        let per_task = TASK_FLOATS
            .div_ceil(width.max(1))
            .max(rows.div_ceil(4 * self.threads()));
        self.pool.run(rows.div_ceil(per_task), &|i| {
            let first = i * per_task;
            f(first, per_task.min(rows - first));
        });
    }

    /// Into how many tasks to cut `strips` strips of so many products each.
    fn tasks(&self, strips: usize, strip_products: usize) -> usize {
        (8 * self.threads())
            .min(strips * strip_products / TASK_PRODUCTS)
            .clamp(1, strips.max(1))
    }

    /// Calls `f` with `x[rows, cols]` as the matrices `w` read it.
    fn with_input(
        &self,
        w: &[&Matrix],
        x: &[f32],
        rows: usize,
        cols: usize,
        f: impl FnOnce(&Input<'_>),
    ) {
        let mut kept = self.quantised.try_lock().ok();
        let mut own = Vec::new();
        let blocks = kept.as_deref_mut().unwrap_or(&mut own);
        let biased = wants_strips(self.isa, w, rows);
        if w.iter().any(|w| w.format.is_quantised()) {
            self.quantise(x, rows, cols, biased, group(w), blocks);
        }
        f(&Input {
            floats: x,
            blocks,
            biased,
            rows,
            cols,
        });
    }

    /// Multiplies `x` by `strips` of `w`, whose columns come in parts that end behind those of `ends`.
    ///
    /// # Safety
    /// The matrix has these strips and the input's columns, the last of which ends the last part; the input was made for its format,
    /// `out` has room, and nobody else writes these strips' columns of it.
    unsafe fn multiply(
        &self,
        w: &Matrix,
        ends: &[usize],
        strips: std::ops::Range<usize>,
        x: &Input<'_>,
        out: Output,
    ) {
        if strips.is_empty() || x.rows == 0 {
            return;
        }
        // SAFETY: passed on to the caller.
        unsafe {
            if w.format.is_quantised() {
                MultiplyInts {
                    w,
                    ends,
                    strips,
                    x: x.blocks.as_ptr(),
                    stride: x.cols / BLOCK,
                    rows: x.rows,
                    biased: x.biased,
                    out,
                }
                .run(self.isa);
            } else {
                self.run(MultiplyFloats {
                    w,
                    ends,
                    strips,
                    x: x.floats.as_ptr(),
                    rows: x.rows,
                    out,
                });
            }
        }
    }

    fn quantise(
        &self,
        x: &[f32],
        rows: usize,
        cols: usize,
        biased: bool,
        group: usize,
        out: &mut Vec<XBlock>,
    ) {
        let blocks = cols / BLOCK;
        out.clear();
        out.reserve(rows * blocks);
        let to = Shared(out.as_mut_ptr());
        self.by_rows(rows, cols, |first, count| {
            let job = Quantise {
                x: x[first * cols..(first + count) * cols].as_ptr(),
                // SAFETY: within the reserved memory.
                out: unsafe { to.get().add(first * blocks) },
                blocks: count * blocks,
                group,
                biased,
            };
            // SAFETY: `x` has these rows, `out` room for their blocks; tasks do not overlap.
            unsafe { self.run(job) }
        });
        // SAFETY: every block was written.
        unsafe { out.set_len(rows * blocks) };
    }
}

/// Blocks of activations that share a scale for such matrices: what one block of theirs meets.
fn group(w: &[&Matrix]) -> usize {
    w.iter().map(|w| parts(w.format)).max().unwrap_or(1)
}

/// Part `i` of `strips` strips that are cut into `tasks` tasks.
fn part(strips: usize, tasks: usize, i: usize) -> std::ops::Range<usize> {
    i * strips / tasks..(i + 1) * strips / tasks
}

/// Rows of activations, as floats and, where a matrix needs it, as bytes.
struct Input<'a> {
    floats: &'a [f32],
    blocks: &'a [XBlock],
    /// Whether the bytes are biased.
    biased: bool,
    rows: usize,
    cols: usize,
}

/// A pointer that tasks write disjoint parts through.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: each use writes disjoint parts, see there.
unsafe impl<T> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Send for Shared<T> {}

impl<T> Shared<T> {
    fn get(&self) -> *mut T {
        self.0
    }

    /// # Safety
    /// The part lies within the buffer, which outlives the result, and no other task uses it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part<'a>(&self, from: usize, len: usize) -> &'a mut [T] {
        // SAFETY: by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), len) }
    }
}

impl Device for Cpu {
    type Buf = Vec<f32>;
    type Matrix = Matrix;
    type Kv = Kv;

    fn pack(&self, w: WeightRows<'_>) -> Result<Matrix, Error> {
        Matrix::pack(w, self.isa, &self.pool, &self.weights)
    }

    fn matrix_bytes(&self, m: &Matrix) -> usize {
        m.data.len()
    }

    fn matrix_shape(&self, m: &Matrix) -> (usize, usize) {
        (m.rows, m.cols)
    }

    fn alloc(&self, len: usize) -> Result<Vec<f32>, Error> {
        let mut buf = Vec::new();
        let error = Error::Memory {
            bytes: len.saturating_mul(4),
            what: "activations",
        };
        buf.try_reserve_exact(len).map_err(|_| error)?;
        buf.resize(len, 0.0);
        Ok(buf)
    }

    fn upload(&self, src: &[f32], dst: &mut Vec<f32>, offset: usize) {
        dst[offset..offset + src.len()].copy_from_slice(src);
    }

    fn download(&self, src: &Vec<f32>, offset: usize, dst: &mut [f32]) {
        dst.copy_from_slice(&src[offset..offset + dst.len()]);
    }

    fn host<'a>(&self, b: &'a Vec<f32>) -> Option<&'a [f32]> {
        Some(b)
    }

    fn host_mut<'a>(&self, b: &'a mut Vec<f32>) -> Option<&'a mut [f32]> {
        Some(b)
    }

    fn matmul(&self, w: &[&Matrix], x: &Vec<f32>, rows: usize, out: &mut [&mut Vec<f32>]) {
        assert_eq!(w.len(), out.len(), "an output for each matrix");
        let Some(first) = w.first() else { return };
        if w.iter().any(|w| group(&[w]) != group(&[first])) {
            // What one matrix gives does not depend on which others share its rows.
            let (like, unlike): (Vec<_>, Vec<_>) = w
                .iter()
                .zip(out)
                .partition(|(w, _)| group(&[w]) == group(&[first]));
            for some in [like, unlike] {
                let (w, mut out): (Vec<_>, Vec<_>) =
                    some.into_iter().map(|(w, out)| (*w, &mut **out)).unzip();
                self.matmul(&w, x, rows, &mut out);
            }
            return;
        }
        let cols = first.cols;
        assert!(
            x.len() >= rows * cols,
            "x has {} floats, {rows} rows of {cols} are read",
            x.len()
        );
        let mut strips = 0;
        let mut ends = Vec::with_capacity(w.len());
        let mut outs = Vec::with_capacity(w.len());
        for (w, out) in w.iter().zip(out.iter_mut()) {
            assert_eq!(w.cols, cols, "matrices that share x have one width");
            assert_eq!(w.lanes, simd::lanes(self.isa), "packed by another device");
            assert!(
                out.len() >= rows * w.rows,
                "out has {} floats of {rows} × {}",
                out.len(),
                w.rows
            );
            strips += w.strips();
            ends.push(strips);
            outs.push(Shared(out.as_mut_ptr()));
        }
        self.with_input(w, x, rows, cols, |input| {
            let tasks = self.tasks(strips, STRIP * first.lanes * cols * rows);
            self.pool.run(tasks, &|i| {
                let task = part(strips, tasks, i);
                let mut before = 0;
                for ((w, &end), out) in w.iter().zip(&ends).zip(&outs) {
                    let from = task.start.clamp(before, end) - before;
                    let to = task.end.clamp(before, end) - before;
                    before = end;
                    // SAFETY: lengths were asserted; tasks write different strips, that is, different columns of `out`.
                    unsafe {
                        self.multiply(w, &[cols], from..to, input, Output::Floats(out.get()))
                    };
                }
            });
        });
    }

    fn matmul_sum(&self, w: &Matrix, ends: &[usize], x: &Vec<f32>, rows: usize, sum: &mut [f64]) {
        assert!(
            x.len() >= rows * w.cols,
            "x has {} floats, {rows} rows of {} are read",
            x.len(),
            w.cols
        );
        assert_eq!(sum.len(), rows * w.rows, "a sum of {} columns", w.rows);
        assert_eq!(w.lanes, simd::lanes(self.isa), "packed by another device");
        let block = w.format.block_len();
        assert!(
            ends.is_sorted()
                && ends.last() == Some(&w.cols)
                && ends.iter().all(|end| end.is_multiple_of(block)),
            "parts of {} columns end at {ends:?}",
            w.cols
        );
        let strips = w.strips();
        let to = Shared(sum.as_mut_ptr());
        self.with_input(&[w], x, rows, w.cols, |input| {
            let tasks = self.tasks(strips, STRIP * w.lanes * w.cols * rows);
            self.pool.run(tasks, &|i| {
                let task = part(strips, tasks, i);
                // SAFETY: shapes were asserted; tasks write different strips, that is, different columns of `sum`.
                unsafe { self.multiply(w, ends, task, input, Output::Grid(to.get())) };
            });
        });
    }

    fn embed(&self, table: &Matrix, ids: &[u32], out: &mut Vec<f32>, first_row: usize) {
        let cols = table.cols;
        let out = &mut out[first_row * cols..(first_row + ids.len()) * cols];
        let to = Shared(out.as_mut_ptr());
        self.by_rows(ids.len(), cols, |first, count| {
            for (i, &id) in ids[first..first + count].iter().enumerate() {
                // SAFETY: within `out`, one row a turn.
                let row = unsafe { to.part((first + i) * cols, cols) };
                if (id as usize) < table.rows {
                    table.row(id as usize, row);
                } else {
                    row.fill(0.0);
                }
            }
        });
    }

    fn rms_norm(&self, x: &Vec<f32>, weight: &Vec<f32>, rows: usize, eps: f32, out: &mut Vec<f32>) {
        let width = weight.len();
        let (x, out) = (&x[..rows * width], &mut out[..rows * width]);
        let to = Shared(out.as_mut_ptr());
        self.by_rows(rows, width, |first, count| {
            let part = first * width..(first + count) * width;
            // SAFETY: within `out`, rows of this task only.
            unsafe {
                let out = to.part(part.start, part.len());
                self.run(RmsNorm {
                    x: &x[part],
                    weight,
                    eps,
                    out,
                });
            }
        });
    }

    fn add_sum(&self, x: &mut Vec<f32>, sum: &[f64]) {
        let x = &mut x[..sum.len()];
        let to = Shared(x.as_mut_ptr());
        self.by_rows(sum.len(), 1, |first, count| {
            // SAFETY: within `x`, this task's part only.
            unsafe {
                self.run(AddSum {
                    x: to.part(first, count),
                    sum: &sum[first..first + count],
                })
            }
        });
    }

    fn silu_gate(&self, gate: &mut Vec<f32>, up: &Vec<f32>, len: usize) {
        let (gate, up) = (&mut gate[..len], &up[..len]);
        let to = Shared(gate.as_mut_ptr());
        // Whole vectors a task, so that each value is computed the same way wherever the cut is.
        let lines = len.div_ceil(16);
        self.by_rows(lines, 16, |first, count| {
            let part = first * 16..((first + count) * 16).min(len);
            // SAFETY: within `gate`, this task's part only.
            unsafe {
                self.run(SiluGate {
                    gate: to.part(part.start, part.len()),
                    up: &up[part],
                })
            }
        });
    }

    fn rope(&self, x: &mut Vec<f32>, rows: usize, heads: usize, positions: &[u32], rope: &Rope) {
        assert_eq!(positions.len(), rows, "a position for each row");
        assert_eq!(
            rope.inv_freq.len(),
            rope.head_dim / 2,
            "a frequency for each pair"
        );
        let width = heads * rope.head_dim;
        if width == 0 {
            return;
        }
        let x = &mut x[..rows * width];
        let angles = {
            let mut kept = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
            if !kept.fits(positions, rope) {
                *kept = std::sync::Arc::new(Angles::new(positions, rope));
            }
            kept.clone()
        };
        let to = Shared(x.as_mut_ptr());
        self.by_rows(rows, width, |first, count| {
            // SAFETY: within `x`, rows of this task only.
            unsafe {
                let x = to.part(first * width, count * width);
                self.run(Rotate {
                    x,
                    heads,
                    first,
                    angles: &angles,
                    rope,
                });
            }
        });
    }

    fn kv_alloc(
        &self,
        format: KvFormat,
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        blocks: usize,
    ) -> Result<Kv, Error> {
        Kv::new(format, layers, kv_heads, head_dim, blocks)
    }

    fn kv_bytes(&self, kv: &Kv) -> usize {
        kv.bytes()
    }

    fn kv_write(&self, kv: &mut Kv, layer: usize, k: &Vec<f32>, v: &Vec<f32>, slots: &[u32]) {
        let target = kv.target(layer, k.len(), v.len(), slots);
        let kv = &*kv;
        let store = |part: usize| {
            let (head, keys) = (part / 2, part.is_multiple_of(2));
            let rows = if keys { k.as_ptr() } else { v.as_ptr() };
            let job = kv::Store {
                kv,
                target,
                layer,
                head,
                keys,
                rows,
                slots,
            };
            // SAFETY: `target` checked rows and slots; each part writes keys or values of one head.
            unsafe { self.run(job) }
        };
        // By heads, not rows: so parts write apart whatever the slots are.
        let parts = 2 * kv.kv_heads();
        if 2 * slots.len() * kv.width() < TASK_FLOATS {
            (0..parts).for_each(store);
        } else {
            self.pool.run(parts, &store);
        }
    }

    fn attention(
        &self,
        q: &Vec<f32>,
        kv: &Kv,
        layer: usize,
        heads: usize,
        seqs: &[SeqSpan<'_>],
        out: &mut Vec<f32>,
    ) {
        attention::check(kv, layer, heads, seqs, q.len(), out.len());
        let (parts, products) = attention::parts(kv, heads, seqs);
        let to = Shared(out.as_mut_ptr());
        let attend = |part: &attention::Part| {
            let q = q.as_ptr();
            let job = attention::Attend {
                kv,
                layer,
                heads,
                seqs,
                part,
                q,
                out: to.get(),
            };
            // SAFETY: rows, heads and blocks were checked; parts write different rows or heads.
            unsafe { self.run(job) }
        };
        if products < TASK_PRODUCTS {
            parts.iter().for_each(attend);
        } else {
            self.pool.run(parts.len(), &|i| attend(&parts[i]));
        }
    }

    fn heads(
        &self,
        logits: &Vec<f32>,
        width: usize,
        allowed: &[Option<Allowed<'_>>],
        k: usize,
    ) -> Vec<Head> {
        let logits = &logits[..allowed.len() * width];
        // Parts of one size whatever the number of rows, so that a row's sums are the same in any company.
        let per_row = width.div_ceil(TASK_FLOATS);
        let mut parts = vec![Head::default(); allowed.len() * per_row];
        let to = Shared(parts.as_mut_ptr());
        self.pool.run(allowed.len() * per_row, &|i| {
            let (row, first) = (i / per_row, i % per_row * TASK_FLOATS);
            let last = (first + TASK_FLOATS).min(width);
            let job = Summarise {
                logits: &logits[row * width + first..row * width + last],
                first,
                allowed: allowed[row],
                k,
            };
            // SAFETY: one part a task.
            unsafe { to.part(i, 1)[0] = self.run(job) };
        });
        let mut parts = parts.into_iter();
        let rows = allowed.iter();
        rows.map(|_| Head::of_parts(parts.by_ref().take(per_row), k))
            .collect()
    }
}

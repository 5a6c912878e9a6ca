//! What a device computes. Knows no model file, no network, no tenant.
//!
//! Tour:
//! - [`format`]: the block formats of GGUF, and their scalar reference ([`dequantize_row`], [`quantize_row`]).
//! - [`device`]: the operations of a transformer layer behind one interface, [`Device`].
//! - [`cpu`]: that interface on the processor: weights are repacked once for the instruction set ([`Isa`]), then
//!   multiplied on a small thread pool.
//! - [`encoder`]: what a sentence encoder needs beyond that, on plain slices.
//! - [`candidates`]: the head of a row of logits.
//! - [`measure`]: this machine's limits, in the units in which a kernel's speed is reported.
//!
//! Invariants:
//! - A row's result does not depend on how many rows are in the call, nor on the number of threads: bit for bit.
//! - A matrix takes about as many bytes as in its file; quantised weights are never expanded.
//! - Shapes are the caller's promise and are asserted; bytes from a file are checked and give an [`Error`].
//! - `unsafe` stays behind safe functions whose bounds are asserted, and the scalar instruction set is the oracle.

pub mod candidates;
pub mod cpu;
pub mod device;
pub mod encoder;
pub mod format;
pub mod isa;
pub mod measure;

pub use candidates::{Allowed, Head};
pub use cpu::Cpu;
pub use device::{
    BLOCK_TOKENS, Device, Error, KV_GROUP, KvFormat, Rope, SeqSpan, WeightRows, to_grid,
};
pub use format::{Format, dequantize_row, quantize_row};
pub use isa::Isa;

//! The paged KV cache: how a block lies in memory, how rows get in, and how they become floats again. What is done with them is in
//! [`attention`](super::attention).
//!
//! A block's keys lie transposed, `[dim, position]`, so that one vector holds a dimension of each position; its values lie
//! `[position, dim]`. In int8 the scales follow, `[group, position]`, as bf16: it has f32's range, so that neither the smallest values
//! vanish nor large ones overflow as in f16. Scales are rounded up, so that the largest number of a group stays within ±127.

use super::bytes::{Bytes, Pages};
use super::simd::{Job, Simd};
use crate::device::{BLOCK_TOKENS, Error, KV_DIM_STEP, KV_GROUP, KvFormat};

/// Groups of smaller numbers become zeros: the inverse of their scale would not be finite.
const SMALLEST: f32 = 1e-30;
/// The scale of a group that holds NaN or an infinity: bf16's NaN, which every result shows that reads it.
const NOT_FINITE: u16 = 0x7fc0;

/// A paged KV cache of all layers.
pub struct Kv {
    format: KvFormat,
    pub(super) layers: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// `head_dim` rounded up to whole vectors; what lies between is zero.
    pub(super) dim: usize,
    pub(super) blocks: usize,
    /// Bytes of one block's keys, or values, in one head.
    part_bytes: usize,
    /// `[layers, blocks, kv_heads]` parts of `[dim, BLOCK_TOKENS]` numbers
    keys: Bytes,
    /// `[layers, blocks, kv_heads]` parts of `[BLOCK_TOKENS, dim]` numbers
    values: Bytes,
}

impl Kv {
    pub(crate) fn new(
        format: KvFormat,
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        blocks: usize,
    ) -> Result<Kv, Error> {
        let part_bytes = format.part_bytes(head_dim);
        let bytes = [layers, kv_heads, blocks, 2]
            .iter()
            .try_fold(part_bytes, |a, &b| a.checked_mul(b))
            .filter(|&bytes| bytes <= isize::MAX as usize)
            .ok_or(Error::Memory {
                bytes: usize::MAX,
                what: "the KV cache",
            })?;
        // A sequence's block touches a little of every layer.
        let zeroed = || Bytes::zeroed(bytes / 2, "the KV cache", Pages::Sparse);
        Ok(Kv {
            format,
            layers,
            kv_heads,
            head_dim,
            dim: head_dim.next_multiple_of(KV_DIM_STEP),
            blocks,
            part_bytes,
            keys: zeroed()?,
            values: zeroed()?,
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.keys.len() + self.values.len()
    }

    pub(crate) fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Floats of one row of keys.
    pub(crate) fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The byte where a KV head's part of a block begins, in keys and in values.
    fn at(&self, layer: usize, block: usize, head: usize) -> usize {
        ((layer * self.blocks + block) * self.kv_heads + head) * self.part_bytes
    }

    /// The pointers through which [`Store`] writes; everything it is told was checked here.
    pub(crate) fn target(
        &mut self,
        layer: usize,
        k_len: usize,
        v_len: usize,
        slots: &[u32],
    ) -> Target {
        let width = self.width();
        assert!(
            layer < self.layers && k_len >= slots.len() * width && v_len >= slots.len() * width
        );
        for &slot in slots {
            assert!(
                slot as usize / BLOCK_TOKENS < self.blocks,
                "slot {slot} of {} blocks",
                self.blocks
            );
        }
        Target {
            keys: self.keys.as_mut_ptr(),
            values: self.values.as_mut_ptr(),
        }
    }

    /// The keys of one block and head as floats, `[dim, BLOCK_TOKENS]`.
    ///
    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    pub(super) unsafe fn widen_keys<S: Simd>(
        &self,
        layer: usize,
        block: usize,
        head: usize,
        out: &mut [f32],
    ) {
        let at = self.at(layer, block, head);
        let part = &self.keys[at..at + self.part_bytes];
        assert!(out.len() == self.dim * BLOCK_TOKENS);
        // SAFETY: passed on to the caller; a part holds `dim` numbers a position, and in int8 their scales.
        unsafe {
            match self.format {
                KvFormat::F16 => widen_f16::<S>(part, out),
                KvFormat::Int8 => widen_int8_keys::<S>(part, out),
            }
        }
    }

    /// The values of one block and head as floats, `[BLOCK_TOKENS, dim]`.
    ///
    /// # Safety
    /// As [`Simd`].
    #[inline(always)]
    pub(super) unsafe fn widen_values<S: Simd>(
        &self,
        layer: usize,
        block: usize,
        head: usize,
        out: &mut [f32],
    ) {
        let at = self.at(layer, block, head);
        let part = &self.values[at..at + self.part_bytes];
        assert!(out.len() == self.dim * BLOCK_TOKENS);
        // SAFETY: as for keys.
        unsafe {
            match self.format {
                KvFormat::F16 => widen_f16::<S>(part, out),
                KvFormat::Int8 => widen_int8_values::<S>(part, self.dim, out),
            }
        }
    }
}

/// Where [`Store`] writes.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    keys: *mut u8,
    values: *mut u8,
}

// SAFETY: each task writes one head's keys or values only.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

/// Stores rows of keys, or of values, of one head.
pub(crate) struct Store<'a> {
    /// The cache that `target` came from.
    pub kv: &'a Kv,
    pub target: Target,
    pub layer: usize,
    pub head: usize,
    /// Whether `rows` are keys.
    pub keys: bool,
    /// `[slots.len(), kv_heads, head_dim]`
    pub rows: *const f32,
    pub slots: &'a [u32],
}

impl Job for Store<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (kv, head_dim) = (self.kv, self.kv.head_dim);
        let to = if self.keys {
            self.target.keys
        } else {
            self.target.values
        };
        for (i, &slot) in self.slots.iter().enumerate() {
            let (block, t) = (slot as usize / BLOCK_TOKENS, slot as usize % BLOCK_TOKENS);
            let (first, step) = if self.keys {
                (t, BLOCK_TOKENS)
            } else {
                (t * kv.dim, 1)
            };
            // SAFETY: `Kv::target` checked rows, layer and slots; what lies beyond `head_dim` stays zero.
            unsafe {
                let row = self.rows.add(i * kv.width() + self.head * head_dim);
                let row = std::slice::from_raw_parts(row, head_dim);
                let part = to.add(kv.at(self.layer, block, self.head));
                match kv.format {
                    KvFormat::F16 => store_f16::<S>(row, part.cast::<u16>().add(first), step),
                    KvFormat::Int8 => {
                        let scales = part.add(kv.dim * BLOCK_TOKENS).cast::<u16>().add(t);
                        store_int8::<S>(row, part.add(first), step, scales);
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`Simd`]; `to` is valid for `row`'s numbers, `step` apart.
#[inline(always)]
unsafe fn store_f16<S: Simd>(row: &[f32], to: *mut u16, step: usize) {
    for (i, part) in row.chunks(S::LANES).enumerate() {
        let mut floats = [0.0f32; 16];
        floats[..part.len()].copy_from_slice(part);
        let mut halves = [0u16; 16];
        // SAFETY: a vector is at most sixteen numbers; the rest by the contract.
        unsafe {
            S::store_f16(halves.as_mut_ptr(), S::load(floats.as_ptr()));
            scatter(&halves[..part.len()], to.add(i * S::LANES * step), step);
        }
    }
}

/// # Safety
/// As [`Simd`]; `to` is valid for a byte for each of `row`'s numbers, `step` apart, `scales` for one for each group, `BLOCK_TOKENS` apart.
#[inline(always)]
unsafe fn store_int8<S: Simd>(row: &[f32], to: *mut u8, step: usize, scales: *mut u16) {
    for (g, group) in row.chunks(KV_GROUP).enumerate() {
        let mut floats = [0.0f32; KV_GROUP];
        floats[..group.len()].copy_from_slice(group);
        // SAFETY: by the contract.
        unsafe {
            let (scale, codes) = quantise::<S>(&floats);
            scatter(
                &codes[..group.len()],
                to.cast::<i8>().add(g * KV_GROUP * step),
                step,
            );
            *scales.add(g * BLOCK_TOKENS) = scale;
        }
    }
}

/// # Safety
/// `to` is valid for `from.len()` writes, `step` apart.
#[inline(always)]
unsafe fn scatter<T: Copy>(from: &[T], to: *mut T, step: usize) {
    // SAFETY: by the contract.
    unsafe {
        if step == 1 {
            return std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
        }
        for (i, &one) in from.iter().enumerate() {
            *to.add(i * step) = one;
        }
    }
}

/// A group's scale, as bf16, and its numbers in units of that.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn quantise<S: Simd>(x: &[f32; KV_GROUP]) -> (u16, [i8; KV_GROUP]) {
    let mut codes = [0; KV_GROUP];
    // SAFETY: LANES divides a group.
    unsafe {
        let (mut largest, mut finite) = (S::splat(0.0), S::splat(0.0));
        for i in (0..KV_GROUP).step_by(S::LANES) {
            let v = S::load(x.as_ptr().add(i));
            largest = S::max(S::abs(v), largest);
            finite = S::fma(v, S::splat(0.0), finite);
        }
        if S::sum(finite) != 0.0 {
            return (NOT_FINITE, codes);
        }
        let largest = S::max_across(largest);
        if largest < SMALLEST {
            return (0, codes);
        }
        let scale = ((largest / 127.0).to_bits() + 0xffff) >> 16;
        let inverse = S::splat(1.0 / f32::from_bits(scale << 16));
        for i in (0..KV_GROUP).step_by(S::LANES) {
            let v = S::mul(S::load(x.as_ptr().add(i)), inverse);
            S::store_i8(codes.as_mut_ptr().add(i), v);
        }
        (scale as u16, codes)
    }
}

/// # Safety
/// As [`Simd`]; `from` holds as many f16 as `out` floats, a multiple of a vector.
#[inline(always)]
unsafe fn widen_f16<S: Simd>(from: &[u8], out: &mut [f32]) {
    debug_assert!(from.len() == 2 * out.len() && out.len().is_multiple_of(S::LANES));
    for i in (0..out.len()).step_by(S::LANES) {
        // SAFETY: whole vectors within both.
        unsafe {
            let from = from.as_ptr().add(2 * i).cast();
            S::store(out.as_mut_ptr().add(i), S::load_f16(from));
        };
    }
}

/// # Safety
/// As [`Simd`]; `from` holds as many bytes as `out` floats, `[dim, BLOCK_TOKENS]`, and their scales.
#[inline(always)]
unsafe fn widen_int8_keys<S: Simd>(from: &[u8], out: &mut [f32]) {
    const GROUP: usize = KV_GROUP * BLOCK_TOKENS;
    let (codes, scales) = from.split_at(out.len());
    debug_assert!(scales.len() == 2 * BLOCK_TOKENS * out.len().div_ceil(GROUP));
    for (g, (codes, out)) in codes.chunks(GROUP).zip(out.chunks_mut(GROUP)).enumerate() {
        for t in (0..BLOCK_TOKENS).step_by(S::LANES) {
            // SAFETY: whole vectors of a block's positions, within a group's bytes, floats and scales.
            unsafe {
                let scales = scales.as_ptr().cast::<u16>();
                let scale = S::load_bf16(scales.add(g * BLOCK_TOKENS + t));
                for i in (t..codes.len()).step_by(BLOCK_TOKENS) {
                    let v = S::mul(S::load_i8(codes.as_ptr().add(i)), scale);
                    S::store(out.as_mut_ptr().add(i), v);
                }
            }
        }
    }
}

/// # Safety
/// As [`Simd`]; `from` holds as many bytes as `out` floats, `[BLOCK_TOKENS, dim]`, and their scales; `dim` is a multiple of a vector.
#[inline(always)]
unsafe fn widen_int8_values<S: Simd>(from: &[u8], dim: usize, out: &mut [f32]) {
    let (codes, scales) = from.split_at(out.len());
    debug_assert!(scales.len() == 2 * BLOCK_TOKENS * dim.div_ceil(KV_GROUP));
    for (t, (codes, out)) in codes.chunks(dim).zip(out.chunks_mut(dim)).enumerate() {
        for (g, (codes, out)) in codes
            .chunks(KV_GROUP)
            .zip(out.chunks_mut(KV_GROUP))
            .enumerate()
        {
            let at = 2 * (g * BLOCK_TOKENS + t);
            let scale = u16::from_ne_bytes([scales[at], scales[at + 1]]);
            // SAFETY: whole vectors within a group's bytes and floats.
            unsafe {
                let scale = S::splat(f32::from_bits(u32::from(scale) << 16));
                for i in (0..out.len()).step_by(S::LANES) {
                    let v = S::mul(S::load_i8(codes.as_ptr().add(i)), scale);
                    S::store(out.as_mut_ptr().add(i), v);
                }
            }
        }
    }
}

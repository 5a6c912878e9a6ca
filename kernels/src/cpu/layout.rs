//! How a weight matrix lies in memory once packed.
//!
//! Rows are taken [`lanes`] at a time into a **panel**, interleaved so that one vector holds a few columns of every row:
//! each lane of a sum belongs to one row, and no kernel ever adds across lanes. [`STRIP`] panels lie side by side in a **strip**, so
//! that a kernel that takes them together reads memory in one straight line, which is as fast as memory is read at all.
//!
//! A strip of floats is column by column the panels' vectors, one float a lane.
//!
//! A strip of a quantised format is its blocks, of as many columns as the format's own. A block is the panels' scales, then for each
//! 32 columns the panels' codes: vectors of four bytes a lane, the first of each panel, then the second of each, and so on. With chunk
//! `c` for columns `4c..4c + 4`, a panel's vectors are
//! - low four bits: four vectors; vector `j` holds chunk `j` in its low nibbles and chunk `j + 4` in its high ones;
//! - a fifth bit: one more vector; bit `c` of a byte belongs to chunk `c`;
//! - six bits: three vectors for each sixteen columns; vector `j` of them holds chunk `j` in its low six bits, and in its high two
//!   bits `2j` and `2j + 1` of chunk 3;
//! - eight bits: eight vectors, one a chunk, signed.
//!
//! Scales are f16 as in the file, one a lane: `d` or `d, m`; K-quants `d` or `d, dmin` and then their small scales, unpacked to a
//! byte each.

use std::ops::Range;

use half::f16;

use super::bytes::{Arena, Bytes};
use super::pool::Pool;
use super::simd::lanes;
use crate::device::{Error, WeightRows};
use crate::format::{Format, dequantize_row, k_scale_min, q6_k_code};
use crate::isa::Isa;

/// Columns that share a scale, and that activations are quantised by.
pub(crate) const BLOCK: usize = 32;

/// Panels of a strip: with one row of activations their sums hide an addition's latency, with two they fill the registers.
pub(crate) const STRIP: usize = 4;

/// A weight matrix packed for one instruction set.
pub struct Matrix {
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) lanes: usize,
    /// From one strip's beginning to the next's.
    pub(crate) strip_bytes: usize,
    pub(crate) data: Bytes,
}

/// Bytes of codes that a lane has in each [`columns`].
pub(crate) const fn code_bytes(format: Format) -> usize {
    match format {
        Format::Q4_0 | Format::Q4_1 | Format::Q4_K => 16,
        Format::Q5_0 | Format::Q5_1 | Format::Q5_K => 20,
        Format::Q6_K => 24,
        Format::Q8_0 => 32,
        Format::F32 | Format::F16 | Format::BF16 => format.block_bytes(),
    }
}

/// Bytes of scales that a lane has in each of the format's own blocks.
pub(crate) const fn scale_bytes(format: Format) -> usize {
    match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => 2,
        Format::Q4_1 | Format::Q5_1 => 4,
        Format::Q4_K | Format::Q5_K => 4 + 16,
        Format::Q6_K => 2 + 16,
        Format::F32 | Format::F16 | Format::BF16 => 0,
    }
}

/// Columns whose codes of all panels lie together.
const fn columns(format: Format) -> usize {
    if format.is_quantised() { BLOCK } else { 1 }
}

/// How many of these share scales.
pub(crate) const fn parts(format: Format) -> usize {
    format.block_len() / columns(format)
}

/// Bytes of a strip's block.
pub(crate) const fn block_bytes(format: Format, lanes: usize) -> usize {
    STRIP * lanes * (scale_bytes(format) + parts(format) * code_bytes(format))
}

/// Where in a strip the scales are that panel `i` of it has for its `b`th [`columns`].
#[inline(always)]
pub(crate) const fn scales_at(format: Format, lanes: usize, i: usize, b: usize) -> usize {
    b / parts(format) * block_bytes(format, lanes) + i * scale_bytes(format) * lanes
}

/// Where in a strip the first vector of codes is that panel `i` has for its `b`th [`columns`].
#[inline(always)]
pub(crate) const fn codes_at(format: Format, lanes: usize, i: usize, b: usize) -> usize {
    let before = scale_bytes(format) + b % parts(format) * code_bytes(format);
    b / parts(format) * block_bytes(format, lanes)
        + STRIP * before * lanes
        + i * vector_bytes(format, lanes)
}

/// Bytes of a vector of codes.
const fn vector_bytes(format: Format, lanes: usize) -> usize {
    lanes
        * if format.is_quantised() {
            4
        } else {
            code_bytes(format)
        }
}

/// From one of a panel's vectors of codes to the next.
pub(crate) const fn vector_stride(format: Format, lanes: usize) -> usize {
    STRIP * vector_bytes(format, lanes)
}

impl Matrix {
    pub(crate) fn pack(
        w: WeightRows<'_>,
        isa: Isa,
        pool: &Pool,
        arena: &Arena,
    ) -> Result<Matrix, Error> {
        w.check()?;
        let lanes = lanes(isa);
        let strip_bytes = w.cols / w.format.block_len() * block_bytes(w.format, lanes);
        let strips = w.rows.div_ceil(lanes * STRIP);
        let len = strips.saturating_mul(strip_bytes);
        let mut data = arena.zeroed(len, "weights")?;
        let start = SendPtr(data.as_mut_ptr());
        pool.run(strips, &|s| {
            let start = &start;
            // SAFETY: strips do not overlap, lie within `data`, and each is written by one task.
            let strip = unsafe {
                std::slice::from_raw_parts_mut(start.0.add(s * strip_bytes), strip_bytes)
            };
            let first = s * lanes * STRIP;
            for r in 0..(lanes * STRIP).min(w.rows - first) {
                let lane = Lane {
                    format: w.format,
                    lanes,
                    panel: r / lanes,
                    lane: r % lanes,
                };
                lane.pack(w.row(first + r), strip);
            }
        });
        Ok(Matrix {
            format: w.format,
            rows: w.rows,
            cols: w.cols,
            lanes,
            strip_bytes,
            data,
        })
    }

    /// Number of strips.
    pub(crate) fn strips(&self) -> usize {
        self.rows.div_ceil(self.lanes * STRIP)
    }

    /// Panels of strip `s` that have rows: all but perhaps the last one's.
    pub(crate) fn panels_of(&self, s: usize) -> usize {
        let panels = self.rows.div_ceil(self.lanes);
        panels.saturating_sub(s * STRIP).min(STRIP)
    }

    /// Strip `s`.
    pub(crate) fn strip(&self, s: usize) -> &[u8] {
        &self.data[s * self.strip_bytes..(s + 1) * self.strip_bytes]
    }

    /// Writes row `row` as floats, exactly as [`dequantize_row`] would from the file.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols);
        let (panel, lane) = (row / self.lanes, row % self.lanes);
        let lane = Lane {
            format: self.format,
            lanes: self.lanes,
            panel: panel % STRIP,
            lane,
        };
        lane.unpack(self.strip(panel / STRIP), out);
    }
}

/// One row's place in its strip.
struct Lane {
    format: Format,
    lanes: usize,
    panel: usize,
    lane: usize,
}

impl Lane {
    fn codes_at(&self, b: usize) -> usize {
        codes_at(self.format, self.lanes, self.panel, b)
    }

    fn scales_at(&self, b: usize) -> usize {
        scales_at(self.format, self.lanes, self.panel, b)
    }

    /// Within a panel's vector of floats.
    fn range(&self) -> Range<usize> {
        let bytes = self.format.block_bytes();
        self.lane * bytes..(self.lane + 1) * bytes
    }

    /// Writes a row as stored.
    fn pack(&self, row: &[u8], strip: &mut [u8]) {
        let stored = self.format.block_bytes();
        if !self.format.is_quantised() {
            for (k, x) in row.chunks_exact(stored).enumerate() {
                strip[self.codes_at(k)..][self.range()].copy_from_slice(x);
            }
            return;
        }
        let (parts, stride) = (parts(self.format), vector_stride(self.format, self.lanes));
        for (own, block) in row.chunks_exact(stored).enumerate() {
            for j in 0..parts {
                let words = fold_codes(self.format, &codes_of(self.format, block, j));
                let at = self.codes_at(own * parts + j);
                for (v, word) in words[..code_bytes(self.format) / 4].iter().enumerate() {
                    let at = at + v * stride + self.lane * 4;
                    strip[at..at + 4].copy_from_slice(&word.to_le_bytes());
                }
            }
            let scales = &mut strip[self.scales_at(own * parts)..];
            pack_scales(self.format, block, scales, self.lane, self.lanes);
        }
    }

    /// Writes the row as floats.
    fn unpack(&self, strip: &[u8], out: &mut [f32]) {
        if !self.format.is_quantised() {
            for (k, y) in out.iter_mut().enumerate() {
                let stored = &strip[self.codes_at(k)..][self.range()];
                // A row of one weight cannot have the wrong size.
                let _ = dequantize_row(self.format, stored, std::slice::from_mut(y));
            }
            return;
        }
        for (b, y) in out.chunks_exact_mut(BLOCK).enumerate() {
            let codes = &strip[self.codes_at(b)..];
            let stride = vector_stride(self.format, self.lanes);
            let q = unpack_codes(self.format, &codes[self.lane * 4..], stride);
            let scales = &strip[self.scales_at(b)..];
            self.scale_codes(scales, b % parts(self.format), &q, y);
        }
    }

    /// Of part `i` of a block.
    fn scale_codes(&self, scales: &[u8], i: usize, q: &[u8; BLOCK], y: &mut [f32]) {
        let (lane, lanes) = (self.lane, self.lanes);
        let half = |at: usize| f16::from_le_bytes([scales[at], scales[at + 1]]).to_f32();
        let first = half(2 * lane);
        let second = || half(2 * lanes + 2 * lane);
        let (d, m, zero) = match self.format {
            Format::Q4_0 => (first, 0.0, 8),
            Format::Q5_0 => (first, 0.0, 16),
            Format::Q4_1 | Format::Q5_1 => (first, second(), 0),
            Format::Q4_K | Format::Q5_K => {
                let byte = |at: usize| f32::from(scales[4 * lanes + at]);
                let min = second() * byte(k_min_at(i, lane, lanes));
                (first * byte(i * lanes + lane), -min, 0)
            }
            Format::Q6_K => {
                for (k, (y, &q)) in y.iter_mut().zip(q).enumerate() {
                    let small = scales[2 * lanes + (2 * i + k / 16) * lanes + lane] as i8;
                    *y = first * f32::from(small) * f32::from(q as i8 - 32);
                }
                return;
            }
            _ => {
                for (y, &q) in y.iter_mut().zip(q) {
                    *y = first * f32::from(q as i8);
                }
                return;
            }
        };
        for (y, &q) in y.iter_mut().zip(q) {
            *y = d * (i32::from(q) - zero) as f32 + m;
        }
    }
}

struct SendPtr(*mut u8);
// SAFETY: used for disjoint parts only, see where it is made.
unsafe impl Sync for SendPtr {}

/// Where among the small scales of K-quants the minimum of part `i` is: a lane has those of two parts side by side.
const fn k_min_at(i: usize, lane: usize, lanes: usize) -> usize {
    (8 + i / 2 * 2) * lanes + 2 * lane + i % 2
}

fn pack_scales(format: Format, block: &[u8], out: &mut [u8], lane: usize, lanes: usize) {
    let mut halves = |from: usize, count: usize| {
        for h in 0..count {
            let at = (h * lanes + lane) * 2;
            out[at..at + 2].copy_from_slice(&block[from + 2 * h..from + 2 * h + 2]);
        }
    };
    match format {
        Format::Q4_1 | Format::Q5_1 => halves(0, 2),
        Format::Q4_K | Format::Q5_K => {
            halves(0, 2);
            for j in 0..8 {
                let (sc, m) = k_scale_min(j, &block[4..16]);
                out[4 * lanes + j * lanes + lane] = sc;
                out[4 * lanes + k_min_at(j, lane, lanes)] = m;
            }
        }
        Format::Q6_K => {
            halves(208, 1);
            for j in 0..16 {
                out[2 * lanes + j * lanes + lane] = block[192 + j];
            }
        }
        _ => halves(0, 1),
    }
}

/// The codes of 32-column part `i` of a stored block, a byte each.
fn codes_of(format: Format, block: &[u8], i: usize) -> [u8; BLOCK] {
    let nibble = |qs: &[u8], k: usize| (qs[k % 16] >> (k / 16 * 4)) & 15;
    let high =
        |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let fifth = |bits: u32, k: usize| (((bits >> k) & 1) << 4) as u8;
    let long = |qs: &[u8], k: usize| (qs[i / 2 * 32 + k] >> (i % 2 * 4)) & 15;
    let all = |f: &dyn Fn(usize) -> u8| std::array::from_fn(f);
    match format {
        Format::Q4_0 => std::array::from_fn(|k| nibble(&block[2..18], k)),
        Format::Q4_1 => std::array::from_fn(|k| nibble(&block[4..20], k)),
        Format::Q5_0 => {
            let bits = high(2);
            all(&|k| nibble(&block[6..22], k) | fifth(bits, k))
        }
        Format::Q5_1 => {
            let bits = high(4);
            all(&|k| nibble(&block[8..24], k) | fifth(bits, k))
        }
        Format::Q4_K => std::array::from_fn(|k| long(&block[16..144], k)),
        Format::Q5_K => all(&|k| long(&block[48..176], k) | ((block[16 + k] >> i) & 1) << 4),
        Format::Q6_K => all(&|k| q6_k_code(block, i * 32 + k)),
        _ => std::array::from_fn(|k| block[2 + k]),
    }
}

/// A lane's 32 codes as the words of its vectors.
fn fold_codes(format: Format, q: &[u8; BLOCK]) -> [u32; 8] {
    let word = |c: usize| u32::from_le_bytes([q[4 * c], q[4 * c + 1], q[4 * c + 2], q[4 * c + 3]]);
    let mut words = [0u32; 8];
    match code_bytes(format) {
        32 => words = std::array::from_fn(word),
        24 => {
            for (v, to) in words[..6].iter_mut().enumerate() {
                let (half, j) = (v / 3, v % 3);
                let high = word(4 * half + 3) >> (2 * j);
                *to = (word(4 * half + j) & 0x3f3f_3f3f) | (high & 0x0303_0303) << 6;
            }
        }
        bytes => {
            for c in 0..8 {
                words[c % 4] |= (word(c) & 0x0f0f_0f0f) << (c / 4 * 4);
                if bytes == 20 {
                    words[4] |= ((word(c) >> 4) & 0x0101_0101) << c;
                }
            }
        }
    }
    words
}

/// The inverse of [`fold_codes`] on words that lie `stride` apart.
fn unpack_codes(format: Format, words: &[u8], stride: usize) -> [u8; BLOCK] {
    let byte = |v: usize, t: usize| words[v * stride + t];
    std::array::from_fn(|k| {
        let (c, t) = (k / 4, k % 4);
        let low = || (byte(c % 4, t) >> (c / 4 * 4)) & 15;
        match code_bytes(format) {
            32 => byte(c, t),
            20 => low() | ((byte(4, t) >> c) & 1) << 4,
            24 if c % 4 < 3 => byte(c / 4 * 3 + c % 4, t) & 63,
            24 => (0..3).fold(0, |q, j| q | (byte(c / 4 * 3 + j, t) >> 6) << (2 * j)),
            _ => low(),
        }
    })
}

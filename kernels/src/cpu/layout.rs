//! How a weight matrix lies in memory once packed.
//!
//! Rows are taken [`lanes`] at a time into a **panel**, interleaved so that one vector holds a few columns of every row:
//! each lane of a sum belongs to one row, and no kernel ever adds across lanes. A panel is its codes, then its scales.
//!
//! Codes of a quantised format, 32 columns at a time: vectors of four bytes a lane. Chunk `c` is columns `4c..4c + 4`.
//! - low four bits: four vectors; vector `j` holds chunk `j` in its low nibbles and chunk `j + 4` in its high ones;
//! - a fifth bit: one more vector; bit `c` of a byte belongs to chunk `c`;
//! - six bits: three vectors for each sixteen columns; vector `j` of them holds chunk `j` in its low six bits, and in its high two
//!   bits `2j` and `2j + 1` of chunk 3;
//! - eight bits: eight vectors, one a chunk, signed.
//!
//! Scales are f16 as in the file, one a lane: `d` or `d, m` for each 32 columns; K-quants `d` or `d, dmin` and then their
//! small scales, unpacked to a byte each, for each 256. Floats have no scales and lie column by column.

use half::f16;

use super::bytes::{Arena, Bytes, LINE};
use super::pool::Pool;
use super::simd::lanes;
use crate::device::{Error, WeightRows};
use crate::format::{Format, dequantize_row, k_scale_min, q6_k_code};
use crate::isa::Isa;

/// Columns that share a scale, and that activations are quantised by.
pub(crate) const BLOCK: usize = 32;

/// A weight matrix packed for one instruction set.
pub struct Matrix {
    pub(crate) format: Format,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) lanes: usize,
    /// From one panel's beginning to the next's.
    pub(crate) panel_bytes: usize,
    /// Where in a panel its scales begin.
    pub(crate) scales_at: usize,
    pub(crate) data: Bytes,
}

/// Bytes of codes that a lane has in each [`BLOCK`] columns of a quantised format.
pub(crate) const fn code_bytes(format: Format) -> usize {
    match format {
        Format::Q4_0 | Format::Q4_1 | Format::Q4_K => 16,
        Format::Q5_0 | Format::Q5_1 | Format::Q5_K => 20,
        Format::Q6_K => 24,
        Format::Q8_0 => 32,
        Format::F32 | Format::F16 | Format::BF16 => 0,
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

impl Matrix {
    pub(crate) fn pack(
        w: WeightRows<'_>,
        isa: Isa,
        pool: &Pool,
        arena: &Arena,
    ) -> Result<Matrix, Error> {
        w.check()?;
        let lanes = lanes(isa);
        let (blocks, own_blocks) = (w.cols / BLOCK, w.cols / w.format.block_len());
        let scales_at = if w.format.is_quantised() {
            blocks * code_bytes(w.format) * lanes
        } else {
            w.cols * w.format.block_bytes() * lanes
        };
        let panel_bytes =
            (scales_at + own_blocks * scale_bytes(w.format) * lanes).next_multiple_of(LINE);
        let panels = w.rows.div_ceil(lanes);
        let len = panels.saturating_mul(panel_bytes);
        let mut data = arena.zeroed(len, "weights")?;
        let start = SendPtr(data.as_mut_ptr());
        pool.run(panels, &|p| {
            let start = &start;
            // SAFETY: panels do not overlap, lie within `data`, and each is written by one task.
            let panel = unsafe {
                std::slice::from_raw_parts_mut(start.0.add(p * panel_bytes), panel_bytes)
            };
            let (codes, scales) = panel.split_at_mut(scales_at);
            for lane in 0..lanes.min(w.rows - p * lanes) {
                let row = w.row(p * lanes + lane);
                match w.format {
                    Format::F32 => interleave::<4>(row, codes, lane, lanes),
                    Format::F16 | Format::BF16 => interleave::<2>(row, codes, lane, lanes),
                    _ => pack_lane(w.format, row, codes, scales, lane, lanes),
                }
            }
        });
        Ok(Matrix {
            format: w.format,
            rows: w.rows,
            cols: w.cols,
            lanes,
            panel_bytes,
            scales_at,
            data,
        })
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(self.lanes)
    }

    /// Writes row `row` as floats, exactly as [`dequantize_row`] would from the file.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols);
        let (panel, lane) = (row / self.lanes, row % self.lanes);
        let panel = &self.data[panel * self.panel_bytes..(panel + 1) * self.panel_bytes];
        let (codes, scales) = panel.split_at(self.scales_at);
        let element = self.format.block_bytes();
        if !self.format.is_quantised() {
            for (k, y) in out.iter_mut().enumerate() {
                let at = (k * self.lanes + lane) * element;
                // A row of one weight cannot have the wrong size.
                let _ = dequantize_row(
                    self.format,
                    &codes[at..at + element],
                    std::slice::from_mut(y),
                );
            }
            return;
        }
        for (b, y) in out.chunks_exact_mut(BLOCK).enumerate() {
            let block = &codes[b * code_bytes(self.format) * self.lanes..];
            let q = unpack_codes(self.format, block, lane, self.lanes);
            self.scale_codes(scales, b, lane, &q, y);
        }
    }

    fn scale_codes(&self, scales: &[u8], b: usize, lane: usize, q: &[u8; BLOCK], y: &mut [f32]) {
        let lanes = self.lanes;
        let half = |at: usize| f16::from_le_bytes([scales[at], scales[at + 1]]).to_f32();
        let own = b * BLOCK / self.format.block_len() * scale_bytes(self.format) * lanes;
        let i = b % 8;
        let first = half(own + 2 * lane);
        let second = || half(own + 2 * lanes + 2 * lane);
        let (d, m, zero) = match self.format {
            Format::Q4_0 => (first, 0.0, 8),
            Format::Q5_0 => (first, 0.0, 16),
            Format::Q4_1 | Format::Q5_1 => (first, second(), 0),
            Format::Q4_K | Format::Q5_K => {
                let byte = |at: usize| f32::from(scales[own + 4 * lanes + at * lanes + lane]);
                (first * byte(i), -(second() * byte(8 + i)), 0)
            }
            Format::Q6_K => {
                for (k, (y, &q)) in y.iter_mut().zip(q).enumerate() {
                    let small = scales[own + 2 * lanes + (2 * i + k / 16) * lanes + lane] as i8;
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

fn interleave<const N: usize>(row: &[u8], codes: &mut [u8], lane: usize, lanes: usize) {
    for (k, x) in row.chunks_exact(N).enumerate() {
        let at = (k * lanes + lane) * N;
        codes[at..at + N].copy_from_slice(x);
    }
}

fn pack_lane(
    format: Format,
    row: &[u8],
    codes: &mut [u8],
    scales: &mut [u8],
    lane: usize,
    lanes: usize,
) {
    let bytes = code_bytes(format);
    let per_own = format.block_len() / BLOCK;
    for (own, block) in row.chunks_exact(format.block_bytes()).enumerate() {
        for i in 0..per_own {
            let words = fold_codes(format, &codes_of(format, block, i));
            let at = (own * per_own + i) * bytes * lanes;
            for (v, word) in words[..bytes / 4].iter().enumerate() {
                let at = at + (v * lanes + lane) * 4;
                codes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
        }
        pack_scales(
            format,
            block,
            &mut scales[own * scale_bytes(format) * lanes..],
            lane,
            lanes,
        );
    }
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
                out[4 * lanes + (8 + j) * lanes + lane] = m;
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

/// The inverse of [`fold_codes`] on a packed block.
fn unpack_codes(format: Format, block: &[u8], lane: usize, lanes: usize) -> [u8; BLOCK] {
    let byte = |v: usize, t: usize| block[(v * lanes + lane) * 4 + t];
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

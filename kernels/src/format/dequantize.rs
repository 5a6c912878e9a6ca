//! The meaning of each format, one weight at a time: the reference that every kernel is tested against.

use half::{bf16, f16};

use super::{Format, k_scale_min};
use crate::device::Error;

/// Writes the weights of one row of `out.len()` columns. `data` is the row as stored in a GGUF file.
///
/// # Errors
/// [`Error::Shape`] when the width is no multiple of the format's block or `data` has another length.
pub fn dequantize_row(format: Format, data: &[u8], out: &mut [f32]) -> Result<(), Error> {
    let cols = out.len();
    if !cols.is_multiple_of(format.block_len()) || data.len() != format.row_bytes(cols) {
        return Err(Error::Shape(format!(
            "a row of {cols} {format:?} weights takes {} bytes in blocks of {}, got {} bytes",
            format.row_bytes(cols),
            format.block_len(),
            data.len()
        )));
    }
    let blocks = data.chunks_exact(format.block_bytes());
    for (block, y) in blocks.zip(out.chunks_exact_mut(format.block_len())) {
        match format {
            Format::F32 => y[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
            Format::F16 => y[0] = half_at(block, 0),
            Format::BF16 => y[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
            Format::Q8_0 => q8_0(block, y),
            Format::Q4_0 => nibbles(half_at(block, 0), 0.0, 8, &block[2..], y),
            Format::Q4_1 => nibbles(half_at(block, 0), half_at(block, 2), 0, &block[4..], y),
            Format::Q5_0 => five_bits(half_at(block, 0), 0.0, 16, &block[2..], y),
            Format::Q5_1 => five_bits(half_at(block, 0), half_at(block, 2), 0, &block[4..], y),
            Format::Q4_K => q4_k(block, y),
            Format::Q5_K => q5_k(block, y),
            Format::Q6_K => q6_k(block, y),
        }
    }
    Ok(())
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q8_0(block: &[u8], y: &mut [f32]) {
    let d = half_at(block, 0);
    for (y, &q) in y.iter_mut().zip(&block[2..]) {
        *y = d * f32::from(q as i8);
    }
}

/// Sixteen bytes; the low nibbles are the first sixteen weights.
fn nibbles(d: f32, m: f32, zero: i32, qs: &[u8], y: &mut [f32]) {
    for j in 0..16 {
        y[j] = d * (i32::from(qs[j] & 15) - zero) as f32 + m;
        y[j + 16] = d * (i32::from(qs[j] >> 4) - zero) as f32 + m;
    }
}

/// Four bytes with each weight's fifth bit, then nibbles.
fn five_bits(d: f32, m: f32, zero: i32, block: &[u8], y: &mut [f32]) {
    let high = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    let qs = &block[4..];
    for j in 0..16 {
        let low_bit = ((high >> j) & 1) << 4;
        let high_bit = ((high >> (j + 16)) & 1) << 4;
        y[j] = d * (i32::from(qs[j] & 15) + low_bit as i32 - zero) as f32 + m;
        y[j + 16] = d * (i32::from(qs[j] >> 4) + high_bit as i32 - zero) as f32 + m;
    }
}

fn q4_k(block: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, qs) = (&block[4..16], &block[16..]);
    for (j, y) in y.chunks_exact_mut(32).enumerate() {
        let (sc, m) = k_scale_min(j, scales);
        let (d, m) = (d * f32::from(sc), dmin * f32::from(m));
        for (y, &q) in y.iter_mut().zip(&qs[j / 2 * 32..]) {
            *y = d * f32::from((q >> (j % 2 * 4)) & 15) - m;
        }
    }
}

fn q5_k(block: &[u8], y: &mut [f32]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, high, qs) = (&block[4..16], &block[16..48], &block[48..]);
    for (j, y) in y.chunks_exact_mut(32).enumerate() {
        let (sc, m) = k_scale_min(j, scales);
        let (d, m) = (d * f32::from(sc), dmin * f32::from(m));
        for (l, y) in y.iter_mut().enumerate() {
            let low = (qs[j / 2 * 32 + l] >> (j % 2 * 4)) & 15;
            *y = d * f32::from(low | ((high[l] >> j) & 1) << 4) - m;
        }
    }
}

fn q6_k(block: &[u8], y: &mut [f32]) {
    let d = half_at(block, 208);
    let scales = &block[192..208];
    for (i, y) in y.iter_mut().enumerate() {
        *y = d * f32::from(scales[i / 16] as i8) * f32::from(q6_k_code(block, i) as i8 - 32);
    }
}

/// The six bits of weight `i` of a Q6_K block: halves of 128 hold four runs of 32.
pub(crate) fn q6_k_code(block: &[u8], i: usize) -> u8 {
    let (half, run, l) = (i / 128, i % 128 / 32, i % 32);
    let low = block[half * 64 + run % 2 * 32 + l] >> (run / 2 * 4);
    let high = block[128 + half * 32 + l] >> (run * 2);
    (low & 15) | ((high & 3) << 4)
}

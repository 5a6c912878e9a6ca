//! Making the simple formats from f32: for tests, tools and conversion at set-up.

use half::{bf16, f16};

use super::Format;
use crate::device::Error;

/// Appends the row `x` in `format` to `out`: F32, F16, BF16, Q8_0, Q4_0 or Q4_1.
///
/// # Errors
/// [`Error::Shape`] when the width is no multiple of the block; [`Error::Unsupported`] for the other formats.
pub fn quantize_row(format: Format, x: &[f32], out: &mut Vec<u8>) -> Result<(), Error> {
    if !x.len().is_multiple_of(format.block_len()) {
        return Err(Error::Shape(format!(
            "{format:?} needs a multiple of {} columns, got {}",
            format.block_len(),
            x.len()
        )));
    }
    for block in x.chunks_exact(format.block_len()) {
        match format {
            Format::F32 => out.extend(block[0].to_le_bytes()),
            Format::F16 => out.extend(f16::from_f32(block[0]).to_le_bytes()),
            Format::BF16 => out.extend(bf16::from_f32(block[0]).to_le_bytes()),
            Format::Q8_0 => q8_0(block, out),
            Format::Q4_0 => q4_0(block, out),
            Format::Q4_1 => q4_1(block, out),
            _ => {
                return Err(Error::Unsupported(format!(
                    "making {format:?}; F32, F16, BF16, Q8_0, Q4_0 and Q4_1 can be made"
                )));
            }
        }
    }
    Ok(())
}

fn q8_0(x: &[f32], out: &mut Vec<u8>) {
    let largest = x.iter().fold(0.0f32, |a, v| a.max(v.abs()));
    let d = largest / 127.0;
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(
        x.iter()
            .map(|v| (v * inverse).round().clamp(-127.0, 127.0) as i8 as u8),
    );
}

/// The value furthest from zero becomes -8, so that the side with the larger magnitude has the extra step.
fn q4_0(x: &[f32], out: &mut Vec<u8>) {
    let furthest = x
        .iter()
        .fold(0.0f32, |a, &v| if v.abs() > a.abs() { v } else { a });
    let d = furthest / -8.0;
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    out.extend(f16::from_f32(d).to_le_bytes());
    let code = |v: f32| ((v * inverse + 8.5) as i32).clamp(0, 15) as u8;
    out.extend((0..16).map(|j| code(x[j]) | code(x[j + 16]) << 4));
}

fn q4_1(x: &[f32], out: &mut Vec<u8>) {
    let smallest = x.iter().copied().fold(f32::INFINITY, f32::min);
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let d = (largest - smallest) / 15.0;
    let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(f16::from_f32(smallest).to_le_bytes());
    let code = |v: f32| (((v - smallest) * inverse + 0.5) as i32).clamp(0, 15) as u8;
    out.extend((0..16).map(|j| code(x[j]) | code(x[j + 16]) << 4));
}

//! How the numbers of a sum travel. Belongs here: encoding and decoding, and what each format does to a value. Does not belong
//! here: who sends what to whom.
//!
//! Every format defines the sum of contributions cᵣ as Q(Σ Q(cᵣ)), added in rank order in f64, where Q is what a value becomes by
//! travelling. That holds however the sum is computed (in one hop, or in shares), so a row's result depends neither on the path
//! nor on what else is summed, as long as rows are whole blocks.
//!
//! `exact`: Q changes nothing. Blocks of [`BLOCK`] values: a byte that says how, then the block's values on the grid of
//! [`kernels::to_grid`] as integers of 2⁻³² in the fewest whole bytes that hold the largest (0 and 2 to 6), or as f32 where those
//! are the same numbers, or as they are. Partial sums of a model take four to five bytes so, not f64's eight.
//! `f32`, `bf16`: rounded to nearest, ties to even (bf16 by way of f32). `int8`: blocks of [`INT8_BLOCK`] values, an f32 scale of
//! the largest magnitude / 127, then a code each, the value · (127 / largest) rounded; a block that holds NaN or an infinity becomes NaN.

use serde::{Deserialize, Serialize};

/// Values of a block of `exact`; pieces and shares of a sum end between blocks, so that `int8` blocks never straddle them.
pub const BLOCK: usize = 64;
/// Values that share a scale in `int8`.
pub const INT8_BLOCK: usize = 32;

/// A format of numbers between ranks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wire {
    /// Without loss: the same bits for any number of ranks.
    #[default]
    Exact,
    F32,
    Bf16,
    /// One byte a value and a scale for 32.
    Int8,
}

/// The message is not as many values as were expected.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed;

/// Adding and taking away this rounds to 2⁻³², and its neighbours' bits count in that unit.
const SHIFT: f64 = 1_572_864.0;
/// How a block of `exact` is written, besides the number of bytes of an integer.
const AS_F32: u8 = 7;
const AS_F64: u8 = 8;

impl Wire {
    /// All formats, the most exact first.
    pub const ALL: [Wire; 4] = [Wire::Exact, Wire::F32, Wire::Bf16, Wire::Int8];

    /// Its name in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Wire::Exact => "exact",
            Wire::F32 => "f32",
            Wire::Bf16 => "bf16",
            Wire::Int8 => "int8",
        }
    }

    /// Most bytes that `len` values take.
    pub fn most_bytes(self, len: usize) -> usize {
        match self {
            Wire::Exact => len * 8 + len.div_ceil(BLOCK),
            Wire::F32 => len * 4,
            Wire::Bf16 => len * 2,
            Wire::Int8 => len + 4 * len.div_ceil(INT8_BLOCK),
        }
    }

    /// Bits that a value usually takes: what sizes are reckoned by before anything is encoded.
    pub fn usual_bits(self) -> usize {
        match self {
            Wire::Exact => 40,
            Wire::F32 => 32,
            Wire::Bf16 => 16,
            Wire::Int8 => 9,
        }
    }

    /// Bytes that `values` take.
    pub fn encoded_bytes(self, values: &[f64]) -> usize {
        let mut message = Vec::new();
        self.encode(values, &mut message);
        message.len()
    }

    /// Appends `values` to `out`.
    pub fn encode(self, values: &[f64], out: &mut Vec<u8>) {
        out.reserve(self.most_bytes(values.len()));
        wide(|| match self {
            Wire::Exact => values.chunks(BLOCK).for_each(|b| encode_exact(b, out)),
            Wire::F32 => put(out, values, |v| (v as f32).to_le_bytes()),
            Wire::Bf16 => put(out, values, |v| bf16(v as f32).to_le_bytes()),
            Wire::Int8 => values.chunks(INT8_BLOCK).for_each(|b| encode_int8(b, out)),
        })
    }

    /// Adds the values of a message to `sums`; it must hold exactly as many.
    pub fn add(self, message: &[u8], sums: &mut [f64]) -> Result<(), Malformed> {
        wide(|| self.decode(message, sums, |sum, v| *sum += v))
    }

    /// Replaces `values` by those of a message; it must hold exactly as many.
    pub fn set(self, message: &[u8], values: &mut [f64]) -> Result<(), Malformed> {
        wide(|| self.decode(message, values, |value, v| *value = v))
    }

    /// Q: what `values` are after travelling.
    pub fn round(self, values: &mut [f64]) {
        wide(|| match self {
            Wire::Exact => {}
            Wire::F32 => values.iter_mut().for_each(|v| *v = f64::from(*v as f32)),
            Wire::Bf16 => {
                let each = values.iter_mut();
                each.for_each(|v| *v = from_bf16(bf16(*v as f32)));
            }
            Wire::Int8 => values.chunks_mut(INT8_BLOCK).for_each(round_int8),
        })
    }

    #[inline(always)]
    fn decode(
        self,
        message: &[u8],
        out: &mut [f64],
        take: impl Fn(&mut f64, f64) + Copy,
    ) -> Result<(), Malformed> {
        let whole = |bytes: usize| {
            if message.len() == out.len() * bytes {
                Ok(())
            } else {
                Err(Malformed)
            }
        };
        match self {
            Wire::Exact => {
                let mut rest = message;
                for block in out.chunks_mut(BLOCK) {
                    rest = decode_exact(rest, block, take)?;
                }
                if rest.is_empty() {
                    Ok(())
                } else {
                    Err(Malformed)
                }
            }
            Wire::F32 => {
                whole(4)?;
                get(message, out, take, |b| f64::from(f32::from_le_bytes(b)));
                Ok(())
            }
            Wire::Bf16 => {
                whole(2)?;
                get(message, out, take, |b| from_bf16(u16::from_le_bytes(b)));
                Ok(())
            }
            Wire::Int8 => {
                if message.len() != self.most_bytes(out.len()) {
                    return Err(Malformed);
                }
                let blocks = message.chunks(4 + INT8_BLOCK);
                for (bytes, block) in blocks.zip(out.chunks_mut(INT8_BLOCK)) {
                    let (scale, codes) = bytes.split_first_chunk().ok_or(Malformed)?;
                    let scale = f64::from(f32::from_le_bytes(*scale));
                    get(codes, block, take, |[code]| f64::from(code as i8) * scale);
                }
                Ok(())
            }
        }
    }
}

impl std::str::FromStr for Wire {
    type Err = String;

    fn from_str(name: &str) -> Result<Wire, String> {
        let found = Wire::ALL.into_iter().find(|w| w.name() == name);
        found.ok_or_else(|| format!("wire format {name:?}; expected exact, f32, bf16 or int8"))
    }
}

impl std::fmt::Display for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Runs `f` with the widest vectors that the processor has and that make a difference; the results are the same.
#[inline(always)]
fn wide<T>(f: impl FnOnce() -> T) -> T {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn with_avx2<T>(f: impl FnOnce() -> T) -> T {
            f()
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has just been asked.
            return unsafe { with_avx2(f) };
        }
    }
    f()
}

/// Appends each value as `N` bytes.
#[inline(always)]
fn put<T: Copy, const N: usize>(out: &mut Vec<u8>, values: &[T], bytes: impl Fn(T) -> [u8; N]) {
    let start = out.len();
    out.resize(start + values.len() * N, 0);
    let places = out[start..].as_chunks_mut().0;
    for (place, &v) in places.iter_mut().zip(values) {
        *place = bytes(v);
    }
}

/// Hands each `N` bytes as a value to `take`.
#[inline(always)]
fn get<const N: usize>(
    bytes: &[u8],
    out: &mut [f64],
    take: impl Fn(&mut f64, f64),
    value: impl Fn([u8; N]) -> f64,
) {
    for (place, &b) in out.iter_mut().zip(bytes.as_chunks().0) {
        take(place, value(b));
    }
}

#[inline(always)]
fn encode_exact(values: &[f64], out: &mut Vec<u8>) {
    let mut fixed = [0i64; BLOCK];
    let (mut off_grid, mut bits) = (0u64, 0u64);
    for (x, &v) in fixed.iter_mut().zip(values) {
        let shifted = v + SHIFT;
        off_grid |= (shifted - SHIFT).to_bits() ^ v.to_bits();
        *x = (shifted.to_bits() as i64).wrapping_sub(SHIFT.to_bits() as i64);
        bits |= (*x ^ (*x >> 63)) as u64;
    }
    let fixed = &fixed[..values.len()];
    // With the sign; 0 for nothing but zeros.
    let width = if bits == 0 && fixed.iter().all(|&x| x == 0) {
        0
    } else {
        (64 - bits.leading_zeros() + 1).div_ceil(8).max(2)
    };
    // More than 48 bits may be another binade than SHIFT's, where the bits count differently.
    if off_grid != 0 || width > 6 {
        let same = |&v: &f64| f64::from(v as f32).to_bits() == v.to_bits();
        if values.iter().all(same) {
            out.push(AS_F32);
            put(out, values, |v| (v as f32).to_le_bytes());
        } else {
            out.push(AS_F64);
            put(out, values, f64::to_le_bytes);
        }
        return;
    }
    out.push(width as u8);
    // In planes, so that the loops become vectors: the low part of all values, then the high part of all.
    match width {
        2 => put(out, fixed, |x| (x as u16).to_le_bytes()),
        3 => {
            put(out, fixed, |x| (x as u16).to_le_bytes());
            put(out, fixed, |x| [(x >> 16) as u8]);
        }
        4 => put(out, fixed, |x| (x as u32).to_le_bytes()),
        5 => {
            put(out, fixed, |x| (x as u32).to_le_bytes());
            put(out, fixed, |x| [(x >> 32) as u8]);
        }
        6 => {
            put(out, fixed, |x| (x as u32).to_le_bytes());
            put(out, fixed, |x| ((x >> 32) as u16).to_le_bytes());
        }
        _ => {}
    }
}

/// Takes a block off the front of `message`; gives the rest.
#[inline(always)]
fn decode_exact<'a>(
    message: &'a [u8],
    out: &mut [f64],
    take: impl Fn(&mut f64, f64) + Copy,
) -> Result<&'a [u8], Malformed> {
    let (&width, rest) = message.split_first().ok_or(Malformed)?;
    let value_bytes = match width {
        0 | 2..=6 | AS_F64 => usize::from(width),
        AS_F32 => 4,
        _ => return Err(Malformed),
    };
    let (block, rest) = rest
        .split_at_checked(out.len() * value_bytes)
        .ok_or(Malformed)?;
    let on_grid = |x: i64| f64::from_bits((SHIFT.to_bits() as i64).wrapping_add(x) as u64) - SHIFT;
    let planes = |low_bytes: usize| block.split_at(out.len() * low_bytes);
    match width {
        0 => out.iter_mut().for_each(|v| take(v, 0.0)),
        2 => get(block, out, take, |b| {
            on_grid(i64::from(i16::from_le_bytes(b)))
        }),
        3 => {
            let (low, high) = planes(2);
            let parts = low.as_chunks().0.iter().zip(high);
            for (v, (&low, &high)) in out.iter_mut().zip(parts) {
                let x = i64::from(u16::from_le_bytes(low)) | i64::from(high as i8) << 16;
                take(v, on_grid(x));
            }
        }
        4 => get(block, out, take, |b| {
            on_grid(i64::from(i32::from_le_bytes(b)))
        }),
        5 => {
            let (low, high) = planes(4);
            let parts = low.as_chunks().0.iter().zip(high);
            for (v, (&low, &high)) in out.iter_mut().zip(parts) {
                let x = i64::from(u32::from_le_bytes(low)) | i64::from(high as i8) << 32;
                take(v, on_grid(x));
            }
        }
        6 => {
            let (low, high) = planes(4);
            let parts = low.as_chunks().0.iter().zip(high.as_chunks().0);
            for (v, (&low, &high)) in out.iter_mut().zip(parts) {
                let high = i64::from(i16::from_le_bytes(high));
                take(v, on_grid(i64::from(u32::from_le_bytes(low)) | high << 32));
            }
        }
        AS_F32 => get(block, out, take, |b| f64::from(f32::from_le_bytes(b))),
        _ => get(block, out, take, f64::from_le_bytes),
    }
    Ok(rest)
}

#[inline(always)]
fn round_int8(block: &mut [f64]) {
    let mut codes = [0; INT8_BLOCK];
    let scale = f64::from(int8(block, &mut codes));
    let each = block.iter_mut().zip(codes);
    each.for_each(|(v, code)| *v = f64::from(code) * scale);
}

#[inline(always)]
fn encode_int8(values: &[f64], out: &mut Vec<u8>) {
    let mut codes = [0; INT8_BLOCK];
    let scale = int8(values, &mut codes);
    out.extend_from_slice(&scale.to_le_bytes());
    put(out, &codes[..values.len()], i8::to_le_bytes);
}

/// Codes of a block, and what they count.
#[inline(always)]
fn int8(values: &[f64], codes: &mut [i8; INT8_BLOCK]) -> f32 {
    // Adding this to an f32 below 2²² rounds it to an integer, which then lies in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // Lanes of their own make vectors of the loops.
    const LANES: usize = 8;
    let mut floats = [0.0f32; INT8_BLOCK];
    match values.first_chunk::<INT8_BLOCK>() {
        // Of a known length it becomes vectors.
        Some(whole) => floats
            .iter_mut()
            .zip(whole)
            .for_each(|(f, &v)| *f = v as f32),
        None => floats
            .iter_mut()
            .zip(values)
            .for_each(|(f, &v)| *f = v as f32),
    }
    let (mut largest, mut poison) = ([0.0f32; LANES], [0.0f32; LANES]);
    for lanes in floats.as_chunks::<LANES>().0 {
        for i in 0..LANES {
            let v = lanes[i].abs();
            largest[i] = if v > largest[i] { v } else { largest[i] };
            // Stays zero unless a value is NaN or infinite.
            poison[i] += v * 0.0;
        }
    }
    for half in [LANES / 2, LANES / 4, LANES / 8] {
        for i in 0..half {
            let v = largest[i + half];
            largest[i] = if v > largest[i] { v } else { largest[i] };
            poison[i] += poison[i + half];
        }
    }
    if poison[0].is_nan() {
        return f32::NAN;
    }
    let largest = largest[0];
    let scale = largest / 127.0;
    // Too small for a quotient: nothing that a sum would notice.
    if scale < f32::MIN_POSITIVE {
        return 0.0;
    }
    let per_unit = 127.0 / largest;
    for (code, f) in codes.iter_mut().zip(floats) {
        *code = (f * per_unit + ROUND).to_bits() as i8;
    }
    scale
}

/// The upper half of an f32, rounded to nearest, ties to even.
#[inline(always)]
fn bf16(v: f32) -> u16 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // A NaN must not be carried over into an infinity.
    (if v.is_nan() {
        bits >> 16 | 0x40
    } else {
        rounded
    }) as u16
}

#[inline(always)]
fn from_bf16(bits: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(bits) << 16))
}

#[cfg(test)]
mod tests {
    use kernels::to_grid;
    use proptest::prelude::*;

    use super::*;

    fn travelled(wire: Wire, values: &[f64]) -> Vec<f64> {
        let mut message = Vec::new();
        wire.encode(values, &mut message);
        assert!(message.len() <= wire.most_bytes(values.len()));
        let mut out = vec![f64::NAN; values.len()];
        wire.set(&message, &mut out).unwrap();
        // Adding to what is there gives the same numbers.
        let mut sums = vec![1.0; values.len()];
        wire.add(&message, &mut sums).unwrap();
        for (sum, v) in sums.iter().zip(&out) {
            assert!(*sum == 1.0 + v || v.is_nan());
        }
        // And so does rounding in place.
        let mut rounded = values.to_vec();
        wire.round(&mut rounded);
        assert_eq!(bits(&rounded), bits(&out));
        out
    }

    /// Bits, a zero without its sign.
    fn bits(values: &[f64]) -> Vec<u64> {
        values.iter().map(|v| (v + 0.0).to_bits()).collect()
    }

    /// The format's definition, value by value.
    fn model(wire: Wire, values: &[f64]) -> Vec<f64> {
        match wire {
            Wire::Exact => values.to_vec(),
            Wire::F32 => values.iter().map(|&v| f64::from(v as f32)).collect(),
            Wire::Bf16 => values
                .iter()
                .map(|&v| half::bf16::from_f32(v as f32).to_f64())
                .collect(),
            Wire::Int8 => values
                .chunks(INT8_BLOCK)
                .flat_map(|block| {
                    let block: Vec<f32> = block.iter().map(|&v| v as f32).collect();
                    let bad = block.iter().any(|v| !v.is_finite());
                    let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                    block.into_iter().map(move |v| match largest / 127.0 {
                        _ if bad => f64::NAN,
                        s if s < f32::MIN_POSITIVE => 0.0,
                        s => f64::from((v * (127.0 / largest)).round_ties_even()) * f64::from(s),
                    })
                })
                .collect(),
        }
    }

    /// Numbers as sums of a model have them, and everything else.
    fn value() -> impl Strategy<Value = f64> {
        prop_oneof![
            4 => (-200.0f32..200.0).prop_map(to_grid),
            2 => (-0.01f32..0.01).prop_map(to_grid),
            1 => any::<f32>().prop_map(f64::from),
            1 => any::<f64>(),
            1 => Just(0.0),
            1 => (-1e6f32..1e6).prop_map(to_grid),
        ]
    }

    proptest! {
        #[test]
        fn each_format_is_its_definition(values in proptest::collection::vec(value(), 0..300)) {
            for wire in Wire::ALL {
                let (got, expected) = (travelled(wire, &values), model(wire, &values));
                for (i, (a, b)) in got.iter().zip(&expected).enumerate() {
                    let same = (a + 0.0).to_bits() == (b + 0.0).to_bits() || a.is_nan() && b.is_nan();
                    prop_assert!(same, "{wire}: value {i} of {:?} became {a:?}, expected {b:?}", values[i]);
                }
            }
        }

        #[test]
        fn numbers_of_every_width_travel_exactly(width in 0u32..60, seed in any::<u64>()) {
            let unit = 2f64.powi(-32);
            let values: Vec<f64> = (0..130u64)
                .map(|i| {
                    let x = seed.wrapping_mul(i * 2 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) as i64;
                    // At most 53 significant bits, or it would be no f64.
                    (x >> 12 >> (52 - width.min(52))) as f64 * unit * 2f64.powi(width.saturating_sub(52) as i32)
                })
                .collect();
            prop_assert_eq!(bits(&travelled(Wire::Exact, &values)), bits(&values));
        }

        #[test]
        fn any_bytes_are_values_or_malformed(bytes in proptest::collection::vec(any::<u8>(), 0..400), len in 0usize..100) {
            for wire in Wire::ALL {
                let mut out = vec![0.0; len];
                // Must neither panic nor read beyond; with the wrong number of bytes it must say so.
                if wire.set(&bytes, &mut out).is_ok() {
                    prop_assert!(bytes.len() <= wire.most_bytes(len));
                }
            }
        }
    }

    #[test]
    fn a_message_of_another_length_is_malformed() {
        for wire in Wire::ALL {
            let mut message = Vec::new();
            wire.encode(&[1.5; 100], &mut message);
            for len in [0, 99, 101] {
                assert_eq!(
                    wire.set(&message, &mut vec![0.0; len]),
                    Err(Malformed),
                    "{wire}"
                );
            }
            message.push(0);
            assert_eq!(
                wire.set(&message, &mut [0.0; 100]),
                Err(Malformed),
                "{wire}"
            );
        }
    }

    #[test]
    fn sums_of_a_model_take_about_as_many_bytes_as_f32() {
        let values: Vec<f64> = (0..4096).map(|i| to_grid((i as f32).sin() * 3.0)).collect();
        let mut message = Vec::new();
        Wire::Exact.encode(&values, &mut message);
        assert_eq!(message.len(), 4096 / BLOCK + 4096 * 5);
        message.clear();
        // Zeros of a rank that has no row of the embedding.
        Wire::Exact.encode(&[0.0; 4096], &mut message);
        assert_eq!(message.len(), 4096 / BLOCK);
        message.clear();
        // A row of the embedding, on no grid.
        let row: Vec<f64> = (0..4096)
            .map(|i| f64::from((i as f32).sin() * 1e-3))
            .collect();
        Wire::Exact.encode(&row, &mut message);
        assert_eq!(message.len(), 4096 / BLOCK + 4096 * 4);
    }

    #[test]
    fn names_are_read_back() {
        for wire in Wire::ALL {
            assert_eq!(wire.name().parse(), Ok(wire));
        }
        assert!("f16".parse::<Wire>().unwrap_err().contains("int8"));
    }
}

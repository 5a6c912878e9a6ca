//! Random blocks of each format, fast: codes are random bits, scales set so that the weights have the wanted spread.

use half::f16;
use kernels::Format;

/// A source of weights; the same seed gives the same.
pub(super) struct Draw {
    state: u64,
}

impl Draw {
    pub(super) fn new(seed: u64) -> Self {
        Draw { state: seed }
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Fills a row with weights of mean zero and standard deviation `std`.
    ///
    /// # Panics
    /// For formats that no mixture of [`super::Mixture`] has.
    pub(super) fn row(&mut self, format: Format, std: f32, row: &mut [u8]) {
        for eight in row.chunks_mut(8) {
            let random = self.next().to_le_bytes();
            eight.copy_from_slice(&random[..eight.len()]);
        }
        for block in row.chunks_exact_mut(format.block_bytes()) {
            // A random sign, because the codes of these formats reach one further below zero than above.
            let sign = if block[2] & 1 == 0 { 1.0 } else { -1.0 };
            let put = |at: &mut [u8], value: f32| {
                at[..2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
            };
            // Spreads of the codes, all equally likely; those of scale times code where scales are codes too.
            match format {
                // (0..16) - 8
                Format::Q4_0 => put(block, sign * std / 4.637),
                // -128..128
                Format::Q8_0 => put(block, sign * std / 73.90),
                // (-128..128) · ((0..64) - 32)
                Format::Q6_K => put(&mut block[208..], sign * std / 1365.8),
                // d · (0..64) · (0..16) - dmin · (0..64) with dmin = 7.5 d, which makes the mean zero
                Format::Q4_K => {
                    put(block, std / 258.3);
                    put(&mut block[2..], std * 7.5 / 258.3);
                }
                other => unimplemented!("random {other:?} weights"),
            }
        }
    }
}

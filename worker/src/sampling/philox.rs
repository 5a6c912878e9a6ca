//! Philox4x32-10: random numbers as a function of (key, counter). Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011. No state, so a resumed answer draws what it would have drawn.

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// Four words for one counter under one key.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// A number in [0, 1) with 53 random bits, the same for the same seed and position of the token in its sequence.
pub fn uniform(seed: u64, position: u64) -> f64 {
    let key = [seed as u32, (seed >> 32) as u32];
    let words = philox([position as u32, (position >> 32) as u32, 0, 0], key);
    let bits = u64::from(words[0]) << 32 | u64::from(words[1]);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    // Known answers of the authors' Random123 distribution (kat_vectors).
    #[test]
    fn known_answers() {
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [u32::MAX; 4],
                [u32::MAX; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox(counter, key), want);
        }
    }

    #[test]
    fn numbers_fill_the_interval_evenly_over_positions_and_over_seeds() {
        const DRAWS: u64 = 100_000;
        const BINS: usize = 100;
        let over_positions: fn(u64) -> f64 = |i| uniform(42, i);
        let over_seeds: fn(u64) -> f64 = |i| uniform(i, 7);
        for draw in [over_positions, over_seeds] {
            let mut bins = [0u32; BINS];
            for i in 0..DRAWS {
                bins[(draw(i) * BINS as f64) as usize] += 1;
            }
            let expected = DRAWS as f64 / BINS as f64;
            let chi: f64 = bins
                .iter()
                .map(|&n| (f64::from(n) - expected).powi(2) / expected)
                .sum();
            // 99 degrees of freedom: 0.0001 of fair generators lie above 161, as many below 52.
            assert!((52.0..161.0).contains(&chi), "chi-square {chi}");
        }
    }

    #[test]
    fn neighbouring_positions_do_not_follow_each_other() {
        const DRAWS: u64 = 100_000;
        let mean: f64 = (0..DRAWS)
            .map(|i| (uniform(1, i) - 0.5) * (uniform(1, i + 1) - 0.5))
            .sum::<f64>()
            / DRAWS as f64;
        // Standard deviation of the mean of products of independent uniforms: 1/12/sqrt(n).
        assert!(
            mean.abs() < 5.0 / 12.0 / (DRAWS as f64).sqrt(),
            "covariance {mean}"
        );
    }
}

//! Random and adversarial inputs, made from a seed.
#![allow(dead_code)] // each test file uses a part

use half::f16;
use kernels::{Format, WeightRows};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// In (-1, 1).
    pub fn float(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }

    /// Activations as a transformer has them: mostly small, a few far out.
    pub fn activations(&mut self, len: usize) -> Vec<f32> {
        (0..len)
            .map(|_| {
                if self.below(50) == 0 {
                    self.float() * 30.0
                } else {
                    self.float()
                }
            })
            .collect()
    }
}

/// What a block's scales are made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scales {
    Usual,
    Denormal,
    Largest,
    Zero,
}

impl Scales {
    pub const ALL: [Scales; 4] = [
        Scales::Usual,
        Scales::Denormal,
        Scales::Largest,
        Scales::Zero,
    ];

    fn bits(self, random: &mut Random) -> u16 {
        let sign = (random.bits() as u16 & 1) << 15;
        match self {
            Scales::Usual => f16::from_f32(random.float() * 0.05).to_bits(),
            Scales::Denormal => (random.bits() as u16 & 0x3ff) | sign,
            Scales::Largest => 0x7bff | sign,
            Scales::Zero => sign,
        }
    }
}

/// Where a block of a quantised format keeps its f16 scales.
pub fn scale_offsets(format: Format) -> &'static [usize] {
    match format {
        Format::Q8_0 | Format::Q4_0 | Format::Q5_0 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
        Format::Q6_K => &[208],
        Format::F32 | Format::F16 | Format::BF16 => &[],
    }
}

/// A row of random codes under such scales.
pub fn stored_row(format: Format, cols: usize, scales: Scales, random: &mut Random) -> Vec<u8> {
    let mut row = Vec::new();
    if !format.is_quantised() {
        let size = match scales {
            Scales::Usual => 0.05,
            Scales::Denormal => 1e-41,
            Scales::Largest => 60_000.0,
            Scales::Zero => 0.0,
        };
        let x: Vec<f32> = (0..cols).map(|_| random.float() * size).collect();
        kernels::quantize_row(format, &x, &mut row).unwrap();
        return row;
    }
    row.extend((0..format.row_bytes(cols)).map(|_| random.bits() as u8));
    for block in row.chunks_exact_mut(format.block_bytes()) {
        for &at in scale_offsets(format) {
            block[at..at + 2].copy_from_slice(&scales.bits(random).to_le_bytes());
        }
    }
    row
}

/// A stored matrix.
pub struct Stored {
    pub format: Format,
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<u8>,
}

impl Stored {
    pub fn random(
        format: Format,
        rows: usize,
        cols: usize,
        scales: Scales,
        random: &mut Random,
    ) -> Stored {
        let data = (0..rows)
            .flat_map(|_| stored_row(format, cols, scales, random))
            .collect();
        Stored {
            format,
            rows,
            cols,
            data,
        }
    }

    pub fn view(&self) -> WeightRows<'_> {
        WeightRows::new(self.format, self.rows, self.cols, &self.data)
    }

    pub fn row(&self, row: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.cols];
        kernels::dequantize_row(self.format, self.view().row(row), &mut out).unwrap();
        out
    }

    /// `x · wᵀ` in f64 for one row, and for each result the sum of its products' magnitudes.
    pub fn times(&self, x: &[f64]) -> Vec<(f64, f64)> {
        let product = |n: usize| {
            let row = self.row(n);
            let products = row.iter().zip(x).map(|(&w, x)| f64::from(w) * x);
            products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
        };
        (0..self.rows).map(product).collect()
    }
}

/// Activations as the quantised kernels see them: bytes with a scale for each 32, where a block of weights is longer of four sizes that
/// double, the largest for the block's largest.
pub fn rounded(x: &[f32], format: Format) -> Vec<f64> {
    let largest = |x: &[f32]| x.iter().fold(0.0f32, |a, v| a.max(v.abs()));
    let group = |x: &[f32]| {
        let most = largest(x);
        x.chunks(32)
            .flat_map(|block| {
                let size = [8.0, 4.0, 2.0]
                    .into_iter()
                    .map(|part| most / part)
                    .find(|&size| format.block_len() > 32 && largest(block) <= size)
                    .unwrap_or(most);
                let (d, inverse) = if size > 1e-35 {
                    (size / 127.0, 127.0 / size)
                } else {
                    (0.0, 0.0)
                };
                block
                    .iter()
                    .map(move |v| f64::from((v * inverse).round_ties_even()) * f64::from(d))
                    .collect::<Vec<_>>()
            })
            .collect::<Vec<_>>()
    };
    x.chunks(format.block_len()).flat_map(group).collect()
}

/// Panics unless `got` lies within `tolerance` of the exact value, relative to the magnitudes that were summed.
#[track_caller]
pub fn assert_near(got: f32, (exact, size): (f64, f64), tolerance: f64, what: &str) {
    let error = (f64::from(got) - exact).abs();
    assert!(
        error <= size * tolerance + 1e-37,
        "{what}: got {got}, exact {exact}, error {error:e}, summed {size:e}"
    );
}

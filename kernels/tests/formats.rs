//! Each format's meaning, against candle's.

mod material;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use kernels::{Error, Format, dequantize_row, quantize_row};
use material::*;
use proptest::prelude::*;

fn candle_type(format: Format) -> GgmlDType {
    match format {
        Format::F32 => GgmlDType::F32,
        Format::F16 => GgmlDType::F16,
        Format::BF16 => GgmlDType::BF16,
        Format::Q8_0 => GgmlDType::Q8_0,
        Format::Q4_0 => GgmlDType::Q4_0,
        Format::Q4_1 => GgmlDType::Q4_1,
        Format::Q5_0 => GgmlDType::Q5_0,
        Format::Q5_1 => GgmlDType::Q5_1,
        Format::Q4_K => GgmlDType::Q4K,
        Format::Q5_K => GgmlDType::Q5K,
        Format::Q6_K => GgmlDType::Q6K,
    }
}

fn candle_reads(format: Format, cols: usize, data: &[u8]) -> Vec<f32> {
    let storage = QStorage::from_data(data.into(), &Device::Cpu, candle_type(format)).unwrap();
    let tensor = QTensor::new(storage, (1, cols))
        .unwrap()
        .dequantize(&Device::Cpu)
        .unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_format_reads_as_candle_reads_it() {
    let mut random = Random(1);
    for format in Format::ALL {
        for scales in Scales::ALL {
            let row = stored_row(format, 512, scales, &mut random);
            let mut ours = vec![f32::NAN; 512];
            dequantize_row(format, &row, &mut ours).unwrap();
            for (i, (ours, theirs)) in ours.iter().zip(candle_reads(format, 512, &row)).enumerate()
            {
                // A product of three factors may be rounded in another order.
                assert!(
                    (ours - theirs).abs() <= theirs.abs() * 3e-7,
                    "{format:?} {scales:?} {i}: {ours} {theirs}"
                );
            }
        }
    }
}

#[test]
fn candle_made_k_quants_read_back_near_the_original() {
    let x = Random(2).floats(512);
    let tensor = Tensor::from_vec(x.clone(), (1, 512), &Device::Cpu)
        .unwrap()
        .to_dtype(DType::F32)
        .unwrap();
    for (format, tolerance) in [
        (Format::Q4_K, 0.1),
        (Format::Q5_K, 0.05),
        (Format::Q6_K, 0.03),
    ] {
        let made = QTensor::quantize(&tensor, candle_type(format)).unwrap();
        let mut ours = vec![0.0; 512];
        dequantize_row(format, &made.data().unwrap(), &mut ours).unwrap();
        let error: f32 = ours
            .iter()
            .zip(&x)
            .map(|(a, b)| (a - b).powi(2))
            .sum::<f32>()
            .sqrt();
        let size: f32 = x.iter().map(|b| b * b).sum::<f32>().sqrt();
        assert!(error < tolerance * size, "{format:?}: {error} of {size}");
    }
}

#[test]
fn sizes_and_numbers_are_ggufs() {
    for format in Format::ALL {
        assert_eq!(
            format.block_bytes(),
            candle_type(format).type_size(),
            "{format:?}"
        );
        assert_eq!(
            format.block_len(),
            candle_type(format).block_size(),
            "{format:?}"
        );
        assert_eq!(Format::from_ggml_type(format.ggml_type()), Some(format));
    }
    assert!(
        [4, 5, 9, 10, 15, 31, u32::MAX]
            .iter()
            .all(|&n| Format::from_ggml_type(n).is_none())
    );
}

#[test]
fn a_row_of_the_wrong_size_is_an_error() {
    for format in Format::ALL {
        let bytes = format.row_bytes(256);
        let mut out = vec![0.0; 256];
        assert!(dequantize_row(format, &vec![0; bytes], &mut out).is_ok());
        for len in [0, bytes - 1, bytes + 1] {
            assert!(
                matches!(
                    dequantize_row(format, &vec![0; len], &mut out),
                    Err(Error::Shape(_))
                ),
                "{format:?}"
            );
        }
    }
    assert!(matches!(
        quantize_row(Format::Q4_0, &[0.0; 31], &mut Vec::new()),
        Err(Error::Shape(_))
    ));
    assert!(matches!(
        quantize_row(Format::Q4_K, &[0.0; 256], &mut Vec::new()),
        Err(Error::Unsupported(_))
    ));
}

proptest! {
    /// No made weight is further from its original than the format's step allows.
    #[test]
    fn a_made_row_reads_back_within_a_step(x in proptest::collection::vec(-1e4f32..1e4, 64)) {
        for (format, steps) in [(Format::Q8_0, 127.0), (Format::Q4_0, 8.0), (Format::Q4_1, 15.0), (Format::F16, 1000.0), (Format::BF16, 128.0)] {
            let (mut row, mut back) = (Vec::new(), vec![0.0; 64]);
            quantize_row(format, &x, &mut row).unwrap();
            dequantize_row(format, &row, &mut back).unwrap();
            for (x, back) in x.chunks(32).zip(back.chunks(32)) {
                let low = x.iter().copied().fold(f32::INFINITY, f32::min);
                let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let range = if format == Format::Q4_1 { high - low } else { high.max(-low) };
                for (x, back) in x.iter().zip(back) {
                    // One step at most (Q4_0 cuts its far side), and the scale's own rounding to f16.
                    prop_assert!((x - back).abs() <= range / steps * 1.02 + high.max(-low) * 2e-3, "{format:?}: {x} {back}");
                }
            }
        }
    }
}

//! Matrix products on every instruction set of this machine, against sums in f64.

mod material;

use kernels::{Cpu, Device, Error, Format, Isa, WeightRows, to_grid};
use material::*;

/// Widths that are one block, an odd number of blocks, SmolLM2's, and K-quants' smallest.
fn widths(format: Format) -> Vec<usize> {
    match format.block_len() {
        1 => vec![1, 31, 64, 75, 576],
        32 => vec![32, 96, 576],
        _ => vec![256, 768],
    }
}

fn multiply(cpu: &Cpu, w: WeightRows<'_>, x: &[f32], rows: usize) -> Vec<f32> {
    let packed = cpu.pack(w).unwrap();
    let mut out = vec![0.0; rows * w.rows];
    cpu.matmul(&[&packed], &x.to_vec(), rows, &mut [&mut out]);
    out
}

fn seen(format: Format, x: &[f32]) -> Vec<f64> {
    if format.is_quantised() {
        rounded(x, format)
    } else {
        x.iter().map(|&x| f64::from(x)).collect()
    }
}

#[test]
fn every_isa_and_format_agrees_with_sums_in_f64() {
    let mut random = Random(1);
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        for format in Format::ALL {
            for cols in widths(format) {
                for scales in Scales::ALL {
                    let (heights, rows) = (
                        [1, 9, 16, 33][random.below(4)],
                        [1, 2, 3, 5, 8, 15][random.below(6)],
                    );
                    let w = Stored::random(format, heights, cols, scales, &mut random);
                    let x = random.activations(rows * cols);
                    let out = multiply(&cpu, w.view(), &x, rows);
                    for (r, out) in out.chunks_exact(heights).enumerate() {
                        let exact = w.times(&seen(format, &x[r * cols..(r + 1) * cols]));
                        for (n, (&got, exact)) in out.iter().zip(exact).enumerate() {
                            let what = format!(
                                "{isa} {format:?} {scales:?} {heights}x{cols}, row {r} of {rows}, {n}"
                            );
                            assert_near(got, exact, 4e-6, &what);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn codes_and_activations_at_their_limits_do_not_overflow() {
    for isa in Isa::available() {
        let cpu = Cpu::new(1, isa);
        for format in Format::ALL.into_iter().filter(|f| f.is_quantised()) {
            for byte in [0x00, 0xff, 0x80, 0x7f] {
                for sign in [1.0f32, -1.0] {
                    let cols = 256;
                    let mut data = vec![byte; 16 * format.row_bytes(cols)];
                    for block in data.chunks_exact_mut(format.block_bytes()) {
                        for &at in scale_offsets(format) {
                            block[at..at + 2].copy_from_slice(&half::f16::ONE.to_le_bytes());
                        }
                    }
                    let w = Stored {
                        format,
                        rows: 16,
                        cols,
                        data,
                    };
                    // One row, and as many as are taken by other kernels.
                    let x = vec![sign * 3.0; cols];
                    let exact = w.times(&rounded(&x, format));
                    let mut products = multiply(&cpu, w.view(), &x, 1);
                    products.extend(multiply(&cpu, w.view(), &x.repeat(33), 33));
                    assert_eq!(products.len(), 34 * exact.len());
                    for (got, &exact) in products.into_iter().zip(exact.iter().cycle()) {
                        assert_near(
                            got,
                            exact,
                            4e-6,
                            &format!("{isa} {format:?} {byte:#x} {sign}"),
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_is_the_same_in_any_company_and_on_any_number_of_threads() {
    let mut random = Random(2);
    for isa in Isa::available() {
        let (one, three) = (Cpu::new(1, isa), Cpu::new(3, isa));
        for format in Format::ALL {
            // Large enough that the work is cut into several tasks.
            let (rows, heights, cols) = (19, 200, 512);
            let w = Stored::random(format, heights, cols, Scales::Usual, &mut random);
            let x = random.activations(rows * cols);
            let all = multiply(&three, w.view(), &x, rows);
            assert_eq!(all, multiply(&one, w.view(), &x, rows), "{isa} {format:?}");
            for count in [1, 2, 7, 16] {
                for first in (0..rows - count).step_by(5) {
                    let some = multiply(
                        &one,
                        w.view(),
                        &x[first * cols..(first + count) * cols],
                        count,
                    );
                    assert_eq!(
                        all[first * heights..(first + count) * heights],
                        some,
                        "{isa} {format:?}, {count} rows"
                    );
                }
            }
        }
    }
}

#[test]
fn the_largest_products_are_summed_without_overflow() {
    let (rows, cols, heights) = (19, 512, 40);
    for isa in Isa::available() {
        let cpu = Cpu::new(1, isa);
        for (format, zero, factor) in [
            (Format::Q4_0, 8, 1),
            (Format::Q5_0, 16, 1),
            (Format::Q6_K, 32, 1),
            (Format::Q6_K, 32, i8::MIN),
        ] {
            for (byte, code) in [(0, -zero), (0xff, zero - 1)] {
                let mut data = vec![byte; heights * format.row_bytes(cols)];
                for block in data.chunks_exact_mut(format.block_bytes()) {
                    let one = half::f16::ONE.to_le_bytes();
                    if format == Format::Q6_K {
                        block[192..208].fill(factor as u8);
                        block[208..].copy_from_slice(&one);
                    } else {
                        block[..2].copy_from_slice(&one);
                    }
                }
                let w = WeightRows::new(format, heights, cols, &data);
                for x in [1.0, -1.0] {
                    let exact = (code * i32::from(factor) * cols as i32) as f32 * x;
                    for out in multiply(&cpu, w, &vec![x; rows * cols], rows) {
                        let error = (out - exact).abs();
                        assert!(
                            error <= 1e-5 * exact.abs(),
                            "{isa} {format:?}: {out} {exact}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn more_rows_than_one_pass_takes_give_the_bits_of_single_rows() {
    let mut random = Random(10);
    let (rows, cols, heights) = (301, 4096, 35);
    for isa in Isa::available()
        .into_iter()
        .filter(|&isa| isa != Isa::Scalar)
    {
        let (one, three) = (Cpu::new(1, isa), Cpu::new(3, isa));
        for format in Format::ALL {
            let w = Stored::random(format, heights, cols, Scales::Usual, &mut random);
            let x = random.activations(rows * cols);
            let all = multiply(&three, w.view(), &x, rows);
            for r in 0..rows {
                let row = multiply(&one, w.view(), &x[r * cols..(r + 1) * cols], 1);
                assert_eq!(
                    all[r * heights..(r + 1) * heights],
                    row,
                    "{isa} {format:?}, row {r}"
                );
            }
        }
    }
}

#[test]
fn a_sum_over_column_parts_has_the_bits_of_its_rounded_parts() {
    let mut random = Random(11);
    for isa in Isa::available() {
        for (threads, rows) in [(1, 1), (3, 1), (2, 7), (3, 301)] {
            if isa == Isa::Scalar && rows > 100 {
                continue;
            }
            let cpu = Cpu::new(threads, isa);
            for format in [Format::Q4_1, Format::Q8_0, Format::Q6_K, Format::F16] {
                let (heights, cols, edges) = (75, 4096, [0, 256, 1536, 4096]);
                let w = Stored::random(format, heights, cols, Scales::Usual, &mut random);
                let x = random.activations(rows * cols);
                let parts: Vec<_> = edges
                    .windows(2)
                    .map(|e| cpu.pack(w.view().columns(e[0]..e[1]).unwrap()).unwrap())
                    .collect();
                let mut exact = vec![0.0f64; rows * heights];
                for (part, e) in parts.iter().zip(edges.windows(2)) {
                    let columns: Vec<f32> = x
                        .chunks(cols)
                        .flat_map(|row| row[e[0]..e[1]].iter().copied())
                        .collect();
                    let mut out = vec![0.0; rows * heights];
                    cpu.matmul(&[part], &columns, rows, &mut [&mut out]);
                    exact
                        .iter_mut()
                        .zip(out)
                        .for_each(|(sum, v)| *sum += to_grid(v));
                }
                // What was there before must not show.
                let mut sum = vec![f64::NAN; rows * heights];
                let whole = cpu.pack(w.view()).unwrap();
                cpu.matmul_sum(&whole, &edges[1..], &x, rows, &mut sum);
                assert_eq!(sum, exact, "{isa} {format:?}, {rows} rows");
            }
        }
    }
}

#[test]
fn grid_points_add_up_to_the_same_bits_in_any_order() {
    let mut random = Random(12);
    let points: Vec<f64> = random
        .activations(1000)
        .iter()
        .map(|&x| to_grid(x * 1000.0))
        .collect();
    let forward: f64 = points.iter().sum();
    let backward: f64 = points.iter().rev().sum();
    assert_eq!(forward.to_bits(), backward.to_bits());
    assert_eq!(to_grid(1.0), 1.0);
    assert!((to_grid(0.1) - 0.1).abs() < 1e-8);
    assert!(to_grid(f32::NAN).is_nan());
    assert_eq!(to_grid(f32::INFINITY), f64::INFINITY);
}

#[test]
fn several_matrices_at_once_give_what_each_gives_alone() {
    let mut random = Random(3);
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        let (rows, cols) = (3, 512);
        let stored: Vec<Stored> = [
            (Format::Q4_K, 40),
            (Format::Q6_K, 9),
            (Format::F16, 17),
            (Format::Q8_0, 300),
        ]
        .into_iter()
        .map(|(format, heights)| Stored::random(format, heights, cols, Scales::Usual, &mut random))
        .collect();
        let x = random.activations(rows * cols);
        let packed: Vec<_> = stored.iter().map(|w| cpu.pack(w.view()).unwrap()).collect();
        let mut out: Vec<Vec<f32>> = stored.iter().map(|w| vec![0.0; rows * w.rows]).collect();
        cpu.matmul(
            &packed.iter().collect::<Vec<_>>(),
            &x,
            rows,
            &mut out.iter_mut().collect::<Vec<_>>(),
        );
        for (w, out) in stored.iter().zip(out) {
            assert_eq!(
                out,
                multiply(&cpu, w.view(), &x, rows),
                "{isa} {:?}",
                w.format
            );
        }
    }
}

#[test]
fn a_shard_of_columns_or_rows_is_packed_from_the_whole() {
    let mut random = Random(4);
    for isa in Isa::available() {
        let cpu = Cpu::new(1, isa);
        for format in Format::ALL {
            let (heights, cols, edge) = (21, 1536, 512);
            let w = Stored::random(format, heights, cols, Scales::Usual, &mut random);
            let x = random.activations(cols);
            let whole = multiply(&cpu, w.view(), &x, 1);
            let left = multiply(&cpu, w.view().columns(0..edge).unwrap(), &x[..edge], 1);
            let right = multiply(&cpu, w.view().columns(edge..cols).unwrap(), &x[edge..], 1);
            let sizes = w.times(&seen(format, &x));
            for n in 0..heights {
                assert_near(
                    left[n] + right[n],
                    (f64::from(whole[n]), sizes[n].1),
                    4e-6,
                    &format!("{isa} {format:?}"),
                );
            }
            let some = multiply(&cpu, w.view().row_range(5..18).unwrap(), &x, 1);
            assert_eq!(some, whole[5..18], "{isa} {format:?}");
        }
    }
}

#[test]
fn a_value_that_is_not_finite_shows_in_its_row_and_in_no_other() {
    let mut random = Random(5);
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        for format in Format::ALL {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let (rows, cols) = (6, 256);
                let w = Stored::random(format, 16, cols, Scales::Usual, &mut random);
                let mut x = random.activations(rows * cols);
                let clean = multiply(&cpu, w.view(), &x, rows);
                x[3 * cols + random.below(cols)] = bad;
                let out = multiply(&cpu, w.view(), &x, rows);
                for (i, (out, clean)) in out.iter().zip(clean).enumerate() {
                    if i / 16 == 3 {
                        assert!(!out.is_finite(), "{isa} {format:?} {bad}: {out}");
                    } else {
                        assert_eq!(*out, clean, "{isa} {format:?} {bad}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_weight_that_is_nan_shows_in_its_column_and_in_no_other() {
    for isa in Isa::available() {
        let cpu = Cpu::new(1, isa);
        for format in Format::ALL.into_iter().filter(|f| f.is_quantised()) {
            let mut random = Random(6);
            let mut w = Stored::random(format, 16, 256, Scales::Usual, &mut random);
            let at = 7 * format.row_bytes(256) + scale_offsets(format)[0];
            w.data[at..at + 2].copy_from_slice(&half::f16::NAN.to_le_bytes());
            let out = multiply(&cpu, w.view(), &random.activations(256), 1);
            assert!(
                out.iter().enumerate().all(|(n, x)| x.is_nan() == (n == 7)),
                "{isa} {format:?} {out:?}"
            );
        }
    }
}

#[test]
fn tiny_and_huge_activations_keep_their_size() {
    let mut random = Random(7);
    for isa in Isa::available() {
        let cpu = Cpu::new(1, isa);
        for format in Format::ALL {
            let w = Stored::random(format, 8, 256, Scales::Usual, &mut random);
            for size in [1e-41, 1e-36, 1e-30, 1e30] {
                let x: Vec<f32> = random.floats(256).iter().map(|x| x * size).collect();
                for (got, exact) in multiply(&cpu, w.view(), &x, 1)
                    .into_iter()
                    .zip(w.times(&seen(format, &x)))
                {
                    assert_near(got, exact, 4e-6, &format!("{isa} {format:?} {size:e}"));
                }
            }
        }
    }
}

#[test]
fn a_packed_row_reads_back_exactly() {
    let mut random = Random(8);
    for isa in Isa::available() {
        let cpu = Cpu::new(2, isa);
        for format in Format::ALL {
            for scales in Scales::ALL {
                let w = Stored::random(format, 37, 256, scales, &mut random);
                let table = cpu.pack(w.view()).unwrap();
                let ids = [36, 0, 17, 37, u32::MAX];
                let mut out = vec![1.0; 256 * (ids.len() + 1)];
                cpu.embed(&table, &ids, &mut out, 1);
                assert!(
                    out[..256].iter().all(|&x| x == 1.0),
                    "rows before the first are left alone"
                );
                for (&id, out) in ids.iter().zip(out[256..].chunks_exact(256)) {
                    let expected = if id < 37 {
                        w.row(id as usize)
                    } else {
                        vec![0.0; 256]
                    };
                    assert_eq!(out, expected, "{isa} {format:?} {scales:?} {id}");
                }
            }
        }
    }
}

#[test]
fn a_packed_matrix_is_about_as_large_as_stored() {
    let cpu = Cpu::new(1, Isa::detect());
    for format in Format::ALL {
        let w = Stored::random(format, 64, 2048, Scales::Usual, &mut Random(9));
        let packed = cpu.matrix_bytes(&cpu.pack(w.view()).unwrap());
        assert!(
            packed <= w.data.len() * 21 / 20 && packed * 21 / 20 >= w.data.len(),
            "{format:?}: {packed}"
        );
    }
}

#[test]
fn bytes_that_do_not_fit_the_shape_are_an_error() {
    let cpu = Cpu::new(1, Isa::Scalar);
    for format in Format::ALL {
        let data = vec![0u8; 4 * format.row_bytes(256)];
        let fits = WeightRows::new(format, 4, 256, &data);
        assert!(cpu.pack(fits).is_ok());
        let misfits = [
            WeightRows { rows: 5, ..fits },
            WeightRows {
                first_byte: 1,
                ..fits
            },
            WeightRows {
                first_byte: usize::MAX,
                ..fits
            },
            WeightRows {
                row_stride_bytes: usize::MAX,
                ..fits
            },
            WeightRows {
                rows: usize::MAX,
                ..fits
            },
            WeightRows {
                data: &data[..data.len() - 1],
                ..fits
            },
        ];
        for misfit in misfits {
            assert!(
                matches!(cpu.pack(misfit), Err(Error::Shape(_))),
                "{format:?}"
            );
        }
        if format.is_quantised() {
            assert!(matches!(
                cpu.pack(WeightRows { cols: 255, ..fits }),
                Err(Error::Shape(_))
            ));
            assert!(fits.columns(0..16).is_err() && fits.columns(16..256).is_err());
        }
        assert!(fits.columns(0..512).is_err() && fits.row_range(2..5).is_err());
    }
}

#[test]
fn empty_matrices_and_batches_are_no_trouble() {
    let cpu = Cpu::new(2, Isa::detect());
    let none = cpu.pack(WeightRows::new(Format::Q4_0, 0, 64, &[])).unwrap();
    cpu.matmul(&[&none], &vec![0.0; 64], 1, &mut [&mut Vec::new()]);
    let data = vec![0; Format::Q4_0.row_bytes(64)];
    let one = cpu
        .pack(WeightRows::new(Format::Q4_0, 1, 64, &data))
        .unwrap();
    cpu.matmul(&[&one], &Vec::new(), 0, &mut [&mut Vec::new()]);
    cpu.matmul(&[], &Vec::new(), 0, &mut []);
}

//! One tensor of a file: its format, shape and bytes, and the check that it holds numbers.

use std::path::{Path, PathBuf};

use kernels::Format;

use super::Error;

/// A view of a stored tensor; the bytes are read from disk when touched.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    path: &'a Path,
    name: &'a str,
    format: Format,
    shape: &'a [usize],
    data: &'a [u8],
}

impl<'a> Tensor<'a> {
    pub(super) fn new(
        path: &'a Path,
        name: &'a str,
        format: Format,
        shape: &'a [usize],
        data: &'a [u8],
    ) -> Self {
        Tensor {
            path,
            name,
            format,
            shape,
            data,
        }
    }

    /// Name in the file.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Number or block format of the elements.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Slowest dimension first: a matrix is `[rows, cols]`.
    pub fn shape(&self) -> &'a [usize] {
        self.shape
    }

    /// All bytes, row after row.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Rows of a matrix; 1 for a vector.
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Length of a row.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// All elements as f32, row-major. Errors when one is not finite.
    pub fn to_f32(&self) -> Result<Vec<f32>, Error> {
        let (rows, cols) = (self.rows(), self.cols());
        let mut out = vec![0.0; rows * cols];
        if cols == 0 {
            return Ok(out);
        }
        let row_bytes = self.format.row_bytes(cols);
        for (row, (bytes, values)) in self
            .data
            .chunks_exact(row_bytes)
            .zip(out.chunks_exact_mut(cols))
            .enumerate()
        {
            kernels::dequantize_row(self.format, bytes, values)
                .map_err(|_| self.not_finite(row))?;
            if values.iter().any(|v| !v.is_finite()) {
                return Err(self.not_finite(row));
            }
        }
        Ok(out)
    }

    /// Errors unless every number in rows `rows`, bytes `part` of each row, is finite. For block formats this looks at the
    /// scales, which is where a block can stop being finite.
    pub fn check_finite(
        &self,
        rows: std::ops::Range<usize>,
        part: std::ops::Range<usize>,
    ) -> Result<(), Error> {
        let stride = self.format.row_bytes(self.cols());
        for row in rows {
            let start = row.saturating_mul(stride);
            let bytes = self
                .data
                .get(start.saturating_add(part.start)..start.saturating_add(part.end))
                .unwrap_or(&[]);
            if !finite(self.format, bytes) {
                return Err(self.not_finite(row));
            }
        }
        Ok(())
    }

    fn not_finite(&self, row: usize) -> Error {
        Error::NotFinite {
            path: PathBuf::from(self.path),
            tensor: self.name.into(),
            row,
        }
    }
}

/// Whether whole blocks of `format` hold only finite numbers.
fn finite(format: Format, bytes: &[u8]) -> bool {
    // An f16 is infinite or NaN exactly if its five exponent bits are all ones.
    let f16 = |block: &[u8], at: usize| block.get(at + 1).is_none_or(|high| high & 0x7c != 0x7c);
    let block = format.block_bytes();
    match format {
        Format::F32 => !bytes
            .chunks_exact(4)
            .any(|b| b[3] & 0x7f == 0x7f && b[2] & 0x80 != 0),
        Format::BF16 => !bytes
            .chunks_exact(2)
            .any(|b| b[1] & 0x7f == 0x7f && b[0] & 0x80 != 0),
        Format::F16 => bytes.chunks_exact(2).all(|b| f16(b, 0)),
        Format::Q8_0 | Format::Q4_0 | Format::Q5_0 => bytes.chunks_exact(block).all(|b| f16(b, 0)),
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => {
            bytes.chunks_exact(block).all(|b| f16(b, 0) && f16(b, 2))
        }
        Format::Q6_K => bytes.chunks_exact(block).all(|b| f16(b, block - 2)),
    }
}

/// Drops the pages that lie wholly inside `data` from this process; they stay in the page cache. `data` must be a part of a file's
/// map, which [`super::ModelFile::release`] makes sure of.
pub(super) fn release(data: &[u8]) {
    const PAGE: usize = 4096;
    let start = (data.as_ptr() as usize).next_multiple_of(PAGE);
    let end = (data.as_ptr() as usize + data.len()) / PAGE * PAGE;
    if end > start {
        // SAFETY: the range lies inside a live, read-only, file-backed map (the only caller checks that), so dropping its
        // pages only means that they are read again when touched.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

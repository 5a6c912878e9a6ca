//! The operations of a transformer layer, behind one interface for every kind of device.

use serde::{Deserialize, Serialize};

use crate::candidates::{Allowed, Head};
use crate::format::Format;

/// Positions in one block of the KV cache.
pub const BLOCK_TOKENS: usize = 16;

/// How a KV cache keeps its numbers. What is kept of a position depends on that position's keys and values alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvFormat {
    /// Rounded to f16.
    #[default]
    F16,
    /// A signed byte a number, and a scale for each [`KV_GROUP`] dimensions of a position and head: about half the bytes.
    Int8,
}

/// Dimensions that share a scale in [`KvFormat::Int8`]; a head's last group may be shorter.
pub const KV_GROUP: usize = 32;
/// A head's dimensions are rounded up to a multiple of this in the cache: whole vectors of every instruction set.
pub(crate) const KV_DIM_STEP: usize = 16;

impl KvFormat {
    /// All formats, the most exact first.
    pub const ALL: [KvFormat; 2] = [KvFormat::F16, KvFormat::Int8];

    /// Its name in configuration.
    pub fn name(self) -> &'static str {
        match self {
            KvFormat::F16 => "f16",
            KvFormat::Int8 => "int8",
        }
    }

    /// Bytes of the keys, or of the values, of one block in one head of one layer.
    pub(crate) fn part_bytes(self, head_dim: usize) -> usize {
        let dim = head_dim.next_multiple_of(KV_DIM_STEP);
        let position_bytes = match self {
            KvFormat::F16 => 2 * dim,
            KvFormat::Int8 => dim + 2 * dim.div_ceil(KV_GROUP),
        };
        position_bytes * BLOCK_TOKENS
    }

    /// Bytes of one block, keys and values, in one head of one layer.
    pub fn head_block_bytes(self, head_dim: usize) -> usize {
        2 * self.part_bytes(head_dim)
    }
}

impl std::str::FromStr for KvFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<KvFormat, String> {
        let found = KvFormat::ALL.into_iter().find(|f| f.name() == name);
        found.ok_or_else(|| format!("KV format {name:?}; expected f16 or int8"))
    }
}

impl std::fmt::Display for KvFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Rounds to a multiple of 2⁻³², as f64. Sums of such numbers below 2²⁰ in magnitude are exact in f64's 53 bits, whatever their
/// order. Larger numbers land on a coarser grid, the same everywhere; NaN and infinities stay what they are.
#[inline(always)]
pub fn to_grid(value: f32) -> f64 {
    (f64::from(value) + GRID_SHIFT) - GRID_SHIFT
}

/// Adding and taking away 1.5·2²⁰ leaves no bit below 2⁻³² (f64 has 52 bits behind the leading one).
pub(crate) const GRID_SHIFT: f64 = 1_572_864.0;

/// What can go wrong that is not the caller's mistake.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor's bytes do not fit its shape.
    #[error("wrong tensor size: {0}")]
    Shape(String),
    /// This format or operation exists nowhere here.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The device's memory is used up.
    #[error(
        "out of memory: {bytes} bytes for {what}; use a smaller context, more ranks or a smaller model"
    )]
    Memory { bytes: usize, what: &'static str },
}

/// A matrix as it lies in a file: `rows` of `cols` weights. A shard of the columns of a stored matrix is the same bytes
/// with a `first_byte` and the whole matrix's `row_stride_bytes`, so that it is packed straight from the memory map.
#[derive(Clone, Copy, Debug)]
pub struct WeightRows<'a> {
    pub format: Format,
    pub rows: usize,
    pub cols: usize,
    /// The stored bytes, from the first row on.
    pub data: &'a [u8],
    /// Where in `data` row 0 begins.
    pub first_byte: usize,
    /// From one row's beginning to the next's.
    pub row_stride_bytes: usize,
}

impl<'a> WeightRows<'a> {
    /// A whole matrix whose rows follow one another.
    pub fn new(format: Format, rows: usize, cols: usize, data: &'a [u8]) -> Self {
        Self {
            format,
            rows,
            cols,
            data,
            first_byte: 0,
            row_stride_bytes: format.row_bytes(cols),
        }
    }

    /// The columns `columns` of this matrix.
    ///
    /// # Errors
    /// [`Error::Shape`] when the range does not lie within the matrix or cuts a quantisation block.
    pub fn columns(self, columns: std::ops::Range<usize>) -> Result<Self, Error> {
        let block = self.format.block_len();
        if columns.start > columns.end
            || columns.end > self.cols
            || !columns.start.is_multiple_of(block)
            || !columns.end.is_multiple_of(block)
        {
            return Err(Error::Shape(format!(
                "columns {columns:?} of {} {:?} columns; a shard's edge must be a multiple of {block}",
                self.cols, self.format
            )));
        }
        Ok(Self {
            cols: columns.end - columns.start,
            first_byte: self.first_byte + self.format.row_bytes(columns.start),
            ..self
        })
    }

    /// The rows `rows` of this matrix.
    ///
    /// # Errors
    /// [`Error::Shape`] when the range does not lie within the matrix.
    pub fn row_range(self, rows: std::ops::Range<usize>) -> Result<Self, Error> {
        if rows.start > rows.end || rows.end > self.rows {
            return Err(Error::Shape(format!("rows {rows:?} of {} rows", self.rows)));
        }
        Ok(Self {
            rows: rows.end - rows.start,
            first_byte: self.first_byte + rows.start * self.row_stride_bytes,
            ..self
        })
    }

    /// Whether every row lies within `data` and the width fits the format.
    ///
    /// # Errors
    /// [`Error::Shape`] otherwise.
    pub fn check(&self) -> Result<(), Error> {
        let row_bytes = self.format.row_bytes(self.cols);
        let end = self
            .rows
            .saturating_sub(1)
            .checked_mul(self.row_stride_bytes)
            .and_then(|b| b.checked_add(self.first_byte))
            .and_then(|b| b.checked_add(if self.rows == 0 { 0 } else { row_bytes }));
        if !self.cols.is_multiple_of(self.format.block_len())
            || end.is_none_or(|end| end > self.data.len())
        {
            return Err(Error::Shape(format!(
                "{} rows of {} {:?} weights ({row_bytes} bytes a row, {} from one to the next, from byte {}), got {} bytes",
                self.rows,
                self.cols,
                self.format,
                self.row_stride_bytes,
                self.first_byte,
                self.data.len()
            )));
        }
        Ok(())
    }

    /// The bytes of row `row`; the matrix was [checked](Self::check).
    pub fn row(&self, row: usize) -> &'a [u8] {
        let start = self.first_byte + row * self.row_stride_bytes;
        &self.data[start..start + self.format.row_bytes(self.cols)]
    }
}

/// Rotary position embedding of one head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub head_dim: usize,
    /// Radians a position, one a pair: `head_dim / 2` of them; a model's scaling is already in them.
    pub inv_freq: Vec<f32>,
    /// Pairs are neighbours (GGUF's Llama, whose q and k rows are permuted for it); otherwise `i` pairs with
    /// `i + head_dim / 2` (safetensors as Hugging Face writes them).
    pub interleaved: bool,
}

/// The rows of one sequence within a step's batch.
#[derive(Clone, Copy, Debug)]
pub struct SeqSpan<'a> {
    pub first_row: usize,
    pub rows: usize,
    /// Positions of this sequence that lie in the KV cache before this span's first row.
    pub context: usize,
    /// The sequence's KV blocks in order; at least `(context + rows) / BLOCK_TOKENS`, rounded up.
    pub blocks: &'a [u32],
}

/// A device and its operations. Activations are f32, row-major `[rows, width]`.
///
/// Shapes are the caller's promise: an implementation asserts them. A row's result depends neither on the other rows of
/// the call nor on the number of threads, bit for bit.
pub trait Device: Send + Sync + 'static {
    /// Activations in device memory.
    type Buf: Send;
    /// A packed weight matrix.
    type Matrix: Send + Sync;
    /// A paged KV cache of all layers.
    type Kv: Send;

    /// Repacks stored weights for this device.
    ///
    /// # Errors
    /// [`Error::Shape`] when the bytes do not fit the shape, [`Error::Memory`].
    fn pack(&self, w: WeightRows<'_>) -> Result<Self::Matrix, Error>;
    /// Bytes that the packed matrix takes on the device.
    fn matrix_bytes(&self, m: &Self::Matrix) -> usize;
    /// `(rows, cols)` of a packed matrix.
    fn matrix_shape(&self, m: &Self::Matrix) -> (usize, usize);

    /// `len` zeros.
    ///
    /// # Errors
    /// [`Error::Memory`].
    fn alloc(&self, len: usize) -> Result<Self::Buf, Error>;
    /// Host → device, to `dst[offset..]`.
    fn upload(&self, src: &[f32], dst: &mut Self::Buf, offset: usize);
    /// Device → host, from `src[offset..]`.
    fn download(&self, src: &Self::Buf, offset: usize, dst: &mut [f32]);
    /// The buffer itself where it is host memory.
    fn host<'a>(&self, b: &'a Self::Buf) -> Option<&'a [f32]>;
    /// The buffer itself where it is host memory.
    fn host_mut<'a>(&self, b: &'a mut Self::Buf) -> Option<&'a mut [f32]>;

    /// `out[i][rows, w[i].rows] = x[rows, cols] · w[i]ᵀ` for matrices of the same width that share `x` (q, k and v; gate and
    /// up). Quantised weights meet activations of 8 bits with a scale per 32; F32, F16 and BF16 ones are computed in f32. A
    /// value that is not finite makes its row's results NaN.
    fn matmul(&self, w: &[&Self::Matrix], x: &Self::Buf, rows: usize, out: &mut [&mut Self::Buf]);
    /// `sum[rows, w.rows] = Σᵢ to_grid(xᵢ · wᵢᵀ)` over the parts that `w`'s columns, and those of `x[rows, w.cols]`, are cut into: one
    /// rank's part of a product whose columns are divided between ranks. Each part is rounded by [`to_grid`] and added in order, so that
    /// the sum over all parts of all ranks has the same bits however the parts are dealt out. `ends` says behind which column each part
    /// ends: ascending, between blocks of 32 where `w` is quantised, the last one `w.cols`.
    fn matmul_sum(
        &self,
        w: &Self::Matrix,
        ends: &[usize],
        x: &Self::Buf,
        rows: usize,
        sum: &mut [f64],
    );
    /// `out[first_row + i] = table[ids[i]]`; an id outside the table (another rank's part of the vocabulary) gives zeros.
    fn embed(&self, table: &Self::Matrix, ids: &[u32], out: &mut Self::Buf, first_row: usize);
    /// `out = x / sqrt(mean(x²) + eps) * weight`, row by row; the width is `weight`'s length.
    fn rms_norm(
        &self,
        x: &Self::Buf,
        weight: &Self::Buf,
        rows: usize,
        eps: f32,
        out: &mut Self::Buf,
    );
    /// `x[..sum.len()] += sum`, rounded to f32 first.
    fn add_sum(&self, x: &mut Self::Buf, sum: &[f64]);
    /// `gate[..len] = silu(gate) * up`.
    fn silu_gate(&self, gate: &mut Self::Buf, up: &Self::Buf, len: usize);
    /// Rotates `x[rows, heads, head_dim]` in place by each row's position.
    fn rope(&self, x: &mut Self::Buf, rows: usize, heads: usize, positions: &[u32], rope: &Rope);

    /// An empty cache of `blocks` blocks of [`BLOCK_TOKENS`] positions in each layer.
    ///
    /// # Errors
    /// [`Error::Memory`].
    fn kv_alloc(
        &self,
        format: KvFormat,
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        blocks: usize,
    ) -> Result<Self::Kv, Error>;
    /// Bytes of the cache.
    fn kv_bytes(&self, kv: &Self::Kv) -> usize;
    /// Stores rows of `k` and `v`, `[slots.len(), kv_heads, head_dim]`, in the cache's format; a slot is `block * BLOCK_TOKENS + offset`.
    fn kv_write(
        &self,
        kv: &mut Self::Kv,
        layer: usize,
        k: &Self::Buf,
        v: &Self::Buf,
        slots: &[u32],
    );
    /// Causal attention of `q[rows, heads, head_dim]` over the cache into `out` of the same shape. `heads` is a multiple of the
    /// cache's heads: query head `h` reads KV head `h / (heads / kv_heads)`. Scores are scaled by `1/sqrt(head_dim)`.
    fn attention(
        &self,
        q: &Self::Buf,
        kv: &Self::Kv,
        layer: usize,
        heads: usize,
        seqs: &[SeqSpan<'_>],
        out: &mut Self::Buf,
    );
    /// The head of each row of `logits[allowed.len(), width]` with `k` candidates, of the tokens that its row allows (`None`: all).
    /// Where a row says what is allowed, a logit of -∞ is no candidate.
    fn heads(
        &self,
        logits: &Self::Buf,
        width: usize,
        allowed: &[Option<Allowed<'_>>],
        k: usize,
    ) -> Vec<Head>;
}

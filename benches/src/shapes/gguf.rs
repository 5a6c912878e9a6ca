//! Writes GGUF version 3 (ggml's docs/gguf.md): header, then each tensor's rows as they come.

use std::io::{self, Write};

use kernels::Format;

const ALIGNMENT: u64 = 32;

/// A metadata value.
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Str(String),
    Strs(Vec<String>),
    I32s(Vec<i32>),
}

/// What stands before the weights.
#[derive(Default)]
pub(super) struct Header {
    values: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
}

struct Tensor {
    name: String,
    format: Format,
    rows: usize,
    cols: usize,
}

impl Header {
    pub(super) fn set(&mut self, key: &str, value: Value) {
        self.values.push((key.into(), value));
    }

    /// Announces a tensor; one of one row is written as a vector.
    pub(super) fn tensor(&mut self, name: &str, format: Format, rows: usize, cols: usize) {
        self.tensors.push(Tensor {
            name: name.into(),
            format,
            rows,
            cols,
        });
    }

    /// Writes the header; the rows follow through what comes back, in the order of the tensors.
    pub(super) fn write<'a, W: Write>(&'a self, out: &'a mut W) -> io::Result<Rows<'a, W>> {
        let mut head = Vec::new();
        head.extend(b"GGUF");
        head.extend(3u32.to_le_bytes());
        head.extend((self.tensors.len() as u64).to_le_bytes());
        head.extend((self.values.len() as u64).to_le_bytes());
        for (key, value) in &self.values {
            string(&mut head, key);
            put(&mut head, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            string(&mut head, &tensor.name);
            let shape: &[usize] = match tensor.rows {
                1 => &[tensor.cols],
                rows => &[tensor.cols, rows],
            };
            head.extend((shape.len() as u32).to_le_bytes());
            for &length in shape {
                head.extend((length as u64).to_le_bytes());
            }
            head.extend(tensor.format.ggml_type().to_le_bytes());
            head.extend(offset.to_le_bytes());
            offset += tensor.bytes().next_multiple_of(ALIGNMENT);
        }
        head.resize(head.len().next_multiple_of(ALIGNMENT as usize), 0);
        out.write_all(&head)?;
        Ok(Rows {
            out,
            tensors: self.tensors.iter(),
            written: 0,
        })
    }
}

impl Tensor {
    fn bytes(&self) -> u64 {
        (self.format.row_bytes(self.cols) * self.rows) as u64
    }
}

/// Takes the weights of one tensor after the other.
pub(super) struct Rows<'a, W> {
    out: &'a mut W,
    tensors: std::slice::Iter<'a, Tensor>,
    written: u64,
}

impl<W: Write> Rows<'_, W> {
    /// Bytes of the next row, or rows.
    pub(super) fn row(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// Pads the tensor whose last row was written.
    ///
    /// # Panics
    /// If it has not as many bytes as announced.
    pub(super) fn end_tensor(&mut self) -> io::Result<()> {
        let expected = self.tensors.next().map_or(0, Tensor::bytes);
        assert_eq!(self.written, expected, "bytes of a tensor");
        let padding = expected.next_multiple_of(ALIGNMENT) - expected;
        self.written = 0;
        self.out
            .write_all(&[0; ALIGNMENT as usize][..padding as usize])
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &Value) {
    let kind = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    let array = |out: &mut Vec<u8>, element: u32, count: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(element.to_le_bytes());
        out.extend((count as u64).to_le_bytes());
    };
    match value {
        Value::U32(v) => {
            kind(out, 4);
            out.extend(v.to_le_bytes());
        }
        Value::F32(v) => {
            kind(out, 6);
            out.extend(v.to_le_bytes());
        }
        Value::Str(text) => {
            kind(out, 8);
            string(out, text);
        }
        Value::Strs(all) => {
            array(out, 8, all.len());
            all.iter().for_each(|text| string(out, text));
        }
        Value::I32s(all) => {
            array(out, 5, all.len());
            all.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }
    }
}

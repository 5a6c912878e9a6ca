//! Writing a GGUF file (version 3), as far as the converter needs it.

use std::io::{self, Write};

/// Tensors begin at multiples of this; GGUF's default.
const ALIGNMENT: u64 = 32;

/// A metadata value.
pub enum Value<'a> {
    Bool(bool),
    U32(u32),
    F32(f32),
    String(&'a str),
    Strings(&'a [String]),
    F32s(&'a [f32]),
    I32s(&'a [i32]),
    U32s(&'a [u32]),
}

/// A tensor to write. `shape` has the slowest dimension first.
pub struct Tensor<'a> {
    pub name: String,
    pub shape: Vec<usize>,
    /// ggml's number of the format.
    pub ggml_type: u32,
    pub data: &'a [u8],
}

/// Writes header, metadata, tensor table and data.
pub fn write(
    out: &mut impl Write,
    metadata: &[(&str, Value<'_>)],
    tensors: &[Tensor<'_>],
) -> io::Result<()> {
    let mut head = Vec::new();
    head.extend_from_slice(b"GGUF");
    head.extend_from_slice(&3u32.to_le_bytes());
    head.extend_from_slice(&(tensors.len() as u64).to_le_bytes());
    head.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        string(&mut head, key);
        value.write(&mut head);
    }
    let mut offset = 0u64;
    for tensor in tensors {
        string(&mut head, &tensor.name);
        head.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
        for &size in tensor.shape.iter().rev() {
            head.extend_from_slice(&(size as u64).to_le_bytes());
        }
        head.extend_from_slice(&tensor.ggml_type.to_le_bytes());
        head.extend_from_slice(&offset.to_le_bytes());
        offset += (tensor.data.len() as u64).next_multiple_of(ALIGNMENT);
    }
    out.write_all(&head)?;
    pad(out, head.len())?;
    for tensor in tensors {
        out.write_all(tensor.data)?;
        pad(out, tensor.data.len())?;
    }
    Ok(())
}

fn pad(out: &mut impl Write, written: usize) -> io::Result<()> {
    let missing = written.next_multiple_of(ALIGNMENT as usize) - written;
    out.write_all(&[0; ALIGNMENT as usize][..missing])
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

impl Value<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        let kind = |out: &mut Vec<u8>, kind: u32| out.extend_from_slice(&kind.to_le_bytes());
        let array = |out: &mut Vec<u8>, of: u32, len: usize| {
            kind(out, 9);
            kind(out, of);
            out.extend_from_slice(&(len as u64).to_le_bytes());
        };
        match self {
            Self::U32(v) => {
                kind(out, 4);
                out.extend_from_slice(&v.to_le_bytes());
            }
            Self::F32(v) => {
                kind(out, 6);
                out.extend_from_slice(&v.to_le_bytes());
            }
            Self::Bool(v) => {
                kind(out, 7);
                out.push(u8::from(*v));
            }
            Self::String(v) => {
                kind(out, 8);
                string(out, v);
            }
            Self::Strings(items) => {
                array(out, 8, items.len());
                items.iter().for_each(|item| string(out, item));
            }
            Self::F32s(items) => {
                array(out, 6, items.len());
                items
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
            }
            Self::I32s(items) => {
                array(out, 5, items.len());
                items
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
            }
            Self::U32s(items) => {
                array(out, 4, items.len());
                items
                    .iter()
                    .for_each(|v| out.extend_from_slice(&v.to_le_bytes()));
            }
        }
    }
}

//! GGUF versions 2 and 3 (the format of llama.cpp): header, metadata, tensor table. Own code, because the whole table is
//! hostile input. Layout: ggml's docs/gguf.md.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use kernels::Format;

use super::{Dialect, Entry, Error, Inner};

const MAGIC: u32 = u32::from_le_bytes(*b"GGUF");
/// Longest metadata key or tensor name; ggml itself stops at 64 bytes for names and 65,535 for keys.
const MAX_NAME_BYTES: u64 = 65_535;
/// ggml knows tensors of at most four dimensions.
const MAX_DIMENSIONS: u32 = 4;
/// Bytes a metadata entry takes at least: key length, type, a one-byte value.
const MIN_METADATA_BYTES: u64 = 8 + 4 + 1;
/// Bytes a tensor entry takes at least: name length, dimensions, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;
/// Most metadata entries and tensors; a llama of 405 billion parameters has 1,138 tensors and some dozen entries.
const MAX_ENTRIES: u64 = 1 << 16;
/// Most bytes before the tensors' data; a vocabulary of 128,256 tokens with its merges takes 8 MB.
const MAX_HEADER_BYTES: usize = 256 << 20;
/// Longest metadata string, and longest string in an array; chat templates have some kilobytes.
const MAX_STRING_BYTES: u64 = 16 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;

/// Metadata of a GGUF file. Arrays stay in the map and are read when asked for.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
    /// A private copy of the header, so that metadata outlives the map's pages being dropped.
    header: std::sync::Arc<[u8]>,
}

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Uint(u64),
    Int(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// An array in the header: element type, count, and where its bytes lie. Its extent was checked when the file was opened.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    kind: u32,
    count: usize,
    bytes: Range<usize>,
}

mod kind {
    pub const U8: u32 = 0;
    pub const I8: u32 = 1;
    pub const U16: u32 = 2;
    pub const I16: u32 = 3;
    pub const U32: u32 = 4;
    pub const I32: u32 = 5;
    pub const F32: u32 = 6;
    pub const BOOL: u32 = 7;
    pub const STRING: u32 = 8;
    pub const ARRAY: u32 = 9;
    pub const U64: u32 = 10;
    pub const I64: u32 = 11;
    pub const F64: u32 = 12;

    /// Bytes of a scalar of this type; `None` for strings, arrays and unknown types.
    pub fn width(kind: u32) -> Option<u64> {
        match kind {
            U8 | I8 | BOOL => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            _ => None,
        }
    }
}

impl Metadata {
    /// The raw value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All keys.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// A string, or `None` if the key is absent or of another type.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.values.get(key)? {
            Value::String(s) => Some(s),
            _ => None,
        }
    }

    /// A non-negative integer, or `None` if the key is absent or of another type.
    pub fn u64(&self, key: &str) -> Option<u64> {
        match *self.values.get(key)? {
            Value::Uint(v) => Some(v),
            Value::Int(v) => u64::try_from(v).ok(),
            _ => None,
        }
    }

    /// A floating-point number, or `None` if the key is absent or of another type.
    pub fn f32(&self, key: &str) -> Option<f32> {
        match *self.values.get(key)? {
            Value::Float(v) => Some(v as f32),
            _ => None,
        }
    }

    /// A boolean, or `None` if the key is absent or of another type.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match *self.values.get(key)? {
            Value::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// An array of strings; `Ok(None)` if the key is absent; an error if it is another type or not UTF-8.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<String>>, Error> {
        let Some(array) = self.array(key, "an array of strings", |kind| kind == kind::STRING)?
        else {
            return Ok(None);
        };
        let mut cursor = Cursor {
            path: &self.path,
            bytes: &self.header[..array.bytes.end],
            at: array.bytes.start,
        };
        let mut out = Vec::new();
        for _ in 0..array.count {
            out.push(cursor.string(key, MAX_STRING_BYTES)?);
        }
        Ok(Some(out))
    }

    /// An array of integers of any width; `Ok(None)` if the key is absent.
    pub fn ints(&self, key: &str) -> Result<Option<Vec<i64>>, Error> {
        self.numbers(
            key,
            "an array of integers",
            |kind| !matches!(kind, kind::STRING | kind::F32 | kind::F64),
            |v| match v {
                Value::Uint(v) => i64::try_from(v).unwrap_or(i64::MAX),
                Value::Int(v) => v,
                Value::Bool(v) => i64::from(v),
                _ => 0,
            },
        )
    }

    /// An array of floating-point numbers; `Ok(None)` if the key is absent.
    pub fn floats(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        self.numbers(
            key,
            "an array of numbers",
            |kind| matches!(kind, kind::F32 | kind::F64),
            |v| match v {
                Value::Float(v) => v as f32,
                _ => 0.0,
            },
        )
    }

    fn numbers<T>(
        &self,
        key: &str,
        expected: &str,
        accepts: fn(u32) -> bool,
        convert: fn(Value) -> T,
    ) -> Result<Option<Vec<T>>, Error> {
        let Some(array) = self.array(key, expected, accepts)? else {
            return Ok(None);
        };
        let mut cursor = Cursor {
            path: &self.path,
            bytes: &self.header[..array.bytes.end],
            at: array.bytes.start,
        };
        let mut out = Vec::new();
        for _ in 0..array.count {
            out.push(convert(cursor.scalar(key, array.kind)?));
        }
        Ok(Some(out))
    }

    fn array(
        &self,
        key: &str,
        expected: &str,
        accepts: fn(u32) -> bool,
    ) -> Result<Option<&Array>, Error> {
        match self.values.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if accepts(array.kind) => Ok(Some(array)),
            Some(other) => Err(Error::Invalid {
                path: self.path.clone(),
                what: format!("metadata {key}"),
                expected: expected.into(),
                got: other.describe().into(),
                remedy: "convert the file again",
            }),
        }
    }
}

impl Value {
    fn describe(&self) -> &'static str {
        match self {
            Value::Uint(_) | Value::Int(_) => "an integer",
            Value::Float(_) => "a number",
            Value::Bool(_) => "a boolean",
            Value::String(_) => "a string",
            Value::Array(_) => "an array of another type",
        }
    }
}

/// Opens a GGUF file: maps it and reads its header.
pub(super) fn open(path: &Path) -> Result<Inner, Error> {
    let map = super::map(path)?;
    let (metadata, tensors) = parse(path, &map)?;
    Ok(Inner {
        path: path.into(),
        dialect: Dialect::Gguf,
        maps: vec![map],
        tensors,
        metadata,
        hf_config: None,
    })
}

/// Reads header, metadata and tensor table from the bytes of a whole file.
pub(super) fn parse(
    path: &Path,
    bytes: &[u8],
) -> Result<(Metadata, HashMap<String, Entry>), Error> {
    let mut cursor = Cursor {
        path,
        bytes: &bytes[..bytes.len().min(MAX_HEADER_BYTES)],
        at: 0,
    };
    if bytes.get(..4) != Some(b"GGUF".as_slice()) {
        let got = bytes.get(..4).map_or_else(
            || format!("{} bytes", bytes.len()),
            |b| format!("a file that begins with {b:02x?}"),
        );
        return Err(Error::NotAModel {
            path: path.into(),
            got,
        });
    }
    let magic = cursor.u32("the magic")?;
    debug_assert_eq!(magic, MAGIC);
    let version = cursor.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(Error::Version {
            path: path.into(),
            got: version,
        });
    }
    let tensor_count = cursor.count("the number of tensors", MIN_TENSOR_BYTES, MAX_ENTRIES)?;
    let value_count = cursor.count(
        "the number of metadata entries",
        MIN_METADATA_BYTES,
        MAX_ENTRIES,
    )?;

    let mut values = BTreeMap::new();
    for _ in 0..value_count {
        let key = cursor.string("a metadata key", MAX_NAME_BYTES)?;
        let kind = cursor.u32(&key)?;
        let value = cursor.value(&key, kind)?;
        if values.insert(key.clone(), value).is_some() {
            return Err(Error::Duplicate {
                path: path.into(),
                what: format!("metadata {key}"),
            });
        }
    }
    let alignment = match values.get("general.alignment") {
        Some(&Value::Uint(v)) if v.is_power_of_two() && v <= 1 << 20 => v,
        None => DEFAULT_ALIGNMENT,
        Some(other) => {
            return Err(cursor.invalid(
                "general.alignment",
                "a power of two up to 1048576",
                &format!("{other:?}"),
            ));
        }
    };

    let mut raw = Vec::new();
    for _ in 0..tensor_count {
        raw.push(cursor.tensor()?);
    }
    let header_end = cursor.at;
    let data_start = (header_end as u64).next_multiple_of(alignment);
    let mut tensors = HashMap::new();
    for RawTensor {
        name,
        shape,
        format,
        bytes: size,
        offset,
    } in raw
    {
        if offset % alignment != 0 {
            return Err(cursor.invalid(
                &format!("offset of tensor {name}"),
                &format!("a multiple of {alignment}"),
                &offset.to_string(),
            ));
        }
        let start = data_start.checked_add(offset);
        let end = start.and_then(|s| s.checked_add(size));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(cursor.invalid(
                &format!("offset of tensor {name}"),
                "an offset inside the file",
                &offset.to_string(),
            ));
        };
        if end > bytes.len() as u64 {
            let have = (bytes.len() as u64).saturating_sub(start);
            return Err(Error::Truncated {
                path: path.into(),
                what: format!("tensor {name}"),
                at: start,
                need: size,
                have,
            });
        }
        // Both fit: they are at most the length of the map.
        let entry = Entry {
            map: 0,
            offset: start as usize,
            bytes: size as usize,
            format,
            shape,
        };
        if tensors.insert(name.clone(), entry).is_some() {
            return Err(Error::Duplicate {
                path: path.into(),
                what: format!("tensor {name}"),
            });
        }
    }
    let header = bytes[..header_end].into();
    Ok((
        Metadata {
            path: path.into(),
            values,
            header,
        },
        tensors,
    ))
}

struct RawTensor {
    name: String,
    shape: Vec<usize>,
    format: Format,
    bytes: u64,
    offset: u64,
}

/// Reads little-endian values and never past the end.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn take(&mut self, what: &str, len: u64) -> Result<&[u8], Error> {
        let have = (self.bytes.len() - self.at) as u64;
        if len > have && self.bytes.len() == MAX_HEADER_BYTES {
            return Err(Error::TooMany {
                path: self.path.into(),
                what: format!("length of the header up to {what} in bytes"),
                got: (self.at as u64).saturating_add(len),
                max: MAX_HEADER_BYTES as u64,
            });
        }
        if len > have {
            return Err(Error::Truncated {
                path: self.path.into(),
                what: what.into(),
                at: self.at as u64,
                need: len,
                have,
            });
        }
        let start = self.at;
        self.at += len as usize;
        Ok(&self.bytes[start..self.at])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(what, N as u64)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of things of at least `min_bytes` each: more than `most`, or than fit in the rest of the header, are refused.
    fn count(&mut self, what: &str, min_bytes: u64, most: u64) -> Result<u64, Error> {
        let got = self.u64(what)?;
        let max = most.min((self.bytes.len() - self.at) as u64 / min_bytes);
        if got > max {
            return Err(Error::TooMany {
                path: self.path.into(),
                what: what.into(),
                got,
                max,
            });
        }
        Ok(got)
    }

    fn string_bytes(&mut self, what: &str, max: u64) -> Result<&[u8], Error> {
        let len = self.u64(what)?;
        if len > max {
            return Err(Error::TooMany {
                path: self.path.into(),
                what: format!("length of {what}"),
                got: len,
                max,
            });
        }
        self.take(what, len)
    }

    fn skip_string(&mut self, what: &str) -> Result<(), Error> {
        self.string_bytes(what, MAX_STRING_BYTES).map(|_| ())
    }

    fn string(&mut self, what: &str, max: u64) -> Result<String, Error> {
        let bytes = self.string_bytes(what, max)?.to_vec();
        String::from_utf8(bytes).map_err(|_| self.invalid(what, "text in UTF-8", "other bytes"))
    }

    fn scalar(&mut self, what: &str, kind: u32) -> Result<Value, Error> {
        Ok(match kind {
            kind::U8 => Value::Uint(u8::from_le_bytes(self.array(what)?).into()),
            kind::I8 => Value::Int(i8::from_le_bytes(self.array(what)?).into()),
            kind::U16 => Value::Uint(u16::from_le_bytes(self.array(what)?).into()),
            kind::I16 => Value::Int(i16::from_le_bytes(self.array(what)?).into()),
            kind::U32 => Value::Uint(u32::from_le_bytes(self.array(what)?).into()),
            kind::I32 => Value::Int(i32::from_le_bytes(self.array(what)?).into()),
            kind::F32 => Value::Float(f32::from_le_bytes(self.array(what)?).into()),
            kind::BOOL => match self.array::<1>(what)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.invalid(what, "0 or 1", &other.to_string())),
            },
            kind::U64 => Value::Uint(u64::from_le_bytes(self.array(what)?)),
            kind::I64 => Value::Int(i64::from_le_bytes(self.array(what)?)),
            kind::F64 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            other => {
                return Err(self.invalid(what, "a metadata type from 0 to 12", &other.to_string()));
            }
        })
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value, Error> {
        match kind {
            kind::STRING => Ok(Value::String(self.string(key, MAX_STRING_BYTES)?)),
            kind::ARRAY => {
                let kind = self.u32(key)?;
                let min_bytes = match kind {
                    kind::STRING => 8,
                    kind => kind::width(kind).unwrap_or(1),
                };
                let count = self.count(key, min_bytes, u64::MAX)?;
                let start = self.at;
                if kind == kind::STRING {
                    for _ in 0..count {
                        self.skip_string(key)?;
                    }
                } else if let Some(width) = kind::width(kind) {
                    self.take(key, count.saturating_mul(width))?;
                } else {
                    return Err(self.invalid(
                        key,
                        "an array of strings or numbers",
                        &format!("an array of type {kind}"),
                    ));
                }
                Ok(Value::Array(Array {
                    kind,
                    count: count as usize,
                    bytes: start..self.at,
                }))
            }
            _ => self.scalar(key, kind),
        }
    }

    fn tensor(&mut self) -> Result<RawTensor, Error> {
        let name = self.string("a tensor name", MAX_NAME_BYTES)?;
        let dimensions = self.u32(&name)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(self.invalid(
                &format!("dimensions of tensor {name}"),
                "1 to 4",
                &dimensions.to_string(),
            ));
        }
        let mut shape = Vec::new();
        let mut elements = 1u64;
        for _ in 0..dimensions {
            let length = self.u64(&name)?;
            let product = elements.checked_mul(length);
            let (Some(product), Ok(length), true) = (product, usize::try_from(length), length > 0)
            else {
                return Err(self.invalid(
                    &format!("size of tensor {name}"),
                    "lengths above 0 whose product fits 64 bits",
                    &length.to_string(),
                ));
            };
            elements = product;
            shape.push(length);
        }
        // ggml writes the fastest dimension first.
        shape.reverse();
        let kind = self.u32(&name)?;
        let Some(format) = Format::from_ggml_type(kind) else {
            return Err(self.invalid(
                &format!("type of tensor {name}"),
                "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K",
                &format!("ggml type {kind}"),
            ));
        };
        let cols = shape.last().copied().unwrap_or(0);
        if !cols.is_multiple_of(format.block_len()) {
            return Err(self.invalid(
                &format!("columns of tensor {name}"),
                &format!("a multiple of {}", format.block_len()),
                &cols.to_string(),
            ));
        }
        let blocks = elements / format.block_len() as u64;
        let Some(bytes) = blocks.checked_mul(format.block_bytes() as u64) else {
            return Err(self.invalid(
                &format!("size of tensor {name}"),
                "a size that fits 64 bits",
                &format!("{elements} elements"),
            ));
        };
        let offset = self.u64(&name)?;
        Ok(RawTensor {
            name,
            shape,
            format,
            bytes,
            offset,
        })
    }

    fn invalid(&self, what: &str, expected: &str, got: &str) -> Error {
        Error::Invalid {
            path: self.path.into(),
            what: what.into(),
            expected: expected.into(),
            got: got.into(),
            remedy: "the file is damaged or needs a newer format than this version knows; convert it again",
        }
    }
}

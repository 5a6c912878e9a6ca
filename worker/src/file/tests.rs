use std::path::PathBuf;

use proptest::prelude::*;

use super::*;

/// Writes GGUF for tests, right or wrong.
#[derive(Default)]
pub struct Writer {
    metadata: Vec<u8>,
    values: u64,
    tensors: Vec<u8>,
    count: u64,
    data: Vec<u8>,
}

impl Writer {
    fn string(out: &mut Vec<u8>, s: &str) {
        out.extend_from_slice(&(s.len() as u64).to_le_bytes());
        out.extend_from_slice(s.as_bytes());
    }

    fn value(mut self, key: &str, kind: u32, bytes: &[u8]) -> Self {
        Self::string(&mut self.metadata, key);
        self.metadata.extend_from_slice(&kind.to_le_bytes());
        self.metadata.extend_from_slice(bytes);
        self.values += 1;
        self
    }

    fn text(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        Self::string(&mut bytes, value);
        self.value(key, 8, &bytes)
    }

    fn uint(self, key: &str, value: u32) -> Self {
        self.value(key, 4, &value.to_le_bytes())
    }

    fn float(self, key: &str, value: f32) -> Self {
        self.value(key, 6, &value.to_le_bytes())
    }

    fn tensor_as(mut self, name: &str, shape: &[u64], kind: u32, offset: u64, data: &[u8]) -> Self {
        Self::string(&mut self.tensors, name);
        self.tensors
            .extend_from_slice(&(shape.len() as u32).to_le_bytes());
        for length in shape.iter().rev() {
            self.tensors.extend_from_slice(&length.to_le_bytes());
        }
        self.tensors.extend_from_slice(&kind.to_le_bytes());
        self.tensors.extend_from_slice(&offset.to_le_bytes());
        self.data.extend_from_slice(data);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.count += 1;
        self
    }

    fn tensor(self, name: &str, shape: &[u64], value: f32) -> Self {
        let elements = shape.iter().product::<u64>() as usize;
        let offset = self.data.len() as u64;
        self.tensor_as(
            name,
            shape,
            0,
            offset,
            &value.to_le_bytes().repeat(elements),
        )
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend_from_slice(&3u32.to_le_bytes());
        out.extend_from_slice(&self.count.to_le_bytes());
        out.extend_from_slice(&self.values.to_le_bytes());
        out.extend_from_slice(&self.metadata);
        out.extend_from_slice(&self.tensors);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend_from_slice(&self.data);
        out
    }
}

/// A llama of one layer.
fn llama() -> Writer {
    let w = Writer::default()
        .text("general.architecture", "llama")
        .uint("llama.block_count", 1)
        .uint("llama.embedding_length", 64)
        .uint("llama.attention.head_count", 4)
        .uint("llama.attention.head_count_kv", 2)
        .uint("llama.feed_forward_length", 96)
        .uint("llama.context_length", 128)
        .float("llama.rope.freq_base", 10_000.0)
        .float("llama.attention.layer_norm_rms_epsilon", 1e-5);
    let tensors: [(&str, &[u64]); 11] = [
        ("token_embd.weight", &[50, 64]),
        ("output_norm.weight", &[64]),
        ("blk.0.attn_norm.weight", &[64]),
        ("blk.0.attn_q.weight", &[64, 64]),
        ("blk.0.attn_k.weight", &[32, 64]),
        ("blk.0.attn_v.weight", &[32, 64]),
        ("blk.0.attn_output.weight", &[64, 64]),
        ("blk.0.ffn_norm.weight", &[64]),
        ("blk.0.ffn_gate.weight", &[96, 64]),
        ("blk.0.ffn_up.weight", &[96, 64]),
        ("blk.0.ffn_down.weight", &[64, 96]),
    ];
    tensors
        .into_iter()
        .fold(w, |w, (name, shape)| w.tensor(name, shape, 0.5))
}

fn parse(bytes: &[u8]) -> Result<(), Error> {
    gguf::parse(&PathBuf::from("test.gguf"), bytes).map(|_| ())
}

fn open(bytes: &[u8]) -> Result<ModelFile, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("test.gguf");
    std::fs::write(&path, bytes).unwrap();
    ModelFile::open(path)
}

#[test]
fn a_good_file_tells_its_configuration_and_metadata() {
    let mut tokens = Vec::new();
    tokens.extend_from_slice(&8u32.to_le_bytes());
    tokens.extend_from_slice(&2u64.to_le_bytes());
    Writer::string(&mut tokens, "ä");
    Writer::string(&mut tokens, "");
    let mut scores = Vec::new();
    scores.extend_from_slice(&6u32.to_le_bytes());
    scores.extend_from_slice(&1u64.to_le_bytes());
    scores.extend_from_slice(&0.25f32.to_le_bytes());
    let file = open(
        &llama()
            .value("tokens", 9, &tokens)
            .value("scores", 9, &scores)
            .value("flag", 7, &[1])
            .bytes(),
    )
    .unwrap();
    let config = file.config().unwrap();
    assert_eq!(
        (
            config.heads,
            config.kv_heads,
            config.head_dim,
            config.ffn,
            config.vocab
        ),
        (4, 2, 16, 96, 50)
    );
    assert!(config.tied_embeddings && config.rope_interleaved);
    assert_eq!(config.sizes.kv_head_bytes, 4 * (2 * 32 * 64 + 2 * 16 * 64));
    assert_eq!(config.sizes.ffn_block_bytes, 4 * 3 * 64);
    let meta = file.metadata();
    assert_eq!(meta.strings("tokens").unwrap().unwrap(), ["ä", ""]);
    assert_eq!(meta.floats("scores").unwrap().unwrap(), [0.25]);
    assert_eq!(meta.bool("flag"), Some(true));
    assert_eq!(meta.u64("llama.block_count"), Some(1));
    assert!(meta.strings("absent").unwrap().is_none());
    assert!(matches!(meta.strings("scores"), Err(Error::Invalid { .. })));
    assert_eq!(
        file.require("output_norm.weight")
            .unwrap()
            .to_f32()
            .unwrap(),
        [0.5; 64]
    );
}

#[test]
fn a_file_cut_off_anywhere_is_an_error_that_says_so() {
    let whole = llama().bytes();
    parse(&whole).unwrap();
    // The last 64 f32 rows end on the alignment, so every byte counts.
    for len in 0..whole.len() {
        let error = parse(&whole[..len]).expect_err("a cut file was accepted");
        match error {
            Error::NotAModel { .. } => assert!(len < 4),
            Error::Truncated { .. } | Error::TooMany { .. } => assert!(len >= 4),
            other => panic!("cut at {len}: {other}"),
        }
    }
}

#[test]
fn hostile_headers_are_refused_with_a_word_about_what_is_wrong() {
    let huge = u64::MAX;
    let header = |tensors: u64, values: u64| {
        let mut out = b"GGUF".to_vec();
        out.extend_from_slice(&3u32.to_le_bytes());
        out.extend_from_slice(&tensors.to_le_bytes());
        out.extend_from_slice(&values.to_le_bytes());
        out.extend_from_slice(&[0; 64]);
        out
    };
    let array =
        |kind: u32, count: u64| [kind.to_le_bytes().as_slice(), &count.to_le_bytes()].concat();
    let w = Writer::default;
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("text", b"Hello, world".to_vec(), "not a model"),
        (
            "version 1",
            [b"GGUF".as_slice(), &1u32.to_le_bytes(), &[0; 64]].concat(),
            "version 1",
        ),
        (
            "big-endian",
            [b"GGUF".as_slice(), &3u32.to_be_bytes(), &[0; 64]].concat(),
            "little-endian",
        ),
        ("tensor count", header(huge, 0), "number of tensors"),
        ("metadata count", header(0, huge), "number of metadata"),
        (
            "key length",
            [
                header(0, 1)[..24].to_vec(),
                huge.to_le_bytes().to_vec(),
                vec![0; 64],
            ]
            .concat(),
            "length of a metadata key",
        ),
        (
            "string length",
            w().value("k", 8, &huge.to_le_bytes()).bytes(),
            "length of k",
        ),
        (
            "string cut off",
            w().value("k", 8, &4096u64.to_le_bytes()).bytes(),
            "in the middle of k",
        ),
        (
            "string length in an array",
            w().value("k", 9, &[array(8, 1), huge.to_le_bytes().to_vec()].concat())
                .bytes(),
            "length of k",
        ),
        (
            "unknown type",
            w().value("k", 99, &[0; 8]).bytes(),
            "metadata type",
        ),
        ("boolean of 2", w().value("k", 7, &[2]).bytes(), "0 or 1"),
        (
            "array count",
            w().value("k", 9, &array(8, huge)).bytes(),
            "k is",
        ),
        (
            "array of arrays",
            w().value("k", 9, &array(9, 1)).bytes(),
            "array of type 9",
        ),
        (
            "array of unknown",
            w().value("k", 9, &array(77, 1)).bytes(),
            "array of type 77",
        ),
        (
            "number array count",
            w().value("k", 9, &array(4, huge / 4)).bytes(),
            "k is",
        ),
        (
            "not UTF-8",
            w().value("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]).bytes(),
            "UTF-8",
        ),
        (
            "duplicate key",
            w().uint("k", 1).uint("k", 2).bytes(),
            "metadata k occurs twice",
        ),
        (
            "alignment 0",
            w().uint("general.alignment", 0).bytes(),
            "power of two",
        ),
        (
            "alignment 3",
            w().uint("general.alignment", 3).bytes(),
            "power of two",
        ),
        (
            "alignment text",
            w().text("general.alignment", "x").bytes(),
            "power of two",
        ),
        (
            "duplicate tensor",
            w().tensor("t", &[8], 0.0).tensor("t", &[8], 0.0).bytes(),
            "tensor t occurs twice",
        ),
        (
            "dimensions",
            w().tensor_as("t", &[1, 1, 1, 1, 1], 0, 0, &[0; 32]).bytes(),
            "1 to 4",
        ),
        (
            "no dimensions",
            w().tensor_as("t", &[], 0, 0, &[0; 32]).bytes(),
            "1 to 4",
        ),
        (
            "zero length",
            w().tensor_as("t", &[0, 8], 0, 0, &[0; 32]).bytes(),
            "lengths above 0",
        ),
        (
            "overflowing shape",
            w().tensor_as("t", &[1 << 40, 1 << 40], 0, 0, &[0; 32])
                .bytes(),
            "64 bits",
        ),
        (
            "unknown format",
            w().tensor_as("t", &[8], 999, 0, &[0; 32]).bytes(),
            "ggml type 999",
        ),
        (
            "part of a block",
            w().tensor_as("t", &[2, 33], 2, 0, &[0; 64]).bytes(),
            "multiple of 32",
        ),
        (
            "offset outside",
            w().tensor_as("t", &[8], 0, 1 << 50, &[0; 32]).bytes(),
            "middle of tensor t",
        ),
        (
            "offset overflow",
            w().tensor_as("t", &[8], 0, huge - 31, &[0; 32]).bytes(),
            "inside the file",
        ),
        (
            "offset unaligned",
            w().tensor_as("t", &[8], 0, 4, &[0; 64]).bytes(),
            "multiple of 32",
        ),
        (
            "larger than file",
            w().tensor_as("t", &[1 << 30, 8], 0, 0, &[0; 32]).bytes(),
            "middle of tensor t",
        ),
    ];
    for (what, bytes, expected) in cases {
        let error = parse(&bytes).expect_err(what).to_string();
        assert!(error.contains(expected), "{what}: {error}");
    }
}

/// A header whose claims all fit into the file, which is large and empty: no such file may cost memory or time.
#[test]
fn an_oversized_header_is_refused_by_its_size() {
    const BYTES: u64 = 8 << 30;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.gguf");
    let header = |tensors: u64, values: u64, rest: &[u8]| {
        let counts = [tensors.to_le_bytes(), values.to_le_bytes()].concat();
        [b"GGUF\x03\0\0\0".as_slice(), &counts, rest].concat()
    };
    let entry = |kind: u32, value: &[u8]| {
        let mut out = Vec::new();
        Writer::string(&mut out, "k");
        [out, kind.to_le_bytes().to_vec(), value.to_vec()].concat()
    };
    let array = |kind: u32, count: u64| {
        entry(
            9,
            &[kind.to_le_bytes().as_slice(), &count.to_le_bytes()].concat(),
        )
    };
    let cases = [
        (
            "entries",
            header(0, 1 << 28, &[]),
            "number of metadata entries is 268435456, expected at most 65536",
        ),
        (
            "tensors",
            header(1 << 28, 0, &[]),
            "number of tensors is 268435456, expected at most 65536",
        ),
        (
            "text",
            header(0, 1, &entry(8, &(1u64 << 30).to_le_bytes())),
            "length of k is 1073741824, expected at most 16777216",
        ),
        (
            "numbers",
            header(0, 1, &array(4, 1 << 30)),
            "k is 1073741824, expected at most",
        ),
        (
            "texts",
            header(0, 1, &array(8, 1 << 29)),
            "k is 536870912, expected at most",
        ),
        // Just short of the limit; the next entry's type lies beyond it.
        (
            "end",
            header(0, 2, &array(0, (256 << 20) - 49 - 8)),
            "length of the header",
        ),
    ];
    for (what, bytes, expected) in cases {
        std::fs::write(&path, bytes).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(BYTES).unwrap();
        let error = ModelFile::open(&path).err().expect(what).to_string();
        assert!(error.contains(expected), "{what}: {error}");
    }
}

#[test]
fn only_pages_of_the_file_itself_are_released() {
    // A page and more on the heap: were it dropped as the file's pages are, it would read as zeros.
    let heap = vec![7u8; 1 << 20];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("test.gguf");
    std::fs::write(&path, llama().bytes()).unwrap();
    let file = ModelFile::open(&path).unwrap();
    file.release(&heap);
    assert!(heap.iter().all(|&b| b == 7));
    let tensor = file.require("token_embd.weight").unwrap();
    let before = tensor.data().to_vec();
    file.release(tensor.data());
    assert_eq!(tensor.data(), before);
}

#[test]
fn configurations_that_cannot_be_are_refused() {
    let other = |key: &str, value: u32| {
        // The first of two equal keys would be an error; so build it without the original.
        let mut w = llama();
        let mut metadata = Vec::new();
        std::mem::swap(&mut metadata, &mut w.metadata);
        let name = [(key.len() as u64).to_le_bytes().as_slice(), key.as_bytes()].concat();
        let at = metadata
            .windows(name.len())
            .position(|part| part == name)
            .unwrap()
            + name.len()
            + 4;
        metadata[at..at + 4].copy_from_slice(&value.to_le_bytes());
        w.metadata = metadata;
        w.bytes()
    };
    let cases = [
        (other("llama.block_count", 0), "layers"),
        (other("llama.block_count", u32::MAX), "layers"),
        (other("llama.block_count", 2), "blk.1.attn_norm.weight"),
        (other("llama.attention.head_count", 0), "query heads"),
        (
            other("llama.attention.head_count_kv", 3),
            "multiple of the 3 KV heads",
        ),
        (other("llama.attention.head_count_kv", 0), "KV heads"),
        (other("llama.embedding_length", u32::MAX), "hidden width"),
        (other("llama.feed_forward_length", 64), "shape"),
        (other("llama.context_length", 0), "context"),
        (
            other("llama.attention.layer_norm_rms_epsilon", f32::NAN.to_bits()),
            "epsilon",
        ),
        (other("llama.rope.freq_base", 0), "rope theta"),
        (
            llama().text("llama.rope.scaling.type", "yarn").bytes(),
            "yarn",
        ),
        (
            llama().uint("llama.expert_count", 8).bytes(),
            "expert_count",
        ),
        (
            llama().tensor("blk.0.attn_q.bias", &[64], 0.0).bytes(),
            "bias",
        ),
        (
            llama().tensor("rope_freqs.weight", &[3], 1.0).bytes(),
            "rope_freqs",
        ),
        (
            llama().tensor("output.weight", &[50, 32], 1.0).bytes(),
            "output.weight has shape [50, 32], expected [50, 64]",
        ),
        (
            Writer::default()
                .text("general.architecture", "bert")
                .bytes(),
            "expected llama, got bert",
        ),
        (
            Writer::default()
                .text("general.architecture", "llama")
                .bytes(),
            "missing",
        ),
    ];
    for (bytes, expected) in cases {
        let error = open(&bytes)
            .and_then(|f| f.config())
            .expect_err(expected)
            .to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn tensors_with_values_that_are_no_numbers_are_named() {
    let file = open(&llama().tensor("bad", &[3, 8], f32::NAN).bytes()).unwrap();
    let error = file
        .require("bad")
        .unwrap()
        .to_f32()
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("tensor bad") && error.contains("row 0"),
        "{error}"
    );
    for format in Format::ALL {
        let cols = format.block_len();
        let good = vec![0u8; format.row_bytes(cols)];
        let mut spoilt = 0;
        for at in 0..good.len() {
            let mut row = good.clone();
            row[at] = 0xff;
            if at + 1 < row.len() {
                row[at + 1] = 0xff;
            }
            let mut values = vec![0.0; cols];
            kernels::dequantize_row(format, &row, &mut values).unwrap();
            let finite = values.iter().all(|v| v.is_finite());
            spoilt += usize::from(!finite);
            let shape = [1, cols];
            let tensor = Tensor::new(&file.inner.path, "t", format, &shape, &row);
            assert_eq!(
                tensor.check_finite(0..1, 0..row.len()).is_ok(),
                finite,
                "{format:?} with byte {at} spoilt"
            );
        }
        assert!(spoilt > 0, "{format:?}");
    }
}

#[test]
fn a_path_that_is_no_model_says_what_is_expected() {
    let folder = tempfile::tempdir().unwrap();
    let missing = ModelFile::open(folder.path().join("none.gguf"))
        .err()
        .unwrap()
        .to_string();
    assert!(missing.contains("cannot be opened"), "{missing}");
    let empty = ModelFile::open(folder.path()).err().unwrap().to_string();
    assert!(empty.contains("config.json"), "{empty}");
    std::fs::write(folder.path().join("config.json"), "{").unwrap();
    let broken = ModelFile::open(folder.path()).err().unwrap().to_string();
    assert!(broken.contains("expected JSON"), "{broken}");
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    std::fs::write(
        folder.path().join("model.safetensors.index.json"),
        r#"{"weight_map":{"a":"../../etc/passwd"}}"#,
    )
    .unwrap();
    let outside = ModelFile::open(folder.path()).err().unwrap().to_string();
    assert!(outside.contains("same folder"), "{outside}");
}

#[test]
fn a_safetensors_file_cut_off_anywhere_is_an_error() {
    let header = br#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}"#;
    let mut whole = (header.len() as u64).to_le_bytes().to_vec();
    whole.extend_from_slice(header);
    whole.extend_from_slice(&[0; 16]);
    let path = PathBuf::from("model.safetensors");
    assert_eq!(folder::parse(&path, &whole, 0).unwrap()[0].1.bytes, 16);
    for len in 0..whole.len() {
        assert!(
            folder::parse(&path, &whole[..len], 0).is_err(),
            "cut at {len}"
        );
    }
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(folder::parse(&path, &huge, 0).is_err());
}

proptest! {
    /// Whatever bytes are changed, the answer is a value or an error.
    #[test]
    fn changed_bytes_never_panic(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), header in any::<bool>()) {
        let mut bytes = llama().bytes();
        let range = if header { 1400.min(bytes.len()) } else { bytes.len() };
        for (at, value) in changes {
            bytes[at.index(range)] = value;
        }
        if let Ok(file) = open(&bytes) {
            if let Ok(config) = file.config() {
                prop_assert!(config.inv_freq().len() == config.head_dim / 2);
            }
            for name in file.tensor_names() {
                let _ = file.tensor(name).map(|t| t.to_f32());
            }
            for key in file.metadata().keys() {
                let _ = (file.metadata().strings(key), file.metadata().ints(key), file.metadata().floats(key));
            }
        }
    }

    #[test]
    fn random_bytes_after_the_magic_never_panic(tail in proptest::collection::vec(any::<u8>(), 0..200)) {
        let bytes = [b"GGUF\x03\0\0\0".as_slice(), &tail].concat();
        let _ = parse(&bytes);
    }
}

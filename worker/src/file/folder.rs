//! A Hugging Face folder: `config.json`, and tensors in `model.safetensors`, or in the shards that
//! `model.safetensors.index.json` names.

use std::collections::{BTreeSet, HashMap};
use std::path::{Component, Path};

use kernels::Format;
use safetensors::{Dtype, SafeTensors};

use super::{Dialect, Entry, Error, Inner, Metadata};

/// Largest JSON file read: config and index of a 70B model together are under 100 kB.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// Opens a folder: maps its shards and reads their headers.
pub(super) fn open(path: &Path) -> Result<Inner, Error> {
    let config = path.join("config.json");
    if !config.exists() {
        return Err(Error::NotAModel {
            path: path.into(),
            got: "a folder without config.json".into(),
        });
    }
    let hf_config = json(&config)?;
    let index = path.join("model.safetensors.index.json");
    let files = if index.exists() {
        shards(&index)?
    } else {
        BTreeSet::from(["model.safetensors".to_owned()])
    };
    let mut maps = Vec::new();
    let mut tensors = HashMap::new();
    for file in files {
        let file = path.join(file);
        let map = super::map(&file)?;
        for (name, entry) in parse(&file, &map, maps.len())? {
            if tensors.insert(name.clone(), entry).is_some() {
                return Err(Error::Duplicate {
                    path: path.into(),
                    what: format!("tensor {name}"),
                });
            }
        }
        maps.push(map);
    }
    Ok(Inner {
        path: path.into(),
        dialect: Dialect::Safetensors,
        maps,
        tensors,
        metadata: Metadata::default(),
        hf_config: Some(hf_config),
    })
}

/// Reads the header of one safetensors file from its bytes.
pub(super) fn parse(path: &Path, bytes: &[u8], map: usize) -> Result<Vec<(String, Entry)>, Error> {
    let invalid = |what: String, expected: &str, got: String| Error::Invalid {
        path: path.into(),
        what,
        expected: expected.into(),
        got,
        remedy: "the file is damaged or incomplete; fetch it again",
    };
    let file = SafeTensors::deserialize(bytes).map_err(|e| {
        invalid(
            "header".into(),
            "a complete safetensors file",
            e.to_string(),
        )
    })?;
    let mut out = Vec::new();
    for (name, view) in file.iter() {
        let format = match view.dtype() {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::BF16,
            // Buffers such as position ids are no weights; a weight of another type is reported as missing when asked for.
            _ => continue,
        };
        let shape = view.shape().to_vec();
        if shape.contains(&0) {
            return Err(invalid(
                format!("size of tensor {name}"),
                "lengths above 0",
                format!("{shape:?}"),
            ));
        }
        let data = view.data();
        let offset = data.as_ptr() as usize - bytes.as_ptr() as usize;
        out.push((
            name.to_owned(),
            Entry {
                map,
                offset,
                bytes: data.len(),
                format,
                shape,
            },
        ));
    }
    Ok(out)
}

/// The shards that an index names: plain file names inside the folder.
fn shards(index: &Path) -> Result<BTreeSet<String>, Error> {
    let json = json(index)?;
    let invalid = |got: String| Error::Invalid {
        path: index.into(),
        what: "weight_map".into(),
        expected: "an object from tensor names to file names in the same folder".into(),
        got,
        remedy: "fetch the index again",
    };
    let map = json
        .get("weight_map")
        .and_then(|m| m.as_object())
        .ok_or_else(|| invalid("none".into()))?;
    let mut files = BTreeSet::new();
    for file in map.values() {
        let file = file.as_str().ok_or_else(|| invalid(file.to_string()))?;
        let mut parts = Path::new(file).components();
        if !matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        ) {
            return Err(invalid(format!("{file:?}")));
        }
        files.insert(file.to_owned());
    }
    Ok(files)
}

fn json(path: &Path) -> Result<serde_json::Value, Error> {
    let open = |source| Error::Open {
        path: path.into(),
        source,
    };
    let size = std::fs::metadata(path).map_err(open)?.len();
    if size > MAX_JSON_BYTES {
        return Err(Error::TooMany {
            path: path.into(),
            what: "size in bytes".into(),
            got: size,
            max: MAX_JSON_BYTES,
        });
    }
    serde_json::from_slice(&std::fs::read(path).map_err(open)?).map_err(|e| Error::Invalid {
        path: path.into(),
        what: "content".into(),
        expected: "JSON".into(),
        got: e.to_string(),
        remedy: "fetch the file again",
    })
}

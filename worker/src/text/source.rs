//! Where a model's tokenizer and template lie: in GGUF metadata, or beside the weights in a folder.

use super::vocabulary::{TokenKind, Vocabulary};
use super::{ChatTemplate, Error, Tokenizer};
use crate::file::{Dialect, ModelFile};

/// The text side of a model.
pub struct TextSide {
    pub tokenizer: Tokenizer,
    /// Base models have none.
    pub template: Option<ChatTemplate>,
}

/// Reads a model's tokenizer and chat template.
///
/// # Errors
/// What is missing or broken, by the name of its field or file.
pub fn load(file: &ModelFile) -> Result<TextSide, Error> {
    match file.dialect() {
        Dialect::Gguf => {
            let vocabulary = Vocabulary::from_gguf(file)?;
            let text_of = |id: Option<u32>| {
                id.and_then(|id| vocabulary.tokens.get(id as usize))
                    .map_or("", String::as_str)
            };
            let template = file.metadata().str("tokenizer.chat_template");
            let template = template
                .map(|t| ChatTemplate::new(t, text_of(vocabulary.bos), text_of(vocabulary.eos)))
                .transpose()?;
            Ok(TextSide {
                tokenizer: Tokenizer::from_vocabulary(&vocabulary)?,
                template,
            })
        }
        Dialect::Safetensors => folder(file),
    }
}

fn folder(file: &ModelFile) -> Result<TextSide, Error> {
    let config = file.sibling("tokenizer_config.json");
    let tokenizer = match (
        file.sibling("tokenizer.json"),
        file.sibling("tokenizer.model"),
    ) {
        (Some(json), _) => Tokenizer::from_tokenizer_json(&json, config.as_deref())?,
        (None, Some(tiktoken)) => Tokenizer::from_tiktoken(&tiktoken)?,
        (None, None) => {
            let key = file.path().display().to_string();
            return Err(Error::broken(
                &key,
                "tokenizer.json or Llama 3's tokenizer.model in the folder",
                "neither",
            ));
        }
    };
    let config: serde_json::Value = match &config {
        Some(bytes) => serde_json::from_slice(bytes)
            .map_err(|e| Error::broken("tokenizer_config.json", "JSON", e.to_string()))?,
        None => serde_json::Value::Null,
    };
    let named = |key: &str| {
        config[key]
            .as_str()
            .or_else(|| config[key]["content"].as_str())
            .unwrap_or_default()
            .to_owned()
    };
    let alone = file
        .sibling("chat_template.jinja")
        .and_then(|bytes| String::from_utf8(bytes).ok());
    // A list holds templates by name; the one called "default" is for chats.
    let listed = config["chat_template"]
        .as_array()
        .and_then(|list| list.iter().find(|t| t["name"] == "default"));
    let within = config["chat_template"]
        .as_str()
        .or_else(|| listed.and_then(|t| t["template"].as_str()));
    let source = alone.or_else(|| within.map(str::to_owned));
    let template = source
        .map(|s| ChatTemplate::new(&s, &named("bos_token"), &named("eos_token")))
        .transpose()?;
    Ok(TextSide {
        tokenizer,
        template,
    })
}

impl Vocabulary {
    /// The tokenizer's metadata of a GGUF file.
    ///
    /// # Errors
    /// A field that is missing or of another type.
    pub fn from_gguf(file: &ModelFile) -> Result<Self, Error> {
        let meta = file.metadata();
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let broken = |e: crate::file::Error| Error::Encode(e.to_string());
        let model = meta
            .str(&key("model"))
            .ok_or_else(|| Error::broken(&key("model"), "the kind of tokenizer", "none"))?;
        let id = |name: &str| {
            meta.u64(&key(&format!("{name}_token_id")))
                .and_then(|id| u32::try_from(id).ok())
        };
        let tokens = meta.strings(&key("tokens")).map_err(broken)?;
        let charsmap = meta
            .ints(&key("precompiled_charsmap"))
            .map_err(broken)?
            .unwrap_or_default();
        let kinds = meta
            .ints(&key("token_type"))
            .map_err(broken)?
            .unwrap_or_default();
        let normalizer = meta
            .ints("verbund.tokenizer.normalizer_map")
            .map_err(broken)?
            .unwrap_or_default();
        let vocabulary = Self {
            model: model.into(),
            pre: meta.str(&key("pre")).map(str::to_owned),
            tokens: tokens.ok_or_else(|| Error::broken(&key("tokens"), "the tokens", "none"))?,
            scores: meta
                .floats(&key("scores"))
                .map_err(broken)?
                .unwrap_or_default(),
            kinds: kinds.into_iter().map(TokenKind::from_gguf).collect(),
            merges: meta
                .strings(&key("merges"))
                .map_err(broken)?
                .unwrap_or_default(),
            bos: id("bos"),
            eos: id("eos"),
            eot: id("eot"),
            unknown: id("unknown"),
            add_bos: meta.bool(&key("add_bos_token")),
            add_eos: meta.bool(&key("add_eos_token")),
            add_space_prefix: meta.bool(&key("add_space_prefix")),
            precompiled_charsmap: charsmap.into_iter().map(|b| b as u8).collect(),
            normalizer_map: normalizer.into_iter().map(|c| c as u32).collect(),
        };
        vocabulary.validate()?;
        Ok(vocabulary)
    }
}

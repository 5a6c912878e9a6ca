//! The one face of every tokenizer: text to tokens and tokens to bytes.

use serde_json::Value;

use super::sentencepiece::{SPACE, SentencePiece, byte_of};
use super::specials::{Parse, Piece, Specials};
use super::template::Rendered;
use super::unigram::Unigram;
use super::vocabulary::{AddedToken, MAX_TOKENS, TokenKind, Vocabulary};
use super::{Error, bpe, tiktoken};

/// Control tokens that end an answer, by the names that model families give them.
const END_NAMES: [&str; 9] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
    "</s>",
];
const SUPPORTED_MODELS: [&str; 3] = ["gpt2", "llama", "t5"];

enum Core {
    Pieces(Box<tokenizers::Tokenizer>),
    SentencePiece(SentencePiece),
    Unigram(Box<Unigram>),
}

/// How a token's text in the vocabulary stands for bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Letters {
    /// GPT-2's letters for bytes.
    Bytes,
    /// U+2581 for a space, `<0x0A>` for a byte.
    Sentence,
}

/// Text to tokens and back, for one model.
pub struct Tokenizer {
    core: Core,
    specials: Specials,
    /// All tokens' bytes, one after the other; token `i` ends at `ends[i]`.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    kinds: Vec<TokenKind>,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Sorted.
    end_ids: Vec<u32>,
    add_bos: bool,
    add_eos: bool,
}

impl Tokenizer {
    /// From a GGUF file's metadata.
    ///
    /// # Errors
    /// A kind of tokenizer that is not supported, a byte-pair vocabulary without merges, or fields that contradict.
    pub fn from_vocabulary(vocabulary: &Vocabulary) -> Result<Self, Error> {
        vocabulary.validate()?;
        let (core, letters, add_bos) = match vocabulary.model.as_str() {
            "gpt2" => (
                Core::Pieces(Box::new(bpe::from_vocabulary(vocabulary)?)),
                Letters::Bytes,
                false,
            ),
            "llama" => (
                Core::SentencePiece(SentencePiece::new(vocabulary)?),
                Letters::Sentence,
                true,
            ),
            "t5" => (
                Core::Unigram(Box::new(Unigram::new(vocabulary)?)),
                Letters::Sentence,
                true,
            ),
            other => {
                return Err(Error::Unsupported {
                    got: other.into(),
                    supported: SUPPORTED_MODELS.to_vec(),
                });
            }
        };
        // llama.cpp adds a beginning for Llama 3's split whatever the file says nothing of.
        let add_bos = add_bos || vocabulary.pre.as_deref() == Some("llama-bpe");
        Ok(Self::assemble(core, letters, vocabulary, add_bos))
    }

    /// From Llama 3's own `tokenizer.model` (tiktoken's form).
    ///
    /// # Errors
    /// A line that is not `base64 rank` in order.
    pub fn from_tiktoken(file: &[u8]) -> Result<Self, Error> {
        let (core, vocabulary) = tiktoken::read(file)?;
        Ok(Self::assemble(
            Core::Pieces(Box::new(core)),
            Letters::Bytes,
            &vocabulary,
            true,
        ))
    }

    /// From a Hugging Face folder's `tokenizer.json`, with `tokenizer_config.json` if there is one.
    ///
    /// # Errors
    /// Broken JSON, a model without merges, or parts that the crate `tokenizers` does not know.
    pub fn from_tokenizer_json(file: &[u8], config: Option<&[u8]>) -> Result<Self, Error> {
        let json = |bytes: &[u8], key: &str| -> Result<Value, Error> {
            serde_json::from_slice(bytes).map_err(|e| Error::broken(key, "JSON", e.to_string()))
        };
        let mut file = json(file, "tokenizer.json")?;
        if !file.is_object() {
            return Err(Error::broken(
                "tokenizer.json",
                "a JSON object",
                "another value",
            ));
        }
        let config = config
            .map(|c| json(c, "tokenizer_config.json"))
            .transpose()?
            .unwrap_or(Value::Null);
        let bpe = file["model"]["type"] == "BPE" || file["model"].get("merges").is_some();
        if bpe && file["model"]["merges"].as_array().is_none_or(Vec::is_empty) {
            return Err(Error::NoMerges {
                key: "model.merges in tokenizer.json".into(),
            });
        }
        let added: Vec<AddedToken> = match file["added_tokens"].take() {
            Value::Null => Vec::new(),
            list => serde_json::from_value(list)
                .map_err(|e| Error::broken("added_tokens", "a list of tokens", e.to_string()))?,
        };
        let post_processor = file["post_processor"].take();
        let byte_letters = [&file["pre_tokenizer"], &file["decoder"]]
            .iter()
            .any(|v| v.to_string().contains("\"ByteLevel\""));
        file["added_tokens"] = Value::Array(Vec::new());
        let core = tokenizers::Tokenizer::from_bytes(file.to_string()).map_err(|e| {
            Error::broken(
                "tokenizer.json",
                "a tokenizer of Hugging Face's library",
                e.to_string(),
            )
        })?;

        let vocab = core.get_vocab(false);
        let largest = vocab
            .values()
            .copied()
            .chain(added.iter().map(|t| t.id))
            .max()
            .unwrap_or(0) as usize;
        if largest >= MAX_TOKENS {
            return Err(Error::broken(
                "tokenizer.json",
                format!("ids below {MAX_TOKENS}"),
                largest.to_string(),
            ));
        }
        let mut tokens = vec![String::new(); largest + 1];
        let mut kinds = vec![TokenKind::Normal; largest + 1];
        for (token, id) in vocab {
            if !byte_letters && byte_of(&token).is_some() {
                kinds[id as usize] = TokenKind::Byte;
            }
            tokens[id as usize] = token;
        }
        for token in added {
            kinds[token.id as usize] = if token.special {
                TokenKind::Control
            } else {
                TokenKind::UserDefined
            };
            tokens[token.id as usize] = token.content;
        }
        let named = |key: &str| {
            let token = &config[key];
            let text = token.as_str().or_else(|| token["content"].as_str())?;
            tokens.iter().position(|t| t == text).map(|id| id as u32)
        };
        let bos = named("bos_token");
        let first = bos.and_then(|id| tokens.get(id as usize));
        let vocabulary = Vocabulary {
            bos,
            eos: named("eos_token"),
            add_bos: Some(first.is_some_and(|bos| begins_with(&post_processor, bos))),
            tokens,
            kinds,
            ..Vocabulary::default()
        };
        vocabulary.validate()?;
        let letters = if byte_letters {
            Letters::Bytes
        } else {
            Letters::Sentence
        };
        Ok(Self::assemble(
            Core::Pieces(Box::new(core)),
            letters,
            &vocabulary,
            false,
        ))
    }

    fn assemble(core: Core, letters: Letters, vocabulary: &Vocabulary, add_bos: bool) -> Self {
        let mut bytes = Vec::new();
        let mut ends = Vec::with_capacity(vocabulary.tokens.len());
        for (id, token) in vocabulary.tokens.iter().enumerate() {
            match (vocabulary.kind(id), letters) {
                (TokenKind::Control | TokenKind::Unused, _) => {}
                (TokenKind::UserDefined, _) => bytes.extend_from_slice(token.as_bytes()),
                (TokenKind::Byte, _) => bytes.extend(byte_of(token)),
                (_, Letters::Bytes) => bytes.extend(bpe::letters_to_bytes(token)),
                (_, Letters::Sentence) => {
                    bytes.extend_from_slice(token.replace(SPACE, " ").as_bytes())
                }
            }
            ends.push(bytes.len() as u32);
        }
        let kinds: Vec<TokenKind> = (0..vocabulary.tokens.len())
            .map(|id| vocabulary.kind(id))
            .collect();
        let special = |(id, token): (usize, &String)| match kinds[id] {
            TokenKind::Control => Some((token.clone(), id as u32, true)),
            TokenKind::UserDefined => Some((token.clone(), id as u32, false)),
            _ => None,
        };
        let specials = Specials::new(vocabulary.tokens.iter().enumerate().filter_map(special));
        let named_ends = vocabulary
            .tokens
            .iter()
            .enumerate()
            .filter(|(id, token)| {
                kinds[*id] == TokenKind::Control && END_NAMES.contains(&token.as_str())
            })
            .map(|(id, _)| id as u32);
        let mut end_ids: Vec<u32> = named_ends
            .chain(vocabulary.eos)
            .chain(vocabulary.eot)
            .collect();
        end_ids.sort_unstable();
        end_ids.dedup();
        Self {
            core,
            specials,
            bytes,
            ends,
            kinds,
            bos: vocabulary.bos,
            eos: vocabulary.eos,
            end_ids,
            add_bos: vocabulary.add_bos.unwrap_or(add_bos),
            add_eos: vocabulary.add_eos.unwrap_or(false),
        }
    }

    /// Tokens of a text, with nothing added before or after.
    pub fn encode(&self, text: &str, parse: Parse) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        for piece in self.specials.split(text, parse) {
            match piece {
                Piece::Token(id) => ids.push(id),
                Piece::Text(text) => self.encode_text(text, &mut ids)?,
            }
        }
        Ok(ids)
    }

    /// Tokens of a user's plain prompt: the model's beginning in front if it wants one, no control token within.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids: Vec<u32> = self.bos.filter(|_| self.add_bos).into_iter().collect();
        ids.extend(self.encode(text, Parse::Plain)?);
        Ok(ids)
    }

    /// Tokens of a rendered conversation: the template's control tokens count, users' do not.
    pub fn encode_rendered(&self, rendered: &Rendered) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        for piece in self.specials.split(rendered.marked(), Parse::Control) {
            match piece {
                Piece::Token(id) => ids.push(id),
                Piece::Text(text) => self.encode_text(&rendered.unmark(text), &mut ids)?,
            }
        }
        // A template that writes the beginning itself has it already.
        if let Some(bos) = self
            .bos
            .filter(|bos| self.add_bos && ids.first() != Some(bos))
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Tokens as an encoder model reads them: beginning, text, end.
    pub fn encode_for_encoder(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = self.encode_prompt(text)?;
        ids.extend(self.eos.filter(|_| self.add_eos));
        Ok(ids)
    }

    fn encode_text(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), Error> {
        match &self.core {
            Core::Pieces(pieces) => {
                let encoding = pieces
                    .encode_fast(text, false)
                    .map_err(|e| Error::Encode(e.to_string()))?;
                ids.extend_from_slice(encoding.get_ids());
            }
            Core::SentencePiece(model) => model.encode(text, ids),
            Core::Unigram(model) => model.encode(text, ids),
        }
        Ok(())
    }

    /// What a token adds to an answer; nothing for control tokens and ids beyond the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }

    /// What a token is called where tokens are told one by one: its bytes, or a control token's name.
    pub fn token_name(&self, id: u32) -> &[u8] {
        match self.token_bytes(id) {
            [] => self.specials.name(id).unwrap_or_default().as_bytes(),
            bytes => bytes,
        }
    }

    /// The text of tokens; broken characters become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids
            .iter()
            .flat_map(|&id| self.token_bytes(id))
            .copied()
            .collect();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        match &self.core {
            Core::SentencePiece(model) if model.has_space_prefix() => {
                text.strip_prefix(' ').map(str::to_owned).unwrap_or(text)
            }
            _ => text,
        }
    }

    /// Whether a token ends an answer.
    pub fn is_end(&self, id: u32) -> bool {
        self.end_ids.binary_search(&id).is_ok()
    }

    /// What a token is for; `None` beyond the vocabulary.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }

    /// Tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.ends.len()
    }

    /// The token that begins every text, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends every text, if the model has one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    pub(super) fn specials(&self) -> &Specials {
        &self.specials
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

/// Whether a post-processor of `tokenizer.json` puts `bos` before every text.
fn begins_with(post_processor: &Value, bos: &str) -> bool {
    let single = |p: &Value| p["single"][0]["SpecialToken"]["id"] == bos;
    let nested = post_processor["processors"].as_array();
    single(post_processor) || nested.is_some_and(|list| list.iter().any(single))
}

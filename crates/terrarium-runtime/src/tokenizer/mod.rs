//! Text to ids and back, over the `tokenizers` crate.

mod chat;
mod sentencepiece;
mod special;
mod stream;
mod train;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

pub use chat::Message;
pub use stream::TextStream;

use crate::error::TokenizerError;
use crate::{Error, Result};
use special::Special;

/// A tokenizer, its special tokens and its chat template. Cloning is cheap.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    special: Special,
    template: Option<Arc<str>>,
    vocab_size: usize,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size).field("special", &self.special).finish_non_exhaustive()
    }
}

const TOKENIZER: &str = "tokenizer.json";
const CONFIG: &str = "tokenizer_config.json";

impl Tokenizer {
    /// The tokenizer of a model directory: tokenizer.json, else a SentencePiece model (tokenizer.model or the only
    /// `*.model`); `None` where there is neither.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let file = dir.join(TOKENIZER);
        let mut tokenizer = if file.is_file() {
            Self::from_file(&file)?
        } else if let Some(file) = find_sentencepiece(dir)? {
            Self::from_sentencepiece(&file)?
        } else {
            return Ok(None);
        };
        let config = read_map(&dir.join(CONFIG))?;
        let map = read_map(&dir.join("special_tokens_map.json"))?;
        tokenizer.special = Special::from_configs(&tokenizer, &[&config, &map]).or(tokenizer.special);
        tokenizer.template = chat::find_template(dir, &config)?.map(Arc::from);
        Ok(Some(tokenizer))
    }

    /// A tokenizer.json alone: without special tokens of its own and without a chat template.
    pub fn from_file(file: &Path) -> Result<Self> {
        let bytes = std::fs::read(file).map_err(Error::io("read", file))?;
        Self::parse(&bytes).map_err(|reason| TokenizerError::Read { file: file.display().to_string(), reason }.into())
    }

    /// As [`Tokenizer::from_file`], from memory.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse(bytes).map_err(|reason| TokenizerError::Read { file: TOKENIZER.into(), reason }.into())
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| e.to_string())?;
        Self::wrap(inner).map_err(|e| e.to_string())
    }

    fn wrap(mut inner: tokenizers::Tokenizer) -> tokenizers::Result<Self> {
        // Files are often saved with the truncation and padding of someone's training run: text would be lost silently.
        inner.with_truncation(None)?.with_padding(None);
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Ok(Self { inner: Arc::new(inner), special: Special::default(), template: None, vocab_size })
    }

    /// One more than the highest id, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Ids of a text; with `add_special`, what tokenizer.json puts around it (often a bos).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| convert("encode", e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of many texts, on all cores.
    pub fn encode_batch(&self, texts: &[&str], add_special: bool) -> Result<Vec<Vec<u32>>> {
        let encodings = self.inner.encode_batch_fast(texts.to_vec(), add_special).map_err(|e| convert("encode", e))?;
        Ok(encodings.into_iter().map(|e| e.get_ids().to_vec()).collect())
    }

    /// Text of ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| convert("decode", e).into())
    }

    /// Text of ids that arrive one by one, never half a character.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self, true)
    }

    /// As [`Tokenizer::stream`], special tokens shown.
    pub fn stream_with_special(&self) -> TextStream<'_> {
        TextStream::new(self, false)
    }

    /// The vocabulary's spelling of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Beginning of text.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos.as_ref().map(|t| t.id)
    }

    /// End of text.
    pub fn eos(&self) -> Option<u32> {
        self.special.eos.as_ref().map(|t| t.id)
    }

    /// Padding.
    pub fn pad(&self) -> Option<u32> {
        self.special.pad.as_ref().map(|t| t.id)
    }

    /// Unknown.
    pub fn unk(&self) -> Option<u32> {
        self.special.unk.as_ref().map(|t| t.id)
    }

    /// Whether an id stands for no text.
    pub fn is_special(&self, id: u32) -> bool {
        self.token(id).is_some_and(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// The text of tokenizer.json: what other programs open it by, whatever it was read from.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|e| convert("write", e).into())
    }

    /// Writes tokenizer.json and tokenizer_config.json.
    pub fn save(&self, dir: &Path) -> Result<()> {
        crate::atomic::write_atomic(&dir.join(TOKENIZER), self.to_json()?.as_bytes())?;
        let mut config = self.special.to_map();
        config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
        config.insert("clean_up_tokenization_spaces".into(), false.into());
        if let Some(template) = &self.template {
            config.insert("chat_template".into(), (**template).into());
        }
        let text = format!("{:#}\n", Value::Object(config));
        crate::atomic::write_atomic(&dir.join(CONFIG), text.as_bytes())
    }
}

fn convert(action: &'static str, error: tokenizers::Error) -> TokenizerError {
    TokenizerError::Convert { action, reason: error.to_string() }
}

/// The SentencePiece model of a directory: tokenizer.model, else the only file of that kind.
fn find_sentencepiece(dir: &Path) -> Result<Option<PathBuf>> {
    let usual = dir.join("tokenizer.model");
    if usual.is_file() {
        return Ok(Some(usual));
    }
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io("read", dir)(e)),
    };
    for entry in entries {
        let path = entry.map_err(Error::io("read", dir))?.path();
        if path.extension().is_some_and(|e| e == "model") && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    if found.len() > 1 {
        let files = found.iter().filter_map(|f| f.file_name()).map(|f| f.to_string_lossy().into_owned()).collect();
        return Err(TokenizerError::Several { dir: dir.to_path_buf(), files }.into());
    }
    Ok(found.pop())
}

/// A JSON object; empty where there is no file.
fn read_map(file: &Path) -> Result<Map<String, Value>> {
    match std::fs::read_to_string(file) {
        Ok(text) => serde_json::from_str(&text).map_err(|source| Error::Json { file: file.to_path_buf(), source }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(e) => Err(Error::io("read", file)(e)),
    }
}

//! What a model carries after a text, kept in a file: reading goes on from there.
//!
//! A snapshot is one safetensors file. Its tensors are those of the cache under `cache.` and the names of
//! [`Cache::tensors`], `tokens` (I32, all of them read) and `logits` (F32, after the last one). Its metadata:
//!
//! | key | value |
//! | --- | --- |
//! | `format`, `version` | `terrarium-state`, `1` |
//! | `model` | the model in words, for messages |
//! | `config` | hash of what the configuration says of the network |
//! | `weights` | hash of the first, middle and last rows of every parameter |
//! | `dtype` | type of the weights |
//! | `checksum` | hash of all tensors |
//!
//! Keys and values know which token they are of, so the state of a model of attention alone can be cut back to any of its tokens.
//! States of scans and convolutions know no way back: they are of use where the new text begins with all of theirs.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium_kernels::KernelBackend;
use terrarium_models::{Cache, Context, Decoder, DecoderConfig, Layout};

use crate::error::SnapshotError;
use crate::tensors::{MappedFile, TensorSpec, write_safetensors_lazily};
use crate::{Error, Result};

const FORMAT: &str = "terrarium-state";
const VERSION: &str = "1";
const PREFIX: &str = "cache.";

/// The state of one row after its tokens, on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Tokens that were read.
    pub tokens: Vec<u32>,
    /// `[1, v]`, float32, after the last of them.
    logits: TensorData,
    /// Of the cache, by name.
    tensors: BTreeMap<String, TensorData>,
    model: Fingerprint,
}

/// What tells one model from another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Fingerprint {
    words: String,
    config: String,
    weights: String,
    dtype: String,
}

impl Fingerprint {
    fn of<B: KernelBackend>(model: &Decoder<B>, config: &DecoderConfig) -> Self {
        let DecoderConfig { vocab_size, hidden_size, layers, norm, parallel_mlp, scaling, tie_embeddings, .. } = config;
        let network = format!("{vocab_size} {hidden_size} {layers:?} {norm:?} {parallel_mlp} {scaling:?} {tie_embeddings}");
        let mut weights = Hash::default();
        for (path, data) in model.samples() {
            weights.tensor(&path, &data);
        }
        let mut hash = Hash::default();
        hash.bytes(network.as_bytes());
        Self {
            words: format!("a {} of {} parameters", config.family.name(), config.parameters()),
            config: hash.text(),
            weights: weights.text(),
            dtype: format!("{:?}", model.embeddings.weight.val().dtype()).to_lowercase(),
        }
    }

    /// Refuses a state of a model that is another than this one.
    fn accept(&self, state: &Self) -> Result<(), SnapshotError> {
        let other = |differs| SnapshotError::OtherModel { differs, expected: self.words.clone(), found: state.words.clone() };
        if state.config != self.config {
            return Err(other("another configuration"));
        }
        if state.dtype != self.dtype {
            return Err(SnapshotError::Dtype { expected: self.dtype.clone(), found: state.dtype.clone() });
        }
        if state.weights != self.weights { Err(other("other weights")) } else { Ok(()) }
    }
}

/// A hash that finds what went wrong by accident, the same everywhere.
struct Hash(u64);

impl Default for Hash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hash {
    fn word(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }

    fn bytes(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.word(u64::from_le_bytes(*word)));
        rest.iter().for_each(|byte| self.word(u64::from(*byte)));
        self.word(bytes.len() as u64);
    }

    fn tensor(&mut self, name: &str, data: &TensorData) {
        self.bytes(name.as_bytes());
        self.bytes(format!("{:?} {:?}", data.dtype, data.shape.to_vec()).as_bytes());
        self.bytes(data.as_bytes());
    }

    fn text(&self) -> String {
        format!("{:016x}", self.0)
    }
}

/// A cache to go on from.
pub(crate) struct Resumed<B: KernelBackend> {
    pub(crate) cache: Cache<B>,
    /// Tokens of the prompt that it has read.
    pub(crate) reused: usize,
    /// After the last of them, where that was the last token of the state too.
    pub(crate) logits: Option<Vec<f32>>,
}

impl Snapshot {
    /// The state `cache` of `model` after it has read `tokens`, and the logits after the last one.
    ///
    /// # Errors
    /// [`SnapshotError::Rows`] where the cache is not of one row without padding.
    pub fn take<B: KernelBackend>(
        model: &Decoder<B>,
        config: &DecoderConfig,
        cache: &Cache<B>,
        tokens: Vec<u32>,
        logits: Vec<f32>,
    ) -> Result<Self> {
        let tensors = cache.tensors().into_iter().map(|(name, tensor)| (name, tensor.into_data())).collect();
        Self::of_parts(model, config, &cache.context, tensors, tokens, logits)
    }

    /// As [`Snapshot::take`], of a cache in parts.
    pub(crate) fn of_parts<B: KernelBackend>(
        model: &Decoder<B>,
        config: &DecoderConfig,
        context: &Context,
        tensors: Vec<(String, TensorData)>,
        tokens: Vec<u32>,
        logits: Vec<f32>,
    ) -> Result<Self> {
        if *context != Context::plain(1, tokens.len()) {
            let what = format!("{} rows of {} slots after {} tokens", context.batch(), context.slots(), tokens.len());
            return Err(SnapshotError::Rows(what).into());
        }
        let shape = [1, logits.len()];
        let tensors = tensors.into_iter().collect();
        Ok(Self { tokens, logits: TensorData::new(logits, shape), tensors, model: Fingerprint::of(model, config) })
    }

    /// Everything that is kept, under the keys of the file, in their order.
    fn all(&self) -> BTreeMap<String, Cow<'_, TensorData>> {
        let tokens: Vec<i32> = self.tokens.iter().map(|&id| id as i32).collect();
        let count = tokens.len();
        let own = [("tokens", Cow::Owned(TensorData::new(tokens, [count]))), ("logits", Cow::Borrowed(&self.logits))];
        let cache = self.tensors.iter().map(|(name, data)| (format!("{PREFIX}{name}"), Cow::Borrowed(data)));
        own.into_iter().map(|(key, data)| (key.to_string(), data)).chain(cache).collect()
    }

    /// Writes it to `path`, whole or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let all = self.all();
        let mut checksum = Hash::default();
        all.iter().for_each(|(key, data)| checksum.tensor(key, data));
        let Fingerprint { words, config, weights, dtype } = &self.model;
        let checksum = checksum.text();
        let metadata = [
            ("format", FORMAT),
            ("version", VERSION),
            ("model", words),
            ("config", config),
            ("weights", weights),
            ("dtype", dtype),
            ("checksum", &checksum),
        ];
        let metadata: BTreeMap<String, String> = metadata.into_iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        let specs: Vec<TensorSpec> =
            all.iter().map(|(key, data)| TensorSpec { key: key.clone(), dtype: data.dtype, shape: data.shape.to_vec() }).collect();
        // One copy at a time.
        write_safetensors_lazily(path, &specs, &metadata, &mut |i| Ok(all[&specs[i].key].as_ref().clone()))
    }

    /// Reads what [`Snapshot::save`] wrote.
    ///
    /// # Errors
    /// [`SnapshotError`] for a file of something else, another version or damage; [`crate::CheckpointError`] for a file that was cut.
    pub fn load(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let metadata = &file.header.metadata;
        let path_buf = || path.to_path_buf();
        let not = |problem: String| Error::from(SnapshotError::NotAState { file: path_buf(), problem });
        match metadata.get("format").map(String::as_str) {
            Some(FORMAT) => {}
            Some(other) => return Err(not(format!("its metadata says format `{other}`, expected `{FORMAT}`"))),
            None => return Err(not(format!("its metadata lack format = {FORMAT}"))),
        }
        let get = |key: &str| metadata.get(key).cloned().ok_or_else(|| not(format!("its metadata lack `{key}`")));
        let version = get("version")?;
        if version != VERSION {
            return Err(SnapshotError::Version { file: path_buf(), found: version, expected: VERSION }.into());
        }
        let model = Fingerprint { words: get("model")?, config: get("config")?, weights: get("weights")?, dtype: get("dtype")? };
        let damaged = |problem: String| Error::from(SnapshotError::Damaged { file: path_buf(), problem });
        let mut all = BTreeMap::new();
        for entry in &file.header.entries {
            all.insert(entry.key.clone(), file.tensor(entry)?);
        }
        let mut checksum = Hash::default();
        all.iter().for_each(|(key, data)| checksum.tensor(key, data));
        let (expected, found) = (get("checksum")?, checksum.text());
        if expected != found {
            return Err(damaged(format!("its tensors have the checksum {found}, expected {expected}")));
        }
        let mut take = |key: &str| all.remove(key).ok_or_else(|| damaged(format!("it lacks `{key}`")));
        let (tokens, logits) = (take("tokens")?, take("logits")?);
        if tokens.dtype != DType::I32 || logits.dtype != DType::F32 || tokens.num_elements() == 0 {
            return Err(damaged("`tokens` are I32 and at least one, `logits` F32".to_string()));
        }
        let tokens = tokens.iter::<i32>().map(u32::try_from).collect::<Result<Vec<u32>, _>>();
        let tokens = tokens.map_err(|_| damaged("`tokens` holds an id below 0".to_string()))?;
        let tensors = all.into_iter().map(|(key, data)| (key.strip_prefix(PREFIX).map_or(key.clone(), str::to_string), data)).collect();
        Ok(Self { tokens, logits, tensors, model })
    }

    /// Tokens that `prompt` and this state begin with.
    pub fn common(&self, prompt: &[u32]) -> usize {
        self.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count()
    }

    /// Bytes of what the model carried.
    pub fn bytes(&self) -> usize {
        self.tensors.values().map(|data| data.as_bytes().len()).sum()
    }

    /// The cache of `model` after [`Snapshot::tokens`].
    ///
    /// # Errors
    /// [`SnapshotError`] where the state is that of another model, of its weights in another type, or does not fit it.
    pub fn cache<B: KernelBackend>(&self, model: &Decoder<B>, config: &DecoderConfig, device: &B::Device) -> Result<Cache<B>> {
        Fingerprint::of(model, config).accept(&self.model)?;
        let wrong = |problem: String| SnapshotError::Damaged { file: "the state".into(), problem };
        if self.logits.shape.to_vec() != [1, config.vocab_size] {
            return Err(wrong(format!("its logits are {:?}, expected [1, {}]", self.logits.shape.to_vec(), config.vocab_size)).into());
        }
        if let Some(id) = self.tokens.iter().find(|&&id| id as usize >= config.vocab_size) {
            return Err(wrong(format!("it holds the token {id}, and the model has {}", config.vocab_size)).into());
        }
        // A cache of this model shows what there is to fill, and in which shape.
        let like = model.hidden(Tensor::<B, 2, Int>::zeros([1, 1], device), None, &Layout::full(1, 1)).1;
        let mut left: BTreeMap<&str, &TensorData> = self.tensors.iter().map(|(name, data)| (name.as_str(), data)).collect();
        let cache = like.refilled(Context::plain(1, self.tokens.len()), |name, dims, dtype| {
            let data = left.remove(name.as_str()).ok_or_else(|| wrong(format!("it lacks `{name}`")))?;
            if data.shape.to_vec() != dims || data.dtype != dtype {
                let found = format!("{:?} {:?}", data.dtype, data.shape.to_vec());
                return Err(wrong(format!("`{name}` is {found}, expected {dtype:?} {dims:?}")));
            }
            Ok(Tensor::from_data(data.clone(), (device, dtype)))
        })?;
        match left.keys().next() {
            Some(name) => Err(wrong(format!("it holds `{name}`, which this model does not carry")).into()),
            None => Ok(cache),
        }
    }

    /// The cache after as much of `prompt` as this state has read; nothing where it cannot serve. Of the prompt at least one token is left
    /// to read, unless it is all that the state has read.
    ///
    /// # Errors
    /// As [`Snapshot::cache`], whether it can serve or not.
    pub(crate) fn resume<B: KernelBackend>(
        &self,
        model: &Decoder<B>,
        config: &DecoderConfig,
        prompt: &[u32],
        device: &B::Device,
    ) -> Result<Option<Resumed<B>>> {
        let cache = self.cache(model, config, device)?;
        let common = self.common(prompt);
        if common == self.tokens.len() {
            let logits = (common == prompt.len()).then(|| self.logits.iter::<f32>().collect());
            return Ok(Some(Resumed { cache, reused: common, logits }));
        }
        let reused = common.min(prompt.len().saturating_sub(1));
        if reused == 0 {
            return Ok(None);
        }
        Ok(cache.cut(reused).map(|cache| Resumed { cache, reused, logits: None }))
    }
}

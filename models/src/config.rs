//! The configuration of a decoder, read from the configuration file of any supported family.

use serde_json::{Map, Value};

use crate::families::{self, Family, Fields};
use crate::init::{Init, InitScale};
use crate::layers::NormConfig;
use crate::mixers::{AttentionConfig, Mamba2Config, MambaConfig, MlpConfig, Parameters};
use crate::params::ParamSpec;
use crate::pattern::{LayerKind, PatternError};
use crate::weights::WeightTable;

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or not an object.
    #[error("config is not valid JSON: {0}")]
    Json(String),
    /// No `model_type`.
    #[error("config has no `model_type`; expected one of {known}")]
    NoModelType {
        /// Families of this crate.
        known: String,
    },
    /// A family this crate does not have.
    #[error("model_type `{found}` is not supported; supported: {known}")]
    UnknownModelType {
        /// What the config says.
        found: String,
        /// Families of this crate.
        known: String,
    },
    /// A required key is absent.
    #[error("config ({family}): key `{key}` is missing")]
    Missing {
        /// Family being read.
        family: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A value of the wrong type or range.
    #[error("config ({family}): `{key}` = {found}, expected {expected}")]
    Value {
        /// Family being read.
        family: &'static str,
        /// The key.
        key: String,
        /// What would be right.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Keys that the family does not know (strict reading).
    #[error("config ({family}): unknown keys {keys}; known keys: {known}")]
    UnknownKeys {
        /// Family being read.
        family: &'static str,
        /// The keys.
        keys: String,
        /// All keys of the family.
        known: String,
    },
    /// A layer pattern that cannot be read.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// A layout that cannot hold this model.
    #[error("{from} ({pattern}) has no equal in the layout of {to}")]
    NoEqual {
        /// Family of the model.
        from: &'static str,
        /// Its layers, shortened.
        pattern: String,
        /// Layouts that were tried.
        to: String,
    },
}

/// What one layer is.
#[derive(Debug, Clone, PartialEq)]
pub enum MixerConfig {
    /// Mamba.
    Mamba(MambaConfig),
    /// Mamba-2.
    Mamba2(Mamba2Config),
    /// Attention.
    Attention(AttentionConfig),
    /// MLP.
    Mlp(MlpConfig),
}

impl MixerConfig {
    /// Its kind.
    pub fn kind(&self) -> LayerKind {
        match self {
            Self::Mamba(_) => LayerKind::Mamba,
            Self::Mamba2(_) => LayerKind::Mamba2,
            Self::Attention(_) => LayerKind::Attention,
            Self::Mlp(_) => LayerKind::Mlp,
        }
    }

    /// Equal but for what no result depends on (the chunk length).
    fn computes_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Mamba2(a), Self::Mamba2(b)) => *a == Mamba2Config { chunk: a.chunk, ..b.clone() },
            (a, b) => a == b,
        }
    }

    fn parameters(&self, d: usize, scale: InitScale) -> Vec<ParamSpec> {
        match self {
            Self::Mamba(config) => config.parameters(d, scale),
            Self::Mamba2(config) => config.parameters(d, scale),
            Self::Attention(config) => config.parameters(d, scale),
            Self::Mlp(config) => config.parameters(d, scale),
        }
    }
}

/// Constants that some families multiply by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaling {
    /// Multiplies token vectors.
    pub embeddings: f32,
    /// Multiplies what each layer adds to the residual stream.
    pub residual: f32,
    /// Divides logits.
    pub logits: f32,
}

impl Default for Scaling {
    fn default() -> Self {
        Self { embeddings: 1.0, residual: 1.0, logits: 1.0 }
    }
}

/// A decoder: sizes, the list of its layers, and the file it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Family, which decides the layout of checkpoints.
    pub family: &'static dyn Family,
    /// Rows of the embedding (padding rows included).
    pub vocab_size: usize,
    /// Model width, `d`.
    pub hidden_size: usize,
    /// The layers, in order.
    pub layers: Vec<MixerConfig>,
    /// The norms before mixers and the final norm.
    pub norm: NormConfig,
    /// An MLP reads what the layer before it read, not what that layer made of it (GPT-NeoX's parallel residual).
    pub parallel_mlp: bool,
    /// Constant factors.
    pub scaling: Scaling,
    /// The embedding serves as the head.
    pub tie_embeddings: bool,
    /// Longest sequence the model was made for, if its positions are limited.
    pub max_positions: Option<usize>,
    /// Token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Token for padding.
    pub pad: Option<u32>,
    /// Scheme of starting values.
    pub init: Init,
    /// The keys it was read from, kept for export.
    pub raw: Map<String, Value>,
}

/// Parameter lists of a whole decoder, named relative to their modules.
pub(crate) struct DecoderSpecs {
    pub embeddings: Vec<ParamSpec>,
    pub layers: Vec<LayerSpecs>,
    pub norm_f: Vec<ParamSpec>,
    pub lm_head: Vec<ParamSpec>,
}

pub(crate) struct LayerSpecs {
    pub norm: Vec<ParamSpec>,
    pub mixer: Vec<ParamSpec>,
}

impl DecoderConfig {
    /// Reads the text of a `config.json`, in the style of transformers 4 or 5 (bare `Infinity` included).
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        Self::from_value(families::fields::parse_lenient(text)?)
    }

    /// [`DecoderConfig::from_json`] with keys that replace or complete those of the file.
    ///
    /// # Errors
    /// [`ConfigError`], also for a key that changes nothing: one that is not read, or whose other name the file has.
    pub fn from_json_with(text: &str, overrides: &Map<String, Value>) -> Result<Self, ConfigError> {
        let raw = families::fields::object(families::fields::parse_lenient(text)?)?;
        let mut all = raw.clone();
        all.extend(overrides.clone());
        let read = |raw: &Map<String, Value>| Self::from_value(Value::Object(raw.clone()));
        let config = read(&all)?;
        for (key, value) in overrides.iter().filter(|(key, value)| raw.get(*key) != Some(*value)) {
            let mut without = all.clone();
            match raw.get(key) {
                Some(old) => without.insert(key.clone(), old.clone()),
                None => without.remove(key),
            };
            let same = |other: &Self| Self { raw: Map::new(), ..other.clone() } == Self { raw: Map::new(), ..config.clone() };
            if read(&without).is_ok_and(|other| same(&other)) {
                let expected = "a key that is read and that no other name of it in the file stands before".to_string();
                return Err(ConfigError::Value { family: config.family.name(), key: key.clone(), expected, found: value.to_string() });
            }
        }
        Ok(config)
    }

    /// Reads a parsed `config.json`. Keys that the family does not know are left alone.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn from_value(value: Value) -> Result<Self, ConfigError> {
        let raw = families::fields::object(value)?;
        families::of(&raw)?.read(&raw)
    }

    /// Reads a hand-written table in which an unknown key is a mistake.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn from_value_strict(value: Value) -> Result<Self, ConfigError> {
        let raw = families::fields::object(value)?;
        let family = families::of(&raw)?;
        let known = family.keys();
        let strange: Vec<&str> = raw.keys().map(String::as_str).filter(|key| *key != "model_type" && !known.contains(key)).collect();
        if !strange.is_empty() {
            return Err(ConfigError::UnknownKeys { family: family.name(), keys: strange.join(", "), known: known.join(", ") });
        }
        family.read(&raw)
    }

    /// A decoder of `layers` with what all families say in the same keys (`vocab_size`, `hidden_size`, special tokens);
    /// the rest as most families have it.
    ///
    /// # Errors
    /// When a key is missing or wrong.
    pub fn new(family: &'static dyn Family, f: &Fields, layers: Vec<MixerConfig>) -> Result<Self, ConfigError> {
        Self::sized(family, f, layers, f.size(&["hidden_size"])?)
    }

    /// [`DecoderConfig::new`] for a family with another key for the width.
    pub(crate) fn sized(
        family: &'static dyn Family,
        f: &Fields,
        layers: Vec<MixerConfig>,
        hidden_size: usize,
    ) -> Result<Self, ConfigError> {
        Ok(Self {
            family,
            vocab_size: f.size(&["vocab_size"])?,
            hidden_size,
            layers,
            norm: NormConfig::rms(1e-5),
            parallel_mlp: false,
            scaling: Scaling::default(),
            tie_embeddings: f.flag(&["tie_word_embeddings"], false)?,
            max_positions: None,
            bos: f.tokens("bos_token_id")?.first().copied(),
            eos: f.tokens("eos_token_id")?,
            pad: f.tokens("pad_token_id")?.first().copied(),
            init: Init::Megatron { std: 0.02 },
            raw: f.map().clone(),
        })
    }

    /// What to write as `config.json`: the keys it was read from, with what has changed since.
    pub fn to_json(&self) -> Value {
        let mut json = self.raw.clone();
        // The default of both transformers versions, which they spell in ways the other cannot read.
        if let Some(limit) = json.get("time_step_limit")
            && families::fields::limits(limit) == Some((0.0, f32::INFINITY))
        {
            json.remove("time_step_limit");
        }
        self.family.write(self, &mut json);
        Value::Object(json)
    }

    /// The same model in the layout of another family: equal logits from the same parameters.
    ///
    /// # Errors
    /// [`ConfigError::NoEqual`] when that layout cannot say what this model is.
    pub fn in_family(&self, family: &'static dyn Family) -> Result<Self, ConfigError> {
        if family.name() == self.family.name() {
            return Ok(self.clone());
        }
        let written = family.express(self).and_then(|mut raw| {
            family.write(self, &mut raw);
            // What is read back decides: a layout that drops something is no equal.
            family.read(&raw).ok().filter(|config| config.computes_as(self))
        });
        written.ok_or_else(|| self.no_equal(family.name()))
    }

    /// The same model in a layout that transformers opens: its own, or the first that can say what it is.
    ///
    /// # Errors
    /// [`ConfigError::NoEqual`] when there is none.
    pub fn in_transformers(&self) -> Result<Self, ConfigError> {
        self.in_first(|family| family.in_transformers() && family.writable())
    }

    /// The same model in a layout of its authors that can be written and that transformers does not open: its own, or the
    /// first that can say what it is.
    ///
    /// # Errors
    /// [`ConfigError::NoEqual`] when there is none.
    pub fn in_native(&self) -> Result<Self, ConfigError> {
        self.in_first(|family| !family.in_transformers() && family.writable())
    }

    fn in_first(&self, wanted: impl Fn(&dyn Family) -> bool) -> Result<Self, ConfigError> {
        if wanted(self.family) {
            return Ok(self.clone());
        }
        let candidates = || families::families().iter().copied().filter(|family| wanted(*family));
        let names = || candidates().map(|family| family.name()).collect::<Vec<_>>().join(", ");
        candidates().find_map(|family| self.in_family(family).ok()).ok_or_else(|| self.no_equal(&names()))
    }

    fn no_equal(&self, to: &str) -> ConfigError {
        let mut pattern: String = self.pattern().chars().take(16).collect();
        if self.layers.len() > 16 {
            pattern.push_str("...");
        }
        ConfigError::NoEqual { from: self.family.name(), pattern, to: to.to_string() }
    }

    /// True when `other` computes the same logits from the same parameters.
    pub fn computes_as(&self, other: &Self) -> bool {
        self.vocab_size == other.vocab_size
            && self.hidden_size == other.hidden_size
            && self.layers.len() == other.layers.len()
            && self.layers.iter().zip(&other.layers).all(|(a, b)| a.computes_as(b))
            && self.norm == other.norm
            && self.parallel_mlp == other.parallel_mlp
            && self.scaling == other.scaling
            && self.tie_embeddings == other.tie_embeddings
    }

    /// The layers as a pattern such as `M-M*-`.
    pub fn pattern(&self) -> String {
        self.layers.iter().map(|layer| layer.kind().symbol()).collect()
    }

    pub(crate) fn specs(&self) -> DecoderSpecs {
        let d = self.hidden_size;
        let scale = InitScale { scheme: self.init, blocks: self.family.blocks(self), width: d };
        let norm = || self.norm.parameters(d);
        DecoderSpecs {
            embeddings: vec![ParamSpec::new("weight", [self.vocab_size, d], scale.embedding())],
            layers: self.layers.iter().map(|layer| LayerSpecs { norm: norm(), mixer: layer.parameters(d, scale) }).collect(),
            norm_f: norm(),
            lm_head: if self.tie_embeddings {
                vec![]
            } else {
                vec![ParamSpec::new("lm_head.weight", [self.vocab_size, d], scale.embedding())]
            },
        }
    }

    /// Every parameter with its full path, in the order of the model.
    pub fn parameter_specs(&self) -> Vec<ParamSpec> {
        let specs = self.specs();
        let mut all: Vec<ParamSpec> = specs.embeddings.into_iter().map(|spec| spec.under("embeddings")).collect();
        for (i, layer) in specs.layers.into_iter().enumerate() {
            all.extend(layer.norm.into_iter().map(|spec| spec.under(&format!("layers.{i}.norm"))));
            all.extend(layer.mixer.into_iter().map(|spec| spec.under(&format!("layers.{i}.mixer"))));
        }
        all.extend(specs.norm_f.into_iter().map(|spec| spec.under("norm_f")));
        all.extend(specs.lm_head);
        all
    }

    /// Number of parameters; a tied head counts once.
    pub fn parameters(&self) -> usize {
        self.parameter_specs().iter().map(ParamSpec::len).sum()
    }

    /// Parameter paths and their places in checkpoints of the family.
    pub fn table(&self) -> WeightTable {
        WeightTable::new(self)
    }

    /// Lets the shapes of a checkpoint settle what its configuration leaves open or gets wrong: rows of the vocabulary,
    /// a tied head, widths of MLPs, groups, ranks, widths of Mamba's states, key/value heads. Returns a line for every change, to be shown.
    pub fn reconcile(&mut self, shape_of: &dyn Fn(&str) -> Option<Vec<usize>>) -> Vec<String> {
        let notes = crate::reconcile::reconcile(self, shape_of);
        if !notes.is_empty()
            && let Some(settled) = self.family.express(self)
        {
            self.raw.extend(settled);
        }
        notes
    }

    /// Bytes of cache per sequence after `tokens` tokens, at `size` bytes per element (states of scans are float32).
    pub fn state_bytes(&self, tokens: usize, size: usize) -> usize {
        self.layers
            .iter()
            .map(|layer| match layer {
                MixerConfig::Mamba(config) => config.cache_bytes(size),
                MixerConfig::Mamba2(config) => config.cache_bytes(size),
                MixerConfig::Attention(config) => config.cache_bytes(size) * tokens + config.conv_bytes(size),
                MixerConfig::Mlp(_) => 0,
            })
            .sum()
    }
}

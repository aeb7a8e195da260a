//! The configuration of a decoder, read from a Hugging Face `config.json` of any supported family.

use serde_json::{Map, Value};

use crate::families::{self, Family};
use crate::init::{Init, InitScale};
use crate::mixers::{AttentionConfig, Mamba2Config, MlpConfig, Parameters};
use crate::params::{ParamInit, ParamSpec};
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
}

/// What one layer is.
#[derive(Debug, Clone, PartialEq)]
pub enum MixerConfig {
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
            Self::Mamba2(_) => LayerKind::Mamba2,
            Self::Attention(_) => LayerKind::Attention,
            Self::Mlp(_) => LayerKind::Mlp,
        }
    }

    fn parameters(&self, d: usize, scale: InitScale) -> Vec<ParamSpec> {
        match self {
            Self::Mamba2(config) => config.parameters(d, scale),
            Self::Attention(config) => config.parameters(d, scale),
            Self::Mlp(config) => config.parameters(d, scale),
        }
    }
}

/// A decoder: sizes, the list of its layers, and the file it came from.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Family, which decides the layout of checkpoints.
    pub family: &'static str,
    /// Rows of the embedding (padding rows included).
    pub vocab_size: usize,
    /// Model width, `d`.
    pub hidden_size: usize,
    /// The layers, in order.
    pub layers: Vec<MixerConfig>,
    /// Epsilon of the norms before mixers and of the final norm.
    pub norm_eps: f32,
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

    /// Reads a parsed `config.json`. Keys that the family does not know are left alone.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn from_value(value: Value) -> Result<Self, ConfigError> {
        let raw = families::fields::object(value)?;
        families::of(&raw)?.read(raw)
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
        family.read(raw)
    }

    fn family(&self) -> &'static dyn Family {
        families::by_name(self.family).expect("a config is made by its family")
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
        json.insert("model_type".into(), self.family().model_type().into());
        json.insert("architectures".into(), vec![self.family().architecture()].into());
        json.insert("vocab_size".into(), self.vocab_size.into());
        json.insert("tie_word_embeddings".into(), self.tie_embeddings.into());
        Value::Object(json)
    }

    /// The layers as a pattern such as `M-M*-`.
    pub fn pattern(&self) -> String {
        self.layers.iter().map(|layer| layer.kind().symbol()).collect()
    }

    pub(crate) fn specs(&self) -> DecoderSpecs {
        let d = self.hidden_size;
        // A Transformer block is an attention and an MLP layer here.
        let paired = self.layers.iter().filter(|layer| layer.kind() == LayerKind::Mlp).count();
        let blocks = if self.family().pairs_layers() { paired.max(1) } else { self.layers.len() };
        let scale = InitScale { scheme: self.init, blocks };
        let norm = || vec![ParamSpec::new("weight", [d], ParamInit::Ones)];
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

    /// Parameter paths and the keys they have in checkpoints of the family.
    pub fn table(&self) -> WeightTable {
        WeightTable::new(self, self.family())
    }

    /// Lets the shapes of a checkpoint settle what `config.json` leaves open or gets wrong: rows of the vocabulary, a
    /// tied head, widths of MLPs. Returns a line for every change, to be shown.
    pub fn reconcile(&mut self, shape_of: &dyn Fn(&str) -> Option<Vec<usize>>) -> Vec<String> {
        let mut notes = Vec::new();
        let table = self.table();
        let key = |path: &str| table.entries.iter().find(|entry| entry.path == path).map(|entry| entry.key.clone());
        let rows = |path: &str| key(path).and_then(|key| shape_of(&key)).and_then(|shape| shape.first().copied());
        if let Some(found) = rows("embeddings.weight")
            && found != self.vocab_size
        {
            notes.push(format!("config.json says vocab_size {}, the embedding has {found} rows: using {found}", self.vocab_size));
            self.vocab_size = found;
        }
        if !self.tie_embeddings && shape_of("lm_head.weight").is_none() {
            notes.push("config.json says the head is not tied, but there is no lm_head.weight: using the embedding".to_string());
            self.tie_embeddings = true;
        }
        for (i, layer) in self.layers.iter_mut().enumerate() {
            if let MixerConfig::Mlp(mlp) = layer
                && let Some(found) = rows(&format!("layers.{i}.mixer.up_proj.weight"))
                && found != mlp.intermediate
            {
                notes.push(format!("config.json says intermediate_size {}, layer {i} has {found} rows: using {found}", mlp.intermediate));
                mlp.intermediate = found;
                self.raw.insert("intermediate_size".into(), found.into());
            }
        }
        notes
    }

    /// Bytes of cache per sequence after `tokens` tokens, in float32.
    pub fn state_bytes(&self, tokens: usize) -> usize {
        self.layers
            .iter()
            .map(|layer| match layer {
                MixerConfig::Mamba2(config) => config.cache_bytes(4),
                MixerConfig::Attention(config) => config.cache_bytes(4) * tokens,
                MixerConfig::Mlp(_) => 0,
            })
            .sum()
    }
}

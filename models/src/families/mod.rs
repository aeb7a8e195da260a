//! Published model families: how each one's configuration reads, and where its checkpoints keep each parameter.
//!
//! A family is one folder: a [`Family`] with a reader from configuration keys to [`DecoderConfig`], a place for every
//! parameter, and presets. Nothing outside its folder changes when one is added, but for the list in [`families`].
//! `models/README.md` shows how, step by step.

pub mod bamba;
pub mod express;
pub mod fields;
pub mod gpt_neox;
pub mod granite_hybrid;
pub mod llama;
pub mod mamba;
pub mod mamba2;
pub mod mamba_ssm;
pub mod megatron;
pub mod nemotron;
pub mod nemotron_h;

use std::fmt;

use serde_json::{Map, Value};

pub use fields::Fields;

use crate::config::{ConfigError, DecoderConfig};
use crate::pattern::LayerKind;
use crate::presets::Preset;
use crate::weights::Rows;

/// All families.
pub fn families() -> &'static [&'static dyn Family] {
    &[
        &mamba_ssm::MambaSsm,
        &mamba::MambaFamily,
        &mamba2::Mamba2Family,
        &nemotron_h::NemotronH,
        &bamba::Bamba,
        &granite_hybrid::GraniteHybrid,
        &llama::Llama,
        &gpt_neox::GptNeox,
        &nemotron::Nemotron,
        &megatron::Megatron,
    ]
}

/// A part of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Token embedding.
    Embeddings,
    /// The norm of a layer.
    Norm(usize),
    /// The mixer of a layer.
    Mixer(usize),
    /// Final norm.
    FinalNorm,
    /// Head.
    Head,
}

/// Where a checkpoint keeps one parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Key in the file.
    pub key: String,
    /// Other keys that files use for it.
    pub aliases: Vec<String>,
    /// Rows of the tensor, where it holds more than this parameter.
    pub rows: Option<Rows>,
    /// Rows of each component of the tensor, where tensor-parallel training divides them one by one.
    pub parts: Option<Vec<usize>>,
}

impl Place {
    /// A tensor of its own.
    pub fn at(key: impl Into<String>) -> Self {
        Self { key: key.into(), aliases: vec![], rows: None, parts: None }
    }

    /// Another key that files use.
    pub fn or(mut self, alias: impl Into<String>) -> Self {
        self.aliases.push(alias.into());
        self
    }

    /// Components that tensor-parallel training divides one by one.
    pub fn parts(mut self, parts: Vec<usize>) -> Self {
        self.parts = Some(parts);
        self
    }

    /// Some rows of a tensor.
    pub fn rows(mut self, rows: Rows) -> Self {
        self.rows = Some(rows);
        self
    }
}

/// A family of published models.
pub trait Family: Sync {
    /// Name in this crate; also its `model_type`, if there is one.
    fn name(&self) -> &'static str;

    /// `model_type` in `config.json`.
    fn model_type(&self) -> &'static str {
        self.name()
    }

    /// `architectures` in `config.json`.
    fn architecture(&self) -> &'static str;

    /// True for a configuration of this family.
    fn recognises(&self, raw: &Map<String, Value>) -> bool {
        raw.get("model_type").and_then(Value::as_str) == Some(self.model_type())
    }

    /// All configuration keys that the family reads or its own programs write for it.
    fn keys(&self) -> Vec<&'static str>;

    /// Reads a configuration.
    ///
    /// # Errors
    /// [`ConfigError`].
    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError>;

    /// The keys that say what `config` is, for a model of this or another family; `None` when they cannot. Whoever calls
    /// reads them back and compares: keys that would lose something do no harm.
    fn express(&self, _config: &DecoderConfig) -> Option<Map<String, Value>> {
        None
    }

    /// Writes what every configuration of the family has into `json`.
    fn write(&self, config: &DecoderConfig, json: &mut Map<String, Value>) {
        json.insert("model_type".into(), self.model_type().into());
        json.insert("architectures".into(), vec![self.architecture()].into());
        json.insert("vocab_size".into(), config.vocab_size.into());
        json.insert("tie_word_embeddings".into(), config.tie_embeddings.into());
    }

    /// Where checkpoints keep the parameter `name` of `part`: for mixers a name such as `in_proj.weight`, see their
    /// configurations.
    fn place(&self, config: &DecoderConfig, part: Part, name: &str) -> Place;

    /// True where files hold the head of a tied model too: other programs read it from there.
    fn stores_tied_head(&self) -> bool {
        false
    }

    /// Endings of keys that files hold and no model needs.
    fn ignored(&self) -> &'static [&'static str] {
        &["rotary_emb.inv_freq"]
    }

    /// Published layers: residual branches are fewer where a layer is a mixer and an MLP, two layers here.
    fn blocks(&self, config: &DecoderConfig) -> usize {
        config.layers.len()
    }

    /// True when transformers opens this layout.
    fn in_transformers(&self) -> bool {
        true
    }

    /// True when a model can be written in this layout: a configuration file and tensors.
    fn writable(&self) -> bool {
        true
    }

    /// A repository with the tokenizer that the authors used, where their files come without one.
    fn tokenizer(&self, _config: &DecoderConfig) -> Option<&'static str> {
        None
    }

    /// Published models.
    fn presets(&self) -> Vec<Preset> {
        vec![]
    }
}

impl fmt::Debug for dyn Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for dyn Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl PartialEq for dyn Family {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name()
    }
}

/// The family of that name.
pub fn by_name(name: &str) -> Option<&'static dyn Family> {
    families().iter().copied().find(|family| family.name() == name)
}

fn known() -> String {
    families().iter().map(|family| family.model_type()).collect::<Vec<_>>().join(", ")
}

pub(crate) fn of(raw: &Map<String, Value>) -> Result<&'static dyn Family, ConfigError> {
    if let Some(family) = families().iter().copied().find(|family| family.recognises(raw)) {
        return Ok(family);
    }
    match raw.get("model_type").and_then(Value::as_str) {
        None => Err(ConfigError::NoModelType { known: known() }),
        Some(found) => Err(ConfigError::UnknownModelType { found: found.to_string(), known: known() }),
    }
}

/// Names of mixer parameters that differ from the module's in every family; the rest are the same.
pub(crate) fn renamed(name: &str) -> &str {
    match name {
        "a_log" => "A_log",
        "d" => "D",
        other => other,
    }
}

/// Where transformers keeps the parameters of a model of state-space layers alone.
pub(crate) fn as_in_mamba(part: Part, name: &str) -> Place {
    match part {
        // Files converted before the name was settled have the singular.
        Part::Embeddings => Place::at(format!("backbone.embeddings.{name}")).or(format!("backbone.embedding.{name}")),
        Part::Norm(i) => Place::at(format!("backbone.layers.{i}.norm.{name}")),
        Part::Mixer(i) => Place::at(format!("backbone.layers.{i}.mixer.{}", renamed(name))),
        Part::FinalNorm => Place::at(format!("backbone.norm_f.{name}")),
        Part::Head => Place::at("lm_head.weight"),
    }
}

/// Where transformers keeps the parameters of most Transformers.
pub(crate) fn as_in_llama(config: &DecoderConfig, part: Part, name: &str) -> Place {
    let mlp = kind_of(config, part) == Some(LayerKind::Mlp);
    match part {
        Part::Embeddings => Place::at(format!("model.embed_tokens.{name}")),
        Part::Norm(i) => {
            let norm = if mlp { "post_attention_layernorm" } else { "input_layernorm" };
            Place::at(format!("model.layers.{}.{norm}.{name}", i / 2))
        }
        Part::Mixer(i) => Place::at(format!("model.layers.{}.{}.{name}", i / 2, if mlp { "mlp" } else { "self_attn" })),
        Part::FinalNorm => Place::at(format!("model.norm.{name}")),
        Part::Head => Place::at("lm_head.weight"),
    }
}

/// Half of the layers, for families whose published layers are a mixer and an MLP.
pub(crate) fn pairs(config: &DecoderConfig) -> usize {
    config.layers.len().div_ceil(2)
}

/// The kind of the layer that a part belongs to.
pub(crate) fn kind_of(config: &DecoderConfig, part: Part) -> Option<LayerKind> {
    match part {
        Part::Norm(i) | Part::Mixer(i) => config.layers.get(i).map(|layer| layer.kind()),
        _ => None,
    }
}

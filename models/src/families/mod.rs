//! Published model families: how each one's `config.json` reads, and where its checkpoints keep each parameter.
//!
//! A family is one folder: a reader from configuration keys to [`DecoderConfig`], and the keys of its weights. Nothing
//! outside [`families`] changes when one is added.

pub mod fields;
pub mod hybrid;
pub mod mamba2;
pub mod transformer;

use serde_json::{Map, Value};

use crate::config::{ConfigError, DecoderConfig};
use crate::weights::LayerKeys;

/// Keys outside the layers, without `.weight`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopKeys {
    /// Token embedding.
    pub embeddings: &'static str,
    /// Final norm.
    pub norm_f: &'static str,
}

/// A family of published models.
pub trait Family: Sync {
    /// Name in this crate; also its `model_type`.
    fn name(&self) -> &'static str;

    /// `model_type` in `config.json`.
    fn model_type(&self) -> &'static str {
        self.name()
    }

    /// `architectures` in `config.json`.
    fn architecture(&self) -> &'static str;

    /// All configuration keys that the family reads or transformers writes for it.
    fn keys(&self) -> Vec<&'static str>;

    /// Reads a configuration.
    ///
    /// # Errors
    /// [`ConfigError`].
    fn read(&self, raw: Map<String, Value>) -> Result<DecoderConfig, ConfigError>;

    /// Where checkpoints keep what lies outside the layers.
    fn top_keys(&self) -> TopKeys;

    /// Where checkpoints keep each layer, in order.
    fn layer_keys(&self, config: &DecoderConfig) -> Vec<LayerKeys>;

    /// False where transformers reads the head from the file even if the configuration says it is tied.
    fn transformers_ties(&self) -> bool {
        true
    }

    /// True where a published layer is a mixer and an MLP: two layers here.
    fn pairs_layers(&self) -> bool;
}

/// All families.
pub fn families() -> &'static [&'static dyn Family] {
    &[&mamba2::Mamba2Family, &hybrid::nemotron_h::NemotronH, &hybrid::bamba::Bamba, &transformer::llama::Llama]
}

pub(crate) fn by_name(name: &str) -> Option<&'static dyn Family> {
    families().iter().copied().find(|family| family.name() == name)
}

fn known() -> String {
    families().iter().map(|family| family.model_type()).collect::<Vec<_>>().join(", ")
}

pub(crate) fn of(raw: &Map<String, Value>) -> Result<&'static dyn Family, ConfigError> {
    let Some(found) = raw.get("model_type").and_then(Value::as_str) else {
        return Err(ConfigError::NoModelType { known: known() });
    };
    families()
        .iter()
        .copied()
        .find(|family| family.model_type() == found)
        .ok_or_else(|| ConfigError::UnknownModelType { found: found.to_string(), known: known() })
}

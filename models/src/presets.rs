//! Configurations of published models, by name.

use serde_json::Value;

use crate::config::{ConfigError, DecoderConfig};
use crate::families::families;

/// A published model: its configuration as its authors' file says it, and where the file is.
#[derive(Debug, Clone, PartialEq)]
pub struct Preset {
    /// Name here.
    pub name: &'static str,
    /// Repository on the Hugging Face hub.
    pub repository: &'static str,
    /// Number of parameters as published; a tied head counts once.
    pub parameters: usize,
    /// The keys of its configuration file.
    pub config: Value,
    /// How its layout is tested.
    pub tried: Tried,
}

/// How far a preset has been tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tried {
    /// These very weights were loaded and compared.
    Weights,
    /// Its layout, on small random checkpoints compared with the reference.
    Layout,
}

impl Tried {
    /// One word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Layout => "layout",
        }
    }
}

impl Preset {
    /// A preset whose layout is tested on small random checkpoints.
    pub fn new(name: &'static str, repository: &'static str, parameters: usize, config: Value) -> Self {
        Self { name, repository, parameters, config, tried: Tried::Layout }
    }

    /// The configuration, read.
    ///
    /// # Errors
    /// Never for the presets of this crate.
    pub fn decoder(&self) -> Result<DecoderConfig, ConfigError> {
        DecoderConfig::from_value(self.config.clone())
    }
}

/// All presets, family by family.
pub fn presets() -> Vec<Preset> {
    families().iter().flat_map(|family| family.presets()).collect()
}

/// The preset of that name, or of that repository.
pub fn preset(name: &str) -> Option<Preset> {
    presets().into_iter().find(|preset| preset.name == name || preset.repository == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_has_the_published_number_of_parameters() {
        let wrong: Vec<String> = presets()
            .iter()
            .map(|preset| (preset, preset.decoder().unwrap().parameters()))
            .filter(|(preset, count)| *count != preset.parameters)
            .map(|(preset, count)| format!("{}: {count}, published {}", preset.name, preset.parameters))
            .collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    #[test]
    fn names_of_presets_are_unique() {
        let mut names: Vec<&str> = presets().iter().flat_map(|preset| [preset.name, preset.repository]).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}

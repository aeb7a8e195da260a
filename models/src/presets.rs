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
    pub fn new(name: &'static str, repository: &'static str, config: Value) -> Self {
        Self { name, repository, config, tried: Tried::Layout }
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

    /// Parameters of every preset, tied heads counted once, as published.
    const PARAMETERS: [(&str, usize); 47] = [
        ("mamba-130m", 129_135_360),
        ("mamba-370m", 371_516_416),
        ("mamba-790m", 793_204_224),
        ("mamba-1.4b", 1_372_178_432),
        ("mamba-2.8b", 2_768_345_600),
        ("mamba-2.8b-slimpj", 2_768_345_600),
        ("mamba-130m-hf", 129_135_360),
        ("mamba-370m-hf", 371_516_416),
        ("mamba-790m-hf", 793_204_224),
        ("mamba-1.4b-hf", 1_372_178_432),
        ("mamba-2.8b-hf", 2_768_345_600),
        ("mamba2-130m", 128_989_632),
        ("mamba2-370m", 368_346_624),
        ("mamba2-780m", 780_161_280),
        ("mamba2-1.3b", 1_343_757_312),
        ("mamba2-2.7b", 2_702_599_680),
        ("mamba2-130m-hf", 128_989_632),
        ("mamba2-370m-hf", 368_346_624),
        ("mamba2-780m-hf", 780_161_280),
        ("mamba2-1.3b-hf", 1_343_757_312),
        ("mamba2-2.7b-hf", 2_702_599_680),
        ("mamba2attn-2.7b", 2_697_590_880),
        ("transformerpp-2.7b", 2_666_457_600),
        ("mamba-codestral-7b", 7_285_403_648),
        ("pythia-14m", 14_067_712),
        ("pythia-31m", 30_494_720),
        ("pythia-70m", 70_426_624),
        ("pythia-160m", 162_322_944),
        ("pythia-410m", 405_334_016),
        ("pythia-1b", 1_011_781_632),
        ("pythia-1.4b", 1_414_647_808),
        ("pythia-2.8b", 2_775_208_960),
        ("pythia-6.9b", 6_857_302_016),
        ("pythia-12b", 11_846_072_320),
        ("smollm-135m", 134_515_008),
        ("smollm2-135m", 134_515_008),
        ("smollm-360m", 361_821_120),
        ("smollm-1.7b", 1_711_376_384),
        ("tinyllama-1.1b", 1_100_048_384),
        ("mamba2-8b-3t-4k", 8_236_999_680),
        ("mamba2-hybrid-8b-3t-4k", 8_654_517_248),
        ("mamba2-hybrid-8b-3t-32k", 8_654_517_248),
        ("mamba2-hybrid-8b-3t-128k", 8_654_517_248),
        ("gpt3-8b-multi-3.5t-base", 8_540_135_424),
        ("bamba-9b-v1", 9_780_235_392),
        ("bamba-9b-v2", 9_780_235_392),
        ("nemotron-h-8b", 8_100_852_736),
    ];

    #[test]
    fn every_preset_has_the_published_number_of_parameters() {
        let mut wrong = vec![];
        for preset in presets() {
            let count = preset.decoder().unwrap().parameters();
            match PARAMETERS.iter().find(|(name, _)| *name == preset.name) {
                Some((_, published)) if *published == count => {}
                found => wrong.push(format!("{}: {count}, published {found:?}", preset.name)),
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert_eq!(presets().len(), PARAMETERS.len());
    }
}

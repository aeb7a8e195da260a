#![doc = include_str!("README.md")]

use serde_json::{Map, Value, json};

use super::fields::{COMMON_KEYS, Fields};
use super::{Family, Part, Place, as_in_llama, express, pairs};
use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::init::Init;
use crate::layers::{NormConfig, NormKind};
use crate::mixers::Activation;

/// `model_type: nemotron`.
pub struct Nemotron;

const KEYS: [&str; 13] = [
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "norm_eps",
    "rope_theta",
    "rope_parameters",
    "partial_rotary_factor",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "model_type",
];

impl Family for Nemotron {
    fn name(&self) -> &'static str {
        "nemotron"
    }

    fn architecture(&self) -> &'static str {
        "NemotronForCausalLM"
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.into_iter().chain(COMMON_KEYS).collect()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), raw);
        let hidden_size = f.size(&["hidden_size"])?;
        let attention = f.attention(hidden_size, |f, head_dim| Ok(Some(f.rope(head_dim, 0.5, &[])?)))?;
        let mlp = f.mlp(Activation::Relu2, false)?;
        let blocks = f.layers(&["num_hidden_layers"])?;
        let layers = (0..blocks).flat_map(|_| [MixerConfig::Attention(attention.clone()), MixerConfig::Mlp(mlp.clone())]).collect();
        Ok(DecoderConfig {
            norm: NormConfig { kind: NormKind::LayerOnePlus, eps: f.float(&["norm_eps"], 1e-5)? as f32 },
            max_positions: f.maybe_size(&["max_position_embeddings"])?,
            init: Init::Megatron { std: f.float(&["initializer_range"], 0.0134)? as f32 },
            ..DecoderConfig::new(self, &f, layers)?
        })
    }

    fn express(&self, config: &DecoderConfig) -> Option<Map<String, Value>> {
        let (attention, mlp) = (express::attention(config)?, express::mlp(config)?);
        if config.norm.kind != NormKind::LayerOnePlus {
            return None;
        }
        let mut keys = express::common(config);
        keys.extend(express::heads(attention));
        keys.extend(express::rope(attention.rope.as_ref()?, attention.head_dim));
        keys.extend(express::map([
            ("num_hidden_layers", Some(json!(config.layers.len() / 2))),
            ("intermediate_size", Some(json!(mlp.intermediate))),
            ("hidden_act", Some(express::activation(mlp.activation))),
            ("attention_bias", Some(json!(attention.qkv_bias))),
            ("mlp_bias", Some(json!(mlp.bias))),
            ("norm_eps", Some(express::float(config.norm.eps))),
        ]));
        Some(keys)
    }

    fn place(&self, config: &DecoderConfig, part: Part, name: &str) -> Place {
        as_in_llama(config, part, name)
    }

    fn blocks(&self, config: &DecoderConfig) -> usize {
        pairs(config)
    }
}

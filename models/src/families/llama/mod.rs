#![doc = include_str!("README.md")]

use serde_json::{Map, Value, json};

use super::fields::{COMMON_KEYS, Fields};
use super::{Family, Part, Place, as_in_llama, express, pairs};
use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::init::Init;
use crate::layers::{NormConfig, NormKind};
use crate::mixers::Activation;
use crate::presets::Preset;

mod presets;

/// `model_type: llama`.
pub struct Llama;

const KEYS: [&str; 19] = [
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "pretraining_tp",
    "model_type",
    "rope_interleaved",
    "is_llama_config",
    "transformers.js_config",
    "partial_rotary_factor",
    "resid_pdrop",
];

impl Family for Llama {
    fn name(&self) -> &'static str {
        "llama"
    }

    fn architecture(&self) -> &'static str {
        "LlamaForCausalLM"
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.into_iter().chain(COMMON_KEYS).collect()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), raw);
        let hidden_size = f.size(&["hidden_size"])?;
        let attention = f.attention(hidden_size, |f, head_dim| Ok(Some(f.rope(head_dim, 1.0, &[])?)))?;
        let mlp = f.mlp(Activation::Silu, true)?;
        let blocks = f.layers(&["num_hidden_layers"])?;
        let layers = (0..blocks).flat_map(|_| [MixerConfig::Attention(attention.clone()), MixerConfig::Mlp(mlp.clone())]).collect();
        Ok(DecoderConfig {
            norm: NormConfig::rms(f.float(&["rms_norm_eps"], 1e-6)? as f32),
            max_positions: f.maybe_size(&["max_position_embeddings"])?,
            init: Init::Megatron { std: f.float(&["initializer_range"], 0.02)? as f32 },
            ..DecoderConfig::new(self, &f, layers)?
        })
    }

    fn express(&self, config: &DecoderConfig) -> Option<Map<String, Value>> {
        let (attention, mlp) = (express::attention(config)?, express::mlp(config)?);
        let rope = attention.rope.as_ref()?;
        // transformers rotates whole heads in this family.
        if config.norm.kind != NormKind::Rms || rope.dim != attention.head_dim {
            return None;
        }
        let mut keys = express::common(config);
        keys.extend(express::heads(attention));
        keys.extend(express::rope(rope, attention.head_dim));
        keys.extend(express::map([
            ("num_hidden_layers", Some(json!(config.layers.len() / 2))),
            ("intermediate_size", Some(json!(mlp.intermediate))),
            ("hidden_act", Some(express::activation(mlp.activation))),
            ("attention_bias", Some(json!(attention.qkv_bias))),
            ("mlp_bias", Some(json!(mlp.bias))),
            ("rms_norm_eps", Some(express::float(config.norm.eps))),
        ]));
        Some(keys)
    }

    fn place(&self, config: &DecoderConfig, part: Part, name: &str) -> Place {
        as_in_llama(config, part, name)
    }

    fn blocks(&self, config: &DecoderConfig) -> usize {
        pairs(config)
    }

    fn presets(&self) -> Vec<Preset> {
        presets::presets()
    }
}

#![doc = include_str!("README.md")]

use serde_json::{Map, Value, json};

use super::fields::{COMMON_KEYS, Fields};
use super::{Family, Part, Place, express, kind_of, pairs, renamed};
use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::init::Init;
use crate::layers::{NormConfig, NormKind};
use crate::mixers::Activation;
use crate::pattern::LayerKind;
use crate::presets::Preset;

mod presets;

/// `model_type: bamba`.
pub struct Bamba;

const KEYS: [&str; 34] = [
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "attn_rotary_emb",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "attn_layer_indices",
    "layer_types",
    "layers_block_type",
    "mamba_n_heads",
    "mamba_d_head",
    "mamba_n_groups",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_chunk_size",
    "mamba_conv_bias",
    "mamba_proj_bias",
    "time_step_min",
    "time_step_max",
    "time_step_limit",
    "z_loss_coefficient",
    "num_logits_to_keep",
    "model_type",
    "embd_pdrop",
    "mamba_dt_limit",
];

impl Family for Bamba {
    fn name(&self) -> &'static str {
        "bamba"
    }

    fn architecture(&self) -> &'static str {
        "BambaForCausalLM"
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.into_iter().chain(COMMON_KEYS).collect()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), raw);
        let hidden_size = f.size(&["hidden_size"])?;
        let norm_eps = f.float(&["rms_norm_eps"], 1e-5)? as f32;
        let blocks = f.layers(&["num_hidden_layers"])?;
        let attention = f.attention(hidden_size, |f, head_dim| Ok(Some(f.rope(head_dim, 0.5, &["attn_rotary_emb"])?)))?;
        let mlp = f.mlp(Activation::Silu, true)?;
        let mamba = f.mamba2(hidden_size, norm_eps)?;
        let attends = f.attention_layers(blocks)?;
        let mixer = |i| if attends.contains(&i) { MixerConfig::Attention(attention.clone()) } else { MixerConfig::Mamba2(mamba.clone()) };
        let layers = (0..blocks).flat_map(|i| [mixer(i), MixerConfig::Mlp(mlp.clone())]).collect();
        Ok(DecoderConfig {
            norm: NormConfig::rms(norm_eps),
            max_positions: f.maybe_size(&["max_position_embeddings"])?,
            init: Init::Megatron { std: f.float(&["initializer_range"], 0.02)? as f32 },
            ..DecoderConfig::new(self, &f, layers)?
        })
    }

    fn express(&self, config: &DecoderConfig) -> Option<Map<String, Value>> {
        let mlp = express::mlp(config)?;
        if config.norm.kind != NormKind::Rms || !config.layers.len().is_multiple_of(2) {
            return None;
        }
        let attends: Vec<usize> = (0..config.layers.len() / 2).filter(|i| config.layers[2 * i].kind() == LayerKind::Attention).collect();
        let mut keys = express::common(config);
        keys.extend(express::map([
            ("num_hidden_layers", Some(json!(config.layers.len() / 2))),
            ("attn_layer_indices", Some(json!(attends))),
            ("intermediate_size", Some(json!(mlp.intermediate))),
            ("hidden_act", Some(express::activation(mlp.activation))),
            ("mlp_bias", Some(json!(mlp.bias))),
            ("rms_norm_eps", Some(express::float(config.norm.eps))),
        ]));
        match express::attention(config) {
            Some(attention) => {
                keys.extend(express::heads(attention));
                keys.insert("attention_bias".into(), json!(attention.qkv_bias));
                let rope = attention.rope.as_ref()?;
                keys.extend(express::rope(rope, attention.head_dim));
                keys.insert("attn_rotary_emb".into(), json!(rope.dim));
            }
            None => drop(keys.insert("num_attention_heads".into(), json!(1))),
        }
        match express::mamba2(config) {
            Some(mixer) => keys.extend(express::mamba2_keys(config, mixer)),
            // transformers wants sizes that divide even where no layer has them.
            None => {
                let (inner, heads) = (2 * config.hidden_size, if config.hidden_size.is_multiple_of(8) { 16 } else { 1 });
                keys.extend(express::map([
                    ("mamba_n_heads", Some(json!(heads))),
                    ("mamba_d_head", Some(json!(inner / heads))),
                    ("mamba_expand", Some(json!(2))),
                ]));
            }
        }
        Some(keys)
    }

    fn place(&self, config: &DecoderConfig, part: Part, name: &str) -> Place {
        let mlp = kind_of(config, part) == Some(LayerKind::Mlp);
        match part {
            Part::Embeddings => Place::at(format!("model.embed_tokens.{name}")),
            Part::Norm(i) => {
                let norm = if mlp { "pre_ff_layernorm" } else { "input_layernorm" };
                Place::at(format!("model.layers.{}.{norm}.{name}", i / 2))
            }
            Part::Mixer(i) => {
                let mixer = match kind_of(config, part) {
                    Some(LayerKind::Mlp) => "feed_forward",
                    Some(LayerKind::Attention) => "self_attn",
                    _ => "mamba",
                };
                Place::at(format!("model.layers.{}.{mixer}.{}", i / 2, renamed(name)))
            }
            Part::FinalNorm => Place::at(format!("model.final_layernorm.{name}")),
            Part::Head => Place::at("lm_head.weight"),
        }
    }

    fn blocks(&self, config: &DecoderConfig) -> usize {
        pairs(config)
    }

    fn presets(&self) -> Vec<Preset> {
        presets::presets()
    }
}

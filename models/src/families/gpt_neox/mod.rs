#![doc = include_str!("README.md")]

use serde_json::{Map, Value, json};

use super::fields::{COMMON_KEYS, Fields};
use super::{Family, Part, Place, express, kind_of, pairs};
use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::init::Init;
use crate::layers::{NormConfig, NormKind};
use crate::mixers::{Activation, AttentionConfig, MlpConfig};
use crate::pattern::LayerKind;
use crate::presets::Preset;
use crate::weights::Rows;

mod presets;

/// `model_type: gpt_neox`.
pub struct GptNeox;

const KEYS: [&str; 19] = [
    "intermediate_size",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "rotary_pct",
    "rotary_emb_base",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "use_parallel_residual",
    "attention_bias",
    "attention_dropout",
    "hidden_dropout",
    "classifier_dropout",
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
    "type_vocab_size",
    "model_type",
];

impl Family for GptNeox {
    fn name(&self) -> &'static str {
        "gpt_neox"
    }

    fn architecture(&self) -> &'static str {
        "GPTNeoXForCausalLM"
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.into_iter().chain(COMMON_KEYS).collect()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), raw);
        let hidden_size = f.size(&["hidden_size"])?;
        let heads = f.size(&["num_attention_heads"])?;
        f.divides("hidden_size", hidden_size, "num_attention_heads", heads)?;
        let head_dim = hidden_size / heads;
        let bias = f.flag(&["attention_bias"], true)?;
        let attention = AttentionConfig {
            heads,
            kv_heads: heads,
            head_dim,
            rope: Some(f.rope(head_dim, 0.25, &[])?),
            scale: None,
            qkv_bias: bias,
            out_bias: bias,
            conv_kernel: None,
        };
        let mlp = MlpConfig {
            intermediate: f.size(&["intermediate_size"])?,
            activation: f.activation(&["hidden_act"], Activation::Gelu)?,
            gated: false,
            bias: true,
        };
        let blocks = f.layers(&["num_hidden_layers"])?;
        let layers = (0..blocks).flat_map(|_| [MixerConfig::Attention(attention.clone()), MixerConfig::Mlp(mlp.clone())]).collect();
        Ok(DecoderConfig {
            norm: NormConfig { kind: NormKind::Layer, eps: f.float(&["layer_norm_eps"], 1e-5)? as f32 },
            parallel_mlp: f.flag(&["use_parallel_residual"], true)?,
            max_positions: f.maybe_size(&["max_position_embeddings"])?,
            init: Init::SmallWang,
            ..DecoderConfig::new(self, &f, layers)?
        })
    }

    fn express(&self, config: &DecoderConfig) -> Option<Map<String, Value>> {
        let (attention, mlp) = (express::attention(config)?, express::mlp(config)?);
        let rope = attention.rope.as_ref()?;
        if config.norm.kind != NormKind::Layer {
            return None;
        }
        let mut keys = express::common(config);
        keys.extend(express::rope(rope, attention.head_dim));
        keys.extend(express::map([
            ("num_hidden_layers", Some(json!(config.layers.len() / 2))),
            ("num_attention_heads", Some(json!(attention.heads))),
            ("intermediate_size", Some(json!(mlp.intermediate))),
            ("hidden_act", Some(express::activation(mlp.activation))),
            ("attention_bias", Some(json!(attention.qkv_bias))),
            ("layer_norm_eps", Some(express::float(config.norm.eps))),
            ("use_parallel_residual", Some(json!(config.parallel_mlp))),
            ("rotary_pct", Some(json!(rope.dim as f64 / attention.head_dim as f64))),
            ("rotary_emb_base", Some(json!(rope.theta))),
        ]));
        Some(keys)
    }

    fn place(&self, config: &DecoderConfig, part: Part, name: &str) -> Place {
        let mlp = kind_of(config, part) == Some(LayerKind::Mlp);
        match part {
            Part::Embeddings => Place::at(format!("gpt_neox.embed_in.{name}")),
            Part::Norm(i) => {
                let norm = if mlp { "post_attention_layernorm" } else { "input_layernorm" };
                Place::at(format!("gpt_neox.layers.{}.{norm}.{name}", i / 2))
            }
            Part::Mixer(i) => mixer(config, i, name),
            Part::FinalNorm => Place::at(format!("gpt_neox.final_layer_norm.{name}")),
            Part::Head => Place::at("embed_out.weight"),
        }
    }

    fn ignored(&self) -> &'static [&'static str] {
        &["attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"]
    }

    fn blocks(&self, config: &DecoderConfig) -> usize {
        pairs(config)
    }

    fn presets(&self) -> Vec<Preset> {
        presets::presets()
    }
}

fn mixer(config: &DecoderConfig, i: usize, name: &str) -> Place {
    let (module, leaf) = name.split_once('.').unwrap_or((name, ""));
    let block = format!("gpt_neox.layers.{}", i / 2);
    let MixerConfig::Attention(attention) = &config.layers[i] else {
        let module = if module == "up_proj" { "dense_h_to_4h" } else { "dense_4h_to_h" };
        return Place::at(format!("{block}.mlp.{module}.{leaf}"));
    };
    let Some(third) = ["q_proj", "k_proj", "v_proj"].iter().position(|projection| *projection == module) else {
        return Place::at(format!("{block}.attention.dense.{leaf}"));
    };
    let AttentionConfig { heads, head_dim, .. } = *attention;
    let rows = Rows { start: third * head_dim, len: head_dim, stride: 3 * head_dim, count: heads, total: 3 * heads * head_dim };
    Place::at(format!("{block}.attention.query_key_value.{leaf}")).rows(rows)
}

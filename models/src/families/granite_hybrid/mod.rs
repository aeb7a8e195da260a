#![doc = include_str!("README.md")]

use serde_json::{Map, Value, json};

use super::fields::{COMMON_KEYS, Fields};
use super::{Family, Part, Place, express, kind_of, pairs, renamed};
use crate::config::{ConfigError, DecoderConfig, MixerConfig, Scaling};
use crate::init::Init;
use crate::layers::{NormConfig, NormKind};
use crate::mixers::{Activation, AttentionConfig, MlpConfig};
use crate::pattern::LayerKind;
use crate::weights::Rows;

/// `model_type: granitemoehybrid`.
pub struct GraniteHybrid;

const KEYS: [&str; 43] = [
    "intermediate_size",
    "shared_intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "position_embedding_type",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
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
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "num_local_experts",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
    "normalization_function",
    "init_method",
    "model_type",
    "attn_layer_indices",
    "partial_rotary_factor",
    "ep_size",
    "hidden_dropout",
];

impl Family for GraniteHybrid {
    fn name(&self) -> &'static str {
        "granitemoehybrid"
    }

    fn architecture(&self) -> &'static str {
        "GraniteMoeHybridForCausalLM"
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.into_iter().chain(COMMON_KEYS).collect()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), raw);
        if let Some((key, value)) = f.get(&["num_local_experts"]).filter(|(_, value)| value.as_u64() != Some(0)) {
            return Err(f.wrong(key, "0: mixtures of experts are not supported", value));
        }
        let hidden_size = f.size(&["hidden_size"])?;
        let norm_eps = f.float(&["rms_norm_eps"], 1e-6)? as f32;
        let blocks = f.layers(&["num_hidden_layers"])?;
        let attention = AttentionConfig {
            scale: Some(f.float(&["attention_multiplier"], 1.0)? as f32),
            ..f.attention(hidden_size, |f, head_dim| match f.text(&["position_embedding_type"])? {
                Some("rope") => Ok(Some(f.rope(head_dim, 1.0, &[])?)),
                None | Some("nope") => Ok(None),
                Some(other) => Err(f.wrong("position_embedding_type", "rope or nope", other)),
            })?
        };
        let mlp = MlpConfig {
            intermediate: f.size_or(&["shared_intermediate_size"], 1024)?,
            activation: f.activation(&["hidden_act"], Activation::Silu)?,
            gated: true,
            bias: false,
        };
        let mamba = f.mamba2(hidden_size, norm_eps)?;
        let attends = f.attention_layers(blocks)?;
        let mixer = |i| if attends.contains(&i) { MixerConfig::Attention(attention.clone()) } else { MixerConfig::Mamba2(mamba.clone()) };
        let layers = (0..blocks).flat_map(|i| [mixer(i), MixerConfig::Mlp(mlp.clone())]).collect();
        let logits = f.float(&["logits_scaling"], 1.0)? as f32;
        if logits <= 0.0 {
            return Err(f.wrong("logits_scaling", "a positive number", logits));
        }
        Ok(DecoderConfig {
            norm: NormConfig::rms(norm_eps),
            scaling: Scaling {
                embeddings: f.float(&["embedding_multiplier"], 1.0)? as f32,
                residual: f.float(&["residual_multiplier"], 1.0)? as f32,
                logits,
            },
            max_positions: f.maybe_size(&["max_position_embeddings"])?,
            init: Init::Megatron { std: f.float(&["initializer_range"], 0.02)? as f32 },
            ..DecoderConfig::new(self, &f, layers)?
        })
    }

    fn express(&self, config: &DecoderConfig) -> Option<Map<String, Value>> {
        let (mlp, mixer, attention) = (express::mlp(config)?, express::mamba2(config)?, express::attention(config)?);
        if config.norm.kind != NormKind::Rms || !config.layers.len().is_multiple_of(2) {
            return None;
        }
        let kind = |i: usize| if config.layers[2 * i].kind() == LayerKind::Attention { "attention" } else { "mamba" };
        let types: Vec<&str> = (0..config.layers.len() / 2).map(kind).collect();
        let mut keys = express::common(config);
        keys.extend(express::heads(attention));
        keys.extend(express::mamba2_keys(config, mixer));
        keys.extend(express::map([
            ("num_hidden_layers", Some(json!(types.len()))),
            ("layer_types", Some(json!(types))),
            ("shared_intermediate_size", Some(json!(mlp.intermediate))),
            ("intermediate_size", Some(json!(mlp.intermediate))),
            ("hidden_act", Some(express::activation(mlp.activation))),
            ("rms_norm_eps", Some(express::float(config.norm.eps))),
            ("num_local_experts", Some(json!(0))),
            ("num_experts_per_tok", Some(json!(0))),
            ("attention_bias", Some(json!(attention.qkv_bias))),
            ("position_embedding_type", Some(json!(if attention.rope.is_some() { "rope" } else { "nope" }))),
            ("attention_multiplier", Some(express::float(attention.scale.unwrap_or(1.0 / (attention.head_dim as f32).sqrt())))),
            ("embedding_multiplier", Some(express::float(config.scaling.embeddings))),
            ("residual_multiplier", Some(express::float(config.scaling.residual))),
            ("logits_scaling", Some(express::float(config.scaling.logits))),
        ]));
        if let Some(rope) = &attention.rope {
            keys.extend(express::rope(rope, attention.head_dim));
        }
        Some(keys)
    }

    fn place(&self, config: &DecoderConfig, part: Part, name: &str) -> Place {
        let mlp = kind_of(config, part) == Some(LayerKind::Mlp);
        match part {
            Part::Embeddings => Place::at(format!("model.embed_tokens.{name}")),
            Part::Norm(i) => {
                let norm = if mlp { "post_attention_layernorm" } else { "input_layernorm" };
                Place::at(format!("model.layers.{}.{norm}.{name}", i / 2))
            }
            Part::Mixer(i) => mixer(config, i, name),
            Part::FinalNorm => Place::at(format!("model.norm.{name}")),
            Part::Head => Place::at("lm_head.weight"),
        }
    }

    fn blocks(&self, config: &DecoderConfig) -> usize {
        pairs(config)
    }
}

fn mixer(config: &DecoderConfig, i: usize, name: &str) -> Place {
    let block = format!("model.layers.{}", i / 2);
    let MixerConfig::Mlp(mlp) = &config.layers[i] else {
        let module = if config.layers[i].kind() == LayerKind::Attention { "self_attn" } else { "mamba" };
        return Place::at(format!("{block}.{module}.{}", renamed(name)));
    };
    let f = mlp.intermediate;
    match name {
        "gate_proj.weight" => Place::at(format!("{block}.shared_mlp.input_linear.weight")).rows(Rows::run(0, f, 2 * f)),
        "up_proj.weight" => Place::at(format!("{block}.shared_mlp.input_linear.weight")).rows(Rows::run(f, f, 2 * f)),
        _ => Place::at(format!("{block}.shared_mlp.output_linear.weight")),
    }
}

#[cfg(test)]
mod tests {
    use crate::DecoderConfig;

    #[test]
    fn the_table_covers_every_row_once() {
        let text = r#"{"model_type":"granitemoehybrid","vocab_size":9,"hidden_size":8,"num_hidden_layers":2,
            "layer_types":["mamba","attention"],"num_attention_heads":4,"num_key_value_heads":2,"shared_intermediate_size":12,
            "mamba_n_heads":4,"mamba_d_state":5,"attention_multiplier":0.25,"logits_scaling":3.0,"tie_word_embeddings":true}"#;
        crate::weights::tests::check(&DecoderConfig::from_json(text).unwrap());
    }
}

#![doc = include_str!("README.md")]

use serde_json::{Map, Value, json};

use super::fields::{COMMON_KEYS, Fields};
use super::{Family, Part, Place, express, renamed};
use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::init::Init;
use crate::layers::{NormConfig, NormKind};
use crate::mixers::{Activation, AttentionConfig, Mamba2Config, MlpConfig};
use crate::pattern::{self, LayerKind};
use crate::presets::Preset;

mod presets;

/// `model_type: nemotron_h`.
pub struct NemotronH;

const KEYS: [&str; 62] = [
    "hybrid_override_pattern",
    "layers_block_type",
    "layer_types",
    "attention_ratio",
    "mlp_ratio",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "attention_head_dim",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "mlp_hidden_act",
    "mamba_hidden_act",
    "mamba_num_heads",
    "mamba_head_dim",
    "n_groups",
    "mamba_n_groups",
    "ssm_state_size",
    "conv_kernel",
    "mamba_d_conv",
    "expand",
    "mamba_expand",
    "chunk_size",
    "mamba_chunk_size",
    "use_conv_bias",
    "mamba_conv_bias",
    "mamba_proj_bias",
    "use_bias",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "time_step_limit",
    "mamba_dt_limit",
    "mamba_dt_min",
    "mamba_dt_max",
    "mamba_dt_init_floor",
    "residual_in_fp32",
    "hidden_dropout",
    "rescale_prenorm_residual",
    "num_logits_to_keep",
    "sliding_window",
    "use_mamba_kernels",
    "mamba_ssm_cache_dtype",
    "model_type",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_latent_size",
    "moe_shared_expert_overlap",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "num_nextn_predict_layers",
    "mtp_layers_block_type",
    "output_router_logits",
];

impl NemotronH {
    fn kinds(f: &Fields) -> Result<Vec<LayerKind>, ConfigError> {
        if let Some(types) = f.texts(&["layers_block_type", "layer_types"])? {
            let kind = |name: &&str| match *name {
                "mamba" | "mamba2" | "linear_attention" => Ok(LayerKind::Mamba2),
                "attention" | "full_attention" => Ok(LayerKind::Attention),
                "mlp" => Ok(LayerKind::Mlp),
                other => Err(f.wrong("layers_block_type", "linear_attention, full_attention or mlp", other)),
            };
            return types.iter().map(kind).collect();
        }
        if let Some(text) = f.text(&["hybrid_override_pattern"])? {
            return Ok(pattern::parse(text)?);
        }
        let layers = f.layers(&["num_hidden_layers"])?;
        let (attention, mlp) = (f.float(&["attention_ratio"], 0.08)?, f.float(&["mlp_ratio"], 0.5)?);
        Ok(pattern::allocate(layers, attention, mlp)?)
    }

    fn mamba(f: &Fields, norm_eps: f32) -> Result<Mamba2Config, ConfigError> {
        let heads = f.size(&["mamba_num_heads"])?;
        let groups = f.size_or(&["n_groups", "mamba_n_groups"], 8)?;
        f.divides("mamba_num_heads", heads, "n_groups", groups)?;
        Ok(Mamba2Config {
            heads,
            head_dim: f.size_or(&["mamba_head_dim"], 64)?,
            groups,
            state: f.size_or(&["ssm_state_size"], 128)?,
            conv_kernel: f.size_or(&["conv_kernel", "mamba_d_conv"], 4)?,
            conv_bias: f.flag(&["use_conv_bias", "mamba_conv_bias"], true)?,
            proj_bias: f.flag(&["use_bias"], false)? || f.flag(&["mamba_proj_bias"], false)?,
            dt_limit: f.dt_limit(&["time_step_limit", "mamba_dt_limit"])?,
            chunk: f.size_or(&["chunk_size", "mamba_chunk_size"], 128)?,
            norm_eps,
        })
    }
}

impl Family for NemotronH {
    fn name(&self) -> &'static str {
        "nemotron_h"
    }

    fn architecture(&self) -> &'static str {
        "NemotronHForCausalLM"
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.into_iter().chain(COMMON_KEYS).collect()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), raw);
        f.silu_only(&["mamba_hidden_act"])?;
        let norm_eps = f.float(&["layer_norm_epsilon", "rms_norm_eps"], 1e-5)? as f32;
        let heads = f.size_or(&["num_attention_heads"], 32)?;
        let kv_heads = f.size_or(&["num_key_value_heads"], heads)?;
        f.divides("num_attention_heads", heads, "num_key_value_heads", kv_heads)?;
        let bias = f.flag(&["attention_bias"], false)?;
        let attention = AttentionConfig {
            heads,
            kv_heads,
            head_dim: f.size_or(&["head_dim", "attention_head_dim"], 128)?,
            rope: None,
            scale: None,
            qkv_bias: bias,
            out_bias: bias,
            conv_kernel: None,
        };
        let mlp = MlpConfig {
            intermediate: f.size_or(&["intermediate_size"], 21504)?,
            activation: f.activation(&["mlp_hidden_act"], Activation::Relu2)?,
            gated: false,
            bias: f.flag(&["mlp_bias"], false)?,
        };
        let kinds = Self::kinds(&f)?;
        let mamba = if kinds.contains(&LayerKind::Mamba2) { Some(Self::mamba(&f, norm_eps)?) } else { None };
        let layer = |kind: &LayerKind| match (kind, &mamba) {
            (LayerKind::Mamba2, Some(mamba)) => MixerConfig::Mamba2(mamba.clone()),
            (LayerKind::Attention, _) => MixerConfig::Attention(attention.clone()),
            _ => MixerConfig::Mlp(mlp.clone()),
        };
        let mut config = DecoderConfig {
            norm: NormConfig::rms(norm_eps),
            init: Init::Megatron { std: f.float(&["initializer_range"], 0.02)? as f32 },
            ..DecoderConfig::new(self, &f, kinds.iter().map(layer).collect())?
        };
        spell_out_pattern(&mut config.raw, &kinds);
        Ok(config)
    }

    fn express(&self, config: &DecoderConfig) -> Option<Map<String, Value>> {
        if config.norm.kind != NormKind::Rms {
            return None;
        }
        let mut keys = express::common(config);
        keys.remove("max_position_embeddings");
        keys.extend(express::map([
            ("hybrid_override_pattern", Some(json!(config.pattern()))),
            ("num_hidden_layers", Some(json!(config.layers.len()))),
            ("layer_norm_epsilon", Some(express::float(config.norm.eps))),
            ("time_step_min", Some(json!(1e-9))),
            ("residual_in_fp32", Some(json!(false))),
        ]));
        if let Some(attention) = express::attention(config) {
            keys.extend(express::heads(attention));
            keys.insert("attention_bias".into(), json!(attention.qkv_bias));
        }
        if let Some(mlp) = express::mlp(config) {
            keys.insert("intermediate_size".into(), json!(mlp.intermediate));
            keys.insert("mlp_hidden_act".into(), express::activation(mlp.activation));
            keys.insert("mlp_bias".into(), json!(mlp.bias));
        }
        if let Some(mixer) = express::mamba2(config) {
            keys.extend(express::map([
                ("mamba_num_heads", Some(json!(mixer.heads))),
                ("mamba_head_dim", Some(json!(mixer.head_dim))),
                ("n_groups", Some(json!(mixer.groups))),
                ("ssm_state_size", Some(json!(mixer.state))),
                ("conv_kernel", Some(json!(mixer.conv_kernel))),
                ("use_conv_bias", Some(json!(mixer.conv_bias))),
                ("mamba_proj_bias", Some(json!(mixer.proj_bias))),
                ("use_bias", Some(json!(mixer.proj_bias))),
                ("expand", Some(json!((mixer.inner() / config.hidden_size).max(1)))),
                ("chunk_size", Some(json!(mixer.chunk))),
                ("time_step_limit", express::limits(mixer.dt_limit)),
            ]));
        }
        Some(keys)
    }

    fn place(&self, _config: &DecoderConfig, part: Part, name: &str) -> Place {
        match part {
            Part::Embeddings => Place::at(format!("backbone.embeddings.{name}")),
            Part::Norm(i) => Place::at(format!("backbone.layers.{i}.norm.{name}")),
            Part::Mixer(i) => Place::at(format!("backbone.layers.{i}.mixer.{}", renamed(name))),
            Part::FinalNorm => Place::at(format!("backbone.norm_f.{name}")),
            Part::Head => Place::at("lm_head.weight"),
        }
    }

    /// transformers reads the head from the file even if the configuration says it is tied.
    fn stores_tied_head(&self) -> bool {
        true
    }

    fn presets(&self) -> Vec<Preset> {
        presets::presets()
    }
}
/// Writes the pattern that ratios stand for, in a form that transformers 4 and 5 both read, with the limits that keep
/// transformers 5 from clamping step sizes in prefill only.
fn spell_out_pattern(raw: &mut Map<String, Value>, kinds: &[LayerKind]) {
    raw.remove("attention_ratio");
    raw.remove("mlp_ratio");
    if !raw.contains_key("layers_block_type") && !raw.contains_key("layer_types") {
        let text: String = kinds.iter().map(|kind| kind.symbol()).collect();
        raw.insert("hybrid_override_pattern".into(), text.into());
    }
    raw.insert("num_hidden_layers".into(), kinds.len().into());
    raw.entry("time_step_min").or_insert_with(|| 1e-9.into());
}

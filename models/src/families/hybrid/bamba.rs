//! Bamba: each published layer is a mixer (Mamba-2, or attention with rotary positions on half of each head) and a SwiGLU.

use serde_json::{Map, Value};

use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::families::fields::{COMMON_KEYS, Fields};
use crate::families::{Family, TopKeys};
use crate::init::Init;
use crate::mixers::{Activation, AttentionConfig, Mamba2Config, MlpConfig};
use crate::pattern::LayerKind;
use crate::weights::LayerKeys;

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

impl Bamba {
    /// Indices of attention layers, from either spelling.
    fn attention_layers(f: &Fields, blocks: usize) -> Result<Vec<usize>, ConfigError> {
        match f.texts(&["layer_types", "layers_block_type"])? {
            None => f.indices(&["attn_layer_indices"], blocks),
            Some(types) if types.len() == blocks => {
                Ok((0..blocks).filter(|&i| matches!(types[i], "attention" | "full_attention")).collect())
            }
            Some(types) => Err(f.wrong("layer_types", format!("{blocks} entries"), types.len())),
        }
    }

    fn mamba(f: &Fields, hidden_size: usize, norm_eps: f32) -> Result<Mamba2Config, ConfigError> {
        let inner = f.size_or(&["mamba_expand"], 2)? * hidden_size;
        let heads = f.size_or(&["mamba_n_heads"], 128)?;
        f.divides("mamba_expand * hidden_size", inner, "mamba_n_heads", heads)?;
        let head_dim = match f.get(&["mamba_d_head"]) {
            Some((_, value)) if value.as_str() == Some("auto") => inner / heads,
            _ => f.size_or(&["mamba_d_head"], inner / heads)?,
        };
        let groups = f.size_or(&["mamba_n_groups"], 1)?;
        f.divides("mamba_n_heads", heads, "mamba_n_groups", groups)?;
        Ok(Mamba2Config {
            heads,
            head_dim,
            groups,
            state: f.size_or(&["mamba_d_state"], 256)?,
            conv_kernel: f.size_or(&["mamba_d_conv"], 4)?,
            conv_bias: f.flag(&["mamba_conv_bias"], true)?,
            proj_bias: f.flag(&["mamba_proj_bias"], false)?,
            dt_limit: f.dt_limit(&["time_step_limit", "mamba_dt_limit"])?,
            chunk: f.size_or(&["mamba_chunk_size"], 256)?,
            norm_eps,
        })
    }
}

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

    fn read(&self, raw: Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), &raw);
        let hidden_size = f.size(&["hidden_size"])?;
        let norm_eps = f.float(&["rms_norm_eps"], 1e-5)? as f32;
        let blocks = f.size(&["num_hidden_layers"])?;
        let heads = f.size(&["num_attention_heads"])?;
        let kv_heads = f.size_or(&["num_key_value_heads"], heads)?;
        f.divides("num_attention_heads", heads, "num_key_value_heads", kv_heads)?;
        let head_dim = f.size_or(&["head_dim"], hidden_size / heads)?;
        let attention = AttentionConfig {
            heads,
            kv_heads,
            head_dim,
            rope: Some(f.rope(head_dim, 0.5, &["attn_rotary_emb"])?),
            scale: None,
            bias: f.flag(&["attention_bias"], false)?,
        };
        let mlp = MlpConfig {
            intermediate: f.size(&["intermediate_size"])?,
            activation: f.activation(&["hidden_act"], Activation::Silu)?,
            gated: true,
            bias: f.flag(&["mlp_bias"], false)?,
        };
        let mamba = Self::mamba(&f, hidden_size, norm_eps)?;
        let attends = Self::attention_layers(&f, blocks)?;
        let mixer = |i| if attends.contains(&i) { MixerConfig::Attention(attention.clone()) } else { MixerConfig::Mamba2(mamba.clone()) };
        Ok(DecoderConfig {
            family: self.name(),
            vocab_size: f.size(&["vocab_size"])?,
            hidden_size,
            layers: (0..blocks).flat_map(|i| [mixer(i), MixerConfig::Mlp(mlp.clone())]).collect(),
            norm_eps,
            tie_embeddings: f.flag(&["tie_word_embeddings"], false)?,
            max_positions: f.maybe_size(&["max_position_embeddings"])?,
            bos: f.tokens("bos_token_id")?.first().copied(),
            eos: f.tokens("eos_token_id")?,
            pad: f.tokens("pad_token_id")?.first().copied(),
            init: Init::Megatron { std: f.float(&["initializer_range"], 0.02)? as f32 },
            raw,
        })
    }

    fn top_keys(&self) -> TopKeys {
        TopKeys { embeddings: "model.embed_tokens", norm_f: "model.final_layernorm" }
    }

    fn layer_keys(&self, config: &DecoderConfig) -> Vec<LayerKeys> {
        let place = |(n, layer): (usize, &MixerConfig)| {
            let block = format!("model.layers.{}", n / 2);
            let (norm, mixer) = match layer.kind() {
                LayerKind::Mamba2 => ("input_layernorm", "mamba"),
                LayerKind::Attention => ("input_layernorm", "self_attn"),
                LayerKind::Mlp => ("pre_ff_layernorm", "feed_forward"),
            };
            LayerKeys { norm: format!("{block}.{norm}"), mixer: format!("{block}.{mixer}") }
        };
        config.layers.iter().enumerate().map(place).collect()
    }

    fn pairs_layers(&self) -> bool {
        true
    }
}

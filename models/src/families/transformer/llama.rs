//! Llama and models that share its layout (TinyLlama, SmolLM, ...): grouped-query attention with rotary positions, SwiGLU.

use serde_json::{Map, Value};

use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::families::fields::{COMMON_KEYS, Fields};
use crate::families::{Family, TopKeys};
use crate::init::Init;
use crate::mixers::{Activation, AttentionConfig, MlpConfig};
use crate::weights::LayerKeys;

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

    fn read(&self, raw: Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), &raw);
        let hidden_size = f.size(&["hidden_size"])?;
        let heads = f.size(&["num_attention_heads"])?;
        let kv_heads = f.size_or(&["num_key_value_heads"], heads)?;
        f.divides("num_attention_heads", heads, "num_key_value_heads", kv_heads)?;
        let head_dim = match f.maybe_size(&["head_dim"])? {
            Some(head_dim) => head_dim,
            None => {
                f.divides("hidden_size", hidden_size, "num_attention_heads", heads)?;
                hidden_size / heads
            }
        };
        let attention = AttentionConfig {
            heads,
            kv_heads,
            head_dim,
            rope: Some(f.rope(head_dim, 1.0, &[])?),
            scale: None,
            bias: f.flag(&["attention_bias"], false)?,
        };
        let mlp = MlpConfig {
            intermediate: f.size(&["intermediate_size"])?,
            activation: f.activation(&["hidden_act"], Activation::Silu)?,
            gated: true,
            bias: f.flag(&["mlp_bias"], false)?,
        };
        let blocks = f.size(&["num_hidden_layers"])?;
        Ok(DecoderConfig {
            family: self.name(),
            vocab_size: f.size(&["vocab_size"])?,
            hidden_size,
            layers: (0..blocks).flat_map(|_| [MixerConfig::Attention(attention.clone()), MixerConfig::Mlp(mlp.clone())]).collect(),
            norm_eps: f.float(&["rms_norm_eps"], 1e-6)? as f32,
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
        TopKeys { embeddings: "model.embed_tokens", norm_f: "model.norm" }
    }

    fn layer_keys(&self, config: &DecoderConfig) -> Vec<LayerKeys> {
        let keys = |i: usize| {
            let block = format!("model.layers.{i}");
            [
                LayerKeys { norm: format!("{block}.input_layernorm"), mixer: format!("{block}.self_attn") },
                LayerKeys { norm: format!("{block}.post_attention_layernorm"), mixer: format!("{block}.mlp") },
            ]
        };
        (0..config.layers.len() / 2).flat_map(keys).collect()
    }

    fn pairs_layers(&self) -> bool {
        true
    }
}

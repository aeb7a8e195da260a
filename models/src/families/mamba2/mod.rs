//! Mamba-2 in the Hugging Face layout (`Mamba2ForCausalLM`; Codestral-Mamba has the same keys): every layer is norm,
//! mixer, residual.
//!
//! Files say `norm_before_gate: true`; every released model gates first, so the key is not read.

use serde_json::{Map, Value};

use super::fields::{COMMON_KEYS, Fields};
use super::{Family, TopKeys};
use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::init::Init;
use crate::mixers::Mamba2Config;
use crate::weights::LayerKeys;

/// `model_type: mamba2`.
pub struct Mamba2Family;

const KEYS: [&str; 22] = [
    "num_heads",
    "head_dim",
    "state_size",
    "expand",
    "conv_kernel",
    "n_groups",
    "use_bias",
    "use_conv_bias",
    "hidden_act",
    "residual_in_fp32",
    "time_step_rank",
    "time_step_min",
    "time_step_max",
    "time_step_floor",
    "time_step_limit",
    "rescale_prenorm_residual",
    "rms_norm",
    "chunk_size",
    "layer_norm_epsilon",
    "norm_before_gate",
    "intermediate_size",
    "model_type",
];

impl Family for Mamba2Family {
    fn name(&self) -> &'static str {
        "mamba2"
    }

    fn architecture(&self) -> &'static str {
        "Mamba2ForCausalLM"
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.into_iter().chain(COMMON_KEYS).collect()
    }

    fn read(&self, raw: Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), &raw);
        let hidden_size = f.size(&["hidden_size"])?;
        let norm_eps = f.float(&["layer_norm_epsilon"], 1e-5)? as f32;
        let expand = f.size_or(&["expand"], 2)?;
        let head_dim = f.size_or(&["head_dim"], 64)?;
        let heads = f.size_or(&["num_heads"], expand * hidden_size / head_dim)?;
        let groups = f.size_or(&["n_groups"], 8)?;
        if heads * head_dim != expand * hidden_size {
            return Err(f.wrong("num_heads * head_dim", format!("expand * hidden_size = {}", expand * hidden_size), heads * head_dim));
        }
        f.divides("num_heads", heads, "n_groups", groups)?;
        let mixer = Mamba2Config {
            heads,
            head_dim,
            groups,
            state: f.size_or(&["state_size"], 128)?,
            conv_kernel: f.size_or(&["conv_kernel"], 4)?,
            conv_bias: f.flag(&["use_conv_bias"], true)?,
            proj_bias: f.flag(&["use_bias"], false)?,
            dt_limit: f.dt_limit(&["time_step_limit"])?,
            chunk: f.size_or(&["chunk_size"], 256)?,
            norm_eps,
        };
        Ok(DecoderConfig {
            family: self.name(),
            vocab_size: f.size(&["vocab_size"])?,
            hidden_size,
            layers: vec![MixerConfig::Mamba2(mixer); f.size(&["num_hidden_layers"])?],
            norm_eps,
            tie_embeddings: f.flag(&["tie_word_embeddings"], false)?,
            max_positions: None,
            bos: f.tokens("bos_token_id")?.first().copied(),
            eos: f.tokens("eos_token_id")?,
            pad: f.tokens("pad_token_id")?.first().copied(),
            init: Init::MambaSsm,
            raw,
        })
    }

    fn top_keys(&self) -> TopKeys {
        TopKeys { embeddings: "backbone.embeddings", norm_f: "backbone.norm_f" }
    }

    fn layer_keys(&self, config: &DecoderConfig) -> Vec<LayerKeys> {
        let keys = |i| LayerKeys { norm: format!("backbone.layers.{i}.norm"), mixer: format!("backbone.layers.{i}.mixer") };
        (0..config.layers.len()).map(keys).collect()
    }

    fn pairs_layers(&self) -> bool {
        false
    }
}

#![doc = include_str!("README.md")]

use serde_json::{Map, Value, json};

use super::fields::{COMMON_KEYS, Fields};
use super::{Family, Part, Place, as_in_mamba, express};
use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::init::Init;
use crate::layers::{NormConfig, NormKind};
use crate::mixers::MambaConfig;
use crate::presets::Preset;

mod presets;

/// `model_type: mamba`.
pub struct MambaFamily;

const KEYS: [&str; 22] = [
    "state_size",
    "expand",
    "intermediate_size",
    "conv_kernel",
    "use_bias",
    "use_conv_bias",
    "hidden_act",
    "residual_in_fp32",
    "time_step_rank",
    "time_step_scale",
    "time_step_min",
    "time_step_max",
    "time_step_init_scheme",
    "time_step_floor",
    "rescale_prenorm_residual",
    "layer_norm_epsilon",
    "use_mambapy",
    "use_associative_scan",
    "model_type",
    "rms_norm",
    "fused_add_norm",
    "d_model",
];

impl Family for MambaFamily {
    fn name(&self) -> &'static str {
        "mamba"
    }

    fn architecture(&self) -> &'static str {
        "MambaForCausalLM"
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.into_iter().chain(COMMON_KEYS).collect()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), raw);
        f.silu_only(&["hidden_act"])?;
        let hidden_size = f.size(&["hidden_size"])?;
        let dt_rank = match f.get(&["time_step_rank"]) {
            Some((_, value)) if value.as_str() == Some("auto") => hidden_size.div_ceil(16),
            _ => f.size_or(&["time_step_rank"], hidden_size.div_ceil(16))?,
        };
        let mixer = MambaConfig {
            inner: f.size_or(&["intermediate_size"], f.size_or(&["expand"], 2)? * hidden_size)?,
            state: f.size_or(&["state_size"], 16)?,
            dt_rank,
            conv_kernel: f.size_or(&["conv_kernel"], 4)?,
            conv_bias: f.flag(&["use_conv_bias"], true)?,
            proj_bias: f.flag(&["use_bias"], false)?,
        };
        let layers = vec![MixerConfig::Mamba(mixer); f.layers(&["num_hidden_layers"])?];
        Ok(DecoderConfig {
            norm: NormConfig::rms(f.float(&["layer_norm_epsilon"], 1e-5)? as f32),
            // Published files leave it out and hold no head.
            tie_embeddings: f.flag(&["tie_word_embeddings"], true)?,
            init: Init::MambaSsm,
            ..DecoderConfig::new(self, &f, layers)?
        })
    }

    fn express(&self, config: &DecoderConfig) -> Option<Map<String, Value>> {
        let mixer = express::only(config, |layer| if let MixerConfig::Mamba(c) = layer { Some(c) } else { None })?;
        if config.norm.kind != NormKind::Rms {
            return None;
        }
        let mut keys = express::common(config);
        keys.extend(express::map([
            ("num_hidden_layers", Some(json!(config.layers.len()))),
            ("intermediate_size", Some(json!(mixer.inner))),
            ("expand", Some(json!((mixer.inner / config.hidden_size).max(1)))),
            ("state_size", Some(json!(mixer.state))),
            ("time_step_rank", Some(json!(mixer.dt_rank))),
            ("conv_kernel", Some(json!(mixer.conv_kernel))),
            ("use_conv_bias", Some(json!(mixer.conv_bias))),
            ("use_bias", Some(json!(mixer.proj_bias))),
            ("layer_norm_epsilon", Some(express::float(config.norm.eps))),
            ("residual_in_fp32", Some(json!(true))),
        ]));
        Some(keys)
    }

    fn place(&self, _config: &DecoderConfig, part: Part, name: &str) -> Place {
        as_in_mamba(part, name)
    }

    fn presets(&self) -> Vec<Preset> {
        presets::presets()
    }
}

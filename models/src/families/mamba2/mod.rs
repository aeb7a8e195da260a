#![doc = include_str!("README.md")]

use serde_json::{Map, Value, json};

use super::fields::{COMMON_KEYS, Fields};
use super::{Family, Part, Place, as_in_mamba, express};
use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::init::Init;
use crate::layers::{NormConfig, NormKind};
use crate::mixers::Mamba2Config;
use crate::presets::Preset;

mod presets;

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

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), raw);
        f.silu_only(&["hidden_act"])?;
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
        let layers = vec![MixerConfig::Mamba2(mixer); f.layers(&["num_hidden_layers"])?];
        let mut config = DecoderConfig { norm: NormConfig::rms(norm_eps), init: Init::MambaSsm, ..DecoderConfig::new(self, &f, layers)? };
        // Codestral-Mamba's file names its `<unk>` as both; its tokenizer begins with 1 and ends with 2.
        if groups == 8 && config.bos == Some(0) && config.eos == [0] && raw.get("norm_before_gate") == Some(&json!(true)) {
            (config.bos, config.eos) = (Some(1), vec![2]);
        }
        Ok(config)
    }

    fn express(&self, config: &DecoderConfig) -> Option<Map<String, Value>> {
        let mixer = express::mamba2(config)?;
        let plain = config.norm.kind == NormKind::Rms && config.norm.eps == mixer.norm_eps;
        if !plain || !mixer.inner().is_multiple_of(config.hidden_size) {
            return None;
        }
        let mut keys = express::common(config);
        keys.extend(express::map([
            ("num_hidden_layers", Some(json!(config.layers.len()))),
            ("num_heads", Some(json!(mixer.heads))),
            ("head_dim", Some(json!(mixer.head_dim))),
            ("state_size", Some(json!(mixer.state))),
            ("n_groups", Some(json!(mixer.groups))),
            ("expand", Some(json!(mixer.inner() / config.hidden_size))),
            ("conv_kernel", Some(json!(mixer.conv_kernel))),
            ("use_conv_bias", Some(json!(mixer.conv_bias))),
            ("use_bias", Some(json!(mixer.proj_bias))),
            ("chunk_size", Some(json!(mixer.chunk))),
            ("layer_norm_epsilon", Some(express::float(mixer.norm_eps))),
            ("residual_in_fp32", Some(json!(true))),
            ("time_step_limit", express::limits(mixer.dt_limit)),
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

#![doc = include_str!("README.md")]

mod describe;
mod presets;

use serde_json::{Map, Value};

use super::fields::Fields;
use super::{Family, Part, Place, kind_of, renamed};
use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::init::Init;
use crate::layers::{NormConfig, NormKind};
use crate::mixers::{AttentionConfig, Mamba2Config, MlpConfig};
use crate::pattern::LayerKind;
use crate::presets::Preset;
use crate::weights::Rows;

/// Megatron-LM.
pub struct Megatron;

const KEYS: [&str; 26] = [
    "model_type",
    "vocab_size",
    "hidden_size",
    "pattern",
    "paired",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rotary_dim",
    "rotary_base",
    "intermediate_size",
    "hidden_act",
    "gated",
    "bias",
    "normalization",
    "norm_eps",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_state_dim",
    "conv_kernel",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
];

impl DecoderConfig {
    /// The configuration of a Megatron checkpoint: `args` of the training run (with what the caller adds to them, such as
    /// `mamba_num_groups`), and the shape of the merged tensor of each key.
    ///
    /// # Errors
    /// When neither arguments nor shapes say what is needed.
    pub fn from_megatron(args: &Map<String, Value>, shape_of: &dyn Fn(&str) -> Option<Vec<usize>>) -> Result<Self, ConfigError> {
        Megatron.read_static(&describe::describe(args, shape_of)?)
    }
}

impl Megatron {
    fn read_static(&self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        static MEGATRON: Megatron = Megatron;
        MEGATRON.read(raw)
    }
}

impl Family for Megatron {
    fn name(&self) -> &'static str {
        "megatron"
    }

    fn architecture(&self) -> &'static str {
        "MegatronModel"
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.to_vec()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), raw);
        let eps = f.float(&["norm_eps"], 1e-5)? as f32;
        let kinds = crate::pattern::parse(f.text(&["pattern"])?.ok_or(ConfigError::Missing { family: self.name(), key: "pattern" })?)?;
        let bias = f.flag(&["bias"], false)?;
        let layer = |kind: &LayerKind| -> Result<MixerConfig, ConfigError> {
            Ok(match kind {
                LayerKind::Attention => MixerConfig::Attention(attention(&f, bias)?),
                LayerKind::Mlp => MixerConfig::Mlp(MlpConfig {
                    intermediate: f.size(&["intermediate_size"])?,
                    activation: f.activation(&["hidden_act"], crate::mixers::Activation::Gelu)?,
                    gated: f.flag(&["gated"], false)?,
                    bias,
                }),
                LayerKind::Mamba | LayerKind::Mamba2 => MixerConfig::Mamba2(mamba(&f, eps)?),
            })
        };
        let layers = kinds.iter().map(layer).collect::<Result<_, _>>()?;
        let kind = match f.text(&["normalization"])? {
            None | Some("RMSNorm") => NormKind::Rms,
            Some("LayerNorm") => NormKind::Layer,
            Some("LayerNorm1P") => NormKind::LayerOnePlus,
            Some(other) => return Err(f.wrong("normalization", "RMSNorm, LayerNorm or LayerNorm1P", other)),
        };
        Ok(DecoderConfig {
            norm: NormConfig { kind, eps },
            max_positions: f.maybe_size(&["max_position_embeddings"])?,
            init: Init::Megatron { std: 0.02 },
            ..DecoderConfig::new(self, &f, layers)?
        })
    }

    fn place(&self, config: &DecoderConfig, part: Part, name: &str) -> Place {
        let paired = paired(config);
        let block = |i: usize| format!("decoder.layers.{}", if paired { i / 2 } else { i });
        match part {
            Part::Embeddings => Place::at(format!("embedding.word_embeddings.{name}")),
            Part::Norm(i) => norm(kind_of(config, part), paired, &block(i), name),
            Part::Mixer(i) => mixer(&config.layers[i], &block(i), name),
            Part::FinalNorm if paired => Place::at(format!("decoder.final_layernorm.{name}")).or(format!("decoder.final_norm.{name}")),
            Part::FinalNorm => Place::at(format!("decoder.final_norm.{name}")).or(format!("decoder.final_layernorm.{name}")),
            Part::Head => Place::at("output_layer.weight"),
        }
    }

    fn ignored(&self) -> &'static [&'static str] {
        &["_extra_state", "rotary_pos_emb.inv_freq"]
    }

    fn blocks(&self, config: &DecoderConfig) -> usize {
        if paired(config) { super::pairs(config) } else { config.layers.len() }
    }

    fn in_transformers(&self) -> bool {
        false
    }

    /// Training checkpoints have no configuration file.
    fn writable(&self) -> bool {
        false
    }

    fn presets(&self) -> Vec<Preset> {
        presets::presets()
    }
}

/// GPT models: a published layer is an attention and an MLP.
fn paired(config: &DecoderConfig) -> bool {
    config.raw.get("paired").and_then(Value::as_bool).unwrap_or(false)
}

fn attention(f: &Fields, bias: bool) -> Result<AttentionConfig, ConfigError> {
    let heads = f.size(&["num_attention_heads"])?;
    let kv_heads = f.size_or(&["num_key_value_heads"], heads)?;
    f.divides("num_attention_heads", heads, "num_key_value_heads", kv_heads)?;
    let head_dim = f.size(&["head_dim"])?;
    let rope = match f.count(&["rotary_dim"])? {
        0 => None,
        dim => {
            let theta = f.float(&["rotary_base"], 1e4)?;
            if dim % 2 != 0 || dim > head_dim || theta <= 0.0 {
                return Err(f.wrong("rotary_dim", format!("an even number up to head_dim = {head_dim}"), dim));
            }
            Some(crate::layers::RopeConfig { theta, dim, scaling: crate::layers::RopeScaling::Default })
        }
    };
    Ok(AttentionConfig { heads, kv_heads, head_dim, rope, scale: None, qkv_bias: bias, out_bias: bias, conv_kernel: None })
}

fn mamba(f: &Fields, norm_eps: f32) -> Result<Mamba2Config, ConfigError> {
    let heads = f.size(&["mamba_num_heads"])?;
    let groups = f.size(&["mamba_num_groups"])?;
    f.divides("mamba_num_heads", heads, "mamba_num_groups", groups)?;
    Ok(Mamba2Config {
        heads,
        head_dim: f.size(&["mamba_head_dim"])?,
        groups,
        state: f.size(&["mamba_state_dim"])?,
        conv_kernel: f.size_or(&["conv_kernel"], 4)?,
        conv_bias: true,
        proj_bias: false,
        dt_limit: (0.0, f32::INFINITY),
        chunk: 128,
        norm_eps,
    })
}

/// A norm before a mixer is a module of its own (the local implementation), or belongs to the projection behind it
/// (Transformer Engine's), where its name changed with Megatron's versions.
fn norm(kind: Option<LayerKind>, paired: bool, block: &str, name: &str) -> Place {
    let (own, fused) = match kind {
        Some(LayerKind::Attention) => ("input_layernorm", "self_attention.linear_qkv.layer_norm"),
        Some(LayerKind::Mlp) => ("pre_mlp_layernorm", "mlp.linear_fc1.layer_norm"),
        _ => ("norm", "mixer.in_proj.layer_norm"),
    };
    let (own, fused) = (format!("{block}.{own}.{name}"), format!("{block}.{fused}_{name}"));
    if paired || matches!(kind, Some(LayerKind::Mamba2)) { Place::at(own).or(fused) } else { Place::at(fused).or(own) }
}

fn mixer(layer: &MixerConfig, block: &str, name: &str) -> Place {
    let (module, leaf) = name.split_once('.').unwrap_or((name, ""));
    match layer {
        MixerConfig::Attention(attention) => {
            let (p, groups) = (attention.head_dim, attention.kv_heads);
            let queries = attention.heads / groups * p;
            let stride = queries + 2 * p;
            let rows = |start, len| {
                let rows = Rows { start, len, stride, count: groups, total: groups * stride };
                Place::at(format!("{block}.self_attention.linear_qkv.{leaf}")).rows(rows)
            };
            match module {
                "q_proj" => rows(0, queries),
                "k_proj" => rows(queries, p),
                "v_proj" => rows(queries + p, p),
                _ => Place::at(format!("{block}.self_attention.linear_proj.{leaf}")),
            }
        }
        MixerConfig::Mlp(mlp) => {
            let f = mlp.intermediate;
            let fc1 = Place::at(format!("{block}.mlp.linear_fc1.{leaf}"));
            match module {
                "gate_proj" => fc1.rows(Rows::run(0, f, 2 * f)).parts(vec![f, f]),
                "up_proj" if mlp.gated => fc1.rows(Rows::run(f, f, 2 * f)).parts(vec![f, f]),
                "up_proj" => fc1,
                _ => Place::at(format!("{block}.mlp.linear_fc2.{leaf}")),
            }
        }
        MixerConfig::Mamba2(mamba) => {
            let (e, shared, h) = (mamba.inner(), mamba.groups * mamba.state, mamba.heads);
            let place = Place::at(format!("{block}.mixer.{}", renamed(name)));
            match module {
                "in_proj" => place.parts(vec![e, e, shared, shared, h]),
                "conv1d" => place.or(format!("{block}.mixer.conv1d_{leaf}")).parts(vec![e, shared, shared]),
                _ => place,
            }
        }
        MixerConfig::Mamba(_) => Place::at(format!("{block}.mixer.{}", renamed(name))),
    }
}

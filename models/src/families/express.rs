//! Keys that several families write alike.

use serde_json::{Map, Value, json};

use crate::config::{DecoderConfig, MixerConfig};
use crate::layers::{RopeConfig, RopeScaling};
use crate::mixers::{Activation, AttentionConfig, Mamba2Config, MlpConfig};

/// Keys and values in order; those without a value are left out.
pub fn map<const N: usize>(pairs: [(&str, Option<Value>); N]) -> Map<String, Value> {
    pairs.into_iter().filter_map(|(key, value)| Some((key.to_string(), value?))).collect()
}

/// Width and special tokens.
pub fn common(config: &DecoderConfig) -> Map<String, Value> {
    let eos = match config.eos.as_slice() {
        [] => None,
        [one] => Some(json!(one)),
        many => Some(json!(many)),
    };
    map([
        ("hidden_size", Some(json!(config.hidden_size))),
        ("bos_token_id", config.bos.map(|id| json!(id))),
        ("eos_token_id", eos),
        ("pad_token_id", config.pad.map(|id| json!(id))),
        ("max_position_embeddings", config.max_positions.map(|n| json!(n))),
    ])
}

/// A float as the decimal number that a reader turns into the same float32.
pub fn float(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, |x| json!(x))
}

/// A Hugging Face name.
pub fn activation(activation: Activation) -> Value {
    json!(match activation {
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::Relu2 => "relu2",
        Activation::Silu => "silu",
    })
}

/// Rotary positions under the names of transformers 4 and of transformers 5.
pub fn rope(rope: &RopeConfig, head_dim: usize) -> Map<String, Value> {
    let factor = rope.dim as f64 / head_dim as f64;
    let mut parameters = map([
        ("rope_theta", Some(json!(rope.theta))),
        ("rope_type", Some(json!("default"))),
        ("partial_rotary_factor", (rope.dim != head_dim).then(|| json!(factor))),
    ]);
    let mut scaling = Map::new();
    match rope.scaling {
        RopeScaling::Default => {}
        RopeScaling::Linear { factor } => scaling = map([("rope_type", Some(json!("linear"))), ("factor", Some(json!(factor)))]),
        RopeScaling::Llama3 { factor, low, high, original } => {
            scaling = map([
                ("rope_type", Some(json!("llama3"))),
                ("factor", Some(json!(factor))),
                ("low_freq_factor", Some(json!(low))),
                ("high_freq_factor", Some(json!(high))),
                ("original_max_position_embeddings", Some(json!(original as u64))),
            ]);
        }
    }
    parameters.extend(scaling.clone());
    let mut keys = map([("rope_theta", Some(json!(rope.theta))), ("rope_parameters", Some(Value::Object(parameters)))]);
    if rope.dim != head_dim {
        keys.insert("partial_rotary_factor".into(), json!(factor));
    }
    if !scaling.is_empty() {
        keys.insert("rope_scaling".into(), Value::Object(scaling));
    }
    keys
}

/// Heads and the width of one.
pub fn heads(attention: &AttentionConfig) -> Map<String, Value> {
    map([
        ("num_attention_heads", Some(json!(attention.heads))),
        ("num_key_value_heads", Some(json!(attention.kv_heads))),
        ("head_dim", Some(json!(attention.head_dim))),
    ])
}

/// The one configuration that all mixers of a kind share; `None` when there is none or they differ.
pub fn only<'a, T: PartialEq>(config: &'a DecoderConfig, pick: impl Fn(&'a MixerConfig) -> Option<&'a T>) -> Option<&'a T> {
    let mut found = config.layers.iter().filter_map(pick);
    let first = found.next()?;
    found.all(|other| other == first).then_some(first)
}

/// All attention layers, if they are alike.
pub fn attention(config: &DecoderConfig) -> Option<&AttentionConfig> {
    only(config, |layer| if let MixerConfig::Attention(c) = layer { Some(c) } else { None })
}

/// All MLP layers, if they are alike.
pub fn mlp(config: &DecoderConfig) -> Option<&MlpConfig> {
    only(config, |layer| if let MixerConfig::Mlp(c) = layer { Some(c) } else { None })
}

/// All Mamba-2 layers, if they are alike.
pub fn mamba2(config: &DecoderConfig) -> Option<&Mamba2Config> {
    only(config, |layer| if let MixerConfig::Mamba2(c) = layer { Some(c) } else { None })
}

/// Limits on step sizes, where there are any.
pub fn limits(limits: (f32, f32)) -> Option<Value> {
    let high = if limits.1.is_finite() { float(limits.1) } else { json!({ "__float__": "Infinity" }) };
    (limits != (0.0, f32::INFINITY)).then(|| json!([float(limits.0), high]))
}

/// The Mamba-2 mixer of hybrids whose keys begin with `mamba_` (Bamba, Granite 4).
pub fn mamba2_keys(config: &DecoderConfig, mixer: &Mamba2Config) -> Map<String, Value> {
    map([
        ("mamba_n_heads", Some(json!(mixer.heads))),
        ("mamba_d_head", Some(json!(mixer.head_dim))),
        ("mamba_n_groups", Some(json!(mixer.groups))),
        ("mamba_d_state", Some(json!(mixer.state))),
        ("mamba_d_conv", Some(json!(mixer.conv_kernel))),
        ("mamba_expand", Some(json!((mixer.inner() / config.hidden_size).max(1)))),
        ("mamba_chunk_size", Some(json!(mixer.chunk))),
        ("mamba_conv_bias", Some(json!(mixer.conv_bias))),
        ("mamba_proj_bias", Some(json!(mixer.proj_bias))),
        ("time_step_limit", limits(mixer.dt_limit)),
    ])
}

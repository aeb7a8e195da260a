//! From the arguments of a training run and the shapes of its tensors to the keys of a configuration.

use serde_json::{Map, Value, json};

use crate::config::ConfigError;
use crate::families::fields::Fields;

type ShapeOf<'a> = &'a dyn Fn(&str) -> Option<Vec<usize>>;

/// The 8B study's Mamba layers, whose sizes its arguments do not hold: groups times state width.
const STUDY: (usize, usize) = (8, 128);

/// What is found while the layers are walked.
#[derive(Default)]
struct Found {
    pattern: String,
    /// Layer number of the first layer of each kind.
    mamba: Option<usize>,
    attention: Option<usize>,
    mlp: Option<usize>,
    paired: bool,
}

pub(super) fn describe(args: &Map<String, Value>, shape_of: ShapeOf) -> Result<Map<String, Value>, ConfigError> {
    let f = Fields::new("megatron", args);
    let embedding = shape_of("embedding.word_embeddings.weight").filter(|shape| shape.len() == 2);
    let Some(embedding) = embedding else {
        return Err(ConfigError::Missing { family: "megatron", key: "embedding.word_embeddings.weight" });
    };
    let found = walk(shape_of);
    if found.pattern.is_empty() {
        return Err(ConfigError::Missing { family: "megatron", key: "decoder.layers.0" });
    }
    let key = |i: usize, name: &str| format!("decoder.layers.{i}.{name}");
    let rows = |i: usize, name: &str| shape_of(&key(i, name)).and_then(|shape| shape.first().copied());
    let mut raw = Map::new();
    let mut set = |key: &str, value: Value| drop(raw.insert(key.to_string(), value));
    set("model_type", json!("megatron"));
    set("vocab_size", json!(embedding[0]));
    set("hidden_size", json!(embedding[1]));
    set("pattern", json!(found.pattern));
    set("paired", json!(found.paired));
    set("tie_word_embeddings", json!(shape_of("output_layer.weight").is_none()));
    let linear = found.attention.map(|i| key(i, "self_attention.linear_proj.bias")).or(found.mlp.map(|i| key(i, "mlp.linear_fc2.bias")));
    set("bias", json!(linear.is_some_and(|key| shape_of(&key).is_some())));
    set("normalization", json!(normalization(&f, shape_of)?));
    set("norm_eps", json!(f.float(&["norm_epsilon", "layernorm_epsilon"], 1e-5)?));
    if let Some(length) = f.maybe_size(&["max_position_embeddings", "seq_length"])? {
        set("max_position_embeddings", json!(length));
    }
    for name in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(value) = args.get(name) {
            set(name, value.clone());
        }
    }
    if let Some(i) = found.attention {
        attention(&f, rows(i, "self_attention.linear_qkv.weight").unwrap_or(0), &mut set)?;
    }
    if let Some(i) = found.mlp {
        let gated = f.flag(&["swiglu"], false)?;
        set("gated", json!(gated));
        set("intermediate_size", json!(rows(i, "mlp.linear_fc1.weight").unwrap_or(0) / if gated { 2 } else { 1 }));
        let squared = f.flag(&["squared_relu"], false)?;
        let tanh = f.flag(&["openai_gelu"], false)?;
        set(
            "hidden_act",
            json!(if gated {
                "silu"
            } else if squared {
                "relu2"
            } else if tanh {
                "gelu_pytorch_tanh"
            } else {
                "gelu"
            }),
        );
    }
    if let Some(i) = found.mamba {
        mamba(&f, i, shape_of, &mut set)?;
    }
    Ok(raw)
}

fn walk(shape_of: ShapeOf) -> Found {
    let mut found = Found::default();
    for i in 0.. {
        let has = |name: &str| shape_of(&format!("decoder.layers.{i}.{name}")).is_some();
        let (mamba, attention, mlp) = (has("mixer.A_log"), has("self_attention.linear_qkv.weight"), has("mlp.linear_fc1.weight"));
        if !(mamba || attention || mlp) {
            return found;
        }
        for (there, symbol, first) in [(mamba, 'M', &mut found.mamba), (attention, '*', &mut found.attention), (mlp, '-', &mut found.mlp)] {
            if there {
                found.pattern.push(symbol);
                first.get_or_insert(i);
            }
        }
        found.paired |= attention && mlp;
    }
    found
}

fn normalization(f: &Fields, shape_of: ShapeOf) -> Result<&'static str, ConfigError> {
    let biased = ["decoder.final_layernorm.bias", "decoder.final_norm.bias"].iter().any(|key| shape_of(key).is_some());
    Ok(match (biased, f.flag(&["apply_layernorm_1p"], false)?) {
        (true, true) => "LayerNorm1P",
        (true, false) => "LayerNorm",
        (false, false) => "RMSNorm",
        (false, true) => return Err(f.wrong("apply_layernorm_1p", "false for norms without a bias", true)),
    })
}

fn attention(f: &Fields, rows: usize, set: &mut impl FnMut(&str, Value)) -> Result<(), ConfigError> {
    let heads = f.size(&["num_attention_heads"])?;
    let grouped = f.flag(&["group_query_attention"], f.get(&["num_query_groups"]).is_some())?;
    let kv_heads = if grouped { f.size_or(&["num_query_groups"], heads)? } else { heads };
    let head_dim = rows / (heads + 2 * kv_heads);
    if head_dim * (heads + 2 * kv_heads) != rows || head_dim == 0 {
        let expected = format!("heads and groups that divide the {rows} rows of linear_qkv");
        return Err(f.wrong("num_attention_heads, num_query_groups", expected, format!("{heads}, {kv_heads}")));
    }
    set("num_attention_heads", json!(heads));
    set("num_key_value_heads", json!(kv_heads));
    set("head_dim", json!(head_dim));
    let rotary = match f.text(&["position_embedding_type"])? {
        Some("rope") => (head_dim as f64 * f.float(&["rotary_percent"], 1.0)?) as usize,
        Some("none") => 0,
        None => {
            return Err(ConfigError::Missing { family: "megatron", key: "position_embedding_type" });
        }
        Some(other) => return Err(f.wrong("position_embedding_type", "rope or none", other)),
    };
    set("rotary_dim", json!(rotary));
    set("rotary_base", json!(f.float(&["rotary_base"], 1e4)?));
    Ok(())
}

fn mamba(f: &Fields, i: usize, shape_of: ShapeOf, set: &mut impl FnMut(&str, Value)) -> Result<(), ConfigError> {
    let shape = |names: &[&str]| names.iter().find_map(|name| shape_of(&format!("decoder.layers.{i}.mixer.{name}")));
    let first = |names: &[&str]| shape(names).and_then(|shape| shape.first().copied()).unwrap_or(0);
    let (heads, inner, channels) = (first(&["A_log"]), first(&["norm.weight"]), first(&["conv1d.weight", "conv1d_weight"]));
    if heads == 0 || !inner.is_multiple_of(heads) || channels <= inner {
        let found = format!("A_log {heads}, norm {inner}, conv1d {channels}");
        return Err(f.wrong(format!("decoder.layers.{i}.mixer"), "heads that divide the inner width, B and C behind it", found));
    }
    let shared = (channels - inner) / 2;
    let (groups, state) = (f.maybe_size(&["mamba_num_groups"])?, f.maybe_size(&["mamba_state_dim"])?);
    let (groups, state) = match (groups, state) {
        (Some(groups), Some(state)) => (groups, state),
        (Some(groups), None) => (groups, shared / groups),
        (None, Some(state)) => (shared / state, state),
        (None, None) if shared == STUDY.0 * STUDY.1 => STUDY,
        // The shapes hold their product alone.
        (None, None) => return Err(ConfigError::Missing { family: "megatron", key: "mamba_num_groups" }),
    };
    if groups * state != shared {
        let expected = format!("groups and a state width whose product is {shared}, as the shapes say");
        return Err(f.wrong("mamba_num_groups, mamba_state_dim", expected, format!("{groups}, {state}")));
    }
    set("mamba_num_heads", json!(heads));
    set("mamba_head_dim", json!(inner / heads));
    set("mamba_num_groups", json!(groups));
    set("mamba_state_dim", json!(state));
    if let Some(taps) = shape(&["conv1d.weight", "conv1d_weight"]).and_then(|shape| shape.last().copied()) {
        set("conv_kernel", json!(taps));
    }
    Ok(())
}

#![doc = include_str!("README.md")]

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::{Family, Part, Place, express, kind_of, renamed};
use crate::config::{ConfigError, DecoderConfig, MixerConfig};
use crate::init::Init;
use crate::layers::{NormConfig, NormKind, RopeConfig, RopeScaling};
use crate::mixers::{Activation, AttentionConfig, Mamba2Config, MambaConfig, MlpConfig};
use crate::pattern::LayerKind;
use crate::presets::Preset;
use crate::weights::Rows;

mod presets;

/// mamba_ssm's own layout.
pub struct MambaSsm;

const KEYS: [&str; 20] = [
    "d_model",
    "dim",
    "d_intermediate",
    "n_layer",
    "n_layers",
    "n_groups",
    "vocab_size",
    "ssm_cfg",
    "attn_layer_idx",
    "attn_cfg",
    "rms_norm",
    "residual_in_fp32",
    "fused_add_norm",
    "pad_vocab_size_multiple",
    "tie_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "model_type",
    "norm_epsilon",
];

/// An MLP's width is rounded up to a multiple of this.
const MLP_MULTIPLE: usize = 128;

impl Family for MambaSsm {
    fn name(&self) -> &'static str {
        "mamba_ssm"
    }

    fn architecture(&self) -> &'static str {
        "MambaLMHeadModel"
    }

    fn recognises(&self, raw: &Map<String, Value>) -> bool {
        let has = |key: &str| raw.contains_key(key);
        // Mistral's file says `model_type: mamba`, like Hugging Face's, and means Mamba-2.
        let mistral = has("dim") && has("n_layers") && !has("hidden_size");
        match raw.get("model_type").and_then(Value::as_str) {
            Some(found) => mistral || found == self.name(),
            None => mistral || has("d_model") && has("n_layer"),
        }
    }

    fn keys(&self) -> Vec<&'static str> {
        KEYS.to_vec()
    }

    fn read(&'static self, raw: &Map<String, Value>) -> Result<DecoderConfig, ConfigError> {
        let f = Fields::new(self.name(), raw);
        let hidden_size = f.size(&["d_model", "dim"])?;
        let blocks = f.layers(&["n_layer", "n_layers"])?;
        if !f.flag(&["rms_norm"], true)? {
            return Err(f.wrong("rms_norm", "true: layer norms are in no published model of this layout", false));
        }
        let ssm = inner(raw, "ssm_cfg");
        let ssm = Fields::new(self.name(), &ssm);
        let mistral = raw.contains_key("dim");
        let mixer = match ssm.text(&["layer"])? {
            None | Some("Mamba1") if !mistral => MixerConfig::Mamba(mamba(&ssm, hidden_size)?),
            None | Some("Mamba2") => MixerConfig::Mamba2(mamba2(&ssm, hidden_size, f.size_or(&["n_groups"], 1)?)?),
            Some(other) => return Err(f.wrong("ssm_cfg.layer", "Mamba1 or Mamba2", other)),
        };
        let attends = f.indices(&["attn_layer_idx"], blocks)?;
        let attention = if attends.is_empty() { None } else { Some(attention(&inner(raw, "attn_cfg"))?) };
        let mlp = match f.count(&["d_intermediate"])? {
            0 => None,
            width => Some(MlpConfig {
                intermediate: width.next_multiple_of(MLP_MULTIPLE),
                activation: Activation::Silu,
                gated: true,
                bias: false,
            }),
        };
        let mut layers = Vec::new();
        for i in 0..blocks {
            layers.push(match &attention {
                Some(attention) if attends.contains(&i) => MixerConfig::Attention(attention.clone()),
                _ => mixer.clone(),
            });
            layers.extend(mlp.clone().map(MixerConfig::Mlp));
        }
        // Tokenizers are not part of this layout: GPT-NeoX's has one special token, Mistral's begins with 1 and ends with 2.
        let (bos, eos) = if mistral { (Some(1), vec![2]) } else { (None, vec![0]) };
        let multiple = f.size_or(&["pad_vocab_size_multiple"], if mistral { 1 } else { 8 })?;
        Ok(DecoderConfig {
            vocab_size: f.size(&["vocab_size"])?.next_multiple_of(multiple),
            norm: NormConfig::rms(f.float(&["norm_epsilon"], 1e-5)? as f32),
            tie_embeddings: f.flag(&["tie_embeddings"], !mistral)?,
            bos: f.tokens("bos_token_id")?.first().copied().or(bos),
            eos: if raw.contains_key("eos_token_id") { f.tokens("eos_token_id")? } else { eos },
            init: Init::MambaSsm,
            ..DecoderConfig::sized(self, &f, layers, hidden_size)?
        })
    }

    fn express(&self, config: &DecoderConfig) -> Option<Map<String, Value>> {
        if config.norm.kind != NormKind::Rms {
            return None;
        }
        let mlp = express::mlp(config);
        let step = if mlp.is_some() { 2 } else { 1 };
        let blocks = config.layers.len() / step;
        let attends: Vec<usize> = (0..blocks).filter(|i| config.layers[step * i].kind() == LayerKind::Attention).collect();
        let mamba = express::only(config, |layer| if let MixerConfig::Mamba(c) = layer { Some(c) } else { None });
        let ssm = match (mamba, express::mamba2(config)) {
            (Some(m), None) => json!({ "d_state": m.state, "d_conv": m.conv_kernel, "expand": m.inner / config.hidden_size,
                                       "dt_rank": m.dt_rank, "conv_bias": m.conv_bias, "bias": m.proj_bias }),
            (None, Some(m)) => {
                let mut keys = json!({ "layer": "Mamba2", "d_state": m.state, "d_conv": m.conv_kernel, "headdim": m.head_dim,
                    "ngroups": m.groups, "expand": m.inner() / config.hidden_size, "chunk_size": m.chunk,
                    "conv_bias": m.conv_bias, "bias": m.proj_bias });
                if let Some(limits) = express::limits(m.dt_limit) {
                    keys["dt_limit"] = limits;
                }
                keys
            }
            (None, None) => json!({}),
            _ => return None,
        };
        let attn = express::attention(config).map(|a| {
            json!({ "causal": true, "num_heads": a.heads, "num_heads_kv": a.kv_heads, "head_dim": a.head_dim,
                    "d_conv": a.conv_kernel.unwrap_or(0), "qkv_proj_bias": a.qkv_bias, "out_proj_bias": a.out_bias,
                    "rotary_emb_dim": a.rope.as_ref().map_or(0, |rope| rope.dim),
                    "rotary_emb_base": a.rope.as_ref().map_or(1e4, |rope| rope.theta), "softmax_scale": a.scale.map(express::float) })
        });
        Some(express::map([
            ("d_model", Some(json!(config.hidden_size))),
            ("d_intermediate", Some(json!(mlp.map_or(0, |mlp| mlp.intermediate)))),
            ("n_layer", Some(json!(blocks))),
            ("vocab_size", Some(json!(config.vocab_size))),
            ("ssm_cfg", Some(ssm)),
            ("attn_layer_idx", Some(json!(attends))),
            ("attn_cfg", Some(attn.unwrap_or_else(|| json!({})))),
            ("rms_norm", Some(json!(true))),
            ("residual_in_fp32", Some(json!(true))),
            ("fused_add_norm", Some(json!(true))),
            ("pad_vocab_size_multiple", Some(json!(1))),
            ("tie_embeddings", Some(json!(config.tie_embeddings))),
            ("norm_epsilon", (config.norm.eps != 1e-5).then(|| express::float(config.norm.eps))),
        ]))
    }

    fn write(&self, config: &DecoderConfig, json: &mut Map<String, Value>) {
        let padded = |json: &Map<String, Value>| {
            let size = |key| json.get(key).and_then(Value::as_u64).map(|n| n as usize);
            Some(size("vocab_size")?.next_multiple_of(size("pad_vocab_size_multiple").unwrap_or(8).max(1)))
        };
        if padded(json) != Some(config.vocab_size) {
            json.insert("vocab_size".into(), config.vocab_size.into());
            json.insert("pad_vocab_size_multiple".into(), 1.into());
        }
        json.insert("tie_embeddings".into(), config.tie_embeddings.into());
    }

    fn place(&self, config: &DecoderConfig, part: Part, name: &str) -> Place {
        let block = |i: usize| format!("backbone.layers.{}", i * self.blocks(config) / config.layers.len());
        match part {
            Part::Embeddings => Place::at(format!("backbone.embedding.{name}")).or(format!("backbone.embeddings.{name}")),
            Part::Norm(i) if kind_of(config, part) == Some(LayerKind::Mlp) => Place::at(format!("{}.norm2.{name}", block(i))),
            Part::Norm(i) => Place::at(format!("{}.norm.{name}", block(i))),
            Part::Mixer(i) => mixer(&config.layers[i], &block(i), name),
            Part::FinalNorm => Place::at(format!("backbone.norm_f.{name}")),
            Part::Head => Place::at("lm_head.weight"),
        }
    }

    /// mamba_ssm loads strictly, and its files hold both names of the one tensor.
    fn stores_tied_head(&self) -> bool {
        true
    }

    fn blocks(&self, config: &DecoderConfig) -> usize {
        let mlps = config.layers.iter().filter(|layer| layer.kind() == LayerKind::Mlp).count();
        config.layers.len() - mlps
    }

    fn in_transformers(&self) -> bool {
        false
    }

    fn tokenizer(&self, config: &DecoderConfig) -> Option<&'static str> {
        // 50277 ids, padded.
        (50277..=50432).contains(&config.vocab_size).then_some("EleutherAI/gpt-neox-20b")
    }

    fn presets(&self) -> Vec<Preset> {
        presets::presets()
    }
}

/// A nested object; empty when it is absent.
fn inner(raw: &Map<String, Value>, key: &str) -> Map<String, Value> {
    raw.get(key).and_then(Value::as_object).cloned().unwrap_or_default()
}

fn mamba(f: &Fields, d: usize) -> Result<MambaConfig, ConfigError> {
    let dt_rank = match f.get(&["dt_rank"]) {
        Some((_, value)) if value.as_str() == Some("auto") => d.div_ceil(16),
        _ => f.size_or(&["dt_rank"], d.div_ceil(16))?,
    };
    Ok(MambaConfig {
        inner: f.size_or(&["expand"], 2)? * d,
        state: f.size_or(&["d_state"], 16)?,
        dt_rank,
        conv_kernel: f.size_or(&["d_conv"], 4)?,
        conv_bias: f.flag(&["conv_bias"], true)?,
        proj_bias: f.flag(&["bias"], false)?,
    })
}

fn mamba2(f: &Fields, d: usize, groups: usize) -> Result<Mamba2Config, ConfigError> {
    let inner = f.size_or(&["expand"], 2)? * d;
    // Choices that no published model makes.
    for (key, usual) in [("D_has_hdim", false), ("norm_before_gate", false), ("rmsnorm", true)] {
        if f.flag(&[key], usual)? != usual {
            return Err(f.wrong(format!("ssm_cfg.{key}"), usual.to_string(), !usual));
        }
    }
    if f.maybe_size(&["d_ssm"])?.is_some_and(|width| width != inner) {
        return Err(f.wrong("ssm_cfg.d_ssm", format!("expand * d_model = {inner}"), "another width"));
    }
    let head_dim = f.size_or(&["headdim"], 64)?;
    f.divides("expand * d_model", inner, "ssm_cfg.headdim", head_dim)?;
    let groups = f.size_or(&["ngroups"], groups)?;
    f.divides("heads", inner / head_dim, "ssm_cfg.ngroups", groups)?;
    Ok(Mamba2Config {
        heads: inner / head_dim,
        head_dim,
        groups,
        state: f.size_or(&["d_state"], 128)?,
        conv_kernel: f.size_or(&["d_conv"], 4)?,
        conv_bias: f.flag(&["conv_bias"], true)?,
        proj_bias: f.flag(&["bias"], false)?,
        dt_limit: f.dt_limit(&["dt_limit"])?,
        chunk: f.size_or(&["chunk_size"], 256)?,
        norm_eps: 1e-5,
    })
}

fn attention(raw: &Map<String, Value>) -> Result<AttentionConfig, ConfigError> {
    let f = Fields::new(MambaSsm.name(), raw);
    if f.count(&["mlp_dim"])? > 0 {
        return Err(f.wrong("attn_cfg.mlp_dim", "0: attention with an MLP inside is in no published model", "a width"));
    }
    if !f.flag(&["causal"], true)? {
        return Err(f.wrong("attn_cfg.causal", "true", false));
    }
    if f.flag(&["rotary_emb_interleaved"], false)? {
        return Err(f.wrong("attn_cfg.rotary_emb_interleaved", "false", true));
    }
    let heads = f.size(&["num_heads"])?;
    let kv_heads = f.size_or(&["num_heads_kv"], heads)?;
    f.divides("attn_cfg.num_heads", heads, "attn_cfg.num_heads_kv", kv_heads)?;
    let head_dim = f.size(&["head_dim"])?;
    let rope = match f.count(&["rotary_emb_dim"])? {
        0 => None,
        dim if dim % 2 == 0 && dim <= head_dim => {
            Some(RopeConfig { theta: f.float(&["rotary_emb_base"], 1e4)?, dim, scaling: RopeScaling::Default })
        }
        dim => return Err(f.wrong("attn_cfg.rotary_emb_dim", format!("an even number up to head_dim = {head_dim}"), dim)),
    };
    let scale = f.float(&["softmax_scale"], 0.0)? as f32;
    Ok(AttentionConfig {
        heads,
        kv_heads,
        head_dim,
        rope,
        scale: (scale != 0.0).then_some(scale),
        qkv_bias: f.flag(&["qkv_proj_bias"], true)?,
        out_bias: f.flag(&["out_proj_bias"], true)?,
        conv_kernel: Some(f.count(&["d_conv"])?).filter(|taps| *taps > 0),
    })
}

fn mixer(layer: &MixerConfig, block: &str, name: &str) -> Place {
    let (module, leaf) = name.split_once('.').unwrap_or((name, ""));
    match layer {
        MixerConfig::Mamba(_) | MixerConfig::Mamba2(_) => Place::at(format!("{block}.mixer.{}", renamed(name))),
        MixerConfig::Mlp(mlp) => {
            let f = mlp.intermediate;
            match module {
                "up_proj" => Place::at(format!("{block}.mlp.fc1.{leaf}")).rows(Rows::run(0, f, 2 * f)),
                "gate_proj" => Place::at(format!("{block}.mlp.fc1.{leaf}")).rows(Rows::run(f, f, 2 * f)),
                _ => Place::at(format!("{block}.mlp.fc2.{leaf}")),
            }
        }
        MixerConfig::Attention(attention) => {
            let (q, kv) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
            let run = |start, len| Place::at(format!("{block}.mixer.in_proj.{leaf}")).rows(Rows::run(start, len, q + 2 * kv));
            match module {
                "q_proj" => run(0, q),
                "k_proj" => run(q, kv),
                "v_proj" => run(q + kv, kv),
                "o_proj" => Place::at(format!("{block}.mixer.out_proj.{leaf}")),
                _ => Place::at(format!("{block}.mixer.{name}")),
            }
        }
    }
}

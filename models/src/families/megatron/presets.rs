//! The models of the 8B study (arXiv 2406.07887).

use serde_json::{Value, json};

use crate::presets::Preset;

/// `allocate(56, 0.08, 0.5)`.
const HYBRID: &str = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-";

fn model(pattern: &str, kv_heads: usize) -> Value {
    json!({
        "model_type": "megatron", "vocab_size": 256000, "hidden_size": 4096, "pattern": pattern, "paired": false,
        "num_attention_heads": 32, "num_key_value_heads": kv_heads, "head_dim": 128, "rotary_dim": 0, "intermediate_size": 16384,
        "hidden_act": "gelu", "gated": false, "normalization": "RMSNorm", "norm_eps": 1e-5, "mamba_num_heads": 128,
        "mamba_head_dim": 64, "mamba_num_groups": 8, "mamba_state_dim": 128, "conv_kernel": 4, "tie_word_embeddings": false,
    })
}

pub(super) fn presets() -> Vec<Preset> {
    let hybrid = |name, repository| Preset::new(name, repository, 8_654_517_248, model(HYBRID, 8));
    let mut transformer = model(&"*-".repeat(32), 32);
    for (key, value) in
        [("paired", json!(true)), ("rotary_dim", json!(64)), ("hidden_act", json!("relu2")), ("normalization", json!("LayerNorm1P"))]
    {
        transformer[key] = value;
    }
    vec![
        Preset::new("mamba2-8b-3t-4k", "nvidia/mamba2-8b-3t-4k", 8_236_999_680, model(&"M".repeat(56), 8)),
        hybrid("mamba2-hybrid-8b-3t-4k", "nvidia/mamba2-hybrid-8b-3t-4k"),
        hybrid("mamba2-hybrid-8b-3t-32k", "nvidia/mamba2-hybrid-8b-3t-32k"),
        hybrid("mamba2-hybrid-8b-3t-128k", "nvidia/mamba2-hybrid-8b-3t-128k"),
        Preset::new("gpt3-8b-multi-3.5t-base", "nvidia/gpt3-8b-multi-3.5t-base", 8_540_135_424, transformer),
    ]
}

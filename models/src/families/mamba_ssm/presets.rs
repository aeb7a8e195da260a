//! The models of arXiv 2312.00752 and 2405.21060 in their authors' layout.

use serde_json::{Value, json};

use crate::presets::Preset;

fn model(width: usize, layers: usize, multiple: usize) -> Value {
    json!({
        "d_model": width, "d_intermediate": 0, "n_layer": layers, "vocab_size": 50277, "ssm_cfg": {}, "attn_layer_idx": [],
        "attn_cfg": {}, "rms_norm": true, "residual_in_fp32": true, "fused_add_norm": true, "pad_vocab_size_multiple": multiple,
        "tie_embeddings": true, "eos_token_id": 0,
    })
}

fn mamba(name: &'static str, repository: &'static str, parameters: usize, width: usize, layers: usize) -> Preset {
    Preset::new(name, repository, parameters, model(width, layers, 8))
}

fn mamba2(name: &'static str, repository: &'static str, parameters: usize, width: usize, layers: usize) -> Preset {
    let mut config = model(width, layers, 16);
    config["ssm_cfg"] = json!({ "layer": "Mamba2" });
    Preset::new(name, repository, parameters, config)
}

pub(super) fn presets() -> Vec<Preset> {
    let mut mamba2attn = mamba2("mamba2attn-2.7b", "state-spaces/mamba2attn-2.7b", 2_697_590_880, 2560, 64);
    mamba2attn.config["attn_layer_idx"] = json!([9, 18, 27, 36, 45, 56]);
    mamba2attn.config["attn_cfg"] = json!({
        "causal": true, "d_conv": 4, "head_dim": 128, "num_heads": 30, "out_proj_bias": false, "qkv_proj_bias": false,
        "rotary_emb_dim": 64,
    });
    let mut transformerpp = mamba2("transformerpp-2.7b", "state-spaces/transformerpp-2.7b", 2_666_457_600, 2560, 32);
    transformerpp.config["d_intermediate"] = json!(6912);
    transformerpp.config["attn_layer_idx"] = (0..32).collect::<Vec<usize>>().into();
    transformerpp.config["attn_cfg"] = json!({
        "causal": true, "head_dim": 80, "num_heads": 32, "out_proj_bias": false, "qkv_proj_bias": false, "rotary_emb_dim": 40,
    });
    vec![
        mamba("mamba-130m", "state-spaces/mamba-130m", 129_135_360, 768, 24),
        mamba("mamba-370m", "state-spaces/mamba-370m", 371_516_416, 1024, 48),
        mamba("mamba-790m", "state-spaces/mamba-790m", 793_204_224, 1536, 48),
        mamba("mamba-1.4b", "state-spaces/mamba-1.4b", 1_372_178_432, 2048, 48),
        mamba("mamba-2.8b", "state-spaces/mamba-2.8b", 2_768_345_600, 2560, 64),
        mamba("mamba-2.8b-slimpj", "state-spaces/mamba-2.8b-slimpj", 2_768_345_600, 2560, 64),
        mamba2("mamba2-130m", "state-spaces/mamba2-130m", 128_989_632, 768, 24),
        mamba2("mamba2-370m", "state-spaces/mamba2-370m", 368_346_624, 1024, 48),
        mamba2("mamba2-780m", "state-spaces/mamba2-780m", 780_161_280, 1536, 48),
        mamba2("mamba2-1.3b", "state-spaces/mamba2-1.3b", 1_343_757_312, 2048, 48),
        mamba2("mamba2-2.7b", "state-spaces/mamba2-2.7b", 2_702_599_680, 2560, 64),
        mamba2attn,
        transformerpp,
    ]
}

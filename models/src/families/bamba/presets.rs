//! Bamba 9B.

use serde_json::json;

use crate::presets::Preset;

pub(super) fn presets() -> Vec<Preset> {
    let config = json!({
        "model_type": "bamba", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "attn_layer_indices": [9, 18, 27],
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "attn_rotary_emb": 64, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_n_groups": 1,
        "mamba_d_state": 128, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256, "mamba_conv_bias": true,
        "mamba_proj_bias": false, "tie_word_embeddings": false, "max_position_embeddings": 4096, "bos_token_id": 128000,
        "eos_token_id": 128001,
    });
    vec![
        Preset::new("bamba-9b-v1", "ibm-ai-platform/Bamba-9B-v1", 9_780_235_392, config.clone()),
        Preset::new("bamba-9b-v2", "ibm-ai-platform/Bamba-9B-v2", 9_780_235_392, config),
    ]
}

//! Nemotron-H 8B (arXiv 2504.03624).

use serde_json::json;

use crate::presets::Preset;

pub(super) fn presets() -> Vec<Preset> {
    let config = json!({
        "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 4096,
        "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", "num_hidden_layers": 52,
        "num_attention_heads": 32, "num_key_value_heads": 8, "attention_head_dim": 128, "intermediate_size": 21504,
        "mlp_hidden_act": "relu2", "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128,
        "conv_kernel": 4, "chunk_size": 128, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": false, "bos_token_id": 1,
        "eos_token_id": 2,
    });
    vec![Preset::new("nemotron-h-8b", "nvidia/Nemotron-H-8B-Base-8K", 8_100_852_736, config)]
}

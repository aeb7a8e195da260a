//! Mamba-2 models in the Hugging Face layout.

use serde_json::json;

use crate::presets::Preset;

fn pile(name: &'static str, repository: &'static str, parameters: usize, width: usize, layers: usize) -> Preset {
    let config = json!({
        "model_type": "mamba2", "vocab_size": 50288, "hidden_size": width, "num_hidden_layers": layers, "num_heads": width / 32,
        "head_dim": 64, "state_size": 128, "n_groups": 1, "expand": 2, "conv_kernel": 4, "chunk_size": 256, "use_bias": false,
        "use_conv_bias": true, "layer_norm_epsilon": 1e-5, "residual_in_fp32": true, "tie_word_embeddings": true,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    });
    Preset::new(name, repository, parameters, config)
}

pub(super) fn presets() -> Vec<Preset> {
    let codestral = json!({
        "model_type": "mamba2", "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128, "head_dim": 64,
        "state_size": 128, "n_groups": 8, "expand": 2, "conv_kernel": 4, "chunk_size": 256, "use_bias": false, "use_conv_bias": true,
        "layer_norm_epsilon": 1e-5, "norm_before_gate": true, "residual_in_fp32": true, "tie_word_embeddings": false,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    });
    vec![
        pile("mamba2-130m-hf", "AntonV/mamba2-130m-hf", 128_989_632, 768, 24),
        pile("mamba2-370m-hf", "AntonV/mamba2-370m-hf", 368_346_624, 1024, 48),
        pile("mamba2-780m-hf", "AntonV/mamba2-780m-hf", 780_161_280, 1536, 48),
        pile("mamba2-1.3b-hf", "AntonV/mamba2-1.3b-hf", 1_343_757_312, 2048, 48),
        pile("mamba2-2.7b-hf", "AntonV/mamba2-2.7b-hf", 2_702_599_680, 2560, 64),
        Preset::new("mamba-codestral-7b", "mistralai/Mamba-Codestral-7B-v0.1", 7_285_403_648, codestral),
    ]
}

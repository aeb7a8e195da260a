//! The Mamba models of arXiv 2312.00752 in the Hugging Face layout.

use serde_json::json;

use crate::presets::Preset;

fn pile(name: &'static str, repository: &'static str, parameters: usize, width: usize, layers: usize) -> Preset {
    let config = json!({
        "model_type": "mamba", "vocab_size": 50280, "hidden_size": width, "num_hidden_layers": layers, "state_size": 16, "expand": 2,
        "intermediate_size": 2 * width, "conv_kernel": 4, "time_step_rank": width / 16, "use_bias": false, "use_conv_bias": true,
        "layer_norm_epsilon": 1e-5, "residual_in_fp32": true, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
        "initializer_range": 0.1,
    });
    Preset::new(name, repository, parameters, config)
}

pub(super) fn presets() -> Vec<Preset> {
    vec![
        pile("mamba-130m-hf", "state-spaces/mamba-130m-hf", 129_135_360, 768, 24),
        pile("mamba-370m-hf", "state-spaces/mamba-370m-hf", 371_516_416, 1024, 48),
        pile("mamba-790m-hf", "state-spaces/mamba-790m-hf", 793_204_224, 1536, 48),
        pile("mamba-1.4b-hf", "state-spaces/mamba-1.4b-hf", 1_372_178_432, 2048, 48),
        pile("mamba-2.8b-hf", "state-spaces/mamba-2.8b-hf", 2_768_345_600, 2560, 64),
    ]
}

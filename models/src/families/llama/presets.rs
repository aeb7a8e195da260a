//! TinyLlama (arXiv 2401.02385) and SmolLM.

use serde_json::{Value, json};

use crate::presets::{Preset, Tried};

fn model(width: usize, layers: usize, heads: [usize; 2], mlp: usize, vocab: usize, theta: f64) -> Value {
    json!({
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "intermediate_size": mlp, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "rope_theta": theta, "tie_word_embeddings": vocab == 49152, "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    })
}

pub(super) fn presets() -> Vec<Preset> {
    let with = |mut config: Value, bos: u32, eos: u32, length: u32| {
        config["bos_token_id"] = json!(bos);
        config["eos_token_id"] = json!(eos);
        config["max_position_embeddings"] = json!(length);
        config
    };
    let smol = |name, repository, parameters, width, layers, heads, mlp, theta, length| {
        Preset::new(name, repository, parameters, with(model(width, layers, heads, mlp, 49152, theta), 0, 0, length))
    };
    let smol2 = Preset {
        tried: Tried::Weights,
        ..smol("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", 134_515_008, 576, 30, [9, 3], 1536, 1e5, 8192)
    };
    vec![
        smol("smollm-135m", "HuggingFaceTB/SmolLM-135M", 134_515_008, 576, 30, [9, 3], 1536, 1e4, 2048),
        smol("smollm-360m", "HuggingFaceTB/SmolLM-360M", 361_821_120, 960, 32, [15, 5], 2560, 1e4, 2048),
        smol("smollm-1.7b", "HuggingFaceTB/SmolLM-1.7B", 1_711_376_384, 2048, 24, [32, 32], 8192, 1e4, 2048),
        smol2,
        Preset::new(
            "tinyllama-1.1b",
            "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
            1_100_048_384,
            with(model(2048, 22, [32, 4], 5632, 32000, 1e4), 1, 2, 2048),
        ),
    ]
}

//! Pythia (arXiv 2304.01373).

use serde_json::json;

use crate::presets::Preset;

fn pythia(name: &'static str, repository: &'static str, parameters: usize, sizes: [usize; 4]) -> Preset {
    let [width, layers, heads, vocab] = sizes;
    let config = json!({
        "model_type": "gpt_neox", "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": true, "tie_word_embeddings": false, "max_position_embeddings": 2048, "bos_token_id": 0,
        "eos_token_id": 0, "initializer_range": 0.02,
    });
    Preset::new(name, repository, parameters, config)
}

pub(super) fn presets() -> Vec<Preset> {
    vec![
        pythia("pythia-14m", "EleutherAI/pythia-14m", 14_067_712, [128, 6, 4, 50304]),
        pythia("pythia-31m", "EleutherAI/pythia-31m", 30_494_720, [256, 6, 8, 50304]),
        pythia("pythia-70m", "EleutherAI/pythia-70m", 70_426_624, [512, 6, 8, 50304]),
        pythia("pythia-160m", "EleutherAI/pythia-160m", 162_322_944, [768, 12, 12, 50304]),
        pythia("pythia-410m", "EleutherAI/pythia-410m", 405_334_016, [1024, 24, 16, 50304]),
        pythia("pythia-1b", "EleutherAI/pythia-1b", 1_011_781_632, [2048, 16, 8, 50304]),
        pythia("pythia-1.4b", "EleutherAI/pythia-1.4b", 1_414_647_808, [2048, 24, 16, 50304]),
        pythia("pythia-2.8b", "EleutherAI/pythia-2.8b", 2_775_208_960, [2560, 32, 32, 50304]),
        pythia("pythia-6.9b", "EleutherAI/pythia-6.9b", 6_857_302_016, [4096, 32, 32, 50432]),
        pythia("pythia-12b", "EleutherAI/pythia-12b", 11_846_072_320, [5120, 36, 40, 50688]),
    ]
}

//! Shared by the tests of this crate.
#![allow(dead_code)]

pub mod archive;
pub mod watched;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use terrarium_kernels::backend::CpuBackend;
use terrarium_models::{Decoder, DecoderConfig};

pub type B = CpuBackend;

/// A real checkpoint that a clone may not have; says so when it is skipped.
pub fn stories() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/models/stories260k-hf");
    let found = dir.join("model.safetensors").is_file();
    if !found {
        eprintln!("skipped: {} is not there", dir.display());
    }
    found.then_some(dir)
}

/// A small hybrid: Mamba-2, attention and MLP layers.
pub const HYBRID: &str = r#"{"model_type": "nemotron_h", "vocab_size": 97, "hidden_size": 32, "hybrid_override_pattern": "M-*-M", "num_hidden_layers": 5,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "conv_kernel": 4, "chunk_size": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "mlp_hidden_act": "relu2",
    "time_step_limit": [0.0, Infinity], "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2}"#;

/// A small tied Transformer.
pub const LLAMA: &str = r#"{"model_type": "llama", "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}"#;

/// Cases of each property: PROPTEST_CASES, or as many as a test run has time for.
pub fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(512)
}

pub fn device() -> burn::tensor::Device<B> {
    Default::default()
}

pub fn random(config: &str, seed: u64) -> (DecoderConfig, Decoder<B>) {
    let config = DecoderConfig::from_json(config).expect("the test's config is right");
    let model = Decoder::init(&config, seed, &device());
    (config, model)
}

/// A model directory with random weights.
pub fn saved(config: &str, seed: u64) -> (tempfile::TempDir, DecoderConfig, Decoder<B>) {
    let (config, model) = random(config, seed);
    let dir = tempfile::tempdir().expect("a temporary directory");
    terrarium_runtime::save(dir.path(), &model, &config, &Default::default()).expect("saves");
    (dir, config, model)
}

pub fn write_file(dir: &Path, name: &str, tensors: &[(&str, Vec<f32>, Vec<usize>)]) {
    let tensors = tensors.iter().map(|(key, values, shape)| (key.to_string(), TensorData::new(values.clone(), shape.clone()))).collect();
    terrarium_runtime::write_safetensors(&dir.join(name), tensors, &BTreeMap::new()).expect("writes");
}

/// Rewrites a weights file through `change`.
pub fn edit_weights(dir: &Path, change: impl FnOnce(&mut Vec<(String, TensorData)>)) {
    let path = dir.join("model.safetensors");
    let (mut tensors, metadata) = terrarium_runtime::read_safetensors(&path).expect("reads");
    change(&mut tensors);
    terrarium_runtime::write_safetensors(&path, tensors, &metadata).expect("writes");
}

//! Builds a hybrid from a layer pattern, and one from ratios, and runs them.
//!
//! `cargo run --release --example hybrid_from_pattern`

use terrarium::burn::tensor::{Tensor, TensorData};
use terrarium::prelude::*;

struct Build;

impl BackendTask for Build {
    type Output = Result<(), Box<dyn std::error::Error>>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        // The keys are those of a Hugging Face config.json. A pattern names the layers ...
        let pattern = r#"{"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-M-",
            "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 32}"#;
        // ... or ratios spread them evenly, as in the 8B study: 8 % attention, half MLP, the rest Mamba-2.
        let ratios = pattern
            .replace(r#""hybrid_override_pattern": "M-M*-M-""#, r#""num_hidden_layers": 12, "attention_ratio": 0.08, "mlp_ratio": 0.5"#);

        for text in [pattern, &ratios] {
            let config = DecoderConfig::from_json(text)?;
            let model = Decoder::<B::InnerBackend>::init(&config, 0, device);
            let ids = Tensor::from_data(TensorData::new(vec![72i32, 101, 108, 108, 111], [1, 5]), device);
            let (logits, cache) = model.forward(ids, None, &Layout::full(1, 5));
            println!(
                "{:12} {:>7} parameters, logits {:?}, cache {} bytes",
                config.pattern(),
                config.parameters(),
                logits.dims(),
                cache.bytes()
            );
        }
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    with_backend(&DeviceSpec::Auto, Build)?
}

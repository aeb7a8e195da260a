//! Streams a sequence through a model in chunks: the cache is a value that can be kept, copied and cut.
//!
//! `cargo run --release --example stream_state`

use terrarium::burn::tensor::{Tensor, TensorData};
use terrarium::prelude::*;

struct Stream;

impl BackendTask for Stream {
    type Output = Result<(), Box<dyn std::error::Error>>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let config = DecoderConfig::from_json(
            r#"{"model_type": "mamba2", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16,
                "n_groups": 1, "state_size": 32, "tie_word_embeddings": true}"#,
        )?;
        let model = Decoder::<B>::init(&config, 0, device);
        let ids = |from: i32, len: i32| {
            let values: Vec<i32> = (from..from + len).map(|t| t * 37 % 256).collect();
            Tensor::from_data(TensorData::new(values, [1, len as usize]), device)
        };

        // All at once, and in chunks of any size: the same numbers.
        let (whole, _) = model.forward(ids(0, 96), None, &Layout::full(1, 96));
        let mut cache = None;
        let mut last = None;
        let mut start = 0;
        for len in [50, 1, 13, 32] {
            let (logits, next) = model.forward(ids(start, len), cache, &Layout::full(1, len as usize));
            start += len;
            last = Some(logits.narrow(1, len as usize - 1, 1));
            cache = Some(next);
        }
        let difference = (last.expect("four chunks ran") - whole.narrow(1, 95, 1)).abs().max().into_scalar();
        println!("last token, all at once against four chunks: largest difference {difference:?}");

        // A clone is a snapshot: two continuations of one state.
        let cache = cache.expect("four chunks ran");
        for id in [10, 20] {
            let (logits, _) = model.forward(ids(id, 1), Some(cache.clone()), &Layout::full(1, 1));
            println!("after token {}: best next token {:?}", id * 37 % 256, logits.argmax(2).into_scalar());
        }

        // Truncated back-propagation: the state flows on, the gradient stops here.
        let (logits, _) = model.forward(ids(96, 32), Some(cache.detach()), &Layout::full(1, 32));
        let gradients = logits.powi_scalar(2).mean().backward();
        let found = model.embeddings.weight.val().grad(&gradients).is_some();
        println!("gradient of the last chunk reaches the embedding: {found}");
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    with_backend(&DeviceSpec::Auto, Stream)?
}

//! Naming the tensor that first stopped being a number.

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use terrarium_kernels::KernelBackend;
use terrarium_models::Decoder;

use crate::data::Batch;

fn finite<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> bool {
    tensor.into_data().iter::<f32>().all(f32::is_finite)
}

/// Where a loss that is not finite comes from: a parameter, the output of a layer, or the logits.
///
/// Slow, since it runs the model once per layer; it is called once, when a run is about to stop.
pub(crate) fn locate<B: KernelBackend>(model: &Decoder<B>, batch: &Batch, device: &B::Device) -> String {
    let bad = |(path, data): (String, TensorData)| (!data.iter::<f32>().all(f32::is_finite)).then_some(path);
    if let Some(path) = model.tensors().into_iter().find_map(bad) {
        return format!("parameter {path}");
    }
    let ids = || Tensor::from_data(TensorData::new(batch.ids.clone(), [batch.rows, batch.length]), device);
    let layout = batch.layout();
    for depth in 0..=model.layers.len() {
        let mut upper = model.clone();
        upper.layers.truncate(depth);
        if !finite(upper.hidden(ids(), None, &layout).0) {
            let Some(layer) = depth.checked_sub(1) else { return "the output of embeddings".to_string() };
            return format!("the output of layers.{layer}");
        }
    }
    "the logits".to_string()
}

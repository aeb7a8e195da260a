//! The loss and its gradients.

use burn::module::Module;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};
use terrarium_models::Decoder;
use terrarium_train::data::{Batch, Document, Overflow, PackedRows};
use terrarium_train::gradients::Gradients;
use terrarium_train::loss;

use crate::common::{Inner, Train, model};

const TIED: &str = r#"{"model_type":"mamba2","vocab_size":41,"hidden_size":16,"num_hidden_layers":2,"head_dim":8,"num_heads":4,"expand":2,
    "n_groups":1,"state_size":8,"chunk_size":8,"tie_word_embeddings":true}"#;
const HYBRID: &str = r#"{"model_type":"nemotron_h","vocab_size":41,"hidden_size":16,"hybrid_override_pattern":"M*-","num_attention_heads":4,
    "num_key_value_heads":2,"head_dim":4,"intermediate_size":24,"mamba_num_heads":4,"mamba_head_dim":8,"n_groups":2,"ssm_state_size":8,"chunk_size":8}"#;

fn document(seed: u32, len: usize) -> Document {
    let ids = (0..len as u32).map(|n| (n * n * 7 + n * 3 + seed * 11) % 41).collect();
    Document { ids, learned: std::iter::once(0..len).collect(), overflow: Overflow::Split }
}

fn scalar(tensor: Tensor<Inner, 1>) -> f64 {
    tensor.into_data().iter::<f64>().next().unwrap()
}

fn assert_close(a: &Gradients<Inner>, b: &Gradients<Inner>, tolerance: f32) {
    assert_eq!(a.paths().collect::<Vec<_>>(), b.paths().collect::<Vec<_>>());
    for path in a.paths() {
        let (a, b) = (a.get(path).unwrap(), b.get(path).unwrap());
        let largest = b.clone().abs().max().into_scalar().max(1e-6);
        let difference = (a.clone() - b.clone()).abs().max().into_scalar();
        assert!(difference <= tolerance * largest, "{path}: {difference} of {largest}");
    }
}

fn sliced(model: &Decoder<Train>, batches: &[Batch]) -> (f64, Gradients<Inner>) {
    let mut grads = Gradients::default();
    let count: usize = batches.iter().map(Batch::labelled).sum();
    let sum = batches
        .iter()
        .map(|batch| scalar(loss::backward(model, batch, 1.0 / count as f64, 0, &mut grads, &Default::default())))
        .sum::<f64>();
    (sum / count as f64, grads)
}

#[test]
fn sliced_loss_and_gradients_are_those_of_plain_autodiff() {
    for table in [TIED, HYBRID] {
        let (model, _) = model(table, 1);
        let rows = PackedRows::pack(vec![document(0, 17), document(1, 9), document(2, 13)], 16);
        let batch = rows.batch(&(0..rows.len()).collect::<Vec<_>>());
        let (found, grads) = sliced(&model, std::slice::from_ref(&batch));

        let device = Default::default();
        let alone = loss::one_at_a_time();
        let ids = Tensor::<Train, 2, Int>::from_data(TensorData::new(batch.ids.clone(), [batch.rows, batch.length]), &device);
        let (logits, _) = model.forward(ids, None, &batch.layout());
        let logs = log_softmax(logits.reshape([batch.ids.len(), 41]), 1);
        let keep: Vec<f32> = batch.labels.iter().map(|label| if *label < 0 { 0.0 } else { 1.0 }).collect();
        let labels: Vec<i32> = batch.labels.iter().map(|label| (*label).max(0)).collect();
        let picked = logs.gather(1, Tensor::from_data(TensorData::new(labels, [batch.ids.len(), 1]), &device));
        let keep = Tensor::<Train, 2>::from_data(TensorData::new(keep, [batch.ids.len(), 1]), &device);
        let plain = (picked * keep).sum() * (-1.0 / batch.labelled() as f64);
        let expected = scalar(plain.clone().inner());
        let mut reference = Gradients::default();
        reference.add(&model, plain.backward());
        drop(alone);

        assert!((found - expected).abs() < 1e-5, "{found} against {expected}");
        assert_close(&grads, &reference, 2e-4);
        let evaluated = scalar(loss::evaluate(&burn::module::AutodiffModule::valid(&model), &batch, &device)) / batch.labelled() as f64;
        assert!((evaluated - expected).abs() < 1e-5);
    }
}

#[test]
fn accumulated_micro_batches_are_one_batch() {
    let (model, _) = model(HYBRID, 2);
    // Rows with unequal numbers of labels: a mean of means would be wrong here.
    let rows = PackedRows::pack(vec![document(0, 17), document(1, 5), document(2, 14), document(3, 9)], 16);
    let all: Vec<usize> = (0..rows.len()).collect();
    assert!(all.len() >= 3);
    let (one, grads_one) = sliced(&model, &[rows.batch(&all)]);
    let parts: Vec<Batch> = all.iter().map(|row| rows.batch(&[*row])).collect();
    let (many, grads_many) = sliced(&model, &parts);
    assert!((one - many).abs() < 1e-5, "{one} against {many}");
    assert_close(&grads_many, &grads_one, 2e-4);
}

#[test]
fn packed_documents_are_as_separate_ones() {
    for table in [TIED, HYBRID] {
        let (model, _) = model(table, 3);
        let documents = vec![document(0, 8), document(1, 6), document(2, 11), document(3, 4)];
        let packed = PackedRows::pack(documents.clone(), 32);
        assert_eq!(packed.len(), 1);
        let separate: Vec<Batch> = documents
            .into_iter()
            .map(|document| {
                let length = document.ids.len() - 1;
                PackedRows::pack(vec![document], length).batch(&[0])
            })
            .collect();
        let (together, grads) = sliced(&model, &[packed.batch(&[0])]);
        let (alone, reference) = sliced(&model, &separate);
        assert!((together - alone).abs() < 1e-5, "{together} against {alone}");
        assert_close(&grads, &reference, 5e-4);
    }
}

#[test]
fn every_parameter_has_a_gradient() {
    let (model, config) = model(HYBRID, 4);
    let rows = PackedRows::pack(vec![document(0, 17)], 16);
    let (_, grads) = sliced(&model, &[rows.batch(&[0])]);
    assert_eq!(grads.paths().count(), config.table().entries.len());
    assert_eq!(model.num_params(), config.parameters());
}

/// MLPs that run beside the attention before them, and layer norms.
const PARALLEL: &str = r#"{"model_type":"gpt_neox","vocab_size":41,"hidden_size":16,"num_hidden_layers":2,"num_attention_heads":4,"intermediate_size":24,
    "rotary_pct":0.5,"use_parallel_residual":true,"max_position_embeddings":64,"hidden_act":"gelu","tie_word_embeddings":false}"#;

#[test]
fn what_is_computed_again_gives_the_same_gradients() {
    for table in [TIED, HYBRID, PARALLEL] {
        let (model, _) = model(table, 2);
        let rows = PackedRows::pack(vec![document(0, 17), document(1, 9), document(2, 13)], 16);
        let batch = rows.batch(&(0..rows.len()).collect::<Vec<_>>());
        let (expected, reference) = sliced(&model, std::slice::from_ref(&batch));
        for segment in [1, 2, 3, 100] {
            let mut grads = Gradients::default();
            let labelled = batch.labelled() as f64;
            let sum = loss::backward(&model, &batch, 1.0 / labelled, segment, &mut grads, &Default::default());
            assert!((scalar(sum) / labelled - expected).abs() < 1e-6, "segments of {segment}");
            assert_close(&grads, &reference, 1e-5);
        }
    }
}

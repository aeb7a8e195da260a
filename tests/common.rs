//! What the tests share: small models, random ids, comparison, gradients by path.

use std::collections::BTreeMap;
use std::path::PathBuf;

use terrarium::burn::backend::Autodiff;
use terrarium::burn::module::{ModuleVisitor, Param};
use terrarium::burn::tensor::backend::{AutodiffBackend, Backend};
use terrarium::burn::tensor::{DType, Int, Tensor, TensorData};
use terrarium::models::params::PathTracker;
use terrarium::models::{Decoder, DecoderConfig};

/// The backend under test.
#[cfg(not(any(feature = "cuda", feature = "vulkan")))]
pub type B = terrarium::kernels::backend::CpuBackend;
#[cfg(all(feature = "vulkan", not(feature = "cuda")))]
pub type B = terrarium::kernels::backend::Vulkan;
#[cfg(feature = "cuda")]
pub type B = terrarium::kernels::backend::Cuda;
/// Its device.
pub type Device = <B as terrarium::burn::tensor::backend::BackendTypes>::Device;
/// The same with gradients.
pub type A = Autodiff<B>;

pub fn device() -> Device {
    Default::default()
}

pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Small models of every family, with odd head counts and grouped states.
pub fn configs() -> Vec<DecoderConfig> {
    let texts = [
        r#"{"model_type":"mamba2","vocab_size":61,"hidden_size":24,"num_hidden_layers":2,"head_dim":8,"num_heads":6,"expand":2,
            "n_groups":2,"state_size":10,"chunk_size":8,"tie_word_embeddings":true}"#,
        r#"{"model_type":"nemotron_h","vocab_size":61,"hidden_size":24,"hybrid_override_pattern":"M-M*-","num_attention_heads":6,
            "num_key_value_heads":2,"head_dim":4,"intermediate_size":40,"mamba_num_heads":6,"mamba_head_dim":4,"n_groups":2,
            "ssm_state_size":5,"chunk_size":8}"#,
        r#"{"model_type":"bamba","vocab_size":61,"hidden_size":24,"num_hidden_layers":3,"attn_layer_indices":[1],"num_attention_heads":6,
            "num_key_value_heads":3,"intermediate_size":40,"mamba_n_heads":6,"mamba_d_head":8,"mamba_n_groups":1,"mamba_d_state":7,
            "mamba_chunk_size":8}"#,
        r#"{"model_type":"llama","vocab_size":61,"hidden_size":24,"num_hidden_layers":2,"num_attention_heads":6,"num_key_value_heads":2,
            "head_dim":4,"intermediate_size":40,"tie_word_embeddings":true}"#,
        r#"{"model_type":"mamba","vocab_size":61,"hidden_size":24,"num_hidden_layers":2,"state_size":5,"time_step_rank":3}"#,
        r#"{"model_type":"gpt_neox","vocab_size":61,"hidden_size":24,"num_hidden_layers":2,"num_attention_heads":3,
            "intermediate_size":40,"rotary_pct":0.25}"#,
        r#"{"model_type":"granitemoehybrid","vocab_size":61,"hidden_size":24,"num_hidden_layers":3,"num_local_experts":0,
            "layer_types":["mamba","attention","mamba"],"num_attention_heads":6,"num_key_value_heads":3,"shared_intermediate_size":40,
            "mamba_n_heads":6,"mamba_d_head":8,"mamba_n_groups":1,"mamba_d_state":7,"mamba_chunk_size":8,"embedding_multiplier":3.0,
            "residual_multiplier":0.5,"attention_multiplier":0.25,"logits_scaling":2.0,"tie_word_embeddings":true}"#,
        r#"{"model_type":"nemotron","vocab_size":61,"hidden_size":24,"num_hidden_layers":2,"num_attention_heads":6,
            "num_key_value_heads":2,"head_dim":4,"intermediate_size":40}"#,
        r#"{"d_model":24,"n_layer":3,"vocab_size":61,"pad_vocab_size_multiple":1,"ssm_cfg":{"layer":"Mamba2","headdim":8,"d_state":7},
            "attn_layer_idx":[1],"attn_cfg":{"num_heads":3,"head_dim":10,"d_conv":4,"rotary_emb_dim":4,"qkv_proj_bias":false,
            "out_proj_bias":false}}"#,
        r#"{"d_model":24,"d_intermediate":40,"n_layer":2,"vocab_size":61,"pad_vocab_size_multiple":1,"attn_layer_idx":[1],
            "attn_cfg":{"num_heads":4,"num_heads_kv":2,"head_dim":6,"rotary_emb_dim":4}}"#,
    ];
    texts.into_iter().map(|text| DecoderConfig::from_json(text).unwrap()).collect()
}

/// Starting values make nearly linear models; larger ones make every parameter matter.
struct Loud(terrarium::models::init::RandomSource);

impl terrarium::models::ParamSource for Loud {
    fn param(&mut self, spec: &terrarium::models::ParamSpec) -> TensorData {
        let data = self.0.param(spec);
        if !spec.path.ends_with("weight") {
            return data;
        }
        let loud = match spec.shape.len() {
            1 => terrarium::models::ParamInit::Uniform { bound: 0.5 },
            _ => terrarium::models::ParamInit::Normal { std: 1.0 / (*spec.shape.last().unwrap() as f32).sqrt() },
        };
        let drawn = self.0.param(&terrarium::models::ParamSpec { init: loud, ..spec.clone() });
        let offset = if spec.shape.len() == 1 { 1.0 } else { 0.0 };
        let values: Vec<f32> = drawn.iter::<f32>().map(|v| v + offset).collect();
        TensorData::new(values, spec.shape.clone())
    }
}

pub fn model<T: terrarium::kernels::KernelBackend>(config: &DecoderConfig, seed: u64, device: &T::Device) -> Decoder<T> {
    model_in(DType::F32, config, seed, device)
}

pub fn model_in<T: terrarium::kernels::KernelBackend>(dtype: DType, config: &DecoderConfig, seed: u64, device: &T::Device) -> Decoder<T> {
    Decoder::build(config, &mut Loud(terrarium::models::init::RandomSource::new(seed)), dtype, device)
}

/// Ids that look random and are the same everywhere.
pub fn ids(seed: u32, count: usize, vocab: u32) -> Vec<i32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) % vocab) as i32
        })
        .collect()
}

pub fn tensor<T: Backend>(ids: &[i32], shape: [usize; 2], device: &T::Device) -> Tensor<T, 2, Int> {
    Tensor::from_data(TensorData::new(ids.to_vec(), shape), device)
}

pub fn floats<T: Backend, const D: usize>(tensor: Tensor<T, D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Fails when some element differs by more than `tolerance` of the largest expected one.
#[track_caller]
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: number of elements");
    let largest = expected.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    let mut worst = 0f32;
    for (f, e) in found.iter().zip(expected) {
        assert!(f.is_finite(), "{what}: {f}");
        worst = worst.max((f - e).abs());
    }
    assert!(worst <= tolerance * largest, "{what}: off by {worst:e}, largest value {largest:e}, allowed {:e}", tolerance * largest);
}

/// Gradients by parameter path.
pub fn gradients(model: &Decoder<A>, grads: &<A as AutodiffBackend>::Gradients) -> BTreeMap<String, Vec<f32>> {
    struct Collect<'a> {
        path: PathTracker,
        grads: &'a <A as AutodiffBackend>::Gradients,
        found: BTreeMap<String, Vec<f32>>,
    }
    impl ModuleVisitor<A> for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<A, D>>) {
            if let Some(grad) = param.val().grad(self.grads) {
                self.found.insert(self.path.path(), floats(grad));
            }
        }
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.path.enter(name, container_type);
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.exit();
        }
    }
    let mut collect = Collect { path: PathTracker::default(), grads, found: BTreeMap::new() };
    terrarium::burn::module::Module::visit(model, &mut collect);
    collect.found
}

#[track_caller]
pub fn assert_same_gradients(what: &str, found: &BTreeMap<String, Vec<f32>>, expected: &BTreeMap<String, Vec<f32>>, tolerance: f32) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}: parameters with a gradient");
    for (path, grad) in expected {
        assert_close(&format!("{what}: gradient of {path}"), &found[path], grad, tolerance);
    }
}

//! Decoding that is recorded, or chooses on the device, is decoding step by step.

use terrarium::burn::tensor::{Int, Tensor};
use terrarium::kernels::sample::SampleOptions;
use terrarium::models::{Decoder, DecoderConfig, Layout, StepPlace};
use terrarium::runtime::generate::Decoding;
use terrarium::runtime::sampling::{Sampler, Sampling};

use crate::common::*;

const STEPS: usize = 9;
const KNOWN: usize = 59;

/// Logits of each step for `rows`, which read what the plain model found likeliest.
fn plainly(model: &Decoder<B>, prompt: Tensor<B, 2, Int>, rows: &[usize]) -> (Vec<u32>, Vec<Vec<f32>>) {
    let [b, l] = prompt.dims();
    let best = |logits: &[f32]| logits.chunks(61).map(|row| terrarium::runtime::sampling::argmax(&row[..KNOWN])).collect::<Vec<u32>>();
    let (logits, cache) = model.forward(prompt, None, &Layout::full(b, l));
    let first = best(&floats(logits.narrow(1, l - 1, 1)));
    let first: Vec<u32> = rows.iter().map(|&row| first[row]).collect();
    let (mut next, mut cache) = (first.clone(), cache.select_rows(rows));
    let mut steps = Vec::new();
    for _ in 0..STEPS {
        let ids: Vec<i32> = next.iter().map(|&id| id as i32).collect();
        let (logits, after) = model.forward(tensor(&ids, [rows.len(), 1], &device()), Some(cache), &Layout::full(rows.len(), 1));
        cache = after;
        steps.push(floats(logits));
        next = best(steps.last().unwrap());
    }
    (first, steps)
}

fn decoding(model: &Decoder<B>, prompt: Tensor<B, 2, Int>, ahead: usize) -> Decoding<B> {
    let [b, l] = prompt.dims();
    let (_, cache) = model.hidden(prompt, None, &Layout::full(b, l));
    Decoding::new(model, cache, KNOWN, ahead, &device()).choosing()
}

/// Sizes whose parts of projections are read where they lie; a copy of an odd one has its sizes uploaded, and is not recorded.
fn even() -> Vec<DecoderConfig> {
    let texts = [
        r#"{"model_type":"mamba2","vocab_size":61,"hidden_size":32,"num_hidden_layers":2,"head_dim":8,"num_heads":8,"expand":2,
            "n_groups":2,"state_size":16,"chunk_size":8,"tie_word_embeddings":true}"#,
        r#"{"model_type":"mamba","vocab_size":61,"hidden_size":32,"num_hidden_layers":2,"state_size":8,"time_step_rank":4}"#,
        r#"{"model_type":"llama","vocab_size":61,"hidden_size":32,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,
            "intermediate_size":64,"max_position_embeddings":64}"#,
        r#"{"model_type":"nemotron_h","vocab_size":61,"hidden_size":32,"hybrid_override_pattern":"M*-","num_attention_heads":4,"num_key_value_heads":2,
            "head_dim":8,"intermediate_size":48,"mamba_num_heads":8,"mamba_head_dim":8,"n_groups":2,"ssm_state_size":16,"chunk_size":8}"#,
        r#"{"model_type":"gpt_neox","vocab_size":61,"hidden_size":32,"num_hidden_layers":2,"num_attention_heads":4,"intermediate_size":64,
            "rotary_pct":0.25}"#,
        r#"{"model_type":"gpt_neox","vocab_size":61,"hidden_size":32,"num_hidden_layers":2,"num_attention_heads":4,"intermediate_size":64,
            "hidden_act":"gelu_new","use_parallel_residual":false}"#,
        r#"{"model_type":"nemotron","vocab_size":61,"hidden_size":32,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,
            "head_dim":8,"intermediate_size":64}"#,
        r#"{"model_type":"megatron","vocab_size":61,"hidden_size":32,"pattern":"*-*-","paired":true,"num_attention_heads":4,"head_dim":8,
            "rotary_dim":4,"intermediate_size":64,"hidden_act":"relu2","normalization":"LayerNorm1P","tie_word_embeddings":false}"#,
    ];
    texts.into_iter().map(|text| DecoderConfig::from_json(text).unwrap()).collect()
}

fn wanted() -> Vec<DecoderConfig> {
    let only = std::env::var("TERRARIUM_FAMILY").ok();
    even().into_iter().chain(configs()).filter(|config| only.as_deref().is_none_or(|only| only == config.family.name())).collect()
}

#[test]
fn steps_on_the_device_are_those_of_the_host() {
    for config in wanted() {
        let model = model::<B>(&config, 21, &device());
        let prompt: Tensor<B, 2, Int> = tensor(&ids(4, 3 * 7, 61), [3, 7], &device());
        let (first, expected) = plainly(&model, prompt.clone(), &[0, 1, 2]);
        let name = config.family.name();
        // Chosen on the device, or given by the host.
        for host in [false, true] {
            let mut decoding = decoding(&model, prompt.clone(), STEPS);
            let mut next = first.clone();
            for (step, expected) in expected.iter().enumerate() {
                if host || step == 0 {
                    decoding.read(&next).unwrap()
                } else {
                    decoding.advance().unwrap()
                }
                assert_close(&format!("{name}, step {step}"), &decoding.logits().unwrap(), expected, 2e-5);
                next = decoding.chosen().unwrap().expect("finite");
            }
            // A recording of what cannot be recorded would repeat its first step.
            let recorded = decoding.recorded().is_some();
            assert!(!recorded || cfg!(feature = "cuda"), "{name}");
            assert!(recorded || !even().contains(&config) || !cfg!(feature = "cuda"), "{name}: {:?}", decoding.note());
        }
    }
}

#[test]
fn rows_leave_without_a_trace_on_others() {
    for config in wanted() {
        let model = model::<B>(&config, 22, &device());
        let prompt: Tensor<B, 2, Int> = tensor(&ids(5, 5 * 6, 61), [5, 6], &device());
        // Keys and values move once on the way.
        let mut decoding = decoding(&model, prompt.clone(), 4);
        let (mut next, _) = plainly(&model, prompt.clone(), &[0, 1, 2, 3, 4]);
        let mut rows = vec![0, 1, 2, 3, 4];
        // Some leave while the batch stays as it is, then it shrinks.
        for step in 0..STEPS {
            let kept: Vec<usize> = match step {
                4 => vec![0, 1, 3, 4],
                5 => vec![1, 3],
                7 => vec![1],
                _ => (0..rows.len()).collect(),
            };
            if kept.len() < rows.len() {
                decoding.keep(&kept);
                rows = kept.iter().map(|&i| rows[i]).collect();
                next = kept.iter().map(|&i| next[i]).collect();
            }
            if step == 0 || decoding.forgot() {
                decoding.read(&next).unwrap()
            } else {
                decoding.advance().unwrap()
            }
            let (_, expected) = plainly(&model, prompt.clone(), &rows);
            assert_close(&format!("{}, step {step}", config.family.name()), &decoding.logits().unwrap(), &expected[step], 2e-5);
            next = decoding.chosen().unwrap().expect("finite");
            assert_eq!((next.len(), decoding.rows()), (rows.len(), rows.len()));
        }
    }
}

/// Rows of different lengths, several documents, full buffers: a step at a place is one behind its context.
#[test]
fn steps_at_a_place_are_steps() {
    for config in wanted() {
        let model = model::<B>(&config, 23, &device());
        let name = config.family.name();
        let documents = [vec![-1, -1, 0, 0, 0, 0], vec![0, 0, 0, 1, 1, 1], vec![0; 6]].concat();
        let layouts = [Layout::full(3, 6), Layout::left_padded(&[2, 6, 5], 6), Layout::documents(3, 6, documents).unwrap()];
        for layout in layouts {
            let prompt: Tensor<B, 2, Int> = tensor(&ids(6, 3 * 6, 61), [3, 6], &device());
            let (_, mut cache) = model.hidden(prompt, None, &layout);
            let mut own = cache.clone().with_capacity(10);
            let mut place = StepPlace::new(&own.context, 10, &device());
            for step in 0..4 {
                let next: Tensor<B, 2, Int> = tensor(&ids(30 + step, 3, 61), [3, 1], &device());
                let (expected, after) = model.hidden(next.clone(), Some(cache), &Layout::full(3, 1));
                let (found, later) = model.step(next, own, &place);
                assert_close(&format!("{name}, {layout:?}, step {step}"), &floats(found), &floats(expected), 2e-5);
                (cache, own, place) = (after, later, place.advance());
                assert_eq!(own.context, cache.context);
            }
            for ((path, found), (_, expected)) in own.tensors().into_iter().zip(cache.tensors()) {
                assert_close(&format!("{name}, {layout:?}, {path}"), &floats(found), &floats(expected), 2e-5);
            }
        }
    }
}

/// Rows draw what their samplers would, also after others have left.
#[test]
fn draws_are_those_of_the_host() {
    let options = Sampling { temperature: 0.9, top_k: 20, top_p: 0.95, repetition_penalty: 1.0 };
    for config in wanted() {
        let model = model::<B>(&config, 24, &device());
        let prompt: Tensor<B, 2, Int> = tensor(&ids(7, 3 * 5, 61), [3, 5], &device());
        let mut samplers: Vec<Sampler> = (0..3).map(|seed| Sampler::new(options, 100 + seed).unwrap()).collect();
        let mut decoding = decoding(&model, prompt, STEPS);
        decoding.draw(SampleOptions { temperature: 0.9, top_k: 20, top_p: 0.95 }, &[(100, 0), (101, 0), (102, 0)]);
        let (mut rows, mut next) = (vec![0, 1, 2], vec![3, 4, 5]);
        for step in 0..STEPS {
            if step == 5 {
                decoding.keep(&[2]);
                (rows, next) = (vec![2], vec![next[2]]);
            }
            if step == 0 || decoding.forgot() {
                decoding.read(&next).unwrap()
            } else {
                decoding.advance().unwrap()
            }
            let mut logits = decoding.logits().unwrap();
            let drawn = decoding.chosen().unwrap().expect("finite");
            let choose = |(row, logits): (&usize, &mut [f32])| samplers[*row].sample(&mut logits[..KNOWN], &[], step).unwrap();
            let expected: Vec<u32> = rows.iter().zip(logits.chunks_mut(61)).map(choose).collect();
            assert_eq!(drawn, expected, "{}, step {step}", config.family.name());
            next = drawn;
        }
    }
}

#[test]
fn what_is_carried_can_be_read_at_any_step() {
    for config in wanted() {
        let model = model::<B>(&config, 23, &device());
        let prompt: Tensor<B, 2, Int> = tensor(&ids(6, 2 * 5, 61), [2, 5], &device());
        let mut decoding = decoding(&model, prompt.clone(), 3);
        let (_, mut cache) = model.forward(prompt, None, &Layout::full(2, 5));
        for step in 0..STEPS as u32 {
            let newest = [step + 3, 2 * step];
            decoding.read(&newest).unwrap();
            cache = model.forward(tensor(&newest.map(|id| id as i32), [2, 1], &device()), Some(cache), &Layout::full(2, 1)).1;
            let (context, carried) = decoding.state().unwrap();
            assert_eq!(context, cache.context);
            for ((name, found), (expected_name, expected)) in carried.into_iter().zip(cache.tensors()) {
                let what = format!("{}, step {step}: {name}", config.family.name());
                assert_eq!((&name, found.shape.to_vec()), (&expected_name, expected.dims().to_vec()), "{what}");
                assert_close(&what, &found.iter::<f32>().collect::<Vec<f32>>(), &floats(expected), 2e-5);
            }
        }
        assert_eq!(decoding.memory().is_some(), cfg!(feature = "cuda"));
    }
}

//! Adapters: every one learns, runs resume exactly, and merging gives the written model.

use std::path::Path;

use burn::tensor::TensorData;
use terrarium_kernels::backend::DeviceSpec;
use terrarium_models::{LoraConfig, LoraTargets};
use terrarium_runtime::{Layout, LoadOptions, SaveOptions, load};
use terrarium_train::data::{Document, Overflow, PackedRows};
use terrarium_train::gradients::Gradients;
use terrarium_train::optim::{AdamW, AdamWConfig};
use terrarium_train::{Outcome, Resume, RunConfig, RunOptions, StopFlag, loss, merge, run};

use crate::common::{Inner, Train, Watch, assert_same_run, config, model, options};

#[test]
fn every_adapter_tensor_gets_a_gradient_and_nothing_else_does() {
    let table = r#"{"model_type":"bamba","vocab_size":41,"hidden_size":16,"num_hidden_layers":2,"attn_layer_indices":[1],"num_attention_heads":4,
        "num_key_value_heads":2,"intermediate_size":24,"mamba_n_heads":4,"mamba_d_head":8,"mamba_n_groups":1,"mamba_d_state":8,"mamba_chunk_size":8}"#;
    let (model, _) = model(table, 1);
    let device = Default::default();
    let lora = LoraConfig { rank: 4, alpha: 8.0, targets: LoraTargets::All };
    let (mut model, report) = model.attach_lora(&lora, 5, &device).unwrap();
    let ids: Vec<u32> = (0..33).map(|n| (n * n * 5 + 3 * n) % 41).collect();
    let rows = PackedRows::pack(vec![Document { learned: std::iter::once(0..33).collect(), ids, overflow: Overflow::Split }], 32);
    let batch = rows.batch(&[0]);
    let mut optim = AdamW::<Inner>::new(AdamWConfig { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0 });
    // At the first step `b` is zero, and with it the gradient of `a`: one step later both learn.
    for step in 0..2 {
        let mut grads = Gradients::default();
        loss::backward::<Train>(&model, &batch, 1.0 / 32.0, 0, &mut grads, &device);
        assert_eq!(grads.paths().count(), 2 * report.adapted.len(), "only adapters have gradients");
        for path in &report.adapted {
            for (name, learns) in [("a", step > 0), ("b", true)] {
                let grad = grads.get(&format!("{path}.lora.{name}")).unwrap_or_else(|| panic!("{path}.lora.{name} has none"));
                let largest = grad.clone().abs().max().into_scalar();
                assert_eq!(largest > 0.0, learns, "step {step}, {path}.lora.{name}: {largest}");
            }
        }
        model = optim.step(model, grads, 1e-2, 1.0);
    }
}

/// A base model, a set of examples, and a run over them.
fn finetune(dir: &Path, overrides: &[&str]) -> RunConfig {
    let base = run(options(config(dir, &["train.steps=4"]), dir.join("base")), Vec::new()).unwrap().model_dir.unwrap();
    let lines =
        (0..30).map(|n| format!("{{\"prompt\": \"the {} \", \"completion\": \"cat sat on mat {n}\"}}\n", ["old", "warm", "cold"][n % 3]));
    let data = dir.join("data.jsonl");
    std::fs::write(&data, lines.collect::<String>()).unwrap();
    let mut config = RunConfig::finetune(&base.to_string_lossy(), vec![data]);
    let all = [
        "train.epochs=8",
        "train.sequence_length=32",
        "train.batch=2",
        "train.lr=1e-2",
        "train.eval_every=2",
        "lora.rank=4",
        "lora.alpha=8",
    ];
    all.iter().chain(overrides).for_each(|assignment| config.set(assignment).unwrap());
    config
}

fn weights(dir: &Path) -> Vec<(String, TensorData)> {
    load::<Inner>(dir, &LoadOptions::default(), &Default::default()).unwrap().model.tensors()
}

#[test]
fn adapters_are_trained_resumed_written_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let config = finetune(dir.path(), &[]);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    let watch = Watch::default();
    let straight = run(options(config.clone(), &a), vec![Box::new(watch.clone())]).unwrap();
    let steps = watch.steps.lock().unwrap();
    assert!(steps.len() >= 6, "{}", steps.len());
    assert!(steps.last().unwrap().loss < steps[0].loss - 0.3, "{} to {}", steps[0].loss, steps.last().unwrap().loss);

    let stop = StopFlag::new();
    let watch = Watch { stop: Some((3, stop.clone())), ..Watch::default() };
    let first = run(RunOptions { stop, ..options(config.clone(), &b) }, vec![Box::new(watch)]).unwrap();
    assert_eq!(first.outcome, Outcome::Interrupted);
    run(RunOptions { resume: Resume::Auto, ..options(config.clone(), &b) }, Vec::new()).unwrap();
    assert_same_run(&a, &b, straight.step);

    let base = config.base.unwrap().model;
    let merged = dir.path().join("merged");
    let report = merge(base.as_ref(), &straight.adapter_dir.unwrap(), &merged, &DeviceSpec::Cpu).unwrap();
    assert!(!report.adapted.is_empty());
    let (found, expected, before) = (weights(&merged), weights(&straight.model_dir.unwrap()), weights(base.as_ref()));
    assert_eq!(found, expected, "merging the adapter gives what the run wrote");
    assert_ne!(found, before);
}

#[test]
fn full_fine_tuning_moves_every_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = finetune(dir.path(), &["output.weights=last"]);
    config.lora = None;
    let base = config.base.clone().unwrap().model;
    let report = run(options(config, dir.path().join("full")), Vec::new()).unwrap();
    assert_eq!(report.adapter_dir, None);
    for ((path, before), (_, after)) in weights(base.as_ref()).into_iter().zip(weights(&report.model_dir.unwrap())) {
        assert_ne!(before, after, "{path} did not move");
    }
}

/// A base in its authors' layout, fused projections and all, ends as a model that transformers opens.
#[test]
fn bases_of_every_layout_are_fine_tuned() {
    for (table, family) in [
        (r#"{"d_model":16,"n_layer":2,"vocab_size":280,"ssm_cfg":{"d_state":4,"dt_rank":4}}"#, "mamba"),
        (
            r#"{"d_model":16,"d_intermediate":24,"n_layer":2,"vocab_size":280,"attn_layer_idx":[0,1],
                "attn_cfg":{"num_heads":2,"head_dim":8,"rotary_emb_dim":4,"qkv_proj_bias":false,"out_proj_bias":false}}"#,
            "bamba",
        ),
        (
            r#"{"model_type":"gpt_neox","vocab_size":280,"hidden_size":16,"num_hidden_layers":2,"num_attention_heads":2,
                "intermediate_size":24,"rotary_pct":0.5}"#,
            "gpt_neox",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut config = finetune(dir.path(), &["output.weights=last", "train.epochs=4"]);
        let with_tokenizer = config.base.clone().unwrap().model;
        let (model, native) = model(table, 2);
        let base = dir.path().join("native");
        let save = SaveOptions { layout: Layout::Own, files_from: Some((&with_tokenizer).into()), ..SaveOptions::default() };
        terrarium_runtime::save(&base, &model, &native, &save).unwrap();
        config.base.as_mut().unwrap().model = base.to_string_lossy().into_owned();
        let watch = Watch::default();
        let report = run(options(config, dir.path().join("run")), vec![Box::new(watch.clone())]).unwrap();
        let steps = watch.steps.lock().unwrap();
        assert!(steps.last().unwrap().loss < steps[0].loss, "{family}: {} to {}", steps[0].loss, steps.last().unwrap().loss);

        let written = report.model_dir.unwrap();
        assert_eq!(terrarium_runtime::read_config(&written).unwrap().family.name(), family);
        let merged = dir.path().join("merged");
        merge(&base, &report.adapter_dir.unwrap(), &merged, &DeviceSpec::Cpu).unwrap();
        for ((path, found), (_, expected)) in weights(&merged).into_iter().zip(weights(&written)) {
            let close = found.iter::<f32>().zip(expected.iter::<f32>()).all(|(a, b)| (a - b).abs() <= 1e-6);
            assert!(close, "{family}: {path} merged is another than written");
        }
    }
}

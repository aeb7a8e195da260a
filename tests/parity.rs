//! Logits, greedy continuations and gradients against reference fixtures, in both configuration styles.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use terrarium::burn::module::AutodiffModule;
use terrarium::burn::tensor::{Int, Tensor, TensorData};
use terrarium::models::{Decoder, DecoderConfig, Layout};
use terrarium::runtime::{LoadOptions, load, read_safetensors};

use crate::common::*;

/// Committed fixtures, or those in `TERRARIUM_FIXTURES`.
fn directories() -> Vec<PathBuf> {
    let root = std::env::var_os("TERRARIUM_FIXTURES").map_or_else(fixtures, PathBuf::from);
    let mut found: Vec<PathBuf> = std::fs::read_dir(&root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("expected.safetensors").exists())
        .collect();
    found.sort();
    assert!(!found.is_empty(), "no fixtures in {}", root.display());
    found
}

fn arrays(file: &Path) -> BTreeMap<String, TensorData> {
    read_safetensors(file).unwrap().0.into_iter().collect()
}

fn values(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

/// The fixture under one configuration style, in a folder of its own.
fn styled(fixture: &Path, config: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("model") {
            std::fs::copy(&path, folder.path().join(&name)).unwrap();
        }
    }
    std::fs::copy(fixture.join(config), folder.path().join("config.json")).unwrap();
    folder
}

/// Mean cross-entropy of the next token over all rows.
fn loss(model: &Decoder<A>, ids: &Tensor<A, 2, Int>) -> Tensor<A, 1> {
    let [b, l] = ids.dims();
    let (logits, _) = model.forward(ids.clone(), None, &Layout::full(b, l));
    let v = logits.dims()[2];
    let logits = logits.narrow(1, 0, l - 1).reshape([b * (l - 1), v]);
    let labels = ids.clone().narrow(1, 1, l - 1).reshape([b * (l - 1), 1]);
    -terrarium::burn::tensor::activation::log_softmax(logits, 1).gather(1, labels).mean()
}

fn check_logits(what: &str, model: &Decoder<B>, expected: &BTreeMap<String, TensorData>) {
    let ids = &expected["input_ids"];
    let shape = [ids.shape[0], ids.shape[1]];
    let ids: Vec<i32> = ids.iter::<i32>().collect();
    let (logits, _) = model.forward(tensor(&ids, shape, &device()), None, &Layout::full(shape[0], shape[1]));
    let truth: Vec<f64> = expected["logits_f64"].iter::<f64>().collect();
    let worst = floats(logits).iter().zip(&truth).map(|(f, t)| (f64::from(*f) - t).abs()).fold(0.0, f64::max);
    println!("{what}: logits within {worst:.1e} of float64");
    assert!(worst <= 5e-5, "{what}: logits off by {worst:e}");
}

fn check_greedy(what: &str, model: &Decoder<B>, expected: &BTreeMap<String, TensorData>) {
    let prompt = &expected["input_ids"];
    let [b, l] = [prompt.shape[0], prompt.shape[1]];
    let ids: Vec<i32> = prompt.iter::<i32>().collect();
    let golden: Vec<i32> = expected["greedy_ids"].iter::<i32>().collect();
    let steps = golden.len() / b;
    let (mut logits, mut cache) = model.forward(tensor(&ids, [b, l], &device()), None, &Layout::full(b, l));
    for step in 0..steps {
        let last = logits.dims()[1] - 1;
        let best: Vec<i32> = logits.narrow(1, last, 1).argmax(2).into_data().iter::<i32>().collect();
        let wanted: Vec<i32> = golden.chunks(steps).map(|row| row[step]).collect();
        assert_eq!(best, wanted, "{what}: greedy token {step}");
        (logits, cache) = model.forward(tensor(&best, [b, 1], &device()), Some(cache), &Layout::full(b, 1));
    }
}

fn check_gradients(what: &str, model: &Decoder<A>, config: &DecoderConfig, ids: &TensorData, expected: &BTreeMap<String, TensorData>) {
    let flat: Vec<i32> = ids.iter::<i32>().collect();
    let loss = loss(model, &tensor(&flat, [ids.shape[0], ids.shape[1]], &device()));
    let value = floats(loss.clone())[0];
    let truth = values(&expected["loss"])[0];
    assert!((value - truth).abs() < 1e-5 * truth, "{what}: loss {value}, expected {truth}");
    let found = gradients(model, &loss.backward());
    let table = config.table();
    assert_eq!(table.entries.len() + 1, expected.len(), "{what}: parameters");
    for entry in &table.entries {
        let grad = found.get(&entry.path).unwrap_or_else(|| panic!("{what}: {} has no gradient", entry.path));
        assert_close(&format!("{what}: gradient of {}", entry.key), grad, &values(&expected[&entry.key]), 1e-4);
    }
}

#[test]
fn logits_greedy_paths_and_gradients_equal_the_reference() {
    let mut with_gradients = 0;
    for fixture in directories() {
        let expected = arrays(&fixture.join("expected.safetensors"));
        for style in ["config.json", "config_v4.json"] {
            let what = format!("{} ({style})", fixture.file_name().unwrap().to_string_lossy());
            let folder = styled(&fixture, style);
            let loaded = load::<A>(folder.path(), &LoadOptions::default(), &device()).unwrap();
            let plain = loaded.model.valid();
            check_logits(&what, &plain, &expected);
            check_greedy(&what, &plain, &expected);
            let grads = fixture.join("expected_grads.safetensors");
            if style == "config.json" && grads.exists() {
                check_gradients(&what, &loaded.model, &loaded.config, &expected["input_ids"], &arrays(&grads));
                with_gradients += 1;
            }
        }
    }
    assert!(with_gradients > 0, "no fixture had gradients");
}

/// Counts from the published checkpoints.
#[test]
fn parameter_counts_equal_the_published_ones() {
    let mamba2 = |d: usize, layers: usize, vocab: usize, groups: usize, tied: bool| {
        format!(
            r#"{{"model_type":"mamba2","vocab_size":{vocab},"hidden_size":{d},"num_hidden_layers":{layers},"num_heads":{},"head_dim":64,"n_groups":{groups},"state_size":128,"tie_word_embeddings":{tied}}}"#,
            d / 32
        )
    };
    let llama = |d: usize, layers: usize, heads: usize, kv: usize, f: usize, vocab: usize, tied: bool| {
        format!(
            r#"{{"model_type":"llama","vocab_size":{vocab},"hidden_size":{d},"num_hidden_layers":{layers},"num_attention_heads":{heads},"num_key_value_heads":{kv},"intermediate_size":{f},"tie_word_embeddings":{tied}}}"#
        )
    };
    let hybrid = r#"{"model_type":"nemotron_h","vocab_size":256000,"hidden_size":4096,"num_hidden_layers":56,"attention_ratio":0.08,"mlp_ratio":0.5,"num_attention_heads":32,
        "num_key_value_heads":8,"head_dim":128,"intermediate_size":16384,"mamba_num_heads":128,"mamba_head_dim":64,"n_groups":8,"ssm_state_size":128}"#;
    let published = [
        (mamba2(768, 24, 50288, 1, true), 128_989_632),
        (mamba2(1024, 48, 50288, 1, true), 368_346_624),
        (mamba2(1536, 48, 50288, 1, true), 780_161_280),
        (mamba2(2048, 48, 50288, 1, true), 1_343_757_312),
        (mamba2(2560, 64, 50288, 1, true), 2_702_599_680),
        (mamba2(4096, 64, 32768, 8, false), 7_285_403_648),
        (llama(576, 30, 9, 3, 1536, 49152, true), 134_515_008),
        (llama(960, 32, 15, 5, 2560, 49152, true), 361_821_120),
        (llama(2048, 22, 32, 4, 5632, 32000, false), 1_100_048_384),
        (hybrid.to_string(), 8_654_517_248),
    ];
    for (text, count) in published {
        let config = DecoderConfig::from_json(&text).unwrap();
        assert_eq!(config.parameters(), count, "{text}");
    }
}

//! Logits, greedy continuations and gradients against reference fixtures, in both configuration styles.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use terrarium::burn::module::AutodiffModule;
use terrarium::burn::tensor::{Int, Tensor, TensorData};
use terrarium::models::{Decoder, DecoderConfig, Layout, WeightEntry};
use terrarium::runtime::{LoadOptions, Precision, load, read_safetensors};

use crate::common::*;

/// Committed fixtures, or those in `TERRARIUM_FIXTURES`.
pub fn directories() -> Vec<PathBuf> {
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
    copy(fixture, folder.path());
    if fixture.join(config).exists() {
        std::fs::copy(fixture.join(config), folder.path().join("config.json")).unwrap();
    }
    folder
}

/// Copies a checkpoint, without what is expected of it.
fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let target = to.join(&name);
        if path.is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy(&path, &target);
        } else if !name.starts_with("expected") && name != "config_v4.json" {
            std::fs::copy(&path, target).unwrap();
        }
    }
}

/// What the fixture's configuration does not hold: the arguments of old Megatron runs lack sizes of the Mamba layers.
pub fn options(fixture: &Path) -> LoadOptions {
    let mut options = LoadOptions::default();
    if fixture.join("latest_checkpointed_iteration.txt").exists() {
        let text = std::fs::read_to_string(fixture.join("expected.json")).unwrap();
        let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
        let groups = expected["arch"]["mamba_num_groups"].clone();
        options.overrides.insert("mamba_num_groups".into(), groups);
    }
    options
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

/// The rows of a file's tensor that belong to a parameter.
fn part(entry: &WeightEntry, whole: &TensorData) -> Vec<f32> {
    let whole = values(whole);
    let Some(rows) = entry.rows else { return whole };
    let width = whole.len() / rows.total;
    rows.starts().flat_map(|start| whole[start * width..(start + rows.len) * width].to_vec()).collect()
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
    let keys: BTreeSet<&str> = table.entries.iter().map(|entry| entry.key.as_str()).collect();
    assert_eq!(keys.len() + 1, expected.len(), "{what}: tensors");
    for entry in &table.entries {
        let grad = found.get(&entry.path).unwrap_or_else(|| panic!("{what}: {} has no gradient", entry.path));
        assert_close(&format!("{what}: gradient of {} ({})", entry.key, entry.path), grad, &part(entry, &expected[&entry.key]), 1e-4);
    }
}

#[test]
fn logits_greedy_paths_and_gradients_equal_the_reference() {
    let (mut with_gradients, mut half) = (0, 0);
    for fixture in directories() {
        let expected = arrays(&fixture.join("expected.safetensors"));
        for style in ["config.json", "config_v4.json"] {
            if style == "config_v4.json" && !fixture.join(style).exists() {
                continue;
            }
            let what = format!("{} ({style})", fixture.file_name().unwrap().to_string_lossy());
            let folder = styled(&fixture, style);
            let loaded = load::<A>(folder.path(), &options(&fixture), &device()).unwrap_or_else(|error| panic!("{what}: {error}"));
            let plain = loaded.model.valid();
            // Of half-precision checkpoints the logits are those of the stored weights, the rest of weights before rounding.
            check_logits(&what, &plain, &expected);
            if loaded.notes.iter().any(|note| note.contains("computing in f32")) {
                half += 1;
                continue;
            }
            check_greedy(&what, &plain, &expected);
            let grads = fixture.join("expected_grads.safetensors");
            if style == "config.json" && grads.exists() {
                check_gradients(&what, &loaded.model, &loaded.config, &expected["input_ids"], &arrays(&grads));
                with_gradients += 1;
            }
        }
    }
    assert!(with_gradients + half > 0, "no fixture had gradients");
}

/// Weights, activations and products in half precision, states and norms in float32: close, in every family.
#[test]
fn half_precision_computes_nearly_the_same() {
    for (precision, tolerance) in [(Precision::Bf16, 0.08), (Precision::F16, 0.01)] {
        for fixture in directories().into_iter().filter(|fixture| fixture.to_string_lossy().ends_with("s17")) {
            let what = format!("{} in {precision:?}", fixture.file_name().unwrap().to_string_lossy());
            let loaded = match load::<B>(&fixture, &LoadOptions { precision, ..options(&fixture) }, &device()) {
                Ok(loaded) => loaded,
                Err(error) => {
                    assert!(error.to_string().contains("use --dtype f32"), "{what}: {error}");
                    println!("{what}: not computed in by this backend");
                    continue;
                }
            };
            let expected = arrays(&fixture.join("expected.safetensors"));
            let ids = &expected["input_ids"];
            let shape = [ids.shape[0], ids.shape[1]];
            let ids: Vec<i32> = ids.iter::<i32>().collect();
            let (logits, _) = loaded.model.forward(tensor(&ids, shape, &device()), None, &Layout::full(shape[0], shape[1]));
            let truth: Vec<f32> = expected["logits_f64"].iter::<f32>().collect();
            let found = floats(logits);
            let worst = found.iter().zip(&truth).map(|(f, t)| (f - t).abs()).fold(0.0, f32::max);
            println!("{what}: within {worst:.1e}");
            assert_close(&what, &found, &truth, tolerance);
        }
    }
}

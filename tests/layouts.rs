//! Checkpoints in one layout and the next: what is written is what was read, and says the same.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use terrarium::burn::tensor::{DType, TensorData};
use terrarium::models::{Decoder, Layout as Rows, LoraConfig, LoraTargets};
use terrarium::runtime::{Checkpoint, Layout, LoadOptions, SaveOptions, convert, load, load_adapter, load_layer, save, save_adapter};

use crate::common::*;
use crate::parity::{directories, options};

fn writing(layout: Layout) -> SaveOptions {
    SaveOptions { layout, ..SaveOptions::default() }
}

fn open(fixture: &Path) -> Checkpoint {
    Checkpoint::open_with(fixture, &options(fixture).overrides).unwrap_or_else(|error| panic!("{}: {error}", fixture.display()))
}

fn parameters(model: &Decoder<B>) -> BTreeMap<String, TensorData> {
    model.tensors().into_iter().collect()
}

#[track_caller]
fn assert_equal(what: &str, found: &BTreeMap<String, TensorData>, expected: &BTreeMap<String, TensorData>) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
    for (path, data) in expected {
        assert_eq!(found[path].shape, data.shape, "{what}: {path}");
        assert!(found[path].as_bytes() == data.as_bytes(), "{what}: {path} has changed");
    }
}

fn name(fixture: &Path) -> String {
    fixture.file_name().unwrap().to_string_lossy().into_owned()
}

fn logits(model: &Decoder<B>) -> Vec<f32> {
    floats(model.forward(tensor(&ids(5, 26, 90), [2, 13], &device()), None, &Rows::full(2, 13)).0)
}

/// Every file's bytes.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.unwrap().path();
        (name(&path), std::fs::read(&path).unwrap())
    };
    std::fs::read_dir(dir).unwrap().map(read).filter(|(name, _)| name != "README.md").collect()
}

#[test]
fn what_is_written_is_what_was_read() {
    let mut layouts = std::collections::BTreeSet::new();
    for fixture in directories() {
        let what = name(&fixture);
        let folder = tempfile::tempdir().unwrap();
        let [once, twice, saved, small] = ["once", "twice", "saved", "small"].map(|name| folder.path().join(name));
        let checkpoint = open(&fixture);
        let source = load::<B>(&fixture, &options(&fixture), &device()).unwrap();
        for layout in [Layout::Own, Layout::Auto] {
            let written = convert(&once, &checkpoint, &writing(layout)).unwrap_or_else(|error| panic!("{what}: {error}"));
            layouts.insert(written.family);
            let back = load::<B>(&once, &LoadOptions::default(), &device()).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_equal(&what, &parameters(&back.model), &parameters(&source.model));
            assert_eq!(logits(&back.model), logits(&source.model), "{what}");
            // Written again, and from a model in memory, it is the same to the last byte.
            convert(&twice, &Checkpoint::open(&once).unwrap(), &writing(Layout::Own)).unwrap();
            assert!(files(&once) == files(&twice), "{what}: written again it is another");
            if source.notes.is_empty() {
                save(&saved, &source.model, &source.config, &writing(layout)).unwrap();
                assert!(files(&once) == files(&saved), "{what}: saved from memory it is another");
            }
            let shards = SaveOptions { max_shard_bytes: 20_000, ..writing(layout) };
            let written = convert(&small, &checkpoint, &shards).unwrap();
            assert!(written.files.iter().any(|file| file.starts_with("model-00002-of-")), "{what}: {:?}", written.files);
            let back = load::<B>(&small, &LoadOptions::default(), &device()).unwrap();
            assert_equal(&what, &parameters(&back.model), &parameters(&source.model));
            for dir in [&once, &twice, &saved, &small] {
                std::fs::remove_dir_all(dir).ok();
            }
        }
    }
    assert!(layouts.contains("mamba_ssm") && layouts.contains("gpt_neox") && layouts.contains("nemotron"), "{layouts:?}");
    assert!(!layouts.contains("megatron"), "a layout without a configuration file was written");
}

fn fixture(name: &str) -> PathBuf {
    fixtures().join(name)
}

#[test]
fn every_model_but_one_has_an_equal_in_transformers() {
    for (fixture_name, family) in [
        ("native-mamba-s17", "mamba"),
        ("native-mamba2-s17", "mamba2"),
        ("native-transformerpp-s17", "bamba"),
        ("megatron-hybrid-s17", "nemotron_h"),
        ("megatron-gpt-s17", "nemotron"),
        ("gptneox-s17", "gpt_neox"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let written = convert(&folder.path().join("out"), &open(&fixture(fixture_name)), &writing(Layout::HuggingFace)).unwrap();
        assert_eq!(written.family, family, "{fixture_name}");
    }
    let folder = tempfile::tempdir().unwrap();
    let error = convert(&folder.path().join("out"), &open(&fixture("native-mamba2attn-s17")), &writing(Layout::HuggingFace)).unwrap_err();
    assert!(error.to_string().contains("MM*") || error.to_string().contains("M*M"), "{error}");
    assert!(!folder.path().join("out").exists(), "a refused export left something behind");
}

#[test]
fn a_type_can_be_chosen_while_converting() {
    for (dtype, tolerance) in [(DType::BF16, 0.2), (DType::F16, 0.02)] {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        let source = load::<B>(&fixture("native-mamba2-s17"), &LoadOptions::default(), &device()).unwrap();
        let options = SaveOptions { dtype: Some(dtype), ..SaveOptions::default() };
        convert(&out, &open(&fixture("native-mamba2-s17")), &options).unwrap();
        let back = Checkpoint::open(&out).unwrap();
        assert_eq!(back.dtype(), dtype);
        let back = load::<B>(&out, &LoadOptions::default(), &device()).unwrap();
        assert_close("rounded weights", &logits(&back.model), &logits(&source.model), tolerance);
    }
}

#[test]
fn a_conversion_onto_itself_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    convert(&out, &open(&fixture("gptneox-s17")), &writing(Layout::Auto)).unwrap();
    let error = convert(&out, &Checkpoint::open(&out).unwrap(), &writing(Layout::Auto)).unwrap_err();
    assert!(error.to_string().contains("choose another"), "{error}");
}

#[test]
fn a_layer_alone_is_that_of_the_whole_model() {
    let fixture = fixture("native-transformerpp-s17");
    let checkpoint = open(&fixture);
    let whole = load::<B>(&fixture, &LoadOptions::default(), &device()).unwrap();
    for i in 0..checkpoint.config.layers.len() {
        let layer = load_layer::<B>(&checkpoint, i, DType::F32, &device()).unwrap();
        let mut alone = whole.model.clone();
        alone.layers = vec![layer];
        let found: BTreeMap<_, _> = parameters(&alone).into_iter().filter(|(path, _)| path.starts_with("layers.")).collect();
        let prefix = format!("layers.{i}.");
        let expected = parameters(&whole.model)
            .into_iter()
            .filter_map(|(path, data)| path.strip_prefix(&prefix).map(|rest| (format!("layers.0.{rest}"), data)));
        assert_equal(&format!("layer {i}"), &found, &expected.collect());
    }
    assert!(load_layer::<B>(&checkpoint, 99, DType::F32, &device()).unwrap_err().to_string().contains("no layer 99"));
}

/// Adapters of queries, keys and values are one adapter of the projection that a file fuses them into.
#[test]
fn adapters_of_fused_projections_come_back() {
    let device = device();
    for name in ["gptneox-s17", "granite-hybrid-s17", "native-transformerpp-s17", "megatron-hybrid-s17", "native-mamba-s17"] {
        for targets in [LoraTargets::All, LoraTargets::Names(vec![if name.contains("mamba-") { "dt_proj" } else { "k_proj" }.into()])] {
            let fixture = fixture(name);
            let loaded = load::<B>(&fixture, &options(&fixture), &device).unwrap();
            let lora = LoraConfig { rank: 2, alpha: 3.0, targets };
            let (mut model, report) = loaded.model.clone().attach_lora(&lora, 1, &device).unwrap();
            let mut seed = 0;
            model.for_each_linear(&mut |_, linear| {
                let Some(lora) = &mut linear.lora else { return };
                seed += 1;
                let shape = lora.b.val().dims();
                let noise: Vec<f32> = ids(seed, shape.iter().product(), 200).iter().map(|v| *v as f32 / 500.0 - 0.2).collect();
                let data = TensorData::new(noise, shape);
                lora.b = terrarium::burn::module::Param::from_tensor(terrarium::burn::tensor::Tensor::from_data(data, &device));
            });
            let folder = tempfile::tempdir().unwrap();
            save_adapter(folder.path(), &model, &loaded.config, &lora, "base").unwrap();
            let (back, again, _) = load_adapter(folder.path(), loaded.model.clone(), &loaded.config, &device).unwrap();
            assert_close(name, &logits(&back), &logits(&model), 1e-5);
            assert!(again.adapted.len() >= report.adapted.len());
            let changed = logits(&model).iter().zip(logits(&loaded.model)).any(|(a, b)| (a - b).abs() > 1e-3);
            assert!(changed, "{name}: the adapter does nothing");
        }
    }
}

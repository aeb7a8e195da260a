//! Model directories: what is saved loads bit-equal, and what is damaged is refused with every fault named.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{DType, TensorData};
use common::{B, HYBRID, LLAMA, device, edit_weights, random, saved};
use terrarium_models::{LoraConfig, LoraTargets};
use terrarium_runtime::{
    AdapterError, Checkpoint, CheckpointError, Error, LoadOptions, Loaded, Precision, Result, SaveOptions, load, load_adapter,
    read_safetensors, save, save_adapter, write_safetensors,
};

fn open(dir: &Path) -> Result<Loaded<B>> {
    load(dir, &LoadOptions::default(), &device())
}

fn message(dir: &Path) -> String {
    open(dir).expect_err("an error").to_string()
}

fn assert_equal(a: &[(String, TensorData)], b: &[(String, TensorData)]) {
    assert_eq!(a.len(), b.len());
    for ((key, x), (other, y)) in a.iter().zip(b) {
        assert_eq!((key, &x.shape, x.dtype), (other, &y.shape, y.dtype));
        assert!(x.as_bytes() == y.as_bytes(), "{key} differs");
    }
}

#[test]
fn what_is_saved_loads_bit_equal() {
    for config in [HYBRID, LLAMA] {
        let (dir, _, model) = saved(config, 5);
        let loaded = open(dir.path()).expect("loads");
        assert_equal(&model.tensors(), &loaded.model.tensors());
        assert_eq!(loaded.config.pattern(), common::random(config, 0).0.pattern());
        // And again: the files are the same to the byte.
        let again = tempfile::tempdir().expect("temp");
        save(again.path(), &loaded.model, &loaded.config, &SaveOptions::default()).expect("saves");
        for name in ["model.safetensors", "config.json"] {
            assert!(fs::read(dir.path().join(name)).expect("there") == fs::read(again.path().join(name)).expect("there"), "{name} differs");
        }
    }
}

#[test]
fn half_precision_checkpoints_load_widened_and_save_bit_equal() {
    for (dtype, precision) in [(DType::BF16, Precision::Bf16), (DType::F16, Precision::F16)] {
        let (config, model) = random(HYBRID, 6);
        let (half, again) = (tempfile::tempdir().expect("temp"), tempfile::tempdir().expect("temp"));
        let options = SaveOptions { dtype: Some(dtype), ..SaveOptions::default() };
        save(half.path(), &model, &config, &options).expect("saves");
        let loaded = open(half.path()).expect("loads");
        assert_eq!(loaded.dtype, DType::F32);
        assert!(loaded.notes.iter().any(|note| note.contains("computing in f32")), "{:?}", loaded.notes);
        save(again.path(), &loaded.model, &loaded.config, &options).expect("saves");
        let read = |dir: &Path| fs::read(dir.join("model.safetensors")).expect("there");
        assert!(read(half.path()) == read(again.path()), "widening and rounding back changed a weight");
        let text = fs::read_to_string(half.path().join("config.json")).expect("there");
        assert!(text.contains(if dtype == DType::BF16 { "bfloat16" } else { "float16" }));
        let kept = load::<B>(half.path(), &LoadOptions { precision, ..Default::default() }, &device());
        if <B as burn::tensor::backend::Backend>::supports_dtype(&device(), dtype) {
            assert_eq!(kept.expect("loads").dtype, dtype);
        } else {
            let error = kept.expect_err("this backend cannot compute in it").to_string();
            assert!(error.contains("use --dtype f32"), "{error}");
        }
    }
}

#[test]
fn shards_load_like_one_file() {
    let (config, model) = random(HYBRID, 7);
    let dir = tempfile::tempdir().expect("temp");
    let saved = save(dir.path(), &model, &config, &SaveOptions { max_shard_bytes: 20_000, ..SaveOptions::default() }).expect("saves");
    assert!(saved.files.iter().filter(|f| f.ends_with(".safetensors")).count() > 2, "{:?}", saved.files);
    assert_equal(&model.tensors(), &open(dir.path()).expect("loads").model.tensors());
    // A later save as one file leaves no shards behind that would be read instead.
    save(dir.path(), &model, &config, &SaveOptions::default()).expect("saves");
    assert!(!dir.path().join("model.safetensors.index.json").exists());
    assert!(fs::read_dir(dir.path()).expect("lists").flatten().all(|e| !e.file_name().to_string_lossy().contains("-of-")));
}

#[test]
fn a_missing_shard_and_a_key_in_the_wrong_one_are_named() {
    let (config, model) = random(HYBRID, 7);
    let dir = tempfile::tempdir().expect("temp");
    save(dir.path(), &model, &config, &SaveOptions { max_shard_bytes: 20_000, ..SaveOptions::default() }).expect("saves");
    let index = dir.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).expect("there");
    fs::write(&index, text.replacen("-00001-of", "-00002-of", 1)).expect("writes");
    let error = message(dir.path());
    assert!(error.contains("lacks keys that the index places there"), "{error}");
    fs::write(&index, text).expect("writes");
    let shard = fs::read_dir(dir.path())
        .expect("lists")
        .flatten()
        .find(|e| e.file_name().to_string_lossy().starts_with("model-00002"))
        .expect("a shard");
    fs::remove_file(shard.path()).expect("removes");
    let error = message(dir.path());
    assert!(error.contains("not there: model-00002-of"), "{error}");
}

#[test]
fn missing_unused_mis_shaped_and_non_float_keys_are_one_error() {
    let (dir, ..) = saved(HYBRID, 8);
    edit_weights(dir.path(), |tensors| {
        tensors.retain(|(key, _)| key != "backbone.norm_f.weight");
        tensors.push(("backbone.layers.9.extra.weight".into(), TensorData::new(vec![1.0f32], [1])));
        for (key, data) in tensors.iter_mut() {
            if key == "backbone.layers.0.mixer.out_proj.weight" {
                let elements = data.num_elements();
                *data = TensorData { shape: [elements].into(), ..data.clone() };
            }
            if key == "backbone.layers.0.norm.weight" {
                *data = TensorData::new(vec![1i64; 32], [32]);
            }
        }
    });
    let error = open(dir.path()).expect_err("an error");
    let Error::Checkpoint(CheckpointError::Mismatch(found)) = &error else { panic!("{error}") };
    assert_eq!(found.missing, ["backbone.norm_f.weight [32]"]);
    assert_eq!(found.unused, ["backbone.layers.9.extra.weight [1]"]);
    assert_eq!(found.dtypes, ["backbone.layers.0.norm.weight: I64"]);
    assert_eq!(found.shapes.len(), 1);
    let text = error.to_string();
    for part in ["1 missing", "1 unused", "1 of another shape", "out_proj.weight: expected [32, 64], found [2048]", "I64"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn a_truncated_file_says_how_much_is_there() {
    let (dir, ..) = saved(LLAMA, 9);
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).expect("there");
    for length in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).expect("writes");
        let error = message(dir.path());
        assert!(error.contains("truncated") || error.contains("too few"), "{length}: {error}");
        assert!(error.contains("model.safetensors"), "{error}");
    }
    fs::write(&path, [bytes.as_slice(), b"more"].concat()).expect("writes");
    assert!(message(dir.path()).contains("4 bytes after the last tensor"));
    fs::write(&path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0").expect("writes");
    assert!(message(dir.path()).contains("is it a safetensors file?"));
}

#[test]
fn headers_that_lie_name_the_key() {
    let cases = [
        (r#"{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}"#, "needs 8 bytes"),
        (r#"{"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}"#, "unknown dtype `F99`"),
        (r#"{"w": {"dtype": "F32", "shape": [4294967296, 4294967296, 4], "data_offsets": [0, 4]}}"#, "absurd shape"),
        (r#"{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}"#, "`w`"),
        (r#"{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}"#, "before it starts"),
        (
            r#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#,
            "overlap",
        ),
        (r#"{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#, "a hole"),
        (
            r#"{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#,
            "`w` is there twice",
        ),
        (r#"{"w": {"dtype": "F32", "shape": [1]}}"#, "`w`"),
        (r#"[1, 2]"#, "does not parse"),
    ];
    let dir = tempfile::tempdir().expect("temp");
    let path = dir.path().join("x.safetensors");
    for (json, expected) in cases {
        let bytes = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &[0; 8]].concat();
        fs::write(&path, bytes).expect("writes");
        let error = read_safetensors(&path).expect_err(json).to_string();
        assert!(error.contains(expected) && error.contains("x.safetensors"), "{json}: {error}");
    }
}

#[test]
fn configs_that_are_no_model_are_refused() {
    let (dir, ..) = saved(HYBRID, 1);
    for (text, expected) in
        [("{", "config.json"), (r#"{"model_type": "unheard_of"}"#, "unheard_of"), ("{}", "model_type"), ("[]", "config.json")]
    {
        fs::write(dir.path().join("config.json"), text).expect("writes");
        let error = message(dir.path());
        assert!(error.contains(expected), "{text}: {error}");
    }
    fs::remove_file(dir.path().join("config.json")).expect("removes");
    assert!(message(dir.path()).contains("cannot read"), "{}", message(dir.path()));
}

#[test]
fn bare_infinity_in_a_config_is_read() {
    // HYBRID is written with it.
    let dir = tempfile::tempdir().expect("temp");
    fs::write(dir.path().join("config.json"), HYBRID).expect("writes");
    assert_eq!(terrarium_runtime::read_config(dir.path()).expect("reads").pattern(), "M-*-M");
    assert!(message(dir.path()).contains("no model.safetensors"));
    fs::write(dir.path().join("pytorch_model.bin"), b"").expect("writes");
    assert!(message(dir.path()).contains("too few"), "{}", message(dir.path()));
}

#[test]
fn opening_lists_tensors_without_loading() {
    let (dir, config, _) = saved(HYBRID, 2);
    let checkpoint = Checkpoint::open(dir.path()).expect("opens");
    assert_eq!(checkpoint.tensors().len(), config.table().entries.len());
    assert_eq!(checkpoint.bytes(), 4 * config.parameters() as u64);
    assert_eq!(checkpoint.dtype(), DType::F32);
    checkpoint.check().expect("fits");
}

#[test]
fn tied_weights_are_stored_once_and_a_second_copy_is_allowed() {
    let (dir, ..) = saved(LLAMA, 3);
    let (tensors, metadata) = read_safetensors(&dir.path().join("model.safetensors")).expect("reads");
    assert!(tensors.iter().all(|(key, _)| key != "lm_head.weight"));
    assert_eq!(metadata.get("format").map(String::as_str), Some("pt"));
    let copy = tensors.iter().find(|(key, _)| key == "model.embed_tokens.weight").expect("there").1.clone();
    edit_weights(dir.path(), |tensors| tensors.push(("lm_head.weight".into(), copy)));
    open(dir.path()).expect("loads");
}

#[test]
fn a_saved_directory_has_what_other_programs_expect() {
    let (config, model) = random(HYBRID, 4);
    let (from, dir) = (tempfile::tempdir().expect("temp"), tempfile::tempdir().expect("temp"));
    fs::write(from.path().join("tokenizer.json"), "{}").expect("writes");
    let options = SaveOptions { files_from: Some(from.path().into()), base_model: Some("org/base".into()), ..SaveOptions::default() };
    save(dir.path(), &model, &config, &options).expect("saves");
    for name in ["config.json", "model.safetensors", "generation_config.json", "README.md", "tokenizer.json"] {
        assert!(dir.path().join(name).is_file(), "{name}");
    }
    let card = fs::read_to_string(dir.path().join("README.md")).expect("there");
    assert!(card.starts_with("---\n") && card.contains("base_model: org/base\n"), "{card}");
    let bytes = fs::read(dir.path().join("model.safetensors")).expect("there");
    let theirs = safetensors::SafeTensors::deserialize(&bytes).expect("the safetensors crate reads it");
    assert_eq!(theirs.names().len(), config.table().entries.len());
}

#[test]
fn other_files_of_an_existing_target_stay_and_a_file_is_refused() {
    let (config, model) = random(LLAMA, 4);
    let temp = tempfile::tempdir().expect("temp");
    let dir = temp.path().join("run");
    fs::create_dir(&dir).expect("creates");
    fs::write(dir.join("log.jsonl"), "kept").expect("writes");
    save(&dir, &model, &config, &SaveOptions::default()).expect("saves");
    assert_eq!(fs::read_to_string(dir.join("log.jsonl")).expect("there"), "kept");
    open(&dir).expect("loads");
    let error = save(&dir.join("log.jsonl"), &model, &config, &SaveOptions::default()).expect_err("refused");
    assert!(matches!(error, Error::Target { .. }), "{error}");
    assert_eq!(fs::read_dir(temp.path()).expect("lists").count(), 1, "no staging directory is left");
}

/// A file size limit stands for a full disk: the write fails in the middle.
#[cfg(target_os = "linux")]
#[test]
fn a_save_that_cannot_finish_leaves_what_was_there() {
    const CHILD: &str = "TERRARIUM_TEST_SAVE_TO";
    let (config, model) = random(HYBRID, 10);
    if let Ok(target) = std::env::var(CHILD) {
        let error = save(Path::new(&target), &model, &config, &SaveOptions::default()).expect_err("the limit");
        println!("refused: {error}");
        return;
    }
    let temp = tempfile::tempdir().expect("temp");
    let target = temp.path().join("model");
    save(&target, &random(HYBRID, 11).1, &config, &SaveOptions::default()).expect("saves");
    let before = fs::read(target.join("model.safetensors")).expect("there");
    let program = std::env::current_exe().expect("this test");
    let script = "ulimit -f 16; trap '' XFSZ; exec \"$0\" --exact a_save_that_cannot_finish_leaves_what_was_there --nocapture";
    for (path, existed) in [(target.clone(), true), (temp.path().join("fresh"), false)] {
        let output = std::process::Command::new("bash").args(["-c", script]).arg(&program).env(CHILD, &path).output().expect("runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(text.contains("refused: cannot write") && text.contains("nothing was left half-written"), "{text}");
        assert_eq!(path.exists(), existed);
    }
    assert!(fs::read(target.join("model.safetensors")).expect("there") == before);
    assert_eq!(fs::read_dir(temp.path()).expect("lists").count(), 1, "no staging directory is left");
}

#[test]
fn tensors_of_every_type_come_back() {
    let dir = tempfile::tempdir().expect("temp");
    let path = dir.path().join("state.safetensors");
    let tensors = vec![
        ("f64".to_string(), TensorData::new(vec![1.0f64, -2.5], [2])),
        ("f32".to_string(), TensorData::new(vec![1.0f32; 6], [2, 3])),
        ("i64".to_string(), TensorData::new(vec![i64::MIN, 7], [2, 1])),
        ("u64".to_string(), TensorData::new(vec![u64::MAX], [1])),
        ("bool".to_string(), TensorData::new(vec![true, false, true], [3])),
        ("empty".to_string(), TensorData::new(Vec::<f32>::new(), [0, 4])),
        ("u8".to_string(), TensorData::new(vec![200u8], [1])),
    ];
    let metadata = BTreeMap::from([("step".to_string(), "12".to_string()), ("a".to_string(), "\"quoted\"".to_string())]);
    write_safetensors(&path, tensors.clone(), &metadata).expect("writes");
    let (mut found, found_metadata) = read_safetensors(&path).expect("reads");
    let mut tensors = tensors;
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert_equal(&tensors, &found);
    assert_eq!(metadata, found_metadata);
    assert_eq!(found[0].1.as_slice::<bool>().expect("bool"), [true, false, true]);
    let twice = vec![("a".to_string(), tensors[0].1.clone()), ("a".to_string(), tensors[1].1.clone())];
    assert!(write_safetensors(&path, twice, &metadata).expect_err("refused").to_string().contains("given twice"));
}

#[test]
fn adapters_come_back_in_the_format_of_peft() {
    let (config, base) = random(HYBRID, 12);
    let lora = LoraConfig { rank: 3, alpha: 6.0, targets: LoraTargets::Ssm };
    let (mut model, report) = base.clone().attach_lora(&lora, 1, &device()).expect("attaches");
    // Fresh adapters add nothing: give them something to say.
    model.for_each_linear(&mut |_, linear| {
        if let Some(lora) = &mut linear.lora {
            lora.b = burn::module::Param::from_tensor(burn::tensor::Tensor::ones_like(&lora.b.val()) * 0.01);
        }
    });
    let dir = tempfile::tempdir().expect("temp");
    save_adapter(dir.path(), &model, &config, &lora, "org/base").expect("saves");
    let (tensors, _) = read_safetensors(&dir.path().join("adapter_model.safetensors")).expect("reads");
    assert_eq!(tensors.len(), 2 * report.adapted.len());
    let key = "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight";
    assert_eq!(tensors.iter().find(|(k, _)| k == key).expect(key).1.shape.to_vec()[0], 3);

    let (again, found, adapter) = load_adapter(dir.path(), base.clone(), &config, &device()).expect("loads");
    assert_eq!((found.adapted.len(), found.trainable, found.total), (report.adapted.len(), report.trainable, report.total));
    assert_eq!((adapter.rank, adapter.alpha, adapter.base_model.as_deref()), (3, 6.0, Some("org/base")));
    assert_equal(&model.tensors(), &again.tensors());

    let error = open(dir.path()).expect_err("no model");
    assert!(matches!(error, Error::Adapter(AdapterError::NotAModel { .. })) && error.to_string().contains("org/base"), "{error}");
    let error = save(&dir.path().join("x"), &model, &config, &SaveOptions::default()).expect_err("unmerged");
    assert!(error.to_string().contains("merge"), "{error}");
    let (other_config, other) = random(LLAMA, 1);
    let error = load_adapter(dir.path(), other, &other_config, &device()).expect_err("another model").to_string();
    assert!(error.contains("does not fit the model") && error.contains("in_proj"), "{error}");
    fs::write(dir.path().join("adapter_config.json"), r#"{"peft_type": "LORA", "r": 3, "use_dora": true}"#).expect("writes");
    assert!(load_adapter(dir.path(), base, &config, &device()).expect_err("dora").to_string().contains("use_dora"));
}

//! models, inspect, export, --set and --tokenizer on every layout of the fixtures, and on a hub that serves them.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{Ran, run, terrarium, text, tiny_model};
use crate::hub_server::Hub;

fn fixture(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name);
    assert!(dir.is_dir(), "{}", dir.display());
    dir
}

/// The groups that the arguments of the hybrid Megatron run lack.
const GROUPS: [&str; 2] = ["--set", "mamba_num_groups=2"];

fn needs(name: &str) -> &'static [&'static str] {
    if name.starts_with("megatron-hybrid") { &GROUPS } else { &[] }
}

fn ids(model: &Path, more: &[&str]) -> Value {
    let arguments = ["generate", "--model", text(model), "--ids", "5,17,3", "-n", "6", "--temperature", "0", "--ignore-eos", "--json"];
    run(&[&arguments[..], more].concat()).ok().json().remove(0)["ids"].clone()
}

#[test]
fn models_lists_presets_within_120_columns() {
    let table = run(&["models"]).ok().out;
    assert!(table.lines().all(|line| line.chars().count() <= 120), "{table}");
    for word in ["mamba2-130m", "24 x M", "129.0 M", "state-spaces/mamba2-130m", "nvidia/mamba2-8b-3t-4k", "activations"] {
        assert!(table.contains(word), "no {word} in {table}");
    }
    let report = run(&["models", "Mamba2-130M", "--json"]).ok().json().remove(0);
    let rows = report["models"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| &row["name"]).collect::<Vec<_>>(), ["mamba2-130m", "mamba2-130m-hf"]);
    assert_eq!((&rows[0]["parameters"], &rows[0]["training_bytes"]), (&json!(128_989_632), &json!(16 * 128_989_632u64)));
    assert!(rows[0]["inference_bytes"].as_u64() > Some(2 * 128_989_632));
    run(&["models", "mamba9"]).fails(2, &["mamba9", "hint: ", "mamba"]);
}

#[test]
fn inspect_reads_every_layout() {
    let cases = [
        ("native-mamba-s17", "mamba_ssm", "mmm", json!("mamba")),
        ("native-mamba2-s17", "mamba_ssm", "MMM", json!("mamba2")),
        ("native-mamba2attn-s17", "mamba_ssm", "M*M", Value::Null),
        ("native-transformerpp-s17", "mamba_ssm", "*-*-*-", json!("bamba")),
        ("megatron-gpt-s17", "megatron", "*-*-*-", json!("nemotron")),
        ("megatron-hybrid-s17", "megatron", "", json!("nemotron_h")),
        ("gptneox-s17", "gpt_neox", "", json!("gpt_neox")),
        ("mamba-s17", "mamba", "", json!("mamba")),
        ("granite-hybrid-s17", "granitemoehybrid", "", json!("granitemoehybrid")),
    ];
    for (name, family, pattern, exports_to) in cases {
        let dir = fixture(name);
        let arguments = [&["inspect", text(&dir), "--json", "--tensors"], needs(name)].concat();
        let report = run(&arguments).ok().json().remove(0);
        assert_eq!((&report["family"], &report["exports_to"]), (&json!(family), &exports_to), "{name}");
        assert!(pattern.is_empty() || report["pattern"] == pattern, "{name}: {report}");
        assert_eq!((&report["dtype"], &report["tokenizer"]), (&json!("f32"), &Value::Null), "{name}");
        assert!(!report["tensors"].as_array().unwrap().is_empty() && report["state_bytes"].as_u64() >= report["state_bytes_bf16"].as_u64());
        assert!(!report["notes"].to_string().contains("do not fit"), "{name}: {report}");
    }
    // The folder of an iteration is as good.
    run(&["inspect", text(&fixture("megatron-gpt-s17/release"))]).ok();
    let print = run(&["inspect", text(&fixture("native-mamba2attn-s17"))]).ok().out;
    assert!(print.contains("--layout native"), "{print}");
}

#[test]
fn inspect_knows_presets_unless_a_directory_has_the_name() {
    let print = run(&["inspect", "mamba2-130m"]).ok().out;
    assert!(print.contains("a preset") && print.contains("128989632") && print.contains("Mamba2ForCausalLM"), "{print}");
    let narrow = run(&["inspect", "mamba2-130m", "--json", "--set", "n_layer=2"]).ok().json().remove(0);
    assert_eq!((&narrow["pattern"], &narrow["preset"]), (&json!("MM"), &json!("mamba2-130m")));
    run(&["inspect", "mamba2-131m"]).fails(1, &["mamba2-131m"]);
}

#[test]
fn set_completes_what_a_megatron_run_lacks() {
    let dir = fixture("megatron-hybrid-s17");
    let model = text(&dir);
    run(&["inspect", model]).fails(1, &["mamba_num_groups", "--set mamba_num_groups="]);
    run(&["generate", "--model", model, "--ids", "5"]).fails(1, &["--set mamba_num_groups="]);
    run(&["generate", "--model", model, "--ids", "5", "--set", "mamba_num_groups=3"]).fails(1, &["mamba_num_groups", "3"]);
    run(&["generate", "--model", model, "--ids", "5", "--set", "groups"]).fails(2, &["KEY=VALUE"]);
    assert_eq!(ids(&dir, &GROUPS).as_array().unwrap().len(), 6);
}

#[test]
fn exports_continue_as_their_sources_do() {
    let names = [
        "native-mamba-s17",
        "native-mamba2-s2024",
        "native-mamba2attn-s17",
        "native-transformerpp-s17",
        "megatron-gpt-s17",
        "megatron-hybrid-s17",
        "granite-hybrid-s17",
    ];
    for name in names {
        let (source, out) = (fixture(name), TempDir::new().unwrap());
        let to = out.path().join("model");
        let ran = run(&[&["export", text(&source), text(&to)], needs(name)].concat()).ok();
        assert!(ran.out.contains("family") && ran.out.contains("terrarium"), "{}", ran.out);
        assert_eq!(ran.out.contains("AutoModelForCausalLM"), name != "native-mamba2attn-s17", "{}", ran.out);
        assert_eq!(ids(&to, &[]), ids(&source, needs(name)), "{name}");
        for file in ["config.json", "model.safetensors", "generation_config.json", "README.md"] {
            assert!(to.join(file).is_file(), "{name}: no {file}");
        }
        let source_files: Vec<_> = std::fs::read_dir(&source).unwrap().collect();
        assert!(source_files.len() >= 4, "the source is left alone");
    }
}

#[test]
fn exports_have_the_type_the_shards_and_the_layout_asked_for() {
    let (source, out) = (fixture("native-mamba2-s17"), TempDir::new().unwrap());
    let to = out.path().join("bf16");
    let arguments = ["convert", text(&source), text(&to), "--dtype", "bf16", "--max-shard-size", "20KB", "--json"];
    let report = run(&arguments).ok().json().remove(0);
    assert_eq!((&report["family"], &report["to_family"], &report["dtype"]), (&json!("mamba_ssm"), &json!("mamba2"), &json!("bfloat16")));
    assert_eq!(report["architecture"], "Mamba2ForCausalLM");
    let files = report["files"].to_string();
    assert!(files.contains("model-00001-of-") && files.contains("model.safetensors.index.json"), "{files}");
    assert_eq!(run(&["inspect", text(&to), "--json"]).ok().json()[0]["dtype"], "bf16");
    let native = out.path().join("native");
    let back = run(&["export", text(&to), text(&native), "--layout", "native", "--dtype", "f32", "--json"]).ok().json().remove(0);
    assert_eq!((&back["to_family"], &back["architecture"]), (&json!("mamba_ssm"), &Value::Null));
    let own = out.path().join("own");
    let own = run(&["export", text(&source), text(&own), "--layout", "own", "--json"]).ok().json().remove(0);
    assert_eq!(own["to_family"], "mamba_ssm");
}

#[test]
fn exports_are_refused_where_they_would_lose_something() {
    let out = TempDir::new().unwrap();
    let to = out.path().join("model");
    let (attention, mamba) = (fixture("native-mamba2attn-s17"), fixture("native-mamba-s17"));
    run(&["export", text(&attention), text(&to), "--layout", "hf"]).fails(2, &["mamba_ssm", "--layout native"]);
    assert!(!to.exists());
    run(&["export", text(&fixture("granite-hybrid-s17")), text(&to), "--layout", "native"]).fails(2, &["--layout hf"]);
    run(&["export", text(&mamba), text(&to), "--max-shard-size", "big"]).fails(2, &["5GB"]);
    run(&["export", text(&mamba), text(&to), "--adapter", text(&mamba)]).fails(2, &["adapter_config.json"]);
    run(&["export", text(&mamba), text(&to), "--tokenizer", text(&mamba)]).fails(2, &["no tokenizer.json"]);

    std::fs::create_dir(&to).unwrap();
    std::fs::write(to.join("mine.txt"), "kept").unwrap();
    run(&["export", text(&mamba), text(&to)]).fails(2, &["not empty", "--force"]);
    run(&["export", text(&mamba), text(&to), "--force"]).ok();
    assert_eq!(std::fs::read_to_string(to.join("mine.txt")).unwrap(), "kept");
    assert!(to.join("config.json").is_file());
    let copy = crate::common::copy_of(&mamba);
    run(&["export", text(copy.path()), text(copy.path()), "--force"]).fails(1, &["choose another"]);
}

#[test]
fn tokenizers_come_from_elsewhere() {
    let (source, tokens) = (fixture("native-mamba2-s17"), tiny_model());
    let base = ["generate", "--model", text(&source), "--prompt", "The", "-n", "3", "--json"];
    run(&base).fails(1, &["--tokenizer", "EleutherAI/gpt-neox-20b"]);
    // Its ids are more than this small model has; those of these letters are not.
    let answer = run(&[&base[..], &["--tokenizer", text(tokens)]].concat());
    assert!(answer.code == Some(0) || answer.err.contains("out of range"), "{answer:#?}");
    let out = TempDir::new().unwrap();
    let to = out.path().join("model");
    run(&["export", text(&source), text(&to), "--tokenizer", text(&tokens.join("tokenizer.json"))]).ok();
    assert_eq!(std::fs::read(to.join("tokenizer.json")).unwrap(), std::fs::read(tokens.join("tokenizer.json")).unwrap());
}

#[test]
fn an_adapter_is_folded_in_by_an_export() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("data.txt"), crate::common::prose(200)).unwrap();
    let run_dir = dir.path().join("run");
    let data = dir.path().join("data.txt");
    let model = text(tiny_model());
    let arguments = ["finetune", "--model", model, "--data", text(&data), "--steps", "2", "--sequence-length", "32", "--samples", "0"];
    run(&[&arguments[..], &["--out-dir", text(&run_dir), "--no-tui", "--set", "train.eval_every=0"]].concat()).ok();
    let to = dir.path().join("merged");
    run(&["export", model, text(&to), "--adapter", text(&run_dir)]).ok();
    assert_eq!(ids(&to, &[]), ids(&run_dir.join("model"), &[]));
}

#[test]
fn a_megatron_run_is_fine_tuned_with_a_tokenizer_and_keys_from_elsewhere() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("data.txt");
    std::fs::write(&data, "a b c\n".repeat(200)).unwrap();
    let source = fixture("megatron-hybrid-s17");
    let base = ["finetune", "--model", text(&source), "--data", text(&data), "--dry-run", "--tokenizer", text(tiny_model())];
    run(&base).fails(1, &["mamba_num_groups", "--set"]);
    // The model is read now, and has fewer ids than that tokenizer.
    let told = run(&[&base[..], &GROUPS].concat());
    assert!(told.code == Some(0) || (told.err.contains("vocab") && !told.err.contains("mamba_num_groups")), "{told:#?}");
}

#[test]
fn a_preset_is_a_model_to_train() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("text.txt"), crate::common::prose(100)).unwrap();
    let config = dir.path().join("run.toml");
    let data = "[data]\ntrain = [\"text.txt\"]\ntokenizer = \"bpe:300\"\n[train]\nsteps = 1\n";
    std::fs::write(&config, format!("[model]\npreset = \"mamba2-130m\"\nn_layer = 2\nvocab_size = 304\n{data}")).unwrap();
    let plan = run(&["train", "--config", text(&config), "--dry-run"]).ok().out;
    assert!(plan.contains("model       MM"), "{plan}");
    std::fs::write(&config, data).unwrap();
    let plan = run(&["train", "--config", text(&config), "--preset", "smollm2-135m", "--set", "num_hidden_layers=1", "--dry-run"]).ok().out;
    assert!(plan.contains("model       *-"), "{plan}");
    run(&["train", "--config", text(&config), "--preset", "mamba2-13m", "--dry-run"]).fails(2, &["model.preset", "mamba2-130m"]);
}

fn at(hub: &Hub, cache: &TempDir, arguments: &[&str]) -> Ran {
    terrarium(arguments).env("HF_HOME", cache.path()).env("HF_ENDPOINT", hub.endpoint()).output().unwrap().into()
}

#[test]
fn inspect_asks_a_hub_for_headers_alone() {
    let (granite, native, megatron) = (fixture("granite-hybrid-s17"), fixture("native-mamba2-s17"), fixture("megatron-gpt-s17"));
    let (hub, cache) = (Hub::of(&[("org/granite", &granite), ("org/native", &native), ("org/run", &megatron)]), TempDir::new().unwrap());
    let local = run(&["inspect", text(&granite), "--json", "--tensors"]).ok().json().remove(0);
    let remote = at(&hub, &cache, &["inspect", "org/granite", "--json", "--tensors"]).ok().json().remove(0);
    for key in ["family", "parameters", "dtype", "bytes", "tensors", "notes"] {
        assert_eq!(remote[key], local[key], "{key}");
    }
    assert!(hub.sent() < 40_000, "{} bytes of a file of 300 000", hub.sent());
    let offline = at(&hub, &cache, &["inspect", "org/granite", "--json", "--offline"]).ok().json().remove(0);
    assert_eq!((&offline["bytes"], &offline["parameters"]), (&Value::Null, &local["parameters"]));
    assert!(offline["notes"].to_string().contains("offline"), "{offline}");
    // The shapes are right where the configuration is not.
    let wrong = at(&hub, &cache, &["inspect", "org/granite", "--json", "--set", "vocab_size=500"]).ok().json().remove(0);
    assert_eq!(wrong["vocab_size"], local["vocab_size"]);
    assert!(wrong["notes"][0].as_str().unwrap().contains("500"), "{wrong}");

    let pickled = at(&hub, &cache, &["inspect", "org/native", "--json"]).ok().json().remove(0);
    assert!(pickled["bytes"].as_u64() > Some(70_000) && pickled["dtype"].is_null(), "{pickled}");
    assert!(pickled["notes"].to_string().contains("pickled"), "{pickled}");
    at(&hub, &cache, &["inspect", "org/run"]).fails(2, &["org/run", "terrarium download org/run"]);

    // Downloaded, they are as good as a directory.
    at(&hub, &cache, &["download", "org/native"]).ok();
    let here = at(&hub, &cache, &["inspect", "org/native", "--json", "--offline"]).ok().json().remove(0);
    assert_eq!((&here["dtype"], &here["notes"]), (&json!("f32"), &json!([])));
    at(&hub, &cache, &["download", "org/run"]).ok();
    let run_here = at(&hub, &cache, &["inspect", "org/run", "--json"]).ok().json().remove(0);
    assert_eq!(run_here["family"], "megatron");
}

#[test]
fn exports_and_tokenizers_come_from_a_hub() {
    let (native, tokens) = (fixture("native-mamba2-s17"), tiny_model());
    let (hub, cache) = (Hub::of(&[("org/native", &native), ("org/tokens", tokens)]), TempDir::new().unwrap());
    let to = cache.path().join("out");
    at(&hub, &cache, &["export", "org/native", text(&to), "--tokenizer", "org/tokens"]).ok();
    assert!(to.join("tokenizer.json").is_file());
    let card = std::fs::read_to_string(to.join("README.md")).unwrap();
    assert!(card.contains("base_model: org/native") && card.contains("library_name: transformers"), "{card}");
    assert_eq!(ids(&to, &[]), ids(&native, &[]));
}

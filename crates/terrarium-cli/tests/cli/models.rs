//! generate, score, inspect, bench on models that are well and models that are not.

use std::io::{Read, Write};
use std::process::Stdio;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::common::{Ran, copy_of, run, shared_data, signal, terrarium, text, tiny_model};

fn score(model: &str, lines: &str, more: &[&str]) -> Ran {
    let arguments = [&["score", "--model", model, "--input", "-"], more].concat();
    let mut child = terrarium(&arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(lines.as_bytes()).unwrap();
    child.wait_with_output().unwrap().into()
}

#[test]
fn generate_json_has_ids_and_text() {
    let model = text(tiny_model());
    let base = ["generate", "--model", model, "--max-new-tokens", "5", "--temperature", "0", "--ignore-eos"];
    let ran = run(&[&base[..], &["--prompt", "The fox", "--json"]].concat()).ok();
    let answer = ran.json().remove(0);
    assert_eq!(ran.out.lines().count(), 1);
    assert_eq!(answer.as_object().unwrap().keys().collect::<Vec<_>>(), ["ids", "text"]);
    assert_eq!(answer["ids"].as_array().unwrap().len(), 5);
    // The same text streams without --json, and timings stay out of it.
    let streamed = run(&[&base[..], &["--prompt", "The fox"]].concat()).ok();
    assert_eq!(streamed.out.strip_suffix('\n'), answer["text"].as_str());
    assert!(streamed.err.contains("tokens/s") && !ran.out.contains("tokens/s"));
    assert_eq!(run(&[&base[..], &["--prompt", "The fox", "-q"]].concat()).ok().err, "");
    // A batch gives what each prompt gives alone.
    let both = run(&[&base[..], &["--prompt", "It was a cold day, and", "--prompt", "The fox", "--json"]].concat()).ok().json();
    assert_eq!(both[1], answer);
    // Every kernel choice that exists gives the same ids.
    let slow = run(&[&base[..], &["--prompt", "The fox", "--json", "--kernel", "reference"]].concat()).ok().json().remove(0);
    assert_eq!(slow, answer);
}

#[test]
fn states_are_saved_and_gone_on_from() {
    let model = text(tiny_model());
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("a.state");
    let state = text(&file);
    let base = ["generate", "--model", model, "--temperature", "0", "--ignore-eos", "--json"];
    let answer = |more: &[&str]| run(&[&base[..], more].concat()).ok().json().remove(0);
    let whole = answer(&["--prompt", "The fox", "-n", "9"]);
    let first = answer(&["--prompt", "The fox", "-n", "4", "--save-state", state]);
    assert_eq!(first.as_object().unwrap().keys().collect::<Vec<_>>(), ["ids", "text"]);
    // Without a prompt its text is continued; saved over the file it came from.
    let second = answer(&["--load-state", state, "-n", "5", "--save-state", state]);
    let ids = |answer: &Value| answer["ids"].as_array().unwrap().clone();
    assert_eq!([ids(&first), ids(&second)].concat(), ids(&whole));
    assert!(second["reused"].as_u64().unwrap() > 4, "{second}");
    let third = run(&[&base[..], &["--load-state", state, "-n", "1"]].concat()).ok();
    assert_eq!(third.json()[0]["reused"].as_u64().unwrap(), second["reused"].as_u64().unwrap() + 5);
    // Another text: nothing is reused, and that is said; the model is a hybrid.
    let other = run(&[&base[..], &["--load-state", state, "--prompt", "It was", "-n", "3"]].concat()).ok();
    assert!(other.json()[0]["reused"] == 0 && other.err.contains("nothing of the state is reused"), "{other:?}");
    assert_eq!(ids(&other.json()[0]), ids(&answer(&["--prompt", "It was", "-n", "3"])));
    // A prompt in ids that begins with all of the state.
    let prompt = "5,17,3";
    answer(&["--ids", prompt, "-n", "0", "--save-state", state]);
    let longer = answer(&["--ids", "5,17,3,8", "-n", "4", "--load-state", state]);
    assert!(longer["reused"] == 3 && ids(&longer) == ids(&answer(&["--ids", "5,17,3,8", "-n", "4"])), "{longer}");

    run(&[&base[..], &["--prompt", "a", "--prompt", "b", "--save-state", state]].concat()).fails(2, &["one prompt", "there are 2"]);
    run(&[&base[..], &["--prompt", "a", "--save-state", text(dir.path())]].concat()).fails(2, &["is a directory"]);
    run(&[&base[..], &["--load-state", "/nowhere.state"]].concat()).fails(1, &["/nowhere.state"]);
    run(&["generate", "--load-state", state]).fails(1, &["another configuration", "without the state"]);
    run(&[&base[..], &["--load-state", state, "--dtype", "bf16"]].concat()).fails(1, &["saved in f32", "--dtype f32"]);
    run(&[&base[..], &["--load-state", &format!("{model}/model.safetensors")]].concat()).fails(1, &["not a saved state"]);
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 9]).unwrap();
    run(&[&base[..], &["--load-state", state]].concat()).fails(1, &["a.state", "truncated"]);
    // Only whole files appear.
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn an_interrupted_answer_exits_with_130() {
    let arguments = ["generate", "--model", text(tiny_model()), "--prompt", "The fox", "-n", "1000000", "--ignore-eos"];
    let mut child = terrarium(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 1];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    signal(&child, "INT");
    Ran::from(child.wait_with_output().unwrap()).fails(130, &["interrupted"]);
}

#[test]
fn prompts_come_from_files_and_seeds_decide_samples() {
    let model = text(tiny_model());
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("prompts.jsonl");
    std::fs::write(&file, "{\"prompt\": \"The owl\"}\n\n{\"ids\": [5, 17, 3]}\n").unwrap();
    let sample = |seed: &str| {
        let arguments = ["generate", "--model", model, "--file", text(&file), "-n", "12", "--temperature", "1", "--seed", seed, "--json"];
        run(&arguments).ok().json()
    };
    assert_eq!(sample("1").len(), 2);
    assert_eq!(sample("1"), sample("1"));
    assert_ne!(sample("1"), sample("2"));
    std::fs::write(&file, "{\"prompt\": \"a\"}\n{\"promt\": \"b\"}\n").unwrap();
    run(&["generate", "--model", model, "--file", text(&file)]).fails(1, &["prompts.jsonl, line 2"]);
}

#[test]
fn ids_need_no_tokenizer_and_text_does() {
    let bare = copy_of(tiny_model());
    std::fs::remove_file(bare.path().join("tokenizer.json")).unwrap();
    let model = text(bare.path());
    let answer = run(&["generate", "--model", model, "--ids", "5,17,3", "-n", "4", "--temperature", "0", "--json", "--ignore-eos"])
        .ok()
        .json()
        .remove(0);
    assert_eq!((answer["ids"].as_array().unwrap().len(), &answer["text"]), (4, &Value::Null));
    run(&["generate", "--model", model, "--prompt", "The fox"]).fails(1, &["no tokenizer.json", "--ids"]);
    run(&["generate", "--model", model, "--ids", "5,99999"]).fails(1, &["99999", "out of range"]);
    let scored = score(model, "{\"ids\": [5, 17, 3]}\n", &["--top", "2"]).ok().json().remove(0);
    assert_eq!(scored["tokens"], json!([17, 3]));
    let logprobs: Vec<f64> = scored["logprobs"].as_array().unwrap().iter().map(|p| p.as_f64().unwrap()).collect();
    assert!(logprobs.len() == 2 && logprobs.iter().all(|p| *p < 0.0));
    assert!((scored["sum"].as_f64().unwrap() - logprobs.iter().sum::<f64>()).abs() < 1e-5);
    assert_eq!(scored["greedy"].as_array().unwrap().len(), 2);
    assert_eq!(scored["top"][0].as_array().unwrap().len(), 2);
    score(model, "{\"context\": \"a\", \"continuation\": \"b\"}\n", &[]).fails(1, &["line 1", "tokenizer"]);
}

#[test]
fn score_names_the_bad_line() {
    let model = text(tiny_model());
    let good = "{\"context\": \"The fox\", \"continuation\": \" saw the sea\"}\n";
    let scored = score(model, &format!("{good}{{\"ids\": [5, 17]}}\n"), &[]).ok().json();
    assert_eq!(scored.len(), 2);
    score(model, &format!("{good}\n{{\"ids\": [5\n"), &[]).fails(1, &["line 3"]);
    score(model, &format!("{good}{{\"ids\": [5, 99999]}}\n"), &[]).fails(1, &["line 2", "99999"]);
    score(model, "\n", &[]).fails(2, &["nothing to score"]);
}

#[test]
fn stories_continue_as_recorded() {
    let Some(model) = shared_data("models/stories260k-hf") else { return };
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(model.join("golden.json")).unwrap()).unwrap();
    let ids = golden["greedy_from_bos_ids"].as_array().unwrap();
    let n = (ids.len() - 1).to_string();
    let arguments =
        ["generate", "--model", text(&model), "--ids", "1", "--max-new-tokens", &n, "--temperature", "0", "--json", "--ignore-eos"];
    let answer = run(&arguments).ok().json().remove(0);
    assert_eq!(answer["ids"].as_array().unwrap()[..], ids[1..]);
    let told = golden["greedy_from_bos_text"].as_str().unwrap();
    assert!(told.contains(answer["text"].as_str().unwrap().trim()), "{answer}");
}

#[test]
fn broken_models_are_explained() {
    let with = |damage: &dyn Fn(&std::path::Path)| {
        let copy = copy_of(tiny_model());
        damage(copy.path());
        run(&["generate", "--model", text(copy.path()), "--prompt", "a"])
    };
    with(&|dir| std::fs::write(dir.join("model.safetensors"), "not at all").unwrap()).fails(1, &["model.safetensors"]);
    with(&|dir| {
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        std::fs::write(dir.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    })
    .fails(1, &["truncated"]);
    with(&|dir| std::fs::write(dir.join("config.json"), "{\"model_type\": \"abacus\"}").unwrap()).fails(1, &["abacus", "llama"]);
    with(&|dir| std::fs::write(dir.join("config.json"), "{").unwrap()).fails(1, &["config.json"]);
    with(&|dir| std::fs::remove_file(dir.join("model.safetensors")).unwrap()).fails(1, &["no model.safetensors"]);
    with(&|dir| {
        let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
        std::fs::write(dir.join("config.json"), text.replace("M-*-", "M-*-M")).unwrap();
    })
    .fails(1, &["missing"]);
    run(&["generate", "--model", "/nowhere/at/all", "--prompt", "a"]).fails(1, &["/nowhere/at/all"]);
}

#[test]
fn inspect_says_what_a_model_is() {
    let model = text(tiny_model());
    let report = run(&["inspect", model, "--json", "--tokens", "100", "--tensors"]).ok().json().remove(0);
    assert_eq!((&report["family"], &report["pattern"]), (&json!("nemotron_h"), &json!("M-*-")));
    let counted: u64 = report["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|t| t["name"] != "lm_head.weight") // the second copy of a tied head
        .map(|t| t["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).product::<u64>())
        .sum();
    assert_eq!(report["parameters"].as_u64(), Some(counted));
    assert!(report["state_bytes"].as_u64().unwrap() > 0 && report["state_tokens"] == 100);
    let longer = run(&["inspect", model, "--json", "--tokens", "200"]).ok().json().remove(0);
    assert!(longer["state_bytes"].as_u64() > report["state_bytes"].as_u64());
    let print = run(&["inspect", "--model", model]).ok().out;
    assert!(print.contains("M-*-") && print.contains("parameters"), "{print}");
    let bare = copy_of(tiny_model());
    std::fs::remove_file(bare.path().join("model.safetensors")).unwrap();
    let guess = run(&["inspect", text(bare.path()), "--json"]).ok().json().remove(0);
    assert_eq!((&guess["bytes"], &guess["parameters"]), (&Value::Null, &report["parameters"]));
}

#[test]
fn fused_kernels_are_promised_only_where_they_are() {
    let model = text(tiny_model());
    let report = run(&["doctor", "--json"]).ok().json().remove(0);
    let slow: Vec<&str> = report["paths"]
        .as_array()
        .unwrap()
        .iter()
        // No model runs a running sum.
        .filter(|path| path["path"] == "reference" && path["op"] != "cumsum")
        .filter_map(|path| path["op"].as_str())
        .collect();
    let ran = run(&["generate", "--model", model, "--prompt", "The fox", "-n", "2", "--kernel", "fused"]);
    match slow.first() {
        None => drop(ran.ok()),
        Some(op) => drop(ran.fails(2, &[op, "no fast path", "hint: "])),
    }
}

#[test]
fn bench_prints_the_fields_that_others_read() {
    let model = text(tiny_model());
    let arguments = [
        "bench",
        "--model",
        model,
        "--prompt-tokens",
        "4",
        "--new-tokens",
        "3",
        "--prefill",
        "16",
        "--train-tokens",
        "16",
        "--repeats",
        "2",
    ];
    let report = run(&[&arguments[..], &["--json", "--threads", "1"]].concat()).ok().json().remove(0);
    for part in ["decode_ms_per_token", "prefill_ms", "train_step_ms"] {
        let times = report[part].as_array().unwrap();
        assert!(times.len() == 2 && times.iter().all(|t| t.as_f64().unwrap() > 0.0), "{report}");
    }
    assert_eq!(report["threads"], 1);
    let off = run(&["bench", "--model", model, "--new-tokens", "0", "--train-tokens", "0", "--prefill", "8", "--repeats", "1", "--json"])
        .ok()
        .json()
        .remove(0);
    assert_eq!((&off["decode_ms_per_token"], &off["train_step_ms"]), (&json!([]), &json!([])));
}

#[test]
fn bench_ops_checks_and_times_what_is_asked_for() {
    let quick = ["bench", "ops", "--size", "quick", "--device", "cpu"];
    let lines = run(&[&quick[..], &["--op", "rms_norm_gated,ssd_step", "--json"]].concat()).ok().json();
    assert!(lines[0]["copy_tbs"].as_f64().unwrap() > 0.0, "{}", lines[0]);
    let ops: Vec<&str> = lines[1..].iter().map(|row| row["op"].as_str().unwrap()).collect();
    assert_eq!(ops, ["ssd_step", "rms_norm_gated", "rms_norm_gated"]);
    for row in &lines[1..] {
        assert!(row["forward"]["ms"].as_f64().unwrap() > 0.0 && row["failed"] == false, "{row}");
        assert!(row["errors"].as_array().unwrap().iter().all(|e| e["error"].as_f64().unwrap() < 1e-5), "{row}");
    }
    let checked = run(&[&quick[..], &["--case", "ragged", "--check-only", "-q"]].concat()).ok();
    assert!(checked.err.is_empty() && checked.out.contains("largest error"), "{}", checked.out);
    drop(run(&[&quick[..], &["--op", "sdd"]].concat()).fails(2, &["sdd", "known: ssd, "]));
    drop(run(&[&quick[..], &["--case", "l=7777"]].concat()).fails(2, &["l=7777"]));
    // Without a word more, `bench` is still about models.
    drop(run(&["bench", "--new-tokens", "1", "ops"]).fails(2, &["cannot be used with"]));
}

#[test]
fn bench_says_what_reading_and_decoding_take() {
    let run = |part: &str, batch: &str| {
        let command =
            ["bench", part, "--preset", "pythia-14m", "--tokens", "100", "--new-tokens", "2", "--repeats", "2", "--device", "cpu"];
        run(&[&command[..], &["--batch", batch, "--dtype", "f32", "--json"]].concat()).ok().json().remove(0)
    };
    let number = |value: &Value, key: &str| value[key].as_f64().unwrap_or_else(|| panic!("no {key} in {value}"));
    let read = run("prefill", "2");
    assert!(number(&read, "memory_bytes") > 14e6 * 4.0 && read["cache_bytes"].is_null(), "{read}");
    let (one, two) = (run("decode", "1"), run("decode", "2"));
    // 6 layers of keys and values of 128, for 100 tokens and the 12 that follow.
    let token = 6.0 * 2.0 * 128.0 * 4.0;
    assert_eq!([number(&one, "cache_bytes"), number(&two, "cache_bytes")], [112.0 * token, 224.0 * token]);
    assert_eq!(number(&two, "floor_bytes") - number(&one, "floor_bytes"), 100.0 * token);
    let floor = number(&one, "floor_bytes") / number(&one, "copy_tbs") / 1e9;
    assert!((number(&one, "floor_ms") / floor - 1.0).abs() < 1e-9);
    assert!((number(&one, "of_floor") * number(&one, "median_ms") / floor - 1.0).abs() < 1e-9);
}

#[test]
fn bench_train_takes_the_step_apart() {
    let command = ["bench", "train", "--preset", "pythia-14m", "--tokens", "16", "--repeats", "1", "--device", "cpu"];
    let report = run(&[&command[..], &["--json"]].concat()).ok().json().remove(0);
    let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("no {key} in {report}"));
    assert!((number("utilisation") * number("matmul_tflops") / number("model_tflops") - 1.0).abs() < 1e-9, "{report}");
    assert!(number("memory_bytes") > 1e7, "{report}");
    let shares = report["shares"].as_array().unwrap();
    let sum: f64 = shares.iter().map(|share| share["ms"].as_f64().unwrap()).sum();
    assert!((sum + number("other_ms") - number("median_ms")).abs() < 1e-6, "{report}");
    // Six layers of attention and MLPs beside it.
    let calls = |op: &str| shares.iter().filter(|share| share["op"] == op).map(|share| share["calls"].as_u64().unwrap()).sum::<u64>();
    assert_eq!([calls("attention"), calls("linear"), calls("norm_residual"), calls("ssd")], [6, 6 * 6 + 1, 13, 0], "{report}");
    let text = run(&command).ok().out;
    assert!(text.contains("attention b=1 l=16 h=4 g=4 p=32") && text.contains("waiting for the host"), "{text}");
    let without = run(&[&command[..], &["--no-shares", "--json"]].concat()).ok().json().remove(0);
    assert!(without["shares"].is_null() && without["median_ms"].as_f64().unwrap() > 0.0, "{without}");
    drop(run(&["bench", "train", "--preset", "pythia-14m", "--tokens", "1"]).fails(2, &["--tokens"]));
}

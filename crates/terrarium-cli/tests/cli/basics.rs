//! Help, exit codes, output streams.

use std::fs::File;
use std::process::Stdio;

use tempfile::TempDir;

use crate::common::{run, terrarium, text, tiny_model};

const COMMANDS: [&str; 12] =
    ["models", "export", "download", "inspect", "generate", "score", "train", "finetune", "merge", "plot", "doctor", "bench"];

#[test]
fn help_of_every_command_has_an_example() {
    let all = run(&["--help"]).ok().out;
    for command in COMMANDS {
        assert!(all.contains(command), "{command} is not listed");
        let help = run(&["help", command]).ok().out;
        assert!(help.contains("Example") && help.contains(&format!("terrarium {command}")), "{help}");
        assert_eq!(run(&[command, "--help"]).ok().out, help);
    }
    run(&["--version"]).ok();
}

#[test]
fn wrong_usage_exits_with_2() {
    run(&["fly"]).fails(2, &["fly"]);
    run(&["generate"]).fails(2, &["--prompt"]);
    run(&["generate", "--ids", "1,x"]).fails(2, &["`x` is not a token id"]);
    run(&["generate", "--prompt", "a", "--device", "abacus"]).fails(2, &["no such device: `abacus`", "auto, cpu"]);
    run(&["doctor", "--device", "cpu:first"]).fails(2, &["cpu:first"]);
    run(&["generate", "--prompt", "a", "--kernel", "quick"]).fails(2, &["quick", "reference"]);
    run(&["generate", "--prompt", "a", "--dtype", "int3"]).fails(2, &["int3", "bf16"]);
    run(&["finetune", "--model", "some/model"]).fails(2, &["--data", "hint: "]);
    run(&["train", "--config", "x.toml", "--threads", "0"]).fails(2, &["--threads"]);
}

#[test]
fn a_backend_that_is_not_compiled_in_is_named() {
    let devices = run(&["doctor", "--json"]).ok().json().remove(0);
    let compiled: Vec<&str> = devices["backends"].as_array().unwrap().iter().filter_map(|name| name.as_str()).collect();
    let Some(absent) = ["rocm", "metal", "cuda"].into_iter().find(|name| !compiled.contains(name)) else { return };
    let model = text(tiny_model());
    run(&["generate", "--model", model, "--prompt", "a", "--device", absent]).fails(2, &[absent, "--features", "hint: "]);
}

#[test]
fn doctor_reports_in_json_and_checks_itself() {
    let report = run(&["doctor", "--json", "--check", "--threads", "1"]).ok().json().remove(0);
    assert!(report["devices"].as_array().unwrap().iter().any(|device| device["works"] == true));
    assert_eq!(report["cpu"]["threads"], 1);
    let paths = report["paths"].as_array().unwrap();
    assert!(["linear", "ssd", "attention"].iter().all(|op| paths.iter().any(|path| path["op"] == *op)), "{report}");
    assert!(report["checks"].as_array().unwrap().iter().all(|check| check["passed"] == true), "{report}");
    assert!(report["advice"].is_array() && report["folders"][0]["writable"] == true);
    let forced = run(&["doctor", "--json", "--kernel", "reference"]).ok().json().remove(0);
    assert!(forced["paths"].as_array().unwrap().iter().all(|path| path["path"] == "reference"), "{forced}");
}

#[test]
fn output_that_goes_nowhere_is_silent_and_a_full_disk_is_not() {
    let model = text(tiny_model());
    let arguments = ["generate", "--model", model, "--prompt", "The fox", "--max-new-tokens", "2000", "--ignore-eos"];
    let mut child = terrarium(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), String::from_utf8_lossy(&ended.stderr).as_ref()), (Some(0), ""));
    if let Ok(full) = File::options().write(true).open("/dev/full") {
        let output = terrarium(&["inspect", model]).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stderr).contains("error: cannot write to standard output"));
    }
}

#[test]
fn the_bundled_model_needs_no_arguments_but_a_cache_folder() {
    let cache = TempDir::new().unwrap();
    let arguments = ["generate", "--prompt", "The", "--max-new-tokens", "4", "--temperature", "0", "--json"];
    let first = terrarium(&arguments).env("XDG_CACHE_HOME", cache.path()).output().unwrap();
    assert!(first.status.success(), "{first:?}");
    let unpacked: Vec<_> = std::fs::read_dir(cache.path().join("terrarium")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(unpacked.len(), 1, "one folder and no remains: {unpacked:?}");
    // A damaged copy is replaced.
    std::fs::write(unpacked[0].join("model/model.safetensors"), "cut").unwrap();
    let again = terrarium(&arguments).env("XDG_CACHE_HOME", cache.path()).output().unwrap();
    assert_eq!(again.stdout, first.stdout, "{again:?}");
    let blocked = cache.path().join("file");
    std::fs::write(&blocked, "").unwrap();
    let output = terrarium(&arguments).env("XDG_CACHE_HOME", &blocked).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && message.contains("XDG_CACHE_HOME"), "{message}");
}

//! Runs: whole, killed, interrupted, on a full disk, resumed, merged, drawn.

use std::path::Path;
use std::process::{Child, Stdio};

use tempfile::TempDir;

use crate::common::{Ran, run, signal, terrarium, text, tiny_config, tiny_model, wait_for};

const STEPS: usize = 300;

fn train(config: &Path, out: &Path, more: &[&str]) -> Ran {
    run(&[&["train", "--config", text(config), "--out-dir", text(out), "--no-tui"], more].concat())
}

fn start(config: &Path, out: &Path) -> Child {
    let arguments = ["train", "--config", text(config), "--out-dir", text(out), "--no-tui"];
    terrarium(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn weights(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("model/model.safetensors")).unwrap()
}

fn checkpoints(run: &Path) -> usize {
    std::fs::read_dir(run.join("checkpoints"))
        .map_or(0, |entries| entries.flatten().filter(|entry| entry.path().join("state.json").exists()).count())
}

#[test]
fn killed_or_interrupted_and_resumed_is_uninterrupted() {
    let dir = TempDir::new().unwrap();
    let config = tiny_config(dir.path(), STEPS);
    let whole = dir.path().join("whole");
    let ran = train(&config, &whole, &[]).ok();
    assert!(ran.out.contains(text(&whole.join("model"))), "{ran:#?}");

    let killed = dir.path().join("killed");
    let mut child = start(&config, &killed);
    wait_for("a checkpoint", || checkpoints(&killed) > 0);
    signal(&child, "KILL");
    child.wait().unwrap();
    assert!(!killed.join("model").exists(), "the run ended before it could be killed");
    train(&config, &killed, &["--resume"]).ok();
    assert!(weights(&killed) == weights(&whole), "kill -9 and resume changed the result");

    let stopped = dir.path().join("stopped");
    let child = start(&config, &stopped);
    wait_for("a checkpoint", || checkpoints(&stopped) > 0);
    signal(&child, "INT");
    let ran: Ran = child.wait_with_output().unwrap().into();
    ran.fails(130, &["interrupted", "--resume"]);
    assert!(!stopped.join("model").exists());
    train(&config, &stopped, &[]).fails(2, &["--resume"]);
    train(&config, &stopped, &["--resume", "auto"]).ok();
    assert!(weights(&stopped) == weights(&whole), "Ctrl-C and resume changed the result");
}

#[test]
fn a_disk_that_fills_up_leaves_nothing_half_written() {
    let dir = TempDir::new().unwrap();
    let config = tiny_config(dir.path(), 5);
    let out = dir.path().join("run");
    let command = format!(
        "trap '' XFSZ; ulimit -f 40; exec '{}' train --config '{}' --out-dir '{}' --no-tui",
        env!("CARGO_BIN_EXE_terrarium"),
        config.display(),
        out.display()
    );
    let output = std::process::Command::new("sh").args(["-c", &command]).output().unwrap();
    Ran::from(output).fails(1, &[text(&out)]);
    assert!(!out.join("model").exists() && checkpoints(&out) == 0);
    train(&config, &out, &["--resume"]).ok();
}

#[test]
fn configurations_and_data_that_are_wrong_are_named() {
    let dir = TempDir::new().unwrap();
    let config = tiny_config(dir.path(), 5);
    let out = dir.path().join("run");
    train(&config, &out, &["--set", "train.velocity=3"]).fails(2, &["velocity"]);
    train(&config, &out, &["--set", "nonsense"]).fails(2, &["KEY=VALUE"]);
    train(&dir.path().join("absent.toml"), &out, &[]).fails(2, &["absent.toml"]);
    train(&config, &out, &["--set", "data.train=/nowhere.txt"]).fails(1, &["/nowhere.txt"]);
    train(&config, &out, &["--set", "train.sequence_length=100000"]).fails(1, &["100000", "sequence_length"]);
    let planned = dir.path().join("planned");
    let plan = train(&config, &planned, &["--dry-run"]).ok();
    assert!(plan.out.contains("parameters"), "{plan:#?}");
    assert!(!planned.exists(), "nothing was started, nothing was made");
}

#[test]
fn a_bad_line_of_data_is_named() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("mine.jsonl");
    std::fs::write(&data, "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": \n").unwrap();
    let out = dir.path().join("run");
    let arguments = ["finetune", "--model", text(tiny_model()), "--data", text(&data), "--out-dir", text(&out), "--no-tui"];
    run(&arguments).fails(1, &["mine.jsonl", "line 2"]);
    std::fs::write(&data, "").unwrap();
    run(&arguments).fails(1, &["mine.jsonl"]);
}

#[test]
fn adapters_train_merge_and_generate() {
    let dir = TempDir::new().unwrap();
    let data = dir.path().join("mine.jsonl");
    let line = |i: usize| format!("{{\"prompt\": \"Day {i}:\", \"completion\": \" the owl slept.\"}}\n");
    std::fs::write(&data, (0..40).map(line).collect::<String>()).unwrap();
    let (out, merged) = (dir.path().join("run"), dir.path().join("merged"));
    let model = text(tiny_model());
    let arguments = ["finetune", "--model", model, "--data", text(&data), "--out-dir", text(&out), "--no-tui"];
    let more = ["--steps", "4", "--lora-rank", "4", "--lr", "1e-2", "--sequence-length", "64", "--batch", "2", "--samples", "2"];
    run(&[&arguments[..], &["--steps", "1", "--lora-targets", "abacus"]].concat()).fails(2, &["abacus"]);
    let fresh = dir.path().join("run2");
    let ran = run(&[&arguments[..5], &["--out-dir", text(&fresh), "--no-tui"], &more[..]].concat()).ok();
    assert!(ran.out.contains("-- before --") && ran.out.contains("-- after --"), "{ran:#?}");
    assert!(ran.out.contains(&format!("terrarium generate --model {}", text(&fresh.join("model")))), "{ran:#?}");
    assert!(ran.err.contains("adapting "), "{ran:#?}");
    let again = run(&[&arguments[..5], &["--out-dir", text(&fresh)], &more[..]].concat()).fails(2, &["already holds a run"]);
    assert_eq!(again.out, "", "a run that cannot start shows no samples");
    let made = run(&["merge", "--adapter", text(&fresh), "--out-dir", text(&merged), "--json"]).ok().json().remove(0);
    assert_eq!(made["dir"], text(&merged));
    let say =
        |model: &Path| run(&["generate", "--model", text(model), "--prompt", "Day 3:", "-n", "6", "--temperature", "0", "--json"]).ok().out;
    assert_eq!(say(&fresh.join("model")), say(&merged));
    assert_eq!(say(&fresh.join("adapter")), say(&merged), "an adapter is folded into its base when loaded");
    let inspected = run(&["inspect", text(&fresh.join("adapter")), "--json"]).ok().json().remove(0);
    assert_eq!((&inspected["rank"], &inspected["adapter"]), (&4.into(), &true.into()));
    run(&["merge", "--adapter", text(&merged), "--out-dir", text(&out)]).fails(2, &["adapter_config.json"]);
}

#[test]
fn curves_are_drawn_in_both_formats() {
    let run_dir = tiny_model().parent().unwrap();
    let dir = TempDir::new().unwrap();
    let (png, svg) = (dir.path().join("curves.png"), dir.path().join("curves.svg"));
    run(&["plot", text(run_dir), "--out", text(&png)]).ok();
    run(&["plot", text(run_dir), "--out", text(&svg)]).ok();
    assert!(std::fs::read(&png).unwrap().starts_with(b"\x89PNG"));
    assert!(std::fs::read_to_string(&svg).unwrap().contains("<svg"));
    let both = run(&["plot", text(run_dir), "--out", text(dir.path())]).ok();
    assert_eq!(both.out.lines().count(), 2, "{both:#?}");
    run(&["plot", text(dir.path())]).fails(1, &["log.jsonl"]);
}

//! Experiments from the outside: output, report folder, interruption.

use std::process::Stdio;

use tempfile::TempDir;

use crate::common::{Ran, run, signal, terrarium, text, wait_for};

#[test]
fn an_experiment_prints_its_table_and_verdict() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("report");
    let command = ["experiment", "mqar", "--smoke", "--set", "training.steps=3", "--device", "cpu", "--out", text(&out)];
    let ran = run(&command).ok();
    assert!(ran.out.contains("| Mamba-2 N=32 |") && ran.out.contains("verdict: ") && ran.out.contains("report.md"), "{ran:#?}");
    assert!(ran.err.contains("4 runs on "), "{ran:#?}");
    run(&command).fails(2, &["--resume"]);
    run(&["experiment", "absent"]).fails(2, &["absent", "mqar"]);
    run(&["experiment", "mqar", "--smoke", "--set", "training.stepz=3", "--out", text(&out)]).fails(2, &["stepz", "steps"]);
    run(&["experiment", "mqar", "--smoke", "--set", "models.layers=0", "--out", text(&out.join("other"))])
        .fails(2, &["at least one layer"]);
}

#[test]
fn interrupted_experiments_go_on() {
    let dir = TempDir::new().unwrap();
    let out = dir.path().join("report");
    let command = ["experiment", "mqar", "--smoke", "--device", "cpu", "--set", "training.stop_at=null", "--out", text(&out)];
    let child = terrarium(&command).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("a log", || std::fs::read_dir(out.join("logs")).is_ok_and(|mut logs| logs.next().is_some()));
    signal(&child, "INT");
    let ran: Ran = child.wait_with_output().unwrap().into();
    ran.fails(130, &["interrupted", "--resume"]);
    assert!(!out.join("report.md").exists());
    let more = [&command[..], &["--resume", "-q"]].concat();
    run(&more).ok();
    assert!(out.join("report.md").exists());
}

//! Steps that several devices share: on a CPU, several times the same one.

use terrarium_kernels::backend::DeviceSpec;
use terrarium_train::{Outcome, Resume, RunConfig, RunOptions, StopFlag, TrainError, run};

use crate::common::{Watch, assert_same_run, config, options};

fn shared(config: RunConfig, out: impl Into<std::path::PathBuf>, others: usize) -> RunOptions {
    RunOptions { others: vec![DeviceSpec::Cpu; others], ..options(config, out) }
}

/// Losses and norms of all steps.
fn curve(options: RunOptions) -> Vec<(f64, f64, u64)> {
    let watch = Watch::default();
    run(options, vec![Box::new(watch.clone())]).unwrap();
    let steps = watch.steps.lock().unwrap();
    steps.iter().map(|report| (report.loss, report.grad_norm, report.tokens)).collect()
}

#[test]
fn the_curve_is_that_of_one_device_with_the_same_rows() {
    let dir = tempfile::tempdir().unwrap();
    // Five rows over two and three devices: shares differ.
    let config = config(dir.path(), &["train.batch=5"]);
    let alone = curve(options(config.clone(), dir.path().join("alone")));
    assert!(alone[0].0 - alone[7].0 > 0.1, "nothing was learnt: {alone:?}");
    for others in [1, 2] {
        let found = curve(shared(config.clone(), dir.path().join(format!("with-{others}")), others));
        assert_eq!(found.len(), alone.len());
        for ((loss, norm, tokens), (expected, expected_norm, expected_tokens)) in found.into_iter().zip(&alone) {
            assert!(
                (loss / expected - 1.0).abs() < 1e-5 && (norm / expected_norm - 1.0).abs() < 1e-4,
                "{loss} {norm}, not {expected} {expected_norm}"
            );
            assert_eq!(tokens, *expected_tokens);
        }
    }
}

#[test]
fn shared_runs_resume_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["train.batch=3"]);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    run(shared(config.clone(), &a, 1), Vec::new()).unwrap();
    let stop = StopFlag::new();
    let watch = Watch { stop: Some((3, stop.clone())), ..Watch::default() };
    let first = run(RunOptions { stop, ..shared(config.clone(), &b, 1) }, vec![Box::new(watch)]).unwrap();
    assert_eq!((first.outcome, first.step), (Outcome::Interrupted, 3));
    run(RunOptions { resume: Resume::Auto, ..shared(config, &b, 1) }, Vec::new()).unwrap();
    assert_same_run(&a, &b, 8);
}

#[test]
fn more_devices_than_rows_and_different_backends_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = run(shared(config(dir.path(), &["train.batch=2"]), dir.path().join("a"), 2), Vec::new()).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("train.batch") && error.to_string().contains('3'), "{error}");
    let options = RunOptions { others: vec!["cuda:1".parse().unwrap()], ..options(config(dir.path(), &[]), dir.path().join("b")) };
    let error = run(options, Vec::new()).unwrap_err();
    assert!(matches!(error, TrainError::Device(_)), "{error}");
}

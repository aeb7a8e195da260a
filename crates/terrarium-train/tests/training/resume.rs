//! Stopping and going on.

use terrarium_train::{Outcome, Resume, RunOptions, StopFlag, TrainError, run};

use crate::common::{Watch, assert_same_run, config, options};

#[test]
fn resumed_runs_equal_uninterrupted_ones_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &[]);
    let straight = run(options(config.clone(), dir.path().join("a")), Vec::new()).unwrap();
    assert_eq!((straight.outcome, straight.step), (Outcome::Finished, 8));
    assert!(straight.model_dir.unwrap().join("config.json").exists());
    // Between validations, right after one, and at the very first step.
    for (name, at) in [("b", 3), ("c", 4), ("d", 1)] {
        let out = dir.path().join(name);
        let stop = StopFlag::new();
        let watch = Watch { stop: Some((at, stop.clone())), ..Watch::default() };
        let first = run(RunOptions { stop, ..options(config.clone(), &out) }, vec![Box::new(watch)]).unwrap();
        assert_eq!((first.outcome, first.step, first.model_dir), (Outcome::Interrupted, at, None));
        let watch = Watch::default();
        let second = run(RunOptions { resume: Resume::Auto, ..options(config.clone(), &out) }, vec![Box::new(watch.clone())]).unwrap();
        assert_eq!(second.outcome, Outcome::Finished);
        assert_eq!(watch.steps.lock().unwrap().iter().map(|report| report.step).collect::<Vec<_>>(), (at + 1..=8).collect::<Vec<_>>());
        assert_same_run(&dir.path().join("a"), &out, 8);
    }
}

#[test]
fn an_earlier_checkpoint_gives_the_same_end() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["train.keep=9"]);
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    run(options(config.clone(), &a), Vec::new()).unwrap();
    run(options(config.clone(), &b), Vec::new()).unwrap();
    // As if the process had been killed after step 4, while it wrote the checkpoint of step 6.
    for step in ["step-000006", "step-000008"] {
        std::fs::remove_dir_all(b.join("checkpoints").join(step)).unwrap();
    }
    std::fs::create_dir_all(b.join("checkpoints/.step-000006-x")).unwrap();
    let report = run(RunOptions { resume: Resume::From(b.clone()), ..options(config, &b) }, Vec::new()).unwrap();
    assert_eq!(report.outcome, Outcome::Finished);
    assert_same_run(&a, &b, 8);
    assert!(!b.join("checkpoints/.step-000006-x").exists());
}

#[test]
fn what_changed_is_named_and_steps_may_grow() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let old = config(dir.path(), &["train.steps=2", "train.warmup=1"]);
    run(options(old, &out), Vec::new()).unwrap();
    let again = |overrides: &[&str], resume: Resume| {
        let mut all = vec!["train.steps=2", "train.warmup=1"];
        all.extend_from_slice(overrides);
        run(RunOptions { resume, ..options(config(dir.path(), &all), &out) }, Vec::new())
    };
    assert!(matches!(again(&[], Resume::No), Err(TrainError::RunExists { .. })));
    let error = again(&["train.lr=1", "model.hidden_size=32"], Resume::Auto).unwrap_err();
    assert!(error.is_usage());
    let text = error.to_string();
    assert!(text.contains("train.lr (0.005 then, 1.0 now)") && text.contains("model.hidden_size"), "{text}");
    std::fs::write(dir.path().join("data.txt"), "something else ".repeat(200)).unwrap();
    let toml = std::fs::read_to_string(out.join("config.toml")).unwrap();
    let same = terrarium_train::RunConfig::from_toml(&toml, &[]).unwrap();
    let error = run(RunOptions { resume: Resume::Auto, ..options(same, &out) }, Vec::new()).unwrap_err();
    assert!(matches!(error, TrainError::DataChanged { .. }), "{error}");
    let longer = again(&["train.steps=4"], Resume::Auto).unwrap();
    assert_eq!((longer.outcome, longer.step), (Outcome::Finished, 4));
    let absent = dir.path().join("nothing");
    assert!(matches!(again(&[], Resume::From(absent)), Err(TrainError::NoCheckpoint { .. })));
}

#[test]
fn the_loss_falls_and_the_best_weights_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let watch = Watch::default();
    let config = config(dir.path(), &["train.steps=40", "train.accumulation=1", "train.eval_every=10"]);
    let report = run(options(config, dir.path().join("run")), vec![Box::new(watch.clone())]).unwrap();
    let steps = watch.steps.lock().unwrap();
    let (first, last) = (steps[0].loss, steps[39].loss);
    assert!((first - (280.0_f64).ln()).abs() < 1.0, "a new model guesses: {first}");
    assert!(last < first - 1.5, "{first} to {last}");
    assert!(steps.iter().all(|report| report.grad_norm.is_finite() && report.tokens_per_s > 0.0));
    let (best, loss) = report.best.unwrap();
    assert!(loss < first && report.exported == Some(best), "{report:?}");
    let mut names: Vec<_> =
        std::fs::read_dir(dir.path().join("run")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["checkpoints", "config.toml", "log.jsonl", "model", "tokenizer"]);
}

#[test]
fn a_stale_validation_loss_ends_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["train.steps=50", "train.patience=2", "train.min_delta=100", "train.eval_every=1"]);
    let report = run(options(config, dir.path().join("run")), Vec::new()).unwrap();
    assert_eq!((report.outcome, report.step), (Outcome::EarlyStopped, 3));
    assert!(report.model_dir.is_some());
}

#[test]
fn runs_beside_each_other_do_not_disturb_each_other() {
    // Burn 0.21 loses gradients when two threads record at once; see `loss::one_at_a_time`.
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &[]);
    let path = |name: &str| dir.path().join(name);
    run(options(config.clone(), path("alone")), Vec::new()).unwrap();
    std::thread::scope(|scope| {
        for name in ["a", "b", "c", "d"] {
            let (config, out) = (config.clone(), path(name));
            scope.spawn(move || run(options(config, out), Vec::new()).unwrap());
        }
    });
    ["a", "b", "c", "d"].iter().for_each(|name| assert_same_run(&path("alone"), &path(name), 8));
}

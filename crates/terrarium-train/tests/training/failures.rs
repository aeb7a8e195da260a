//! What goes wrong, and what it says.

use terrarium_train::checkpoint::Store;
use terrarium_train::data::DataError;
use terrarium_train::{RunConfig, TrainError, plan, run};

use crate::common::{config, options};

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_names_the_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    // Warm-up spares the first steps; then the weights leave the range of float32.
    let config =
        config(dir.path(), &["train.steps=30", "train.lr=1e38", "train.min_lr=0", "train.warmup=30", "train.clip=0", "train.eval_every=1"]);
    let error = run(options(config, &out), Vec::new()).unwrap_err();
    let TrainError::NonFinite { step, tensor, batch, .. } = &error else { panic!("{error}") };
    assert!(*step >= 1 && !tensor.is_empty(), "{error}");
    let kept: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(batch).unwrap()).unwrap();
    assert_eq!(kept["step"], *step);
    // Whatever was saved before is finite.
    let store = Store::new(&out, 2);
    assert!(store.steps().iter().all(|saved| saved < step), "{:?}", store.steps());
}

#[test]
fn a_short_text_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["train.sequence_length=5000"]);
    let error = plan(&options(config, dir.path().join("run"))).unwrap_err();
    assert!(matches!(&error, TrainError::Data(DataError::TooShort { .. })), "{error}");
    assert!(error.to_string().contains("train.sequence_length="), "{error}");
}

#[test]
fn empty_data_and_broken_lines_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), &[]);
    let empty = dir.path().join("empty.txt");
    std::fs::write(&empty, " \n").unwrap();
    let tokenizer = dir.path().join("tokenizer");
    terrarium_runtime::Tokenizer::train_bpe(std::iter::once(crate::common::text()), 280, &["<|end|>"]).unwrap().save(&tokenizer).unwrap();
    config.data.tokenizer = Some(tokenizer.to_string_lossy().into_owned());
    config.data.train = vec![empty.clone()];
    let error = plan(&options(config.clone(), dir.path().join("run"))).unwrap_err().to_string();
    assert!(error.contains("empty.txt"), "{error}");
    let broken = dir.path().join("broken.jsonl");
    std::fs::write(&broken, "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": }\n").unwrap();
    config.data.train = vec![broken];
    let error = plan(&options(config, dir.path().join("run"))).unwrap_err().to_string();
    assert!(error.contains("broken.jsonl line 2"), "{error}");
}

#[test]
fn a_small_vocabulary_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["model.vocab_size=100"]);
    let error = run(options(config, dir.path().join("run")), Vec::new()).unwrap_err();
    assert!(error.to_string().contains("vocab_size is 100"), "{error}");
}

#[test]
fn plans_count_what_a_run_would_do() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &[]);
    let plan = plan(&options(config.clone(), dir.path().join("run"))).unwrap();
    assert_eq!((plan.steps, plan.tokens_per_step), (8, 96));
    assert_eq!(plan.parameters, plan.trained);
    assert!(plan.to_string().contains("8 of 96 tokens"), "{plan}");
    assert!(!dir.path().join("run").exists(), "a plan writes nothing");
    let mut twice = config;
    twice.train.epochs = Some(2.0);
    let doubled = terrarium_train::plan(&options(twice, dir.path().join("run"))).unwrap();
    assert_eq!(doubled.steps, (2 * doubled.train.rows).div_ceil(4));
}

#[test]
fn unknown_model_keys_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config: RunConfig = config(dir.path(), &["model.hiden_size=3"]);
    let error = plan(&options(config, dir.path().join("run"))).unwrap_err().to_string();
    assert!(error.contains("hiden_size"), "{error}");
}

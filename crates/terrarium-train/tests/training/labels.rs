//! Loss on completions and assistant turns, and on nothing else.

use std::path::Path;

use terrarium_runtime::Tokenizer;
use terrarium_train::data::{Corpus, IGNORED};
use terrarium_train::{DataConfig, TrainConfig};

const CHATML: &str = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|stop|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}";

fn tokenizer() -> Tokenizer {
    let mut tokenizer = Tokenizer::train_bpe(std::iter::once(crate::common::text()), 300, &["<|end|>", "<|start|>", "<|stop|>"]).unwrap();
    tokenizer.set_chat_template(CHATML);
    tokenizer
}

/// The text of all tokens that are predicted, document by document.
fn learned(dir: &Path, line: &str, change: impl Fn(&mut DataConfig)) -> String {
    let tokenizer = tokenizer();
    let path = dir.join("data.jsonl");
    std::fs::write(&path, line).unwrap();
    let mut data = DataConfig { train: vec![path], valid_fraction: 0.0, ..DataConfig::default() };
    change(&mut data);
    let train = TrainConfig { sequence_length: 400, ..TrainConfig::default() };
    let corpus = Corpus::load(&data, &train, &tokenizer, tokenizer.id("<|end|>"), tokenizer.vocab_size()).unwrap();
    let batch = corpus.train.batch(&(0..corpus.train.len()).collect::<Vec<_>>());
    let ids: Vec<u32> = batch.labels.iter().filter(|label| **label != IGNORED).map(|label| *label as u32).collect();
    tokenizer.decode(&ids, false).unwrap()
}

#[test]
fn pairs_teach_the_completion_and_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let line = r#"{"prompt": "the cat sat", "completion": " on the mat"}"#;
    assert_eq!(learned(dir.path(), line, |_| {}), " on the mat<|end|>");
    let everything = learned(dir.path(), line, |data| data.completions_only = false);
    assert!(everything.ends_with(" sat on the mat<|end|>") && everything.len() > 20, "{everything}");
    assert_eq!(learned(dir.path(), line, |data| data.template = terrarium_train::config::Template::Chat), " on the mat<|stop|>\n");
}

#[test]
fn instructions_are_worded_and_only_the_answer_is_learned() {
    let dir = tempfile::tempdir().unwrap();
    let line = r#"{"instruction": "Count.", "input": "to three", "output": "one two three"}"#;
    assert_eq!(learned(dir.path(), line, |_| {}), "one two three<|end|>");
}

#[test]
fn chats_teach_every_assistant_turn() {
    let dir = tempfile::tempdir().unwrap();
    let line = r#"{"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "four five"}]}"#;
    let line = line.replace('\n', " ");
    assert_eq!(learned(dir.path(), &line, |_| {}), "two<|stop|>\nfour five<|stop|>\n");
}

//! Small models, small data, and comparison of run directories.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use burn::backend::Autodiff;
use burn::tensor::backend::Backend;
use serde_json::Value;
use terrarium_kernels::backend::{CpuBackend, DeviceSpec};
use terrarium_models::{Decoder, DecoderConfig};
use terrarium_train::checkpoint::Checkpoint;
use terrarium_train::{Display, Event, Observer, RunConfig, RunOptions, StepReport, StopFlag};

/// The CPU backend of this build.
pub type Inner = CpuBackend;
/// The same with gradients.
pub type Train = Autodiff<CpuBackend>;

pub const HYBRID: &str = r#"
[model]
model_type = "nemotron_h"
hidden_size = 16
hybrid_override_pattern = "M*-M"
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 4
intermediate_size = 24
mamba_num_heads = 4
mamba_head_dim = 8
n_groups = 2
ssm_state_size = 8
chunk_size = 8
"#;

/// The text that everything here learns.
pub fn text() -> String {
    let lines =
        ["the cat sat on the mat", "a dog ran to the old house", "the sun is warm and the sea is cold", "one two three four five six"];
    (0..60).map(|n| format!("{} {}.\n", lines[n % 4], n % 7)).collect()
}

/// A run on a text file beside `dir`, with a tokenizer made from it.
pub fn config(dir: &Path, overrides: &[&str]) -> RunConfig {
    let data = dir.join("data.txt");
    std::fs::write(&data, text()).unwrap();
    let toml = format!(
        "{HYBRID}\n[data]\ntrain = [{:?}]\ntokenizer = \"bpe:280\"\nvalid_fraction = 0.1\n[train]\nsteps = 8\nbatch = 2\nsequence_length = 24\n\
         accumulation = 2\nlr = 5e-3\neval_every = 2\neval_batches = 2\nseed = 3\n",
        data
    );
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_string()).collect();
    RunConfig::from_toml(&toml, &overrides).unwrap()
}

pub fn options(config: RunConfig, out_dir: impl Into<PathBuf>) -> RunOptions {
    RunOptions { device: DeviceSpec::Cpu, display: Display::Silent, ..RunOptions::new(config, out_dir) }
}

pub fn model(table: &str, seed: u64) -> (Decoder<Train>, DecoderConfig) {
    let config = DecoderConfig::from_json(table).unwrap();
    (Decoder::init(&config, seed, &Default::default()), config)
}

/// Keeps what it is told, and asks to stop after a step.
#[derive(Clone, Default)]
pub struct Watch {
    pub steps: Arc<Mutex<Vec<StepReport>>>,
    pub stop: Option<(usize, StopFlag)>,
}

impl Observer for Watch {
    fn event(&mut self, event: &Event) {
        if let Event::Step(report) = event {
            self.steps.lock().unwrap().push(report.clone());
            if let Some((at, stop)) = &self.stop
                && report.step == *at
            {
                stop.request();
            }
        }
    }
}

/// Asserts that two runs stand at the same point: on `flex` bit for bit, elsewhere as near as sums in another order allow.
pub fn assert_same_run(a: &Path, b: &Path, step: usize) {
    let read = |dir: &Path| Checkpoint::read(&dir.join(format!("checkpoints/step-{step:06}"))).unwrap();
    let (mut a_end, mut b_end) = (read(a), read(b));
    assert!(!a_end.model.is_empty() && !a_end.optimizer.is_empty());
    let exact = Inner::name(&Default::default()) == "flex";
    for (what, a, b) in [("weights", &a_end.model, &b_end.model), ("moments", &a_end.optimizer, &b_end.optimizer)] {
        assert_eq!(a.len(), b.len());
        for ((path, a), (other, b)) in a.iter().zip(b) {
            let near = || a.iter::<f32>().zip(b.iter::<f32>()).all(|(a, b)| (a - b).abs() < 2e-3);
            assert!(path == other && (a == b || (!exact && near())), "{what} differ in {path}");
        }
    }
    assert_eq!((a_end.state.cursor, a_end.state.tokens), (b_end.state.cursor, b_end.state.tokens));
    if !exact {
        return;
    }
    (a_end.state.seconds, b_end.state.seconds) = (0.0, 0.0);
    assert_eq!(a_end.state, b_end.state);
    assert_eq!(curve(a), curve(b), "logs differ");
}

/// The log without what depends on the clock.
fn curve(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("log.jsonl")).unwrap();
    let timeless = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        let map = line.as_object_mut().unwrap();
        ["seconds", "tokens_per_s", "memory"].iter().for_each(|key| drop(map.remove(*key)));
        line
    };
    text.lines().map(timeless).collect()
}

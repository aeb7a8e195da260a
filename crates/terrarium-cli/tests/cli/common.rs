//! Running the program, and a tiny model to run it on.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// The program with an environment of its own: no settings of the user, caches that vanish.
pub fn terrarium(args: &[&str]) -> Command {
    static CACHE: OnceLock<TempDir> = OnceLock::new();
    let cache = CACHE.get_or_init(|| TempDir::new().unwrap()).path();
    let mut command = Command::new(env!("CARGO_BIN_EXE_terrarium"));
    command.args(args).stdin(Stdio::null());
    for name in ["HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        command.env_remove(name);
    }
    command.env("XDG_CACHE_HOME", cache).env("HF_TOKEN_PATH", cache.join("no-token"));
    command
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Ran {
    /// Asserts success.
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    /// Asserts an exit code and an error message with these words.
    pub fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert!(code == 130 || self.err.contains("error: "), "{self:#?}");
        assert!(!self.err.contains("panicked"), "{self:#?}");
        for word in words {
            assert!(self.err.contains(word), "no `{word}` in {self:#?}");
        }
        self
    }

    /// Standard output as JSON, one value per line.
    pub fn json(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {self:#?}"))).collect()
    }
}

/// Runs to the end.
pub fn run(args: &[&str]) -> Ran {
    terrarium(args).output().unwrap().into()
}

/// As text, for arguments.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A sentence or two of training text, again and again but never quite the same.
pub fn prose(lines: usize) -> String {
    let who = ["fox", "owl", "goat", "wolf", "hen"];
    let what = ["saw the sea", "lost a bell", "found a kite", "slept all day"];
    (0..lines).map(|i| format!("The {} {} on day {i}. It was cold, and the wind sang.\n", who[i % 5], what[(i * 7) % 4])).collect()
}

/// A run's configuration in `dir`, with its text: a hybrid of all kinds of layers that trains in moments.
pub fn tiny_config(dir: &Path, steps: usize) -> PathBuf {
    std::fs::write(dir.join("text.txt"), prose(400)).unwrap();
    let config = format!(
        r#"
[model]
model_type = "nemotron_h"
hybrid_override_pattern = "M-*-"
hidden_size = 32
intermediate_size = 64
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
mamba_num_heads = 4
mamba_head_dim = 16
n_groups = 2
ssm_state_size = 16
conv_kernel = 4
tie_word_embeddings = true

[data]
train = ["text.txt"]
tokenizer = "bpe:300"

[train]
steps = {steps}
batch = 2
sequence_length = 64
lr = 3e-3
eval_every = 10
eval_batches = 2
save_every = 5
log_every = 1
seed = 7
"#
    );
    let path = dir.join("tiny.toml");
    std::fs::write(&path, config).unwrap();
    path
}

/// A model directory with a tokenizer, trained once for all tests.
pub fn tiny_model() -> &'static Path {
    static MODEL: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = MODEL.get_or_init(|| {
        let dir = TempDir::new().unwrap();
        let config = tiny_config(dir.path(), 10);
        let out = dir.path().join("run");
        run(&["train", "--config", text(&config), "--out-dir", text(&out), "--no-tui"]).ok();
        (dir, out.join("model"))
    });
    path
}

/// A copy of a model directory that may be damaged.
pub fn copy_of(model: &Path) -> TempDir {
    let copy = TempDir::new().unwrap();
    for entry in std::fs::read_dir(model).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

/// Waits until `done`, or fails after a minute.
pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited a minute for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sends a signal by name.
pub fn signal(child: &Child, name: &str) {
    let done = Command::new("kill").args(["-s", name, &child.id().to_string()]).status().unwrap();
    assert!(done.success());
}

/// Data that only a checkout beside the project has; says so where it is absent.
pub fn shared_data(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data").join(path);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: no {}", path.display());
    None
}

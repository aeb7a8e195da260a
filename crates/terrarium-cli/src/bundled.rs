//! The model and the fine-tuning set that come with the program.
//!
//! They are files of the source tree (`assets/`), part of the binary, and unpacked into the cache folder when first
//! needed: from then on the model is a directory like any other.

use std::path::{Path, PathBuf};

use terrarium::runtime::StagedDir;
use terrarium::train::{BaseConfig, RunConfig, TrainError};

use crate::failure::Failure;

/// What the model is called in messages.
pub const NAME: &str = "the bundled model";

/// Files of the model's directory.
const MODEL: [(&str, &[u8]); 6] = [
    ("config.json", include_bytes!("../assets/model/config.json")),
    ("model.safetensors", include_bytes!("../assets/model/model.safetensors")),
    ("tokenizer.json", include_bytes!("../assets/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../assets/model/tokenizer_config.json")),
    ("generation_config.json", include_bytes!("../assets/model/generation_config.json")),
    ("train.toml", include_bytes!("../assets/model/train.toml")),
];

const DATA: (&str, &[u8]) = ("finetune.jsonl", include_bytes!("../assets/finetune.jsonl"));

/// Settings of the main job: a run's configuration without the model and the data.
const RECIPE: &str = include_str!("../assets/finetune.toml");

/// Prompts to try before and after the main job, one per line, with \\n for a line break; none of them is in the fine-tuning set.
const PROMPTS: &str = include_str!("../assets/prompts.txt");

/// Where the model and the set are unpacked.
pub struct Bundle {
    /// The model's directory.
    pub model: PathBuf,
    /// The fine-tuning set.
    pub data: PathBuf,
}

/// Unpacks what is not there yet, all or nothing.
pub fn unpack() -> Result<Bundle, Failure> {
    let dir = cache_dir().join(format!("bundled-{:016x}", fingerprint()));
    let bundle = Bundle { model: dir.join("model"), data: dir.join(DATA.0) };
    if complete(&bundle) {
        return Ok(bundle);
    }
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent).map_err(|source| unwritable(parent, &source))?;
    }
    let staged = StagedDir::new(&dir)?;
    let model = staged.path().join("model");
    std::fs::create_dir_all(&model).map_err(Failure::io("make the folder", &model))?;
    let files = MODEL.iter().map(|(name, bytes)| (model.join(name), *bytes)).chain([(staged.path().join(DATA.0), DATA.1)]);
    for (path, bytes) in files {
        std::fs::write(&path, bytes).map_err(Failure::io("write", &path))?;
    }
    match staged.commit() {
        // Another process may have been faster.
        Err(_) if complete(&bundle) => Ok(bundle),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(bundle),
    }
}

/// The main job: this model, this set, this recipe.
pub fn job() -> Result<RunConfig, Failure> {
    let bundle = unpack()?;
    let mut config = RunConfig::from_toml(RECIPE, &[]).map_err(TrainError::from)?;
    config.base = Some(BaseConfig::new(bundle.model.to_string_lossy()));
    config.data.train = vec![bundle.data];
    Ok(config)
}

/// Prompts to try before and after the main job.
pub fn prompts() -> Vec<String> {
    PROMPTS.lines().map(str::trim_end).filter(|line| !line.is_empty()).map(|line| line.replace("\\n", "\n")).collect()
}

/// The program's own cache folder.
pub fn cache_dir() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = set("XDG_CACHE_HOME").or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("terrarium")
}

fn complete(bundle: &Bundle) -> bool {
    let has = |path: &Path, bytes: &[u8]| path.metadata().is_ok_and(|found| found.len() == bytes.len() as u64);
    has(&bundle.data, DATA.1) && MODEL.iter().all(|(name, bytes)| has(&bundle.model.join(name), bytes))
}

fn unwritable(folder: &Path, source: &std::io::Error) -> Failure {
    Failure::usage_hint(
        format!("cannot unpack {NAME} into {}: {source}", folder.display()),
        "set XDG_CACHE_HOME to a folder that can be written, or give --model",
    )
}

/// FNV-1a over all names and contents, so that another version of the program unpacks its own files.
fn fingerprint() -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for (name, bytes) in MODEL.iter().chain([&DATA]) {
        for byte in name.as_bytes().iter().chain(*bytes) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    hash
}

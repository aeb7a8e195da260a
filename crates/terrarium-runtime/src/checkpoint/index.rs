//! `model.safetensors.index.json` and `pytorch_model.bin.index.json`: which shard holds which key.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::CheckpointError;
use crate::{Error, Result};

/// An index whose file names were checked: each is a safetensors or PyTorch file inside the model's directory.
pub(crate) struct ShardIndex {
    path: PathBuf,
    /// Key -> shard.
    pub(crate) shard_of: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Raw {
    weight_map: Map<String, Value>,
}

impl ShardIndex {
    /// Reads and checks an index.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        Self::parse(path, &text).map_err(|problem| CheckpointError::Index { file: path.to_path_buf(), problem }.into())
    }

    fn parse(path: &Path, text: &str) -> Result<Self, String> {
        let raw: Raw = serde_json::from_str(text).map_err(|e| format!("not an index: {e}"))?;
        let mut shard_of = BTreeMap::new();
        for (key, file) in raw.weight_map {
            let file = file.as_str().ok_or_else(|| format!("`{key}` is mapped to {file}, which is no file name"))?;
            if !is_inside(file) {
                return Err(format!("`{key}` is mapped to `{file}`, which leads out of the model's directory: refused"));
            }
            if !file.ends_with(".safetensors") && !file.ends_with(".bin") {
                return Err(format!("`{key}` is mapped to `{file}`, which is no .safetensors or .bin file"));
            }
            shard_of.insert(key, file.to_string());
        }
        if shard_of.is_empty() {
            return Err("its weight_map is empty".into());
        }
        Ok(Self { path: path.to_path_buf(), shard_of })
    }

    /// The shards, each once.
    pub(crate) fn files(&self) -> Vec<String> {
        self.shard_of.values().collect::<BTreeSet<_>>().into_iter().cloned().collect()
    }

    /// An error about this index.
    pub(crate) fn error(&self, problem: String) -> Error {
        CheckpointError::Index { file: self.path.clone(), problem }.into()
    }

    /// The text of an index.
    pub(crate) fn text(shard_of: &BTreeMap<String, String>, total_bytes: u64) -> String {
        let index = json!({ "metadata": { "total_size": total_bytes }, "weight_map": shard_of });
        format!("{index:#}\n")
    }
}

/// Whether a relative name stays in its directory on every system.
fn is_inside(file: &str) -> bool {
    let plain = Path::new(file).components().all(|c| matches!(c, Component::Normal(_)));
    !file.is_empty() && plain && !file.contains(['\\', ':', '\0'])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ShardIndex, String> {
        ShardIndex::parse(Path::new("model.safetensors.index.json"), text)
    }

    #[test]
    fn names_out_of_the_directory_are_refused() {
        for file in ["../a.safetensors", "/etc/a.safetensors", "x/../../a.safetensors", "..\\a.safetensors", "C:a.safetensors", ""] {
            let text = json!({ "weight_map": { "w": file } }).to_string();
            let error = parse(&text).err().unwrap_or_default();
            assert!(error.contains("leads out"), "{file}: {error}");
        }
    }

    #[test]
    fn an_index_of_itself_is_refused() {
        for file in ["model.safetensors.index.json", "pytorch_model.bin.index.json"] {
            let error = parse(&json!({ "weight_map": { "w": file } }).to_string()).err().unwrap_or_default();
            assert!(error.contains("`w`") && error.contains("no .safetensors or .bin file"), "{error}");
        }
    }

    #[test]
    fn shards_are_listed_once() {
        let index = parse(r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}"#);
        assert_eq!(index.map(|i| i.files()).ok(), Some(vec!["1.safetensors".to_string(), "2.safetensors".into()]));
    }
}

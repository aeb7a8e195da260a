//! Finding the weights of a model directory.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::{ShardIndex, Stored};
use crate::Result;
use crate::error::CheckpointError;
use crate::tensors::MappedFile;

/// One file, or an index of several, in the order they are looked for.
const WEIGHTS: [(&str, bool); 5] = [
    ("model.safetensors", false),
    ("model.safetensors.index.json", true),
    ("pytorch_model.bin", false),
    ("pytorch_model.bin.index.json", true),
    ("consolidated.safetensors", false),
];

/// Mapped files and where each key is.
pub(super) struct Files {
    files: Vec<MappedFile>,
    /// Key -> file and entry.
    place: HashMap<String, (usize, usize)>,
}

impl Files {
    /// Opens the weights of a directory.
    pub fn open(dir: &Path) -> Result<Self> {
        let found = WEIGHTS.into_iter().find(|(name, _)| dir.join(name).is_file());
        let (name, is_index) = found.ok_or_else(|| no_weights(dir))?;
        let path = dir.join(name);
        let files = if is_index { open_shards(dir, &ShardIndex::open(&path)?)? } else { vec![MappedFile::open(&path)?] };
        let mut place: HashMap<String, (usize, usize)> = HashMap::new();
        for (f, file) in files.iter().enumerate() {
            for (e, entry) in file.header.entries.iter().enumerate() {
                if let Some((other, _)) = place.insert(entry.key.clone(), (f, e)) {
                    let (file, other) = (file.path().to_path_buf(), files[other].path().to_path_buf());
                    return Err(CheckpointError::Duplicate { file, key: entry.key.clone(), other }.into());
                }
            }
        }
        Ok(Self { files, place })
    }

    /// Every key with its tensor, file by file.
    pub fn entries(&self) -> impl Iterator<Item = (&str, Stored<'_>)> {
        self.files.iter().flat_map(|file| file.header.entries.iter().map(move |entry| (entry.key.as_str(), Stored::one(file, entry))))
    }

    /// The tensor of a key.
    pub fn find(&self, key: &str) -> Option<Stored<'_>> {
        let &(file, entry) = self.place.get(key)?;
        let file = self.files.get(file)?;
        Some(Stored::one(file, file.header.entries.get(entry)?))
    }
}

fn open_shards(dir: &Path, index: &ShardIndex) -> Result<Vec<MappedFile>> {
    let names = index.files();
    let missing: Vec<_> = names.iter().filter(|name| !dir.join(name).is_file()).cloned().collect();
    if !missing.is_empty() {
        return Err(index.error(format!("names shards that are not there: {}", missing.join(", "))));
    }
    let mut files = Vec::with_capacity(names.len());
    for name in &names {
        let file = MappedFile::open(&dir.join(name))?;
        let has: HashSet<_> = file.header.entries.iter().map(|e| e.key.as_str()).collect();
        let absent: Vec<_> =
            index.shard_of.iter().filter(|(k, f)| *f == name && !has.contains(k.as_str())).map(|(k, _)| k.clone()).collect();
        if !absent.is_empty() {
            return Err(index.error(format!("{name} lacks keys that the index places there: {}", absent.join(", "))));
        }
        files.push(file);
    }
    Ok(files)
}

fn no_weights(dir: &Path) -> CheckpointError {
    let others = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
    let mut others: Vec<_> =
        others.filter(|name| [".gguf", ".ckpt", ".pth", ".h5", ".msgpack", ".distcp"].iter().any(|end| name.ends_with(end))).collect();
    others.sort();
    let hint = if others.is_empty() { String::new() } else { format!("; of another format, which is not read: {}", others.join(", ")) };
    CheckpointError::NoWeights { dir: dir.to_path_buf(), hint }
}

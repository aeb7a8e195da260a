//! Reading the shared cache: which commit a revision stands for and which of its files are there.

use std::path::{Path, PathBuf};

use super::weights::{self, Kind, LATEST};
use super::{ADAPTER, Files, RepoId, Resolved};
use crate::checkpoint::ShardIndex;
use crate::{Error, Result};

/// One commit of a repository in the cache.
pub(super) struct Snapshot {
    commit: String,
    dir: PathBuf,
}

impl Snapshot {
    /// The commit that the cache knows for the revision.
    pub(super) fn find(repo: &RepoId, cache: &Path) -> Option<Self> {
        let folder = repo.folder(cache);
        let as_commit = folder.join("snapshots").join(&repo.revision);
        let commit = if is_commit(&repo.revision) && as_commit.is_dir() {
            repo.revision.clone()
        } else {
            let text = std::fs::read_to_string(folder.join("refs").join(&repo.revision)).ok()?;
            text.trim().to_string()
        };
        is_commit(&commit).then(|| Self::of_commit(repo, cache, &commit))
    }

    /// The place of a commit, there or not.
    pub(super) fn of_commit(repo: &RepoId, cache: &Path, commit: &str) -> Self {
        Self { commit: commit.to_string(), dir: repo.folder(cache).join("snapshots").join(commit) }
    }

    /// The commit.
    pub(super) fn commit(&self) -> &str {
        &self.commit
    }

    /// Where a file is, if it is there.
    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// Whether a file is there. A link whose blob is gone does not count.
    pub(super) fn has(&self, file: &str) -> bool {
        self.dir.join(file).is_file()
    }

    /// Shards that an index names.
    pub(super) fn shards(&self, index: &str) -> Result<Vec<String>> {
        Ok(ShardIndex::open(&self.dir.join(index))?.files())
    }

    /// Those of `files` that are a Megatron run's ranks of the iteration its text file names.
    pub(super) fn ranks<'a>(&self, files: impl Iterator<Item = &'a str>) -> Result<Vec<String>> {
        let path = self.dir.join(LATEST);
        let latest = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        Ok(weights::of_megatron(&latest, files))
    }

    /// The weights, in one file or more, there or not; `None` if it cannot be known which they are.
    pub(super) fn weights(&self) -> Result<Option<Vec<String>>> {
        Ok(match Kind::of(|file| self.has(file)) {
            None => None,
            Some(Kind::Adapter) => Some(vec![ADAPTER[1].to_string()]),
            Some(Kind::Model(_)) => match weights::of_model(|file| self.has(file)) {
                Some((index, true)) => Some(self.shards(index)?),
                Some((file, false)) => Some(vec![file.to_string()]),
                None => None,
            },
            Some(Kind::Megatron) => {
                let files = self.files_of_folders();
                Some(self.ranks(files.iter().map(String::as_str))?).filter(|ranks| !ranks.is_empty())
            }
        })
    }

    /// Files two folders down, where Megatron keeps its weights.
    fn files_of_folders(&self) -> Vec<String> {
        let names = |dir: &Path| -> Vec<String> {
            let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
            let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
            names.sort();
            names
        };
        let below = |folder: String| names(&self.dir.join(&folder)).into_iter().map(move |name| format!("{folder}/{name}"));
        let files = names(&self.dir).into_iter().flat_map(below).flat_map(below);
        files.filter(|file| self.has(file)).collect()
    }

    /// Needed files that are not there. Optional ones cannot be known to exist.
    pub(super) fn missing(&self, files: Files) -> Result<Vec<String>> {
        let Some(kind) = Kind::of(|file| self.has(file)) else { return Ok(vec!["config.json".to_string()]) };
        if files == Files::Metadata {
            return Ok(vec![]);
        }
        Ok(match self.weights()? {
            Some(weights) => weights.into_iter().filter(|file| !self.has(file)).collect(),
            None if kind == Kind::Megatron => vec!["its mp_rank_* folders".to_string()],
            None => vec![super::WEIGHTS.to_string()],
        })
    }

    /// As the answer of `resolve`.
    pub(super) fn resolved(self, repo: RepoId, downloaded: Vec<String>, notes: Vec<String>) -> Resolved {
        Resolved { dir: self.dir, repo: Some(repo), commit: Some(self.commit), downloaded, notes }
    }
}

/// Whether this can be a commit: used as a folder name, so nothing else will do.
pub(super) fn is_commit(text: &str) -> bool {
    (7..=64).contains(&text.len()) && text.chars().all(|c| c.is_ascii_hexdigit())
}

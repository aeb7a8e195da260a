//! Reading the shared cache: which commit a revision stands for and which of its files are there.

use std::path::{Path, PathBuf};

use super::{ADAPTER, CONFIG, Files, INDEX, RepoId, Resolved, WEIGHTS};
use crate::Result;
use crate::checkpoint::ShardIndex;

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

    /// Where a file is, if it is there.
    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// Whether a file is there. A link whose blob is gone does not count.
    pub(super) fn has(&self, file: &str) -> bool {
        self.dir.join(file).is_file()
    }

    /// Shards that the index names.
    pub(super) fn shards(&self) -> Result<Vec<String>> {
        Ok(ShardIndex::open(&self.dir.join(INDEX))?.files())
    }

    /// Needed files that are not there. Optional ones cannot be known to exist.
    pub(super) fn missing(&self, files: Files) -> Result<Vec<String>> {
        let mut missing = Vec::new();
        let adapter = !self.has(CONFIG) && self.has(ADAPTER[0]);
        if !adapter && !self.has(CONFIG) {
            missing.push(CONFIG.to_string());
        }
        if files == Files::Metadata {
            return Ok(missing);
        }
        if adapter {
            missing.extend((!self.has(ADAPTER[1])).then(|| ADAPTER[1].to_string()));
        } else if !self.has(WEIGHTS) && self.has(INDEX) {
            missing.extend(self.shards()?.into_iter().filter(|shard| !self.has(shard)));
        } else if !self.has(WEIGHTS) {
            missing.push(WEIGHTS.to_string());
        }
        Ok(missing)
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

//! From `DIR` or `org/name[@revision]` to a local directory of model files; from `org/name` to the files of a data set's split (`dataset.rs`).
//!
//! Files live in the cache that Python's `huggingface_hub` uses, in its layout: a model fetched by either is there for
//! both. Transfers go through the `hf-hub` crate; `transfer.rs` says which of its habits are corrected.

mod cache;
mod dataset;
mod options;
mod remote;
mod transfer;
mod weights;

use std::path::{Path, PathBuf};

pub use dataset::{DataSet, SplitFiles};
pub use options::{HubOptions, RepoId, RepoKind};
pub use remote::{RemoteFile, remote_headers};

use crate::checkpoint::is_megatron;
use crate::error::HubError;
use crate::{Error, Result};
use cache::Snapshot;
use transfer::{Listing, Transfer};
use weights::Kind;

/// Which files are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// Everything needed to run the model.
    All,
    /// Configuration, tokenizer and the weights' index, but no weights.
    Metadata,
}

/// Told about downloads as they happen. `advance` counts bytes already there from an earlier try as well.
pub trait Progress {
    /// A file of so many bytes begins.
    fn start(&mut self, file: &str, bytes: u64);
    /// So many more bytes are here.
    fn advance(&mut self, bytes: u64);
    /// The file is complete.
    fn finish(&mut self, file: &str);
    /// Something worth telling: a retry, a cache used because the network is down.
    fn note(&mut self, _text: &str) {}
}

impl Progress for () {
    fn start(&mut self, _file: &str, _bytes: u64) {}
    fn advance(&mut self, _bytes: u64) {}
    fn finish(&mut self, _file: &str) {}
}

/// Where a model's files are.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// A directory with a config.json, a params.json, or the folders of a Megatron run.
    pub dir: PathBuf,
    /// The hub name, unless a directory was given.
    pub repo: Option<RepoId>,
    /// The commit the files belong to, unless a directory was given.
    pub commit: Option<String>,
    /// Files fetched by this call.
    pub downloaded: Vec<String>,
    /// Decisions worth printing.
    pub notes: Vec<String>,
}

/// Small files fetched where they exist.
const OPTIONAL: [&str; 6] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];
pub(crate) const WEIGHTS: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// Finds the files of a model: a directory is taken as it is; a hub name is looked up in the cache and completed from
/// the hub unless `options.offline`.
pub fn resolve(model: &str, files: Files, options: &HubOptions, progress: &mut dyn Progress) -> Result<Resolved> {
    let path = Path::new(model);
    if path.is_dir() {
        if Kind::of(|file| path.join(file).is_file()).is_none() && !is_megatron(path) {
            return Err(HubError::Directory { dir: path.to_path_buf(), file: "config.json".into() }.into());
        }
        return Ok(Resolved { dir: path.to_path_buf(), repo: None, commit: None, downloaded: vec![], notes: vec![] });
    }
    let name_error = |reason: String| HubError::Name { name: model.to_string(), reason };
    if path.exists() {
        return Err(name_error("it is a file; give the directory it is in".into()).into());
    }
    let repo = RepoId::parse(model).map_err(name_error)?;
    if options.offline { offline(repo, files, options) } else { online(repo, files, options, progress) }
}

fn offline(repo: RepoId, files: Files, options: &HubOptions) -> Result<Resolved> {
    let found = Snapshot::find(&repo, &options.cache);
    let missing = match &found {
        Some(snapshot) => snapshot.missing(files)?,
        None => vec!["everything".to_string()],
    };
    match found {
        Some(snapshot) if missing.is_empty() => Ok(snapshot.resolved(repo, vec![], vec![])),
        _ => {
            let missing = missing.join(", ");
            Err(HubError::Offline { repo: repo.id, revision: repo.revision, cache: options.cache.clone(), missing }.into())
        }
    }
}

fn online(repo: RepoId, files: Files, options: &HubOptions, progress: &mut dyn Progress) -> Result<Resolved> {
    let transfer = Transfer::new(&repo, options)?;
    let listing = match transfer.listing(progress) {
        Ok(listing) => listing,
        // Without a network a complete copy in the cache is as good as it gets; any other answer of the hub counts.
        Err(error @ Error::Hub(HubError::Network { .. })) => return cached_instead(repo, files, options, error, progress),
        Err(error) => return Err(error),
    };
    let snapshot = Snapshot::of_commit(&repo, &options.cache, &listing.commit);
    let mut downloaded = Vec::new();
    let mut fetch = |file: &str, progress: &mut dyn Progress| -> Result<()> {
        if !snapshot.has(file) {
            transfer.fetch(&listing, file, progress)?;
            downloaded.push(file.to_string());
        }
        Ok(())
    };
    let missing = |file: &str| -> Error {
        let RepoId { id, revision, .. } = repo.clone();
        HubError::MissingFile { repo: id, revision, file: file.to_string(), found: listing.summary() }.into()
    };
    let kind = Kind::of(|file| listing.has(file)).ok_or_else(|| missing("config.json"))?;
    let weights = weights::of_model(|file| listing.has(file));
    let complete = match kind {
        Kind::Model(_) => weights.is_some(),
        Kind::Adapter => listing.has(ADAPTER[1]),
        Kind::Megatron => true,
    };
    if files == Files::All && !complete {
        return Err(missing(&if kind == Kind::Adapter { ADAPTER[1].to_string() } else { weights::expected() }));
    }
    for file in small_files(&listing, kind) {
        fetch(&file, progress)?;
    }
    match (kind, weights, files) {
        (Kind::Model(_), Some((index, true)), _) => {
            fetch(index, progress)?;
            for shard in snapshot.shards(index)?.into_iter().filter(|_| files == Files::All) {
                fetch(&shard, progress)?;
            }
        }
        (Kind::Model(_), Some((file, false)), Files::All) => fetch(file, progress)?,
        (Kind::Adapter, _, Files::All) => fetch(ADAPTER[1], progress)?,
        (Kind::Megatron, _, Files::All) => {
            let ranks = snapshot.ranks(listing.files.iter().map(String::as_str))?;
            if ranks.is_empty() {
                return Err(missing("mp_rank_*/model_optim_rng.pt of the iteration that latest_checkpointed_iteration.txt names"));
            }
            for file in ranks {
                fetch(&file, progress)?;
            }
        }
        _ => {}
    }
    // Last: a branch of the cache points to a commit only once the commit's files are there.
    transfer.point_to(&listing)?;
    Ok(snapshot.resolved(repo, downloaded, vec![]))
}

fn cached_instead(repo: RepoId, files: Files, options: &HubOptions, error: Error, progress: &mut dyn Progress) -> Result<Resolved> {
    match Snapshot::find(&repo, &options.cache) {
        Some(snapshot) if snapshot.missing(files)?.is_empty() => {
            let note = format!("{error}; using the copy of {repo} in the cache");
            progress.note(&note);
            Ok(snapshot.resolved(repo, vec![], vec![note]))
        }
        _ => Err(error),
    }
}

/// Configuration and tokenizer.
fn small_files(listing: &Listing, kind: Kind) -> Vec<String> {
    let mut wanted = vec![kind.first().to_string()];
    wanted.extend(OPTIONAL.iter().filter(|f| listing.has(f)).map(|f| f.to_string()));
    if !listing.has("tokenizer.json") {
        wanted.extend(listing.sentencepiece());
    }
    wanted
}

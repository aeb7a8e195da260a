//! Which files of a data set's repository are a split, and fetching them.
//!
//! The branch `refs/convert/parquet`, which the hub itself keeps for public data sets, is asked first: whatever form a data set was uploaded in,
//! Python scripts included, its files there are `CONFIG/SPLIT/0000.parquet` and so on. `main` comes second, with the names that uploaders
//! usually choose. Nothing that comes with a data set is run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::cache::Snapshot;
use super::options::RepoKind;
use super::transfer::{Listing, Transfer};
use super::{HubOptions, Progress, RepoId};
use crate::error::HubError;
use crate::{Error, Result};

/// Branches, in the order in which they are asked.
const BRANCHES: [&str; 2] = ["refs/convert/parquet", "main"];

/// How deep below the top files of a split can be.
const DEPTH: usize = 3;

/// A data set, on the hub, in its cache, or as a copy of its repository.
pub struct DataSet {
    place: Place,
}

enum Place {
    Folder(PathBuf),
    Hub(Box<Hub>),
}

struct Hub {
    id: String,
    options: HubOptions,
    /// Branches that are known, in their order, and those that have not been asked.
    branches: Vec<Branch>,
    unasked: Vec<&'static str>,
    /// Why the hub cannot be asked, where it cannot.
    down: Option<Error>,
}

struct Branch {
    repo: RepoId,
    listing: Listing,
}

/// The files of one split.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitFiles {
    /// In their order.
    pub paths: Vec<PathBuf>,
    /// The configuration they belong to.
    pub config: String,
    /// The commit of the repository; none of a folder.
    pub commit: Option<String>,
}

impl DataSet {
    /// A folder that holds the files of a data set's repository.
    pub fn folder(dir: &Path) -> Self {
        Self { place: Place::Folder(dir.to_path_buf()) }
    }

    /// The data set `org/name` of the hub, or of the cache alone if `options.offline`. Nothing is asked yet.
    ///
    /// # Errors
    /// [`HubError::Name`] for what cannot be a name.
    pub fn hub(id: &str, options: &HubOptions) -> Result<Self> {
        let name_error = |reason: String| HubError::Name { name: id.to_string(), reason };
        RepoId::parse(id).map_err(name_error)?;
        let hub = Hub { id: id.to_string(), options: options.clone(), branches: Vec::new(), unasked: BRANCHES.to_vec(), down: None };
        Ok(Self { place: Place::Hub(Box::new(hub)) })
    }

    /// Files of a split, fetched if need be. Without the name of a configuration it is the one called `default`, or the only one.
    ///
    /// # Errors
    /// [`HubError::NoSplit`] where there is none or not all of it, [`HubError::OfflineSplit`] where it is not in the cache and the hub is not to be
    /// asked; those of downloads.
    pub fn split(&mut self, config: Option<&str>, split: &str, progress: &mut dyn Progress) -> Result<SplitFiles> {
        match &mut self.place {
            Place::Hub(hub) => hub.split(config, split, progress),
            Place::Folder(dir) => {
                let files = files_of(dir);
                let chosen = choose(&files, config, split).ok_or_else(|| HubError::NoSplit {
                    repo: dir.display().to_string(),
                    wanted: wanted(config, split),
                    places: "disk".into(),
                    found: summary(&files),
                })?;
                Ok(SplitFiles { paths: chosen.files.iter().map(|file| dir.join(file)).collect(), config: chosen.config, commit: None })
            }
        }
    }
}

fn wanted(config: Option<&str>, split: &str) -> String {
    format!("{}/{split}", config.unwrap_or("default"))
}

impl Hub {
    fn repo(&self, revision: &str) -> RepoId {
        RepoId { kind: RepoKind::DataSet, id: self.id.clone(), revision: revision.to_string() }
    }

    fn split(&mut self, config: Option<&str>, split: &str, progress: &mut dyn Progress) -> Result<SplitFiles> {
        if self.options.offline {
            return self.cached(config, split).ok_or_else(|| {
                HubError::OfflineSplit { repo: self.id.clone(), wanted: wanted(config, split), cache: self.options.cache.clone() }.into()
            });
        }
        loop {
            if let Some(files) = self.fetched(config, split, progress)? {
                return Ok(files);
            }
            if self.down.is_none() && self.ask(progress)? {
                continue;
            }
            return match self.down.take() {
                Some(error) => match self.cached(config, split) {
                    Some(files) => {
                        // Said once: more splits may follow.
                        if !self.options.offline {
                            progress.note(&format!("{error}; using the copy of {} in the cache", self.id));
                            self.options.offline = true;
                        }
                        Ok(files)
                    }
                    None => Err(error),
                },
                None => Err(self.absent(config, split)),
            };
        }
    }

    /// Asks the next branch. False where none is left; that the network fails is kept.
    fn ask(&mut self, progress: &mut dyn Progress) -> Result<bool> {
        if self.unasked.is_empty() {
            return Ok(false);
        }
        let revision = self.unasked.remove(0);
        let repo = self.repo(revision);
        let listing = Transfer::new(&repo, &self.options)?.listing(progress);
        match listing {
            Ok(listing) => self.branches.push(Branch { repo, listing }),
            // A data set that nobody has converted; `main` is what every repository has.
            Err(Error::Hub(HubError::NotFound { .. })) if !self.unasked.is_empty() => {}
            Err(error @ Error::Hub(HubError::Network { .. })) => {
                self.down = Some(error);
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    /// From the branches known so far.
    fn fetched(&self, config: Option<&str>, split: &str, progress: &mut dyn Progress) -> Result<Option<SplitFiles>> {
        for Branch { repo, listing } in &self.branches {
            let Some(chosen) = choose(&listing.files, config, split) else { continue };
            let snapshot = Snapshot::of_commit(repo, &self.options.cache, &listing.commit);
            let transfer = Transfer::new(repo, &self.options)?;
            // The first file last: where the cache has it, it has those behind it.
            for file in chosen.files.iter().rev().filter(|file| !snapshot.has(file)) {
                transfer.fetch(listing, file, progress)?;
            }
            transfer.point_to(listing)?;
            let paths = chosen.files.iter().map(|file| snapshot.path(file)).collect();
            return Ok(Some(SplitFiles { paths, config: chosen.config, commit: Some(listing.commit.clone()) }));
        }
        Ok(None)
    }

    /// From the cache alone.
    fn cached(&self, config: Option<&str>, split: &str) -> Option<SplitFiles> {
        BRANCHES.iter().find_map(|revision| {
            let snapshot = Snapshot::find(&self.repo(revision), &self.options.cache)?;
            let chosen = choose(&files_of(&snapshot.path("")), config, split)?;
            let paths = chosen.files.iter().map(|file| snapshot.path(file)).collect();
            Some(SplitFiles { paths, config: chosen.config, commit: Some(snapshot.commit().to_string()) })
        })
    }

    fn absent(&self, config: Option<&str>, split: &str) -> Error {
        let places: Vec<&str> = self.branches.iter().map(|branch| branch.repo.revision.as_str()).collect();
        let found = self.branches.first().map(|branch| summary(&branch.listing.files)).unwrap_or_default();
        HubError::NoSplit { repo: self.id.clone(), wanted: wanted(config, split), places: places.join(" and "), found }.into()
    }
}

/// Names of the files below a folder, with `/` between folders, as deep as a split can be; links count as what they lead to.
fn files_of(dir: &Path) -> Vec<String> {
    fn walk(dir: &Path, before: &str, depth: usize, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let (path, name) = (entry.path(), format!("{before}{name}"));
            if path.is_file() {
                found.push(name);
            } else if depth > 1 && path.is_dir() {
                walk(&path, &format!("{name}/"), depth - 1, found);
            }
        }
    }
    let mut found = Vec::new();
    walk(dir, "", DEPTH, &mut found);
    found.sort();
    found
}

/// What a file is of.
#[derive(Debug, PartialEq, Eq)]
struct Part<'a> {
    config: &'a str,
    split: &'a str,
    shard: usize,
    /// How many there are, where the name says it.
    of: Option<usize>,
    parquet: bool,
}

/// The configuration of files that lie in no folder of their own.
const DEFAULT: &str = "default";

impl<'a> Part<'a> {
    /// Reads the name of a file:
    ///
    /// ```text
    /// CONFIG/SPLIT/0000.parquet                        the hub's own conversion
    /// CONFIG/SPLIT-00000-of-00001.parquet              also with a hash before the ending, or CONFIG/SPLIT.parquet
    /// data/SPLIT-00000-of-00001.parquet                the configuration `default`; also without the folder
    /// data/NAME_SPLIT.jsonl                            the same
    /// ```
    fn of(file: &'a str) -> Option<Self> {
        let (stem, parquet) = match file.rsplit_once('.')? {
            (stem, "parquet") => (stem, true),
            (stem, "jsonl") => (stem, false),
            _ => return None,
        };
        let folders: Vec<&str> = stem.split('/').collect();
        // These become paths: names that could lead elsewhere are nobody's.
        if folders.iter().any(|name| name.is_empty() || name.starts_with('.') || name.contains(['\\', ':'])) {
            return None;
        }
        let (name, folders) = folders.split_last()?;
        if let ([config, split], Some(shard)) = (folders, digits(name)) {
            return Some(Self { config, split, shard, of: None, parquet });
        }
        let config = match folders {
            [] | ["data"] => DEFAULT,
            [config] | ["data", config] => config,
            _ => return None,
        };
        if let Some((split, shard, of)) = sharded(name) {
            return Some(Self { config, split, shard, of: Some(of), parquet });
        }
        // `lambada_test` is of `test`, `lambada_test_de` is of nothing that can be known.
        let split = if parquet { name } else { name.rsplit(['_', '-', '.']).next()? };
        Some(Self { config, split, shard: 0, of: Some(1), parquet })
    }
}

fn digits(text: &str) -> Option<usize> {
    text.chars().all(|c| c.is_ascii_digit()).then(|| text.parse().ok())?
}

/// `SPLIT-00000-of-00001`, and what comes behind.
fn sharded(name: &str) -> Option<(&str, usize, usize)> {
    let (before, after) = name.rsplit_once("-of-")?;
    let (split, shard) = before.rsplit_once('-')?;
    Some((split, digits(shard)?, digits(after.split('-').next()?)?))
}

/// Files that were chosen, in their order.
#[derive(Debug, PartialEq, Eq)]
struct Chosen {
    config: String,
    files: Vec<String>,
}

/// The files of a split among those of a repository: all of them, or none. Of several copies Parquet comes first.
fn choose(files: &[String], config: Option<&str>, split: &str) -> Option<Chosen> {
    let parts: Vec<(&String, Part)> = files.iter().filter_map(|file| Some((file, Part::of(file)?))).collect();
    let config = match config {
        Some(name) => name,
        None if parts.iter().any(|(_, part)| part.config == DEFAULT) => DEFAULT,
        None => {
            let first = parts.first()?.1.config;
            parts.iter().all(|(_, part)| part.config == first).then_some(first)?
        }
    };
    // By kind, folder and count: parts of one copy.
    let mut copies: BTreeMap<_, BTreeMap<usize, Vec<&String>>> = BTreeMap::new();
    for (file, part) in parts.iter().filter(|(_, part)| part.config == config && part.split == split) {
        let folder = file.rsplit_once('/').map_or("", |(folder, _)| folder);
        copies.entry((!part.parquet, folder, part.of)).or_default().entry(part.shard).or_default().push(file);
    }
    let whole = |of: Option<usize>, shards: &BTreeMap<usize, Vec<&String>>| {
        let counted = shards.keys().enumerate().all(|(i, shard)| i == *shard) && of.is_none_or(|of| of == shards.len());
        // Two files in one place: nothing says which.
        counted && shards.values().all(|files| files.len() == 1)
    };
    let (_, shards) = copies.into_iter().find(|((_, _, of), shards)| whole(*of, shards))?;
    Some(Chosen { config: config.to_string(), files: shards.into_values().flatten().cloned().collect() })
}

/// Configurations with their splits, shortened for an error message.
fn summary(files: &[String]) -> String {
    const SHOWN: usize = 12;
    let mut splits: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for part in files.iter().filter_map(|file| Part::of(file)) {
        let splits = splits.entry(part.config).or_default();
        if !splits.contains(&part.split) {
            splits.push(part.split);
        }
    }
    if splits.is_empty() {
        return format!("no such files among {} in all", files.len());
    }
    let mut text: Vec<String> = splits.iter().take(SHOWN).map(|(config, splits)| format!("{config} ({})", splits.join(", "))).collect();
    if splits.len() > SHOWN {
        text.push(format!("{} more", splits.len() - SHOWN));
    }
    text.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(files: &[&str], config: Option<&str>, split: &str) -> Option<(String, Vec<String>)> {
        let files: Vec<String> = files.iter().map(|file| file.to_string()).collect();
        choose(&files, config, split).map(|chosen| (chosen.config, chosen.files))
    }

    fn names(files: &[&str], config: Option<&str>, split: &str) -> Vec<String> {
        chosen(files, config, split).map(|(_, files)| files).unwrap_or_default()
    }

    #[test]
    fn the_conversion_is_read_in_the_order_of_its_shards() {
        let files = ["a/test/0001.parquet", "a/test/0000.parquet", "a/train/0000.parquet", "b/test/0000.parquet", ".gitattributes"];
        assert_eq!(names(&files, Some("a"), "test"), ["a/test/0000.parquet", "a/test/0001.parquet"]);
        assert_eq!(names(&files, Some("b"), "test"), ["b/test/0000.parquet"]);
        for (config, split) in [(Some("b"), "train"), (Some("c"), "test"), (None, "test")] {
            assert_eq!(chosen(&files, config, split), None);
        }
        // A gap: a shard is missing.
        assert_eq!(chosen(&["a/test/0000.parquet", "a/test/0002.parquet"], None, "test"), None);
        // What the hub has converted in part only is not the split.
        assert_eq!(chosen(&["a/partial-train/0000.parquet"], None, "train"), None);
    }

    #[test]
    fn without_a_configuration_it_is_the_default_or_the_only_one() {
        assert_eq!(chosen(&["plain/test/0000.parquet"], None, "test").unwrap().0, "plain");
        let files = ["other/test/0000.parquet", "default/test/0000.parquet"];
        assert_eq!(chosen(&files, None, "test").unwrap(), ("default".into(), vec![files[1].into()]));
    }

    #[test]
    fn names_that_uploaders_choose() {
        let files =
            ["ARC-Easy/test-00000-of-00001.parquet", "ARC-Easy/train-00000-of-00002.parquet", "ARC-Easy/train-00001-of-00002.parquet"];
        assert_eq!(names(&files, Some("ARC-Easy"), "test"), files[..1]);
        assert_eq!(names(&files, Some("ARC-Easy"), "train"), files[1..]);
        assert_eq!(chosen(&files[..2], Some("ARC-Easy"), "train"), None, "a shard is missing");
        assert_eq!(names(&["data/validation-00000-of-00001-0123abcd.parquet"], None, "validation").len(), 1);
        assert_eq!(names(&["data/main/test.parquet"], Some("main"), "test").len(), 1);
        let lines = ["README.md", "data/lambada_test.jsonl", "data/lambada_test_de.jsonl", "data/lambada_test_en.jsonl"];
        assert_eq!(names(&lines, Some("default"), "test"), lines[1..2]);
        assert_eq!(names(&["test.jsonl", "data/test-00000-of-00001.parquet"], None, "test"), ["data/test-00000-of-00001.parquet"]);
        assert_eq!(chosen(&["a_test.jsonl", "b_test.jsonl"], None, "test"), None, "either may be meant");
        for hostile in
            ["../test/0000.parquet", "data/../test.parquet", "/test/0000.parquet", "a\\..\\b/test/0000.parquet", "c:x/test/0000.parquet"]
        {
            assert_eq!(chosen(&[hostile], None, "test"), None, "{hostile}");
        }
    }

    #[test]
    fn what_there_is_is_said_in_short() {
        let files: Vec<String> = (0..20).map(|i| format!("c{i:02}/test/0000.parquet")).collect();
        let text = summary(&files);
        assert!(text.starts_with("c00 (test), c01 (test)") && text.ends_with("8 more"), "{text}");
        assert_eq!(summary(&["script.py".into()]), "no such files among 1 in all");
    }
}

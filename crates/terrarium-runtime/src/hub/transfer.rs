//! Fetching files with `hf-hub`, whose 0.5 does these things that are corrected here:
//!
//! - it renames whatever arrived to the finished blob, however short: [`Guard`] takes a part of the wrong size away
//!   before that rename;
//! - a server that ignores `Range` makes it append the whole file to the part: the same check drops such a part;
//! - its own retries continue at the position of a file opened for appending, which is 0 before the first write: each
//!   retry here is a new call;
//! - it fetches a blob that is already there under another commit: linked instead;
//! - it points the branch to the commit after each file: here after the last one, and files are asked for by commit, so
//!   that a push between two files cannot mix them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo};

use super::cache::is_commit;
use super::{HubOptions, Progress, RepoId};
use crate::error::HubError;
use crate::{Error, Result};

/// The commit and the files of a revision.
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
}

impl Listing {
    pub(super) fn has(&self, file: &str) -> bool {
        self.files.iter().any(|f| f == file)
    }

    /// SentencePiece models: the one of the usual name, else all at the top.
    pub(super) fn sentencepiece(&self) -> Vec<String> {
        let usual = "tokenizer.model";
        if self.has(usual) {
            return vec![usual.to_string()];
        }
        self.files.iter().filter(|f| f.ends_with(".model") && !f.contains(['/', '\\', ':'])).cloned().collect()
    }

    /// The files, shortened for an error message.
    pub(super) fn summary(&self) -> String {
        const SHOWN: usize = 12;
        let mut text = self.files.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
        if self.files.len() > SHOWN {
            text.push_str(&format!(" and {} more", self.files.len() - SHOWN));
        }
        text
    }
}

/// A connection to one repository.
pub(super) struct Transfer<'a> {
    repo: &'a RepoId,
    options: &'a HubOptions,
    api: Api,
}

/// Why one try failed.
pub(super) enum Failure {
    /// Another try may help; what to report if none does.
    Again(Error),
    /// It will not.
    Final(Error),
}

impl<'a> Transfer<'a> {
    pub(super) fn new(repo: &'a RepoId, options: &'a HubOptions) -> Result<Self> {
        let api = ApiBuilder::from_cache(Cache::new(options.cache.clone()))
            .with_endpoint(options.endpoint.clone())
            .with_token(options.token.clone())
            .with_user_agent("terrarium", env!("CARGO_PKG_VERSION"))
            .with_progress(false)
            .with_retries(0)
            .build()
            .map_err(|e| HubError::Protocol { endpoint: options.endpoint.clone(), what: e.to_string() })?;
        Ok(Self { repo, options, api })
    }

    pub(super) fn repo(&self) -> &RepoId {
        self.repo
    }

    /// Where a file of the listed commit is.
    pub(super) fn url(&self, listing: &Listing, file: &str) -> String {
        self.at(&listing.commit).url(file)
    }

    fn at(&self, revision: &str) -> ApiRepo {
        self.api.repo(Repo::with_revision(self.repo.id.clone(), self.repo.kind.for_hub(), revision.to_string()))
    }

    fn protocol(&self, what: String) -> Error {
        HubError::Protocol { endpoint: self.options.endpoint.clone(), what }.into()
    }

    fn network(&self, what: String, error: ApiError) -> Error {
        HubError::Network { what, endpoint: self.options.endpoint.clone(), reason: error.to_string() }.into()
    }

    /// Asks the hub which commit the revision is and what it holds.
    pub(super) fn listing(&self, progress: &mut dyn Progress) -> Result<Listing> {
        let info = self.retry(progress, |_| self.ask_listing())?;
        if !is_commit(&info.sha) {
            return Err(self.protocol(format!("`{}` for a commit", info.sha)));
        }
        Ok(Listing { commit: info.sha, files: info.siblings.into_iter().map(|s| s.rfilename).collect() })
    }

    fn ask_listing(&self) -> Result<hf_hub::api::RepoInfo, Failure> {
        let token = self.options.token.is_some();
        let page = self.options.page(self.repo);
        self.at(&self.repo.revision).info().map_err(|error| match status(&error) {
            Some(404) => {
                Failure::Final(HubError::NotFound { repo: self.repo.id.clone(), revision: self.repo.revision.clone(), page }.into())
            }
            Some(status @ (401 | 403)) => Failure::Final(HubError::Private { repo: self.repo.id.clone(), status, page, token }.into()),
            Some(status) if status < 500 && status != 408 && status != 429 => Failure::Final(self.protocol(format!("status {status}"))),
            _ if matches!(&error, ApiError::RequestError(e) if matches!(**e, ureq::Error::Json(_))) => {
                Failure::Final(self.protocol(format!("something that is no file list ({error})")))
            }
            _ => Failure::Again(self.network(format!("the file list of {}", self.repo), error)),
        })
    }

    /// Brings one file of the listed commit into the cache.
    pub(super) fn fetch(&self, listing: &Listing, file: &str, progress: &mut dyn Progress) -> Result<()> {
        if !listing.has(file) {
            let RepoId { id, revision, .. } = self.repo.clone();
            return Err(HubError::MissingFile { repo: id, revision, file: file.to_string(), found: listing.summary() }.into());
        }
        self.retry(progress, |progress| self.try_fetch(listing, file, progress))
    }

    /// Calls `attempt` until it succeeds, fails for good, or fails too often without a new byte.
    pub(super) fn retry<T>(
        &self,
        progress: &mut dyn Progress,
        mut attempt: impl FnMut(&mut dyn Progress) -> Result<T, Failure>,
    ) -> Result<T> {
        let mut failed = 0;
        let mut best = 0;
        loop {
            let mut counted = Counted { inner: &mut *progress, received: 0 };
            let error = match attempt(&mut counted) {
                Ok(value) => return Ok(value),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(error)) => error,
            };
            let received = counted.received;
            failed = if received > best { 1 } else { failed + 1 };
            best = best.max(received);
            if failed > self.options.retries {
                return Err(error);
            }
            progress.note(&format!("{error} (trying again)"));
            std::thread::sleep(Duration::from_millis(200 << failed.min(6)));
        }
    }

    fn try_fetch(&self, listing: &Listing, file: &str, progress: &mut dyn Progress) -> Result<(), Failure> {
        let repo = self.at(&listing.commit);
        let meta = self.api.metadata(&repo.url(file)).map_err(|e| self.file_failure(file, e))?;
        let (etag, size) = (meta.etag(), meta.size() as u64);
        // A proxy that compresses marks its tags as weak, and hf-hub keeps the mark as a folder.
        let tag = etag.strip_prefix("W/").unwrap_or(etag);
        let etag_is_plain = !tag.is_empty() && tag.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
        if !etag_is_plain {
            return Err(Failure::Final(self.protocol(format!("the ETag `{etag}` for {file}, which cannot name a blob"))));
        }
        if meta.commit_hash() != listing.commit {
            return Err(Failure::Final(self.protocol(format!("commit {} for {file}, not {}", meta.commit_hash(), listing.commit))));
        }
        let blob = self.repo.folder(&self.options.cache).join("blobs").join(etag);
        let part = blob.with_extension("part");
        if self.adopt(&blob, &part, size)? {
            self.link(&blob, listing, file).map_err(Failure::Final)?;
            return Ok(());
        }
        let mut short = None;
        let guard = Guard { inner: progress, part: part.clone(), size, short: &mut short, started: false };
        let outcome = repo.download_with_progress(file, guard);
        if let Some(found) = short {
            return Err(self.put_back(file, &part, found, size));
        }
        match outcome {
            Ok(_) => {
                let _ = std::fs::remove_file(blob.with_extension("lock"));
                progress.finish(file);
                Ok(())
            }
            Err(error) => Err(self.file_failure(file, error)),
        }
    }

    /// Whether the blob is already complete. One of the wrong size, left by whatever means, is removed.
    fn adopt(&self, blob: &Path, part: &Path, size: u64) -> Result<bool, Failure> {
        let length = |path: &Path| std::fs::metadata(path).ok().map(|m| m.len());
        let remove = |path: &Path| std::fs::remove_file(path).map_err(|e| Failure::Final(Error::io("remove", path)(e)));
        match length(blob) {
            Some(found) if found == size => return Ok(true),
            Some(_) => remove(blob)?,
            None => {}
        }
        match length(part) {
            // All bytes had come and the rename had not: asking for the bytes after the last would be an error.
            Some(found) if found == size => {
                std::fs::rename(part, blob).map_err(|e| Failure::Final(Error::io("write", blob)(e)))?;
                return Ok(true);
            }
            Some(found) if found > size => remove(part)?,
            _ => {}
        }
        Ok(false)
    }

    /// After [`Guard`] took a part of the wrong size away: a short one goes back to be continued, a long one goes.
    fn put_back(&self, file: &str, part: &Path, found: u64, size: u64) -> Failure {
        let aside = aside(part);
        let kept = if found < size { std::fs::rename(&aside, part) } else { std::fs::remove_file(&aside) };
        if let Err(error) = kept {
            return Failure::Final(Error::io("keep", part)(error));
        }
        Failure::Again(HubError::Truncated { repo: self.repo.id.clone(), file: file.to_string(), expected: size, found }.into())
    }

    pub(super) fn file_failure(&self, file: &str, error: ApiError) -> Failure {
        let (repo, revision) = (self.repo.id.clone(), self.repo.revision.clone());
        let gone = || HubError::MissingFile {
            repo: repo.clone(),
            revision,
            file: file.to_string(),
            found: "a listing that names it, and no such file".into(),
        };
        match status(&error) {
            Some(404) => return Failure::Final(gone().into()),
            Some(status @ (401 | 403)) => {
                let (page, token) = (self.options.page(self.repo), self.options.token.is_some());
                return Failure::Final(HubError::Gated { repo, file: file.to_string(), status, page, token }.into());
            }
            Some(status) if status < 500 && !matches!(status, 408 | 416 | 429) => {
                return Failure::Final(self.protocol(format!("status {status} for {file}")));
            }
            _ => {}
        }
        match error {
            ApiError::IoError(e) if is_local(&e) => Failure::Final(Error::io("write in", &self.options.cache)(e)),
            ApiError::LockAcquisition(_) => {
                Failure::Final(HubError::Locked { file: file.to_string(), cache: self.options.cache.clone() }.into())
            }
            ApiError::MissingHeader(_) | ApiError::InvalidHeader(_) | ApiError::ParseIntError(_) => {
                Failure::Final(self.protocol(format!("{error} for {file}")))
            }
            other => Failure::Again(self.network(file.to_string(), other)),
        }
    }

    /// Makes the snapshot show a blob that is there.
    fn link(&self, blob: &Path, listing: &Listing, file: &str) -> Result<()> {
        let pointer = self.repo.folder(&self.options.cache).join("snapshots").join(&listing.commit).join(file);
        let parent = pointer.parent().unwrap_or(&pointer);
        std::fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        // A link whose blob had gone is there and leads nowhere; a good one may have come from another process.
        let _ = std::fs::remove_file(&pointer);
        let up = "../".repeat(2 + file.matches('/').count());
        let inside = blob.strip_prefix(self.repo.folder(&self.options.cache)).unwrap_or(blob);
        symlink(&PathBuf::from(up).join(inside), blob, &pointer).map_err(Error::io("link", &pointer))
    }

    /// Removes what hf-hub writes for each file, since it is asked for files of a commit: a branch of that name.
    pub(super) fn forget_ref(&self, listing: &Listing) {
        let _ = std::fs::remove_file(self.repo.folder(&self.options.cache).join("refs").join(&listing.commit));
    }

    /// Lets the cache's branch or tag point to the commit whose files are now there.
    pub(super) fn point_to(&self, listing: &Listing) -> Result<()> {
        self.forget_ref(listing);
        if self.repo.revision == listing.commit {
            return Ok(());
        }
        let folder = self.repo.folder(&self.options.cache);
        crate::atomic::write_atomic(&folder.join("refs").join(&self.repo.revision), listing.commit.as_bytes())
    }
}

#[cfg(unix)]
fn symlink(relative: &Path, _blob: &Path, pointer: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(relative, pointer)
}

/// Links may need a privilege here: a copy does as well.
#[cfg(not(unix))]
fn symlink(_relative: &Path, blob: &Path, pointer: &Path) -> std::io::Result<()> {
    std::fs::copy(blob, pointer).map(|_| ())
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(e) => match **e {
            ureq::Error::StatusCode(code) => Some(code),
            _ => None,
        },
        _ => None,
    }
}

/// Whether an I/O error is about this machine's disk rather than the connection.
fn is_local(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::*;
    matches!(
        error.kind(),
        StorageFull | QuotaExceeded | FileTooLarge | PermissionDenied | ReadOnlyFilesystem | NotADirectory | IsADirectory
    )
}

fn aside(part: &Path) -> PathBuf {
    part.with_extension("wrong-size")
}

/// Counts what arrived, so that retries can tell progress from none.
struct Counted<'a> {
    inner: &'a mut dyn Progress,
    received: u64,
}

impl Progress for Counted<'_> {
    fn start(&mut self, file: &str, bytes: u64) {
        self.inner.start(file, bytes);
    }

    fn advance(&mut self, bytes: u64) {
        self.received += bytes;
        self.inner.advance(bytes);
    }

    fn finish(&mut self, file: &str) {
        self.inner.finish(file);
    }

    fn note(&mut self, text: &str) {
        self.inner.note(text);
    }
}

/// Passes progress on and, between the last byte and hf-hub's rename, moves a part of the wrong size out of its way:
/// the rename then fails, and no such part becomes a blob.
struct Guard<'a, 'b> {
    inner: &'a mut dyn Progress,
    part: PathBuf,
    size: u64,
    short: &'b mut Option<u64>,
    started: bool,
}

impl hf_hub::api::Progress for Guard<'_, '_> {
    fn init(&mut self, size: usize, filename: &str) {
        // Called twice per file.
        if !std::mem::replace(&mut self.started, true) {
            self.inner.start(filename, size as u64);
        }
    }

    fn update(&mut self, size: usize) {
        self.inner.advance(size as u64);
    }

    fn finish(&mut self) {
        let found = std::fs::metadata(&self.part).map(|m| m.len()).unwrap_or(0);
        if found != self.size && std::fs::rename(&self.part, aside(&self.part)).is_ok() {
            *self.short = Some(found);
        }
    }
}

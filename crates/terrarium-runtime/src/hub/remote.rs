//! What a repository's weights are, before they are downloaded: the headers alone, by ranges.

use std::io::Read;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hf_hub::api::sync::ApiError;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

use super::cache::Snapshot;
use super::transfer::{Failure, Listing, Transfer};
use super::weights::{self, Kind, LATEST};
use super::{ADAPTER, HubOptions, RepoId, WEIGHTS};
use crate::error::HubError;
use crate::tensors::{Header, MappedFile, parse_header};
use crate::{Error, Result};

/// One weights file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteFile {
    /// Its name in the repository.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// Its tensors; `None` for pickled weights (`pytorch_model.bin`, `model_optim_rng.pt`), whose tensors cannot be
    /// listed without a download.
    pub header: Option<Header>,
}

/// The limit of the safetensors format, as for files that are here.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// How many files are asked for at once.
const AT_ONCE: usize = 8;

/// The weights files of a repository with their tensors, without their data: some kilobytes per file are transferred.
/// Files of the cache are read there; offline, or without a network, all of them have to be there.
pub fn remote_headers(repo: &RepoId, options: &HubOptions) -> Result<Vec<RemoteFile>> {
    if options.offline {
        return cached(repo, options);
    }
    let transfer = Transfer::new(repo, options)?;
    match transfer.listing(&mut ()) {
        Ok(listing) => online(&transfer, &listing, repo, options),
        Err(error @ Error::Hub(HubError::Network { .. })) => cached(repo, options).map_err(|_| error),
        Err(error) => Err(error),
    }
}

fn cached(repo: &RepoId, options: &HubOptions) -> Result<Vec<RemoteFile>> {
    let missing = |files: String| {
        let RepoId { id, revision, .. } = repo.clone();
        Error::from(HubError::Offline { repo: id, revision, cache: options.cache.clone(), missing: files })
    };
    let Some(snapshot) = Snapshot::find(repo, &options.cache) else { return Err(missing("everything".into())) };
    let Some(files) = snapshot.weights()? else { return Err(missing(WEIGHTS.into())) };
    let absent: Vec<String> = files.iter().filter(|f| !snapshot.has(f)).cloned().collect();
    if !absent.is_empty() {
        return Err(missing(absent.join(", ")));
    }
    files.iter().map(|file| in_cache(&snapshot, file)).collect()
}

fn in_cache(snapshot: &Snapshot, file: &str) -> Result<RemoteFile> {
    let path = snapshot.path(file);
    let bytes = std::fs::metadata(&path).map_err(Error::io("read", &path))?.len();
    // The tensors of a rank are not those of the model.
    let header = if file.ends_with(".pt") { None } else { Some(MappedFile::open(&path)?.header) };
    Ok(RemoteFile { name: file.to_string(), bytes, header })
}

fn online(transfer: &Transfer, listing: &Listing, repo: &RepoId, options: &HubOptions) -> Result<Vec<RemoteFile>> {
    let snapshot = Snapshot::of_commit(repo, &options.cache, &listing.commit);
    let files = weights(transfer, listing, repo, &snapshot)?;
    let ranges = Ranges { agent: agent(), transfer, listing, options };
    let one = |file: &String| match (is_safetensors(file), snapshot.has(file)) {
        (_, true) => in_cache(&snapshot, file),
        (true, false) => transfer.retry(&mut (), |_| ranges.header(file)),
        (false, false) => transfer.retry(&mut (), |_| ranges.size(file)),
    };
    let next = AtomicUsize::new(0);
    let found = Mutex::new(Vec::with_capacity(files.len()));
    std::thread::scope(|scope| {
        for _ in 0..files.len().min(AT_ONCE) {
            scope.spawn(|| {
                while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let answer = one(file);
                    if answer.is_err() {
                        // What is under way ends; nothing more is asked.
                        next.store(files.len(), Ordering::Relaxed);
                    }
                    found.lock().unwrap_or_else(|e| e.into_inner()).push(answer);
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap_or_else(|e| e.into_inner()).into_iter().collect::<Result<Vec<_>>>()?;
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn is_safetensors(file: &str) -> bool {
    file.ends_with(".safetensors")
}

/// Names of the files to ask about: those that a download would bring.
fn weights(transfer: &Transfer, listing: &Listing, repo: &RepoId, snapshot: &Snapshot) -> Result<Vec<String>> {
    let small = |file: &str| -> Result<()> {
        if !snapshot.has(file) {
            transfer.fetch(listing, file, &mut ())?;
            // A branch that points to this commit would hide the one whose weights may be there.
            transfer.forget_ref(listing);
        }
        Ok(())
    };
    let found = match (Kind::of(|file| listing.has(file)), weights::of_model(|file| listing.has(file))) {
        (Some(Kind::Adapter), _) if listing.has(ADAPTER[1]) => vec![ADAPTER[1].to_string()],
        (Some(Kind::Megatron), _) => {
            small(LATEST)?;
            snapshot.ranks(listing.files.iter().map(String::as_str))?
        }
        (_, Some((index, true))) => {
            small(index)?;
            snapshot.shards(index)?
        }
        (_, Some((file, false))) => vec![file.to_string()],
        _ => vec![],
    };
    if found.is_empty() {
        let RepoId { id, revision, .. } = repo.clone();
        return Err(HubError::MissingFile { repo: id, revision, file: weights::expected(), found: listing.summary() }.into());
    }
    Ok(found)
}

/// As hf-hub's own, which offers no way to ask for a range: the token goes to the hub and not to where it redirects.
fn agent() -> Agent {
    Agent::config_builder()
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .user_agent(concat!("terrarium/", env!("CARGO_PKG_VERSION")))
        // Sizes and ranges are those of the file, not of a compressed answer.
        .accept_encoding("identity")
        .timeout_connect(Some(Duration::from_secs(30)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .build()
        .into()
}

/// Asks for parts of the files of one commit.
struct Ranges<'a> {
    agent: Agent,
    transfer: &'a Transfer<'a>,
    listing: &'a Listing,
    options: &'a HubOptions,
}

/// The bytes from some place on, and the size of the whole file where the server says it.
struct Part {
    response: Response<Body>,
    total: Option<u64>,
    /// Whether the server ignored the range: the body is the whole file.
    whole: bool,
}

impl Ranges<'_> {
    fn ask(&self, file: &str, first: u64, last: u64) -> Result<Part, Failure> {
        let mut request = self.agent.get(self.transfer.url(self.listing, file)).header("Range", format!("bytes={first}-{last}"));
        if let Some(token) = &self.options.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let response = request.call().map_err(|e| self.failure(file, ApiError::RequestError(Box::new(e))))?;
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_string);
        if response.status() != StatusCode::PARTIAL_CONTENT {
            let total = header("content-length").and_then(|v| v.parse().ok());
            return Ok(Part { response, total, whole: true });
        }
        let range = header("content-range").unwrap_or_default();
        let (start, total) = parse_range(&range).ok_or_else(|| self.protocol(format!("the Content-Range `{range}` for {file}")))?;
        if start != first {
            return Err(self.protocol(format!("bytes of {file} from {start} on, not from {first}")));
        }
        Ok(Part { response, total, whole: false })
    }

    fn header(&self, file: &str) -> Result<RemoteFile, Failure> {
        let Part { response, total, whole } = self.ask(file, 0, 7)?;
        let mut body = response.into_body().into_reader();
        let mut head = [0; 8];
        body.read_exact(&mut head).map_err(|e| self.short(file, total, 8, e))?;
        let length = u64::from_le_bytes(head);
        if length > MAX_HEADER_BYTES {
            return Err(self.bad(
                file,
                format!("its header claims {length} bytes, more than the format's {MAX_HEADER_BYTES}; is it a safetensors file?"),
            ));
        }
        if total.is_some_and(|total| 8 + length > total) {
            return Err(self.bad(file, format!("its header claims {length} bytes, and the file has {}", total.unwrap_or(0))));
        }
        // The rest of a whole file is not read: dropping the body closes the connection.
        let json = match (length, whole) {
            (0, _) => Vec::new(),
            (_, true) => self.read(file, body, length)?,
            (_, false) => {
                let Part { response, whole, .. } = self.ask(file, 8, 7 + length)?;
                let mut body = response.into_body().into_reader();
                if whole {
                    body.read_exact(&mut head).map_err(|e| self.short(file, total, 8, e))?;
                }
                self.read(file, body, length)?
            }
        };
        let header = parse_header(&json).map_err(|problem| self.bad(file, problem))?;
        let described = (8 + length).saturating_add(header.data_bytes);
        match total {
            Some(total) if total != described => {
                Err(self.bad(file, format!("its header describes {described} bytes, and the file has {total}")))
            }
            _ => Ok(RemoteFile { name: file.to_string(), bytes: described, header: Some(header) }),
        }
    }

    /// Grows with what arrives, whatever was claimed.
    fn read(&self, file: &str, body: impl Read, length: u64) -> Result<Vec<u8>, Failure> {
        let mut json = Vec::new();
        let read = body.take(length).read_to_end(&mut json);
        let missing =
            || std::io::Error::new(std::io::ErrorKind::UnexpectedEof, format!("{} of {length} bytes of the header came", json.len()));
        match read {
            Ok(_) if json.len() as u64 == length => Ok(json),
            Ok(_) => Err(self.failure(file, ApiError::IoError(missing()))),
            Err(error) => Err(self.failure(file, ApiError::IoError(error))),
        }
    }

    fn size(&self, file: &str) -> Result<RemoteFile, Failure> {
        let bytes = self.ask(file, 0, 0)?.total.ok_or_else(|| self.protocol(format!("no size for {file}")))?;
        Ok(RemoteFile { name: file.to_string(), bytes, header: None })
    }

    fn failure(&self, file: &str, error: ApiError) -> Failure {
        self.transfer.file_failure(file, error)
    }

    fn protocol(&self, what: String) -> Failure {
        Failure::Final(HubError::Protocol { endpoint: self.options.endpoint.clone(), what }.into())
    }

    fn bad(&self, file: &str, problem: String) -> Failure {
        Failure::Final(HubError::Header { repo: self.transfer.repo().id.clone(), file: file.to_string(), problem }.into())
    }

    /// The file is shorter than any with a header, or the connection broke.
    fn short(&self, file: &str, total: Option<u64>, needed: u64, error: std::io::Error) -> Failure {
        match total {
            Some(total) if total < needed => self.bad(file, format!("{total} bytes are too few for a header")),
            _ => self.failure(file, ApiError::IoError(error)),
        }
    }
}

/// First byte and size of the whole of `bytes 0-7/1234`; the size may be `*`.
fn parse_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let start = range.split_once('-')?.0.parse().ok()?;
    if total == "*" { Some((start, None)) } else { Some((start, Some(total.parse().ok()?))) }
}

//! Where the hub is, where its cache is, and who asks: the environment variables of the Python client.

use std::path::{Path, PathBuf};

use hf_hub::RepoType;

/// How models and data sets are found and fetched.
#[derive(Clone)]
pub struct HubOptions {
    /// The cache shared with Python: `models--org--name/{blobs,refs,snapshots}` and `datasets--org--name/..` below it.
    pub cache: PathBuf,
    /// The server, without a slash at the end.
    pub endpoint: String,
    /// Sent as a bearer token, if there is one.
    pub token: Option<String>,
    /// Never open a connection.
    pub offline: bool,
    /// How often a file is tried again while no new bytes arrive.
    pub retries: usize,
}

impl std::fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = self.token.as_ref().map(|_| "(set)");
        let Self { cache, endpoint, offline, retries, .. } = self;
        f.debug_struct("HubOptions")
            .field("cache", cache)
            .field("endpoint", endpoint)
            .field("token", &token)
            .field("offline", offline)
            .field("retries", retries)
            .finish()
    }
}

impl HubOptions {
    /// Reads `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`
    /// and `TRANSFORMERS_OFFLINE`, with the Python client's defaults.
    pub fn from_env() -> Self {
        Self::from_vars(&|name| std::env::var(name).ok())
    }

    /// As [`HubOptions::from_env`], from any source of variables. An empty variable counts as unset.
    pub fn from_vars(var: &dyn Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| var(name).map(|v| v.trim().to_string()).filter(|v| !v.is_empty());
        let path = |name: &str| get(name).map(|v| expand_home(&v));
        let home = path("HF_HOME").unwrap_or_else(|| {
            let cache = path("XDG_CACHE_HOME").unwrap_or_else(|| home_dir().join(".cache"));
            cache.join("huggingface")
        });
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).unwrap_or_else(|| home.join("hub"));
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = get("HF_TOKEN").or_else(|| get("HUGGING_FACE_HUB_TOKEN")).or_else(|| read_token(&token_file));
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let on = |name: &str| get(name).is_some_and(|v| matches!(v.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"));
        Self {
            cache: std::path::absolute(&cache).unwrap_or(cache),
            endpoint: endpoint.trim_end_matches('/').to_string(),
            token,
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            retries: 3,
        }
    }

    /// The page of a repository, for error messages.
    pub(super) fn page(&self, repo: &RepoId) -> String {
        format!("{}/{}{}", self.endpoint, if repo.kind == RepoKind::DataSet { "datasets/" } else { "" }, repo.id)
    }
}

fn read_token(file: &Path) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    Some(text.trim().to_string()).filter(|t| !t.is_empty())
}

fn home_dir() -> PathBuf {
    std::env::home_dir().unwrap_or_else(|| PathBuf::from("."))
}

fn expand_home(path: &str) -> PathBuf {
    match path.strip_prefix("~/") {
        Some(rest) => home_dir().join(rest),
        None => PathBuf::from(path),
    }
}

/// What a repository of the hub holds; models and data sets of one name are two repositories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    /// A model.
    Model,
    /// A data set.
    DataSet,
}

impl RepoKind {
    pub(super) fn for_hub(self) -> RepoType {
        match self {
            Self::Model => RepoType::Model,
            Self::DataSet => RepoType::Dataset,
        }
    }
}

/// A model or a data set on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoId {
    /// Which of the two.
    pub kind: RepoKind,
    /// `org/name`.
    pub id: String,
    /// Branch, tag or commit.
    pub revision: String,
}

impl RepoId {
    /// Parses `org/name[@revision]` of a model; the error says what is wrong with it.
    pub fn parse(name: &str) -> Result<Self, String> {
        let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
        let plain =
            |s: &str, extra: &str| !s.is_empty() && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c) || extra.contains(c));
        let Some((org, repo)) = id.split_once('/') else {
            return Err("there is no such directory, and a hub name has one slash".into());
        };
        for part in [org, repo] {
            if !plain(part, "") || part.starts_with(['.', '-']) || part.ends_with(['.', '-']) || part.contains("--") || part.contains("..")
            {
                return Err(format!("there is no such directory, and `{part}` cannot be part of a hub name"));
            }
        }
        let segments = revision.split('/');
        if !plain(revision, "/") || segments.clone().any(|s| s.is_empty() || s.starts_with('.')) {
            return Err(format!("`{revision}` cannot be a branch, tag or commit"));
        }
        Ok(Self { kind: RepoKind::Model, id: id.to_string(), revision: revision.to_string() })
    }

    /// The folder of the repository in the cache.
    pub(super) fn folder(&self, cache: &Path) -> PathBuf {
        let kind = match self.kind {
            RepoKind::Model => "models",
            RepoKind::DataSet => "datasets",
        };
        cache.join(format!("{kind}--{}", self.id.replace('/', "--")))
    }
}

impl std::fmt::Display for RepoId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.id, self.revision)
    }
}

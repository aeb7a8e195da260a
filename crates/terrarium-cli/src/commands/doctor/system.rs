//! What the computer offers besides devices: processor, folders, settings, terminal.

use std::fmt;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use serde::Serialize;
use terrarium::runtime::HubOptions;

use crate::{bundled, output};

/// Processor.
#[derive(Debug, Serialize)]
pub struct Cpu {
    /// Threads that computations use.
    threads: usize,
    /// Threads the system offers.
    available: usize,
    /// Widest vector instructions found.
    simd: &'static str,
}

impl Cpu {
    pub fn look() -> Self {
        let available = std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads: rayon::current_num_threads(), available, simd: simd() }
    }

    pub fn rows(&self) -> Vec<String> {
        vec![format!("{} of {} threads, SIMD: {}", self.threads, self.available, self.simd)]
    }
}

#[cfg(target_arch = "x86_64")]
fn simd() -> &'static str {
    let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl");
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    match (avx512, avx2) {
        (true, _) => "AVX-512",
        (false, true) => "AVX2 with FMA",
        (false, false) => "SSE2",
    }
}

#[cfg(target_arch = "aarch64")]
fn simd() -> &'static str {
    "NEON"
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn simd() -> &'static str {
    "none known"
}

/// A cache folder.
#[derive(Debug, Serialize)]
pub struct Folder {
    /// What is kept there.
    pub purpose: &'static str,
    /// Where.
    pub path: PathBuf,
    /// The variable that moves it.
    pub variable: &'static str,
    /// Whether it is there yet.
    pub exists: bool,
    /// Bytes in it.
    pub bytes: u64,
    /// Whether it, or the folder it would be made in, can be written.
    pub writable: bool,
}

/// The folders that the program writes to.
pub fn folders() -> Vec<Folder> {
    let look = |purpose, path: PathBuf, variable| {
        let (exists, bytes, writable) = (path.is_dir(), size(&path), writable(&path));
        Folder { purpose, path, variable, exists, bytes, writable }
    };
    vec![
        look("models of the hub", HubOptions::from_env().cache, "HF_HUB_CACHE"),
        look("bundled model", bundled::cache_dir(), "XDG_CACHE_HOME"),
    ]
}

impl fmt::Display for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = if self.exists { output::bytes(self.bytes) } else { "not made yet".to_string() };
        write!(f, "{:<18} {} ({state})", self.purpose, self.path.display())
    }
}

/// Bytes of the files below `folder`; links, which the hub's cache is full of, count nothing.
fn size(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(data) if data.is_dir() => size(&entry.path()),
        Ok(data) if data.is_file() => data.len(),
        _ => 0,
    };
    entries.flatten().map(size).sum()
}

/// Tries to make a file in the folder, or in the nearest one above that exists.
fn writable(folder: &Path) -> bool {
    let Some(there) = folder.ancestors().find(|folder| folder.exists()) else { return false };
    let probe = there.join(format!(".terrarium-doctor-{}", std::process::id()));
    let made = std::fs::write(&probe, []).is_ok();
    made && std::fs::remove_file(&probe).is_ok()
}

/// Settings of the Hugging Face hub.
#[derive(Debug, Serialize)]
pub struct Hub {
    endpoint: String,
    token: bool,
    offline: bool,
}

impl Hub {
    pub fn look() -> Self {
        let options = HubOptions::from_env();
        Self { endpoint: options.endpoint, token: options.token.is_some(), offline: options.offline }
    }

    pub fn rows(&self) -> Vec<String> {
        vec![
            format!("server: {}", self.endpoint),
            format!("token: {}", if self.token { "set" } else { "none (needed for private and gated models only: HF_TOKEN)" }),
            format!("offline: {}", if self.offline { "yes" } else { "no" }),
        ]
    }

    pub fn advice(&self) -> Option<String> {
        self.offline.then(|| "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: nothing will be downloaded".to_string())
    }
}

/// Where output goes.
#[derive(Debug, Serialize)]
pub struct Terminal {
    stdout: bool,
    stderr: bool,
    term: Option<String>,
    dashboard: bool,
}

impl Terminal {
    pub fn look() -> Self {
        let term = std::env::var("TERM").ok().filter(|term| !term.is_empty());
        let (stdout, stderr) = (std::io::stdout().is_terminal(), std::io::stderr().is_terminal());
        let dashboard = stdout && term.as_deref() != Some("dumb");
        Self { stdout, stderr, term, dashboard }
    }

    pub fn rows(&self) -> Vec<String> {
        let kind = |terminal: bool| if terminal { "a terminal" } else { "a file or pipe" };
        vec![
            format!("output goes to {}, messages to {}, TERM={}", kind(self.stdout), kind(self.stderr), self.term.as_deref().unwrap_or("")),
            format!("training shows {}", if self.dashboard { "the dashboard" } else { "plain lines" }),
        ]
    }

    pub fn advice(&self) -> Option<String> {
        (self.stdout && !self.dashboard).then(|| "TERM=dumb has no dashboard; set TERM=xterm-256color if yours is more able".to_string())
    }
}

//! A loopback hub that serves folders as the models `org/NAME` and the data sets `datasets/org/NAME`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files by `org/NAME/FILE`, of data sets by `datasets/org/NAME/FILE`.
type Files = BTreeMap<String, Vec<u8>>;

/// Serves until the process ends.
pub struct Hub {
    port: u16,
    sent: Arc<AtomicUsize>,
}

impl Hub {
    /// Serves each folder under its name, with the folders in it.
    pub fn of(folders: &[(&str, &Path)]) -> Self {
        let mut files = Files::new();
        for (name, folder) in folders {
            add(&mut files, name, folder);
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = Self { port: listener.local_addr().unwrap().port(), sent: Arc::default() };
        let sent = hub.sent.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = serve(stream, &files, &sent);
            }
        });
        hub
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Bytes of files that were sent.
    pub fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }
}

fn add(files: &mut Files, name: &str, folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap()) {
        let name = format!("{name}/{}", entry.file_name().to_string_lossy());
        // What the reference computed is no part of a model.
        if entry.path().is_dir() {
            add(files, &name, &entry.path());
        } else if !name.contains("/expected") {
            files.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
}

fn serve(mut stream: TcpStream, files: &Files, sent: &AtomicUsize) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().replace("%2F", "/");
    let mut range = None;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
            break;
        }
        if let Some(value) = header.to_lowercase().trim().strip_prefix("range: bytes=") {
            range = value.split_once('-').map(|(first, last)| (first.parse().unwrap_or(0), last.parse().unwrap_or(usize::MAX)));
        }
    }
    let answer = respond(&path, range, files, sent);
    stream.write_all(&answer)
}

fn respond(path: &str, range: Option<(usize, usize)>, files: &Files, sent: &AtomicUsize) -> Vec<u8> {
    // As in the addresses of files, `datasets/` belongs to the name.
    let asked = path.strip_prefix("/api/").map(|rest| rest.strip_prefix("models/").unwrap_or(rest));
    if let Some((name, _)) = asked.and_then(|rest| rest.split_once("/revision/")) {
        let prefix = format!("{name}/");
        let names: Vec<String> =
            files.keys().filter_map(|file| file.strip_prefix(&prefix)).map(|file| format!(r#"{{"rfilename": "{file}"}}"#)).collect();
        if !names.is_empty() {
            let body = format!(r#"{{"id": "{name}", "sha": "{COMMIT}", "siblings": [{}]}}"#, names.join(","));
            return answer("200 OK", "", body.as_bytes());
        }
    }
    let found = path.strip_prefix('/').and_then(|rest| rest.split_once("/resolve/")).and_then(|(name, rest)| {
        let (_, file) = rest.split_once('/')?;
        files.get(&format!("{name}/{file}"))
    });
    let Some(bytes) = found else { return answer("404 Not Found", "", b"") };
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3));
    let headers = format!("ETag: \"{hash:016x}{:08x}\"\r\nX-Repo-Commit: {COMMIT}\r\n", bytes.len());
    let (first, last) = range.unwrap_or((0, usize::MAX));
    let (first, end) = (first.min(bytes.len()), last.saturating_add(1).min(bytes.len()));
    sent.fetch_add(end - first, Ordering::Relaxed);
    let range = format!("{headers}Content-Range: bytes {first}-{}/{}\r\n", end.saturating_sub(1), bytes.len());
    answer("206 Partial Content", &range, &bytes[first..end])
}

fn answer(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
    [head.as_bytes(), body].concat()
}

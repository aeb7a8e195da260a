//! A loopback server that speaks the part of the hub's API that clients use, and misbehaves on request.

// Each test binary uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const OTHER_COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";
const WEIGHTS: &str = "model.safetensors";

/// How the server misbehaves.
#[derive(Debug, Clone)]
pub enum Fault {
    None,
    /// Closes the connection in the middle of the first transfer of the weights.
    CutOnce {
        after: usize,
    },
    /// The same, and later sends the whole file whatever range is asked for.
    CutOnceThenIgnoreRange {
        after: usize,
    },
    /// Ends the weights early, as if that were all.
    Truncated {
        to: usize,
    },
    /// Refuses files.
    Gated {
        status: u16,
    },
    /// Refuses the listing.
    Private,
    /// Names files so.
    Etag(String),
    /// Names the commit so.
    Commit(String),
    /// Answers with a web page.
    Html,
    /// Sends whole files whatever range is asked for.
    IgnoreRange,
    /// The same, once the first eight bytes were asked for.
    IgnoreLaterRanges,
    /// Sends other bytes than those asked for.
    WrongRange,
    /// Cuts every answer after so many bytes.
    CutAlways {
        after: usize,
    },
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    fault: Fault,
    /// Path, range, bearer token.
    log: Vec<(String, Option<String>, Option<String>)>,
    contents: usize,
    cut: bool,
    /// Bytes that the connections took.
    sent: usize,
    /// Whether it has the branch of data sets that were converted.
    converted: bool,
}

/// Serves the model and the data set `org/stories`, of the same files, until dropped (its thread ends with the process).
pub struct HubServer {
    port: u16,
    state: Arc<Mutex<State>>,
}

impl HubServer {
    /// Serves a real checkpoint where there is one, else files of the same names.
    pub fn start() -> Self {
        let mut files = BTreeMap::new();
        match crate::common::stories() {
            Some(dir) => {
                for name in ["config.json", "tokenizer.json", WEIGHTS] {
                    files.insert(name.to_string(), std::fs::read(dir.join(name)).expect("the checkpoint is whole"));
                }
            }
            None => {
                let bytes = (0..300_000u32).map(|i| (i * 31 % 251) as u8).collect();
                files.insert(WEIGHTS.to_string(), bytes);
                files.insert("config.json".to_string(), b"{}".to_vec());
                files.insert("tokenizer.json".to_string(), b"{ }".to_vec());
            }
        }
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let state =
            Arc::new(Mutex::new(State { files, fault: Fault::None, log: vec![], contents: 0, cut: false, sent: 0, converted: true }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || {
                    let _ = serve(stream, &state, port);
                });
            }
        });
        Self { port, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panicked")
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn fault(&self, fault: Fault) {
        self.state().fault = fault;
    }

    pub fn files(&self) -> Vec<String> {
        self.state().files.keys().cloned().collect()
    }

    pub fn content(&self, name: &str) -> Vec<u8> {
        self.state().files[name].clone()
    }

    pub fn hide(&self, name: &str) {
        self.state().files.remove(name);
    }

    pub fn add(&self, name: &str, bytes: &[u8]) {
        self.state().files.insert(name.into(), bytes.to_vec());
    }

    /// Nobody has converted the data set.
    pub fn unconverted(&self) {
        self.state().converted = false;
    }

    pub fn etag(&self, name: &str) -> String {
        etag(&self.state().files[name])
    }

    pub fn forget(&self) {
        self.state().log.clear();
    }

    pub fn requests(&self) -> usize {
        self.state().log.len()
    }

    /// How many times the content of a file was asked for (the first byte alone does not count).
    pub fn contents_sent(&self) -> usize {
        self.state().contents
    }

    /// Bytes sent, headers included.
    pub fn bytes_sent(&self) -> usize {
        self.state().sent
    }

    pub fn saw_token(&self) -> bool {
        self.state().log.iter().any(|(.., token)| token.is_some())
    }

    /// Ranges asked of a file's content.
    pub fn ranges(&self, name: &str) -> Vec<String> {
        let state = self.state();
        // The first byte is asked for to learn the size; the weights come from where the redirection leads.
        let of_file = state.log.iter().filter(|(path, ..)| path.starts_with("/cdn/") && path.ends_with(name));
        of_file.filter_map(|(_, range, _)| range.clone()).filter(|r| r != "bytes=0-0").collect()
    }
}

fn etag(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf29ce484222325u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100000001b3));
    format!("{hash:016x}{:08x}", bytes.len())
}

fn serve(mut stream: TcpStream, shared: &Mutex<State>, port: u16) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or("").split('?').next().unwrap_or("").to_string();
    let (mut range, mut token) = (None, None);
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 || header.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = header.trim().split_once(": ") {
            match name.to_lowercase().as_str() {
                "range" => range = Some(value.to_string()),
                "authorization" => token = Some(value.to_string()),
                _ => {}
            }
        }
    }
    let mut state = shared.lock().expect("no thread panicked");
    state.log.push((path.clone(), range.clone(), token));
    let answer = respond(&mut state, &path, range.as_deref(), port);
    drop(state);
    for part in answer.chunks(1 << 16) {
        stream.write_all(part)?;
        shared.lock().expect("no thread panicked").sent += part.len();
    }
    Ok(())
}

fn plain(status: &str, headers: &[(&str, String)], body: &[u8]) -> Vec<u8> {
    let mut answer = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        answer.push_str(&format!("{name}: {value}\r\n"));
    }
    [answer.as_bytes(), b"\r\n", body].concat()
}

fn commit_of(revision: &str) -> Option<&'static str> {
    match revision {
        "main" | COMMIT => Some(COMMIT),
        "v1" | "refs/pr/1" | "refs/convert/parquet" | OTHER_COMMIT => Some(OTHER_COMMIT),
        _ => None,
    }
}

fn respond(state: &mut State, path: &str, range: Option<&str>, port: u16) -> Vec<u8> {
    let missing = || plain("404 Not Found", &[], b"not found");
    if matches!(state.fault, Fault::Html) {
        return plain("200 OK", &[("Content-Type", "text/html".into())], b"<html>welcome</html>");
    }
    let path = &path.replace("%2F", "/");
    if path.contains("refs/convert/parquet") && (!state.converted || path.contains("/models/")) {
        return missing();
    }
    let path = &path.replacen("/api/datasets/", "/api/models/", 1).replacen("/datasets/", "/", 1);
    if let Some(revision) = path.strip_prefix("/api/models/org/stories/revision/") {
        if matches!(state.fault, Fault::Private) {
            return plain("401 Unauthorized", &[], b"");
        }
        return commit_of(revision).map_or_else(missing, |commit| listing(state, commit));
    }
    if let Some((revision, file)) = path.strip_prefix("/org/stories/resolve/").and_then(|rest| rest.split_once('/')) {
        if let Fault::Gated { status } = state.fault {
            return plain(&format!("{status} Refused"), &[("X-Error-Code", "GatedRepo".into())], b"");
        }
        return match (commit_of(revision), state.files.contains_key(file)) {
            (Some(commit), true) => resolve_file(state, commit, file, range, port),
            _ => missing(),
        };
    }
    match path.strip_prefix("/cdn/") {
        Some(file) if state.files.contains_key(file) => content(state, file, range, &[]),
        _ => missing(),
    }
}

fn listing(state: &State, commit: &str) -> Vec<u8> {
    let sha = if let Fault::Commit(sha) = &state.fault { sha } else { commit };
    let siblings: Vec<_> = state.files.keys().map(|f| format!(r#"{{"rfilename": "{f}"}}"#)).collect();
    let body = format!(r#"{{"id": "org/stories", "sha": "{sha}", "siblings": [{}]}}"#, siblings.join(","));
    plain("200 OK", &[("Content-Type", "application/json".into())], body.as_bytes())
}

/// Small files come at once, large ones from another place, as on the hub.
fn resolve_file(state: &mut State, commit: &str, file: &str, range: Option<&str>, port: u16) -> Vec<u8> {
    let bytes = &state.files[file];
    let tag = if let Fault::Etag(tag) = &state.fault { tag.clone() } else { etag(bytes) };
    let mut headers = vec![("X-Repo-Commit", commit.to_string())];
    if file == WEIGHTS {
        headers.push(("X-Linked-Etag", format!("\"{tag}\"")));
        headers.push(("X-Linked-Size", bytes.len().to_string()));
        headers.push(("Location", format!("http://127.0.0.1:{port}/cdn/{file}")));
        return plain("302 Found", &headers, b"");
    }
    headers.push(("ETag", format!("\"{tag}\"")));
    content(state, file, range, &headers)
}

fn content(state: &mut State, file: &str, range: Option<&str>, headers: &[(&str, String)]) -> Vec<u8> {
    let bytes = state.files[file].clone();
    let total = bytes.len();
    let (start, end) = range.and_then(|r| r.strip_prefix("bytes=")?.split_once('-')).map_or((0, total), |(a, b)| {
        let start: usize = a.parse().expect("a number");
        (start, b.parse::<usize>().map_or(total, |last| (last + 1).min(total)))
    });
    let probe = range == Some("bytes=0-0");
    if !probe {
        state.contents += 1;
    }
    let faulty = file == WEIGHTS && !probe;
    match state.fault {
        Fault::IgnoreRange => return plain("200 OK", headers, &bytes),
        Fault::IgnoreLaterRanges if start > 0 => return plain("200 OK", headers, &bytes),
        Fault::WrongRange => return partial(&bytes, start + 1, end.max(start + 1), headers),
        Fault::CutAlways { after } => {
            let mut answer = partial(&bytes, start, end, headers);
            answer.truncate(answer.len() - (end - start) + after.min(end - start));
            return answer;
        }
        Fault::CutOnce { after } | Fault::CutOnceThenIgnoreRange { after } if faulty && !state.cut => {
            state.cut = true;
            let mut answer = partial(&bytes, start, end, headers);
            answer.truncate(answer.len() - (end - start) + after);
            return answer;
        }
        Fault::CutOnceThenIgnoreRange { .. } if faulty && start > 0 => return plain("200 OK", headers, &bytes),
        Fault::Truncated { to } if faulty => return partial(&bytes, start.min(to), to, headers),
        _ => {}
    }
    if start >= total { plain("416 Range Not Satisfiable", &[], b"") } else { partial(&bytes, start, end, headers) }
}

fn partial(bytes: &[u8], start: usize, end: usize, headers: &[(&str, String)]) -> Vec<u8> {
    let mut headers = headers.to_vec();
    headers.push(("Content-Range", format!("bytes {start}-{}/{}", end.saturating_sub(1), bytes.len())));
    plain("206 Partial Content", &headers, &bytes[start..end])
}

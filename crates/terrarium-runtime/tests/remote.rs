//! Headers of remote weights, against the loopback hub.

mod common;
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::TensorData;
use server::{Fault, HubServer};
use terrarium_runtime::hub::{RemoteFile, RepoId, remote_headers};
use terrarium_runtime::{Error, Files, HubError, HubOptions, Result, Tokenizer, resolve, write_safetensors};

const WEIGHTS: &str = "model.safetensors";

fn options(server: &HubServer, cache: &Path) -> HubOptions {
    HubOptions { cache: cache.join("hub"), endpoint: server.endpoint(), token: None, offline: false, retries: 1 }
}

fn headers(name: &str, options: &HubOptions) -> Result<Vec<RemoteFile>> {
    remote_headers(&RepoId::parse(name).expect("a name"), options)
}

fn hub_error(result: Result<Vec<RemoteFile>>) -> HubError {
    match result.expect_err("an error") {
        Error::Hub(error) => error,
        other => panic!("expected an error of the hub, found {other}"),
    }
}

/// A weights file with one tensor of `rows` rows.
fn weights(key: &str, rows: usize) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("temp");
    let path = dir.path().join(WEIGHTS);
    let tensors = vec![(key.to_string(), TensorData::new(vec![0.5f32; rows * 256], [rows, 256]))];
    write_safetensors(&path, tensors, &BTreeMap::from([("format".to_string(), "pt".to_string())])).expect("writes");
    fs::read(path).expect("there")
}

/// A server with a weights file of about 20 MB.
fn started() -> (HubServer, tempfile::TempDir) {
    let server = HubServer::start();
    server.add(WEIGHTS, &weights("w", 20_000));
    (server, tempfile::tempdir().expect("temp"))
}

fn assert_is_w(found: &[RemoteFile], server: &HubServer) {
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].name.as_str(), found[0].bytes), (WEIGHTS, server.content(WEIGHTS).len() as u64));
    let header = found[0].header.as_ref().expect("a header");
    assert_eq!((header.entries[0].key.as_str(), &header.entries[0].shape), ("w", &vec![20_000, 256]));
    assert_eq!(header.metadata["format"], "pt");
}

#[test]
fn only_the_header_is_transferred() {
    let (server, cache) = started();
    let options = HubOptions { token: Some("hf_x".into()), ..options(&server, cache.path()) };
    assert_is_w(&headers("org/stories", &options).expect("reads"), &server);
    let ranges = server.ranges(WEIGHTS);
    assert!(ranges[0] == "bytes=0-7" && ranges[1].starts_with("bytes=8-") && ranges.len() == 2, "{ranges:?}");
    assert!(server.saw_token() && server.bytes_sent() < 10_000, "{}", server.bytes_sent());
    assert!(!cache.path().join("hub").exists(), "nothing is written");
}

#[test]
fn a_server_without_ranges_is_left_early() {
    for fault in [Fault::IgnoreRange, Fault::IgnoreLaterRanges] {
        let (server, cache) = started();
        server.fault(fault);
        assert_is_w(&headers("org/stories", &options(&server, cache.path())).expect("reads"), &server);
        // What the system's buffers took, and no more.
        assert!(server.bytes_sent() < server.content(WEIGHTS).len() / 2, "{}", server.bytes_sent());
    }
}

#[test]
fn shards_are_read_by_the_index() {
    let (server, cache) = started();
    server.hide(WEIGHTS);
    let names: Vec<String> = (1..=20).map(|i| format!("model-{i:05}-of-00020.safetensors")).collect();
    for (i, name) in names.iter().enumerate() {
        server.add(name, &weights(&format!("w{i}"), i + 1));
    }
    let map: Vec<String> = names.iter().enumerate().map(|(i, name)| format!(r#""w{i}": "{name}""#)).collect();
    server.add("model.safetensors.index.json", format!(r#"{{"weight_map": {{{}}}}}"#, map.join(",")).as_bytes());
    let options = options(&server, cache.path());
    let found = headers("org/stories", &options).expect("reads");
    assert_eq!(found.iter().map(|f| f.name.clone()).collect::<Vec<_>>(), names);
    for (i, file) in found.iter().enumerate() {
        assert_eq!(file.header.as_ref().expect("a header").entries[0].shape, [i + 1, 256]);
        assert_eq!(file.bytes, server.content(&names[i]).len() as u64);
    }
    let repo = cache.path().join("hub/models--org--stories");
    assert!(!repo.join("refs").join("main").exists(), "no branch points to a commit without weights");
    assert!(fs::read_dir(repo.join("refs")).map_or(0, |d| d.count()) == 0);

    server.hide(&names[7]);
    let error = hub_error(headers("org/stories", &options));
    assert!(matches!(&error, HubError::MissingFile { file, .. } if *file == names[7]), "{error}");
}

#[test]
fn files_of_the_cache_are_read_there() {
    let (server, cache) = started();
    let online = options(&server, cache.path());
    let offline = HubOptions { offline: true, ..online.clone() };
    let error = hub_error(headers("org/stories", &offline));
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
    assert_eq!(server.requests(), 0);

    let there = resolve("org/stories", Files::All, &online, &mut ()).expect("downloads");
    let before = server.contents_sent();
    assert_is_w(&headers("org/stories", &online).expect("reads"), &server);
    assert_eq!(server.contents_sent(), before);
    let requests = server.requests();
    assert_is_w(&headers("org/stories", &offline).expect("reads"), &server);
    assert_eq!(server.requests(), requests);
    let down = HubOptions { endpoint: "http://127.0.0.1:9".into(), retries: 0, ..online };
    assert_is_w(&headers("org/stories", &down).expect("the cache"), &server);
    assert!(matches!(hub_error(headers("org/other", &down)), HubError::Network { .. }));
    fs::remove_file(there.dir.join(WEIGHTS)).expect("removes");
    assert!(hub_error(headers("org/stories", &offline)).to_string().contains(WEIGHTS));
}

#[test]
fn pickled_weights_have_names_and_sizes() {
    let (server, cache) = started();
    server.hide(WEIGHTS);
    let options = options(&server, cache.path());
    let error = hub_error(headers("org/stories", &options));
    assert!(matches!(error, HubError::MissingFile { .. }) && error.to_string().contains("pytorch_model.bin"), "{error}");
    for fault in [Fault::None, Fault::IgnoreRange] {
        server.fault(fault);
        server.add("pytorch_model.bin", &vec![7; 123_456]);
        let found = headers("org/stories", &options).expect("asks");
        assert_eq!(found, [RemoteFile { name: "pytorch_model.bin".into(), bytes: 123_456, header: None }]);
    }
}

#[test]
fn files_of_every_layout_are_those_that_a_download_brings() {
    let (server, cache) = started();
    server.hide(WEIGHTS);
    let options = options(&server, cache.path());
    let sizes = |expected: &[(&str, u64)]| {
        let found = headers("org/stories", &options).expect("asks");
        let found: Vec<_> = found.iter().map(|file| (file.name.as_str(), file.bytes)).collect();
        assert_eq!(found, expected);
    };
    server.add("pytorch_model.bin.index.json", br#"{"weight_map": {"a": "pytorch_model-1.bin"}}"#);
    server.add("pytorch_model-1.bin", b"first");
    server.add("pytorch_model-0.bin", b"of another upload");
    sizes(&[("pytorch_model-1.bin", 5)]);
    server.hide("pytorch_model.bin.index.json");
    let one = weights("w", 3);
    server.add("consolidated.safetensors", &one);
    sizes(&[("consolidated.safetensors", one.len() as u64)]);
    for name in server.files() {
        server.hide(&name);
    }
    server.add("latest_checkpointed_iteration.txt", b"12");
    server.add("iter_0000012/mp_rank_00/model_optim_rng.pt", b"rank 0");
    server.add("iter_0000011/mp_rank_00/model_optim_rng.pt", b"older");
    sizes(&[("iter_0000012/mp_rank_00/model_optim_rng.pt", 6)]);
}

#[test]
fn absurd_and_damaged_headers_are_refused() {
    let good = weights("w", 4);
    let claim = |length: u64| [&length.to_le_bytes()[..], &good[8..]].concat();
    let cases: [(Vec<u8>, &str); 6] = [
        (claim(u64::MAX), "more than the format's"),
        (claim(99_999_999), "and the file has"),
        (claim(20), "does not parse"),
        (good[..good.len() - 5].to_vec(), "describes"),
        ([good.as_slice(), b"more"].concat(), "describes"),
        (b"short".to_vec(), "too few"),
    ];
    for (bytes, expected) in cases {
        for fault in [Fault::None, Fault::IgnoreRange] {
            let (server, cache) = started();
            server.add(WEIGHTS, &bytes);
            server.fault(fault);
            let error = hub_error(headers("org/stories", &options(&server, cache.path())));
            assert!(matches!(error, HubError::Header { .. }), "{error}");
            assert!(error.to_string().contains(expected) && error.to_string().contains(WEIGHTS), "{error} lacks {expected}");
        }
    }
}

#[test]
fn refusals_and_bad_answers_are_typed() {
    type Check = fn(&HubError) -> bool;
    let cases: [(Fault, Check); 5] = [
        (Fault::Gated { status: 403 }, |e| matches!(e, HubError::Gated { status: 403, .. })),
        (Fault::Private, |e| matches!(e, HubError::Private { .. })),
        (Fault::Html, |e| matches!(e, HubError::Protocol { .. })),
        (Fault::WrongRange, |e| matches!(e, HubError::Protocol { .. })),
        (Fault::CutAlways { after: 3 }, |e| matches!(e, HubError::Network { .. })),
    ];
    for (fault, check) in cases {
        let (server, cache) = started();
        server.fault(fault.clone());
        let error = hub_error(headers("org/stories", &HubOptions { retries: 0, ..options(&server, cache.path()) }));
        assert!(check(&error), "{fault:?}: {error}");
    }
    let (server, cache) = started();
    let error = hub_error(headers("org/stories@nowhere", &options(&server, cache.path())));
    assert!(matches!(error, HubError::NotFound { .. }), "{error}");
}

#[test]
fn a_pull_request_is_a_revision() {
    let (server, cache) = started();
    let options = options(&server, cache.path());
    assert_is_w(&headers("org/stories@refs/pr/1", &options).expect("reads"), &server);
    let found = resolve("org/stories@refs/pr/1", Files::All, &options, &mut ()).expect("downloads");
    assert_eq!(found.commit.as_deref(), Some(server::OTHER_COMMIT));
    // As Python's client names it: the revision's own `refs` lies in the folder of that name.
    let reference = cache.path().join("hub/models--org--stories/refs/refs/pr/1");
    assert_eq!(fs::read_to_string(reference).expect("ref"), server::OTHER_COMMIT);
    let offline = HubOptions { offline: true, ..options };
    assert_eq!(resolve("org/stories@refs/pr/1", Files::All, &offline, &mut ()).expect("hit").dir, found.dir);
    assert_is_w(&headers("org/stories@refs/pr/1", &offline).expect("reads"), &server);
    assert!(resolve("org/stories", Files::All, &offline, &mut ()).is_err(), "main was not fetched");
}

#[test]
fn sentencepiece_models_come_along_where_there_is_no_other_tokenizer() {
    let (server, cache) = started();
    let model = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sentencepiece/bpe-bytes.model")).expect("there");
    server.add("mt_nlg_256k.model", &model);
    let options = options(&server, cache.path());
    let found = resolve("org/stories", Files::Metadata, &options, &mut ()).expect("downloads");
    assert!(!found.dir.join("mt_nlg_256k.model").exists());
    server.hide("tokenizer.json");
    let cache = tempfile::tempdir().expect("temp");
    let options = HubOptions { cache: cache.path().join("hub"), ..options };
    let found = resolve("org/stories", Files::Metadata, &options, &mut ()).expect("downloads");
    assert!(Tokenizer::from_dir(&found.dir).expect("reads").is_some());
    server.add("tokenizer.model", &model);
    let cache = tempfile::tempdir().expect("temp");
    let options = HubOptions { cache: cache.path().join("hub"), ..options };
    let found = resolve("org/stories", Files::Metadata, &options, &mut ()).expect("downloads");
    assert!(found.dir.join("tokenizer.model").exists() && !found.dir.join("mt_nlg_256k.model").exists());
}

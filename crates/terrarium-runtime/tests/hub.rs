//! The hub path: the real hf-hub client against a loopback server that speaks the hub's API and serves a directory.

mod common;
mod server;

use std::fs;
use std::path::Path;

use server::{COMMIT, Fault, HubServer, OTHER_COMMIT};
use terrarium_runtime::{Error, Files, HubError, HubOptions, Resolved, Result, resolve};

const NAME: &str = "org/stories";

fn options(server: &HubServer, cache: &Path) -> HubOptions {
    HubOptions { cache: cache.join("hub"), endpoint: server.endpoint(), token: None, offline: false, retries: 1 }
}

fn get(model: &str, options: &HubOptions) -> Result<Resolved> {
    resolve(model, Files::All, options, &mut ())
}

fn hub_error(result: Result<Resolved>) -> HubError {
    match result.expect_err("an error") {
        Error::Hub(error) => error,
        other => panic!("expected an error of the hub, found {other}"),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).expect("a directory").map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn assert_same_files(server: &HubServer, dir: &Path) {
    for name in server.files() {
        assert!(fs::read(dir.join(&name)).expect("fetched") == server.content(&name), "{name} differs");
    }
}

#[test]
fn first_download_has_the_shared_layout_and_the_second_takes_it_from_the_cache() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let options = options(&server, cache.path());
    let first = get(NAME, &options).expect("downloads");
    assert_same_files(&server, &first.dir);
    assert_eq!(first.commit.as_deref(), Some(COMMIT));
    assert_eq!(first.downloaded.len(), server.files().len());
    let repo = cache.path().join("hub/models--org--stories");
    assert_eq!(first.dir, repo.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(repo.join("refs/main")).expect("ref"), COMMIT);
    assert_eq!(names(&repo.join("refs")), ["main"]);
    assert_eq!(names(&repo.join("blobs")).len(), server.files().len(), "blobs only, no parts or locks: {:?}", names(&repo.join("blobs")));
    assert!(fs::read_link(first.dir.join("model.safetensors")).expect("a link").starts_with("../../blobs"));

    let before = server.contents_sent();
    let second = get(NAME, &options).expect("cached");
    assert_eq!(second.dir, first.dir);
    assert!(second.downloaded.is_empty());
    assert_eq!(server.contents_sent(), before, "no content is fetched twice");
    if common::stories().is_some() {
        let loaded = terrarium_runtime::load::<common::B>(&second.dir, &Default::default(), &common::device()).expect("loads");
        assert!(loaded.tokenizer.is_some());
    }
}

#[test]
fn metadata_alone_brings_no_weights() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let found = resolve(NAME, Files::Metadata, &options(&server, cache.path()), &mut ()).expect("downloads");
    assert!(found.dir.join("config.json").is_file() && !found.dir.join("model.safetensors").exists());
}

#[test]
fn a_cut_connection_is_resumed_within_a_call() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let half = server.content("model.safetensors").len() / 2;
    server.fault(Fault::CutOnce { after: half });
    let found = get(NAME, &options(&server, cache.path())).expect("resumes");
    assert_same_files(&server, &found.dir);
    assert!(server.ranges("model.safetensors").contains(&format!("bytes={half}-")), "{:?}", server.ranges("model.safetensors"));
}

#[test]
fn a_cut_connection_is_resumed_by_the_next_call() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let options = HubOptions { retries: 0, ..options(&server, cache.path()) };
    let half = server.content("model.safetensors").len() / 2;
    server.fault(Fault::CutOnce { after: half });
    let error = hub_error(get(NAME, &options));
    assert!(matches!(error, HubError::Network { .. }), "{error}");
    let repo = cache.path().join("hub/models--org--stories");
    assert!(!repo.join("refs/main").exists(), "the branch points nowhere before all files are there");
    assert!(names(&repo.join("blobs")).iter().any(|n| n.ends_with(".part")), "{:?}", names(&repo.join("blobs")));

    server.forget();
    let found = get(NAME, &options).expect("resumes");
    assert_same_files(&server, &found.dir);
    assert_eq!(server.ranges("model.safetensors"), [format!("bytes={half}-")]);
}

#[test]
fn a_server_that_ignores_ranges_does_not_spoil_a_file() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let half = server.content("model.safetensors").len() / 2;
    let options = HubOptions { retries: 3, ..options(&server, cache.path()) };
    server.fault(Fault::CutOnceThenIgnoreRange { after: half });
    let found = get(NAME, &options).expect("starts over");
    assert_same_files(&server, &found.dir);
}

#[test]
fn a_truncated_file_never_becomes_a_blob() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let options = options(&server, cache.path());
    let (full, half) = (server.content("model.safetensors").len(), server.content("model.safetensors").len() / 2);
    server.fault(Fault::Truncated { to: half });
    match hub_error(get(NAME, &options)) {
        HubError::Truncated { file, expected, found, .. } => {
            assert_eq!((file.as_str(), expected, found), ("model.safetensors", full as u64, half as u64));
        }
        other => panic!("{other}"),
    }
    let blobs = names(&cache.path().join("hub/models--org--stories/blobs"));
    assert!(!blobs.contains(&server.etag("model.safetensors")), "{blobs:?}");
    assert!(hub_error(get(NAME, &HubOptions { offline: true, ..options.clone() })).to_string().contains("offline"));
    server.fault(Fault::None);
    assert_same_files(&server, &get(NAME, &options).expect("goes on").dir);
}

#[test]
fn a_damaged_blob_of_the_cache_is_fetched_again() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let options = options(&server, cache.path());
    let found = get(NAME, &options).expect("downloads");
    let blob = cache.path().join("hub/models--org--stories/blobs").join(server.etag("model.safetensors"));
    fs::remove_file(found.dir.join("model.safetensors")).expect("removes");
    fs::write(&blob, b"half").expect("writes");
    assert_same_files(&server, &get(NAME, &options).expect("downloads again").dir);
}

#[test]
fn gated_models_name_the_page_and_the_token() {
    for (status, token) in [(401, None), (403, Some("hf_x".to_string()))] {
        let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
        server.fault(Fault::Gated { status });
        let error = hub_error(get(NAME, &HubOptions { token: token.clone(), ..options(&server, cache.path()) }));
        assert!(matches!(&error, HubError::Gated { status: s, .. } if *s == status), "{error}");
        let text = error.to_string();
        assert!(text.contains(&format!("{}/{NAME}", server.endpoint())) && text.contains("HF_TOKEN"), "{text}");
        assert_eq!(server.saw_token(), token.is_some());
    }
}

#[test]
fn a_private_or_unknown_repository_says_both() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    server.fault(Fault::Private);
    let error = hub_error(get(NAME, &options(&server, cache.path())));
    assert!(matches!(error, HubError::Private { status: 401, .. }), "{error}");
    assert!(error.to_string().contains("does not exist or is private"));
}

#[test]
fn absent_repository_revision_and_file() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let options = options(&server, cache.path());
    for model in ["org/other", "org/stories@nowhere"] {
        let error = hub_error(get(model, &options));
        assert!(matches!(error, HubError::NotFound { .. }), "{error}");
    }
    server.hide("model.safetensors");
    let error = hub_error(get(NAME, &options));
    assert!(matches!(error, HubError::MissingFile { .. }), "{error}");
    assert!(error.to_string().contains("config.json"), "lists what is there: {error}");
    assert!(!cache.path().join("hub/models--org--stories").exists(), "nothing was begun");
}

#[test]
fn revisions_share_blobs() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let options = options(&server, cache.path());
    get(NAME, &options).expect("downloads");
    let before = server.contents_sent();
    let tag = get("org/stories@v1", &options).expect("links");
    assert_eq!(tag.commit.as_deref(), Some(OTHER_COMMIT));
    assert_eq!(server.contents_sent(), before, "the blobs were there");
    assert_same_files(&server, &tag.dir);
    let pinned = get(&format!("org/stories@{COMMIT}"), &HubOptions { offline: true, ..options }).expect("by commit, offline");
    assert!(pinned.dir.ends_with(COMMIT));
}

#[test]
fn offline_hit_and_miss_open_no_connection() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let online = options(&server, cache.path());
    let offline = HubOptions { offline: true, ..online.clone() };
    let error = hub_error(get(NAME, &offline));
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
    assert!(error.to_string().contains("terrarium download org/stories@main"), "{error}");
    assert_eq!(server.requests(), 0);

    let there = get(NAME, &online).expect("downloads");
    let before = server.requests();
    assert_eq!(get(NAME, &offline).expect("hit").dir, there.dir);
    fs::remove_file(there.dir.join("model.safetensors")).expect("removes");
    let error = hub_error(get(NAME, &offline)).to_string();
    assert!(error.contains("missing model.safetensors"), "{error}");
    assert_eq!(server.requests(), before);
}

#[test]
fn without_a_network_a_complete_cache_is_used_and_said_so() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let online = options(&server, cache.path());
    get(NAME, &online).expect("downloads");
    // Nothing listens on port 9 of a loopback address.
    let down = HubOptions { endpoint: "http://127.0.0.1:9".into(), retries: 0, ..online };
    let found = get(NAME, &down).expect("the cache");
    assert!(found.notes[0].contains("using the copy"), "{:?}", found.notes);
    assert!(matches!(hub_error(get("org/other", &down)), HubError::Network { .. }));
}

#[test]
fn hostile_answers_cannot_leave_the_cache() {
    let cases = [Fault::Etag("../../../../evil".into()), Fault::Etag("".into()), Fault::Commit("../../x".into()), Fault::Html];
    for fault in cases {
        let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
        server.fault(fault.clone());
        let error = hub_error(get(NAME, &options(&server, cache.path())));
        assert!(matches!(error, HubError::Protocol { .. }), "{fault:?}: {error}");
    }
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    server.hide("model.safetensors");
    server.add("model.safetensors.index.json", br#"{"weight_map": {"w": "../../../x.safetensors"}}"#);
    let error = get(NAME, &options(&server, cache.path())).expect_err("refused").to_string();
    assert!(error.contains("leads out of the model's directory"), "{error}");
}

#[test]
fn weak_tags_of_a_proxy_are_taken() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    // One tag for all files would make them one blob: leave one.
    server.hide("tokenizer.json");
    server.hide("config.json");
    server.add("config.json", &server.content("model.safetensors"));
    server.fault(Fault::Etag("W/abc".into()));
    let options = options(&server, cache.path());
    for model in [NAME, "org/stories@v1"] {
        assert_same_files(&server, &get(model, &options).expect("downloads, then links").dir);
    }
}

#[test]
fn shards_are_fetched_by_the_index() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    server.hide("model.safetensors");
    server.add("model.safetensors.index.json", br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#);
    server.add("model-1.safetensors", b"first");
    server.add("model-2.safetensors", b"second");
    let found = get(NAME, &options(&server, cache.path())).expect("downloads");
    assert_eq!(fs::read(found.dir.join("model-2.safetensors")).expect("there"), b"second");
}

#[test]
fn pickled_weights_are_fetched_where_there_are_no_others() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    server.add("pytorch_model.bin", b"pickled");
    let options = options(&server, cache.path());
    assert!(!get(NAME, &options).expect("downloads").dir.join("pytorch_model.bin").exists(), "safetensors come first");

    server.hide("model.safetensors");
    let cache = tempfile::tempdir().expect("temp");
    let fresh = HubOptions { cache: cache.path().join("hub"), ..options.clone() };
    let found = get(NAME, &fresh).expect("downloads");
    assert_same_files(&server, &found.dir);
    let offline = HubOptions { offline: true, ..fresh };
    assert_eq!(get(NAME, &offline).expect("hit").dir, found.dir);
    fs::remove_file(found.dir.join("pytorch_model.bin")).expect("removes");
    hub_error(get(NAME, &offline));

    server.hide("pytorch_model.bin");
    server.add("pytorch_model.bin.index.json", br#"{"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}"#);
    server.add("pytorch_model-1.bin", b"first");
    server.add("pytorch_model-2.bin", b"second");
    let cache = tempfile::tempdir().expect("temp");
    let fresh = HubOptions { cache: cache.path().join("hub"), ..options.clone() };
    let small = resolve(NAME, Files::Metadata, &fresh, &mut ()).expect("downloads");
    assert!(small.dir.join("pytorch_model.bin.index.json").exists() && !small.dir.join("pytorch_model-1.bin").exists());
    let error = hub_error(get(NAME, &HubOptions { offline: true, ..fresh.clone() })).to_string();
    assert!(error.contains("pytorch_model-1.bin, pytorch_model-2.bin"), "{error}");
    assert_same_files(&server, &get(NAME, &fresh).expect("completes").dir);

    for name in ["pytorch_model.bin.index.json", "pytorch_model-1.bin", "pytorch_model-2.bin", "config.json"] {
        server.hide(name);
    }
    server.add("params.json", b"{}");
    server.add("consolidated.safetensors", b"weights");
    let cache = tempfile::tempdir().expect("temp");
    let fresh = HubOptions { cache: cache.path().join("hub"), ..options };
    assert_same_files(&server, &get(NAME, &fresh).expect("downloads").dir);
}

#[test]
fn megatron_folders_keep_their_folders() {
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    for name in server.files() {
        server.hide(&name);
    }
    let ranks = ["release/mp_rank_00/model_optim_rng.pt", "release/mp_rank_01/model_optim_rng.pt"];
    server.add("latest_checkpointed_iteration.txt", b"release\n");
    server.add("mt_nlg.model", b"tokens");
    for (i, rank) in ranks.iter().enumerate() {
        server.add(rank, format!("rank {i}").as_bytes());
    }
    let options = options(&server, cache.path());
    let small = resolve(NAME, Files::Metadata, &options, &mut ()).expect("downloads");
    assert_eq!(names(&small.dir), ["latest_checkpointed_iteration.txt", "mt_nlg.model"]);
    let offline = HubOptions { offline: true, ..options.clone() };
    let error = hub_error(get(NAME, &offline)).to_string();
    assert!(error.contains("mp_rank_*"), "{error}");

    let found = get(NAME, &options).expect("downloads");
    assert_same_files(&server, &found.dir);
    assert!(fs::read_link(found.dir.join(ranks[1])).expect("a link").starts_with("../../../../blobs"));
    assert_eq!(get(NAME, &offline).expect("hit").dir, found.dir);
    // Another commit with the same files links them, folders and all.
    let before = server.contents_sent();
    assert_same_files(&server, &get("org/stories@v1", &options).expect("links").dir);
    assert_eq!(server.contents_sent(), before);

    // Files of other iterations stay where they are; an iteration without ranks is an error that lists what there is.
    server.add("iter_0000010/mp_rank_00/model_optim_rng.pt", b"older");
    let cache = tempfile::tempdir().expect("temp");
    let fresh = HubOptions { cache: cache.path().join("hub"), ..options.clone() };
    assert!(!get(NAME, &fresh).expect("downloads").dir.join("iter_0000010").exists());
    server.add("latest_checkpointed_iteration.txt", b"12");
    let cache = tempfile::tempdir().expect("temp");
    let error = hub_error(get(NAME, &HubOptions { cache: cache.path().join("hub"), ..options }));
    assert!(matches!(&error, HubError::MissingFile { .. }) && error.to_string().contains("mp_rank_*"), "{error}");
}

#[test]
fn directories_of_every_layout_are_taken_as_they_are() {
    let temp = tempfile::tempdir().expect("temp");
    let options = HubOptions { cache: temp.path().into(), endpoint: "http://127.0.0.1:9".into(), token: None, offline: false, retries: 0 };
    for file in ["config.json", "params.json", "adapter_config.json", "latest_checkpointed_iteration.txt", "mp_rank_00/model_optim_rng.pt"]
    {
        let dir = tempfile::tempdir().expect("temp");
        let path = dir.path().join(file);
        fs::create_dir_all(path.parent().expect("inside")).expect("creates");
        fs::write(path, "release").expect("writes");
        assert_eq!(get(&dir.path().to_string_lossy(), &options).expect("taken").dir, dir.path(), "{file}");
    }
}

#[test]
fn names_that_are_neither_directory_nor_model_are_refused() {
    let temp = tempfile::tempdir().expect("temp");
    let options = HubOptions { cache: temp.path().into(), endpoint: "http://127.0.0.1:9".into(), token: None, offline: false, retries: 0 };
    for name in ["nosuchdir", "a/b/c", "../x", "org/na me", "org/name@../../x", "org/name@", ""] {
        let error = hub_error(get(name, &options));
        assert!(matches!(error, HubError::Name { .. }), "{name}: {error}");
    }
    let empty = temp.path().join("empty");
    fs::create_dir(&empty).expect("creates");
    let error = hub_error(get(&empty.to_string_lossy(), &options));
    assert!(matches!(error, HubError::Directory { .. }), "{error}");
}

#[test]
fn progress_counts_every_byte_once() {
    #[derive(Default)]
    struct Count {
        expected: u64,
        seen: u64,
        files: usize,
    }
    impl terrarium_runtime::Progress for Count {
        fn start(&mut self, _file: &str, bytes: u64) {
            self.expected += bytes;
        }
        fn advance(&mut self, bytes: u64) {
            self.seen += bytes;
        }
        fn finish(&mut self, _file: &str) {
            self.files += 1;
        }
    }
    let (server, cache) = (HubServer::start(), tempfile::tempdir().expect("temp"));
    let mut count = Count::default();
    resolve(NAME, Files::All, &options(&server, cache.path()), &mut count).expect("downloads");
    assert_eq!(count.files, server.files().len());
    assert_eq!(count.seen, count.expected);
}

#[test]
fn environment_variables_mean_what_they_mean_in_python() {
    let read = |pairs: &[(&str, &str)]| {
        let pairs: Vec<_> = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        HubOptions::from_vars(&|name| pairs.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
    };
    let temp = tempfile::tempdir().expect("temp");
    fs::write(temp.path().join("token"), "hf_file\n").expect("writes");
    fs::write(temp.path().join("other"), "hf_other").expect("writes");
    let (home, other) = (temp.path().to_string_lossy(), temp.path().join("other"));
    assert_eq!(read(&[("HF_HOME", &home)]).cache, temp.path().join("hub"));
    assert_eq!(read(&[("HF_HOME", &home)]).token.as_deref(), Some("hf_file"));
    assert_eq!(read(&[("HF_HOME", &home), ("HF_TOKEN", "hf_env")]).token.as_deref(), Some("hf_env"));
    assert_eq!(read(&[("HF_HOME", &home), ("HF_TOKEN_PATH", &other.to_string_lossy())]).token.as_deref(), Some("hf_other"));
    assert_eq!(read(&[("XDG_CACHE_HOME", "/x")]).cache, Path::new("/x/huggingface/hub"));
    assert_eq!(read(&[("HF_HOME", &home), ("HF_HUB_CACHE", "/y")]).cache, Path::new("/y"));
    assert_eq!(read(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror");
    assert_eq!(read(&[]).endpoint, "https://huggingface.co");
    assert!(read(&[("HF_HUB_OFFLINE", "1")]).offline && read(&[("TRANSFORMERS_OFFLINE", "true")]).offline);
    assert!(!read(&[("HF_HUB_OFFLINE", "0")]).offline);
    assert!(!format!("{:?}", read(&[("HF_TOKEN", "hf_secret")])).contains("hf_secret"));
}

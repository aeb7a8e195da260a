//! Data sets of the hub: which files a split is, and fetching them, against the loopback server.

mod common;
mod server;

use std::fs;
use std::path::Path;

use server::{COMMIT, Fault, HubServer, OTHER_COMMIT};
use terrarium_runtime::{DataSet, Error, HubError, HubOptions, Result, SplitFiles};

const NAME: &str = "org/stories";

/// Serves the files alone.
fn serving(files: &[&str]) -> HubServer {
    let server = HubServer::start();
    for name in server.files() {
        server.hide(&name);
    }
    for name in files {
        server.add(name, name.as_bytes());
    }
    server
}

const CONVERTED: [&str; 5] =
    [".gitattributes", "easy/test/0000.parquet", "easy/test/0001.parquet", "easy/train/0000.parquet", "hard/test/0000.parquet"];

fn options(server: &HubServer, cache: &Path) -> HubOptions {
    HubOptions { cache: cache.join("hub"), endpoint: server.endpoint(), token: None, offline: false, retries: 0 }
}

fn split(options: &HubOptions, config: Option<&str>, split: &str) -> Result<SplitFiles> {
    DataSet::hub(NAME, options)?.split(config, split, &mut ())
}

fn hub_error(result: Result<SplitFiles>) -> HubError {
    match result {
        Err(Error::Hub(error)) => error,
        other => panic!("expected an error of the hub, found {other:?}"),
    }
}

fn contents(found: &SplitFiles) -> Vec<String> {
    found.paths.iter().map(|path| fs::read_to_string(path).expect("fetched")).collect()
}

#[test]
fn a_split_is_fetched_into_the_shared_cache_and_nothing_beside_it() {
    let (server, cache) = (serving(&CONVERTED), tempfile::tempdir().expect("temp"));
    let options = options(&server, cache.path());
    let mut set = DataSet::hub(NAME, &options).expect("a name");
    assert_eq!(server.requests(), 0, "nothing is asked before a split is");
    let found = set.split(Some("easy"), "test", &mut ()).expect("downloads");
    assert_eq!(contents(&found), CONVERTED[1..3]);
    assert_eq!((found.config.as_str(), found.commit.as_deref()), ("easy", Some(OTHER_COMMIT)));
    let repo = cache.path().join("hub/datasets--org--stories");
    assert_eq!(found.paths[0], repo.join("snapshots").join(OTHER_COMMIT).join(CONVERTED[1]));
    assert!(fs::read_link(&found.paths[0]).expect("a link").starts_with("../../../../blobs"));
    assert_eq!(fs::read_to_string(repo.join("refs/refs/convert/parquet")).expect("ref"), OTHER_COMMIT);
    assert_eq!(fs::read_dir(repo.join("blobs")).expect("a folder").count(), 2, "the two shards, no parts or locks");
    assert!(!cache.path().join("hub/models--org--stories").exists());

    // The same listing serves the next split, and what is there is not fetched again.
    let before = (server.requests(), server.contents_sent());
    assert_eq!(set.split(Some("easy"), "test", &mut ()).expect("cached"), found);
    assert_eq!((server.requests(), server.contents_sent()), before);
    assert_eq!(contents(&set.split(Some("hard"), "test", &mut ()).expect("downloads")), CONVERTED[4..]);
}

#[test]
fn main_is_asked_where_nothing_was_converted_or_a_split_is_missing() {
    let (server, cache) = (serving(&["easy/test-00000-of-00001.parquet", "script.py"]), tempfile::tempdir().expect("temp"));
    server.unconverted();
    let options = options(&server, cache.path());
    let found = split(&options, Some("easy"), "test").expect("downloads");
    assert_eq!((contents(&found), found.commit.as_deref()), (vec!["easy/test-00000-of-00001.parquet".to_string()], Some(COMMIT)));
    assert!(!cache.path().join("hub/datasets--org--stories/snapshots").join(COMMIT).join("script.py").exists());

    let lines = serving(&["data/stories_test.jsonl", "data/stories_test_de.jsonl"]);
    let cache = tempfile::tempdir().expect("temp");
    let found = split(&HubOptions { cache: cache.path().into(), endpoint: lines.endpoint(), ..options }, None, "test").expect("downloads");
    assert_eq!(contents(&found), ["data/stories_test.jsonl"]);
}

#[test]
fn what_is_not_there_is_told_with_what_is() {
    let (server, cache) = (serving(&CONVERTED), tempfile::tempdir().expect("temp"));
    let options = options(&server, cache.path());
    for (config, name) in [(Some("easy"), "validation"), (Some("soft"), "test"), (None, "test")] {
        let error = hub_error(split(&options, config, name));
        assert!(matches!(error, HubError::NoSplit { .. }), "{error}");
        let text = error.to_string();
        for word in ["refs/convert/parquet and main", "easy (test, train), hard (test)", &format!("{}/{name}", config.unwrap_or("default"))]
        {
            assert!(text.contains(word), "{text}");
        }
    }
    let absent = hub_error(DataSet::hub("org/other", &options).expect("a name").split(None, "test", &mut ()));
    assert!(matches!(&absent, HubError::NotFound { page, .. } if page.ends_with("/datasets/org/other")), "{absent}");
    assert!(matches!(DataSet::hub("no-slash", &options), Err(Error::Hub(HubError::Name { .. }))));
    assert!(!cache.path().join("hub").exists(), "nothing was begun");
}

#[test]
fn gated_and_private_data_sets_name_their_page_and_the_token() {
    for (fault, status) in [(Fault::Gated { status: 401 }, 401), (Fault::Gated { status: 403 }, 403), (Fault::Private, 401)] {
        let (server, cache) = (serving(&CONVERTED), tempfile::tempdir().expect("temp"));
        server.fault(fault.clone());
        let text = hub_error(split(&options(&server, cache.path()), Some("easy"), "test")).to_string();
        for word in [&format!("{}/datasets/{NAME}", server.endpoint()), "HF_TOKEN", &status.to_string()] {
            assert!(text.contains(word), "{fault:?}: {text}");
        }
    }
}

#[test]
fn the_cache_serves_offline_and_without_a_network() {
    let (server, cache) = (serving(&CONVERTED), tempfile::tempdir().expect("temp"));
    let online = options(&server, cache.path());
    let offline = HubOptions { offline: true, ..online.clone() };
    let error = hub_error(split(&offline, Some("easy"), "test"));
    assert!(matches!(&error, HubError::OfflineSplit { .. }) && error.to_string().contains("easy/test"), "{error}");
    assert_eq!(server.requests(), 0);
    let there = split(&online, Some("easy"), "test").expect("downloads");
    let before = server.requests();
    assert_eq!(split(&offline, Some("easy"), "test").expect("hit"), there);
    assert!(matches!(hub_error(split(&offline, Some("easy"), "train")), HubError::OfflineSplit { .. }));
    // The first shard is fetched last: without it a split is not there.
    fs::remove_file(&there.paths[0]).expect("removes");
    assert!(matches!(hub_error(split(&offline, Some("easy"), "test")), HubError::OfflineSplit { .. }));
    assert_eq!(server.requests(), before);
    assert_eq!(split(&online, Some("easy"), "test").expect("links again"), there);

    #[derive(Default)]
    struct Notes(Vec<String>);
    impl terrarium_runtime::Progress for Notes {
        fn start(&mut self, _file: &str, _bytes: u64) {}
        fn advance(&mut self, _bytes: u64) {}
        fn finish(&mut self, _file: &str) {}
        fn note(&mut self, text: &str) {
            self.0.push(text.to_string());
        }
    }
    // Nothing listens on port 9 of a loopback address.
    let down = HubOptions { endpoint: "http://127.0.0.1:9".into(), ..online };
    let (mut set, mut notes) = (DataSet::hub(NAME, &down).expect("a name"), Notes::default());
    for _ in 0..2 {
        assert_eq!(set.split(Some("easy"), "test", &mut notes).expect("the cache"), there);
    }
    assert!(notes.0.len() == 1 && notes.0[0].contains("using the copy"), "{:?}", notes.0);
    assert!(matches!(hub_error(split(&down, Some("easy"), "train")), HubError::Network { .. }));
}

#[test]
fn a_cut_download_leaves_no_split() {
    let (server, cache) = (serving(&CONVERTED), tempfile::tempdir().expect("temp"));
    let options = options(&server, cache.path());
    server.fault(Fault::CutAlways { after: 5 });
    assert!(matches!(hub_error(split(&options, Some("easy"), "test")), HubError::Network { .. }));
    let repo = cache.path().join("hub/datasets--org--stories");
    assert!(!repo.join("refs/refs").exists() && !repo.join("snapshots").join(OTHER_COMMIT).join(CONVERTED[1]).exists());
    server.fault(Fault::None);
    assert_eq!(contents(&split(&options, Some("easy"), "test").expect("goes on")), CONVERTED[1..3]);
}

#[test]
fn a_folder_is_read_as_the_repository_it_is_a_copy_of() {
    let dir = tempfile::tempdir().expect("temp");
    fs::create_dir_all(dir.path().join("easy")).expect("creates");
    fs::write(dir.path().join("easy/test-00000-of-00001.parquet"), "x").expect("writes");
    let mut set = DataSet::folder(dir.path());
    let found = set.split(None, "test", &mut ()).expect("there");
    assert_eq!((found.paths.len(), found.config.as_str(), found.commit), (1, "easy", None));
    let error = hub_error(set.split(Some("easy"), "train", &mut ())).to_string();
    assert!(error.contains("easy (test)") && error.contains(&dir.path().display().to_string()), "{error}");
}

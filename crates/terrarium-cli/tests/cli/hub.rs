//! No network, no cache.

use tempfile::TempDir;

use crate::common::{Ran, terrarium};

fn with_cache(arguments: &[&str], endpoint: &str) -> (TempDir, Ran) {
    let cache = TempDir::new().unwrap();
    let ran = terrarium(arguments).env("HF_HOME", cache.path()).env("HF_ENDPOINT", endpoint).output().unwrap().into();
    (cache, ran)
}

/// A port that was free a moment ago, with nobody listening.
fn closed_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

#[test]
fn without_a_network_the_server_is_named() {
    let endpoint = closed_port();
    let (_cache, ran) = with_cache(&["download", "some/model"], &endpoint);
    ran.fails(1, &[&endpoint, "some/model"]);
    let (_cache, ran) = with_cache(&["generate", "--model", "some/model", "--prompt", "a"], &endpoint);
    ran.fails(1, &[&endpoint]);
}

#[test]
fn offline_without_a_copy_says_how_to_get_one() {
    let (cache, ran) = with_cache(&["inspect", "some/model@v2", "--offline"], "http://127.0.0.1:9");
    ran.fails(1, &["offline", "some/model@v2", "terrarium download", cache.path().to_str().unwrap()]);
    let cache = TempDir::new().unwrap();
    let output = terrarium(&["score", "--model", "some/model", "--input", "/dev/null"])
        .env("HF_HOME", cache.path())
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    assert!(!output.status.success());
}

#[test]
fn names_that_cannot_be_are_told_apart_from_models_that_are_not_there() {
    let (_cache, ran) = with_cache(&["download", "just-a-name"], "http://127.0.0.1:9");
    ran.fails(1, &["just-a-name", "org/name"]);
}

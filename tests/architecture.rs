//! The shape of the house: imports run one way, references judge alone.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push((path.clone(), std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(folder), &mut found);
    assert!(!found.is_empty(), "{folder} has no sources");
    found
}

/// Packages from the bottom up: each may use those before it.
const ORDER: [&str; 6] = ["terrarium-kernels", "terrarium-models", "terrarium-runtime", "terrarium-train", "terrarium", "terrarium-cli"];

#[test]
fn packages_depend_only_on_those_below() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rank = |name: &str| ORDER.iter().position(|known| *known == name);
    let mut seen = 0;
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let own = rank(name).unwrap_or_else(|| panic!("{name} has no place in the order"));
        seen += 1;
        for dependency in package["dependencies"].as_array().unwrap() {
            let used = dependency["name"].as_str().unwrap();
            if let Some(used_rank) = rank(used) {
                assert!(used_rank < own, "{name} depends on {used}, which stands above it");
            }
        }
    }
    assert_eq!(seen, ORDER.len());
}

#[test]
fn only_kernels_name_cubecl() {
    for folder in ["models/src", "crates"] {
        for (path, text) in sources(folder) {
            assert!(!text.contains("cubecl"), "{} names CubeCL", path.display());
        }
    }
}

#[test]
fn references_use_no_fast_path() {
    let references: Vec<_> = sources("kernels/src").into_iter().filter(|(path, _)| path.ends_with("reference.rs")).collect();
    assert_eq!(references.len(), 6);
    for (path, text) in references {
        for word in ["cpu::", "KernelBackend", "backward", "rayon", "pulp"] {
            assert!(!text.contains(word), "{} mentions {word}", path.display());
        }
    }
}

#[test]
fn models_touch_no_files_network_or_terminal() {
    for (path, text) in sources("models/src") {
        for word in ["std::fs", "std::net", "std::io", "println!", "eprintln!"] {
            assert!(!text.contains(word), "{} mentions {word}", path.display());
        }
    }
}

#[test]
fn families_and_mixers_keep_to_themselves() {
    for (path, text) in sources("models/src/mixers") {
        assert!(!text.contains("families"), "{} imports a family", path.display());
    }
    for (path, text) in sources("models/src/families") {
        if path.ends_with("families/mod.rs") {
            continue;
        }
        for other in ["families::mamba2", "families::transformer", "families::hybrid"] {
            assert!(!text.contains(other), "{} imports another family", path.display());
        }
    }
}

/// What may stand outside the backend module: leaving CPU files out of builds without a CPU backend.
const CPU_FILES: &str = "#[cfg(any(feature = \"flex\", feature = \"ndarray\"))]";

#[test]
fn features_are_chosen_in_one_module() {
    for folder in ["kernels/src", "models/src", "crates", "examples"] {
        for (path, text) in sources(folder) {
            let name = path.to_string_lossy();
            if name.contains("kernels/src/backend") || name.contains("kernels/src/cpu") {
                continue;
            }
            let mut lines = text.lines().peekable();
            while let Some(line) = lines.next() {
                let chosen = ["cfg(feature", "cfg(any(feature", "cfg(all(feature", "cfg!(feature"].iter().any(|word| line.contains(word));
                let module = lines.peek().is_some_and(|next| next.ends_with(';') && next.contains("mod "));
                assert!(!chosen || (line.trim() == CPU_FILES && module), "{name} chooses by feature: {line}");
            }
        }
    }
}

#[test]
fn examples_are_short_and_use_the_facade() {
    let examples = sources("examples");
    assert!(examples.len() >= 4);
    for (path, text) in examples {
        assert!(text.lines().count() <= 150, "{} is too long", path.display());
        for word in ["terrarium_kernels", "terrarium_models", "terrarium_runtime", "terrarium_train"] {
            assert!(!text.contains(word), "{} goes around the facade", path.display());
        }
    }
}

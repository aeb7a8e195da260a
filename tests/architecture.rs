//! The shape of the house: imports run one way, references judge alone.

use std::path::{Path, PathBuf};
use std::process::Command;

use terrarium::models::families::fields::COMMON_KEYS;
use terrarium::models::presets::presets;
use terrarium::models::{self, DecoderConfig};

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
const ORDER: [&str; 7] =
    ["terrarium-kernels", "terrarium-models", "terrarium-runtime", "terrarium-train", "terrarium-eval", "terrarium", "terrarium-cli"];

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
    assert!(references.len() >= 6, "{} references", references.len());
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

/// Folders of families, and the type of each.
fn families() -> Vec<(String, String)> {
    let folder = root().join("models/src/families");
    let mut found: Vec<(String, String)> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .map(|path| {
            let text = std::fs::read_to_string(path.join("mod.rs")).unwrap();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let implemented = text.split_once("impl Family for ").and_then(|(_, rest)| rest.split_once(' '));
            (name.clone(), implemented.unwrap_or_else(|| panic!("{name}/mod.rs implements no Family")).0.to_string())
        })
        .collect();
    found.sort();
    assert!(found.len() >= 10);
    found
}

/// The text without comments, and without what follows `#[cfg(test)]`.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap();
    text.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code)).collect::<Vec<_>>().join("\n")
}

/// What follows each whole `path` in the text that does not stand behind `mixers::`.
fn behind<'a>(text: &'a str, path: &str) -> Vec<&'a str> {
    let inside = |c: char| c.is_alphanumeric() || c == '_';
    let parts = text.match_indices(path).map(|(at, _)| (&text[..at], &text[at + path.len()..]));
    let whole = parts.filter(|(before, after)| !before.ends_with(inside) && !before.ends_with("mixers::") && !after.starts_with(inside));
    whole.map(|(_, after)| after).collect()
}

/// Where code outside a family names it, and why.
const NAMED: [(&str, &str); 1] = [
    // A Python package, whose classes stand in PyTorch files.
    ("terrarium-runtime/src/pickle/allow.rs", "\"megatron\""),
];

#[test]
fn families_are_named_in_their_folder_and_in_the_registry_alone() {
    let known = |path: &Path, what: &str| NAMED.iter().any(|(file, named)| path.ends_with(file) && what.contains(named));
    let sources: Vec<_> = ["kernels/src", "models/src", "crates", "examples"].into_iter().flat_map(sources).collect();
    for (folder, _) in families() {
        let own = format!("families/{folder}/");
        for (path, text) in &sources {
            let name = path.to_string_lossy();
            if name.contains(&own) || path.ends_with("families/mod.rs") || name.contains("/tests/") {
                continue;
            }
            let text = code(text).split_whitespace().collect::<Vec<_>>().join(" ");
            let used = format!("families::{folder}");
            let grouped = text.split("families::{").skip(1).any(|rest| {
                let group = rest.split('}').next().unwrap();
                group.split(',').any(|item| item.trim().split("::").next() == Some(folder.as_str()))
            });
            let beside = name.contains("models/src/families/") && behind(&text, &folder).iter().any(|after| after.starts_with("::"));
            let other = !behind(&text, &used).is_empty() || grouped || beside;
            assert!(!other || known(path, &used), "{name} imports the family {folder}");
            // Other families say `"mamba"` of layers.
            let quoted = format!("\"{folder}\"");
            let outside = !name.contains("models/src/families/") && !name.contains("/examples/") && text.contains(&quoted);
            assert!(!outside || known(path, &quoted), "{name} decides by the name of the family {folder}");
            assert!(!text.contains("families::*"), "{name} imports all families");
        }
    }
}

#[test]
fn every_family_is_registered() {
    let registry = std::fs::read_to_string(root().join("models/src/families/mod.rs")).unwrap();
    for (folder, kind) in families() {
        assert!(!registry.contains(&format!("use {folder}::")), "families/mod.rs gives {kind} another path");
        for line in [format!("pub mod {folder};"), format!("&{folder}::{kind},")] {
            assert!(registry.contains(&line), "families/mod.rs lacks `{line}`");
        }
    }
}

/// Every configuration at hand in every layout that can hold it: presets and fixtures.
fn configs() -> Vec<DecoderConfig> {
    let fixtures = std::fs::read_dir(root().join("tests/fixtures")).unwrap().map(|entry| entry.unwrap().path().join("config.json"));
    let texts = fixtures.filter_map(|path| std::fs::read_to_string(path).ok());
    let read = texts.map(|text| DecoderConfig::from_json(&text).unwrap());
    let all: Vec<DecoderConfig> = read.chain(presets().iter().map(|preset| preset.decoder().unwrap())).collect();
    all.iter().flat_map(|config| models::families::families().iter().filter_map(|family| config.in_family(*family).ok())).collect()
}

/// The key without the number of its layer: what stands in a table of tensors.
fn in_tables(key: &str) -> String {
    let layer = key.split_once("layers.").and_then(|(_, rest)| rest.split_once('.'));
    let numbered = layer.filter(|(number, _)| number.parse::<usize>().is_ok());
    format!("`{}`", numbered.map_or(key, |(_, name)| name))
}

#[test]
fn the_page_of_a_family_names_its_keys_tensors_and_presets() {
    let configs = configs();
    for (folder, _) in families() {
        let path = root().join("models/src/families").join(&folder);
        let code = std::fs::read_to_string(path.join("mod.rs")).unwrap();
        assert!(code.starts_with("#![doc = include_str!(\"README.md\")]"), "{folder}/mod.rs does not begin with its page");
        let name = code.split_once("fn name(").and_then(|(_, rest)| rest.split('"').nth(1)).unwrap();
        let page = std::fs::read_to_string(path.join("README.md")).unwrap_or_else(|error| panic!("{folder}/README.md: {error}"));
        let family = models::families::by_name(name).unwrap();
        let keys = family.keys().into_iter().filter(|key| !COMMON_KEYS.contains(key)).map(|key| format!("`{key}`"));
        let entries = configs.iter().filter(|config| config.family == family).flat_map(|config| config.table().entries);
        let tensors = entries.flat_map(|entry| entry.keys().map(in_tables).collect::<Vec<_>>());
        let named = family.presets().into_iter().map(|preset| format!("`{}`", preset.name));
        let sizes: Vec<usize> = family.presets().iter().map(|preset| preset.parameters).collect();
        let sizes = sizes.iter().map(|size| grouped(*size));
        let mut missing: Vec<String> = keys.chain(tensors).chain(named).chain(sizes).filter(|word| !page.contains(word)).collect();
        missing.sort();
        missing.dedup();
        assert!(missing.is_empty(), "{folder}/README.md lacks {missing:?}");
        assert!(page.contains("## Known bugs of the references, and what we do"), "{folder}/README.md lacks the bugs");
    }
}

/// Digits in groups of three.
fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap()).collect();
    groups.join(",")
}

#[test]
fn mixers_know_no_family() {
    for (path, text) in sources("models/src/mixers") {
        assert!(!code(&text).contains("families"), "{} imports a family", path.display());
    }
}

/// What may stand outside the backend module: leaving CPU files out of builds without a CPU backend.
const CPU_FILES: &str = "#[cfg(any(feature = \"flex\", feature = \"ndarray\"))]";

/// Likewise for GPU code, in the kernels.
const CUBE_CODE: &str = "#[cfg(feature = \"_cube\")]";

/// And for the libraries that only CUDA has, in what the GPU paths share.
const CUDA_CODE: [&str; 2] = ["#[cfg(feature = \"cuda\")]", "#[cfg(not(feature = \"cuda\"))]"];

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
                let left_out = line.trim() == CPU_FILES && module
                    || line.trim() == CUBE_CODE && name.contains("kernels/src")
                    || CUDA_CODE.contains(&line.trim()) && name.contains("kernels/src/cube/");
                assert!(!chosen || left_out, "{name} chooses by feature: {line}");
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
        for word in ["terrarium_kernels", "terrarium_models", "terrarium_runtime", "terrarium_train", "terrarium_eval"] {
            assert!(!text.contains(word), "{} goes around the facade", path.display());
        }
    }
}

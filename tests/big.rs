//! A checkpoint larger than memory: opened from its header, read one layer at a time. The file is sparse.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, json};
use terrarium::burn::tensor::DType;
use terrarium::models::DecoderConfig;
use terrarium::runtime::{Checkpoint, LoadOptions, Precision, load, load_layer};

use crate::common::*;

/// 4.1 billion parameters.
const LARGE: &str = r#"{"model_type":"llama","vocab_size":32000,"hidden_size":4096,"num_hidden_layers":22,"num_attention_heads":32,
    "num_key_value_heads":8,"intermediate_size":11008,"tie_word_embeddings":false}"#;

/// 0.1 billion parameters.
const SMALL: &str = r#"{"model_type":"mamba2","vocab_size":16000,"hidden_size":1024,"num_hidden_layers":12,"num_heads":32,"n_groups":1,
    "tie_word_embeddings":true}"#;

/// A header as the configuration asks for, and behind it a hole. Returns the length of the file.
fn write_sparse(dir: &Path, config: &str, dtype: &str, size: u64) -> u64 {
    std::fs::write(dir.join("config.json"), config).unwrap();
    let mut header = Map::new();
    let mut offset = 0u64;
    for entry in DecoderConfig::from_json(config).unwrap().table().entries {
        let end = offset + size * entry.len() as u64;
        header.insert(entry.key, json!({ "dtype": dtype, "shape": entry.shape, "data_offsets": [offset, end] }));
        offset = end;
    }
    let text = serde_json::to_vec(&header).unwrap();
    let mut file = File::create(dir.join("model.safetensors")).unwrap();
    file.write_all(&(text.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&text).unwrap();
    let length = 8 + text.len() as u64 + offset;
    file.seek(SeekFrom::Start(length - 1)).unwrap();
    file.write_all(&[0]).unwrap();
    length
}

/// Peak of this process's resident memory since the last call, where the system tells.
fn peak() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    std::fs::write("/proc/self/clear_refs", "5").ok()?;
    Some(kilobytes * 1024)
}

#[test]
fn sixteen_gigabytes_open_at_once_and_give_one_layer() {
    let dir = tempfile::tempdir().unwrap();
    let length = write_sparse(dir.path(), LARGE, "F32", 4);
    assert!(length > 16_000_000_000, "{length}");
    peak();
    let before = peak();
    let start = Instant::now();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.check().unwrap();
    let took = start.elapsed();
    println!("opened and checked {length} bytes in {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    let opened = peak();

    // Layer 37 is an MLP: three matrices of 4096 by 11008.
    let start = Instant::now();
    let layer = load_layer::<B>(&checkpoint, 37, DType::F32, &device()).unwrap();
    let took = start.elapsed();
    let bytes = 4 * (3 * 4096 * 11008 + 4096);
    match (before, opened, peak()) {
        (Some(before), Some(opened), Some(loaded)) => {
            println!("peak memory: {before} before, {opened} with the header, {loaded} with a layer of {bytes} bytes, read in {took:?}");
            assert!(opened - before.min(opened) < 50_000_000);
            assert!(loaded - opened.min(loaded) < bytes * 5 / 4 + 50_000_000);
        }
        _ => println!("this system does not tell peak memory: not checked"),
    }
    drop(layer);
}

/// Loading holds the model and the tensor at hand, not the file beside it. `TERRARIUM_BIG` names a checkpoint to try instead.
#[test]
fn loading_takes_little_more_memory_than_the_model() {
    let sparse = tempfile::tempdir().unwrap();
    let given = std::env::var_os("TERRARIUM_BIG").map(std::path::PathBuf::from);
    let dir = given.as_deref().unwrap_or(sparse.path());
    if given.is_none() {
        write_sparse(dir, SMALL, "BF16", 2);
    }
    for precision in [Precision::F32, Precision::Bf16] {
        peak();
        let before = peak();
        let loaded = match load::<B>(dir, &LoadOptions { precision, ..LoadOptions::default() }, &device()) {
            Ok(loaded) => loaded,
            Err(error) => {
                assert!(error.to_string().contains("use --dtype f32"), "{error}");
                continue;
            }
        };
        let bytes = (loaded.config.parameters() * loaded.dtype.size()) as u64;
        let (Some(before), Some(after)) = (before, peak()) else {
            println!("this system does not tell peak memory: not checked");
            return;
        };
        let took = after - before.min(after);
        println!("{:?}: {took} bytes at most for {bytes} bytes of weights: {:.3}", loaded.dtype, took as f64 / bytes as f64);
        assert!(took as f64 <= 1.15 * bytes as f64);
    }
}

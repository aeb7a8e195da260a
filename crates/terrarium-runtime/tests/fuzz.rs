//! Random and mutated bytes: readers refuse or read them, and never panic or ask for absurd memory.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::Ordering;

use burn::tensor::TensorData;
use common::watched::{LARGEST, Watched};
use proptest::prelude::*;
use terrarium_models::DecoderConfig;
use terrarium_runtime::{Checkpoint, read_safetensors, write_safetensors};

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Far above what a file of some kilobytes can need.
const MOST: usize = 64 << 20;

fn valid_file() -> Vec<u8> {
    let dir = tempfile::tempdir().expect("temp");
    let path = dir.path().join("x.safetensors");
    let tensors = vec![
        ("model.embed_tokens.weight".to_string(), TensorData::new(vec![1.0f32; 12], [3, 4])),
        ("b".to_string(), TensorData::new(vec![1i64, 2], [2])),
        ("c".to_string(), TensorData::new(vec![burn::tensor::bf16::ONE; 5], [5, 1])),
    ];
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors(&path, tensors, &metadata).expect("writes");
    fs::read(path).expect("there")
}

/// What our reader says of these bytes, beside what the reference reader says.
fn read_both(bytes: &[u8]) -> (bool, bool) {
    let dir = tempfile::tempdir().expect("temp");
    let path = dir.path().join("model.safetensors");
    fs::write(&path, bytes).expect("writes");
    let ours = read_safetensors(&path).map_err(|e| assert!(e.to_string().contains("model.safetensors")));
    (ours.is_ok(), safetensors::SafeTensors::deserialize(bytes).is_ok())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: common::cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn safetensors_of_random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(!read_both(&bytes).0);
        prop_assert!(LARGEST.load(Ordering::Relaxed) < MOST);
    }

    #[test]
    fn safetensors_with_a_random_header(header in "\\{(\"[ab]\": ?\\{\"dtype\": ?\"(F32|I8|X)\", ?\"shape\": ?\\[[0-9]{0,20}(, ?[0-9]{1,20})?\\], ?\"data_offsets\": ?\\[[0-9]{1,20}, ?[0-9]{1,3}\\]\\},?){0,2}\\}", data in 0usize..64) {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
        let (ours, theirs) = read_both(&bytes);
        // At least as strict as the format's own reader.
        prop_assert!(theirs || !ours, "{header}");
        prop_assert!(LARGEST.load(Ordering::Relaxed) < MOST);
    }

    #[test]
    fn safetensors_with_mutated_bytes(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), shorten in any::<bool>()) {
        let mut bytes = valid_file();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if shorten {
            bytes.truncate(cut.index(bytes.len()));
        }
        let (ours, theirs) = read_both(&bytes);
        prop_assert!(theirs || !ours);
        prop_assert!(LARGEST.load(Ordering::Relaxed) < MOST);
    }

    #[test]
    fn configs_of_random_text(text in "\\PC{0,200}") {
        let _ = DecoderConfig::from_json(&text);
    }

    #[test]
    fn configs_with_mutated_values(which in any::<bool>(), key in any::<prop::sample::Index>(), value in prop::sample::select(vec![
        "null", "-1", "0", "1", "3", "1e999", "18446744073709551615", "4294967296", "\"x\"", "[]", "{}", "true", "Infinity", "-Infinity", "NaN", "0.5", "[0, [1]]", "\"M*-\"",
    ])) {
        let text = if which { common::HYBRID } else { common::LLAMA };
        // Keys and values alternate around colons; one value is replaced up to its comma.
        let fields: Vec<&str> = text.trim().trim_start_matches('{').trim_end_matches('}').split(", \"").collect();
        let at = key.index(fields.len());
        let changed: Vec<String> = fields.iter().enumerate().map(|(i, field)| {
            let name = field.split(':').next().unwrap_or("");
            if i == at { format!("{name}: {value}") } else { field.to_string() }
        }).collect();
        let text = format!("{{{}}}", changed.join(", \""));
        if let Ok(config) = DecoderConfig::from_json(&text) {
            let dir = tempfile::tempdir().expect("temp");
            fs::write(dir.path().join("config.json"), &text).expect("writes");
            fs::write(dir.path().join("model.safetensors"), valid_file()).expect("writes");
            // Whatever it describes, three stray tensors are not it; and nothing is built before that is known.
            if config.layers.len() < 1000 {
                let checked = Checkpoint::open(dir.path()).and_then(|checkpoint| checkpoint.check());
                prop_assert!(checked.is_err());
            }
        }
        prop_assert!(LARGEST.load(Ordering::Relaxed) < MOST);
    }

    #[test]
    fn indexes_of_random_text(text in "\\{\"weight_map\": \\{(\"[a-c]\": \"[./a-z\\\\\\\\]{0,12}(\\.safetensors)?\",?){0,3}\\}\\}") {
        let dir = tempfile::tempdir().expect("temp");
        fs::write(dir.path().join("config.json"), common::LLAMA).expect("writes");
        fs::write(dir.path().join("model.safetensors.index.json"), &text).expect("writes");
        prop_assert!(Checkpoint::open(dir.path()).is_err());
    }
}

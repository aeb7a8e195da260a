//! Ranks put together again: the merged goldens hold their own positions (tests/data/make_torch.py).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::DType;

use super::*;

const FOLDERS: [&str; 4] = ["one", "tp2", "pp2", "tp2-pp2"];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/megatron").join(name)
}

fn open(dir: &Path) -> MegatronFolder {
    open_megatron(dir).expect("opens").expect("a Megatron folder")
}

fn failure(dir: &Path) -> String {
    open_megatron(dir).err().expect("an error").to_string()
}

/// Components of a tensor: d_inner 8, groups x state 6, heads 4, MLP 6.
fn parts(key: &str, gated: bool) -> Option<&'static [usize]> {
    match key {
        _ if key.contains("in_proj") => Some(&[8, 8, 6, 6, 4]),
        _ if key.contains("conv1d") => Some(&[8, 6, 6]),
        _ if key.contains("linear_fc1.weight") && gated => Some(&[6, 6]),
        _ => None,
    }
}

#[test]
fn merged_tensors_hold_their_own_positions() {
    for name in FOLDERS {
        let folder = open(&data(name));
        let sizes: HashMap<String, Vec<usize>> = folder.entries().map(|(key, stored)| (key.into(), stored.shape().to_vec())).collect();
        let mut starts: Vec<(usize, usize, String)> = Vec::new();
        for (key, stored) in folder.entries() {
            let values = stored.data(DType::F32, parts(key, name == "tp2")).expect("merges");
            assert_eq!(values.shape.to_vec(), sizes[key]);
            let values = values.as_slice::<f32>().expect("floats");
            for (i, value) in values.iter().enumerate() {
                assert_eq!(*value, values[0] + i as f32, "{name}: {key}[{i}]");
            }
            starts.push((values[0] as usize, values.len(), key.to_string()));
        }
        // Every element of the model is there once, so keys went to the right places and none is lost.
        starts.sort();
        let mut next = 0;
        for (start, len, key) in &starts {
            assert_eq!(*start, next, "{name}: {key}");
            next += len;
        }
        let layers = if name.contains("pp2") { 4 } else { 3 };
        assert_eq!(folder.args["num_layers"], layers, "{name}");
        assert!(sizes.contains_key(&format!(
            "decoder.layers.{}.{}",
            layers - 1,
            if layers == 4 { "mixer.D" } else { "mlp.linear_fc2.weight" }
        )));
    }
}

#[test]
fn arguments_are_plain_values() {
    let args = open(&data("tp2")).args;
    let expected = serde_json::json!({
        "num_layers": 3, "hidden_size": 4, "norm_epsilon": 1e-5, "swiglu": true, "hybrid_override_pattern": "M*-", "data_path": ["a", "b"],
        "lr_warmup": null, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "mamba_num_groups": 2, "rank": 0,
    });
    assert_eq!(Value::Object(args), expected);
}

#[test]
fn folders_of_iterations_open_like_the_whole() {
    for (name, folder) in [("one", "release"), ("pp2", "iter_0000020")] {
        assert_eq!(open(&data(name)).tensors.len(), open(&data(name).join(folder)).tensors.len());
    }
    assert!(open_megatron(&data("..")).expect("no error").is_none());
    assert!(open_megatron(&data("nowhere")).expect("no error").is_none());
}

#[test]
fn components_have_to_be_given_and_to_fit() {
    let folder = open(&data("tp2"));
    let in_proj = folder.find("decoder.layers.0.mixer.in_proj.weight").expect("there");
    assert_eq!(in_proj.shape(), [32, 4]);
    for (parts, expected) in
        [(None, "component by component"), (Some([8, 8, 6, 6, 5]), "divided evenly"), (Some([7, 9, 6, 6, 4]), "divided evenly")]
    {
        let error = in_proj.raw(parts.as_ref().map(|p| &p[..])).expect_err("an error").to_string();
        assert!(error.contains(expected) && error.contains("in_proj") && error.contains("mp_rank_00"), "{error}");
    }
    assert!(in_proj.tensor().is_err());
    let whole = folder.find("decoder.layers.1.self_attention.linear_proj.weight").expect("there").tensor().expect("merges");
    assert_eq!((whole.shape.to_vec(), whole.dtype), (vec![4, 4], DType::F32));
    assert!(folder.find("decoder.layers.9.mixer.D").is_none());
}

/// A copy of a golden to damage.
fn copy(name: &str) -> tempfile::TempDir {
    fn copy_dir(from: &Path, to: &Path) {
        fs::create_dir_all(to).expect("creates");
        for entry in fs::read_dir(from).expect("lists").flatten() {
            let target = to.join(entry.file_name());
            if entry.path().is_dir() { copy_dir(&entry.path(), &target) } else { fs::copy(entry.path(), target).map(drop).expect("copies") }
        }
    }
    let temp = tempfile::tempdir().expect("temp");
    copy_dir(&data(name), temp.path());
    temp
}

const FILE: &str = "model_optim_rng.pt";

#[test]
fn missing_ranks_and_gaps_are_named() {
    let dir = copy("tp2");
    let release = dir.path().join("release");
    fs::remove_dir_all(release.join("mp_rank_01")).expect("removes");
    let error = failure(dir.path());
    assert!(error.contains("tensor_model_parallel_size of 2") && error.contains("release"), "{error}");
    fs::create_dir(release.join("mp_rank_01")).expect("creates");
    let error = failure(dir.path());
    assert!(error.contains("mp_rank_01") && error.contains(FILE), "{error}");
    fs::rename(release.join("mp_rank_01"), release.join("mp_rank_02")).expect("renames");
    assert!(failure(dir.path()).contains("tensor rank 1 of pipeline stage 0 is missing"), "{}", failure(dir.path()));
    for (name, expected) in
        [("mp_rank_x", "mp_rank_TT"), ("mp_rank_00_000_000", "expert"), ("mp_rank_0", "same rank"), ("mp_rank_99999999999", "mp_rank_TT")]
    {
        fs::create_dir(release.join(name)).expect("creates");
        let error = failure(dir.path());
        assert!(error.contains(expected), "{name}: {error}");
        fs::remove_dir(release.join(name)).expect("removes");
    }
    let dir = copy("pp2");
    fs::remove_dir_all(dir.path().join("iter_0000020/mp_rank_00_001")).expect("removes");
    assert!(failure(dir.path()).contains("pipeline_model_parallel_size of 2"));
}

#[test]
fn the_iteration_has_to_be_there() {
    let dir = copy("one");
    let latest = dir.path().join("latest_checkpointed_iteration.txt");
    for (text, expected) in
        [("17", "iter_0000017"), ("../release", "neither"), ("", "neither"), ("+1", "neither"), ("99999999999999999999", "neither")]
    {
        fs::write(&latest, text).expect("writes");
        let error = failure(dir.path());
        assert!(error.contains(expected) && error.contains("latest_checkpointed_iteration.txt"), "{error}");
    }
    fs::write(&latest, "release").expect("writes");
    let release = dir.path().join("release");
    fs::remove_dir_all(release.join("mp_rank_00")).expect("removes");
    assert!(failure(dir.path()).contains("no mp_rank_* folder"));
    fs::write(release.join("__0_0.distcp"), "").expect("writes");
    assert!(failure(dir.path()).contains("torch_dist"));
}

#[test]
fn ranks_that_disagree_are_refused() {
    // Another model's rank: other keys, other shapes.
    let dir = copy("tp2-pp2");
    let iteration = dir.path().join("iter_0000003");
    fs::copy(iteration.join("mp_rank_00_001").join(FILE), iteration.join("mp_rank_01_000").join(FILE)).expect("copies");
    let error = failure(dir.path());
    assert!(error.contains("mp_rank_01_000") && error.contains("is not in"), "{error}");
    let dir = copy("tp2");
    fs::copy(data("one").join("release/mp_rank_00").join(FILE), dir.path().join("release/mp_rank_01").join(FILE)).expect("copies");
    let error = failure(dir.path());
    assert!(error.contains("mp_rank_01") && error.contains("`embedding.word_embeddings.weight` is F32 [8, 4]"), "{error}");
    // One byte of a norm that both ranks hold.
    let dir = copy("tp2");
    let key = "decoder.layers.0.norm.weight";
    let path = dir.path().join("release/mp_rank_01").join(FILE);
    let begin = {
        let folder = open(dir.path());
        let at = folder.tensors.iter().find(|tensor| tensor.key == key).expect("there").entries[1];
        folder.stages[0][1].header.entries[at].begin as usize
    };
    let mut bytes = fs::read(&path).expect("there");
    bytes[begin] ^= 1;
    fs::write(&path, bytes).expect("writes");
    let error = open(dir.path()).find(key).expect("there").data(DType::F32, None).expect_err("an error").to_string();
    assert!(error.contains("mp_rank_01") && error.contains(key) && error.contains("differs"), "{error}");
}

#[test]
fn a_copied_pipeline_stage_is_no_second_one() {
    let dir = copy("pp2");
    let iteration = dir.path().join("iter_0000020");
    fs::copy(iteration.join("mp_rank_00_001").join(FILE), iteration.join("mp_rank_00_000").join(FILE)).expect("copies");
    // Its layers count on; what both stages hold outside of layers is the same to the byte.
    let folder = open(dir.path());
    assert!(folder.find("decoder.layers.3.mixer.D").is_some() && folder.find("embedding.word_embeddings.weight").is_none());
    let path = iteration.join("mp_rank_00_001").join(FILE);
    let mut bytes = fs::read(&path).expect("there");
    let begin = folder.stages[1][0].header.entries.iter().find(|e| e.key == "output_layer.weight").expect("there").begin as usize;
    bytes[begin + 1] ^= 1;
    fs::write(&path, bytes).expect("writes");
    let error = failure(dir.path());
    assert!(error.contains("`output_layer.weight` differs"), "{error}");
}

#[test]
fn rules_follow_the_names() {
    for (key, expected) in [
        ("embedding.word_embeddings.weight", Some(Rule::Rows)),
        ("embedding.position_embeddings.weight", Some(Rule::Same)),
        ("decoder.layers.3.mixer.norm.weight", Some(Rule::Rows)),
        ("decoder.layers.3.norm.weight", Some(Rule::Same)),
        ("decoder.final_norm.weight", Some(Rule::Same)),
        ("decoder.layers.3.mixer.in_proj.layer_norm_weight", Some(Rule::Same)),
        ("decoder.layers.3.self_attention.q_layernorm.weight", Some(Rule::Same)),
        ("decoder.layers.3.mixer.in_proj.weight", Some(Rule::Components)),
        ("decoder.layers.3.mixer.conv1d.bias", Some(Rule::Components)),
        ("decoder.layers.3.mixer.dt_bias", Some(Rule::Rows)),
        ("decoder.layers.3.mixer.out_proj.weight", Some(Rule::Columns)),
        ("decoder.layers.3.mlp.linear_fc2.weight", Some(Rule::Columns)),
        ("decoder.layers.3.mlp.linear_fc2.bias", Some(Rule::Same)),
        ("decoder.layers.3.mlp.router.weight", None),
    ] {
        assert_eq!(Rule::of(key), expected, "{key}");
    }
    let entry =
        |key: &str| Entry { key: key.into(), element: crate::tensors::ElementType::F32, shape: vec![2], begin: 0, end: 8, strides: None };
    for key in ["decoder.layers.0.mixer.in_proj.weight.z", "decoder.layers.0.mixer.conv1d.bias.B"] {
        assert!(rule(&entry(key), 1).expect_err("split").contains("torch_dist"));
    }
    assert!(rule(&entry("decoder.layers.0.mlp.router.weight"), 2).expect_err("unknown").contains("2 ranks"));
    assert_eq!(rule(&entry("decoder.layers.0.mlp.router.weight"), 1), Ok(Rule::Same));
    assert!(shift("decoder.layers.x.norm.weight", 0).is_err());
    assert!(shift("decoder.layers.99999999999.norm.weight", 0).is_err());
    assert_eq!(shift("decoder.layers.2.norm.weight", 5), Ok(("decoder.layers.7.norm.weight".into(), Some(2))));
}

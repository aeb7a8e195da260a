//! States in files: going on from one is going on, and whatever is not the state of this model is refused.

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use burn::tensor::DType;
use common::{B, HYBRID, LLAMA, device, random};
use terrarium_models::init::RandomSource;
use terrarium_models::{Decoder, DecoderConfig};
use terrarium_runtime::{
    CheckpointError, Error, GenerateOptions, Generated, Sampling, Snapshot, SnapshotError, generate, read_safetensors, write_safetensors,
};

const MAMBA: &str =
    r#"{"model_type": "mamba", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "time_step_rank": 3}"#;
/// Attention behind a convolution.
const CONVOLVED: &str = r#"{"d_model": 24, "n_layer": 3, "vocab_size": 61, "pad_vocab_size_multiple": 1,
    "ssm_cfg": {"layer": "Mamba2", "headdim": 8, "d_state": 7}, "attn_layer_idx": [0, 1, 2],
    "attn_cfg": {"num_heads": 3, "head_dim": 10, "d_conv": 4, "rotary_emb_dim": 4, "qkv_proj_bias": false, "out_proj_bias": false}}"#;

fn run(model: &Decoder<B>, config: &DecoderConfig, prompt: &[u32], options: &GenerateOptions) -> Result<Generated, Error> {
    generate(model, config, None, &[prompt.to_vec()], options, &device(), &mut |_| ControlFlow::Continue(()))
}

fn keeping(new: usize) -> GenerateOptions {
    GenerateOptions { keep_state: true, ..GenerateOptions::new(new) }
}

fn from(state: &Snapshot, new: usize) -> GenerateOptions {
    GenerateOptions { from: Some(Arc::new(state.clone())), keep_state: true, ..GenerateOptions::new(new) }
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * i * 7 + 11 * i + 3) % 61).collect()
}

/// Through a file.
fn saved(state: &Snapshot, dir: &Path) -> Snapshot {
    let path = dir.join("a.state");
    state.save(&path).expect("saves");
    let read = Snapshot::load(&path).expect("reads");
    assert_eq!(*state, read);
    read
}

#[test]
fn going_on_from_a_file_is_going_on() {
    let dir = tempfile::tempdir().expect("temp");
    for text in [HYBRID, LLAMA, MAMBA, CONVOLVED] {
        let (config, model) = random(text, 3);
        let prompt = prompt(23);
        // A part at a time, through files, to the same tokens and to the same state, bit for bit.
        let whole = run(&model, &config, &prompt, &keeping(17)).expect("generates");
        let first = run(&model, &config, &prompt, &keeping(6)).expect("generates");
        let state = saved(first.state.as_ref().expect("kept"), dir.path());
        assert_eq!((first.rows[0].reused, state.tokens.len()), (0, 29));
        let second = run(&model, &config, &state.tokens, &from(&state, 11)).expect("goes on");
        assert_eq!((second.rows[0].reused, second.rows[0].prompt_tokens, second.timings.prompt_tokens), (29, 29, 0));
        assert_eq!([first.rows[0].ids.clone(), second.rows[0].ids.clone()].concat(), whole.rows[0].ids, "{}", config.family.name());
        assert_eq!(whole.state, second.state, "{}", config.family.name());

        // The state of a prompt, before anything is generated: the same prompt again, and a longer one.
        let read = run(&model, &config, &prompt, &keeping(0)).expect("reads");
        assert!(read.rows[0].ids.is_empty());
        let state = saved(read.state.as_ref().expect("kept"), dir.path());
        let again = run(&model, &config, &prompt, &from(&state, 17)).expect("goes on");
        assert_eq!((again.rows[0].reused, &again.rows[0].ids), (23, &whole.rows[0].ids));
        assert_eq!(again.state, whole.state);
        let longer = [prompt.clone(), vec![5, 9, 2]].concat();
        let (fresh, resumed) = (run(&model, &config, &longer, &keeping(9)), run(&model, &config, &longer, &from(&state, 9)));
        let (fresh, resumed) = (fresh.expect("generates"), resumed.expect("goes on"));
        assert_eq!((resumed.rows[0].reused, &resumed.rows[0].ids), (23, &fresh.rows[0].ids));
        // Sampling and penalties see the whole prompt too.
        let sampling = Sampling { temperature: 1.0, top_k: 9, top_p: 0.9, repetition_penalty: 1.3 };
        let sampled = |options: GenerateOptions| run(&model, &config, &longer, &GenerateOptions { sampling, ..options }).expect("samples");
        assert_eq!(sampled(from(&state, 9)).rows[0].ids, sampled(keeping(9)).rows[0].ids);
    }
}

#[test]
fn states_are_cut_back_where_that_is_possible() {
    for (text, cut) in [(LLAMA, true), (HYBRID, false), (MAMBA, false), (CONVOLVED, false)] {
        let (config, model) = random(text, 4);
        let state = run(&model, &config, &prompt(20), &keeping(4)).expect("generates").state.expect("kept");
        let parting = [prompt(13), vec![60, 1, 2]].concat();
        let shorter = prompt(9);
        for (prompt, reused) in [(parting, 13), (shorter, 8), (vec![60, 1], 0)] {
            let resumed = run(&model, &config, &prompt, &from(&state, 7)).expect("goes on");
            let fresh = run(&model, &config, &prompt, &keeping(7)).expect("generates");
            assert_eq!(resumed.rows[0].reused, if cut { reused } else { 0 }, "{}", config.family.name());
            assert_eq!(resumed.rows[0].ids, fresh.rows[0].ids, "{}", config.family.name());
            assert_eq!(resumed.notes.iter().any(|note| note.contains("nothing of the state is reused")), resumed.rows[0].reused == 0);
            assert_eq!(resumed.timings.prompt_tokens + resumed.rows[0].reused, prompt.len());
        }
    }
}

#[test]
fn a_state_is_of_its_model_alone() {
    let (config, model) = random(HYBRID, 5);
    let state = run(&model, &config, &prompt(9), &keeping(2)).expect("generates").state.expect("kept");
    let refused = |config: &DecoderConfig, model: &Decoder<B>| run(model, config, &[60], &from(&state, 2)).expect_err("another model");
    let (_, other) = random(HYBRID, 6);
    let error = refused(&config, &other);
    assert!(matches!(error, Error::Snapshot(SnapshotError::OtherModel { differs: "other weights", .. })), "{error}");
    let (llama, small) = random(LLAMA, 5);
    let text = refused(&llama, &small).to_string();
    assert!(text.contains("a nemotron_h of") && text.contains("a llama of") && text.contains("another configuration"), "{text}");
    let half = Decoder::<B>::build(&config, &mut RandomSource::new(5), DType::BF16, &device());
    let text = refused(&config, &half).to_string();
    assert!(text.contains("saved in f32") && text.contains("loaded in bf16") && text.contains("--dtype f32"), "{text}");
    // The same network by another seed's path: the same weights are the same model.
    let (_, same) = random(HYBRID, 5);
    assert_eq!(run(&same, &config, &state.tokens, &from(&state, 2)).expect("the same model").rows[0].reused, 11);

    let two = generate(&model, &config, None, &[vec![1], vec![2]], &from(&state, 1), &device(), &mut |_| ControlFlow::Continue(()));
    assert!(two.expect_err("two prompts").to_string().contains("one prompt, and there are 2"));
}

#[test]
fn files_that_are_no_state_are_refused() {
    let (config, model) = random(HYBRID, 7);
    let state = run(&model, &config, &prompt(9), &keeping(2)).expect("generates").state.expect("kept");
    let dir = tempfile::tempdir().expect("temp");
    let path = dir.path().join("a.state");
    state.save(&path).expect("saves");
    let whole = std::fs::read(&path).expect("there");
    let load = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("writes");
        Snapshot::load(&path)
    };
    assert_eq!(load(&whole).expect("reads"), state);
    for length in [0, 5, 40, whole.len() / 2, whole.len() - 1] {
        let error = load(&whole[..length]).expect_err("cut");
        let cut = matches!(error, Error::Checkpoint(CheckpointError::Truncated { .. } | CheckpointError::Corrupt { .. }));
        assert!(cut && error.to_string().contains("a.state"), "{length}: {error}");
    }
    // Any byte of the data.
    let data = 8 + u64::from_le_bytes(whole[..8].try_into().expect("eight")) as usize;
    for at in (data..whole.len()).step_by(97).chain([whole.len() - 1]) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        let error = load(&bytes).expect_err("damaged");
        assert!(matches!(error, Error::Snapshot(SnapshotError::Damaged { .. })) && error.to_string().contains("checksum"), "{at}: {error}");
    }
    load(&whole).expect("whole again");
    let (tensors, metadata) = read_safetensors(&path).expect("reads");
    let with = |key: &str, value: Option<&str>| {
        let mut metadata = metadata.clone();
        metadata.remove(key);
        metadata.extend(value.map(|value| (key.to_string(), value.to_string())));
        write_safetensors(&path, tensors.clone(), &metadata).expect("writes");
        Snapshot::load(&path).expect_err("another file").to_string()
    };
    assert!(with("format", None).contains("not a saved state"));
    assert!(with("format", Some("pt")).contains("expected `terrarium-state`"));
    assert!(with("version", Some("2")).contains("format version 2, and this program reads version 1"));
    assert!(with("checksum", None).contains("lack `checksum`"));
    std::fs::remove_file(&path).expect("removes");
    assert!(Snapshot::load(&path).expect_err("nothing there").to_string().contains("a.state"));
}

#[test]
fn a_state_that_cannot_be_written_leaves_nothing() {
    let (config, model) = random(MAMBA, 8);
    let state = run(&model, &config, &prompt(9), &keeping(0)).expect("reads").state.expect("kept");
    let dir = tempfile::tempdir().expect("temp");
    assert!(state.save(dir.path()).is_err());
    let file = dir.path().join("file");
    std::fs::write(&file, "mine").expect("writes");
    assert!(state.save(&file.join("below.state")).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).expect("there").count(), 1);
    assert_eq!(std::fs::read(&file).expect("there"), b"mine");
}

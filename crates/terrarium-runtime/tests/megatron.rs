//! Megatron folders through the front door; how ranks are merged is tested beside the code.

use std::fs;
use std::path::{Path, PathBuf};

use terrarium_runtime::{Checkpoint, CheckpointError, Error, MegatronError, TorchError};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// A folder of one rank that holds this file.
fn folder_of(file: &Path) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temp");
    let rank = dir.path().join("release/mp_rank_00");
    fs::create_dir_all(&rank).expect("creates");
    fs::write(dir.path().join("latest_checkpointed_iteration.txt"), "release\n").expect("writes");
    fs::copy(file, rank.join("model_optim_rng.pt")).expect("copies");
    dir
}

fn failure(dir: &Path) -> Error {
    Checkpoint::open(dir).err().expect("an error")
}

#[test]
fn a_folder_without_its_ranks_names_what_is_missing() {
    let dir = tempfile::tempdir().expect("temp");
    fs::write(dir.path().join("latest_checkpointed_iteration.txt"), "12").expect("writes");
    let error = failure(dir.path());
    assert!(matches!(&error, Error::Checkpoint(CheckpointError::Megatron(MegatronError::Layout { .. }))), "{error}");
    assert!(error.to_string().contains("iter_0000012"), "{error}");
    fs::create_dir_all(dir.path().join("iter_0000012/mp_rank_00")).expect("creates");
    let error = failure(dir.path()).to_string();
    assert!(error.contains("mp_rank_00") && error.contains("model_optim_rng.pt"), "{error}");
}

#[test]
fn other_files_under_the_name_are_refused() {
    let cases = [("state_dict.bin", "without a `model`"), ("legacy.bin", "before PyTorch 1.6"), ("script.bin", "TorchScript")];
    for (name, expected) in cases {
        let dir = folder_of(&data("torch").join(name));
        let error = failure(dir.path());
        assert!(
            matches!(&error, Error::Checkpoint(CheckpointError::Torch(TorchError::Container { .. } | TorchError::Format { .. }))),
            "{error}"
        );
        let said = error.to_string();
        assert!(said.contains(expected) && said.contains("mp_rank_00/model_optim_rng.pt"), "{said}");
    }
    // A model without arguments is one: what is missing is for the configuration to say.
    let dir = folder_of(&data("torch/training.bin"));
    assert!(!matches!(failure(dir.path()), Error::Checkpoint(CheckpointError::Torch(_))));
}

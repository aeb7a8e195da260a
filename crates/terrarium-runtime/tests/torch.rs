//! Files of PyTorch: what torch wrote reads as it was (tests/data/make_torch.py), and what is hostile is refused by name.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, TensorData};
use common::archive::{FOUR, Member, View, archive, dict, member, members, text, write_zip, zip};
use common::{B, HYBRID, LLAMA, device, saved};
use terrarium_runtime::tensors::MappedFile;
use terrarium_runtime::{Checkpoint, CheckpointError, Error, LoadOptions, PickleError, Result, TorchError, load, read_safetensors};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/torch").join(name)
}

fn read(path: &Path) -> Result<HashMap<String, TensorData>> {
    let file = MappedFile::open(path)?;
    file.header.entries.iter().map(|entry| Ok((entry.key.clone(), file.tensor(entry)?))).collect()
}

fn floats(data: &TensorData) -> Vec<f64> {
    data.clone().convert::<f64>().to_vec().expect("numbers")
}

fn ramp(from: usize, count: usize) -> Vec<f64> {
    (from..from + count).map(|i| i as f64).collect()
}

/// What reading these bytes as pytorch_model.bin says.
fn failure(bytes: &[u8]) -> Error {
    let dir = tempfile::tempdir().expect("temp");
    let path = dir.path().join("pytorch_model.bin");
    fs::write(&path, bytes).expect("writes");
    let error = read(&path).expect_err("an error");
    assert!(error.to_string().contains("pytorch_model.bin"), "{error}");
    error
}

fn torch_error(error: &Error) -> &TorchError {
    match error {
        Error::Checkpoint(CheckpointError::Torch(error)) => error,
        other => panic!("{other}"),
    }
}

#[test]
fn every_type_that_torch_writes_is_read() {
    let file = MappedFile::open(&golden("kinds.bin")).expect("opens");
    let mut seen = 0;
    for entry in &file.header.entries {
        let (key, data) = (entry.key.as_str(), file.tensor(entry));
        match key {
            "float8" | "complex" => {
                let error = data.expect_err("no such type here").to_string();
                assert!(error.contains(key) && error.contains("kinds.bin") && error.contains("cannot be read"), "{error}");
            }
            "bool" => assert_eq!(data.expect("reads").as_slice::<bool>().expect("bools"), [true, false, true]),
            _ => {
                let data = data.expect("reads");
                let expected = key.replace("bfloat", "bf").replace("uint", "U").replace("int", "I").replace("float", "F").to_uppercase();
                assert_eq!(format!("{:?}", data.dtype), expected);
                assert_eq!((floats(&data), data.shape.to_vec()), (ramp(0, 6), vec![2, 3]), "{key}");
                seen += 1;
            }
        }
    }
    assert_eq!((seen, file.header.entries.len()), (12, 15));
}

#[test]
fn views_and_shared_storages_are_read() {
    let tensors = read(&golden("views.bin")).expect("reads");
    let expect = |key: &str, shape: &[usize], values: Vec<f64>| {
        let data = tensors.get(key).unwrap_or_else(|| panic!("{key} is not there"));
        assert_eq!((data.shape.to_vec(), floats(data)), (shape.to_vec(), values), "{key}");
    };
    expect("embed", &[4, 6], ramp(0, 24));
    expect("tied", &[4, 6], ramp(0, 24));
    expect("transposed", &[6, 4], (0..24).map(|i| (i % 4 * 6 + i / 4) as f64).collect());
    expect("slice", &[2, 3], vec![8.0, 9.0, 10.0, 14.0, 15.0, 16.0]);
    expect("last_row", &[6], ramp(18, 6));
    expect("step", &[2, 2], vec![0.0, 3.0, 12.0, 15.0]);
    expect("expanded", &[3, 1], ramp(0, 3));
    expect("scalar", &[], vec![7.5]);
    expect("empty", &[0, 4], vec![]);
    expect("repeated", &[2, 1], ramp(5, 2));
    expect("permuted", &[4, 2, 3], (0..24).map(|i| (i % 6 * 4 + i / 6) as f64).collect());
    expect("parameter", &[3], ramp(0, 3));
    expect("module", &[2, 3], ramp(0, 6));
    expect("marked", &[2, 2], ramp(0, 4));
    assert_eq!(tensors.len(), 14, "extra states are stepped over");
    for name in ["protocol4.bin", "protocol5.bin"] {
        assert_eq!(floats(&read(&golden(name)).expect("reads")["w"]), ramp(0, 4), "{name}");
    }
    assert_eq!(floats(&read(&golden("state_dict.bin")).expect("reads")["weight"]), ramp(0, 6));
}

#[test]
fn other_files_of_torch_are_named() {
    let cases = [
        ("legacy.bin", "before PyTorch 1.6", "torch.save(state_dict"),
        ("plain.bin", "a plain pickle", "torch.save(state_dict"),
        ("script.bin", "TorchScript", "state_dict()"),
        ("training.bin", "`step` is an int, not a tensor", ""),
        ("conj.bin", "`conj`", "resolve_conj"),
        ("sparse.bin", "`sparse` is made by _rebuild_sparse_tensor", "dense"),
    ];
    for (name, what, advice) in cases {
        let error = read(&golden(name)).expect_err(name).to_string();
        assert!(error.contains(name) && error.contains(what) && error.contains(advice), "{error}");
    }
    let nested = dict(&[("model", [b"}(", &text("w")[..], &FOUR.pickle(), b"u"].concat())]);
    assert!(
        failure(&archive(&nested, &[("0", &[0; 16])]))
            .to_string()
            .contains("`model` is a dict, not a tensor: this is a training checkpoint")
    );
    for (bytes, what) in [
        (&b"GGUF\x03\0\0\0\0\0"[..], "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"{\"a\": 1, \"b\": 2}", ""),
    ] {
        assert!(failure(bytes).to_string().contains(what));
    }
}

#[test]
fn formats_are_told_by_content_and_not_by_name() {
    for config in [HYBRID, LLAMA] {
        let (dir, ..) = saved(config, 5);
        let before = load::<B>(dir.path(), &LoadOptions::default(), &device()).expect("loads").model.tensors();
        fs::rename(dir.path().join("model.safetensors"), dir.path().join("pytorch_model.bin")).expect("renames");
        let after = load::<B>(dir.path(), &LoadOptions::default(), &device()).expect("loads").model.tensors();
        assert!(before.iter().zip(&after).all(|((a, x), (b, y))| a == b && x.as_bytes() == y.as_bytes()));
        fs::rename(dir.path().join("pytorch_model.bin"), dir.path().join("consolidated.safetensors")).expect("renames");
        Checkpoint::open(dir.path()).expect("opens").check().expect("fits");
    }
}

/// The tensors of a saved model as one torch.save archive each, with an index.
fn shard(dir: &Path) -> Vec<String> {
    let (tensors, _) = read_safetensors(&dir.join("model.safetensors")).expect("reads");
    fs::remove_file(dir.join("model.safetensors")).expect("removes");
    let mut map = serde_json::Map::new();
    for (i, (key, data)) in tensors.iter().enumerate() {
        let shape: Vec<i64> = data.shape.to_vec().iter().map(|&d| d as i64).collect();
        let strides: Vec<i64> = (0..shape.len()).map(|d| shape[d + 1..].iter().product()).collect();
        let view = View { elements: shape.iter().product(), shape: &shape, strides: &strides, ..FOUR };
        let name = format!("pytorch_model-{i:05}.bin");
        fs::write(dir.join(&name), archive(&dict(&[(key.as_str(), view.pickle())]), &[("0", data.as_bytes())])).expect("writes");
        map.insert(key.clone(), name.into());
    }
    fs::write(dir.join("pytorch_model.bin.index.json"), serde_json::json!({ "weight_map": map }).to_string()).expect("writes");
    tensors.into_iter().map(|(key, _)| key).collect()
}

#[test]
fn shards_of_torch_load_like_safetensors() {
    let (dir, _, model) = saved(HYBRID, 3);
    let keys = shard(dir.path());
    let loaded = load::<B>(dir.path(), &LoadOptions::default(), &device()).expect("loads");
    for ((a, x), (b, y)) in model.tensors().iter().zip(&loaded.model.tensors()) {
        assert!(a == b && x.as_bytes() == y.as_bytes(), "{a}");
    }
    let checkpoint = Checkpoint::open(dir.path()).expect("opens");
    let one = checkpoint.tensor(&keys[0]).expect("reads");
    assert_eq!(one.dtype, DType::F32);
    let error = checkpoint.tensor("nothing").expect_err("an error").to_string();
    assert!(error.contains("`nothing`"), "{error}");
    // Indices may name files of this directory and nothing else.
    let index = dir.path().join("pytorch_model.bin.index.json");
    for (file, expected) in [
        ("../pytorch_model-00000.bin", "leads out"),
        ("/etc/x.bin", "leads out"),
        ("pytorch_model.bin.index.json", "no .safetensors or .bin file"),
        ("other.index.json", "no .safetensors or .bin file"),
        ("none.bin", "not there"),
    ] {
        fs::write(&index, serde_json::json!({ "weight_map": { "w": file } }).to_string()).expect("writes");
        let error = Checkpoint::open(dir.path()).err().expect("an error").to_string();
        assert!(error.contains(expected) && error.contains(file) && error.contains("index.json"), "{error}");
    }
    // One key in two shards.
    fs::copy(dir.path().join("pytorch_model-00000.bin"), dir.path().join("again.bin")).expect("copies");
    fs::write(&index, serde_json::json!({ "weight_map": { keys[0].clone(): "pytorch_model-00000.bin", "b": "again.bin" } }).to_string())
        .expect("writes");
    assert!(Checkpoint::open(dir.path()).err().expect("an error").to_string().contains("lacks keys"));
    let two = dict(&[(keys[0].as_str(), FOUR.pickle()), ("b", FOUR.pickle())]);
    fs::write(dir.path().join("again.bin"), archive(&two, &[("0", &[0; 16])])).expect("writes");
    let error = Checkpoint::open(dir.path()).err().expect("an error");
    assert!(matches!(&error, Error::Checkpoint(CheckpointError::Duplicate { key, .. }) if *key == keys[0]), "{error}");
}

#[test]
fn calls_are_refused_with_file_member_and_callable() {
    for names in ["os\nsystem", "builtins\neval", "subprocess\nPopen"] {
        let call = [b"c", names.as_bytes(), b"\n(", &text("touch x"), b"tR"].concat();
        let error = failure(&archive(&dict(&[("w", FOUR.pickle()), ("x", call)]), &[("0", &[0; 16])]));
        let callable = names.replace('\n', ".");
        assert!(
            matches!(torch_error(&error), TorchError::Pickle { source: PickleError::Refused { callable: found, .. }, .. } if *found == callable)
        );
        let said = error.to_string();
        for part in ["x/data.pkl", &callable, "refused: a checkpoint holds data, and nothing in it is ever run"] {
            assert!(said.contains(part), "{said}");
        }
    }
    let good = dict(&[("w", FOUR.pickle())]);
    for end in 0..good.len() {
        let error = failure(&archive(&good[..end], &[("0", &[0; 16])]));
        assert!(matches!(torch_error(&error), TorchError::Pickle { source: PickleError::Truncated { .. }, .. }), "{end}: {error}");
    }
    let twice = dict(&[("w", FOUR.pickle()), ("w", FOUR.pickle())]);
    assert!(failure(&archive(&twice, &[("0", &[0; 16])])).to_string().contains("`w` is there twice"));
}

#[test]
fn views_beyond_their_storage_are_refused() {
    let big = i64::MAX;
    let cases = [
        (View { shape: &[5], ..FOUR }, "absurd shape"),
        (View { shape: &[big], strides: &[0], ..FOUR }, "absurd shape"),
        (View { shape: &[1 << 32, 1 << 32, 0], strides: &[0, 0, 0], ..FOUR }, "absurd shape"),
        (View { shape: &[1 << 33, 1 << 33], strides: &[0, 0], ..FOUR }, "absurd shape"),
        (View { shape: &[2, 3], strides: &[0, 1], ..FOUR }, "absurd shape"),
        (View { shape: &[2], strides: &[4], ..FOUR }, "leaves its storage"),
        (View { shape: &[2], strides: &[big], ..FOUR }, "leaves its storage"),
        (View { shape: &[3, 1], strides: &[big, 1], ..FOUR }, "leaves its storage"),
        (View { shape: &[4], strides: &[big], ..FOUR }, "absurd"),
        (View { offset: 1, ..FOUR }, "leaves its storage"),
        (View { offset: big, ..FOUR }, "leaves its storage"),
        (View { offset: 5, shape: &[0], ..FOUR }, "leaves its storage"),
        (View { offset: -1, ..FOUR }, "negative offset"),
        (View { shape: &[-4], ..FOUR }, "negative"),
        (View { strides: &[-1], ..FOUR }, "negative"),
        (View { strides: &[1, 1], ..FOUR }, "not as many"),
        (View { elements: 5, ..FOUR }, "claims 20 bytes"),
        (View { elements: -1, ..FOUR }, "not described"),
        (View { elements: big, ..FOUR }, "claims a storage"),
        (View { storage: "1", ..FOUR }, "is not there"),
        (View { storage: "../data/0", ..FOUR }, "is not there"),
        (View { class: "QInt8Storage", ..FOUR }, "unknown type torch.QInt8Storage"),
        (View { class: "UntypedStorage", ..FOUR }, "unknown type"),
        (View { class: "float32", ..FOUR }, "not described"),
        (View { shape: &[1; 65], strides: &[1; 65], ..FOUR }, "65 dimensions"),
    ];
    for (view, expected) in cases {
        let error = failure(&archive(&dict(&[("a.weight", view.pickle())]), &[("0", &[0; 16])]));
        assert!(matches!(torch_error(&error), TorchError::Entry { key, .. } if key == "a.weight"), "{error}");
        assert!(error.to_string().contains(expected), "{expected}: {error}");
    }
}

/// What is done to the members of a good archive.
type Change<'a> = &'a dyn Fn(&mut Vec<Member>);

#[test]
fn archives_that_mislead_are_refused() {
    let pickle = dict(&[("w", FOUR.pickle())]);
    let with = |change: Change| {
        let mut members = members(&pickle, &[("0", &[0; 16])]);
        change(&mut members);
        failure(&zip(&members)).to_string()
    };
    let cases: [(Change, &str); 19] = [
        (&|m| m[2].method = 8, "`x/data/0` is compressed"),
        (&|m| m[0].method = 8, "`x/data.pkl` is compressed"),
        (&|m| m[2].method = 93, "`x/data/0` is compressed"),
        (&|m| m[2].flags = 1, "`x/data/0` is encrypted"),
        (&|m| m[2].flags = 0x2000, "`x/data/0` is encrypted"),
        (&|m| m.push(member("x/data/0", &[1; 16])), "`x/data/0` is there twice"),
        (&|m| m.push(member("x/data.pkl", b"N.")), "`x/data.pkl` is there twice"),
        (&|m| m.push(member("y/data.pkl", b"N.")), "both `x/data.pkl` and `y/data.pkl` are there"),
        (&|m| m.push(member("x/../../etc/passwd", b"")), "leads out of the archive"),
        (&|m| m.push(member("/etc/passwd", b"")), "leads out of the archive"),
        (&|m| m.push(member("..\\x", b"")), "leads out of the archive"),
        (&|m| m[2].size = Some(1 << 30), "goes beyond the archive's data"),
        (&|m| m[2].size = Some(8), "claims 8 bytes in the directory and 16"),
        (&|m| (m[2].flags, m[2].size) = (8, Some(40)), "overlap"),
        (&|m| m[2].offset = Some(0), "another one where its data is"),
        (&|m| m[2].offset = Some(u32::MAX - 1), "goes beyond the archive's data"),
        (&|m| m[1].data = b"big".to_vec(), "byteorder is not `little`"),
        (&|m| drop(m.remove(0)), "holds no data.pkl"),
        (&|m| m[2].data = vec![0; 12], "claims 16 bytes in `x/data/0`, which has 12"),
    ];
    for (change, expected) in cases {
        let error = with(change);
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let whole = archive(&pickle, &[("0", &[0; 16])]);
    for end in 9..whole.len() {
        assert!(failure(&whole[..end]).to_string().contains("truncated"));
    }
    // A second archive before or behind: the directory no longer ends where it should.
    for bytes in [[&whole[..], &whole[..]].concat(), [&b"PK\x03\x04 junk"[..], &whole].concat()] {
        failure(&bytes);
    }
}

/// A hole of four gigabytes: sizes and offsets are in zip64 fields.
#[cfg(unix)]
#[test]
fn archives_beyond_four_gigabytes_are_read() {
    let dir = tempfile::tempdir().expect("temp");
    let path = dir.path().join("pytorch_model.bin");
    let elements = (1i64 << 30) + 4;
    let end = View { elements, offset: 1 << 30, ..FOUR };
    let pickle = dict(&[("end", end.pickle()), ("start", View { elements, shape: &[2], ..FOUR }.pickle())]);
    let mut members = members(&pickle, &[("0", &1.5f32.to_le_bytes()), ("1", &[])]);
    members[2].zeros = elements as u64 * 4 - 4;
    members.rotate_left(2);
    let mut file = fs::File::create(&path).expect("creates");
    write_zip(&mut file, &members, true);
    drop(file);
    let tensors = read(&path).expect("reads");
    assert_eq!((floats(&tensors["start"]), floats(&tensors["end"])), (vec![1.5, 0.0], vec![0.0; 4]));
    assert!(fs::metadata(&path).expect("there").len() > u64::from(u32::MAX));
}

//! Random, mutated and generated PyTorch files and the committed corpus: Ok or a typed error, never a panic or absurd memory.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use common::archive::{FOUR, View, archive, dict, int, text, zip};
use common::watched::{LARGEST, Watched};
use proptest::prelude::*;
use terrarium_runtime::tensors::MappedFile;
use terrarium_runtime::{Checkpoint, CheckpointError, Error};

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Far above what a file of some kilobytes can need.
const MOST: usize = 8 << 20;

/// Opens a file and reads every tensor of it; how many there are, if it opens.
fn read(path: &Path) -> Option<usize> {
    let file = match MappedFile::open(path) {
        Ok(file) => file,
        Err(error) => {
            let name = path.file_name().expect("a file").to_string_lossy().into_owned();
            assert!(matches!(error, Error::Checkpoint(_)) && error.to_string().contains(&name), "{error}");
            return None;
        }
    };
    for entry in &file.header.entries {
        match file.tensor(entry) {
            Ok(data) => assert_eq!(data.shape.to_vec(), entry.shape),
            Err(error) => assert!(matches!(&error, Error::Checkpoint(CheckpointError::Tensor { key, .. }) if *key == entry.key), "{error}"),
        }
    }
    assert!(LARGEST.load(Ordering::Relaxed) < MOST, "one allocation of {}", LARGEST.load(Ordering::Relaxed));
    Some(file.header.entries.len())
}

/// The same bytes as a model's weights and as a rank of Megatron.
fn read_bytes(bytes: &[u8]) -> Option<usize> {
    let dir = tempfile::tempdir().expect("temp");
    let path = dir.path().join("pytorch_model.bin");
    fs::write(&path, bytes).expect("writes");
    let rank = dir.path().join("mp_rank_00");
    fs::create_dir(&rank).expect("creates");
    fs::write(rank.join("model_optim_rng.pt"), bytes).expect("writes");
    let _ = Checkpoint::open(dir.path()).err();
    assert!(LARGEST.load(Ordering::Relaxed) < MOST, "one allocation of {}", LARGEST.load(Ordering::Relaxed));
    read(&path)
}

fn here(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder)
}

/// All files below a folder, in order.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("lists").flatten() {
        if entry.path().is_dir() { found.extend(files(&entry.path())) } else { found.push(entry.path()) }
    }
    found.sort();
    found
}

/// Files named `ok-*` are read, all others refused; `*.pkl` stand for the pickle of an archive.
#[test]
fn the_corpus_is_read_or_refused() {
    let corpus = [files(&here("corpus/torch")), files(&here("corpus/safetensors"))].concat();
    assert!(corpus.len() > 40, "{} files", corpus.len());
    for path in corpus {
        let bytes = fs::read(&path).expect("there");
        let read = match path.extension() {
            Some(end) if end == "pkl" => read_bytes(&archive(&bytes, &[("0", &[0; 16])])),
            _ => read_bytes(&bytes),
        };
        let good = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ok-"));
        assert_eq!(read.is_some(), good, "{}", path.display());
    }
}

fn goldens() -> Vec<Vec<u8>> {
    let mut all: Vec<_> = files(&here("data/torch")).iter().map(|path| fs::read(path).expect("there")).collect();
    all.push(fs::read(here("data/megatron/tp2/release/mp_rank_01/model_optim_rng.pt")).expect("there"));
    all.push(archive(
        &dict(&[("a", FOUR.pickle()), ("b", View { shape: &[2, 2], strides: &[1, 2], ..FOUR }.pickle())]),
        &[("0", &[0; 16])],
    ));
    all
}

/// A number that is small, or one of those that overflow something.
fn number() -> impl Strategy<Value = i64> {
    prop_oneof![6 => 0i64..6, 1 => -3i64..0, 1 => prop::sample::select(vec![i64::MAX, i64::MIN, 1 << 31, 1 << 32, 1 << 33, (1 << 62) + 1, 1 << 61])]
}

/// Storage, class and elements that belong together; then sometimes not.
fn storage() -> impl Strategy<Value = (&'static str, &'static str, i64)> {
    let classes = vec![("FloatStorage", 4), ("HalfStorage", 2), ("ByteStorage", 1), ("BoolStorage", 1), ("DoubleStorage", 8)];
    let wrong = prop::sample::select(vec!["UntypedStorage", "XStorage", "FloatStorage"]);
    let right = (prop::sample::select(vec![("0", 16), ("1", 4), ("2", 0)]), prop::sample::select(classes));
    prop_oneof![
        6 => right.prop_map(|((key, bytes), (class, width))| (key, class, bytes / width)),
        1 => (prop::sample::select(vec!["0", "1", "3"]), wrong, number()),
    ]
}

fn view() -> impl Strategy<Value = Vec<u8>> {
    let dims = || prop_oneof![8 => prop::collection::vec(0i64..4, 0..3), 1 => prop::collection::vec(number(), 0..4)];
    (storage(), prop_oneof![4 => Just(0), 2 => 0i64..4, 1 => number()], dims(), dims(), any::<bool>()).prop_map(
        |((storage, class, elements), offset, shape, strides, dense)| {
            let rows: Vec<i64> = (0..shape.len()).map(|d| shape[d + 1..].iter().fold(1i64, |n, &d| n.wrapping_mul(d))).collect();
            // As many strides as dimensions, most of the time.
            let strides: Vec<i64> = if strides.len() > shape.len() { strides[..shape.len()].to_vec() } else { strides };
            let strides = if dense || strides.len() < shape.len() { &rows } else { &strides };
            View { class, storage, elements, offset, shape: &shape, strides }.pickle()
        },
    )
}

fn joined(before: &[u8], parts: &[Vec<u8>], after: &[u8]) -> Vec<u8> {
    [before, &parts.concat(), after].concat()
}

/// Values within values, as checkpoints hold them, with memo entries set and read back.
fn value() -> impl Strategy<Value = Vec<u8>> {
    let plain = vec![
        &b"N"[..],
        b"\x88",
        b"K\x05",
        b"G\x3f\xf0\0\0\0\0\0\0",
        b"C\x02ab",
        b"cos\nsystem\n",
        b"ctorch\nbfloat16\n",
        b"]q\0",
        b"}q\x01",
        b"h\0",
        b"h\x01",
    ];
    let leaf = prop_oneof![
        4 => prop::sample::select(plain).prop_map(<[u8]>::to_vec),
        2 => number().prop_map(int),
        2 => prop::sample::select(vec!["a", "swiglu", "release"]).prop_map(text),
        3 => view(),
        1 => opcode(),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let some = || prop::collection::vec(inner.clone(), 0..4);
        let pairs = prop::collection::vec(
            (prop::sample::select(vec!["a", "b", "c"]), inner.clone()).prop_map(|(key, value)| [text(key), value].concat()),
            0..4,
        );
        let calls = vec![
            "cargparse\nNamespace\n",
            "ctorch\nSize\n",
            "ccollections\nOrderedDict\n",
            "cmegatron.core\nKind\n",
            "ctorch._utils\n_rebuild_parameter\n",
            "cos\nsystem\n",
        ];
        prop_oneof![
            some().prop_map(|items| joined(b"](", &items, b"e")),
            some().prop_map(|items| joined(b"(", &items, b"t")),
            pairs.clone().prop_map(|items| joined(b"}(", &items, b"u")),
            (prop::sample::select(calls), some()).prop_map(|(call, args)| joined(&[call.as_bytes(), b"("].concat(), &args, b"tR")),
            pairs.prop_map(|state| joined(b"cargparse\nNamespace\n)R}(", &state, b"ub")),
            inner.clone().prop_map(|value| [b"ctorch._utils\n_rebuild_parameter\n(", &value[..], b"\x88NtR"].concat()),
        ]
    })
}

/// One opcode with its operand, most of them well formed.
fn opcode() -> impl Strategy<Value = Vec<u8>> {
    let plain = b"((((()]}}\x85\x86\x87tldaesu0012N\x88\x89\x8f\x90\x91RRoboQb\x81\x92\x93\x94.";
    let globals = [
        "ccollections\nOrderedDict\n",
        "ctorch\nSize\n",
        "ctorch\nFloatStorage\n",
        "ctorch._utils\n_rebuild_tensor_v2\n",
        "ctorch._utils\n_rebuild_parameter\n",
        "ctorch._utils\n_rebuild_tensor_v3\n",
        "ctorch\nfloat32\n",
        "cargparse\nNamespace\n",
        "cos\nsystem\n",
        "cbuiltins\ngetattr\n",
        "cmegatron.x\nY\n",
        "(iargparse\nNamespace\n",
        "ctorch._tensor\n_rebuild_from_type_v2\n",
        "c_io\nBytesIO\n",
    ];
    prop_oneof![
        8 => prop::sample::select(&plain[..]).prop_map(|b| vec![b]),
        3 => prop::sample::select(globals.to_vec()).prop_map(|g| g.as_bytes().to_vec()),
        3 => (prop::sample::select(&b"qhqh"[..]), 0u8..6).prop_map(|(op, i)| vec![op, i]),
        3 => number().prop_map(int),
        3 => prop::sample::select(vec!["storage", "0", "cpu", "model", "args", "a", "decoder.layers.0.norm.weight"]).prop_map(text),
        3 => view(),
        1 => (prop::sample::select(&b"XBTU\x8c\x8d\x8e\x8b\x8aCjrgpIFLSVPc\x95\x96\x97\x98\x82"[..]), prop::collection::vec(any::<u8>(), 0..12)).prop_map(|(op, rest)| [&[op], &rest[..]].concat()),
        1 => any::<u8>().prop_map(|b| vec![b]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: common::cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes(start in prop::sample::select(vec![&b""[..], b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x80\x05\x95"]), bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(read_bytes(&[start, &bytes].concat()).is_none());
    }

    #[test]
    fn random_pickles(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        read_bytes(&archive(&bytes, &[("0", &[0; 16])]));
    }

    #[test]
    fn mutated_files(which in any::<prop::sample::Index>(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<prop::sample::Index>(), shorten in any::<bool>(), tail in any::<bool>()) {
        let all = goldens();
        let mut bytes = all[which.index(all.len())].clone();
        for (at, value) in changes {
            // The directory at the end and the pickle at the start are where most decisions are.
            let range = bytes.len().min(1200);
            let at = if tail { bytes.len() - 1 - at.index(range) } else { at.index(range) };
            bytes[at] = value;
        }
        if shorten {
            bytes.truncate(cut.index(bytes.len()));
        }
        read_bytes(&bytes);
    }

    #[test]
    fn generated_opcodes(opcodes in prop::collection::vec(opcode(), 0..60), model in any::<bool>()) {
        let body = opcodes.concat();
        let pickle = if model { [&b"}(X\x05\0\0\0model}("[..], &body, b"uu."].concat() } else { [&b"\x80\x02"[..], &body, b"."].concat() };
        read_bytes(&archive(&pickle, &[("0", &[1; 16]), ("1", &[0; 4]), ("2", &[])]));
    }

    #[test]
    fn generated_dicts(views in prop::collection::btree_map(prop::sample::select(vec!["a", "b", "decoder.layers.0.norm.weight", "decoder.layers.1.norm.weight"]), prop_oneof![4 => view().boxed(), 1 => value().boxed()], 0..4), args in value(), nested in any::<bool>()) {
        let items: Vec<(&str, Vec<u8>)> = views.into_iter().collect();
        let pickle = dict(&items);
        let inner = pickle[2..pickle.len() - 1].to_vec();
        let pickle = if nested { dict(&[("args", args), ("model", inner)]) } else { pickle };
        read_bytes(&archive(&pickle, &[("0", &[1; 16]), ("1", &[0; 4]), ("2", &[])]));
    }

    #[test]
    fn generated_archives(names in prop::collection::vec(prop::sample::select(vec!["x/data.pkl", "x/data/0", "y/data.pkl", "x/../a", "x/code/a.py", "x/byteorder", "x/version", "data.pkl", ""]), 0..6), sizes in prop::collection::vec(prop::option::weighted(0.1, any::<u32>()), 6), offsets in prop::collection::vec(prop::option::weighted(0.1, 0u32..400), 6), methods in prop::collection::vec(prop::sample::select(vec![0u16, 0, 0, 0, 8]), 6), flags in prop::collection::vec(prop::sample::select(vec![0u16, 0, 0, 8, 1]), 6)) {
        let pickle = dict(&[("w", FOUR.pickle())]);
        let members: Vec<_> = names.iter().enumerate().map(|(i, name)| {
            let data: &[u8] = if name.ends_with("pkl") { &pickle } else { &[0; 16] };
            common::archive::Member { size: sizes[i], offset: offsets[i], method: methods[i], flags: flags[i], ..common::archive::member(name, data) }
        }).collect();
        read_bytes(&zip(&members));
    }
}

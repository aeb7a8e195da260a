//! SentencePiece models against what SentencePiece itself says of the same strings (data/sentencepiece/make.py).

use std::fs;
use std::io::Read;
use std::path::PathBuf;

use proptest::prelude::*;
use serde::Deserialize;
use terrarium_runtime::{Error, Tokenizer, TokenizerError};

#[derive(Deserialize)]
struct Golden {
    nfkc: bool,
    size: usize,
    bos: i64,
    eos: i64,
    pad: i64,
    unk: i64,
    strings: Vec<(String, Vec<u32>, String)>,
    sequences: Vec<(Vec<u32>, String)>,
}

const MODELS: [&str; 10] = [
    "unigram-plain",
    "unigram-bytes",
    "unigram-nfkc",
    "unigram-nfkc-bytes",
    "bpe-plain",
    "bpe-bytes",
    "bpe-nfkc",
    "bpe-nfkc-bytes-user",
    "bpe-user",
    "bpe-across-blanks",
];

fn data() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/sentencepiece")
}

fn golden(name: &str) -> Golden {
    let text = fs::read_to_string(data().join(format!("{name}.json"))).expect("there");
    serde_json::from_str(&text).expect("golden data")
}

fn varint(mut n: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while n >= 0x80 {
        bytes.push(n as u8 | 0x80);
        n >>= 7;
    }
    bytes.push(n as u8);
    bytes
}

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2][..], &varint(bytes.len()), bytes].concat()
}

/// Writes tokenizer.json of every model for data/sentencepiece/check.py, if asked to.
#[test]
fn written_for_python() {
    let Some(out) = std::env::var_os("TERRARIUM_SENTENCEPIECE_OUT") else { return };
    for name in MODELS {
        let dir = PathBuf::from(&out).join(name);
        fs::create_dir_all(&dir).expect("creates");
        let tokenizer = tokenizer(name);
        tokenizer.save(&dir).expect("saves");
        let strings: Vec<_> = golden(name).strings.into_iter().map(|(text, ..)| text).collect();
        let ids: Vec<_> = strings.iter().map(|text| tokenizer.encode(text, true).expect("encodes")).collect();
        let decoded: Vec<_> = ids.iter().map(|ids| tokenizer.decode(ids, true).expect("decodes")).collect();
        fs::write(dir.join("ids.json"), serde_json::to_string(&(strings, ids, decoded)).expect("JSON")).expect("writes");
    }
}

/// The compiled rules are stored once for all models.
fn charsmap() -> Vec<u8> {
    let file = fs::File::open(data().join("nmt_nfkc.charsmap.gz")).expect("there");
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(file).read_to_end(&mut bytes).expect("gzip");
    bytes
}

fn model(name: &str) -> Vec<u8> {
    let mut bytes = fs::read(data().join(format!("{name}.model"))).expect("there");
    if golden(name).nfkc {
        bytes.extend(field(3, &field(2, &charsmap())));
    }
    bytes
}

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::from_sentencepiece_bytes(&model(name), name).expect("reads")
}

/// Differences that come from the `tokenizers` crate, by model and text. Each is checked to be there still.
const KNOWN: [(&str, &[&str], &str); 4] = [
    (
        "unigram-bytes",
        &["--- ---"],
        "two ways to cut have equal scores: SentencePiece adds them up in 32 bits, the crate in 64, and they round to other sides",
    ),
    (
        "unigram-bytes unigram-nfkc-bytes",
        &["<0x41>", "a<0x41>b"],
        "text that spells a byte piece, of characters that the vocabulary lacks (`4`): the crate finds that piece by its spelling",
    ),
    (
        "bpe-nfkc-bytes-user",
        &["<0x41>", "<0x0A>", "<unk>"],
        "text that is nothing but the spelling of such a piece: the crate takes whole words as they are, which user-defined pieces need",
    ),
    (
        "unigram-nfkc unigram-nfkc-bytes bpe-nfkc bpe-nfkc-bytes-user",
        &["\u{ff21}\u{301}", "z\u{300}\u{323}", "q\u{307}\u{323}", "\u{1e9b}\u{323}", "Vie\u{323}\u{302}t Vie\u{302}\u{323}t"],
        "marks are put in order and composed first; the crate normalises a short character with its marks by the shortest rule",
    ),
];

fn is_known(name: &str, text: &str) -> bool {
    KNOWN.iter().any(|(models, texts, _)| models.split(' ').any(|m| m == name) && texts.contains(&text))
}

/// Text that spells a control piece is that piece, as with every tokenizer.json.
fn spells_control(tokenizer: &Tokenizer, text: &str) -> bool {
    [tokenizer.bos(), tokenizer.eos(), tokenizer.pad()].iter().flatten().any(|&id| text.contains(&tokenizer.token(id).expect("named")))
}

/// Every difference from what SentencePiece gave, and the texts that are known to differ.
fn compare(name: &str, tokenizer: &Tokenizer) -> (Vec<String>, Vec<String>) {
    let golden = golden(name);
    assert!(golden.strings.len() > 200);
    let (mut wrong, mut known) = (Vec::new(), Vec::new());
    for (text, ids, decoded) in &golden.strings {
        let found = tokenizer.encode(text, true).expect("encodes");
        if found != *ids && is_known(name, text) {
            known.push(text.clone());
        } else if found != *ids && !spells_control(tokenizer, text) {
            let spell = |ids: &[u32]| ids.iter().map(|&id| tokenizer.token(id).unwrap_or_default()).collect::<Vec<_>>();
            wrong.push(format!("{name}: {text:?} gives {:?}, expected {:?}", spell(&found), spell(ids)));
        }
        let back = tokenizer.decode(ids, true).expect("decodes");
        if back != *decoded {
            wrong.push(format!("{name}: {ids:?} ({text:?}) decodes to {back:?}, expected {decoded:?}"));
        }
    }
    for (ids, decoded) in &golden.sequences {
        let back = tokenizer.decode(ids, true).expect("decodes");
        // Of bytes that are no UTF-8 SentencePiece shows the characters among them, the crate none.
        let not_utf8 = decoded.contains('\u{FFFD}') && back.matches('\u{FFFD}').count() >= decoded.matches('\u{FFFD}').count();
        if back != *decoded && !not_utf8 {
            wrong.push(format!("{name}: {ids:?} decodes to {back:?}, expected {decoded:?}"));
        }
    }
    (wrong, known)
}

#[test]
fn ids_and_text_are_those_of_sentencepiece() {
    let found: Vec<_> = MODELS.iter().map(|name| compare(name, &tokenizer(name))).collect();
    let wrong: Vec<&String> = found.iter().flat_map(|(wrong, _)| wrong).collect();
    assert!(wrong.is_empty(), "{} differ:\n{wrong:#?}", wrong.len());
    for (_, texts, reason) in KNOWN {
        for text in texts {
            assert!(found.iter().any(|(_, known)| known.iter().any(|k| k == text)), "{text:?} differs no more ({reason})");
        }
    }
}

#[test]
fn sizes_and_special_pieces_are_those_of_the_model() {
    for name in MODELS {
        let (golden, tokenizer) = (golden(name), tokenizer(name));
        let id = |id: Option<u32>| id.map_or(-1, i64::from);
        assert_eq!(tokenizer.vocab_size(), golden.size, "{name}");
        let found = [id(tokenizer.bos()), id(tokenizer.eos()), id(tokenizer.pad()), id(tokenizer.unk())];
        assert_eq!(found, [golden.bos, golden.eos, golden.pad, golden.unk], "{name}");
        if let Some(eos) = tokenizer.eos() {
            assert!(tokenizer.is_special(eos));
            assert_eq!(tokenizer.decode(&[eos], true).expect("decodes"), "");
        }
    }
}

#[test]
fn a_saved_directory_opens_with_the_same_ids() {
    for name in MODELS {
        let dir = tempfile::tempdir().expect("temp");
        let from = tempfile::tempdir().expect("temp");
        fs::write(from.path().join("tokenizer.model"), model(name)).expect("writes");
        let first = Tokenizer::from_dir(from.path()).expect("reads").expect("there");
        first.save(dir.path()).expect("saves");
        let again = Tokenizer::from_dir(dir.path()).expect("reads").expect("there");
        for (text, ..) in golden(name).strings {
            assert_eq!(again.encode(&text, true).expect("encodes"), first.encode(&text, true).expect("encodes"), "{name}: {text:?}");
        }
        assert_eq!((again.bos(), again.eos(), again.pad(), again.unk()), (first.bos(), first.eos(), first.pad(), first.unk()));
    }
}

#[test]
fn a_stream_gives_the_text_of_all_ids() {
    for name in MODELS {
        let tokenizer = tokenizer(name);
        for (text, ids, decoded) in golden(name).strings {
            let mut stream = tokenizer.stream();
            let mut shown: String = ids.iter().map(|&id| stream.push(id).expect("decodes")).collect();
            shown.push_str(&stream.finish().expect("decodes"));
            assert_eq!(shown, decoded, "{name}: {text:?}");
        }
    }
}

#[test]
fn the_model_of_a_directory_is_found() {
    let dir = tempfile::tempdir().expect("temp");
    let place = |name: &str| dir.path().join(name);
    assert!(Tokenizer::from_dir(dir.path()).expect("reads").is_none());
    // As in a Megatron folder.
    fs::write(place("latest_checkpointed_iteration.txt"), "release").expect("writes");
    fs::write(place("mt_nlg_256k.model"), model("bpe-bytes")).expect("writes");
    let found = Tokenizer::from_dir(dir.path()).expect("reads").expect("there");
    assert_eq!((found.bos(), found.eos(), found.unk()), (Some(1), Some(2), Some(0)));
    fs::write(place("other.model"), model("bpe-plain")).expect("writes");
    let error = Tokenizer::from_dir(dir.path()).expect_err("two");
    assert!(
        matches!(&error, Error::Tokenizer(TokenizerError::Several { files, .. }) if files == &["mt_nlg_256k.model", "other.model"]),
        "{error}"
    );
    fs::write(place("tokenizer.model"), model("unigram-nfkc-bytes")).expect("writes");
    fs::write(place("tokenizer_config.json"), r#"{"bos_token": null, "eos_token": "[P]", "chat_template": "t"}"#).expect("writes");
    let found = Tokenizer::from_dir(dir.path()).expect("reads").expect("there");
    assert_eq!((found.bos(), found.eos(), found.pad()), (Some(1), Some(3), Some(3)), "the configuration goes first");
    assert_eq!(found.chat(&[], false).expect("renders"), "t");
}

#[test]
fn other_kinds_and_damaged_files_say_what_is_wrong() {
    let read = |bytes: &[u8]| Tokenizer::from_sentencepiece_bytes(bytes, "x.model").expect_err("refused");
    for kind in ["word", "char"] {
        let error = read(&fs::read(data().join(format!("{kind}.model"))).expect("there"));
        assert!(matches!(error, Error::Tokenizer(TokenizerError::Unsupported { .. })), "{error}");
        assert!(error.to_string().contains(kind) && error.to_string().contains("tokenizer.json"), "{error}");
    }
    let piece = |text: &[u8], kind: u8| field(1, &[field(1, text), vec![0x18, kind]].concat());
    let unknown = piece(b"<unk>", 2);
    let cases: [(Vec<u8>, &str); 13] = [
        (vec![], "no pieces"),
        (b"\nIQ== 0".to_vec(), "no SentencePiece model"),
        (vec![0x0A, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F], "are left"),
        (vec![0x80; 11], "64 bits"),
        (piece(b"a", 1), "type unknown"),
        ([unknown.clone(), piece(b"a", 1), piece(b"a", 1)].concat(), "pieces 1 and 2 are both `a`"),
        ([unknown.clone(), piece(b"", 1)].concat(), "piece 1 is empty"),
        ([unknown.clone(), piece(&[b'a'; 100_000], 1)].concat(), "piece 1 has 100000 bytes"),
        ([unknown.clone(), piece(b"\xFF", 1)].concat(), "UTF-8"),
        ([unknown.clone(), piece(b"a", 9)].concat(), "its type is 9"),
        ([unknown.clone(), piece(b"<0x0A>", 6)].concat(), "byte_fallback is off"),
        ([unknown.clone(), piece(b"a", 1), field(2, &[0x18, 2]), field(2, &[0x18, 7])].concat(), "model_type is 7"),
        ([unknown, field(3, &field(2, &[4, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF]))].concat(), "leads to unit"),
    ];
    for (bytes, expected) in cases {
        let error = read(&bytes).to_string();
        assert!(error.contains("x.model") && error.contains(expected), "{error} lacks {expected}");
    }
    let whole = model("unigram-nfkc");
    for at in (1..whole.len()).step_by(997) {
        let _ = Tokenizer::from_sentencepiece_bytes(&whole[..at], "x.model");
    }
    let error = Tokenizer::from_sentencepiece(&data().join("none.model")).expect_err("absent").to_string();
    assert!(error.contains("none.model"), "{error}");
}

/// Reads and, if that works, encodes and decodes: whatever the bytes, no panic.
fn try_bytes(bytes: &[u8]) {
    if let Ok(tokenizer) = Tokenizer::from_sentencepiece_bytes(bytes, "x.model") {
        for text in ["", "To be, or\tnot \u{ff21}\u{301} <sep> \u{1F600}", "\u{ac00}\u{ff21}\u{fdfa}\u{2581}"] {
            if let Ok(ids) = tokenizer.encode(text, true) {
                let _ = tokenizer.decode(&ids, true);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        try_bytes(&bytes);
    }

    #[test]
    fn mutated_models_are_refused_or_work(name in prop::sample::select(MODELS.to_vec()), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), keep in 0.5f64..1.5) {
        let mut bytes = fs::read(data().join(format!("{name}.model"))).expect("there");
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate((bytes.len() as f64 * keep) as usize);
        try_bytes(&bytes);
    }

    #[test]
    fn mutated_rules_are_refused_or_work(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40), start in 0usize..2000) {
        let mut rules = charsmap();
        let end = rules.len();
        for (at, value) in changes {
            // The beginning is walked by every text.
            let at = if start % 2 == 0 { start + at.index(2000) } else { at.index(end) };
            rules[at] = value;
        }
        let mut bytes = fs::read(data().join("unigram-nfkc.model")).expect("there");
        bytes.extend(field(3, &field(2, &rules)));
        try_bytes(&bytes);
    }
}

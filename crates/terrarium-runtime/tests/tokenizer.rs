//! Tokenizers: training, streaming, special tokens, chat templates.

mod common;

use std::fs;

use terrarium_runtime::{Message, Tokenizer};

const TEXT: &str = "The quick brown fox jumps over the lazy dog. Größe, naïveté, 東京, 👩‍🚀! The quick brown fox sleeps.\n";

fn trained() -> Tokenizer {
    Tokenizer::train_bpe((0..50).map(|_| TEXT.to_string()), 320, &["<|endoftext|>", "<|user|>"]).expect("trains")
}

fn user(text: &str) -> Vec<Message> {
    vec![Message { role: "user".into(), content: text.into() }]
}

#[test]
fn a_trained_tokenizer_gives_every_text_back() {
    let tokenizer = trained();
    assert_eq!(tokenizer.vocab_size(), 320);
    assert_eq!((tokenizer.id("<|endoftext|>"), tokenizer.eos(), tokenizer.bos()), (Some(0), Some(0), Some(0)));
    for text in [TEXT, "", " two  blanks", "ελληνικά \u{0} \t\r\n", "The fox"] {
        let ids = tokenizer.encode(text, true).expect("encodes");
        assert_eq!(tokenizer.decode(&ids, true).expect("decodes"), text);
        assert_eq!(tokenizer.encode_batch(&[text], true).expect("encodes"), [ids]);
    }
    assert!(tokenizer.encode("The quick brown fox", true).expect("encodes").len() < 8, "merges were learnt");
    assert_eq!(tokenizer.encode("a<|user|>", true).expect("encodes")[1], 1);
    assert!(tokenizer.is_special(1) && !tokenizer.is_special(2));
    let error = Tokenizer::train_bpe(std::iter::empty(), 100, &[]).expect_err("too small").to_string();
    assert!(error.contains("256 bytes"), "{error}");
}

#[test]
fn training_is_deterministic_and_files_come_back() {
    let dir = tempfile::tempdir().expect("temp");
    let mut tokenizer = trained();
    tokenizer.set_chat_template("{{ messages[0].content }}");
    tokenizer.save(dir.path()).expect("saves");
    let again = tempfile::tempdir().expect("temp");
    trained().save(again.path()).expect("saves");
    assert_eq!(fs::read(dir.path().join("tokenizer.json")).expect("there"), fs::read(again.path().join("tokenizer.json")).expect("there"));
    let found = Tokenizer::from_dir(dir.path()).expect("reads").expect("there");
    assert_eq!(found.encode(TEXT, true).expect("encodes"), tokenizer.encode(TEXT, true).expect("encodes"));
    assert_eq!((found.eos(), found.pad(), found.unk()), (Some(0), Some(0), None));
    assert_eq!(found.chat(&user("hi"), true).expect("renders"), "hi");
}

#[test]
fn a_stream_never_shows_half_a_character() {
    let tokenizer = trained();
    for text in [TEXT, "👩‍🚀👩‍🚀", "zażółć gęślą jaźń", "日本語のテキスト"] {
        let ids = tokenizer.encode(text, true).expect("encodes");
        let mut stream = tokenizer.stream();
        let mut shown = String::new();
        for id in ids {
            let piece = stream.push(id).expect("decodes");
            assert!(!piece.contains('\u{FFFD}'), "{piece:?} in {text}");
            shown.push_str(&piece);
        }
        shown.push_str(&stream.finish().expect("decodes"));
        assert_eq!(shown, text);
    }
    // A text that ends inside a character shows what it is at the end, and not before.
    let ids = tokenizer.encode("é", true).expect("encodes");
    let lone = tokenizer.id("Ã").expect("a byte of é");
    let mut stream = tokenizer.stream();
    if ids.len() == 2 {
        assert_eq!(stream.push(ids[0]).expect("decodes"), "");
        assert_eq!(stream.finish().expect("decodes"), "\u{FFFD}");
    } else {
        assert_eq!(stream.push(lone).expect("decodes"), "");
    }
}

#[test]
fn a_long_stream_is_the_whole_text_with_a_real_tokenizer() {
    let Some(dir) = common::stories() else { return };
    let tokenizer = Tokenizer::from_dir(&dir).expect("reads").expect("there");
    let golden: serde_json::Value = serde_json::from_str(&fs::read_to_string(dir.join("golden.json")).expect("there")).expect("JSON");
    let ids: Vec<u32> = serde_json::from_value(golden["greedy_from_bos_ids"].clone()).expect("ids");
    let ids = [ids.as_slice(), ids.as_slice(), ids.as_slice()].concat();
    let mut stream = tokenizer.stream();
    let mut text: String = ids.iter().map(|&id| stream.push(id).expect("decodes")).collect();
    text.push_str(&stream.finish().expect("decodes"));
    assert_eq!(text, tokenizer.decode(&ids, true).expect("decodes"));
}

#[test]
fn chat_templates_run_as_in_transformers() {
    let mut tokenizer = trained();
    assert!(tokenizer.chat(&user("hi"), true).expect_err("none").to_string().contains("no chat template"));
    let template = "{%- for message in messages %}\n    {%- if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}\n\
        {{- '<|im_start|>' + message.role + '\\n' + message['content'].strip() + '<|im_end|>\\n' }}\n{%- endfor %}\n\
        {%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n";
    tokenizer.set_chat_template(template);
    let rendered = tokenizer.chat(&user("  <Hi> & \"you\"  "), true).expect("renders");
    assert_eq!(rendered, "<|im_start|>user\n<Hi> & \"you\"<|im_end|>\n<|im_start|>assistant\n");
    let error = tokenizer.chat(&[Message { role: "tool".into(), content: String::new() }], false).expect_err("raised").to_string();
    assert!(error.contains("unknown role"), "{error}");
    tokenizer.set_chat_template("{{ bos_token }}{{ {'a': [1, '<']} | tojson }}{% if tools %}tools{% endif %}");
    assert_eq!(tokenizer.chat(&[], false).expect("renders"), "<|endoftext|>{\"a\": [1, \"<\"]}");
    tokenizer.set_chat_template("{% for %}");
    assert!(tokenizer.chat(&[], false).is_err());
}

#[test]
fn templates_and_special_tokens_are_found_where_they_are_kept() {
    let dir = tempfile::tempdir().expect("temp");
    trained().save(dir.path()).expect("saves");
    let open = || Tokenizer::from_dir(dir.path()).expect("reads").expect("there");
    let config = r#"{"eos_token": {"content": "<|user|>"}, "bos_token": null, "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    fs::write(dir.path().join("tokenizer_config.json"), config).expect("writes");
    assert_eq!((open().eos(), open().bos()), (Some(1), None));
    assert_eq!(open().chat(&[], false).expect("renders"), "d");
    fs::write(dir.path().join("special_tokens_map.json"), r#"{"bos_token": "<|endoftext|>"}"#).expect("writes");
    fs::write(dir.path().join("chat_template.jinja"), "file").expect("writes");
    assert_eq!(open().bos(), Some(0));
    assert_eq!(open().chat(&[], false).expect("renders"), "file");
    fs::write(dir.path().join("tokenizer_config.json"), "{").expect("writes");
    assert!(Tokenizer::from_dir(dir.path()).expect_err("damaged").to_string().contains("tokenizer_config.json"));
    fs::write(dir.path().join("tokenizer.json"), "{}").expect("writes");
    assert!(Tokenizer::from_dir(dir.path()).expect_err("damaged").to_string().contains("not a tokenizer"));
}

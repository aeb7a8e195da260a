//! Documents of standard tasks in Parquet: from a hub, its cache, a copy of its repositories and single files.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::common::{Ran, run, terrarium, text, tiny_model};
use crate::hub_server::Hub;

const TASKS: &str = "lambada_openai,hellaswag,piqa,arc_easy,arc_challenge,winogrande,openbookqa,boolq,race,pubmedqa,truthfulqa_mc1,truthfulqa_mc2,\
    nq_open,triviaqa,squadv2,mmlu_anatomy,mmlu_astronomy,mmlu_high_school_psychology";

fn fixtures(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/datasets").join(name)
}

/// Serves all data sets of the fixtures.
fn hub() -> Hub {
    let folders = |dir: &Path| std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    let sets: Vec<(String, PathBuf)> = folders(&fixtures("hub"))
        .iter()
        .flat_map(|org| folders(org).into_iter().map(|set| (format!("datasets/{}/{}", name(org), name(&set)), set)).collect::<Vec<_>>())
        .collect();
    Hub::of(&sets.iter().map(|(name, path)| (name.as_str(), path.as_path())).collect::<Vec<_>>())
}

/// `terrarium eval` on the tiny model, with this hub and a cache of its own.
fn eval(cache: &TempDir, endpoint: &str, more: &[&str]) -> Ran {
    let common = ["eval", "--model", text(tiny_model()), "--device", "cpu", "--json"];
    terrarium(&[&common[..], more].concat()).env("HF_HOME", cache.path()).env("HF_ENDPOINT", endpoint).output().unwrap().into()
}

fn compared(results: &Value) -> Vec<&Value> {
    ["results", "n-shot", "n-samples", "versions"].map(|key| &results[key]).to_vec()
}

#[test]
fn all_tasks_are_the_same_from_lines_a_copy_the_hub_and_its_cache() {
    let (hub, cache, dir) = (hub(), TempDir::new().unwrap(), TempDir::new().unwrap());
    let asked = |name: &str, more: &[&str]| {
        let out = dir.path().join(name);
        let ran = eval(&cache, &hub.endpoint(), &[&["--tasks", TASKS, "--num-fewshot", "1", "--out", text(&out)], more].concat()).ok();
        let samples: Vec<String> =
            TASKS.split(',').map(|task| std::fs::read_to_string(out.join(format!("samples_{task}.jsonl"))).unwrap()).collect();
        (ran.json().remove(0), samples, ran.err)
    };
    let (lines, samples, _) = asked("lines", &["--data", text(&fixtures("lines"))]);
    let (copy, of_copy, _) = asked("copy", &["--data", text(&fixtures("hub"))]);
    assert_eq!((compared(&copy), of_copy), (compared(&lines), samples.clone()));
    assert_eq!(hub.sent(), 0, "with --data the hub is not asked");
    let (fetched, of_hub, said) = asked("hub", &[]);
    assert_eq!((compared(&fetched), of_hub), (compared(&lines), samples.clone()));
    assert!(said.contains("documents of allenai/ai2_arc, commit 0123456789abcdef"), "{said}");
    assert!(said.contains("ARC-Easy/test/0001.parquet: "), "downloads are told: {said}");
    assert_eq!(fetched["config"]["data"]["cais/mmlu"], "0123456789abcdef0123456789abcdef01234567");
    let sent = hub.sent();
    assert!(sent > 0);
    let (cached, of_cache, _) = asked("cached", &["--offline"]);
    assert_eq!((compared(&cached), of_cache), (compared(&lines), samples));
    assert_eq!(hub.sent(), sent);

    // Answers are to the documents of a commit; other data sets may be added.
    let out = dir.path().join("hub");
    let more = ["--tasks", "piqa", "--out", text(&out), "--resume", "--num-fewshot", "1"];
    eval(&cache, &hub.endpoint(), &more).ok();
    let record = out.join("eval.json");
    let kept = std::fs::read_to_string(&record).unwrap();
    assert!(kept.contains("allenai/ai2_arc"), "{kept}");
    std::fs::write(&record, kept.replace("0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef")).unwrap();
    eval(&cache, &hub.endpoint(), &more).fails(2, &["cannot resume", "data.baber/piqa", "89abcdef"]);
}

#[test]
fn one_file_holds_the_documents_of_one_task() {
    let cache = TempDir::new().unwrap();
    let file = fixtures("hub/allenai/ai2_arc/ARC-Easy/test/0001.parquet");
    let asked = |more: &[&str]| eval(&cache, "http://127.0.0.1:9", &[&["--data", text(&file)], more].concat());
    assert_eq!(asked(&["--tasks", "arc_easy"]).ok().json()[0]["n-samples"]["arc_easy"]["effective"], 4);
    asked(&["--tasks", "arc_easy,piqa"]).fails(2, &["0001.parquet", "2 tasks"]);
    asked(&["--tasks", "arc_easy", "--num-fewshot", "2"]).fails(2, &["0001.parquet", "examples"]);
    asked(&["--tasks", "piqa"]).fails(1, &["document 1: no usable `label`; its fields are id, question, choices, answerKey"]);
    asked(&["--tasks", "nothing"]).fails(2, &["nothing", "hellaswag"]);
}

#[test]
fn without_a_network_a_copy_or_a_whole_file_it_is_said_what_is_wrong() {
    let (cache, dir) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let nobody = "http://127.0.0.1:9";
    eval(&cache, nobody, &["--tasks", "arc_easy"]).fails(1, &["allenai/ai2_arc", nobody, "HF_ENDPOINT"]);
    eval(&cache, nobody, &["--tasks", "arc_easy", "--offline"]).fails(1, &["ARC-Easy/test of the data set allenai/ai2_arc", "--offline"]);
    let other = Hub::of(&[("datasets/baber/piqa", &fixtures("hub/allenai/openbookqa"))]);
    eval(&cache, &other.endpoint(), &["--tasks", "piqa"]).fails(1, &["baber/piqa", "default/validation", "main (test, train)"]);
    eval(&cache, &other.endpoint(), &["--tasks", "arc_easy"]).fails(1, &["/datasets/allenai/ai2_arc"]);

    let whole = std::fs::read(fixtures("hub/allenai/ai2_arc/ARC-Easy/test/0001.parquet")).unwrap();
    let path = dir.path().join("arc_easy.parquet");
    let asked = || run(&["eval", "--model", text(tiny_model()), "--device", "cpu", "--tasks", "arc_easy", "--data", text(dir.path())]);
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    asked().fails(1, &["arc_easy.parquet", "cut short", "hint: "]);
    // Bytes in which the reader's own assertions fail are told like any others.
    let mut told = 0;
    for at in (8..whole.len()).step_by(150) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0xff;
        std::fs::write(&path, damaged).unwrap();
        let ran = asked();
        if ran.code != Some(0) {
            ran.fails(1, &["arc_easy.parquet"]);
            told += 1;
        }
    }
    assert!(told > 3, "{told}");
    std::fs::copy(fixtures("odd/brotli.parquet"), &path).unwrap();
    asked().fails(1, &["compressed with BROTLI", "Snappy, gzip, Zstandard", "hint: "]);
}

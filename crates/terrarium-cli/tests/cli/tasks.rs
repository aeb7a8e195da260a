//! Standard tasks: asked, stopped half-way, resumed.

use std::fmt::Write;
use std::path::Path;
use std::process::Stdio;

use tempfile::TempDir;

use crate::common::{Ran, run, signal, terrarium, text, tiny_model, wait_for};

/// A few documents of three tasks.
fn data(dir: &Path) {
    let (mut lambada, mut arc, mut shots) = (String::new(), String::new(), String::new());
    for i in 0..40 {
        writeln!(lambada, r#"{{"text": "The fox saw the sea on day {i}. It was cold, and the wind sang."}}"#).unwrap();
        let document = format!(
            r#"{{"question": "Who saw {i} bells?", "choices": {{"text": ["the fox", "an owl {i}"], "label": ["A", "B"]}}, "answerKey": "{}"}}"#,
            ["A", "B"][i % 2]
        );
        writeln!(arc, "{document}").unwrap();
        writeln!(shots, "{document}").unwrap();
    }
    std::fs::write(dir.join("lambada_openai.jsonl"), lambada).unwrap();
    std::fs::write(dir.join("arc_easy.jsonl"), arc).unwrap();
    std::fs::write(dir.join("arc_easy.train.jsonl"), shots).unwrap();
    std::fs::create_dir_all(dir.join("mmlu/test")).unwrap();
    std::fs::write(dir.join("mmlu/test/art_test.csv"), "question,choice0,choice1,choice2,choice3,answer\nWhy?,a,b,c,d,1\n").unwrap();
}

#[test]
fn tasks_are_asked_and_go_on_where_they_stopped() {
    let dir = TempDir::new().unwrap();
    data(dir.path());
    let model = text(tiny_model());
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let common =
        ["eval", "--model", model, "--data", text(dir.path()), "--device", "cpu", "--json", "--tasks", "lambada_openai,arc_easy,mmlu"];
    let asked = |out: &Path, more: &[&str]| run(&[&common[..], &["--out", text(out)], more].concat());
    let results = asked(&whole, &[]).ok().json().remove(0);
    let lambada = &results["results"]["lambada_openai"];
    assert!(lambada["perplexity,none"].as_f64().unwrap() > 1.0 && lambada["acc,none"].as_f64().is_some(), "{results}");
    assert!(results["results"]["arc_easy"]["acc_norm_stderr,none"].as_f64().is_some(), "{results}");
    assert_eq!(results["n-samples"]["arc_easy"]["effective"], 40);
    assert_eq!(results["group_subtasks"]["mmlu"][0], "mmlu_art");
    assert_eq!(results["results"]["arc_easy"]["sample_len"], 40);
    assert!(results["groups"]["mmlu"]["acc,none"].as_f64().is_some());

    // A part, a line cut short, and the rest.
    asked(&parts, &["--limit", "7"]).ok();
    let samples = parts.join("samples_arc_easy.jsonl");
    let lines = std::fs::read_to_string(&samples).unwrap();
    assert_eq!(lines.lines().count(), 7);
    std::fs::write(&samples, format!("{lines}{{\"doc_id\": 7, \"tar")).unwrap();
    asked(&parts, &[]).fails(2, &["--resume"]);
    asked(&parts, &["--resume", "--max-length", "64"]).fails(2, &["max_length (null then, 64 now)"]);
    let resumed = asked(&parts, &["--resume"]).ok().json().remove(0);
    assert_eq!(std::fs::read_to_string(&samples).unwrap().lines().count(), 40);
    // To the last bit: what is asked together is asked again together.
    for key in ["results", "groups", "n-samples"] {
        assert_eq!(resumed[key], results[key]);
    }
    for name in ["samples_arc_easy.jsonl", "samples_lambada_openai.jsonl"] {
        assert_eq!(std::fs::read_to_string(parts.join(name)).unwrap(), std::fs::read_to_string(whole.join(name)).unwrap());
    }
    assert!(parts.join("results.json").exists());
    // A part of what is answered costs none of it.
    assert_eq!(asked(&parts, &["--resume", "--limit", "3"]).ok().json()[0]["results"]["arc_easy"]["sample_len"], 3);
    assert_eq!(std::fs::read_to_string(&samples).unwrap().lines().count(), 40);
}

#[test]
fn examples_stand_before_questions_and_mistakes_are_named() {
    let dir = TempDir::new().unwrap();
    data(dir.path());
    let common = ["eval", "--model", text(tiny_model()), "--data", text(dir.path()), "--device", "cpu"];
    let asked = |more: &[&str]| run(&[&common[..], more].concat());
    let ran = asked(&["--tasks", "arc_easy", "--num-fewshot", "2", "--limit", "4"]).ok();
    assert!(ran.out.contains("arc_easy") && ran.out.contains("acc_norm") && ran.out.contains("    2 "), "{ran:#?}");
    asked(&["--tasks", "nothing"]).fails(2, &["nothing", "hellaswag"]);
    asked(&["--tasks", "piqa"]).fails(2, &["piqa.jsonl", "hint"]);
    asked(&["--tasks", "mmlu", "--num-fewshot", "5"]).fails(2, &["5 examples", "there are 0"]);
    std::fs::write(dir.path().join("winogrande.jsonl"), "{\"sentence\": \"no gap\"}\n").unwrap();
    asked(&["--tasks", "winogrande"]).fails(1, &["winogrande.jsonl, document 1", "sentence"]);
}

#[test]
fn interrupted_tasks_go_on() {
    let dir = TempDir::new().unwrap();
    let document =
        |i: usize| format!(r#"{{"passage": "Bell {i} rang.", "question": "did bell {} ring", "label": {}}}"#, i / 2 * 2, 1 - i % 2);
    let lines: String = (0..2000).map(|i| document(i) + "\n").collect();
    std::fs::write(dir.path().join("boolq.jsonl"), lines).unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let common = ["eval", "--model", text(tiny_model()), "--data", text(dir.path()), "--device", "cpu", "--tasks", "boolq", "--json"];
    let asked = |out: &Path, more: &[&str]| run(&[&common[..], &["--out", text(out)], more].concat());

    let mut first = terrarium(&[&common[..], &["--out", text(&parts)]].concat());
    let child = first.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let samples = parts.join("samples_boolq.jsonl");
    wait_for("answers", || std::fs::metadata(&samples).is_ok_and(|file| file.len() > 0));
    signal(&child, "INT");
    let ran: Ran = child.wait_with_output().unwrap().into();
    ran.fails(130, &["stopped after", "of 2000 questions", "--resume"]);
    assert!(!parts.join("results.json").exists());
    let results = |ran: Ran| {
        let mut results = ran.ok().json().remove(0);
        // The one thing that differs between two runs.
        results.as_object_mut().unwrap().remove("total_evaluation_time_seconds").unwrap();
        results
    };
    assert_eq!(results(asked(&parts, &["--resume"])), results(asked(&whole, &[])));
    assert_eq!(std::fs::read_to_string(&samples).unwrap(), std::fs::read_to_string(whole.join("samples_boolq.jsonl")).unwrap());
}

#[test]
fn every_form_of_task_is_asked() {
    // One document of each task would do; these are what the comparison with the harness asks.
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/eval");
    let out = TempDir::new().unwrap();
    let names = "race,pubmedqa,nq_open,triviaqa,squadv2";
    let asked =
        ["eval", "--model", text(tiny_model()), "--data", text(&data), "--device", "cpu", "--json", "--tasks", names, "--limit", "4"];
    let results = run(&[&asked[..], &["--num-fewshot", "1", "--out", text(out.path())]].concat()).ok().json().remove(0);
    for (task, metric) in [("race", "acc,none"), ("nq_open", "exact_match,remove_whitespace"), ("squadv2", "best_f1,none")] {
        let value = results["results"][task][metric].as_f64();
        assert!(value.is_some_and(|value| (0.0..=100.0).contains(&value)), "{task}: {results}");
    }
    assert_eq!(results["results"]["squadv2"]["f1_stderr,none"], "N/A");
    let samples = std::fs::read_to_string(out.path().join("samples_squadv2.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(samples.lines().next().unwrap()).unwrap();
    assert!(first["resps"][0].is_string() && first["resps"][1][0].as_f64().is_some_and(|sum| sum < 0.0), "{first}");
    // There is no room for an answer of 256 tokens.
    run(&[&asked[..], &["--max-length", "256"]].concat()).fails(2, &["answers of 256 tokens", "--max-length"]);
}

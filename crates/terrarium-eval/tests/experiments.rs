//! Smoke sizes of all experiments: they run, they resume, and the models learn.

use std::fs::File;
use std::path::Path;

use serde_json::Value;
use terrarium_eval::{Event, Options, Outcome, Recipe, Summary, Watch, run};
use terrarium_kernels::backend::DeviceSpec;
use terrarium_train::StopFlag;

fn options(name: &str, dir: &Path, set: &[&str]) -> Options {
    let set: Vec<String> = set.iter().map(ToString::to_string).collect();
    let recipe = Recipe::open(name, true, &set).unwrap();
    Options { recipe, out_dir: dir.to_path_buf(), resume: false, device: DeviceSpec::Cpu, stop: StopFlag::new() }
}

fn finish(options: &Options) -> Summary {
    match run(options, &mut ()).unwrap() {
        Outcome::Finished(summary) => *summary,
        other => panic!("{other:?}"),
    }
}

fn number(cell: &serde_json::Map<String, Value>, key: &str) -> f64 {
    cell.get(key).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {key} in {cell:?}"))
}

/// Everything but what a clock says.
fn timeless(dir: &Path) -> Vec<Value> {
    let report: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("report.json")).unwrap()).unwrap();
    let mut cells = report["cells"].as_array().unwrap().clone();
    for cell in &mut cells {
        for key in ["seconds", "tokens_per_s", "flop_per_s", "utilisation", "memory_bytes"] {
            cell.as_object_mut().unwrap().remove(key);
        }
    }
    cells
}

/// What a report says of how busy the device was: speeds that fit one another, and steps whose parts add up.
fn busy(dir: &Path, summary: &Summary) {
    let report: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("report.json")).unwrap()).unwrap();
    let ceiling = report["machine"]["matmul_tflops"].as_f64().unwrap() * 1e12;
    assert!(ceiling > 1e8, "{}", report["machine"]);
    for cell in &summary.report.cells {
        let [speed, share] = ["flop_per_s", "utilisation"].map(|key| number(cell, key));
        assert!((share / (speed / ceiling) - 1.0).abs() < 1e-6 && share > 0.0, "{cell:?}");
        // The same arithmetic per token, the warm-up left out or not.
        let whole = number(cell, "flop") / number(cell, "tokens");
        assert!((speed / number(cell, "tokens_per_s") / whole - 1.0).abs() < 0.05, "{cell:?}");
        assert!(number(cell, "memory_bytes") > 1e6, "{cell:?}");
    }
    let steps = report["steps"].as_array().unwrap();
    assert_eq!(steps.len(), std::fs::read_dir(dir.join("steps")).unwrap().count());
    for step in steps {
        let (name, step) = (step["of"].as_str().unwrap(), &step["step"]);
        let parts = step["shares"].as_array().unwrap();
        let of = |op: &str| parts.iter().filter(|part| part["op"] == op).count();
        let sum: f64 = parts.iter().map(|part| part["ms"].as_f64().unwrap_or_else(|| panic!("{name}: {part}"))).sum();
        let rest = step["other_ms"].as_f64().unwrap();
        assert!((sum + rest - step["ms"].as_f64().unwrap()).abs() < 1e-6, "{name}: {sum} + {rest} of {}", step["ms"]);
        assert!(of("linear") > 1 && of("cross_entropy") == 1 && of("adamw") == 1 && of("gradient_norm") == 1, "{name}: {parts:?}");
        assert_eq!(
            (of("ssd") > 0, of("selective_scan") > 0),
            (name.contains("Mamba-2") || name.contains("Hybrid"), name.contains("Mamba N")),
            "{name}"
        );
    }
    let page = std::fs::read_to_string(dir.join("report.md")).unwrap();
    assert!(
        page.contains("## One training step") && page.contains("| of a product |") && page.contains("TFLOP/s on this device"),
        "{page}"
    );
}

#[test]
fn mqar_is_learnt_by_every_architecture() {
    let dir = tempfile::tempdir().unwrap();
    let summary = finish(&options("mqar", dir.path(), &[]));
    assert_eq!(summary.report.cells.len(), 4);
    for cell in &summary.report.cells {
        // Chance is one in twenty values; who has learnt which tokens are values of this row is right half the time.
        let attention = cell["pattern"].as_str().unwrap().contains('*');
        assert!(number(cell, "accuracy, 2 pairs") > if attention { 0.6 } else { 0.3 }, "{cell:?}");
        assert!(number(cell, "loss") < 2.0, "{cell:?}");
    }
    for name in ["config.json", "report.md", "report.json", "table.csv", "table.md", "cells.csv", "figure.svg", "figure.png"] {
        assert!(dir.path().join(name).metadata().unwrap().len() > 50, "{name}");
    }
    let logs = std::fs::read_dir(dir.path().join("logs")).unwrap().count();
    assert_eq!(logs, 4);
    busy(dir.path(), &summary);
    let page = std::fs::read_to_string(dir.path().join("report.md")).unwrap();
    assert!(page.contains("Verdict: ") && page.contains("| Mamba-2 N=32 |"), "{page}");
}

#[test]
fn copying_is_learnt_best_with_attention() {
    let dir = tempfile::tempdir().unwrap();
    let summary = finish(&options("copy", dir.path(), &[]));
    for cell in &summary.report.cells {
        // Chance is one in eight.
        let limit = if cell["pattern"].as_str().unwrap().contains('*') { 0.5 } else { 0.2 };
        assert!(number(cell, "letters, length 6") > limit, "{cell:?}");
    }
}

#[test]
fn phonebooks_teach_what_numbers_look_like() {
    let dir = tempfile::tempdir().unwrap();
    let summary = finish(&options("phonebook", dir.path(), &[]));
    for cell in &summary.report.cells {
        // Two tokens of six are always the same, the others one of hundreds.
        assert!(number(cell, "loss") < 0.85 * number(cell, "first_loss"), "{cell:?}");
    }
}

#[test]
fn text_is_learnt_by_every_mix_and_at_every_size() {
    let dir = tempfile::tempdir().unwrap();
    for (name, cells) in [("layer-mix", 4), ("scaling", 8)] {
        let summary = finish(&options(name, &dir.path().join(name), &[]));
        assert_eq!(summary.report.cells.len(), cells);
        for cell in &summary.report.cells {
            // A new model guesses among 256 bytes, of which the text has some thirty.
            assert!(number(cell, "first_loss") > 5.0 && number(cell, "loss") < 3.1, "{cell:?}");
            assert_eq!(number(cell, "tokens"), (60 * 8 * 48) as f64);
        }
        let absent = run(&options(name, &dir.path().join("absent"), &["data=/nowhere.txt"]), &mut ()).unwrap_err();
        assert!(absent.to_string().contains("/nowhere.txt") && !dir.path().join("absent").exists(), "{absent}");
    }
    let text = dir.path().join("text.txt");
    std::fs::write(&text, "abcdefgh ".repeat(400)).unwrap();
    let own = format!("data={}", text.display());
    let summary = finish(&options("layer-mix", &dir.path().join("own"), &[&own, "attention_layers=[1]", "training.steps=40"]));
    assert!(number(&summary.report.cells[0], "loss") < 1.0, "{:?}", summary.report.cells);
}

#[test]
fn both_precisions_learn_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let summary = finish(&options("precision", dir.path(), &[]));
    assert_eq!(summary.report.cells.len(), 4);
    for pair in summary.report.cells.chunks(2) {
        let [wide, narrow] = [&pair[0], &pair[1]];
        assert_eq!((wide["precision"].as_str(), narrow["precision"].as_str()), (Some("f32"), Some("bf16")));
        assert_eq!(wide["seed"], narrow["seed"]);
        // Rounding shows, and costs little.
        assert!(number(wide, "loss") != number(narrow, "loss") && number(wide, "loss") < 3.1, "{wide:?}");
        assert!((number(wide, "loss") - number(narrow, "loss")).abs() < 0.1, "{wide:?} {narrow:?}");
    }
    let both = run(&options("precision", &dir.path().join("both"), &["training.precision=f32"]), &mut ()).unwrap_err();
    assert!(both.to_string().contains("training.precision"), "{both}");
}

#[test]
fn models_go_on_at_longer_lengths() {
    let dir = tempfile::tempdir().unwrap();
    let summary = finish(&options("long-context", &dir.path().join("turned"), &[]));
    assert_eq!((summary.report.cells.len(), summary.report.table.rows.len()), (3, 9));
    for cell in &summary.report.cells {
        let losses = [256, 512, 1024].map(|after| number(cell, &format!("loss at 0 to 256, after {after}")));
        // The text goes on being learnt at other lengths; a new model guesses among 256 bytes and a thousand words.
        assert!(losses[0] < 3.1 && losses[1] < losses[0] + 0.05 && losses[2] < losses[1] + 0.05, "{losses:?} {cell:?}");
        assert!(losses[2] < losses[0], "{losses:?}");
        assert!(number(cell, "loss at 512 to 1024, after 1024") < 3.1, "{cell:?}");
        for (task, length) in [("phonebook", 256), ("phonebook", 1024), ("needles", 256), ("needles", 1024)] {
            let share = number(cell, &format!("{task} of {length}, after 1024"));
            assert!((0.0..=1.0).contains(&share), "{share}");
        }
        assert_eq!(number(cell, "steps"), 120.0);
    }
    // Another base of rotary positions is felt where there are such positions, from its stage on.
    let kept = finish(&options("long-context", &dir.path().join("kept"), &["continuation.1.rotary_base=null"]));
    for (turned, kept) in summary.report.cells.iter().zip(&kept.report.cells) {
        let same = |after: usize| {
            let key = format!("loss at 0 to 256, after {after}");
            number(turned, &key) == number(kept, &key)
        };
        assert!(same(512), "{turned:?}");
        assert_eq!(same(1024), turned["architecture"] != "Transformer", "{turned:?}");
    }
    let error = |set: &str| Recipe::open("long-context", true, &[set.to_string()]).and_then(|recipe| recipe.check()).unwrap_err();
    assert!(error("continuation.0.lenght=5").to_string().contains("lenght") && error("continuation.0.lenght=5").is_usage());
    assert!(error("continuation.0.length=5").to_string().contains("continuation"));
}

#[test]
fn everything_is_timed_and_right() {
    let dir = tempfile::tempdir().unwrap();
    let summary = finish(&options("speed", dir.path(), &[]));
    let cells = &summary.report.cells;
    // Three operations at two lengths, two at two states; four models in training, and at two contexts read and decode; two at
    // three contexts and two batches.
    assert_eq!(cells.len(), 6 + 4 + 4 + 2 * 8 + 2 * 6);
    for cell in cells {
        // What is wrong is not timed, and says so.
        assert!(number(cell, "ms") > 0.0 && cell["note"].is_null(), "{cell:?}");
        assert!(cell["part"] == "operation" || number(cell, "tokens_per_s") > 0.0, "{cell:?}");
    }
    let of = |name: &str, context: f64, rows: f64| {
        let wanted = |cell: &&serde_json::Map<String, Value>| {
            cell["what"] == name && cell["part"] == "generation" && number(cell, "length") == context && number(cell, "rows") == rows
        };
        cells.iter().find(wanted).unwrap_or_else(|| panic!("no {name} at {context} x {rows}"))
    };
    // Room for 4 tokens to warm up and 5 times 4: a token of the Transformer leaves 4 layers of keys and values of 64, one of the hybrid
    // one layer of 16.
    for (context, rows) in [(128.0, 1.0), (4096.0, 4.0), (16384.0, 1.0), (16384.0, 4.0)] {
        let (hybrid, transformer) = (of("Hybrid", context, rows), of("Transformer", context, rows));
        assert_eq!(number(transformer, "cache_bytes"), rows * (context + 24.0) * 4.0 * 2.0 * 64.0 * 4.0);
        let growth = number(hybrid, "cache_bytes") - rows * (context + 24.0) * 2.0 * 16.0 * 4.0;
        assert_eq!(growth, rows * (number(of("Hybrid", 128.0, 1.0), "cache_bytes") - (128.0 + 24.0) * 2.0 * 16.0 * 4.0));
        for cell in [hybrid, transformer] {
            assert!(number(cell, "of_floor") > 0.0 && number(cell, "floor_bytes") > number(cell, "cache_bytes") * 0.5, "{cell:?}");
        }
    }
    // Attention over a hundred times the tokens is felt. The times are those of a shared machine.
    let ms = |name: &str, context: f64| number(of(name, context, 4.0), "ms");
    assert!(ms("Transformer", 16384.0) > 1.5 * ms("Transformer", 128.0), "{cells:?}");
    assert!(summary.verdict.contains("Hybrid decodes faster than Transformer wherever both fit"), "{}", summary.verdict);
    let page = std::fs::read_to_string(dir.path().join("report.md")).unwrap();
    assert!(page.contains("## The device") && page.contains("batch 4: ") && page.contains("the rest of the cache are copies"), "{page}");
}

#[test]
fn what_does_not_fit_is_left_out_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let nothing = ["operations.lengths=[]", "operations.states=[]", "models.architectures=[]"];
    let set = ["generation.contexts=[64,1000000000000]", "generation.batches=[1]", "generation.new_tokens=1", "generation.repeats=1"];
    let summary = finish(&options("speed", dir.path(), &[&nothing[..], &set[..]].concat()));
    let fits: Vec<bool> = summary.report.cells.iter().map(|cell| cell["note"].is_null()).collect();
    assert_eq!(fits, [true, false, true, false]);
    for cell in summary.report.cells.iter().filter(|cell| number(cell, "length") > 64.0) {
        let note = cell["note"].as_str().unwrap();
        assert!(note.starts_with("does not fit: needs ") && note.contains(" GB of "), "{note}");
        assert!(cell["ms"].is_null() && number(cell, "floor_ms") > 1000.0, "{cell:?}");
    }
    let error = |set: &str| Recipe::open("speed", true, &[set.to_string()]).and_then(|recipe| recipe.check()).unwrap_err();
    assert!(error("generation.models.0.preset=mamba2-hybrid").to_string().contains("near it"));
    let unknown = error(r#"generation.models.0.set={"depth": 3}"#);
    assert!(unknown.is_usage() && unknown.to_string().contains("depth"), "{unknown}");
    assert!(error("generation.contexts=[9000000000000000000]").to_string().contains("at most"));
}

/// Stops after so many cells and a few steps.
struct Stopper {
    stop: StopFlag,
    cells: usize,
}

impl Watch for Stopper {
    fn event(&mut self, event: Event) {
        match event {
            Event::Done { .. } => self.cells -= 1,
            Event::Step { step, .. } if self.cells == 0 && step >= 10 => self.stop.request(),
            _ => {}
        }
    }
}

#[test]
fn stopped_and_resumed_gives_the_same_report() {
    let dir = tempfile::tempdir().unwrap();
    let set = ["training.steps=20", "training.log_every=5", "models.seeds=[0,1]"];
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    finish(&options("mqar", &whole, &set));

    let mut stopped = options("mqar", &parts, &set);
    let mut watch = Stopper { stop: stopped.stop.clone(), cells: 3 };
    let outcome = run(&stopped, &mut watch).unwrap();
    assert!(matches!(outcome, Outcome::Interrupted { finished: 3, cells: 8 }), "{outcome:?}");
    assert!(!parts.join("report.md").exists());
    assert_eq!(std::fs::read_dir(parts.join("cells")).unwrap().count(), 3);

    stopped.stop = StopFlag::new();
    let taken = run(&stopped, &mut ()).unwrap_err();
    assert!(taken.is_usage() && taken.to_string().contains("--resume"), "{taken}");
    stopped.resume = true;
    let mut other = options("mqar", &parts, &["training.steps=21", "training.log_every=5", "models.seeds=[0,1]"]);
    other.resume = true;
    let changed = run(&other, &mut ()).unwrap_err().to_string();
    assert!(changed.contains("training.steps (20 then, 21 now)"), "{changed}");
    finish(&stopped);
    assert_eq!(timeless(&whole), timeless(&parts));
    let machine = std::fs::read(parts.join("machine.json")).unwrap();
    finish(&stopped);
    assert_eq!(machine, std::fs::read(parts.join("machine.json")).unwrap(), "what the device reaches is measured once");
    // All finished: nothing is run, the report is made again.
    assert_eq!(timeless(&whole), timeless(&parts));
}

#[test]
fn processes_share_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let set = ["training.steps=4", "training.log_every=2", "models.seeds=[0]"];
    let (whole, shared) = (dir.path().join("whole"), dir.path().join("shared"));
    finish(&options("mqar", &whole, &set));
    let cell = std::fs::read_dir(whole.join("cells")).unwrap().next().unwrap().unwrap().file_name().into_string().unwrap();

    // Another process is at that cell.
    let log = shared.join("logs").join(cell.replace(".json", ".jsonl"));
    std::fs::create_dir_all(log.parent().unwrap()).unwrap();
    std::fs::write(&log, "begun\n").unwrap();
    let other = File::open(&log).unwrap();
    other.lock().unwrap();
    let mut options = options("mqar", &shared, &set);
    let outcome = run(&options, &mut ()).unwrap();
    assert!(matches!(outcome, Outcome::Shared { finished: 3, cells: 4 }), "{outcome:?}");
    assert!(!shared.join("report.md").exists() && !shared.join("cells").join(&cell).exists());
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "begun\n", "the log is the other's");

    // It ended without a result: the cell is taken over.
    drop(other);
    options.resume = true;
    finish(&options);
    assert_eq!(timeless(&whole), timeless(&shared));
    assert!(!std::fs::read_to_string(&log).unwrap().contains("begun"));
}

#[test]
fn seeds_may_be_added_later() {
    let dir = tempfile::tempdir().unwrap();
    let set = |seeds: &'static str| ["training.steps=4", "models.architectures.1.pattern=M", seeds];
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    finish(&options("mqar", &one, &set("models.seeds=[3]")));
    let mut more = options("mqar", &one, &set("models.seeds=[3,4]"));
    more.resume = true;
    finish(&more);
    finish(&options("mqar", &two, &set("models.seeds=[3,4]")));
    assert_eq!(timeless(&one), timeless(&two));

    // What was finished on another device is that device's: here the report is written, and nothing is measured.
    let machine = one.join("machine.json");
    let mut told: Value = serde_json::from_str(&std::fs::read_to_string(&machine).unwrap()).unwrap();
    (told["device"], told["matmul_tflops"]) = ("another device".into(), 2.0.into());
    let told = told.to_string();
    std::fs::write(&machine, &told).unwrap();
    for step in std::fs::read_dir(one.join("steps")).unwrap() {
        std::fs::remove_file(step.unwrap().path()).unwrap();
    }
    for cell in &finish(&more).report.cells {
        assert!((number(cell, "utilisation") / (number(cell, "flop_per_s") / 2e12) - 1.0).abs() < 1e-6, "{cell:?}");
    }
    assert_eq!((timeless(&one), std::fs::read_to_string(&machine).unwrap()), (timeless(&two), told));
    let page = std::fs::read_to_string(one.join("report.md")).unwrap();
    assert!(page.contains("Device: another device;") && std::fs::read_dir(one.join("steps")).unwrap().count() == 0, "{page}");
}

#[test]
fn damaged_results_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = options("mqar", dir.path(), &["training.steps=2", "models.architectures.1.pattern=M"]);
    finish(&options);
    let cell = std::fs::read_dir(dir.path().join("cells")).unwrap().next().unwrap().unwrap().path();
    std::fs::write(&cell, "{\"steps\": ").unwrap();
    options.resume = true;
    let error = run(&options, &mut ()).unwrap_err().to_string();
    assert!(error.contains("damaged") && error.contains("cells"), "{error}");
    std::fs::remove_file(&cell).unwrap();
    finish(&options);
}

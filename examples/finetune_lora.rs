//! Fine-tunes a checkpoint with low-rank adapters on a JSONL file, then merges them.
//!
//! `cargo run --release --example finetune_lora -- HuggingFaceTB/SmolLM2-135M data.jsonl runs/mine`
//!
//! Each line of the file is `{"prompt": "..", "completion": ".."}` or `{"messages": [..]}`; the loss counts completions only.

use std::path::PathBuf;

use terrarium::train::{Display, RunConfig, RunOptions, StopFlag, install_signal_handler, run};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(data), Some(out)) = (arguments.next(), arguments.next(), arguments.next()) else {
        return Err("usage: finetune_lora MODEL DATA.jsonl OUT_DIR".into());
    };
    let mut config = RunConfig::finetune(&model, vec![PathBuf::from(data)]);
    for setting in ["lora.rank=8", "lora.alpha=16", "train.steps=100", "train.lr=2e-4", "train.eval_every=20"] {
        config.set(setting)?;
    }

    // Ctrl-C saves a checkpoint; `Resume::Auto` picks it up again.
    let stop = StopFlag::new();
    install_signal_handler(&stop)?;
    let options = RunOptions { display: Display::Auto, stop, ..RunOptions::new(config, out) };
    let report = run(options, vec![])?;

    println!("{:?} after {} steps; best validation loss {:?}", report.outcome, report.step, report.best);
    if let Some(merged) = report.model_dir {
        println!("a Hugging Face directory with the adapters merged: {}", merged.display());
    }
    Ok(())
}

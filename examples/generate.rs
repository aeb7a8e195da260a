//! Loads a checkpoint, from a directory or the Hugging Face hub, and continues a prompt.
//!
//! `cargo run --release --example generate -- HuggingFaceTB/SmolLM2-135M "The capital of France is"`

use std::io::Write;
use std::ops::ControlFlow;

use terrarium::prelude::*;
use terrarium::runtime::{self, Files, GenerateOptions, HubOptions, LoadOptions};

struct Continue {
    model: String,
    prompt: String,
}

impl BackendTask for Continue {
    type Output = Result<(), Box<dyn std::error::Error>>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let files = runtime::resolve(&self.model, Files::All, &HubOptions::from_env(), &mut ())?;
        let loaded = runtime::load::<B::InnerBackend>(&files.dir, &LoadOptions::default(), device)?;
        for note in &loaded.notes {
            eprintln!("{note}");
        }
        let tokenizer = loaded.tokenizer.as_ref().ok_or("this checkpoint has no tokenizer")?;
        let prompt = runtime::prompt_ids(tokenizer, &loaded.config, &self.prompt)?;
        let options = GenerateOptions { eos: loaded.generation.eos.clone(), ..GenerateOptions::new(40) };

        print!("{}", self.prompt);
        let done = runtime::generate(&loaded.model, &loaded.config, Some(tokenizer), &[prompt], &options, device, &mut |piece| {
            print!("{}", piece.text);
            match std::io::stdout().flush() {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        })?;
        println!();
        eprintln!("{:?}, {:?}", done.rows[0].finish, done.timings);
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let model = arguments.next().unwrap_or_else(|| "HuggingFaceTB/SmolLM2-135M".to_string());
    let prompt = arguments.next().unwrap_or_else(|| "The capital of France is".to_string());
    with_backend(&DeviceSpec::Auto, Continue { model, prompt })?
}

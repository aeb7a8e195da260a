//! `terrarium plot`

use std::path::PathBuf;

use clap::Args;

use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, output};

/// Draw the curves of a run.
///
/// Loss, validation loss, learning rate and gradient norm, from the run's log.jsonl.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  terrarium plot runs/finetune\n  terrarium plot runs/finetune --out curves.svg")]
pub struct Arguments {
    /// The run's directory.
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// A .png or .svg file, or a directory for both [default: the run's directory].
    #[arg(short, long, value_name = "FILE|DIR")]
    out: Option<PathBuf>,
}

/// Draws, prints the files' names.
pub fn run(arguments: &Arguments, _console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    let out = arguments.out.as_deref().unwrap_or(&arguments.run);
    for file in terrarium::train::plot(&arguments.run, out)? {
        output::line(file.display())?;
    }
    Ok(())
}

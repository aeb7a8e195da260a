//! The commands.

pub mod bench;
pub mod doctor;
pub mod download;
pub mod eval;
pub mod experiment;
pub mod export;
pub mod finetune;
pub mod generate;
pub mod inspect;
pub mod merge;
pub mod models;
pub mod plot;
pub mod score;
pub mod train;

use std::io::Read;
use std::path::Path;

use crate::args::Command;
use crate::console::Console;
use crate::failure::Failure;

/// Runs a command.
pub fn run(command: Command, console: &Console) -> Result<(), Failure> {
    match command {
        Command::Models(arguments) => models::run(&arguments),
        Command::Download(arguments) => download::run(&arguments, console),
        Command::Inspect(arguments) => inspect::run(&arguments, console),
        Command::Generate(arguments) => generate::run(&arguments, console),
        Command::Score(arguments) => score::run(&arguments, console),
        Command::Train(arguments) => train::run(&arguments, console),
        Command::Finetune(arguments) => finetune::run(&arguments, console),
        Command::Merge(arguments) => merge::run(&arguments, console),
        Command::Export(arguments) => export::run(&arguments, console),
        Command::Plot(arguments) => plot::run(&arguments, console),
        Command::Eval(arguments) => eval::run(&arguments, console),
        Command::Experiment(arguments) => experiment::run(&arguments, console),
        Command::Doctor(arguments) => doctor::run(&arguments, console),
        Command::Bench(arguments) => bench::run(&arguments, console),
    }
}

/// The text of an input file; `-` is standard input.
fn read_input(file: &Path) -> Result<String, Failure> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map_err(Failure::io("read", "standard input"))?;
        return Ok(text);
    }
    std::fs::read_to_string(file).map_err(Failure::io("read", file))
}

/// Lines that are not blank, with their numbers from 1.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line)).filter(|(_, line)| !line.trim().is_empty())
}

//! The `terrarium` command line. Each command is one file: arguments, a call of the library, output.
//!
//! Text and JSON go to standard output, progress and notes to standard error. Exit codes: 0 done, 1 failure, 2 usage,
//! 130 interrupted.

mod args;
mod bundled;
mod commands;
mod console;
mod failure;
mod interrupt;
mod logger;
mod model;
mod output;
mod progress;
mod samples;

use std::process::ExitCode;

use clap::Parser;

use args::Cli;
use console::Console;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let console = Console::new(cli.quiet, cli.verbose);
    logger::install(&console);
    match commands::run(cli.command, &console) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

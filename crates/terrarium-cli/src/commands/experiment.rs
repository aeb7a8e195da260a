//! `terrarium experiment`

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use indicatif::ProgressBar;
use terrarium::eval::experiment::default_dir;
use terrarium::eval::{self, Event, Options, Outcome, Recipe, Watch};

use crate::args::ComputeArgs;
use crate::commands::train::quoted;
use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, model, output, progress};

/// Repeat a claim of a paper in miniature.
///
/// Trains or times small models of all architectures and writes a report: a table, a figure, and whether the claim held. NAME is an
/// experiment that comes along (mqar, copy, phonebook, layer-mix, scaling, precision, long-context, speed), or a recipe of your own (JSON). Ctrl-C leaves after the running step; finished models are kept, and
/// --resume goes on.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  terrarium experiment mqar --smoke\n  \
    terrarium experiment mqar --set models.widths=[64] --set training.learning_rates=[1e-3,3e-3] --out runs/recall\n  \
    terrarium experiment mqar --out runs/recall --resume")]
pub struct Arguments {
    /// An experiment, or a recipe.
    #[arg(value_name = "NAME|FILE.json")]
    name: String,
    /// Seconds on a CPU: shows that it works, not that the claim holds.
    #[arg(long)]
    smoke: bool,
    /// The report's folder [default: runs/NAME].
    #[arg(short, long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Override one key of the recipe, as in training.steps=100 or models.architectures.0.state=32; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Go on with the finished part of the folder; several processes may do so at once, each with models that no other is at.
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Runs, prints the table and the verdict.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    model::prepare(&arguments.compute)?;
    let recipe = Recipe::open(&arguments.name, arguments.smoke, &arguments.set)?;
    let out_dir = arguments.out.clone().unwrap_or_else(|| default_dir(&arguments.name, arguments.smoke));
    let device = arguments.compute.device.clone();
    let options = Options { recipe, out_dir, resume: arguments.resume, device, stop: interrupt::graceful()? };
    let mut watch = Bar { console, bar: progress::steps(console), cells: 0 };
    let outcome = eval::run(&options, &mut watch);
    watch.bar.finish_and_clear();
    match outcome? {
        Outcome::Finished(summary) => {
            output::text(&summary.table)?;
            output::line(format_args!("\nverdict: {}", summary.verdict))?;
            if arguments.smoke {
                console.note("a smoke run shows that everything works; its models are too small for the claim");
            }
            output::line(format_args!("report: {}", summary.page.display()))
        }
        Outcome::Interrupted { finished, cells } => {
            console.note(format_args!(
                "stopped with {finished} of {cells} finished; the same command with --out {} --resume goes on",
                quoted(&options.out_dir)
            ));
            Err(Failure::Interrupted)
        }
        Outcome::Shared { finished, cells } => {
            console.note(format_args!(
                "{finished} of {cells} are finished, other processes are at the rest; the last of them writes the report"
            ));
            Ok(())
        }
    }
}

/// A bar for the running cell, a line for each finished one.
struct Bar<'a> {
    console: &'a Console,
    bar: ProgressBar,
    cells: usize,
}

impl Bar<'_> {
    fn note(&self, text: &str) {
        self.bar.suspend(|| self.console.note(text));
    }
}

impl Watch for Bar<'_> {
    fn event(&mut self, event: Event) {
        match event {
            Event::Plan { cells, finished, estimate, device } => {
                self.cells = cells;
                let before = if finished > 0 { format!(", {finished} of them finished before") } else { String::new() };
                self.note(&format!("{cells} runs on {device}{before}; about {}", time(estimate)));
            }
            Event::Begin { number, label } => {
                self.bar.set_position(0);
                self.bar.set_message(format!("{number}/{} {label}", self.cells));
            }
            Event::Step { step, steps, text, left } => {
                self.bar.set_length(steps as u64);
                self.bar.set_prefix(format!("{text}, {} left", time(left)));
                self.bar.set_position(step as u64);
            }
            Event::Note(text) => self.note(&text),
            Event::Done { label, text } => self.note(&format!("{label}: {text}")),
        }
    }
}

/// `90 s`, `12 min`.
fn time(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..100 => format!("{seconds} s"),
        seconds @ 100..6000 => format!("{} min", seconds.div_ceil(60)),
        seconds => format!("{:.1} h", seconds as f64 / 3600.0),
    }
}

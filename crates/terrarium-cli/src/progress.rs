//! Bars on a terminal, plain lines elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use terrarium::runtime::Progress;

use crate::console::Console;
use crate::output;

const BYTES: &str = "{msg:40!} {bar:24} {bytes:>10} of {total_bytes:10} {bytes_per_sec:>12} {eta:>5}";
const STEPS: &str = "{msg:40!} {bar:24} {pos:>5} of {len:5} {prefix}";
const ITEMS: &str = "{msg:24!} {bar:24} {pos:>7} of {len:7} {eta:>5}";

/// Download progress.
pub struct Downloads {
    console: Console,
    bar: Option<ProgressBar>,
    size: u64,
}

impl Downloads {
    /// Reports to `console`.
    pub fn new(console: &Console) -> Self {
        Self { console: *console, bar: None, size: 0 }
    }
}

impl Progress for Downloads {
    fn start(&mut self, file: &str, bytes: u64) {
        self.size = bytes;
        if self.console.draws() {
            let bar = bar(bytes, BYTES);
            bar.set_message(file.to_string());
            self.bar = Some(bar);
        }
    }

    fn advance(&mut self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
        }
    }

    fn finish(&mut self, file: &str) {
        match self.bar.take() {
            Some(bar) => bar.finish(),
            None => self.console.note(format_args!("{file}: {}", output::bytes(self.size))),
        }
    }

    fn note(&mut self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => self.console.note(text),
        }
    }
}

/// A bar over `n` things with a name; nothing where bars cannot be drawn.
pub fn items(console: &Console, name: &'static str, n: usize) -> ProgressBar {
    if !console.draws() {
        return ProgressBar::hidden();
    }
    let bar = bar(n as u64, ITEMS);
    bar.set_message(name);
    bar
}

/// A bar over the steps of one thing after another; nothing where bars cannot be drawn.
pub fn steps(console: &Console) -> ProgressBar {
    if console.draws() { bar(0, STEPS) } else { ProgressBar::hidden() }
}

fn bar(length: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr());
    // The templates are constants; were one wrong, the stock bar would do.
    bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar
}

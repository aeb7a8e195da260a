//! What the program says on standard error.

use std::io::{IsTerminal, Write};

/// Standard error, with the wish of `-v` and `-q`. Failing to write there is nobody's concern.
#[derive(Debug, Clone, Copy)]
pub struct Console {
    quiet: bool,
    verbose: u8,
}

impl Console {
    /// From the flags.
    pub fn new(quiet: bool, verbose: u8) -> Self {
        Self { quiet, verbose }
    }

    /// Says a line, unless `-q`.
    pub fn note(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// Says a line with `-v` only.
    pub fn detail(&self, text: impl std::fmt::Display) {
        if self.verbose > 0 {
            self.note(text);
        }
    }

    /// Whether bars may be drawn.
    pub fn draws(&self) -> bool {
        !self.quiet && std::io::stderr().is_terminal()
    }

    /// `-q`.
    pub fn quiet(&self) -> bool {
        self.quiet
    }

    /// How often `-v`.
    pub fn verbose(&self) -> u8 {
        self.verbose
    }
}

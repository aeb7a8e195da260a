//! What the program was asked for, on standard output. A closed or full output is an error of the command.

use std::io::Write;

use serde::Serialize;

use crate::failure::Failure;

/// Writes `text` as it is and shows it at once.
pub fn text(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(Failure::Output)
}

/// Writes a line.
pub fn line(line: impl std::fmt::Display) -> Result<(), Failure> {
    text(&format!("{line}\n"))
}

/// Writes a value as one line of JSON.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    line(serde_json::to_string(value).map_err(|error| Failure::Output(error.into()))?)
}

/// `1 234 567` as `1.2 M`.
pub fn count(n: usize) -> String {
    scaled(n as f64, 1000.0, &["", " K", " M", " G", " T"])
}

/// Bytes in binary units.
pub fn bytes(n: u64) -> String {
    scaled(n as f64, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB"])
}

fn scaled(mut value: f64, base: f64, units: &[&str]) -> String {
    let mut unit = 0;
    while value >= base && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    if unit == 0 { format!("{value}{}", units[0]) } else { format!("{value:.1}{}", units[unit]) }
}

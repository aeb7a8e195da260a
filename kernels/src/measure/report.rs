//! The report as text.

use std::fmt;

use super::{Machine, REFERENCE, Row, Speed};

/// Headings of the table that rows are printed under.
pub fn header() -> String {
    format!(
        "{:<20} {:<52} {:>5} {:>10} {:>6} {:>6} {:>5} {:>5}  {:>10} {:>6} {:>6} {:>5} {:>5}  {:>16}",
        "operation",
        "case",
        "type",
        "fwd ms",
        "+-%",
        "TB/s",
        "TF/s",
        "copy%",
        "fwd+bwd ms",
        "+-%",
        "TB/s",
        "TF/s",
        "copy%",
        "largest error"
    )
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.device, self.dtype)?;
        if let (Some(copy), Some(matmul)) = (self.copy_tbs, self.matmul_tflops) {
            write!(f, "; copy {copy:.3} TB/s, matrix product {matmul:.2} TFLOP/s")?;
        }
        Ok(())
    }
}

struct Cells<'a>(Option<&'a Speed>);

impl fmt::Display for Cells<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(speed) = self.0 else {
            return write!(f, "{:>10} {:>6} {:>6} {:>5} {:>5}", "-", "-", "-", "-", "-");
        };
        let spread = 50.0 * (speed.timing.max - speed.timing.min) / speed.timing.ms;
        let copy = speed.of_copy.map_or_else(|| "-".to_string(), |share| format!("{:.0}", 100.0 * share));
        write!(f, "{:>10} {spread:>6.1} {:>6} {:>5} {copy:>5}", short(speed.timing.ms), short(speed.tbs), short(speed.tflops))
    }
}

/// Three digits that matter.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.3}"),
        _ => format!("{value:.5}"),
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let worst = self.errors.iter().max_by(|a, b| a.error.total_cmp(&b.error));
        let worst = worst.map_or_else(|| "not checked".to_string(), |d| format!("{} {:.1e}", d.name, d.error));
        write!(
            f,
            "{:<20} {:<52} {:>5} {}  {}  {worst:>16}",
            self.op,
            self.case,
            self.dtype.to_lowercase(),
            Cells(self.forward.as_ref()),
            Cells(self.both.as_ref())
        )?;
        match &self.note {
            Some(note) => write!(f, "  {note}"),
            None if self.path == REFERENCE => write!(f, "  {REFERENCE}"),
            None => Ok(()),
        }
    }
}

//! `terrarium models`

use clap::Args;
use serde::Serialize;
use terrarium::models::presets::{Preset, presets};
use terrarium::train::config::near_presets;

use crate::failure::Failure;
use crate::{interrupt, output};

/// Tokens for which the state is counted.
const TOKENS: usize = 4096;

/// Bytes per parameter in training: float32 weights, gradients, two moments.
const TRAINING: usize = 16;

/// Symbols of a pattern that are shown.
const SHOWN: usize = 12;

/// Characters of a repository that are shown.
const REPOSITORY: usize = 33;

/// List published models whose shapes are known.
///
/// Each name is a preset: `inspect NAME` shows it, `train --preset NAME` makes a new model of its shape. Their weights
/// are in the hub repository.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  terrarium models\n  terrarium models hybrid --json")]
pub struct Arguments {
    /// Part of a name, family or repository.
    #[arg(value_name = "FILTER")]
    filter: Option<String>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What is known of a preset.
#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    family: &'static str,
    pattern: String,
    parameters: usize,
    /// Weights in bf16 and the state of one sequence of [`TOKENS`].
    inference_bytes: usize,
    /// Weights, gradients and moments in f32.
    training_bytes: usize,
    tried: &'static str,
    repository: &'static str,
}

impl Row {
    fn of(preset: &Preset) -> Result<Self, Failure> {
        let config = preset.decoder()?;
        let parameters = config.parameters();
        Ok(Self {
            name: preset.name,
            family: config.family.name(),
            pattern: config.pattern(),
            parameters,
            inference_bytes: 2 * parameters + config.state_bytes(TOKENS, 2),
            training_bytes: TRAINING * parameters,
            tried: preset.tried.word(),
            repository: preset.repository,
        })
    }

    fn cells(&self) -> [String; 8] {
        let bytes = |n: usize| output::bytes(n as u64);
        [
            self.name.to_string(),
            self.family.to_string(),
            short_pattern(&self.pattern),
            output::count(self.parameters),
            bytes(self.inference_bytes),
            bytes(self.training_bytes),
            self.tried.to_string(),
            short(self.repository),
        ]
    }
}

/// Lists, prints.
pub fn run(arguments: &Arguments) -> Result<(), Failure> {
    interrupt::immediate();
    let rows = presets().iter().map(Row::of).collect::<Result<Vec<_>, _>>()?;
    let wanted = arguments.filter.as_deref().unwrap_or_default().to_lowercase();
    let matches = |row: &Row| [row.name, row.family, row.repository].iter().any(|text| text.to_lowercase().contains(&wanted));
    let rows: Vec<Row> = rows.into_iter().filter(matches).collect();
    if rows.is_empty() {
        return Err(Failure::usage_hint(
            format!("no name, family or repository has `{wanted}` in it"),
            format!("near it: {}; `terrarium models` lists all", near_presets(&wanted).join(", ")),
        ));
    }
    if arguments.json {
        return output::json(&serde_json::json!({ "state_tokens": TOKENS, "models": rows }));
    }
    let mut table: Vec<[String; 8]> =
        vec![["name", "family", "layers", "params", "inference", "training", "tried", "repository"].map(String::from)];
    table.extend(rows.iter().map(Row::cells));
    print(&table)?;
    output::line(format_args!(
        "\nlayers: M Mamba-2, m Mamba, * attention, - MLP\n\
         inference: weights in bf16 and the state of one sequence after {TOKENS} tokens\n\
         training: f32 weights, gradients and AdamW's two moments ({TRAINING} bytes per parameter); activations come on top\n\
         tried: weights: these weights were loaded and compared; layout: small random checkpoints of this layout were\n\
         --json has patterns and repositories in full"
    ))
}

/// Columns as wide as they need to be, numbers to the right.
fn print(table: &[[String; 8]]) -> Result<(), Failure> {
    let width = |i: usize| table.iter().map(|cells| cells[i].chars().count()).max().unwrap_or(0);
    let widths: [usize; 8] = std::array::from_fn(width);
    for cells in table {
        let cell = |(i, cell): (usize, &String)| {
            let width = widths[i];
            if (3..6).contains(&i) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        };
        let line = cells.iter().enumerate().map(cell).collect::<Vec<_>>().join(" ");
        output::line(line.trim_end())?;
    }
    Ok(())
}

/// The beginning of a name that is longer than the rest of a line of 120 columns.
fn short(repository: &str) -> String {
    match repository.char_indices().nth(REPOSITORY - 2) {
        Some((end, _)) if repository.chars().count() > REPOSITORY => format!("{}..", &repository[..end]),
        _ => repository.to_string(),
    }
}

/// `24 x M`, `32 x *-`, or the first symbols.
fn short_pattern(pattern: &str) -> String {
    let symbols: Vec<char> = pattern.chars().collect();
    let period = (1..=SHOWN.min(symbols.len() / 2))
        .find(|&p| symbols.len().is_multiple_of(p) && symbols.chunks(p).all(|unit| *unit == symbols[..p]));
    match period {
        Some(p) => format!("{} x {}", symbols.len() / p, symbols[..p].iter().collect::<String>()),
        None if symbols.len() <= SHOWN => pattern.to_string(),
        None => format!("{}..", symbols[..SHOWN].iter().collect::<String>()),
    }
}

#[cfg(test)]
mod tests {
    use super::short_pattern;

    #[test]
    fn patterns_are_shortened_by_their_period_or_cut() {
        assert_eq!(short_pattern("MMMM"), "4 x M");
        assert_eq!(short_pattern("*-*-*-"), "3 x *-");
        assert_eq!(short_pattern("M-*-"), "M-*-");
        assert_eq!(short_pattern("M"), "M");
        assert_eq!(short_pattern("M-M-M--M-M*-M-M-M-M--M*-"), "M-M-M--M-M*-..");
    }
}

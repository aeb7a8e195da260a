//! What an experiment found: a table, a figure, and whether the paper's claim held.

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value, json};
use terrarium_train::plot::Figure;

use super::Surroundings;
use super::recipe::Recipe;
use super::stats::short;
use crate::timing::{OTHER, Step};

/// A report.
#[derive(Debug, Clone)]
pub struct Report {
    /// What was asked.
    pub title: String,
    /// Where the claim stands.
    pub source: String,
    /// The claim in a sentence.
    pub claim: String,
    /// Averages over seeds.
    pub table: Table,
    /// The table as a picture.
    pub figure: Figure,
    /// Whether the claim held.
    pub verdict: Verdict,
    /// What a reader has to know besides.
    pub notes: Vec<String>,
    /// One object per cell, with equal keys.
    pub cells: Vec<Map<String, Value>>,
}

/// Rows under names.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Table {
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Rows of as many texts.
    pub rows: Vec<Vec<String>>,
}

/// One part of a claim.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// What is claimed.
    pub claim: String,
    /// Whether it held; nothing where the recipe does not measure it.
    pub holds: Option<bool>,
    /// The numbers.
    pub found: String,
}

/// All parts of a claim.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Verdict {
    /// The parts.
    pub checks: Vec<Check>,
}

impl Check {
    /// A part that was measured.
    pub fn measured(claim: impl Into<String>, holds: bool, found: impl Into<String>) -> Self {
        Self { claim: claim.into(), holds: Some(holds), found: found.into() }
    }

    /// A part that this recipe does not measure.
    pub fn absent(claim: impl Into<String>, why: impl Into<String>) -> Self {
        Self { claim: claim.into(), holds: None, found: why.into() }
    }

    /// The same with more behind its numbers.
    pub fn adding(self, more: &str) -> Self {
        Self { found: self.found + more, ..self }
    }
}

impl Verdict {
    fn count(&self, held: bool) -> usize {
        self.checks.iter().filter(|check| check.holds == Some(held)).count()
    }

    /// In a word: `reproduced`, `partly reproduced`, `not reproduced`, `not measured`.
    pub fn word(&self) -> &'static str {
        match (self.count(true), self.count(false)) {
            (0, 0) => "not measured",
            (_, 0) => "reproduced",
            (0, _) => "not reproduced",
            _ => "partly reproduced",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.count(true);
        write!(f, "{} ({held} of {} parts)", self.word(), held + self.count(false))?;
        for (i, check) in self.checks.iter().enumerate() {
            let word = match check.holds {
                Some(true) => "yes",
                Some(false) => "no",
                None => "not measured",
            };
            write!(f, "{} {}: {word} ({})", if i == 0 { ":" } else { ";" }, check.claim, check.found)?;
        }
        Ok(())
    }
}

impl Table {
    /// Aligned for reading as it is.
    pub fn to_markdown(&self) -> String {
        let clean = |text: &String| text.replace('|', "\\|");
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| self.rows.iter().map(|row| clean(&row[i]).chars().count()).chain([self.columns[i].chars().count()]).max().unwrap_or(0))
            .collect();
        let line = |row: &[String]| {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(text, width)| format!("{:<width$}", clean(text))).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let rule: Vec<String> = widths.iter().map(|width| "-".repeat((*width).max(3))).collect();
        let mut text = line(&self.columns) + &format!("| {} |\n", rule.join(" | "));
        self.rows.iter().for_each(|row| text += &line(row));
        text
    }

    /// With quotes where a text needs them.
    pub fn to_csv(&self) -> String {
        let line = |row: &[String]| row.iter().map(|text| quoted(text)).collect::<Vec<_>>().join(",") + "\n";
        line(&self.columns) + &self.rows.iter().map(|row| line(row)).collect::<String>()
    }
}

fn quoted(text: &str) -> String {
    if text.contains([',', '"', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.to_string() }
}

/// One row per cell.
pub(crate) fn cells_csv(cells: &[Map<String, Value>]) -> String {
    let mut columns: Vec<String> = Vec::new();
    for key in cells.iter().flat_map(Map::keys) {
        if !columns.contains(key) {
            columns.push(key.clone());
        }
    }
    let text = |value: Option<&Value>| match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    let rows = cells.iter().map(|cell| columns.iter().map(|key| text(cell.get(key))).collect()).collect();
    Table { columns: columns.clone(), rows }.to_csv()
}

/// Shares of training steps by operation, one row per step.
fn shares(surroundings: &Surroundings) -> Table {
    let found: Vec<Vec<(String, f64)>> = surroundings.steps.iter().map(|(_, step)| step.by_operation()).collect();
    let mut operations: Vec<&str> = Vec::new();
    for (op, _) in found.iter().flatten().filter(|(op, _)| op != OTHER) {
        if !operations.contains(&op.as_str()) {
            operations.push(op);
        }
    }
    operations.push(OTHER);
    let ceiling = surroundings.machine.as_ref().and_then(|machine| machine.matmul_tflops);
    let mut columns = ["step of", "rows", "ms", "tokens/s", "TFLOP/s", "of a product", "memory"].map(String::from).to_vec();
    columns.extend(operations.iter().map(ToString::to_string));
    let percent = |share: Option<f64>| share.map_or("-".to_string(), |share| format!("{:.1} %", 100.0 * share));
    let row = |((label, step), found): (&(String, Step), &Vec<(String, f64)>)| {
        let tflops = step.flop_per_s() / 1e12;
        let mut row = vec![
            label.clone(),
            format!("{} x {}", step.rows, step.length),
            format!("{:.2}", step.ms),
            short(step.tokens_per_s()),
            format!("{tflops:.3}"),
            percent(ceiling.map(|ceiling| tflops / ceiling)),
            step.memory.map_or("-".to_string(), |bytes| format!("{:.2} GB", bytes as f64 / 1e9)),
        ];
        row.extend(operations.iter().map(|op| percent(found.iter().find(|(name, _)| name == op).map(|(_, share)| *share))));
        row
    };
    Table { columns, rows: surroundings.steps.iter().zip(&found).map(row).collect() }
}

/// The section on what the device reaches and on training steps; nothing where neither was measured.
fn steps(surroundings: &Surroundings) -> String {
    let mut page = String::new();
    let Some(machine) = &surroundings.machine else { return page };
    page += if surroundings.steps.is_empty() { "\n## The device\n\n" } else { "\n## One training step\n\n" };
    if let (Some(copy), Some(matmul)) = (machine.copy_tbs, machine.matmul_tflops) {
        let dtype = machine.dtype.to_lowercase();
        page += &format!("A large matrix product in {dtype} reaches {matmul:.2} TFLOP/s on this device, a copy {copy:.3} TB/s.\n");
    }
    if surroundings.steps.is_empty() {
        return page;
    }
    page += &format!(
        "\n{}\nRandom tokens, after two steps to warm up. TFLOP/s: the textbook arithmetic of the whole model; \"of a product\" is its share of what a large matrix \
         product reaches. Operations are timed alone at the step's shapes, forward and backward, times their calls, with everything in the device's \
         memory; gradient norm and optimiser in steps that wait before and after them. \"other\" is the rest of the step: elementwise operations between \
         these, changes of type, waiting for the host; below zero where calls go faster in a step than alone. Memory: the most that the pools took from \
         the device; on a CPU the most that the process has had so far. Every call: `report.json`.\n",
        shares(surroundings).to_markdown()
    );
    page
}

pub(crate) fn to_json(report: &Report, recipe: &Recipe, surroundings: &Surroundings) -> Value {
    let steps: Vec<Value> = surroundings.steps.iter().map(|(label, step)| json!({ "of": label, "step": step })).collect();
    json!({
        "title": report.title, "source": report.source, "claim": report.claim,
        "verdict": report.verdict.word(), "checks": report.verdict.checks,
        "device": surroundings.device, "machine": surroundings.machine, "steps": steps, "version": env!("CARGO_PKG_VERSION"), "notes": report.notes,
        "table": report.table, "cells": report.cells, "recipe": recipe.to_json(),
    })
}

impl Report {
    /// The page.
    pub(crate) fn to_markdown(&self, config: &str, surroundings: &Surroundings) -> String {
        let mut page = format!("# {}\n\nClaim ({}): {}\n\n**Verdict: {}**\n\n", self.title, self.source, self.claim, self.verdict.word());
        for check in &self.verdict.checks {
            let mark = match check.holds {
                Some(true) => "holds",
                Some(false) => "does not hold",
                None => "not measured",
            };
            page += &format!("- {}: {mark}. {}\n", check.claim, check.found);
        }
        page += &format!("\n![figure](figure.svg)\n\n{}\n", self.table.to_markdown());
        for note in &self.notes {
            page += &format!("- {note}\n");
        }
        page += &format!(
            "- Device: {}; terrarium {}. One row per cell: `cells.csv`; losses step by step: `logs/`.\n{}\n## Recipe\n\n```json\n{config}```\n",
            surroundings.device,
            env!("CARGO_PKG_VERSION"),
            steps(surroundings)
        );
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_markdown_and_csv() {
        let table = Table { columns: vec!["name".into(), "x".into()], rows: vec![vec!["a, b".into(), "1|2".into()]] };
        assert_eq!(table.to_markdown(), "| name | x    |\n| ---- | ---- |\n| a, b | 1\\|2 |\n");
        assert_eq!(table.to_csv(), "name,x\n\"a, b\",1|2\n");
        let cell = |text: &str| serde_json::from_str(text).unwrap();
        assert_eq!(cells_csv(&[cell(r#"{"a":1}"#), cell(r#"{"a":2.5,"b":"x"}"#)]), "a,b\n1,\n2.5,x\n");
    }

    #[test]
    fn verdicts_count_what_was_measured() {
        let part = |holds| Check { claim: "c".into(), holds, found: "f".into() };
        let word = |checks: &[Option<bool>]| Verdict { checks: checks.iter().map(|holds| part(*holds)).collect() }.word();
        assert_eq!(word(&[Some(true), None]), "reproduced");
        assert_eq!(word(&[Some(true), Some(false)]), "partly reproduced");
        assert_eq!([word(&[Some(false)]), word(&[None])], ["not reproduced", "not measured"]);
    }
}

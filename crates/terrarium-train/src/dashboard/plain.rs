//! A renderer for burn-train without a terminal: one line now and then on stderr.

use std::collections::HashMap;
use std::io::Write;

use burn::train::LearnerSummary;
use burn::train::metric::{MetricDefinition, MetricId};
use burn::train::renderer::{
    EvaluationName, EvaluationProgress, MetricState, MetricsRenderer, MetricsRendererEvaluation, MetricsRendererTraining, ProgressType,
    TrainingProgress,
};

/// Prints metrics as lines; silent without a sink.
pub(crate) struct PlainRenderer {
    out: Option<Box<dyn Write + Send + Sync>>,
    every: usize,
    steps: usize,
    step: usize,
    names: HashMap<MetricId, String>,
    train: HashMap<String, String>,
    valid: HashMap<String, String>,
}

/// How each metric is called in a line, in order.
const COLUMNS: [(&str, &str); 7] = [
    ("Loss", "loss"),
    ("Perplexity", "ppl"),
    ("Learning rate", "lr"),
    ("Gradient norm", "grad"),
    ("Tokens/s", "tok/s"),
    ("Memory", "mem"),
    ("ETA", "eta"),
];

impl PlainRenderer {
    /// Prints every `every` steps to `out`.
    pub fn new(out: Option<Box<dyn Write + Send + Sync>>, every: usize, steps: usize) -> Self {
        Self { out, every, steps, step: 0, names: HashMap::new(), train: HashMap::new(), valid: HashMap::new() }
    }

    fn name_and_text(&self, state: &MetricState) -> Option<(String, String)> {
        let (MetricState::Generic(entry) | MetricState::Numeric(entry, _)) = state;
        Some((self.names.get(&entry.metric_id)?.clone(), entry.serialized_entry.formatted.clone()))
    }

    fn line(&mut self, prefix: &str, values: &HashMap<String, String>) {
        let Some(out) = &mut self.out else { return };
        let columns = COLUMNS.iter().filter_map(|(name, short)| values.get(*name).map(|value| format!("  {short} {value}")));
        let line = format!("step {}/{}{prefix}{}\n", self.step, self.steps, columns.collect::<String>());
        // A closed stderr is no reason to stop.
        let _ = out.write_all(line.as_bytes());
    }
}

impl MetricsRendererTraining for PlainRenderer {
    fn update_train(&mut self, state: MetricState) {
        self.train.extend(self.name_and_text(&state));
    }

    fn update_valid(&mut self, state: MetricState) {
        self.valid.extend(self.name_and_text(&state));
    }

    fn render_train(&mut self, item: TrainingProgress, _progress_indicators: Vec<ProgressType>) {
        self.step = item.iteration.unwrap_or(0);
        if self.step == 1 || self.step == self.steps || self.step.is_multiple_of(self.every) {
            let values = std::mem::take(&mut self.train);
            self.line("", &values);
        }
    }

    fn render_valid(&mut self, item: TrainingProgress, _progress_indicators: Vec<ProgressType>) {
        if item.progress.is_some_and(|progress| progress.items_processed == progress.items_total) {
            let values = std::mem::take(&mut self.valid);
            self.line("  valid", &values);
        }
    }

    fn on_train_end(&mut self, _summary: Option<LearnerSummary>) -> Result<(), Box<dyn std::error::Error>> {
        Ok(())
    }
}

impl MetricsRendererEvaluation for PlainRenderer {
    fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}

    fn render_test(&mut self, _item: EvaluationProgress, _progress_indicators: Vec<ProgressType>) {}
}

impl MetricsRenderer for PlainRenderer {
    fn manual_close(&mut self) {}

    fn register_metric(&mut self, definition: MetricDefinition) {
        self.names.insert(definition.metric_id, definition.name);
    }
}

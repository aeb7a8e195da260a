//! The numbers of a step as burn-train metrics.

use std::sync::Arc;
use std::time::Duration;

use burn::train::metric::{
    Adaptor, ItemLazy, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry, SerializedEntry,
};

use crate::event::StepReport;

/// What the dashboard shows of a step or of a validation batch.
#[derive(Debug, Clone, Default)]
pub(crate) struct Shown {
    pub loss: f64,
    pub tokens_per_s: f64,
    pub lr: f64,
    pub grad_norm: f64,
    pub memory: f64,
    pub eta: Duration,
}

impl From<&StepReport> for Shown {
    fn from(report: &StepReport) -> Self {
        Self {
            loss: report.loss,
            tokens_per_s: report.tokens_per_s,
            lr: report.lr,
            grad_norm: report.grad_norm,
            memory: report.memory.unwrap_or(0) as f64 / f64::from(1 << 20),
            eta: report.eta,
        }
    }
}

/// These are numbers already: nothing is waiting on a device.
impl ItemLazy for Shown {
    type ItemSync = Self;

    fn sync(self) -> Self {
        self
    }
}

impl Adaptor<Shown> for Shown {
    fn adapt(&self) -> Shown {
        self.clone()
    }
}

/// One number of [`Shown`].
#[derive(Clone)]
pub(crate) struct Gauge {
    name: MetricName,
    pick: fn(&Shown) -> f64,
    format: fn(f64) -> String,
    value: f64,
}

impl Gauge {
    fn new(name: &str, pick: fn(&Shown) -> f64, format: fn(f64) -> String) -> Self {
        Self { name: Arc::new(name.to_string()), pick, format, value: f64::NAN }
    }

    pub fn loss() -> Self {
        Self::new("Loss", |shown| shown.loss, |value| format!("{value:.4}"))
    }

    pub fn perplexity() -> Self {
        Self::new("Perplexity", |shown| shown.loss.exp(), |value| format!("{value:.2}"))
    }

    pub fn tokens_per_s() -> Self {
        Self::new("Tokens/s", |shown| shown.tokens_per_s, |value| format!("{value:.0}"))
    }

    pub fn lr() -> Self {
        Self::new("Learning rate", |shown| shown.lr, |value| format!("{value:.2e}"))
    }

    pub fn grad_norm() -> Self {
        Self::new("Gradient norm", |shown| shown.grad_norm, |value| format!("{value:.3}"))
    }

    pub fn memory() -> Self {
        Self::new("Memory", |shown| shown.memory, |value| format!("{value:.0} MB"))
    }
}

impl Metric for Gauge {
    type Input = Shown;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes { unit: None, higher_is_better: self.name.as_str() == "Tokens/s" }.into()
    }

    fn update(&mut self, item: &Shown, _metadata: &MetricMetadata) -> SerializedEntry {
        self.value = (self.pick)(item);
        SerializedEntry::new((self.format)(self.value), NumericEntry::Value(self.value).serialize())
    }

    fn clear(&mut self) {}
}

impl Numeric for Gauge {
    fn value(&self) -> NumericEntry {
        NumericEntry::Value(self.value)
    }

    fn running_value(&self) -> NumericEntry {
        self.value()
    }
}

/// Time left, as text.
#[derive(Clone)]
pub(crate) struct Eta;

impl Metric for Eta {
    type Input = Shown;

    fn name(&self) -> MetricName {
        Arc::new("ETA".to_string())
    }

    fn update(&mut self, item: &Shown, _metadata: &MetricMetadata) -> SerializedEntry {
        SerializedEntry::new(duration(item.eta), item.eta.as_secs().to_string())
    }

    fn clear(&mut self) {}
}

/// `1h02m`, `3m05s`, `7s`.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

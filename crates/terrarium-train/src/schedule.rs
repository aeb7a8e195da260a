//! The learning rate as a pure function of the step: nothing to save, nothing to forget.

use crate::config::{Shape, TrainConfig};

/// Linear warm-up, then a cosine or a constant.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Highest rate.
    pub peak: f64,
    /// Rate at the end of the cosine.
    pub min: f64,
    /// Steps of warm-up.
    pub warmup: usize,
    /// Steps in all.
    pub steps: usize,
    /// What follows the warm-up.
    pub shape: Shape,
}

impl Schedule {
    /// The schedule of a configuration.
    pub fn new(config: &TrainConfig) -> Self {
        Self { peak: config.lr, min: config.min_lr(), warmup: config.warmup(), steps: config.steps, shape: config.schedule }
    }

    /// Learning rate of `step`, counted from 1: the warm-up ends at `peak` on step `warmup`, the cosine at `min` on the last step.
    pub fn lr(&self, step: usize) -> f64 {
        if step <= self.warmup {
            return self.peak * step as f64 / self.warmup as f64;
        }
        if self.shape == Shape::Constant {
            return self.peak;
        }
        let span = self.steps.saturating_sub(self.warmup).max(1) as f64;
        let done = ((step - self.warmup) as f64 / span).min(1.0);
        self.min + 0.5 * (self.peak - self.min) * (1.0 + (std::f64::consts::PI * done).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape) -> Schedule {
        Schedule { peak: 1.0, min: 0.1, warmup: 10, steps: 110, shape }
    }

    #[test]
    fn warm_up_is_linear_and_the_cosine_ends_at_the_minimum() {
        let schedule = schedule(Shape::Cosine);
        let close = |step, value: f64| assert!((schedule.lr(step) - value).abs() < 1e-12, "step {step}: {}", schedule.lr(step));
        close(1, 0.1);
        close(5, 0.5);
        close(10, 1.0);
        close(60, 0.55);
        close(110, 0.1);
        close(500, 0.1);
        assert!((11..=110).all(|step| schedule.lr(step) < schedule.lr(step - 1)));
    }

    #[test]
    fn constant_stays_at_the_peak() {
        let schedule = schedule(Shape::Constant);
        assert_eq!([schedule.lr(5), schedule.lr(11), schedule.lr(1000)], [0.5, 1.0, 1.0]);
    }

    #[test]
    fn no_warm_up_starts_below_the_peak() {
        let schedule = Schedule { warmup: 0, ..schedule(Shape::Cosine) };
        assert!(schedule.lr(1) < 1.0 && schedule.lr(1) > 0.99);
    }
}

//! Choosing a token from logits, with the meaning and the order that transformers gives to the options.

use std::collections::BTreeSet;

use terrarium_kernels::sample::{SampleOptions, host};

use crate::error::SamplingError;

/// How to choose. The default is greedy.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the best token.
    pub temperature: f32,
    /// Keeps the best so many, and those equal to the last; 0 keeps all.
    pub top_k: usize,
    /// Of these keeps the smallest set of best ones with at least this probability, and those equal to the last; 1 keeps all.
    pub top_p: f32,
    /// Makes tokens already seen less likely; 1 leaves them alone.
    pub repetition_penalty: f32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0 }
    }
}

impl Sampling {
    /// Whether the best token is taken as the model gives it.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }

    /// What a device needs to draw by itself; nothing where it takes more, or nothing is drawn.
    pub(crate) fn on_device(&self) -> Option<SampleOptions> {
        (self.temperature > 0.0 && self.repetition_penalty == 1.0).then(|| self.draw())
    }

    fn draw(&self) -> SampleOptions {
        SampleOptions { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p }
    }

    /// Whether every option is in its range.
    pub fn check(&self) -> Result<(), SamplingError> {
        let finite = |x: f32, ok: bool| x.is_finite() && ok;
        let checks = [
            ("temperature", self.temperature, "0 (greedy) or more", finite(self.temperature, self.temperature >= 0.0)),
            ("top_p", self.top_p, "above 0 and at most 1", finite(self.top_p, self.top_p > 0.0 && self.top_p <= 1.0)),
            (
                "repetition_penalty",
                self.repetition_penalty,
                "above 0 (1 is off)",
                finite(self.repetition_penalty, self.repetition_penalty > 0.0),
            ),
        ];
        match checks.into_iter().find(|(.., ok)| !ok) {
            Some((name, value, range, _)) => Err(SamplingError::Option { name, value, range }),
            None => Ok(()),
        }
    }
}

/// Chooses the tokens of one row: its own random numbers make it independent of the batch it is in, and of the device
/// ([`terrarium_kernels::sample`]).
#[derive(Debug, Clone)]
pub struct Sampler {
    options: Sampling,
    seed: u64,
    /// Tokens drawn.
    count: u32,
}

impl Sampler {
    /// A sampler whose choices depend on the seed and the logits alone.
    pub fn new(options: Sampling, seed: u64) -> Result<Self, SamplingError> {
        options.check()?;
        Ok(Self { options, seed, count: 0 })
    }

    /// The seed, and how many tokens it has drawn: all that the next draw depends on besides the logits.
    pub fn draws(&self) -> (u64, u32) {
        (self.seed, self.count)
    }

    /// Takes note of a token that was drawn elsewhere, from the same seed.
    pub(crate) fn skip(&mut self) {
        self.count = self.count.wrapping_add(1);
    }

    /// The next token. `seen` are the ids so far, the prompt's included; `step` names the place in errors. Logits of
    /// minus infinity are never chosen. Changes `logits`.
    pub fn sample(&mut self, logits: &mut [f32], seen: &[u32], step: usize) -> Result<u32, SamplingError> {
        check_finite(logits, step)?;
        if self.options.repetition_penalty != 1.0 {
            penalise(logits, seen, self.options.repetition_penalty);
        }
        if self.options.temperature == 0.0 {
            return Ok(argmax(logits));
        }
        let drawn = host::draw(logits, self.options.draw(), self.seed, self.count);
        self.skip();
        Ok(drawn.unwrap_or_else(|| argmax(logits)))
    }
}

/// The id of the largest logit, the lowest among equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = id;
        }
    }
    best as u32
}

fn check_finite(logits: &[f32], step: usize) -> Result<(), SamplingError> {
    let bad = |x: &f32| x.is_nan() || *x == f32::INFINITY;
    let (count, total) = (logits.iter().filter(|x| bad(x)).count(), logits.len());
    if count > 0 {
        let id = logits.iter().position(bad).unwrap_or(0);
        return Err(SamplingError::NotFinite { step, count, total, id });
    }
    if logits.iter().all(|x| *x == f32::NEG_INFINITY) {
        return Err(SamplingError::NotFinite { step, count: total, total, id: 0 });
    }
    Ok(())
}

/// Each seen id once, however often it was seen.
fn penalise(logits: &mut [f32], seen: &[u32], penalty: f32) {
    for id in seen.iter().copied().collect::<BTreeSet<_>>() {
        if let Some(x) = logits.get_mut(id as usize) {
            *x = if *x < 0.0 { *x * penalty } else { *x / penalty };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(options: Sampling) -> Sampler {
        Sampler::new(options, 7).expect("options are in range")
    }

    fn frequencies(options: Sampling, logits: &[f32], draws: usize) -> Vec<f64> {
        let mut sampler = sampler(options);
        let mut counts = vec![0.0; logits.len()];
        for step in 0..draws {
            let id = sampler.sample(&mut logits.to_vec(), &[], step).expect("logits are finite");
            counts[id as usize] += 1.0 / draws as f64;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_id_of_equals() {
        let id = sampler(Sampling::default()).sample(&mut [0.0, 2.0, 2.0, 1.0], &[], 0);
        assert_eq!(id, Ok(1));
    }

    #[test]
    fn frequencies_are_the_softmax() {
        let probabilities = [0.5f64, 0.25, 0.15, 0.1];
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32).collect();
        let found = frequencies(Sampling { temperature: 1.0, ..Sampling::default() }, &logits, 40_000);
        for (p, f) in probabilities.iter().zip(&found) {
            assert!((p - f).abs() < 0.01, "expected {probabilities:?}, found {found:?}");
        }
    }

    #[test]
    fn temperature_sharpens() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.25].iter().map(|p| p.ln()).collect();
        // Squared and normalised: 4/6, 1/6, 1/6.
        let found = frequencies(Sampling { temperature: 0.5, ..Sampling::default() }, &logits, 40_000);
        assert!((found[0] - 4.0 / 6.0).abs() < 0.01, "{found:?}");
    }

    #[test]
    fn top_p_keeps_the_token_that_reaches_it() {
        let logits: Vec<f32> = [0.1f32, 0.5, 0.15, 0.25].iter().map(|p| p.ln()).collect();
        let top_p = |p: f32| frequencies(Sampling { temperature: 1.0, top_p: p, ..Sampling::default() }, &logits, 20_000);
        let found = top_p(0.6);
        assert!(found[0] == 0.0 && found[2] == 0.0, "{found:?}");
        assert!((found[1] - 2.0 / 3.0).abs() < 0.02, "{found:?}");
        assert!(top_p(0.01)[1] > 0.999_999, "at least one token is kept");
    }

    #[test]
    fn top_k_keeps_equals_of_the_last() {
        let found = frequencies(Sampling { temperature: 1.0, top_k: 2, ..Sampling::default() }, &[1.0, 0.5, 0.5, 0.4], 20_000);
        assert!(found[2] > 0.1 && found[3] == 0.0, "{found:?}");
    }

    #[test]
    fn repetition_penalty_lowers_positive_and_negative_logits_once() {
        let mut logits = [2.0, -2.0, 1.0];
        penalise(&mut logits, &[0, 1, 0, 99], 2.0);
        assert_eq!(logits, [1.0, -4.0, 1.0]);
    }

    #[test]
    fn equal_seeds_choose_equally() {
        let options = Sampling { temperature: 1.0, ..Sampling::default() };
        let draw = |seed| {
            let mut sampler = Sampler::new(options, seed).expect("in range");
            (0..20).map(|step| sampler.sample(&mut [0.0; 50], &[], step).expect("finite")).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn nan_names_the_step() {
        let error = sampler(Sampling::default()).sample(&mut [0.0, f32::NAN], &[], 12).expect_err("NaN");
        assert_eq!(error, SamplingError::NotFinite { step: 12, count: 1, total: 2, id: 1 });
        assert!(error.to_string().contains("step 12"));
    }

    #[test]
    fn options_out_of_range_are_refused() {
        for options in [
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { temperature: f32::NAN, ..Sampling::default() },
            Sampling { top_p: 0.0, ..Sampling::default() },
            Sampling { top_p: 1.5, ..Sampling::default() },
            Sampling { repetition_penalty: 0.0, ..Sampling::default() },
        ] {
            assert!(options.check().is_err(), "{options:?}");
        }
    }
}

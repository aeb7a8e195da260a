//! Means, deviations, power laws.

/// Mean and sample deviation; none for one value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Spread {
    pub mean: f64,
    pub deviation: f64,
    pub count: usize,
}

impl Spread {
    /// Of values; NaN for none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let values: Vec<f64> = values.into_iter().collect();
        let count = values.len();
        let mean = values.iter().sum::<f64>() / count as f64;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = if count > 1 { (squares / (count - 1) as f64).sqrt() } else { 0.0 };
        Self { mean, deviation, count }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.count {
            0 => f.write_str("-"),
            1 => write!(f, "{:.3}", self.mean),
            _ => write!(f, "{:.3} ± {:.3}", self.mean, self.deviation),
        }
    }
}

/// `1234567` as `1.23M`.
pub(crate) fn short(value: f64) -> String {
    let units = [(1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.into_iter().find(|(size, _)| value.abs() >= *size) {
        Some((size, unit)) => format!("{:.2}{unit}", value / size),
        None => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_is_mean_and_sample_deviation() {
        assert_eq!(Spread::of([1.0, 2.0, 3.0]), Spread { mean: 2.0, deviation: 1.0, count: 3 });
        assert_eq!(Spread::of([4.0]).to_string(), "4.000");
        assert!(Spread::of([]).mean.is_nan());
        assert_eq!([short(999.0), short(1_234_567.0), short(2.5e13)], ["999", "1.23M", "25.00T"]);
    }
}

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

/// `y = factor * x^exponent`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct PowerLaw {
    pub factor: f64,
    pub exponent: f64,
}

impl PowerLaw {
    /// Least squares between logarithms; needs two different `x`.
    pub fn fit(points: &[(f64, f64)]) -> Option<Self> {
        let logs: Vec<(f64, f64)> = points.iter().filter(|(x, y)| *x > 0.0 && *y > 0.0).map(|(x, y)| (x.ln(), y.ln())).collect();
        let n = logs.len() as f64;
        let (mean_x, mean_y) = (logs.iter().map(|p| p.0).sum::<f64>() / n, logs.iter().map(|p| p.1).sum::<f64>() / n);
        let squares: f64 = logs.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
        let products: f64 = logs.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
        let exponent = products / squares;
        (logs.len() > 1 && exponent.is_finite()).then(|| Self { factor: (mean_y - exponent * mean_x).exp(), exponent })
    }

    /// The law at `x`.
    pub fn at(&self, x: f64) -> f64 {
        self.factor * x.powf(self.exponent)
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
    fn power_laws_are_found_again() {
        let points: Vec<(f64, f64)> = [1.0, 10.0, 1e3].iter().map(|x: &f64| (*x, 7.0 * x.powf(-0.3))).collect();
        let law = PowerLaw::fit(&points).unwrap();
        assert!((law.factor - 7.0).abs() < 1e-9 && (law.exponent + 0.3).abs() < 1e-9, "{law:?}");
        assert!((law.at(100.0) - 7.0 * 100f64.powf(-0.3)).abs() < 1e-9);
        assert_eq!([PowerLaw::fit(&points[..1]), PowerLaw::fit(&[(2.0, 1.0), (2.0, 3.0)])], [None, None]);
    }

    #[test]
    fn spread_is_mean_and_sample_deviation() {
        assert_eq!(Spread::of([1.0, 2.0, 3.0]), Spread { mean: 2.0, deviation: 1.0, count: 3 });
        assert_eq!(Spread::of([4.0]).to_string(), "4.000");
        assert!(Spread::of([]).mean.is_nan());
        assert_eq!([short(999.0), short(1_234_567.0), short(2.5e13)], ["999", "1.23M", "25.00T"]);
    }
}

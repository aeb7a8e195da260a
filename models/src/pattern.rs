//! Layer patterns: `M` Mamba-2, `m` Mamba, `*` attention, `-` MLP.

/// Kind of a layer in a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// `m`
    Mamba,
    /// `M`
    Mamba2,
    /// `*`
    Attention,
    /// `-`
    Mlp,
}

/// A pattern that cannot be read or made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PatternError {
    /// A character that stands for no layer.
    #[error("layer pattern `{pattern}`: `{symbol}` at {position} is none of M (Mamba-2), * (attention), - (MLP)")]
    Symbol {
        /// The pattern.
        pattern: String,
        /// The character.
        symbol: char,
        /// Its index.
        position: usize,
    },
    /// No layers.
    #[error("the layer pattern is empty; expected something like `M-M*-M-`")]
    Empty,
    /// Ratios that cannot be met.
    #[error("attention ratio {attention} and MLP ratio {mlp} of {layers} layers: each lies in 0..=1 and together they are at most 1")]
    Ratios {
        /// Share of attention layers.
        attention: f64,
        /// Share of MLP layers.
        mlp: f64,
        /// Layers.
        layers: usize,
    },
}

impl LayerKind {
    /// The symbol in a pattern.
    pub fn symbol(self) -> char {
        match self {
            Self::Mamba => 'm',
            Self::Mamba2 => 'M',
            Self::Attention => '*',
            Self::Mlp => '-',
        }
    }
}

/// Reads a pattern such as `M-M*-`.
///
/// # Errors
/// [`PatternError`] for an unknown symbol or an empty pattern.
pub fn parse(pattern: &str) -> Result<Vec<LayerKind>, PatternError> {
    if pattern.is_empty() {
        return Err(PatternError::Empty);
    }
    pattern
        .chars()
        .enumerate()
        .map(|(position, symbol)| match symbol {
            'M' => Ok(LayerKind::Mamba2),
            '*' => Ok(LayerKind::Attention),
            '-' => Ok(LayerKind::Mlp),
            _ => Err(PatternError::Symbol { pattern: pattern.to_string(), symbol, position }),
        })
        .collect()
}

/// Spreads attention and MLP layers evenly over `layers`, as Megatron-LM does (the 8B study's 43/7/50 % hybrid is
/// `allocate(56, 0.08, 0.5)`).
///
/// # Errors
/// [`PatternError::Ratios`] when the ratios cannot be met.
pub fn allocate(layers: usize, attention: f64, mlp: f64) -> Result<Vec<LayerKind>, PatternError> {
    let share = 0.0..=1.0;
    let count = |ratio: f64| (layers as f64 * ratio).round_ties_even() as usize;
    if layers == 0 {
        return Err(PatternError::Empty);
    }
    if !share.contains(&attention) || !share.contains(&mlp) || count(attention) + count(mlp) > layers {
        return Err(PatternError::Ratios { attention, mlp, layers });
    }
    let mut kinds = vec![LayerKind::Mamba2; layers];
    place(&mut kinds, count(attention), LayerKind::Attention, true);
    place(&mut kinds, count(mlp), LayerKind::Mlp, false);
    Ok(kinds)
}

/// Replaces `count` of the Mamba layers by `kind`, evenly: the runs between them have equal length, up to rounding.
/// With `ends` there is a run after the last one too.
fn place(kinds: &mut [LayerKind], count: usize, kind: LayerKind, ends: bool) {
    if count == 0 {
        return;
    }
    let free = kinds.iter().filter(|&&k| k == LayerKind::Mamba2).count() - count;
    let run = free as f64 / (count + usize::from(ends)) as f64;
    let mut left = run;
    for slot in kinds.iter_mut().filter(|k| **k == LayerKind::Mamba2) {
        if left < 0.5 {
            *slot = kind;
            left += run;
        } else {
            left -= 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(layers: usize, attention: f64, mlp: f64) -> String {
        allocate(layers, attention, mlp).unwrap().into_iter().map(LayerKind::symbol).collect()
    }

    #[test]
    fn published_patterns_are_reproduced() {
        assert_eq!(text(56, 0.08, 0.5), "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-");
        assert_eq!(text(48, 0.08, 0.5), "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-");
        assert_eq!(text(24, 0.08, 0.5), "M-M-M--*M-M-M-M-*M--M-M-");
        assert_eq!(text(12, 0.08, 0.5), "M-M-M-*-M-M-");
        assert_eq!(text(8, 0.08, 0.5), "M-M-*-M-");
        assert_eq!(text(4, 0.0, 0.0), "MMMM");
    }

    #[test]
    fn unknown_symbols_and_impossible_ratios_are_refused() {
        assert_eq!(parse("M-X"), Err(PatternError::Symbol { pattern: "M-X".into(), symbol: 'X', position: 2 }));
        assert_eq!(parse(""), Err(PatternError::Empty));
        assert!(allocate(10, 0.6, 0.6).is_err());
        assert!(allocate(10, f64::NAN, 0.1).is_err());
    }
}

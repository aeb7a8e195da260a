//! Architectures as lists of layers, and the arithmetic that they take.

use serde::{Deserialize, Serialize};
use serde_json::json;
use terrarium_models::layers::{RopeConfig, RopeScaling};
use terrarium_models::mixers::{Activation, AttentionConfig, Mamba2Config, MambaConfig, MlpConfig};
use terrarium_models::{ConfigError, DecoderConfig, MixerConfig};

use crate::EvalError;

/// An architecture: which layers, and what about them differs from the usual.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// What tables and figures call it.
    pub name: String,
    /// Its layers, repeated until there are as many as wanted: `m` Mamba, `M` Mamba-2, `*` attention, `-` MLP.
    pub pattern: String,
    /// State width of `m` (16) and `M` (64).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<usize>,
    /// Width of a head of `*` and `M` (64; the inner width where that is smaller).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_dim: Option<usize>,
    /// Taps of a convolution over queries, keys and values of `*` (none).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention_conv: Option<usize>,
    /// Whether `*` rotates queries and keys by their positions (true). Beside scans, which tell them apart, it need not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary: Option<bool>,
    /// Learning rates to try in place of those of `training`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub learning_rates: Option<Vec<f64>>,
}

/// What an architecture is made of, apart from MLPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Attention alone.
    Transformer,
    /// Mamba alone.
    Mamba,
    /// Mamba-2 alone.
    Mamba2,
    /// Attention and another.
    Hybrid,
    /// Anything else.
    Other,
}

const HEAD: usize = 64;
const CONV: usize = 4;

impl Architecture {
    /// What it is made of.
    pub fn kind(&self) -> Kind {
        let has = |symbol: char| self.pattern.contains(symbol);
        match (has('*'), has('m'), has('M')) {
            (true, false, false) => Kind::Transformer,
            (false, true, false) => Kind::Mamba,
            (false, false, true) => Kind::Mamba2,
            (true, ..) => Kind::Hybrid,
            _ => Kind::Other,
        }
    }

    /// State width of its scans.
    pub fn state(&self) -> Option<usize> {
        let usual = match self.kind() {
            Kind::Transformer => return None,
            Kind::Mamba => 16,
            _ => 64,
        };
        Some(self.state.unwrap_or(usual))
    }

    /// A model of `layers` layers of width `d` over `vocab` tokens, its head tied to the embedding.
    ///
    /// # Errors
    /// [`EvalError::Architecture`] or [`EvalError::Value`].
    pub fn decoder(&self, d: usize, layers: usize, vocab: usize) -> Result<DecoderConfig, EvalError> {
        let fail = |source: ConfigError| EvalError::Architecture { name: self.name.clone(), source };
        // The authors' keys for what all architectures share.
        let common = json!({ "d_model": d, "n_layer": 1, "vocab_size": vocab, "pad_vocab_size_multiple": 1 });
        let base = DecoderConfig::from_value(common).map_err(fail)?;
        let symbols: Vec<char> = self.pattern.chars().cycle().take(layers).collect();
        let layers = symbols.into_iter().map(|symbol| self.layer(symbol, d)).collect::<Result<Vec<_>, _>>()?;
        if layers.is_empty() {
            return Err(EvalError::value(format!("architecture {}", self.name), "a model needs a pattern and at least one layer"));
        }
        Ok(DecoderConfig { layers, ..base })
    }

    fn layer(&self, symbol: char, d: usize) -> Result<MixerConfig, EvalError> {
        let inner = 2 * d;
        let wrong = |what: &str, reason: String| EvalError::value(format!("architecture {}: {what}", self.name), reason);
        let heads = |width: usize| {
            let head = self.head_dim.unwrap_or(HEAD).min(width);
            if head == 0 || !width.is_multiple_of(head) || !head.is_multiple_of(2) {
                return Err(wrong("head_dim", format!("{head} is odd or does not divide the width {width}")));
            }
            Ok((width / head, head))
        };
        Ok(match symbol {
            'm' => MixerConfig::Mamba(MambaConfig {
                inner,
                state: self.state.unwrap_or(16),
                dt_rank: d.div_ceil(16),
                conv_kernel: CONV,
                conv_bias: true,
                proj_bias: false,
            }),
            'M' => {
                let (heads, head_dim) = heads(inner)?;
                MixerConfig::Mamba2(Mamba2Config {
                    heads,
                    head_dim,
                    groups: 1,
                    state: self.state.unwrap_or(64),
                    conv_kernel: CONV,
                    conv_bias: true,
                    proj_bias: false,
                    dt_limit: (0.0, f32::INFINITY),
                    chunk: 256,
                    norm_eps: 1e-5,
                })
            }
            '*' => {
                let (heads, head_dim) = heads(d)?;
                MixerConfig::Attention(AttentionConfig {
                    heads,
                    kv_heads: heads,
                    head_dim,
                    rope: self.rotary.unwrap_or(true).then_some(RopeConfig { theta: 1e4, dim: head_dim, scaling: RopeScaling::Default }),
                    scale: None,
                    qkv_bias: false,
                    out_bias: false,
                    conv_kernel: self.attention_conv,
                })
            }
            // Two thirds of four times the width, three matrices: as many parameters as a Mamba layer and a third.
            '-' => MixerConfig::Mlp(MlpConfig {
                intermediate: (8 * d / 3).next_multiple_of(64),
                activation: Activation::Silu,
                gated: true,
                bias: false,
            }),
            other => return Err(wrong("pattern", format!("`{other}` is none of m (Mamba), M (Mamba-2), * (attention), - (MLP)"))),
        })
    }
}

/// Arithmetic of reading one token of rows of `length`, when the head is asked at `labelled` of the positions: products of matrices,
/// convolutions, and the textbook algorithms of the mixers as `bench ops` counts them.
pub(crate) fn forward_flop(config: &DecoderConfig, length: usize, labelled: f64) -> f64 {
    let d = config.hidden_size as f64;
    let layer = |layer: &MixerConfig| match layer {
        MixerConfig::Mamba(m) => {
            let (e, n, r) = (m.inner as f64, m.state as f64, m.dt_rank as f64);
            2.0 * (d * 2.0 * e + e * (r + 2.0 * n) + r * e + e * d) + 2.0 * m.conv_kernel as f64 * e + 9.0 * e * n
        }
        MixerConfig::Mamba2(m) => {
            let (e, h, p, g, n) = (m.inner() as f64, m.heads as f64, m.head_dim as f64, m.groups as f64, m.state as f64);
            let projections = 2.0 * (d * (2.0 * e + 2.0 * g * n + h) + e * d);
            projections + 2.0 * m.conv_kernel as f64 * m.conv_channels() as f64 + h * (256.0 * p + 4.0 * p * n) + 256.0 * g * n
        }
        MixerConfig::Attention(a) => {
            let (q, kv) = ((a.heads * a.head_dim) as f64, (a.kv_heads * a.head_dim) as f64);
            2.0 * (d * (q + 2.0 * kv) + q * d) + 2.0 * length as f64 * q
        }
        MixerConfig::Mlp(m) => 2.0 * d * m.intermediate as f64 * if m.gated { 3.0 } else { 2.0 },
    };
    config.layers.iter().map(layer).sum::<f64>() + 2.0 * d * config.vocab_size as f64 * labelled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pattern: &str) -> Architecture {
        Architecture {
            name: pattern.into(),
            pattern: pattern.into(),
            state: None,
            head_dim: None,
            attention_conv: None,
            rotary: None,
            learning_rates: None,
        }
    }

    #[test]
    fn patterns_are_repeated_and_say_what_they_are() {
        let pattern = |text: &str, layers| of(text).decoder(64, layers, 32).unwrap().pattern();
        assert_eq!([pattern("M", 2), pattern("*-", 4), pattern("MM*", 4)], ["MM", "*-*-", "MM*M"]);
        let kinds = ["*-", "m", "M-", "M*", "mM"].map(|text| of(text).kind());
        assert_eq!(kinds, [Kind::Transformer, Kind::Mamba, Kind::Mamba2, Kind::Hybrid, Kind::Other]);
        let plain = Architecture { rotary: Some(false), ..of("*") };
        for (architecture, rotates) in [(of("*"), true), (plain, false)] {
            let config = architecture.decoder(64, 1, 32).unwrap();
            assert!(matches!(&config.layers[0], MixerConfig::Attention(a) if a.rope.is_some() == rotates));
        }
        assert_eq!([of("*").state(), of("m").state(), of("M").state()], [None, Some(16), Some(64)]);
    }

    #[test]
    fn impossible_models_are_refused() {
        assert!(of("X").decoder(64, 2, 32).unwrap_err().to_string().contains("`X`"));
        assert!(of("").decoder(64, 2, 32).is_err());
        let odd = Architecture { head_dim: Some(48), ..of("*") };
        assert!(odd.decoder(64, 2, 32).unwrap_err().to_string().contains("head_dim"));
    }

    #[test]
    fn arithmetic_is_that_of_the_matrices_and_a_little_more() {
        for pattern in ["m", "M", "*", "*-", "M*"] {
            let config = of(pattern).decoder(256, 4, 1000).unwrap();
            let flop = forward_flop(&config, 1, 1.0);
            // The embedding is read, not multiplied, but serves as the head.
            let matrices = 2.0 * config.parameters() as f64;
            assert!((0.95..1.35).contains(&(flop / matrices)), "{pattern}: {flop} of {matrices}");
        }
        let config = of("*").decoder(64, 2, 32).unwrap();
        assert_eq!(forward_flop(&config, 101, 0.0) - forward_flop(&config, 1, 0.0), 2.0 * 2.0 * 100.0 * 64.0);
    }
}

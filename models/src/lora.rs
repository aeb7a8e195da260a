//! Low-rank adapters (LoRA, arXiv 2106.09685) on any projection of any mixer.

use std::fmt;
use std::str::FromStr;

use burn::module::{Module, Param};
use burn::tensor::{DType, Tensor};
use terrarium_kernels::KernelBackend;

use crate::Decoder;
use crate::init::{RandomSource, kaiming};
use crate::layers::Lora;
use crate::params::{ParamInit, ParamSource, ParamSpec};

/// Adapters to attach.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank of each adapter.
    pub rank: usize,
    /// The adapter's share is `alpha / rank`.
    pub alpha: f32,
    /// Projections to adapt.
    pub targets: LoraTargets,
}

/// Which projections are adapted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum LoraTargets {
    /// All of them.
    #[default]
    All,
    /// `q_proj k_proj v_proj o_proj`.
    Attention,
    /// `in_proj x_proj dt_proj out_proj`.
    Ssm,
    /// `gate_proj up_proj down_proj`.
    Mlp,
    /// By name.
    Names(Vec<String>),
}

/// Adapters that cannot be attached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoraError {
    /// A target that matches nothing in this model.
    #[error("LoRA target `{target}` matches no projection of this model; it has: {available}")]
    NoMatch {
        /// The target.
        target: String,
        /// Names of the model's projections.
        available: String,
    },
    /// Rank zero or larger than a projection.
    #[error("LoRA rank {rank} does not fit {path} ({out} x {inputs}); choose 1..={most}", most = (*out).min(*inputs))]
    Rank {
        /// The rank.
        rank: usize,
        /// Projection.
        path: String,
        /// Its rows.
        out: usize,
        /// Its columns.
        inputs: usize,
    },
    /// The model has adapters already.
    #[error("the model has adapters already; merge them first")]
    Attached,
}

impl FromStr for LoraTargets {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "all" => Self::All,
            "attention" => Self::Attention,
            "ssm" => Self::Ssm,
            "mlp" => Self::Mlp,
            names => Self::Names(names.split(',').map(|name| name.trim().to_string()).collect()),
        })
    }
}

impl LoraTargets {
    fn names(&self) -> Option<Vec<&str>> {
        match self {
            Self::All => None,
            Self::Attention => Some(vec!["q_proj", "k_proj", "v_proj", "o_proj"]),
            Self::Ssm => Some(vec!["in_proj", "x_proj", "dt_proj", "out_proj"]),
            Self::Mlp => Some(vec!["gate_proj", "up_proj", "down_proj"]),
            Self::Names(names) => Some(names.iter().map(String::as_str).collect()),
        }
    }

    /// True when each name has to match, not just one of a preset.
    fn explicit(&self) -> bool {
        matches!(self, Self::Names(_))
    }
}

/// What was adapted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraReport {
    /// Paths of adapted projections.
    pub adapted: Vec<String>,
    /// Paths of projections left alone.
    pub untouched: Vec<String>,
    /// Elements in adapters.
    pub trainable: usize,
    /// Elements in the model, adapters included.
    pub total: usize,
}

impl fmt::Display for LoraReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let projections = self.adapted.len() + self.untouched.len();
        let share = 100.0 * self.trainable as f64 / self.total as f64;
        write!(f, "adapting {} of {projections} projections, {share:.2} % of parameters; untouched: ", self.adapted.len())?;
        let mut names: Vec<&str> = self.untouched.iter().filter_map(|path| path.rsplit('.').next()).collect();
        names.sort_unstable();
        names.dedup();
        if !names.is_empty() {
            write!(f, "{}, ", names.join(", "))?;
        }
        f.write_str("embeddings, head, norms, convolutions, A_log, D, dt_bias")
    }
}

impl<B: KernelBackend> Decoder<B> {
    /// Attaches adapters and freezes everything else. `a` starts uniform, `b` zero: the model computes what it did.
    ///
    /// # Errors
    /// [`LoraError`] when a target matches nothing, the rank does not fit, or there are adapters already.
    pub fn attach_lora(self, config: &LoraConfig, seed: u64, device: &B::Device) -> Result<(Self, LoraReport), LoraError> {
        if self.has_lora() {
            return Err(LoraError::Attached);
        }
        let mut model = self.no_grad();
        let names = config.targets.names();
        let mut report = LoraReport { adapted: vec![], untouched: vec![], trainable: 0, total: 0 };
        let mut misfit = None;
        let mut source = RandomSource::new(seed);
        model.for_each_linear(&mut |path, linear| {
            let name = path.rsplit('.').next().unwrap_or(path);
            if names.as_ref().is_some_and(|names| !names.contains(&name)) {
                return report.untouched.push(path.to_string());
            }
            let [out, inputs] = linear.dims();
            if config.rank == 0 || config.rank > out.min(inputs) {
                misfit.get_or_insert(LoraError::Rank { rank: config.rank, path: path.to_string(), out, inputs });
                return;
            }
            let mut param = |name: &str, shape: [usize; 2], init: ParamInit| {
                let data = source.param(&ParamSpec::new(format!("{path}.lora.{name}"), shape, init));
                Param::from_tensor(Tensor::from_data(data, (device, DType::F32)))
            };
            let (a, b) = (param("a", [config.rank, inputs], kaiming(inputs)), param("b", [out, config.rank], ParamInit::Zeros));
            linear.lora = Some(Lora { a, b, scale: config.alpha / config.rank as f32 });
            report.trainable += config.rank * (inputs + out);
            report.adapted.push(path.to_string());
        });
        if let Some(error) = misfit {
            return Err(error);
        }
        check_targets(config, names.as_deref().unwrap_or_default(), &report)?;
        report.total = model.num_params();
        Ok((model, report))
    }

    /// Adds every adapter into its projection.
    pub fn merge_lora(mut self) -> Self {
        self.for_each_linear(&mut |_, linear| linear.merge());
        self
    }

    /// True when some projection has an adapter.
    pub fn has_lora(&self) -> bool {
        let mut found = false;
        self.clone().for_each_linear(&mut |_, linear| found |= linear.lora.is_some());
        found
    }
}

fn check_targets(config: &LoraConfig, names: &[&str], report: &LoraReport) -> Result<(), LoraError> {
    let has = |name: &str| report.adapted.iter().any(|path| path.rsplit('.').next() == Some(name));
    let missing =
        if config.targets.explicit() { names.iter().find(|name| !has(name)) } else { names.first().filter(|_| report.adapted.is_empty()) };
    let Some(target) = missing else { return Ok(()) };
    let mut available: Vec<&str> = report.adapted.iter().chain(&report.untouched).filter_map(|path| path.rsplit('.').next()).collect();
    available.sort_unstable();
    available.dedup();
    Err(LoraError::NoMatch { target: (*target).to_string(), available: available.join(", ") })
}

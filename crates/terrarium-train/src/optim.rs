//! AdamW (arXiv 1711.05101) with decay groups, its state as plain tensors by parameter path.
//!
//! Burn's optimisers key their state by ids that a reload changes, decay every parameter, and clip each one alone.

use std::collections::BTreeMap;
use std::fmt;

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Tensor, TensorData};
use serde::Serialize;
use terrarium_kernels::KernelBackend;
use terrarium_kernels::adamw::{AdamWArgs, AdamWFactors, AdamWOut};
use terrarium_models::params::PathTracker;

use crate::config::TrainConfig;
use crate::gradients::Gradients;
use crate::params::ParamInfo;

/// AdamW's numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of matrices.
    pub weight_decay: f64,
}

impl AdamWConfig {
    /// Those of a run.
    pub fn new(config: &TrainConfig) -> Self {
        Self { betas: config.betas, eps: config.eps, weight_decay: config.weight_decay }
    }
}

/// Moments of one parameter, flattened.
#[derive(Debug, Clone)]
struct Moments<B: Backend> {
    first: Tensor<B, 1>,
    second: Tensor<B, 1>,
}

/// What is special about one step.
#[derive(Debug, Clone, Copy)]
struct Pace {
    lr: f64,
    clip: f64,
}

/// The optimiser and its state.
#[derive(Debug, Clone)]
pub struct AdamW<B: Backend> {
    config: AdamWConfig,
    step: usize,
    moments: BTreeMap<String, Moments<B>>,
}

/// Matrices decay; norms, biases, decay rates (`a_log`), skips (`d`), step sizes (`dt_bias`) and other vectors do not.
///
/// The last name is looked at besides the rank, since a family may keep such a vector with an axis more.
pub fn decays(path: &str, shape: &[usize]) -> bool {
    let name = path.rsplit('.').next().unwrap_or(path);
    let axes = shape.iter().filter(|size| **size > 1).count();
    axes >= 2 && !matches!(name, "a_log" | "d" | "dt_bias" | "bias") && !path.contains("norm")
}

/// Which parameters decay.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Groups {
    /// Tensors and elements that decay.
    pub decay: (usize, usize),
    /// Tensors and elements that do not.
    pub no_decay: (usize, usize),
    /// Tensors and elements that are not trained.
    pub frozen: (usize, usize),
}

impl Groups {
    /// Sorts a model's parameters.
    pub(crate) fn of(params: &[ParamInfo]) -> Self {
        let mut groups = Self::default();
        for param in params {
            let group = match (param.trained, decays(&param.path, &param.shape)) {
                (false, _) => &mut groups.frozen,
                (true, true) => &mut groups.decay,
                (true, false) => &mut groups.no_decay,
            };
            group.0 += 1;
            group.1 += param.len();
        }
        groups
    }

    /// Elements that are trained.
    pub fn trained(&self) -> usize {
        self.decay.1 + self.no_decay.1
    }
}

impl fmt::Display for Groups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |(tensors, elements): (usize, usize)| format!("{tensors} tensors {}", count(elements));
        write!(f, "decay: {}; no decay: {}", part(self.decay), part(self.no_decay))?;
        if self.frozen.0 > 0 {
            write!(f, "; frozen: {}", part(self.frozen))?;
        }
        Ok(())
    }
}

/// `1234567` as `1.2M`.
pub(crate) fn count(n: usize) -> String {
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{:.1}k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", n as f64 / 1e6),
        _ => format!("{:.2}B", n as f64 / 1e9),
    }
}

impl<B: KernelBackend> AdamW<B> {
    /// An optimiser before its first step.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, step: 0, moments: BTreeMap::new() }
    }

    /// Updates every parameter that has a gradient. Gradients are multiplied with `factor` (clipping) first.
    pub fn step<A, M>(&mut self, model: M, grads: Gradients<B>, lr: f64, factor: f64) -> M
    where
        A: AutodiffBackend<InnerBackend = B>,
        M: Module<A>,
    {
        self.step += 1;
        model.map(&mut Update { optim: self, grads, lr, clip: factor, tracker: PathTracker::default() })
    }

    /// New value of one flattened parameter.
    fn update(&mut self, path: &str, value: Tensor<B, 1>, grad: Tensor<B, 1>, pace: Pace, decay: bool) -> Tensor<B, 1> {
        let AdamWConfig { betas: [b1, b2], eps, weight_decay } = self.config;
        let correct = |beta: f64| 1.0 - beta.powi(self.step.min(i32::MAX as usize) as i32);
        let root = correct(b2).sqrt().recip();
        let step = pace.lr / correct(b1);
        let keep = if decay { 1.0 - pace.lr * weight_decay } else { 1.0 };
        let before = self.moments.remove(path);
        let factors = AdamWFactors {
            clip: pace.clip as f32,
            first: (b1 as f32, (1.0 - b1) as f32),
            second: (b2 as f32, (1.0 - b2) as f32),
            root: root as f32,
            eps: eps as f32,
            step: step as f32,
            keep: keep as f32,
        };
        let args = AdamWArgs { value, grad, moments: before.map(|moments| (moments.first, moments.second)), factors };
        let AdamWOut { value, first, second } = B::adamw(args);
        self.moments.insert(path.to_string(), Moments { first, second });
        value
    }

    /// Moments by `PATH.first` and `PATH.second`.
    pub fn state(&self) -> Vec<(String, TensorData)> {
        let both = |(path, moments): (&String, &Moments<B>)| {
            [(format!("{path}.first"), moments.first.to_data()), (format!("{path}.second"), moments.second.to_data())]
        };
        self.moments.iter().flat_map(both).collect()
    }

    /// The same optimiser with its moments on `device`.
    pub fn copied_to(&self, device: &B::Device) -> Self {
        let copy = |tensor: &Tensor<B, 1>| Tensor::from_data(tensor.to_data(), (device, tensor.dtype()));
        let both = |(path, moments): (&String, &Moments<B>)| {
            (path.clone(), Moments { first: copy(&moments.first), second: copy(&moments.second) })
        };
        Self { config: self.config, step: self.step, moments: self.moments.iter().map(both).collect() }
    }

    /// Restores what [`AdamW::state`] gave.
    ///
    /// # Errors
    /// A sentence that names a moment without its pair.
    pub fn restore(config: AdamWConfig, step: usize, state: Vec<(String, TensorData)>, device: &B::Device) -> Result<Self, String> {
        let mut values: BTreeMap<String, TensorData> = state.into_iter().collect();
        let paths: Vec<String> = values.keys().filter_map(|key| key.strip_suffix(".first").map(str::to_string)).collect();
        let mut moments = BTreeMap::new();
        for path in paths {
            let mut take = |name: &str| {
                let data = values.remove(&format!("{path}.{name}")).ok_or_else(|| format!("{path}.{name} is missing"))?;
                let dtype = data.dtype;
                Ok::<_, String>(Tensor::<B, 1>::from_data(data, (device, dtype)))
            };
            let (first, second) = (take("first")?, take("second")?);
            if first.dims() != second.dims() {
                return Err(format!("the moments of {path} differ in shape"));
            }
            moments.insert(path, Moments { first, second });
        }
        match values.keys().next() {
            Some(extra) => Err(format!("{extra} has no pair")),
            None => Ok(Self { config, step, moments }),
        }
    }
}

/// Walks the model once, updating in place.
struct Update<'a, B: KernelBackend> {
    optim: &'a mut AdamW<B>,
    grads: Gradients<B>,
    lr: f64,
    clip: f64,
    tracker: PathTracker,
}

impl<A: AutodiffBackend<InnerBackend: KernelBackend>> ModuleMapper<A> for Update<'_, A::InnerBackend> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<A, D>>) -> Param<Tensor<A, D>> {
        let path = self.tracker.path();
        let Some(grad) = self.grads.remove(&path) else { return param };
        let (id, value, mapper) = param.consume();
        let shape = value.shape();
        let value = value.inner();
        let decay = decays(&path, &value.dims());
        let pace = Pace { lr: self.lr, clip: self.clip };
        let new = self.optim.update(&path, value.reshape([shape.num_elements()]), grad, pace, decay);
        let new: Tensor<A::InnerBackend, D> = new.reshape(shape);
        Param::from_mapped_value(id, Tensor::from_inner(new).require_grad(), mapper)
    }
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.tracker.enter(name, container_type);
    }
    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.tracker.exit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use terrarium_kernels::backend::CpuBackend;

    #[test]
    fn vectors_and_state_space_parameters_do_not_decay() {
        for (path, shape) in [
            ("layers.0.mixer.in_proj.weight", vec![8, 4]),
            ("embeddings.weight", vec![9, 4]),
            ("lm_head.weight", vec![9, 4]),
            ("layers.0.mixer.in_proj.lora.a", vec![2, 4]),
        ] {
            assert!(decays(path, &shape), "{path}");
        }
        for (path, shape) in [
            ("layers.0.norm.weight", vec![4]),
            ("layers.0.mixer.norm.weight", vec![2, 4]),
            ("layers.0.mixer.a_log", vec![4]),
            ("layers.0.mixer.a_log", vec![4, 16]),
            ("layers.0.mixer.d", vec![4]),
            ("layers.0.mixer.dt_bias", vec![4]),
            ("layers.0.mixer.conv1d.bias", vec![4]),
        ] {
            assert!(!decays(path, &shape), "{path}");
        }
    }

    #[test]
    fn updates_follow_the_paper() {
        let device = Default::default();
        let config = AdamWConfig { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.1 };
        let mut optim = AdamW::<CpuBackend>::new(config);
        let (mut value, mut m, mut v) = (2.0_f64, 0.0_f64, 0.0_f64);
        let mut tensor = Tensor::<CpuBackend, 1>::from_floats([2.0], &device);
        for (step, grad) in [0.5_f64, -0.25, 1.0].into_iter().enumerate() {
            let t = step as i32 + 1;
            let clipped = grad * 0.5;
            m = 0.9 * m + 0.1 * clipped;
            v = 0.99 * v + 0.01 * clipped * clipped;
            value -= 0.01 * 0.1 * value;
            value -= 0.01 * (m / (1.0 - 0.9_f64.powi(t))) / ((v / (1.0 - 0.99_f64.powi(t))).sqrt() + 1e-8);
            optim.step += 1;
            let grad = Tensor::from_floats([grad as f32], &device);
            tensor = optim.update("w", tensor, grad, Pace { lr: 0.01, clip: 0.5 }, true);
            let found = tensor.clone().into_scalar();
            assert!((f64::from(found) - value).abs() < 1e-6, "step {t}: {found} against {value}");
        }
        let restored = AdamW::<CpuBackend>::restore(config, 3, optim.state(), &device).unwrap();
        assert_eq!(restored.state(), optim.state());
        let mut broken = optim.state();
        broken.pop();
        assert!(AdamW::<CpuBackend>::restore(config, 3, broken, &device).unwrap_err().contains("w.second"));
    }
}

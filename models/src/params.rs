//! Where parameters come from, and what they are called.
//!
//! A model is described once as a list of [`ParamSpec`]; the same list initialises it, loads it and counts it.

use std::collections::HashMap;

use burn::module::Param;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

/// Starting values of one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ParamInit {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// Uniform in `(-bound, bound)`.
    Uniform {
        /// Half width.
        bound: f32,
    },
    /// `ln u` with `u` uniform in `(1, 16)`: Mamba-2's `A_log`.
    ALog,
    /// `ln(j + 1)` in column `j`: Mamba-1's `A_log` (the real S4D initialisation).
    S4dReal,
    /// The inverse softplus of a step size drawn log-uniformly from `(0.001, 0.1)`, at least `1e-4`.
    DtBias,
}

/// One parameter: its path in the module, its shape, its starting values.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamSpec {
    /// Module path, such as `layers.3.mixer.in_proj.weight`.
    pub path: String,
    /// Shape in the module.
    pub shape: Vec<usize>,
    /// Starting values.
    pub init: ParamInit,
    /// Kept in float32 whatever the model's dtype (decay rates and step sizes lose too much in half precision).
    pub float32: bool,
}

impl ParamSpec {
    pub(crate) fn new(path: impl Into<String>, shape: impl Into<Vec<usize>>, init: ParamInit) -> Self {
        Self { path: path.into(), shape: shape.into(), init, float32: false }
    }

    pub(crate) fn in_float32(mut self) -> Self {
        self.float32 = true;
        self
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True for a parameter without elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn under(mut self, prefix: &str) -> Self {
        self.path = format!("{prefix}.{}", self.path);
        self
    }
}

/// Gives values to parameters. A source that loads collects what goes wrong, hands back zeros, and reports at the end.
pub trait ParamSource {
    /// Values of one parameter, in any float dtype and in the order of `spec.shape`.
    fn param(&mut self, spec: &ParamSpec) -> TensorData;
}

/// Parameters of one module, taken out by name while the module is put together.
pub(crate) struct Bag<B: Backend> {
    values: HashMap<String, (TensorData, DType)>,
    device: B::Device,
}

impl<B: Backend> Bag<B> {
    /// Asks `source` for every spec; names in the bag are relative to `prefix`.
    pub fn fill(specs: &[ParamSpec], prefix: &str, source: &mut dyn ParamSource, dtype: DType, device: &B::Device) -> Self {
        let values = specs
            .iter()
            .map(|spec| {
                let full = if prefix.is_empty() { spec.clone() } else { spec.clone().under(prefix) };
                let data = source.param(&full);
                assert_eq!(data.num_elements(), spec.len(), "{}: the source returned another size", full.path);
                let dtype = if spec.float32 { DType::F32 } else { dtype };
                (spec.path.clone(), (TensorData { shape: spec.shape.clone().into(), ..data }, dtype))
            })
            .collect();
        Self { values, device: device.clone() }
    }

    /// Takes a parameter that may be absent from the module's list.
    pub fn optional<const D: usize>(&mut self, name: &str) -> Option<Param<Tensor<B, D>>> {
        let (data, dtype) = self.values.remove(name)?;
        Some(Param::from_tensor(Tensor::from_data(data.convert_dtype(dtype), (&self.device, dtype))))
    }

    /// Takes a parameter of the module's list.
    ///
    /// # Panics
    /// When the list lacks it, which is a mistake in this crate.
    pub fn take<const D: usize>(&mut self, name: &str) -> Param<Tensor<B, D>> {
        self.optional(name).unwrap_or_else(|| panic!("{name} is not in the module's parameter list"))
    }
}

/// Builds parameter paths inside `ModuleVisitor` and `ModuleMapper` implementations, leaving enum variants out.
#[derive(Debug, Default, Clone)]
pub struct PathTracker {
    parts: Vec<Option<String>>,
}

impl PathTracker {
    /// Call from `enter_module`.
    pub fn enter(&mut self, name: &str, container: &str) {
        self.parts.push((!container.starts_with("Enum:")).then(|| name.to_string()));
    }

    /// Call from `exit_module`.
    pub fn exit(&mut self) {
        self.parts.pop();
    }

    /// The path at this point.
    pub fn path(&self) -> String {
        self.parts.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(".")
    }
}

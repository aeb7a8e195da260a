//! Gradients by parameter path: summed over micro-batches, measured and clipped as one vector.

use std::collections::BTreeMap;

use burn::module::{ModuleVisitor, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};
use terrarium_kernels::KernelBackend;
use terrarium_models::Decoder;
use terrarium_models::params::PathTracker;

use crate::host;

/// Gradients of one optimiser step, flattened, by parameter path.
#[derive(Debug, Clone)]
pub struct Gradients<B: Backend> {
    tensors: BTreeMap<String, Tensor<B, 1>>,
}

impl<B: Backend> Default for Gradients<B> {
    fn default() -> Self {
        Self { tensors: BTreeMap::new() }
    }
}

/// The global norm, or the first gradient that has none.
#[derive(Debug, Clone, PartialEq)]
pub enum Norm {
    /// Square root of the sum of all squares.
    Finite(f64),
    /// Path of the first parameter whose gradient is not finite.
    NotFinite(String),
}

impl<B: KernelBackend> Gradients<B> {
    /// Adds what one backward pass left for the parameters of `model`.
    pub fn add<A>(&mut self, model: &Decoder<A>, grads: A::Gradients)
    where
        A: AutodiffBackend<InnerBackend = B>,
    {
        struct Collect<'a, A: AutodiffBackend> {
            tracker: PathTracker,
            grads: A::Gradients,
            tensors: &'a mut BTreeMap<String, Tensor<A::InnerBackend, 1>>,
        }
        impl<A: AutodiffBackend> ModuleVisitor<A> for Collect<'_, A> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<A, D>>) {
                let value = param.val();
                let Some(grad) = value.grad_remove(&mut self.grads) else { return };
                let grad: Tensor<A::InnerBackend, 1> = grad.reshape([value.shape().num_elements()]);
                let path = self.tracker.path();
                let sum = match self.tensors.remove(&path) {
                    Some(before) if host::is_host::<A::InnerBackend>(&grad.device()) => host::add(before, grad),
                    Some(before) => before + grad,
                    None => grad,
                };
                self.tensors.insert(path, sum);
            }
            fn enter_module(&mut self, name: &str, container_type: &str) {
                self.tracker.enter(name, container_type);
            }
            fn exit_module(&mut self, _name: &str, _container_type: &str) {
                self.tracker.exit();
            }
        }
        burn::module::Module::visit(model, &mut Collect::<A> { tracker: PathTracker::default(), grads, tensors: &mut self.tensors });
    }

    /// Gradients by path.
    pub(crate) fn from_tensors(tensors: BTreeMap<String, Tensor<B, 1>>) -> Self {
        Self { tensors }
    }

    /// The gradients by path.
    pub(crate) fn into_tensors(self) -> BTreeMap<String, Tensor<B, 1>> {
        self.tensors
    }

    /// Takes the gradient of one parameter.
    pub fn remove(&mut self, path: &str) -> Option<Tensor<B, 1>> {
        self.tensors.remove(path)
    }

    /// Paths with a gradient.
    pub fn paths(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The gradient of one parameter, flattened.
    pub fn get(&self, path: &str) -> Option<&Tensor<B, 1>> {
        self.tensors.get(path)
    }

    /// The norm of all gradients together. One transfer from a device.
    pub fn norm(&self) -> Norm {
        let tensors: Vec<Tensor<B, 1>> = self.tensors.values().cloned().collect();
        let squares = B::square_sums(&tensors);
        match self.tensors.keys().zip(&squares).find(|(_, square)| !square.is_finite()) {
            Some((path, _)) => Norm::NotFinite(path.clone()),
            None => Norm::Finite(squares.iter().sum::<f64>().sqrt()),
        }
    }
}

/// What every gradient is multiplied with so that their norm is at most `clip` (0: no limit).
pub fn clip_factor(norm: f64, clip: f64) -> f64 {
    if clip > 0.0 && norm > clip { clip / norm } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use terrarium_kernels::backend::CpuBackend;

    fn gradients(values: &[(&str, &[f32])]) -> Gradients<CpuBackend> {
        let tensors =
            values.iter().map(|(path, values)| ((*path).to_string(), Tensor::from_floats(*values, &Default::default()))).collect();
        Gradients { tensors }
    }

    #[test]
    fn the_norm_is_that_of_all_gradients_together() {
        assert_eq!(gradients(&[("a", &[3.0, 0.0]), ("b", &[4.0])]).norm(), Norm::Finite(5.0));
        assert_eq!(gradients(&[]).norm(), Norm::Finite(0.0));
        assert_eq!(gradients(&[("a", &[3.0]), ("b", &[f32::NAN]), ("c", &[f32::INFINITY])]).norm(), Norm::NotFinite("b".into()));
    }

    #[test]
    fn clipping_shortens_and_never_lengthens() {
        assert_eq!([clip_factor(5.0, 1.0), clip_factor(0.5, 1.0), clip_factor(5.0, 0.0)], [0.2, 1.0, 1.0]);
    }
}

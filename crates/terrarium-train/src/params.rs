//! Walking over a model's parameters by path.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};
use terrarium_models::params::PathTracker;

/// One parameter as training sees it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ParamInfo {
    /// Module path.
    pub path: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Whether it is trained.
    pub trained: bool,
}

impl ParamInfo {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Lists every parameter in module order.
pub(crate) fn list<B: Backend>(module: &impl Module<B>) -> Vec<ParamInfo> {
    struct List(PathTracker, Vec<ParamInfo>);
    impl<B: Backend> ModuleVisitor<B> for List {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let value = param.val();
            self.1.push(ParamInfo { path: self.0.path(), shape: value.dims().to_vec(), trained: param.is_require_grad() });
        }
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.0.enter(name, container_type);
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.0.exit();
        }
    }
    let mut list = List(PathTracker::default(), Vec::new());
    module.visit(&mut list);
    list.1
}

/// Values of the trained parameters, by path.
pub(crate) fn trained_values<B: Backend>(module: &impl Module<B>) -> Vec<(String, TensorData)> {
    struct Collect(PathTracker, Vec<(String, TensorData)>);
    impl<B: Backend> ModuleVisitor<B> for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                self.1.push((self.0.path(), param.val().into_data()));
            }
        }
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.0.enter(name, container_type);
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.0.exit();
        }
    }
    let mut collect = Collect(PathTracker::default(), Vec::new());
    module.visit(&mut collect);
    collect.1
}

/// The same parameters on `device`, each with its own memory there.
pub(crate) fn copied_to<B: Backend, M: Module<B>>(module: M, device: &B::Device) -> M {
    struct Copy<'a, B: Backend>(&'a B::Device);
    impl<B: Backend> ModuleMapper<B> for Copy<'_, B> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let trained = param.is_require_grad();
            let (id, old, mapper) = param.consume();
            let dtype = old.dtype();
            let new = Tensor::from_data(old.into_data(), (self.0, dtype)).set_require_grad(trained);
            Param::from_mapped_value(id, new, mapper)
        }
    }
    module.map(&mut Copy(device))
}

/// Puts `values` into the parameters of their paths; every trained parameter has to be given.
///
/// # Errors
/// A sentence that lists what is missing, left over, or of another shape.
pub(crate) fn assign<B: Backend, M: Module<B>>(module: M, values: Vec<(String, TensorData)>) -> Result<M, String> {
    struct Assign {
        tracker: PathTracker,
        values: BTreeMap<String, TensorData>,
        problems: Vec<String>,
    }
    impl<B: Backend> ModuleMapper<B> for Assign {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let path = self.tracker.path();
            let trained = param.is_require_grad();
            let (id, old, mapper) = param.consume();
            let new = match self.values.remove(&path) {
                Some(data) if data.shape.as_slice() == old.dims() => {
                    let dtype = old.dtype();
                    Tensor::from_data(data.convert_dtype(dtype), (&old.device(), dtype)).set_require_grad(trained)
                }
                Some(data) => {
                    self.problems.push(format!("{path} has shape {:?}, expected {:?}", data.shape.as_slice(), old.dims()));
                    old
                }
                None => {
                    if trained {
                        self.problems.push(format!("{path} is missing"));
                    }
                    old
                }
            };
            Param::from_mapped_value(id, new, mapper)
        }
        fn enter_module(&mut self, name: &str, container_type: &str) {
            self.tracker.enter(name, container_type);
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.tracker.exit();
        }
    }
    let mut assign = Assign { tracker: PathTracker::default(), values: values.into_iter().collect(), problems: Vec::new() };
    let module = module.map(&mut assign);
    assign.problems.extend(assign.values.keys().map(|path| format!("{path} is not in the model")));
    if assign.problems.is_empty() { Ok(module) } else { Err(assign.problems.join("; ")) }
}

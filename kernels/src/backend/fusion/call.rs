//! Putting a fast path into the stream as one operation.

use std::fmt;
use std::sync::Arc;

use burn::tensor::ops::{BoolTensor, FloatTensor, IntTensor};
use burn::tensor::{DType, Int, Shape, Tensor, TensorMetadata, TensorPrimitive};
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionRuntime, FusionTensor};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, TensorIr};

use crate::path::{KernelChoice, PINNED, choice};
use crate::segments::Host;
use crate::{KernelBackend, Segments};

/// Tells what a decorator decorates.
pub trait Decorator {
    /// The backend below.
    type Below;
}

impl<B: FusionBackend> Decorator for Fusion<B> {
    type Below = B;
}

type Runtime<B> = <B as FusionBackend>::FusionRuntime;
type Handles<B> = HandleContainer<<Runtime<B> as FusionRuntime>::FusionHandle>;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Float,
    Int,
    Bool,
}

/// An operation on its way into the stream: tensors are put in here, and taken out by their tickets when it runs.
pub(super) struct Call<B: FusionBackend> {
    /// Tells operations apart that the stream would take for the same: name, and a letter for each argument.
    id: String,
    inputs: Vec<(Kind, FusionTensor<Runtime<B>>)>,
    outputs: Vec<(Shape, DType)>,
}

/// Place of a float tensor among the inputs.
#[derive(Clone, Copy)]
pub(super) struct Float<const D: usize>(usize);

/// Place of an integer tensor among the inputs.
#[derive(Clone, Copy)]
pub(super) struct Ints<const D: usize>(usize);

/// Document boundaries: what the host knows, and places of what lies on the device.
#[derive(Clone)]
pub(super) struct Documents {
    host: Arc<Host>,
    filled: Ints<2>,
    bounds: Ints<2>,
    valid: usize,
}

impl<B: FusionBackend + KernelBackend> Call<B> {
    pub fn new(name: &str) -> Self {
        Self { id: format!("{name} "), inputs: Vec::new(), outputs: Vec::new() }
    }

    fn put(&mut self, kind: Kind, tensor: FusionTensor<Runtime<B>>) -> usize {
        self.id.push(match kind {
            Kind::Float => 'f',
            Kind::Int => 'i',
            Kind::Bool => 'b',
        });
        self.inputs.push((kind, tensor));
        self.inputs.len() - 1
    }

    pub fn float<const D: usize>(&mut self, tensor: Tensor<Fusion<B>, D>) -> Float<D> {
        Float(self.put(Kind::Float, tensor.into_primitive().tensor()))
    }

    pub fn maybe<const D: usize>(&mut self, tensor: Option<Tensor<Fusion<B>, D>>) -> Option<Float<D>> {
        if tensor.is_none() {
            self.id.push('-');
        }
        tensor.map(|tensor| self.float(tensor))
    }

    pub fn int<const D: usize>(&mut self, tensor: Tensor<Fusion<B>, D, Int>) -> Ints<D> {
        Ints(self.put(Kind::Int, tensor.into_primitive()))
    }

    pub fn segments(&mut self, segments: Option<Segments<Fusion<B>>>) -> Option<Documents> {
        let Some(Segments { host, filled, valid, bounds }) = segments else {
            self.id.push('-');
            return None;
        };
        let (filled, bounds) = (self.int(filled), self.int(bounds));
        Some(Documents { host, filled, bounds, valid: self.put(Kind::Bool, valid.into_primitive()) })
    }

    /// Declares an output. Its shape and dtype must be what the operation will give.
    pub fn out<const D: usize>(&mut self, shape: [usize; D], dtype: DType) {
        self.outputs.push((Shape::from(shape), dtype));
    }

    /// Declares an output of an input's shape and dtype.
    pub fn out_like<const D: usize>(&mut self, tensor: &Tensor<Fusion<B>, D>) {
        self.out(tensor.dims(), tensor.dtype());
    }

    /// Declares an output for an optional input, and says whether it is there.
    pub fn out_maybe<const D: usize>(&mut self, tensor: &Option<Tensor<Fusion<B>, D>>) -> bool {
        tensor.iter().for_each(|tensor| self.out_like(tensor));
        tensor.is_some()
    }

    /// Whether no output is declared.
    pub fn is_silent(&self) -> bool {
        self.outputs.is_empty()
    }

    /// Queues the operation. `run` gives its outputs in the declared order.
    pub fn queue(self, run: impl Fn(&mut Taken<B>) -> Vec<FloatTensor<B>> + Send + Sync + 'static) -> Outputs<B> {
        let client = self.inputs[0].1.client.clone();
        let streams = OperationStreams::with_inputs(self.inputs.iter().map(|(_, tensor)| tensor));
        let outputs: Vec<TensorIr> =
            self.outputs.into_iter().map(|(shape, dtype)| TensorIr::uninit(client.create_empty_handle(), shape, dtype)).collect();
        let (kinds, inputs) = self.inputs.into_iter().map(|(kind, tensor)| (kind, tensor.into_ir())).unzip();
        let desc = CustomOpIr { id: self.id, inputs, outputs };
        let operation = Queued::<B> { desc: desc.clone(), kinds, choice: choice(), run: Box::new(run) };
        Outputs(client.register(streams, OperationIr::Custom(desc), operation).into_iter())
    }
}

/// Outputs, to be taken in the declared order.
pub(super) struct Outputs<B: FusionBackend>(std::vec::IntoIter<FusionTensor<Runtime<B>>>);

impl<B: FusionBackend> Outputs<B> {
    pub fn next<const D: usize>(&mut self) -> Tensor<Fusion<B>, D> {
        let tensor = self.0.next().unwrap_or_else(|| unreachable!("an output for each that was declared"));
        Tensor::from_primitive(TensorPrimitive::Float(tensor))
    }

    pub fn next_if<const D: usize>(&mut self, there: bool) -> Option<Tensor<Fusion<B>, D>> {
        there.then(|| self.next())
    }
}

enum Primitive<B: FusionBackend> {
    Float(FloatTensor<B>),
    Int(IntTensor<B>),
    Bool(BoolTensor<B>),
}

/// The inputs of an operation that runs now. Each can be taken once.
pub(super) struct Taken<B: FusionBackend>(Vec<Option<Primitive<B>>>);

impl<B: FusionBackend + KernelBackend> Taken<B> {
    pub fn float<const D: usize>(&mut self, place: Float<D>) -> Tensor<B, D> {
        match self.0[place.0].take() {
            Some(Primitive::Float(tensor)) => Tensor::from_primitive(TensorPrimitive::Float(tensor)),
            _ => unreachable!("a float, taken once"),
        }
    }

    pub fn maybe<const D: usize>(&mut self, place: Option<Float<D>>) -> Option<Tensor<B, D>> {
        place.map(|place| self.float(place))
    }

    pub fn int<const D: usize>(&mut self, place: Ints<D>) -> Tensor<B, D, Int> {
        match self.0[place.0].take() {
            Some(Primitive::Int(tensor)) => Tensor::from_primitive(tensor),
            _ => unreachable!("an integer, taken once"),
        }
    }

    pub fn segments(&mut self, places: &Option<Documents>) -> Option<Segments<B>> {
        places.as_ref().map(|places| Segments {
            host: Arc::clone(&places.host),
            filled: self.int(places.filled),
            bounds: self.int(places.bounds),
            valid: match self.0[places.valid].take() {
                Some(Primitive::Bool(tensor)) => Tensor::from_primitive(tensor),
                _ => unreachable!("a bool, taken once"),
            },
        })
    }
}

type Body<B> = dyn Fn(&mut Taken<B>) -> Vec<FloatTensor<B>> + Send + Sync;

struct Queued<B: FusionBackend> {
    desc: CustomOpIr,
    kinds: Vec<Kind>,
    /// In force when it was queued: what is declared depends on it.
    choice: KernelChoice,
    run: Box<Body<B>>,
}

impl<B: FusionBackend> fmt::Debug for Queued<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queued").field("desc", &self.desc).finish_non_exhaustive()
    }
}

/// Puts the choice back, also after a panic.
struct Unpin(Option<KernelChoice>);

impl Drop for Unpin {
    fn drop(&mut self) {
        PINNED.set(self.0);
    }
}

impl<B: FusionBackend + KernelBackend> Operation<Runtime<B>> for Queued<B> {
    fn execute(&self, handles: &mut Handles<B>) {
        // In the order of the inputs: of a tensor that comes twice, the last gives up the handle.
        let take = |(kind, ir): (&Kind, &TensorIr)| {
            Some(match kind {
                Kind::Float => Primitive::Float(handles.get_float_tensor::<B>(ir)),
                Kind::Int => Primitive::Int(handles.get_int_tensor::<B>(ir)),
                Kind::Bool => Primitive::Bool(handles.get_bool_tensor::<B>(ir)),
            })
        };
        let mut taken = Taken(self.kinds.iter().zip(&self.desc.inputs).map(take).collect());
        let results = {
            let _unpin = Unpin(PINNED.replace(Some(self.choice)));
            (self.run)(&mut taken)
        };
        for (ir, result) in self.desc.outputs.iter().zip(results) {
            let (declared, found) = ((&ir.shape, ir.dtype), (&result.shape(), result.dtype()));
            assert_eq!(declared, found, "{}: an output differs from what was declared", self.desc.id);
            handles.register_float_tensor::<B>(&ir.id, result);
        }
    }
}

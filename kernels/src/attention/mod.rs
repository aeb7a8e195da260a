//! Scaled dot-product attention: causal, grouped key/value heads, documents, and a key/value cache.
//!
//! `softmax(scale * q k^T + mask) v`, softmax in float32. Queries are the last `l` of the `s` slots.

#[cfg(any(feature = "flex", feature = "ndarray"))]
pub(crate) mod cpu;
#[cfg(feature = "_cube")]
pub(crate) mod cube;
pub mod reference;
pub mod step;

use std::sync::{Arc, OnceLock};

use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::{Bool, Int, Tensor, TensorData};

use crate::error::expect_shape;
use crate::path::announce;
use crate::{ArgumentError, KernelBackend, Op};

/// Which slots each query may see. Made once per forward pass and shared by all layers.
#[derive(Debug, Clone)]
pub struct AttentionMask<B: Backend> {
    l: usize,
    s: usize,
    ids: Option<Arc<SlotIds>>,
    hidden: Arc<OnceLock<Tensor<B, 4, Bool>>>,
    /// What the GPU kernels read: a tensor of the backend below autodiff and fusion, which is another type there.
    #[cfg(feature = "_cube")]
    plan: Arc<OnceLock<Box<dyn std::any::Any + Send + Sync>>>,
}

/// Document ids of queries and slots; `-1` marks padding.
#[derive(Debug)]
pub struct SlotIds {
    /// Batch.
    pub batch: usize,
    /// Row-major `[b, l]`.
    pub queries: Vec<i32>,
    /// Row-major `[b, s]`.
    pub slots: Vec<i32>,
}

impl<B: Backend> AttentionMask<B> {
    pub(crate) fn new(l: usize, s: usize, ids: Option<Arc<SlotIds>>) -> Self {
        Self {
            l,
            s,
            ids,
            hidden: Arc::default(),
            #[cfg(feature = "_cube")]
            plan: Arc::default(),
        }
    }

    /// Query `t` sees slots `0 ..= s - l + t`.
    pub fn causal(l: usize, s: usize) -> Self {
        Self::new(l, s, None)
    }

    /// Causal, and only slots of the query's own document.
    ///
    /// # Errors
    /// When the counts do not match `[b, l]` and `[b, s]`.
    pub fn documents(l: usize, s: usize, ids: SlotIds) -> Result<Self, ArgumentError> {
        expect_shape("attention", "query ids", &[ids.queries.len()], &[ids.batch * l])?;
        expect_shape("attention", "slot ids", &[ids.slots.len()], &[ids.batch * s])?;
        Ok(Self::new(l, s, Some(Arc::new(ids))))
    }

    /// `[l, s]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.l, self.s]
    }

    /// Document ids, when rows hold more than one document or padding.
    pub fn ids(&self) -> Option<&SlotIds> {
        self.ids.as_deref()
    }

    /// True where a query must not look, `[b or 1, 1, l, s]`.
    pub fn hidden(&self, device: &B::Device) -> Tensor<B, 4, Bool> {
        self.hidden.get_or_init(|| self.build(device)).clone()
    }

    /// The documents as the kernels read them.
    #[cfg(feature = "_cube")]
    pub(crate) fn plan(&self, device: &B::Device) -> Option<Tensor<B, 1, Int>> {
        let ids = self.ids.as_ref()?;
        let upload = || {
            let values = cube::plan::plan(ids, self.l, self.s);
            let count = values.len();
            Tensor::<B, 1, Int>::from_data(TensorData::new(values, [count]), (device, burn::tensor::DType::I32))
        };
        let kept = self.plan.get_or_init(|| Box::new(upload())).downcast_ref::<Tensor<B, 1, Int>>();
        Some(kept.filter(|plan| plan.device() == *device).cloned().unwrap_or_else(upload))
    }

    /// The same mask on a backend that this one decorates.
    pub(crate) fn on<C: Backend>(&self) -> AttentionMask<C> {
        AttentionMask {
            #[cfg(feature = "_cube")]
            plan: Arc::clone(&self.plan),
            ..AttentionMask::new(self.l, self.s, self.ids.clone())
        }
    }

    fn build(&self, device: &B::Device) -> Tensor<B, 4, Bool> {
        let Self { l, s, .. } = *self;
        let future = Tensor::<B, 2, Bool>::tril_mask([l, s], s as i64 - l as i64, device).unsqueeze::<4>();
        let Some(ids) = &self.ids else { return future };
        let b = ids.batch;
        let queries = Tensor::<B, 4, Int>::from_data(TensorData::new(ids.queries.clone(), [b, 1, l, 1]), device);
        let slots = Tensor::<B, 4, Int>::from_data(TensorData::new(ids.slots.clone(), [b, 1, 1, s]), device);
        let shape = [b, 1, l, s];
        queries.expand(shape).not_equal(slots.expand(shape)).bool_or(future.expand(shape))
    }
}

impl<B: AutodiffBackend> AttentionMask<B> {
    /// The same mask on the backend below autodiff.
    pub fn inner(&self) -> AttentionMask<B::InnerBackend> {
        self.on()
    }
}

/// Arguments of [`attention`].
#[derive(Debug, Clone)]
pub struct AttentionArgs<B: Backend> {
    /// `[b, h, l, p]`.
    pub q: Tensor<B, 4>,
    /// `[b, g, s, p]`; query head `j` reads key/value head `j / (h / g)`.
    pub k: Tensor<B, 4>,
    /// `[b, g, s, p]`.
    pub v: Tensor<B, 4>,
    /// Multiplies the scores.
    pub scale: f32,
    /// What each query may see.
    pub mask: AttentionMask<B>,
}

/// Gradients of [`AttentionArgs`], shaped as its tensors.
#[derive(Debug, Clone)]
pub struct AttentionGrads<B: Backend> {
    /// `[b, h, l, p]`.
    pub q: Tensor<B, 4>,
    /// `[b, g, s, p]`.
    pub k: Tensor<B, 4>,
    /// `[b, g, s, p]`.
    pub v: Tensor<B, 4>,
}

impl<B: Backend> AttentionArgs<B> {
    /// Checks that the shapes agree.
    ///
    /// # Errors
    /// The first disagreement found.
    pub fn check(&self) -> Result<(), ArgumentError> {
        const OP: &str = "attention";
        let [b, h, l, p] = self.q.dims();
        let [_, g, s, _] = self.k.dims();
        expect_shape(OP, "k", &self.k.dims(), &[b, g, s, p])?;
        expect_shape(OP, "v", &self.v.dims(), &[b, g, s, p])?;
        expect_shape(OP, "mask", &self.mask.dims(), &[l, s])?;
        if g == 0 || !h.is_multiple_of(g) {
            return Err(ArgumentError::NotDivisible { op: OP, what: "query heads", value: h, by: "key heads", divisor: g });
        }
        Ok(())
    }
}

/// Runs attention; differentiable in `q`, `k` and `v`. Returns `[b, h, l, p]`; zero at padding queries.
///
/// # Panics
/// When [`AttentionArgs::check`] fails.
pub fn attention<B: KernelBackend>(args: AttentionArgs<B>) -> Tensor<B, 4> {
    if let Err(error) = args.check() {
        panic!("{error}");
    }
    if args.q.shape().num_elements() == 0 {
        return args.q;
    }
    announce::<B>(Op::Attention, args.q.dtype());
    <B as KernelBackend>::attention(args)
}

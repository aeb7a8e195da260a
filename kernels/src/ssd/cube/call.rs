//! A call, free of the backend's element types.

use burn::tensor::{DType, Shape, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};

use super::prepare::{Documents, flat_f32};
use crate::cube::{Device, cast, down, packed, zeros};
use crate::ssd::{SsdArgs, SsdDims, SsdOptions};

/// Arguments; shapes as in [`SsdArgs`]. As they come, views and all, until [`Call::packed`].
#[derive(Clone)]
pub(super) struct Call<R: CubeRuntime> {
    pub x: CubeTensor<R>,
    pub b: CubeTensor<R>,
    pub c: CubeTensor<R>,
    pub dt: CubeTensor<R>,
    pub a: CubeTensor<R>,
    pub d: Option<CubeTensor<R>>,
    pub dt_bias: Option<CubeTensor<R>>,
    pub state: Option<CubeTensor<R>>,
    pub documents: Option<Documents<R>>,
    pub dims: SsdDims,
    pub options: SsdOptions,
    pub device: Device,
    /// Dtypes that `b`, `c`, `d` and `state` came in.
    pub dtypes: Dtypes,
}

#[derive(Clone, Copy)]
pub(super) struct Dtypes {
    pub b: DType,
    pub c: DType,
    pub d: DType,
    pub state: DType,
}

/// Gradients, each in its argument's dtype.
pub(super) struct Grads<R: CubeRuntime> {
    pub x: CubeTensor<R>,
    pub dt: CubeTensor<R>,
    pub a: CubeTensor<R>,
    pub b: CubeTensor<R>,
    pub c: CubeTensor<R>,
    pub d: Option<CubeTensor<R>>,
    pub dt_bias: Option<CubeTensor<R>>,
    pub state: Option<CubeTensor<R>>,
}

impl<R: CubeRuntime> Call<R> {
    pub(super) fn new<F: FloatElement, I: IntElement, BT: BoolElement>(dims: SsdDims, args: SsdArgs<CubeBackend<R, F, I, BT>>) -> Self {
        let documents = args.segments.as_ref().map(Documents::new);
        let (x, b, c) = (down(args.x), down(args.b), down(args.c));
        let (d, state) = (args.d.map(down), args.state.map(down));
        let of = |tensor: &Option<CubeTensor<R>>| tensor.as_ref().map_or(DType::F32, |tensor| tensor.dtype());
        let dtypes = Dtypes { b: b.dtype(), c: c.dtype(), d: of(&d), state: of(&state) };
        Self {
            b,
            c,
            dt: down(args.dt),
            a: down(args.a),
            d,
            dt_bias: args.dt_bias.map(down),
            state,
            documents,
            dims,
            options: args.options,
            device: Device::of(&x.client),
            dtypes,
            x,
        }
    }

    /// As [`Call::packed`], but `x`, `b` and `c` may stay views.
    pub(super) fn aligned(self) -> Self {
        let dtype = self.x.dtype();
        let same = |tensor: CubeTensor<R>| if tensor.dtype() == dtype { tensor } else { packed(cast(tensor, dtype)) };
        Self {
            b: same(self.b),
            c: same(self.c),
            dt: packed(self.dt),
            d: self.d.map(|d| flat_f32(&d)),
            state: self.state.map(|state| flat_f32(&state)),
            ..self
        }
    }

    /// Everything packed; `b` and `c` in the dtype of `x`, `d` and the state in float32.
    pub(super) fn packed(self) -> Self {
        let dtype = self.x.dtype();
        Self {
            x: packed(self.x),
            b: packed(cast(self.b, dtype)),
            c: packed(cast(self.c, dtype)),
            dt: packed(self.dt),
            d: self.d.map(|d| flat_f32(&d)),
            state: self.state.map(|state| flat_f32(&state)),
            ..self
        }
    }

    pub(super) fn zeros(&self, shape: impl Into<Shape>, dtype: DType) -> CubeTensor<R> {
        zeros(&self.x, shape, dtype)
    }
}

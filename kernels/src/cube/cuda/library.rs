//! Matrix products by cuBLASLt, enqueued where CubeCL enqueues its kernels.
//!
//! CubeCL runs everything of a device on one thread, in the order of submission, on one CUDA stream per stream id. A product
//! is submitted there like a kernel: the thread looks up addresses, which also makes the stream wait for operands from
//! other streams, and enqueues the library's kernel on the same CUDA stream. Memory pools reuse memory in the order of
//! their stream, so nothing has to be waited for. The library is looked for at run time; without it there are no products.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use burn::tensor::TensorMetadata;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cuda::CudaRuntime;
use cubecl::device::{Device, DeviceId};
use cubecl::device_handle::DeviceHandle;
use cubecl::server::{Binding, ComputeServer};
use cubecl::stream_id::StreamId;
use cudarc::cublaslt::result as lt;
use cudarc::cublaslt::sys::{self, cublasLtHandle_t};
use cudarc::driver::result::event::create as create_event;
use cudarc::driver::result::stream::{StreamKind, create as create_stream};
use cudarc::driver::sys::{self as cu, CUevent_flags, CUresult};

use super::plan::{Addresses, Layout, Plan, Shape, WORKSPACE};
use super::{Server, stream};
use crate::cube::{empty, packed};

/// Whether the library was found. Looks once.
pub(crate) fn available() -> bool {
    static FOUND: LazyLock<bool> = LazyLock::new(|| {
        // SAFETY: opening a library runs its initialisers; this is NVIDIA's.
        let found = unsafe { sys::is_culib_present() };
        if !found {
            log::warn!("cuBLASLt was not found: large matrix products run several times slower (put libcublasLt on the library path)");
        }
        found
    });
    *FOUND
}

/// Whether tensors of `R` live where the library computes.
pub(crate) fn serves<R: CubeRuntime>() -> bool {
    std::any::TypeId::of::<R>() == std::any::TypeId::of::<CudaRuntime>()
}

/// How a matrix lies, or nothing where neither its rows nor its columns are dense.
fn layout<R: CubeRuntime>(tensor: &CubeTensor<R>) -> Option<Layout> {
    let ([rows, columns], strides) = (tensor.shape().dims(), tensor.meta.strides());
    let (row, column) = (strides[0], strides[1]);
    // Allocations are aligned to more than any algorithm asks for; views may begin anywhere.
    let offset = tensor.handle.offset_start.unwrap_or(0);
    let alignment = 1u32 << offset.trailing_zeros().min(8);
    if (column == 1 || columns == 1) && (row >= columns || rows == 1) {
        Some(Layout { turned: false, pitch: if rows == 1 { columns } else { row }, alignment })
    } else if (row == 1 || rows == 1) && (column >= rows || columns == 1) {
        Some(Layout { turned: true, pitch: if columns == 1 { rows } else { column }, alignment })
    } else {
        None
    }
}

fn dense<R: CubeRuntime>(tensor: CubeTensor<R>) -> (CubeTensor<R>, Layout) {
    match layout(&tensor) {
        Some(layout) => (tensor, layout),
        None => {
            let tensor = packed(tensor);
            let layout = layout(&tensor).expect("packed rows are dense");
            (tensor, layout)
        }
    }
}

/// `left [m, k] x right [k, n] (+ bias [n])`, or nothing where the library is missing or cannot. None of the sizes is 0;
/// operands are float32, bfloat16 or float16, all the same; the bias is packed.
pub(crate) fn product<R: CubeRuntime>(left: CubeTensor<R>, right: CubeTensor<R>, bias: Option<CubeTensor<R>>) -> Option<CubeTensor<R>> {
    if !serves::<R>() || !available() {
        return None;
    }
    let ((left, left_layout), (right, right_layout)) = (dense(left), dense(right));
    let ([m, k], [_, n]): ([usize; 2], [usize; 2]) = (left.shape().dims(), right.shape().dims());
    let dtype = left.dtype();
    let shape = Shape { m, n, k, left: left_layout, right: right_layout, dtype, biased: bias.is_some() };
    let id = (&left.device as &dyn Any).downcast_ref::<<CudaRuntime as cubecl::Runtime>::Device>()?.to_id();
    let (device, known) = Host::look(id, &shape);
    if known == Some(false) {
        return None;
    }
    let out = empty(&left, [m, n], dtype);
    let job = Job {
        shape,
        stream: out.handle.stream,
        operands: [left.handle.binding(), right.handle.binding()],
        bias: bias.map(|bias| bias.handle.binding()),
        out: out.handle.clone().binding(),
    };
    if known == Some(true) {
        device.submit(move |server| {
            if let Err(error) = job.run(server, true) {
                Host::forbid(id, &shape);
                log::error!("cuBLASLt failed, so a result is NaN: {error}");
            }
        });
        return Some(out);
    }
    // The first of its kind is waited for (until it is enqueued), so that another path can take over.
    let done = device.submit_blocking(|server| job.run(server, false));
    let failure = match done {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error),
        Err(_) => Some("the device's thread broke off".to_string()),
    };
    Host::note(id, shape, failure.is_none());
    match failure {
        None => Some(out),
        Some(reason) => {
            log::warn!("cuBLASLt declines, Burn's product takes over: {reason}");
            None
        }
    }
}

/// What callers remember of a device.
struct Host {
    device: Arc<DeviceHandle<Server>>,
    /// Whether the library computes a shape.
    shapes: HashMap<Shape, bool>,
}

static HOSTS: LazyLock<Mutex<HashMap<DeviceId, Host>>> = LazyLock::new(Mutex::default);

impl Host {
    fn with<T>(id: DeviceId, task: impl FnOnce(&mut Host) -> T) -> T {
        let mut hosts = HOSTS.lock().unwrap_or_else(PoisonError::into_inner);
        task(hosts.entry(id).or_insert_with(|| Host { device: Arc::new(DeviceHandle::new(id)), shapes: HashMap::new() }))
    }

    fn look(id: DeviceId, shape: &Shape) -> (Arc<DeviceHandle<Server>>, Option<bool>) {
        Self::with(id, |host| (host.device.clone(), host.shapes.get(shape).copied()))
    }

    fn note(id: DeviceId, shape: Shape, can: bool) {
        Self::with(id, |host| host.shapes.insert(shape, can));
    }

    fn forbid(id: DeviceId, shape: &Shape) {
        Self::note(id, *shape, false);
    }
}

/// Where to enqueue.
#[derive(Debug, Clone, Copy)]
enum Route {
    /// On CubeCL's stream.
    Own(usize),
    /// On a stream of our own, ordered by events across the context: CubeCL's stream was not found.
    Beside { stream: usize, before: usize, after: usize },
}

impl Route {
    fn beside() -> Result<Self, String> {
        let event = || create_event(CUevent_flags::CU_EVENT_DISABLE_TIMING).map(|event| event as usize);
        let make = || Ok(Self::Beside { stream: create_stream(StreamKind::NonBlocking)? as usize, before: event()?, after: event()? });
        make().map_err(|error: cudarc::driver::DriverError| format!("{error:?}"))
    }
}

/// What the device's thread keeps: one context, so one handle.
#[derive(Default)]
struct Thread {
    handle: Option<usize>,
    plans: HashMap<Shape, Plan>,
    routes: HashMap<StreamId, Route>,
    /// Scratch memory of each CUDA stream: two streams at work must not share it.
    workspaces: HashMap<usize, u64>,
}

thread_local! {
    static THREAD: RefCell<Thread> = RefCell::default();
}

/// A product on its way to the device's thread. Bindings keep the memory from being given to others.
struct Job {
    shape: Shape,
    stream: StreamId,
    operands: [Binding; 2],
    bias: Option<Binding>,
    out: Binding,
}

impl Job {
    /// Enqueues the product; where that fails and `poison` says so, NaN in its place.
    fn run(self, server: &mut Server, poison: bool) -> Result<(), String> {
        let Self { shape, stream, operands: [left, right], bias, out } = self;
        let mut resolve = |binding| server.get_resource(binding, stream).map_err(|error| format!("{error:?}"));
        // These hold the memory until the product is enqueued. From then on it may be given to others: they write it on the
        // same stream, which is to say later, and CubeCL orders other streams behind this one.
        let (left, right, out) = (resolve(left)?, resolve(right)?, resolve(out)?);
        let bias = bias.map(resolve).transpose()?;
        let at = Addresses {
            left: left.resource().ptr,
            right: right.resource().ptr,
            bias: bias.as_ref().map_or(0, |bias| bias.resource().ptr),
            out: out.resource().ptr,
            workspace: 0,
        };
        THREAD.with_borrow_mut(|thread| {
            let route = thread.route(server, stream)?;
            // The library is foreign code behind symbols that are looked up: a missing one panics.
            let done = catch_unwind(AssertUnwindSafe(|| thread.enqueue(&shape, at, route)));
            let done = done.unwrap_or_else(|_| Err("the library broke off".to_string()));
            if done.is_err() && poison {
                let (Route::Own(stream) | Route::Beside { stream, .. }) = route;
                // SAFETY: the output's own memory; all ones is NaN in every floating-point type.
                unsafe { cu::cuMemsetD8Async(at.out, 0xFF, shape.m * shape.n * shape.dtype.size(), stream as _) };
            }
            done
        })
    }
}

impl Thread {
    fn route(&mut self, server: &mut Server, id: StreamId) -> Result<Route, String> {
        if let Some(route) = self.routes.get(&id) {
            return Ok(*route);
        }
        let route = match stream::find(server, id) {
            Some(stream) => Route::Own(stream as usize),
            None => {
                log::warn!("CubeCL's CUDA stream was not found: matrix products are ordered by events, a few microseconds each");
                Route::beside()?
            }
        };
        self.routes.insert(id, route);
        Ok(route)
    }

    fn handle(&mut self) -> Result<cublasLtHandle_t, String> {
        match self.handle {
            Some(handle) => Ok(handle as cublasLtHandle_t),
            None => {
                let handle = lt::create_handle().map_err(|error| error.to_string())?;
                // SAFETY: takes nothing.
                let version = unsafe { sys::cublasLtGetVersion() };
                log::info!("matrix products by cuBLASLt {}.{}.{}", version / 10000, version / 100 % 100, version % 100);
                Ok(*self.handle.insert(handle as usize) as cublasLtHandle_t)
            }
        }
    }

    fn workspace(&mut self, stream: usize) -> Result<u64, String> {
        if let Some(&address) = self.workspaces.get(&stream) {
            return Ok(address);
        }
        // SAFETY: plain memory, never freed: as many times 32 MiB as there are streams that need it.
        let address = unsafe { cudarc::driver::result::malloc_sync(WORKSPACE) }.map_err(|error| format!("{error:?}"))?;
        self.workspaces.insert(stream, address);
        Ok(address)
    }

    fn enqueue(&mut self, shape: &Shape, mut at: Addresses, route: Route) -> Result<(), String> {
        let handle = self.handle()?;
        if !self.plans.contains_key(shape) {
            self.plans.insert(*shape, Plan::new(handle, shape)?);
        }
        let (Route::Own(stream) | Route::Beside { stream, .. }) = route;
        if self.plans[shape].workspace > 0 {
            at.workspace = self.workspace(stream)?;
        }
        let plan = &self.plans[shape];
        let failed = |result: CUresult| if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(format!("{result:?}")) };
        let mut context = std::ptr::null_mut();
        if let Route::Beside { stream, before, .. } = route {
            // SAFETY: the event and the stream live for ever; the context is current on this thread. The product thus runs after
            // everything enqueued so far on any stream of the context.
            unsafe {
                failed(cu::cuCtxGetCurrent(&mut context))?;
                failed(cu::cuCtxRecordEvent(context, before as _))?;
                failed(cu::cuStreamWaitEvent(stream as _, before as _, 0))?;
            }
        }
        // SAFETY: the addresses are those of live tensors of this shape, see `Job::run`; each stream has its own workspace.
        unsafe { plan.enqueue(handle, at, stream) }.map_err(|error| format!("{error} for {shape:?}"))?;
        if let Route::Beside { stream, after, .. } = route {
            // SAFETY: as above. Everything enqueued from now on runs after the product.
            unsafe {
                failed(cu::cuEventRecord(after as _, stream as _))?;
                failed(cu::cuCtxWaitEvent(context, after as _))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Cuda;
    use burn::tensor::{DType, Distribution, Tensor};

    use super::*;
    use crate::cube::{down, up};

    type B = Cuda<f32, i32>;

    fn device() -> DeviceHandle<Server> {
        DeviceHandle::new(cubecl::cuda::CudaDevice::default().to_id())
    }

    fn operands(k: usize) -> [Tensor<B, 2>; 2] {
        [[33, k], [k, 20]].map(|shape| Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), &Default::default()))
    }

    /// Largest difference from sums of products; Burn's own product may round to TF32.
    fn error([a, b]: [Tensor<B, 2>; 2]) -> f32 {
        let product = product(down(a.clone()), down(b.clone()), None).expect("cuBLASLt is installed");
        let truth = (a.unsqueeze_dim::<3>(2) * b.unsqueeze_dim::<3>(0)).sum_dim(1).squeeze_dim::<2>(1);
        let difference = up::<B, 2>(product) - truth;
        difference.abs().max().into_scalar()
    }

    #[test]
    fn products_are_right_on_either_route() {
        assert!(available(), "these tests need cuBLASLt");
        for k in [48, 130] {
            assert!(error(operands(k)) < 1e-4);
        }
        let id = StreamId::current();
        let route = move |_: &mut Server| THREAD.with_borrow(|thread| thread.routes.get(&id).copied());
        assert!(matches!(device().submit_blocking(route), Ok(Some(Route::Own(_)))), "CubeCL's stream was not found");
        let beside = move |_: &mut Server| THREAD.with_borrow_mut(|thread| thread.routes.insert(id, Route::beside().expect("a stream")));
        device().submit_blocking(beside).expect("the device answers");
        for k in [48, 130] {
            assert!(error(operands(k)) < 1e-4);
        }
    }

    #[test]
    fn what_the_library_declines_is_left_to_others_and_a_failure_is_nan() {
        let [a, b] = operands(8).map(|tensor| tensor.cast(DType::F64));
        let run = || product(down(a.clone()), down(b.clone()), None);
        assert!(run().is_none());
        let id = cubecl::cuda::CudaDevice::default().to_id();
        let shapes: Vec<Shape> = Host::with(id, |host| host.shapes.keys().filter(|shape| shape.dtype == DType::F64).copied().collect());
        assert_eq!(shapes.len(), 1);
        Host::note(id, shapes[0], true);
        let failed = up::<B, 2>(run().expect("known to work")).into_data();
        assert!(failed.iter::<f64>().all(f64::is_nan));
        assert!(run().is_none(), "a failure is remembered");
    }
}

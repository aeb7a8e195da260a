//! Steps recorded as CUDA graphs.
//!
//! CubeCL keeps a CUDA stream and pools of memory per stream id, and a stream id belongs to a thread unless it is swapped.
//! A recorder takes an id that no thread has: on its stream nothing runs, and from its pools nobody allocates, but what is
//! done in [`Recorder::within`].

use std::any::Any;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use burn::tensor::{DType, TensorMetadata};
use burn_cubecl::element::BoolElement;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use cubecl::cuda::CudaRuntime;
use cubecl::device::Device;
use cubecl::device_handle::DeviceHandle;
use cubecl::server::{Binding, ComputeServer};
use cubecl::stream_id::StreamId;
use cudarc::driver::sys::{self as cu, CUgraphNodeType, CUmemorytype, CUresult, CUstreamCaptureMode};

use super::{Server, library, stream};
use crate::record::{RecordError, Recorder, Recording};

/// Streams that recorders share out.
const LANES: u64 = 8;
/// First of the ids that no thread has.
const OWN: u64 = 1 << 40;
/// Streams left for threads that come after a recorder.
const LATER: u64 = 24;

/// Lanes in use, a bit each.
static TAKEN: AtomicU64 = AtomicU64::new(0);

fn failed(what: impl Into<String>) -> RecordError {
    RecordError(what.into())
}

fn check(what: &str, result: CUresult) -> Result<(), RecordError> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failed(format!("{what}: {result:?}"))) }
}

/// A stream of its own.
pub(crate) struct Lane {
    lane: u64,
    id: StreamId,
    device: Arc<DeviceHandle<Server>>,
}

/// How many threads have an id, as far as is known: a new thread's tells it, and uses one up, so only the first call asks one.
fn threads() -> Option<u64> {
    static SEEN: OnceLock<AtomicU64> = OnceLock::new();
    let first = || AtomicU64::new(std::thread::spawn(|| StreamId::current().value).join().unwrap_or(u64::MAX));
    let seen = SEEN.get_or_init(first);
    let own = StreamId::current().value;
    // In a recorder's own stream there is nothing to learn.
    let own = if own < OWN { own } else { 0 };
    Some(seen.fetch_max(own, Ordering::AcqRel).max(own)).filter(|&threads| threads < OWN)
}

/// A recorder for tensors of `R`, if these live on CUDA and a stream is free.
pub(crate) fn recorder<R: CubeRuntime>(device: &R::Device) -> Option<Lane> {
    if !library::serves::<R>() {
        return None;
    }
    let device = (device as &dyn Any).downcast_ref::<<CudaRuntime as cubecl::Runtime>::Device>()?.to_id();
    // CubeCL folds ids onto this many streams, and numbers threads as they come.
    let streams = u64::from(CubeClRuntimeConfig::get().streaming.max_streams);
    let threads = threads()?;
    if threads + LATER + LANES > streams {
        log::warn!("steps are not recorded: {threads} threads have used the device, which has {streams} streams for them");
        return None;
    }
    let taken = TAKEN.fetch_update(Ordering::AcqRel, Ordering::Acquire, |taken| {
        let lane = taken.trailing_ones() as u64;
        (lane < LANES).then_some(taken | 1 << lane)
    });
    let lane = taken.ok()?.trailing_ones() as u64;
    // From the last stream down, far from those of threads.
    let id = StreamId { value: OWN * streams + streams - 1 - lane };
    Some(Lane { lane, id, device: Arc::new(DeviceHandle::new(device)) })
}

impl Lane {
    /// Does `task` on the device's thread, for this stream.
    fn ask<T: Send>(&self, task: impl FnOnce(&mut Server, StreamId) -> Result<T, RecordError> + Send) -> Result<T, RecordError> {
        let id = self.id;
        self.device.submit_blocking(move |server| task(server, id)).map_err(|_| failed("the device's thread broke off"))?
    }

    fn finish(&self) -> Result<(), RecordError> {
        self.ask(|server, id| {
            let stream = stream::find(server, id).ok_or_else(|| failed("CubeCL's CUDA stream was not found"))?;
            // SAFETY: CubeCL's streams live as long as its server.
            check("wait", unsafe { cu::cuStreamSynchronize(stream) })
        })
    }

    fn address_of(&self, binding: Binding) -> Result<u64, RecordError> {
        self.ask(|server, id| match server.get_resource(binding, id) {
            Ok(found) => Ok(found.resource().ptr),
            Err(error) => Err(failed(format!("{error:?}"))),
        })
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Gives the memory back; what is still alive there stays.
        let _ = self.ask(|server, id| {
            server.memory_cleanup(id);
            Ok(())
        });
        TAKEN.fetch_and(!(1 << self.lane), Ordering::AcqRel);
    }
}

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> Recorder<CubeBackend<R, F, I, BT>> for Lane {
    fn within(&self, work: &mut dyn FnMut()) {
        self.id.executes(work);
    }

    fn wait(&self) -> Result<(), RecordError> {
        self.finish()
    }

    fn address(&self, tensor: &CubeTensor<R>) -> Result<u64, RecordError> {
        self.address_of(tensor.handle.clone().binding())
    }

    fn int_address(&self, tensor: &CubeTensor<R>) -> Result<u64, RecordError> {
        self.address_of(tensor.handle.clone().binding())
    }

    fn overwrite(&self, tensor: &CubeTensor<R>, values: &[i32]) -> Result<(), RecordError> {
        if tensor.dtype() != DType::I32 || !tensor.is_contiguous() || tensor.shape().num_elements() != values.len() {
            return Err(failed(format!("{} numbers do not fit {:?} {:?}", values.len(), tensor.dtype(), tensor.shape())));
        }
        let binding = tensor.handle.clone().binding();
        self.ask(|server, id| {
            let stream = stream::find(server, id).ok_or_else(|| failed("CubeCL's CUDA stream was not found"))?;
            let place = server.get_resource(binding, id).map_err(|error| failed(format!("{error:?}")))?;
            // SAFETY: as many bytes as the tensor has; the driver has read pageable memory when it returns.
            check("write", unsafe { cu::cuMemcpyHtoDAsync_v2(place.resource().ptr, values.as_ptr().cast(), size_of_val(values), stream) })
        })
    }

    fn uploads(&self, work: &mut dyn FnMut()) -> Result<bool, RecordError> {
        let unknown = || failed("CubeCL does not tell what it uploads");
        match self.ask(|server, id| stream::uploads(server, id, true).ok_or_else(unknown))? {
            true => return Err(unknown()),
            false => self.id.executes(work),
        }
        self.ask(|server, id| stream::uploads(server, id, false).ok_or_else(unknown))
    }

    fn record(&self, work: &mut dyn FnMut()) -> Result<Box<dyn Recording>, RecordError> {
        let stream = self.ask(|server, id| {
            let stream = stream::find(server, id).ok_or_else(|| failed("CubeCL's CUDA stream was not found"))?;
            if stream::uploads(server, id, true) != Some(false) {
                return Err(failed("CubeCL does not tell what it uploads"));
            }
            // SAFETY: the stream lives as long as the server. Other streams and calls that are not enqueued stay allowed.
            check("begin", unsafe { cu::cuStreamBeginCapture_v2(stream, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED) })?;
            Ok(stream as usize)
        })?;
        let done = catch_unwind(AssertUnwindSafe(|| self.id.executes(work)));
        let graph = self.ask(move |_, _| {
            let mut graph = std::ptr::null_mut();
            // SAFETY: the stream is capturing since above.
            check("end", unsafe { cu::cuStreamEndCapture(stream as _, &mut graph) })?;
            Ok(graph as usize)
        });
        if let Err(panic) = done {
            resume_unwind(panic);
        }
        let (exec, operations) = self.ask(move |_, _| {
            let graph = graph? as cu::CUgraph;
            // SAFETY: the graph is whole, and destroyed once, here.
            let made = unsafe { inspect(graph).and_then(|operations| Ok((instantiate(graph)?, operations))) };
            unsafe { cu::cuGraphDestroy(graph) };
            made
        })?;
        let broken = Arc::default();
        Ok(Box::new(Graph { exec, stream, operations, device: self.device.clone(), broken }))
    }
}

/// Counts the operations of a graph; an error if one of them cannot be repeated.
unsafe fn inspect(graph: cu::CUgraph) -> Result<usize, RecordError> {
    let mut count = 0;
    // SAFETY: asks for the number alone, then for as many nodes as there is room for.
    check("nodes", unsafe { cu::cuGraphGetNodes(graph, std::ptr::null_mut(), &mut count) })?;
    let mut nodes: Vec<cu::CUgraphNode> = vec![std::ptr::null_mut(); count];
    check("nodes", unsafe { cu::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) })?;
    for node in nodes {
        let mut kind = CUgraphNodeType::CU_GRAPH_NODE_TYPE_EMPTY;
        // SAFETY: out-parameters for a node of this graph; all bits zero is a valid description of a copy.
        check("node", unsafe { cu::cuGraphNodeGetType(node, &mut kind) })?;
        match kind {
            CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL | CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMSET => {}
            CUgraphNodeType::CU_GRAPH_NODE_TYPE_MEMCPY => {
                let mut copy = MaybeUninit::<cu::CUDA_MEMCPY3D>::zeroed();
                check("copy", unsafe { cu::cuGraphMemcpyNodeGetParams(node, copy.as_mut_ptr()) })?;
                // SAFETY: the call has filled these in.
                let ends = unsafe { [(*copy.as_ptr()).srcMemoryType, (*copy.as_ptr()).dstMemoryType] };
                if ends != [CUmemorytype::CU_MEMORYTYPE_DEVICE; 2] {
                    return Err(failed("it copies between host and device"));
                }
            }
            other => return Err(failed(format!("it holds more than kernels and copies: {other:?}"))),
        }
    }
    Ok(count)
}

unsafe fn instantiate(graph: cu::CUgraph) -> Result<usize, RecordError> {
    let mut exec = std::ptr::null_mut();
    // SAFETY: an out-parameter; no flags.
    check("instantiate", unsafe { cu::cuGraphInstantiateWithFlags(&mut exec, graph, 0) })?;
    Ok(exec as usize)
}

struct Graph {
    exec: usize,
    stream: usize,
    operations: usize,
    device: Arc<DeviceHandle<Server>>,
    broken: Arc<Mutex<Option<CUresult>>>,
}

impl Recording for Graph {
    fn replay(&self) {
        let (exec, stream, broken) = (self.exec, self.stream, self.broken.clone());
        self.device.submit(move |_| {
            // SAFETY: both live until this recording is dropped, which is submitted behind this.
            let result = unsafe { cu::cuGraphLaunch(exec as _, stream as _) };
            if result != CUresult::CUDA_SUCCESS {
                *broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
            }
        });
    }

    fn check(&self) -> Result<(), RecordError> {
        match *self.broken.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(result) => Err(failed(format!("a replay failed: {result:?}"))),
            None => Ok(()),
        }
    }

    fn operations(&self) -> usize {
        self.operations
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let (exec, stream) = (self.exec, self.stream);
        self.device.submit(move |_| {
            // SAFETY: made by `instantiate`, destroyed once, after it has run.
            unsafe {
                cu::cuStreamSynchronize(stream as _);
                cu::cuGraphExecDestroy(exec as _);
            }
        });
    }
}

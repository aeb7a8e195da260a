//! Sums over GPUs by NCCL, through CubeCL's communicators.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use burn::tensor::Tensor;
use burn_cubecl::element::BoolElement;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use cubecl::device::{Device, DeviceId};
use cubecl::server::ReduceOperation;

use super::library::serves;
use crate::collective::Collective;
use crate::cube::{down, packed, up};

/// Whether NCCL was found. Looks once.
fn available() -> bool {
    static FOUND: LazyLock<bool> = LazyLock::new(|| {
        // SAFETY: opening a library runs its initialisers; this is NVIDIA's.
        let found = unsafe { cudarc::nccl::sys::is_culib_present() };
        if !found {
            log::warn!("NCCL was not found: gradients go through the host, which is slow (put libnccl on the library path)");
        }
        found
    });
    *FOUND
}

/// A communicator of CubeCL's, by its devices.
pub(crate) struct Nccl {
    devices: Vec<DeviceId>,
}

/// What adds up over `devices`, where they are GPUs that NCCL serves; it takes each once.
pub(crate) fn collective<R: CubeRuntime>(devices: &[R::Device]) -> Option<Nccl> {
    let devices: Vec<DeviceId> = devices.iter().map(Device::to_id).collect();
    let different = devices.iter().map(|id| id.index_id).collect::<BTreeSet<_>>().len();
    let here = serves::<R>() && devices.len() > 1 && different == devices.len() && available();
    here.then_some(Nccl { devices })
}

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> Collective<CubeBackend<R, F, I, BT>> for Nccl {
    fn sum(&self, tensors: Vec<Tensor<CubeBackend<R, F, I, BT>, 1>>) -> Vec<Tensor<CubeBackend<R, F, I, BT>, 1>> {
        let own = |tensor| {
            let tensor = packed(down(tensor));
            // The sum takes the place of the values, so nobody else may hold them.
            if tensor.can_mut() { tensor } else { down(up::<CubeBackend<R, F, I, BT>, 1>(tensor).mul_scalar(1.0)) }
        };
        let tensors: Vec<_> = tensors.into_iter().map(own).collect();
        let Some(first) = tensors.first() else { return Vec::new() };
        let mut client = first.client.clone();
        for tensor in &tensors {
            let (from, to) = (tensor.handle.clone(), tensor.handle.clone());
            client.all_reduce(from, to, tensor.dtype.into(), self.devices.clone(), ReduceOperation::Sum);
        }
        client.sync_collective();
        tensors.into_iter().map(up).collect()
    }
}

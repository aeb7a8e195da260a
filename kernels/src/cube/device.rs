//! Properties of a device that decide which variant of a kernel runs.

use burn_cubecl::CubeRuntime;
use cubecl::client::ComputeClient;
use cubecl::ir::features::{MmaConfig, Plane, TypeUsage};
use cubecl::ir::{ElemType, FloatKind, StorageType};

/// What kernels ask of a device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Device {
    /// Units that run in step (CUDA's warp); smallest and largest.
    pub plane: (u32, u32),
    /// Planes can exchange values. CPU devices do not say so and do without.
    pub plane_ops: bool,
    /// Shared memory of one cube, bytes.
    pub shared_bytes: usize,
    /// Units of one cube.
    pub max_units: u32,
    /// Arrays that one kernel may have.
    pub bindings: u32,
    /// Cubes along each axis of a launch.
    pub max_cubes: (u32, u32, u32),
    /// Streaming multiprocessors, where the driver tells, or a guess for a GPU whose driver does not.
    pub processors: Option<u32>,
    /// `mma.sync` m16n8k16 from bf16 and f16, with ldmatrix and asynchronous copies: CUDA from sm_80.
    pub tensor_cores: bool,
    /// `stmatrix` of 16-bit elements: CUDA from sm_90.
    pub stores_matrices: bool,
    /// bf16 can be stored and converted, which is all that kernels need of it.
    pub bf16: bool,
    /// f16 can be stored and converted.
    pub f16: bool,
}

impl Device {
    pub(crate) fn of<R: CubeRuntime>(client: &ComputeClient<R>) -> Self {
        let properties = client.properties();
        let (hardware, features) = (&properties.hardware, &properties.features);
        let float = |kind| -> StorageType { ElemType::Float(kind).into() };
        let stored = |kind| properties.type_usage(float(kind)).is_superset(TypeUsage::Buffer | TypeUsage::Conversion);
        let multiplies = |kind| {
            let (a_type, cd_type) = (float(kind), float(FloatKind::F32));
            features.matmul.mma.contains(&MmaConfig { a_type, b_type: a_type, cd_type, m: 16, n: 8, k: 16 })
                && features.matmul.ldmatrix.contains(&a_type)
        };
        Self {
            plane: (hardware.plane_size_min, hardware.plane_size_max),
            plane_ops: features.plane.contains(Plane::Ops),
            shared_bytes: hardware.max_shared_memory_size,
            max_units: hardware.max_units_per_cube,
            bindings: hardware.max_bindings,
            max_cubes: hardware.max_cube_count,
            // Vulkan tells nothing. A device with planes of 32 is a GPU, and work that is cut for more processors than it has costs less than
            // work for fewer; software devices have narrower planes.
            processors: hardware.num_streaming_multiprocessors.or((hardware.plane_size_max >= 32).then_some(64)),
            tensor_cores: multiplies(FloatKind::BF16) && multiplies(FloatKind::F16) && features.copy_async && hardware.plane_size_max == 32,
            stores_matrices: [FloatKind::BF16, FloatKind::F16].iter().all(|&kind| features.matmul.stmatrix.contains(&float(kind))),
            bf16: stored(FloatKind::BF16),
            f16: stored(FloatKind::F16),
        }
    }
}

//! From a device's name to a Burn backend.

use std::fmt;
use std::str::FromStr;

use crate::TrainBackend;

/// A device as the user names it: `auto`, `cpu`, `flex`, `ndarray`, `cuda:0`, `vulkan`, `wgpu`, `metal`, `rocm:1`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DeviceSpec {
    /// The first device that answers: GPU backends first, then the CPU.
    #[default]
    Auto,
    /// The CPU, on whichever CPU backend was compiled in.
    Cpu,
    /// A backend by feature name, with a device index.
    Named {
        /// Cargo feature of the backend.
        backend: &'static str,
        /// Index among its devices.
        index: usize,
    },
}

/// Every backend that a cargo feature can add, GPUs first.
pub const KNOWN: [&str; 7] = ["cuda", "rocm", "metal", "vulkan", "wgpu", "flex", "ndarray"];

/// Why a device cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Not a device name.
    #[error("no such device: `{0}`; expected auto, cpu, or one of {known}, with an optional index as in cuda:0", known = KNOWN.join(", "))]
    Unknown(String),
    /// The backend is not in this build.
    #[error(
        "device `{device}` needs the cargo feature `{device}`, which this build lacks (it has: {compiled}); rebuild with `--features {device}`"
    )]
    NotCompiled {
        /// Backend that was asked for.
        device: String,
        /// Backends in this build.
        compiled: String,
    },
    /// Devices that share their work are of one kind.
    #[error("devices that share their work are of one backend; found `{first}` and `{other}`")]
    Mixed {
        /// Backend of the first device.
        first: String,
        /// The other one.
        other: String,
    },
    /// The backend is in this build, but no device answered.
    #[error("device `{device}` did not start: {reason}; check the driver with `terrarium doctor`, or use `--device cpu`")]
    Unavailable {
        /// Device that was asked for.
        device: String,
        /// What the driver said.
        reason: String,
    },
}

impl FromStr for DeviceSpec {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            _ => {}
        }
        let (name, index) = text.split_once(':').unwrap_or((text, "0"));
        let backend = KNOWN.into_iter().find(|known| *known == name);
        match (backend, index.parse()) {
            (Some(backend), Ok(index)) => Ok(Self::Named { backend, index }),
            _ => Err(DeviceError::Unknown(text.to_string())),
        }
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Named { backend, index: 0 } => f.write_str(backend),
            Self::Named { backend, index } => write!(f, "{backend}:{index}"),
        }
    }
}

/// Work that is generic over the backend. `B` trains; `B::InnerBackend` is the same device without autodiff.
pub trait BackendTask {
    /// What the work returns.
    type Output;
    /// Does the work on `device`.
    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output;
}

/// Work on several devices of one backend.
pub trait DevicesTask {
    /// What the work returns.
    type Output;
    /// Does the work on `devices`, of which there is at least one.
    fn run<B: TrainBackend>(self, devices: &[B::Device]) -> Self::Output;
}

/// Work on one device as work on several.
struct Single<T>(T);

impl<T: BackendTask> DevicesTask for Single<T> {
    type Output = T::Output;
    fn run<B: TrainBackend>(self, devices: &[B::Device]) -> T::Output {
        self.0.run::<B>(&devices[0])
    }
}

/// Backends in this build, GPUs first.
pub fn compiled() -> Vec<&'static str> {
    let flags = [
        cfg!(feature = "cuda"),
        cfg!(feature = "rocm"),
        cfg!(feature = "metal"),
        cfg!(feature = "vulkan"),
        cfg!(feature = "wgpu"),
        cfg!(feature = "flex"),
        cfg!(feature = "ndarray"),
    ];
    KNOWN.into_iter().zip(flags).filter_map(|(name, on)| on.then_some(name)).collect()
}

/// A device and whether it answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Name to give to `--device`.
    pub device: String,
    /// Description, or the reason for its silence.
    pub status: Result<String, String>,
}

/// Tries the first device of every backend in this build.
pub fn discover() -> Vec<Found> {
    compiled().into_iter().map(|name| Found { device: name.to_string(), status: probe(name, 0) }).collect()
}

/// Runs a tiny computation, so that a missing driver shows here and not as a panic later.
fn probe(backend: &'static str, index: usize) -> Result<String, String> {
    struct Probe;
    impl BackendTask for Probe {
        type Output = String;
        fn run<B: TrainBackend>(self, device: &B::Device) -> String {
            let sum = burn::tensor::Tensor::<B::InnerBackend, 1>::ones([4], device).sum().into_data();
            let ok = sum.iter::<f32>().next() == Some(4.0);
            format!(
                "{} ({})",
                <B::InnerBackend as burn::tensor::backend::Backend>::name(device),
                if ok { "works" } else { "computes wrongly" }
            )
        }
    }
    if matches!(backend, "flex" | "ndarray") {
        return launch(backend, &[index], Single(Probe));
    }
    // Drivers report their absence by panicking, on a thread of their own: keep that off the screen.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let result = std::thread::spawn(move || launch(backend, &[index], Single(Probe))).join();
    std::panic::set_hook(hook);
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|s| s.to_string()));
        Err(match text {
            // What CubeCL's thread of the device said is lost: all that comes back is that it ended.
            Some(text) if text.contains("RecvError") => format!("it ended while starting (is there a device with the number {index}?)"),
            Some(text) => text,
            None => "the driver did not start".to_string(),
        })
    })
}

/// Runs `task` on the backend that `spec` names.
///
/// # Errors
/// [`DeviceError`] when the backend is not in this build or no device answers.
pub fn with_backend<T: BackendTask>(spec: &DeviceSpec, task: T) -> Result<T::Output, DeviceError> {
    with_backends(std::slice::from_ref(spec), Single(task))
}

/// Runs `task` on the backend that all of `specs` name; a device may be named more than once.
///
/// # Errors
/// As [`with_backend`], and where backends differ or no device is named.
pub fn with_backends<T: DevicesTask>(specs: &[DeviceSpec], task: T) -> Result<T::Output, DeviceError> {
    let found = specs.iter().map(resolve).collect::<Result<Vec<_>, _>>()?;
    let Some(&(backend, _)) = found.first() else { return Err(DeviceError::Unknown(String::new())) };
    if let Some((other, _)) = found.iter().find(|(other, _)| *other != backend) {
        return Err(DeviceError::Mixed { first: backend.to_string(), other: (*other).to_string() });
    }
    let indices: Vec<usize> = found.into_iter().map(|(_, index)| index).collect();
    launch(backend, &indices, task).map_err(|reason| DeviceError::Unavailable { device: backend.to_string(), reason })
}

/// The backend and index that `spec` stands for.
fn resolve(spec: &DeviceSpec) -> Result<(&'static str, usize), DeviceError> {
    let compiled = compiled();
    let missing = |device: &str| DeviceError::NotCompiled { device: device.to_string(), compiled: compiled.join(", ") };
    match *spec {
        DeviceSpec::Named { backend, index } if compiled.contains(&backend) => {
            let reason = match probe(backend, index) {
                Ok(_) => return Ok((backend, index)),
                Err(reason) => reason,
            };
            Err(DeviceError::Unavailable { device: spec.to_string(), reason })
        }
        DeviceSpec::Named { backend, .. } => Err(missing(backend)),
        DeviceSpec::Cpu => {
            ["flex", "ndarray"].into_iter().find(|name| compiled.contains(name)).map(|name| (name, 0)).ok_or_else(|| missing("flex"))
        }
        DeviceSpec::Auto => {
            compiled.iter().copied().find(|name| probe(name, 0).is_ok()).map(|name| (name, 0)).ok_or_else(|| missing("flex"))
        }
    }
}

#[allow(unused_variables, reason = "which arguments are used depends on the features")]
fn launch<T: DevicesTask>(backend: &'static str, indices: &[usize], task: T) -> Result<T::Output, String> {
    #[cfg(any(feature = "flex", feature = "ndarray", feature = "_cube"))]
    use burn::backend::Autodiff;
    if let (true, Some(index)) = (matches!(backend, "flex" | "ndarray"), indices.iter().find(|index| **index > 0)) {
        return Err(format!("{backend} has no device {index}"));
    }
    match backend {
        #[cfg(feature = "flex")]
        "flex" => Ok(task.run::<Autodiff<burn::backend::Flex>>(&vec![Default::default(); indices.len()])),
        #[cfg(feature = "ndarray")]
        "ndarray" => Ok(task.run::<Autodiff<burn::backend::NdArray<f32>>>(&vec![Default::default(); indices.len()])),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(task.run::<Autodiff<super::Cuda>>(&each(indices, burn::backend::cuda::CudaDevice::new))),
        #[cfg(feature = "rocm")]
        "rocm" => Ok(task.run::<Autodiff<super::Rocm>>(&each(indices, burn::backend::rocm::RocmDevice::new))),
        #[cfg(feature = "metal")]
        "metal" => Ok(task.run::<Autodiff<super::Metal>>(&each(indices, wgpu_device))),
        #[cfg(feature = "vulkan")]
        "vulkan" => Ok(task.run::<Autodiff<super::Vulkan>>(&each(indices, wgpu_device))),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(task.run::<Autodiff<super::Wgpu>>(&each(indices, wgpu_device))),
        _ => Err(format!("{backend} is not in this build")),
    }
}

#[cfg(feature = "_cube")]
fn each<D>(indices: &[usize], device: impl Fn(usize) -> D) -> Vec<D> {
    indices.iter().map(|&index| device(index)).collect()
}

/// Index 0 is whatever the platform prefers, a software device included.
#[cfg(any(feature = "metal", feature = "vulkan", feature = "wgpu"))]
fn wgpu_device(index: usize) -> burn::backend::wgpu::WgpuDevice {
    use burn::backend::wgpu::WgpuDevice;
    if index == 0 { WgpuDevice::DefaultDevice } else { WgpuDevice::DiscreteGpu(index) }
}

//! The SSD scan and its gradients in bf16 on tensors from files, so that others can be run on the very same numbers:
//! `benches/peers/ssd_errors.py` does.
//!
//! `ssd_files FOLDER BATCH LENGTH HEADS GROUPS STATE`, heads of 64: reads float32 `x`, `dt`, `a`, `b`, `c`, `d` and `dy` from
//! `NAME.bin` (little-endian, without a header) and writes `o_y`, `o_state`, `o_dx`, `o_ddt`, `o_da`, `o_db`, `o_dc`, `o_dd`.

use std::error::Error;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, Tensor, TensorData};
use terrarium_kernels::backend::{BackendTask, DeviceSpec, with_backend};
use terrarium_kernels::ssd::{SsdArgs, SsdOptions};
use terrarium_kernels::{KernelBackend, TrainBackend};

const HEAD: usize = 64;

struct Files {
    folder: PathBuf,
    /// Batch, length, heads, groups, state.
    sizes: [usize; 5],
}

impl Files {
    fn read<B: KernelBackend, const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        device: &B::Device,
    ) -> Result<Tensor<B, D>, Box<dyn Error>> {
        let path = self.folder.join(format!("{name}.bin"));
        let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let wanted = 4 * shape.iter().product::<usize>();
        if bytes.len() != wanted {
            return Err(format!("{}: {} bytes, but {shape:?} in float32 takes {wanted}", path.display(), bytes.len()).into());
        }
        let values: Vec<f32> = bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect();
        Ok(Tensor::from_data(TensorData::new(values, shape), (device, DType::F32)))
    }

    fn write<B: KernelBackend, const D: usize>(&self, name: &str, tensor: Tensor<B, D>) -> Result<(), Box<dyn Error>> {
        let values = tensor.into_data().convert::<f32>().to_vec::<f32>().map_err(|error| format!("o_{name}: {error:?}"))?;
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Ok(std::fs::write(self.folder.join(format!("o_{name}.bin")), bytes)?)
    }
}

impl BackendTask for Files {
    type Output = Result<(), Box<dyn Error>>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        self.scan::<B::InnerBackend>(device)
    }
}

impl Files {
    fn scan<B: KernelBackend>(&self, device: &B::Device) -> Result<(), Box<dyn Error>> {
        let [b, l, h, g, n] = self.sizes;
        let half = |tensor: Tensor<B, 4>| tensor.cast(DType::BF16);
        let args = SsdArgs {
            x: half(self.read("x", [b, l, h, HEAD], device)?),
            dt: self.read("dt", [b, l, h], device)?,
            a: self.read("a", [h], device)?,
            b: half(self.read("b", [b, l, g, n], device)?),
            c: half(self.read("c", [b, l, g, n], device)?),
            d: Some(self.read("d", [h], device)?),
            dt_bias: None,
            state: None,
            segments: None,
            options: SsdOptions { dt_softplus: false, ..SsdOptions::default() },
        };
        let dy = half(self.read("dy", [b, l, h, HEAD], device)?);
        let out = B::ssd(args.clone());
        self.write("y", out.y)?;
        self.write("state", out.state)?;
        let grads = B::ssd_backward(args, Some(dy), None).ok_or("no fast path for these sizes")?;
        self.write("dx", grads.x)?;
        self.write("ddt", grads.dt)?;
        self.write("da", grads.a)?;
        self.write("db", grads.b)?;
        self.write("dc", grads.c)?;
        grads.d.map_or(Ok(()), |d| self.write("dd", d))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: ssd_files FOLDER BATCH LENGTH HEADS GROUPS STATE")?;
    let mut sizes = [0; 5];
    for size in &mut sizes {
        *size = arguments.next().ok_or("five sizes after the folder")?.parse()?;
    }
    with_backend(&DeviceSpec::Auto, Files { folder: Path::new(&folder).to_path_buf(), sizes })?
}

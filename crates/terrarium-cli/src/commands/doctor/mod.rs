//! `terrarium doctor`

mod check;
mod system;

use clap::Args;
use serde::Serialize;
use terrarium::burn::tensor::DType;
use terrarium::burn::tensor::backend::Backend;
use terrarium::kernels::backend::{self, BackendTask, with_backend};
use terrarium::kernels::{KernelBackend, TrainBackend, path};

use crate::args::{ComputeArgs, Dtype, DtypeArgs};
use crate::console::Console;
use crate::failure::Failure;
use crate::{interrupt, model, output};

use check::Outcome;
use system::{Cpu, Folder, Hub, Terminal};

/// What this build can do on this computer, and what is missing.
///
/// Devices and whether they answer, the path that each operation takes and why, threads, cache folders, Hugging Face
/// settings, the terminal; and one line of advice for each thing that is missing.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  terrarium doctor --check")]
pub struct Arguments {
    /// Compare the fast path of every operation with the reference on the device.
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    dtype: DtypeArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    system: String,
    backends: Vec<&'static str>,
    devices: Vec<Device>,
    /// What `--device` stands for.
    device: Option<String>,
    dtype: String,
    paths: Vec<OpPath>,
    cpu: Cpu,
    folders: Vec<Folder>,
    hub: Hub,
    terminal: Terminal,
    #[serde(skip_serializing_if = "Option::is_none")]
    checks: Option<Vec<Outcome>>,
    advice: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Device {
    name: String,
    works: bool,
    status: String,
}

#[derive(Debug, Serialize)]
struct OpPath {
    op: &'static str,
    path: &'static str,
    why: String,
}

/// Looks, prints.
pub fn run(arguments: &Arguments, _console: &Console) -> Result<(), Failure> {
    interrupt::immediate();
    model::prepare(&arguments.compute)?;
    let report = look(arguments);
    if arguments.json {
        output::json(&report)?
    } else {
        print(&report)?
    }
    let failed: Vec<&str> = report.checks.iter().flatten().filter(|check| !check.passed).map(|check| check.op).collect();
    if failed.is_empty() { Ok(()) } else { Err(Failure::Check(format!("self-check failed: {}", failed.join(", ")))) }
}

fn look(arguments: &Arguments) -> Report {
    let dtype = match arguments.dtype.dtype {
        Dtype::Auto | Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
    };
    let status = |found: backend::Found| {
        let works = found.status.is_ok();
        Device { name: found.device, works, status: found.status.unwrap_or_else(|reason| reason) }
    };
    let devices: Vec<Device> = backend::discover().into_iter().map(status).collect();
    let (on_device, problem) = match with_backend(&arguments.compute.device, Probe { dtype, check: arguments.check }) {
        Ok(probed) => (Some(probed), None),
        Err(error) => (None, Some(error.to_string())),
    };
    let folders = system::folders();
    let (hub, terminal) = (Hub::look(), Terminal::look());
    let mut advice: Vec<String> = problem.into_iter().collect();
    advice.extend(
        devices
            .iter()
            .filter(|device| !device.works)
            .map(|device| format!("{}: {}; install or update its driver, or use --device cpu", device.name, first_line(&device.status))),
    );
    if !devices.iter().any(|device| !matches!(device.name.as_str(), "flex" | "ndarray")) {
        advice.push("this build runs on the CPU only; for a GPU build with --features cuda, vulkan, metal, rocm or wgpu".to_string());
    }
    advice.extend(
        folders
            .iter()
            .filter(|folder| !folder.writable)
            .map(|folder| format!("{} cannot be written; set {} to a folder that can", folder.path.display(), folder.variable)),
    );
    advice.extend(hub.advice());
    advice.extend(terminal.advice());
    let probed = on_device.unwrap_or_default();
    if probed.paths.iter().any(|path| path.path.contains("cuBLASLt not found")) {
        advice
            .push("cuBLASLt was not found: linear layers run several times slower; install it (libcublasLt.so, part of CUDA)".to_string());
    }
    Report {
        version: env!("CARGO_PKG_VERSION"),
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
        backends: backend::compiled(),
        devices,
        device: probed.device,
        dtype: format!("{dtype:?}").to_lowercase(),
        paths: probed.paths,
        cpu: Cpu::look(),
        folders,
        hub,
        terminal,
        checks: probed.checks,
        advice,
    }
}

#[derive(Default)]
struct Probed {
    device: Option<String>,
    paths: Vec<OpPath>,
    checks: Option<Vec<Outcome>>,
}

struct Probe {
    dtype: DType,
    check: bool,
}

impl BackendTask for Probe {
    type Output = Probed;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Probed {
        Probed {
            device: Some(<B::InnerBackend as Backend>::name(device)),
            paths: paths::<B::InnerBackend>(self.dtype),
            checks: self.check.then(|| check::all::<B::InnerBackend>(device)),
        }
    }
}

fn paths<B: KernelBackend>(dtype: DType) -> Vec<OpPath> {
    let path = |path: path::Path| OpPath { op: path.op.name(), path: path.fused.unwrap_or("reference"), why: path.why };
    path::report::<B>(dtype).into_iter().map(path).collect()
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn print(report: &Report) -> Result<(), Failure> {
    let mut lines = vec![format!("terrarium {} on {}", report.version, report.system)];
    let mut section = |name: &str, rows: Vec<String>| {
        lines.push(format!("\n{name}"));
        lines.extend(rows.into_iter().map(|row| format!("  {row}")));
    };
    let mark = |ok: bool| if ok { "ok " } else { "NO " };
    section("Backends in this build", vec![report.backends.join(", ")]);
    let devices = report.devices.iter().map(|device| format!("{} {:<8} {}", mark(device.works), device.name, first_line(&device.status)));
    section("Devices", devices.collect());
    let name = report.device.as_deref().unwrap_or("no device");
    let paths = report.paths.iter().map(|path| format!("{:<15} {}: {}", path.op, path.path, path.why));
    section(&format!("Operations on {name} in {}", report.dtype), paths.collect());
    if let Some(checks) = &report.checks {
        section("Self-check, fast path against reference", checks.iter().map(ToString::to_string).collect());
    }
    section("CPU", report.cpu.rows());
    let folders = report.folders.iter().map(|folder| format!("{} {folder}", mark(folder.writable)));
    section("Cache folders", folders.collect());
    section("Hugging Face", report.hub.rows());
    section("Terminal", report.terminal.rows());
    let advice = if report.advice.is_empty() { vec!["nothing is missing".to_string()] } else { report.advice.clone() };
    section("Advice", advice);
    output::line(lines.join("\n"))
}

//! The operations on the GPU of this build, or else on its CPU: checked, then timed.
//!
//! `cargo bench -p terrarium-kernels --bench ops -- --op ssd --json`, with `--features` as for the tests. The binary
//! reads no file: it can be built on one machine and run on another. `--help` lists the flags.

use std::io::Write;
use std::process::ExitCode;

use burn::tensor::DType;
use terrarium_kernels::TrainBackend;
use terrarium_kernels::backend::{BackendTask, DeviceSpec, with_backend};
use terrarium_kernels::measure::{self, Event, MeasureError, Options, Size};

const HELP: &str = "\
usage: ops [flags]
  --op NAME            only this operation (may be repeated, or a list with commas)
  --case TEXT          only cases whose `operation shape` contains TEXT
  --device DEVICE      auto, cpu, cuda:0, vulkan, ... [default: auto]
  --dtype TYPE         of activations: bf16, f16 or f32 [default: bf16 on GPUs that have it]
  --size SIZE          quick, cpu or gpu [default: what fits the device]
  --quick              the same as --size quick
  --check-only         check and do not time
  --no-check           time and do not check
  --forward-only       leave the backward out
  --reference          time full sizes of plain tensor operations too
  --json               one JSON object per line";

struct Flags {
    options: Options,
    device: DeviceSpec,
    json: bool,
}

/// The flags, or what is wrong with them; nothing where help was asked for.
fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Flags>, String> {
    let mut flags = Flags { options: Options::default(), device: DeviceSpec::Auto, json: false };
    while let Some(flag) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{flag} needs a value"));
        match flag.as_str() {
            "--op" => flags.options.ops.extend(value()?.split(',').map(str::to_string)),
            "--case" => flags.options.case = Some(value()?),
            "--device" => flags.device = value()?.parse().map_err(|error| format!("{error}"))?,
            "--dtype" => flags.options.dtype = Some(dtype(&value()?)?),
            "--size" => flags.options.size = Some(size(&value()?)?),
            "--quick" => flags.options.size = Some(Size::Quick),
            "--check-only" => flags.options.check_only = true,
            "--no-check" => flags.options.no_check = true,
            "--forward-only" => flags.options.forward_only = true,
            "--reference" => flags.options.reference = true,
            "--json" => flags.json = true,
            // What cargo adds.
            "--bench" => {}
            "--help" | "-h" => return Ok(None),
            _ => return Err(format!("no flag {flag}")),
        }
    }
    Ok(Some(flags))
}

fn dtype(name: &str) -> Result<DType, String> {
    match name {
        "bf16" => Ok(DType::BF16),
        "f16" => Ok(DType::F16),
        "f32" => Ok(DType::F32),
        _ => Err(format!("no type {name}")),
    }
}

fn size(name: &str) -> Result<Size, String> {
    match name {
        "quick" => Ok(Size::Quick),
        "cpu" => Ok(Size::Cpu),
        "gpu" => Ok(Size::Gpu),
        _ => Err(format!("no size {name}")),
    }
}

struct Bench(Flags);

impl BackendTask for Bench {
    type Output = Result<bool, MeasureError>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let Flags { options, json, .. } = self.0;
        measure::run::<B>(device, &options, |event| {
            let line = match &event {
                Event::Begin(i, n, name) => {
                    eprintln!("[{i}/{n}] {name}");
                    return;
                }
                Event::Machine(machine) if json => serde_json::to_string(machine).unwrap_or_default(),
                Event::Row(row) if json => serde_json::to_string(row).unwrap_or_default(),
                Event::Machine(machine) => format!("{machine}\n{}", measure::header()),
                Event::Row(row) => row.to_string(),
            };
            let mut out = std::io::stdout().lock();
            let _ = writeln!(out, "{line}").and_then(|()| out.flush());
        })
    }
}

fn main() -> ExitCode {
    // `cargo test --all-targets` builds and runs this as a test.
    if std::env::args().any(|argument| argument == "--test") {
        return ExitCode::SUCCESS;
    }
    let flags = match parse(std::env::args().skip(1)) {
        Ok(Some(flags)) => flags,
        Ok(None) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            eprintln!("error: {message}\n{HELP}");
            return ExitCode::from(2);
        }
    };
    let device = flags.device.clone();
    match with_backend(&device, Bench(flags)) {
        Ok(Ok(true)) => ExitCode::SUCCESS,
        Ok(Ok(false)) => ExitCode::FAILURE,
        Ok(Err(error)) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

//! `terrarium bench ops`

use clap::{Args, ValueEnum};
use terrarium::burn::tensor::DType;
use terrarium::kernels::TrainBackend;
use terrarium::kernels::backend::{BackendTask, with_backend};
use terrarium::kernels::measure::{self, Event, MeasureError, Options, Size};

use crate::args::{ComputeArgs, Dtype, DtypeArgs};
use crate::console::Console;
use crate::failure::Failure;
use crate::{model, output};

/// Check and time single operations.
///
/// Every case is first compared with float64 arithmetic at the shape that is timed; what is wrong is not timed, and the
/// command fails. Times stand beside the bytes that must move and the arithmetic, as rates and as shares of what a copy and a
/// matrix product reach on the same device.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  terrarium bench ops --op ssd,ssd_step --device cuda --json")]
pub struct Arguments {
    /// Operations; all by default.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    op: Vec<String>,
    /// Only cases whose name and shape contain this, as in "l=2048".
    #[arg(long, value_name = "TEXT")]
    case: Option<String>,
    /// Shapes; by default what fits the device.
    #[arg(long, value_enum)]
    size: Option<Shapes>,
    /// Check and do not time.
    #[arg(long, conflicts_with = "no_check")]
    check_only: bool,
    /// Time what was not checked.
    #[arg(long)]
    no_check: bool,
    /// Leave the backward out.
    #[arg(long)]
    forward_only: bool,
    #[command(flatten)]
    dtype: DtypeArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print one JSON object per line: the device, then each case.
    #[arg(long)]
    json: bool,
}

/// Spelling of [`Size`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Shapes {
    /// Tiny.
    Quick,
    /// Some hundred tokens.
    Cpu,
    /// 64K tokens.
    Gpu,
}

/// Measures, prints.
pub fn run(arguments: &Arguments, console: &Console) -> Result<(), Failure> {
    model::prepare(&arguments.compute)?;
    let options = Options {
        shapes: Vec::new(),
        ops: arguments.op.clone(),
        case: arguments.case.clone(),
        size: arguments.size.map(|size| match size {
            Shapes::Quick => Size::Quick,
            Shapes::Cpu => Size::Cpu,
            Shapes::Gpu => Size::Gpu,
        }),
        dtype: match arguments.dtype.dtype {
            Dtype::Auto => None,
            Dtype::F32 => Some(DType::F32),
            Dtype::Bf16 => Some(DType::BF16),
            Dtype::F16 => Some(DType::F16),
        },
        check_only: arguments.check_only,
        no_check: arguments.no_check,
        forward_only: arguments.forward_only,
        reference: false,
        brief: false,
    };
    if with_backend(&arguments.compute.device, Task { options, console, json: arguments.json })?? {
        Ok(())
    } else {
        Err(Failure::Check("some operations are wrong or broke; see the notes of their cases".to_string()))
    }
}

struct Task<'a> {
    options: Options,
    console: &'a Console,
    json: bool,
}

impl BackendTask for Task<'_> {
    type Output = Result<bool, Failure>;

    fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
        let mut written = Ok(());
        let right = measure::run::<B>(device, &self.options, |event| {
            if written.is_ok() {
                written = self.say(&event);
            }
        });
        written?;
        right.map_err(|error| match error {
            MeasureError::UnknownOp { .. } | MeasureError::NoCase(_) | MeasureError::Dtype(_) => Failure::usage(error.to_string()),
        })
    }
}

impl Task<'_> {
    fn say(&self, event: &Event) -> Result<(), Failure> {
        match event {
            Event::Begin(i, n, name) => {
                self.console.note(format_args!("{i}/{n} {name}"));
                Ok(())
            }
            Event::Machine(machine) if self.json => output::json(machine),
            Event::Row(row) if self.json => output::json(row),
            Event::Machine(machine) => output::line(format_args!("{machine}\n{}", measure::header())),
            Event::Row(row) => output::line(row),
        }
    }
}

//! Measures the operations: right first, then how fast.
//!
//! Every case of the table (`table.rs`) is one operation at one shape. It is checked against float64 arithmetic on the host
//! on the very shape that is timed (a part of it, where the whole would take too long), and timed only if it is right.
//!
//! # What the numbers mean
//!
//! - *forward* and *forward + backward* call the operation and its hand-written backward directly, without an autodiff
//!   graph. Calls follow each other without waiting; the inputs rotate through more data than a cache holds.
//! - *bytes*: forward reads each input once and writes each output once. The backward reads the inputs and the gradients
//!   of the outputs once, and writes the gradients of the inputs once. So TB/s compares with the rate of a copy.
//! - *FLOP*: of the textbook algorithm, whatever is really done, so that rates compare between implementations:
//!   - `ssd`: the chunked form with chunks of 256 and the causal half of each, per token: `h (256 p + 4 p n) + 256 g n`; a single step
//!     `6 h p n`. Backward: 2.5 times that.
//!   - `selective_scan`: `9 e n` per token. Backward: 2.5 times that.
//!   - `attention`: `4 l s p h` over two, for the causal half. Backward: 2.5 times that.
//!   - `causal_conv1d`: `2 k` per element. Backward: 2 times that. `rms_norm_gated`: 8 per element, `norm_residual`: 5,
//!     of a layer norm 8. Backward: 2 times that. `rotary`: 6 per rotated pair each way. `glu`: 8 per element, backward twice that. `cross_entropy`: 4 per logit each way. `embedding_backward` and `cumsum`: 1 per element.
//!   - `linear`: `2 in out` per row. Backward: 2 times that.
//! - *ceilings*: the rates of a copy and of a matrix product, measured in the same run: Burn's multiplication by a number, and a
//!   square linear layer.

mod clock;
mod data;
mod report;
mod subjects;
mod table;
mod truth;

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor};
use serde::{Deserialize, Serialize};

use crate::glu::Activation;
use crate::path::{self, KernelChoice};
use crate::{KernelBackend, Op, TrainBackend};

use clock::{Clock, Effort};
use data::{CHECK_WORK, Source};
use subjects::{Cost, Subject};

pub use clock::Timing;
pub use data::Deviation;
pub use report::header;

/// Sizes of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// Seconds on anything, software devices included.
    Quick,
    /// What a CPU works on.
    Cpu,
    /// 64K tokens.
    Gpu,
}

/// One call to measure beside the table: rows of one document, no states from before, in the options' type where nothing else is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shape {
    /// [`crate::ssd`].
    Ssd {
        /// Rows.
        b: usize,
        /// Tokens of a row.
        l: usize,
        /// Heads.
        h: usize,
        /// Width of a head.
        p: usize,
        /// Groups.
        g: usize,
        /// State width.
        n: usize,
        /// With bias and softplus of the step sizes.
        softplus: bool,
    },
    /// [`crate::selective_scan`].
    SelectiveScan {
        /// Rows.
        b: usize,
        /// Tokens of a row.
        l: usize,
        /// Channels.
        e: usize,
        /// State width.
        n: usize,
        /// With a gate.
        gate: bool,
    },
    /// [`crate::attention`], causal.
    Attention {
        /// Rows.
        b: usize,
        /// Tokens of a row.
        l: usize,
        /// Query heads.
        h: usize,
        /// Key heads.
        g: usize,
        /// Width of a head.
        p: usize,
    },
    /// [`crate::causal_conv1d`] with SiLU.
    Conv {
        /// Rows.
        b: usize,
        /// Tokens of a row.
        l: usize,
        /// Channels.
        e: usize,
        /// Taps.
        k: usize,
    },
    /// [`crate::rms_norm_gated`].
    Norm {
        /// Rows.
        b: usize,
        /// Tokens of a row.
        l: usize,
        /// Channels.
        e: usize,
        /// Runs of channels that are normed apart.
        groups: usize,
        /// With a gate.
        gate: bool,
    },
    /// [`crate::norm_residual`] on a float32 stream.
    ResidualNorm {
        /// Rows.
        b: usize,
        /// Tokens of a row.
        l: usize,
        /// Channels.
        d: usize,
        /// Layer norm.
        layer: bool,
        /// There is a branch to add.
        added: bool,
    },
    /// [`crate::rotary`] on heads behind tokens.
    Rotary {
        /// Rows.
        b: usize,
        /// Tokens of a row.
        l: usize,
        /// Heads.
        h: usize,
        /// Width of a head.
        p: usize,
        /// Rotated pairs of a head.
        half: usize,
    },
    /// [`crate::glu`].
    Glu {
        /// Rows.
        b: usize,
        /// Tokens of a row.
        l: usize,
        /// Channels.
        f: usize,
        /// The nonlinearity.
        activation: Activation,
        /// With a gate.
        gated: bool,
    },
    /// [`crate::linear`] without a bias.
    Linear {
        /// Rows.
        rows: usize,
        /// Inputs.
        inputs: usize,
        /// Outputs.
        outputs: usize,
    },
    /// [`crate::cross_entropy`].
    CrossEntropy {
        /// Positions.
        rows: usize,
        /// Tokens of vocabulary.
        v: usize,
    },
    /// The gradient of [`crate::embedding`].
    EmbeddingBackward {
        /// Tokens that were looked up.
        tokens: usize,
        /// Rows of the table.
        v: usize,
        /// Width of the table.
        d: usize,
        /// Float32 whatever the options say.
        float32: bool,
    },
}

/// What to measure.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// These shapes instead of the table; `ops` and `case` choose among them too.
    pub shapes: Vec<Shape>,
    /// Operations by name; empty for all.
    pub ops: Vec<String>,
    /// Only cases whose `op shape` contains this.
    pub case: Option<String>,
    /// Sizes; by default what fits the device.
    pub size: Option<Size>,
    /// Type of activations; by default bfloat16 where the device has it, else float16, and float32 on a CPU.
    pub dtype: Option<DType>,
    /// Check and do not time.
    pub check_only: bool,
    /// Time what was not checked.
    pub no_check: bool,
    /// Leave the backward out.
    pub forward_only: bool,
    /// Time full sizes also where only plain tensor operations run them (they may not fit into memory).
    pub reference: bool,
    /// Milliseconds per case: good to some percent.
    pub brief: bool,
}

/// Why nothing was measured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MeasureError {
    /// Not an operation of the table.
    #[error("no operation `{name}` to measure; known: {known}", known = op_names().join(", "))]
    UnknownOp {
        /// What was asked for.
        name: String,
    },
    /// No case is left.
    #[error("no case contains `{0}`")]
    NoCase(String),
    /// The device has no such numbers.
    #[error("the device does not compute in {0:?}")]
    Dtype(DType),
}

/// The device and its ceilings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Backend and device in words.
    pub device: String,
    /// Type of activations.
    pub dtype: String,
    /// Copy, bytes read and written, TB/s.
    pub copy_tbs: Option<f64>,
    /// Square matrix product of activations, TFLOP/s.
    pub matmul_tflops: Option<f64>,
}

/// Speed of one direction.
#[derive(Debug, Clone, Serialize)]
pub struct Speed {
    /// Times.
    #[serde(flatten)]
    pub timing: Timing,
    /// Rate of the bytes that must move, TB/s.
    pub tbs: f64,
    /// Rate of the arithmetic, TFLOP/s.
    pub tflops: f64,
    /// `tbs` over that of a copy.
    pub of_copy: Option<f64>,
    /// `tflops` over that of a matrix product.
    pub of_matmul: Option<f64>,
}

/// One case.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Operation.
    pub op: &'static str,
    /// Shape and variant.
    pub case: String,
    /// Type of activations.
    pub dtype: String,
    /// What ran.
    pub path: &'static str,
    /// Relative Frobenius errors against float64.
    pub errors: Vec<Deviation>,
    /// Forward.
    pub forward: Option<Speed>,
    /// Forward and backward.
    pub both: Option<Speed>,
    /// Why something is missing.
    pub note: Option<String>,
    /// The case is wrong or broke.
    pub failed: bool,
}

/// What [`run`] says as it goes.
#[derive(Debug, Clone)]
pub enum Event {
    /// A case begins: its number, how many there are, and its name.
    Begin(usize, usize, String),
    /// The device is known.
    Machine(Machine),
    /// A case is done.
    Row(Box<Row>),
}

/// Names of the operations in the table.
pub fn op_names() -> Vec<&'static str> {
    table::OPS.to_vec()
}

/// Measures what `options` ask for on `device`. Returns whether everything was right.
///
/// # Errors
/// [`MeasureError`] before anything is measured.
pub fn run<B: TrainBackend>(device: &B::Device, options: &Options, mut say: impl FnMut(Event)) -> Result<bool, MeasureError>
where
    B::InnerBackend: KernelBackend,
{
    Session::<B::InnerBackend>::new(device, options)?.run(&mut say)
}

/// The ceilings of `device` for activations of `dtype`, briefly measured.
///
/// # Errors
/// [`MeasureError::Dtype`].
pub fn ceilings<B: TrainBackend>(device: &B::Device, dtype: DType) -> Result<Machine, MeasureError> {
    let options = Options { dtype: Some(dtype), brief: true, ..Options::default() };
    let session = Session::<B::InnerBackend>::new(device, &options)?;
    Ok(session.machine(&mut Clock::new(device, session.effort())))
}

/// Times of `shapes` in `dtype`, one row each in their order: briefly measured, unchecked, without a comparison to the ceilings. Of those whose
/// operation and case are not `wanted` the row has the names alone.
///
/// # Errors
/// [`MeasureError::Dtype`].
pub fn times<B: TrainBackend>(
    device: &B::Device,
    dtype: DType,
    shapes: &[Shape],
    wanted: impl Fn(&str, &str) -> bool,
) -> Result<Vec<Row>, MeasureError> {
    let options = Options { dtype: Some(dtype), brief: true, no_check: true, reference: true, ..Options::default() };
    let session = Session::<B::InnerBackend>::new(device, &options)?;
    let mut clock = Clock::new(device, session.effort());
    let machine = session.unmeasured();
    let mut rows = Vec::new();
    for case in table::chosen::<B::InnerBackend>(shapes, session.dtype) {
        if !wanted(case.op(), &case.shape()) {
            rows.push(session.unmeasured_row(case.as_ref()));
            continue;
        }
        rows.push(session.row(case.as_ref(), &mut clock, &machine));
        <B::InnerBackend as Backend>::memory_cleanup(device);
    }
    Ok(rows)
}

struct Session<'a, B: KernelBackend> {
    device: &'a B::Device,
    options: &'a Options,
    size: Size,
    dtype: DType,
}

impl<'a, B: KernelBackend> Session<'a, B> {
    fn new(device: &'a B::Device, options: &'a Options) -> Result<Self, MeasureError> {
        if let Some(name) = options.ops.iter().find(|name| !table::OPS.contains(&name.as_str())) {
            return Err(MeasureError::UnknownOp { name: name.clone() });
        }
        let cpu = ["flex", "ndarray"].iter().any(|name| B::name(device).to_lowercase().contains(name));
        let size = options.size.unwrap_or(if cpu { Size::Cpu } else { Size::Gpu });
        let dtype = match options.dtype {
            Some(dtype) if !B::supports_dtype(device, dtype) => return Err(MeasureError::Dtype(dtype)),
            Some(dtype) => dtype,
            None if cpu => DType::F32,
            None => [DType::BF16, DType::F16].into_iter().find(|dtype| B::supports_dtype(device, *dtype)).unwrap_or(DType::F32),
        };
        Ok(Self { device, options, size, dtype })
    }

    fn effort(&self) -> Effort {
        let queued = self.size == Size::Gpu;
        let (batches, batch_ms) = match self.size {
            Size::Gpu if self.options.brief => (3, 10.0),
            _ if self.options.brief => (3, 3.0),
            Size::Quick => (3, 2.0),
            Size::Cpu => (5, 60.0),
            Size::Gpu => (7, 50.0),
        };
        let (behind, rounds) = if self.options.brief { (64, batches) } else { (256, 3 * batches) };
        Effort { batches, batch_ms, queued, behind, rounds }
    }

    fn run(&self, say: &mut dyn FnMut(Event)) -> Result<bool, MeasureError> {
        let mut cases = match self.options.shapes.as_slice() {
            [] => table::cases::<B>(self.size, self.dtype),
            shapes => table::chosen::<B>(shapes, self.dtype),
        };
        cases.retain(|case| self.options.ops.is_empty() || self.options.ops.iter().any(|op| op == case.op()));
        if let Some(part) = &self.options.case {
            cases.retain(|case| format!("{} {}", case.op(), case.shape()).contains(part.as_str()));
            if cases.is_empty() {
                return Err(MeasureError::NoCase(part.clone()));
            }
        }
        let mut clock = Clock::<B>::new(self.device, self.effort());
        let machine = self.machine(&mut clock);
        say(Event::Machine(machine.clone()));
        let mut right = true;
        for (i, case) in cases.iter().enumerate() {
            say(Event::Begin(i + 1, cases.len(), format!("{} {}", case.op(), case.shape())));
            let row = self.row(case.as_ref(), &mut clock, &machine);
            right &= !row.failed;
            say(Event::Row(Box::new(row)));
            B::memory_cleanup(self.device);
        }
        Ok(right)
    }

    fn unmeasured(&self) -> Machine {
        Machine { device: B::name(self.device), dtype: format!("{:?}", self.dtype), copy_tbs: None, matmul_tflops: None }
    }

    fn machine(&self, clock: &mut Clock<B>) -> Machine {
        let mut machine = self.unmeasured();
        if self.options.check_only {
            return machine;
        }
        let (copied, side) = match self.size {
            Size::Quick => (1 << 16, 64),
            Size::Cpu => (1 << 25, 1024),
            Size::Gpu => (1 << 28, 8192),
        };
        let source = Source::<B> { device: self.device, dtype: self.dtype };
        let rates = catch_unwind(AssertUnwindSafe(|| {
            let tensor = Tensor::<B, 1>::ones([copied], (self.device, DType::F32));
            let copy = clock.time(|| drop(tensor.clone().mul_scalar(1.5)));
            let [a, b] = [0, 1].map(|_| source.normal([side, side]));
            let product = clock.time(|| drop(<B as KernelBackend>::linear(a.clone(), b.clone(), None)));
            (8.0 * copied as f64 / copy.ms / 1e9, 2.0 * (side as f64).powi(3) / product.ms / 1e9)
        }));
        (machine.copy_tbs, machine.matmul_tflops) = rates.ok().unzip();
        machine
    }

    /// What is known of a case before it is measured.
    fn unmeasured_row(&self, case: &dyn Case<B>) -> Row {
        let dtype = case.dtype();
        let fused = path::fused::<B>(case.kernel(), dtype).filter(|_| B::takes(case.kernel(), &case.sizes(), self.device));
        Row {
            op: case.op(),
            case: case.shape(),
            dtype: format!("{dtype:?}"),
            path: fused.unwrap_or(REFERENCE),
            errors: Vec::new(),
            forward: None,
            both: None,
            note: None,
            failed: false,
        }
    }

    fn row(&self, case: &dyn Case<B>, clock: &mut Clock<B>, machine: &Machine) -> Row {
        let mut row = self.unmeasured_row(case);
        let fused = row.path != REFERENCE;
        let asked = self.options.reference || path::choice() == KernelChoice::Reference;
        if self.size == Size::Gpu && !fused && !asked {
            row.note = Some("no fast path".to_string());
            return row;
        }
        // A kernel that breaks takes its case down, not the run.
        let result = catch_unwind(AssertUnwindSafe(|| case.measure(self, clock, machine, &mut row)));
        if let Err(panic) = result {
            let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            row.note = Some(text.unwrap_or_else(|| "panicked".to_string()));
            row.failed = true;
        }
        row
    }
}

/// A [`Subject`] of any kind.
trait Case<B: KernelBackend> {
    fn op(&self) -> &'static str;
    fn kernel(&self) -> Op;
    fn shape(&self) -> String;
    fn sizes(&self) -> Vec<usize>;
    fn dtype(&self) -> DType;
    /// Checks, then times; fills `row`.
    fn measure(&self, session: &Session<B>, clock: &mut Clock<B>, machine: &Machine, row: &mut Row);
}

impl<B: KernelBackend, S: Subject<B>> Case<B> for S {
    fn op(&self) -> &'static str {
        Subject::op(self)
    }

    fn kernel(&self) -> Op {
        Subject::kernel(self)
    }

    fn shape(&self) -> String {
        Subject::shape(self)
    }

    fn sizes(&self) -> Vec<usize> {
        Subject::sizes(self)
    }

    fn dtype(&self) -> DType {
        Subject::dtype(self)
    }

    fn measure(&self, session: &Session<B>, clock: &mut Clock<B>, machine: &Machine, row: &mut Row) {
        let options = session.options;
        B::seed(session.device, 1);
        let source = Source::<B> { device: session.device, dtype: Subject::dtype(self) };
        if !options.no_check {
            let work = if session.size == Size::Gpu { CHECK_WORK } else { CHECK_WORK / 10 };
            row.errors = self.check(&source, !options.forward_only, work);
            let limit = tolerance(source.dtype, row.path == REFERENCE);
            let wrong: Vec<String> =
                row.errors.iter().filter(|d| d.error.is_nan() || d.error > limit).map(|d| format!("{} {:.1e}", d.name, d.error)).collect();
            if !wrong.is_empty() {
                row.note = Some(format!("wrong, so not timed: {}", wrong.join(", ")));
                row.failed = true;
                return;
            }
        }
        if options.check_only {
            return;
        }
        let Cost { forward, backward } = self.cost();
        let data = match session.size {
            Size::Quick => 0.0,
            Size::Cpu => 64e6,
            Size::Gpu => 512e6,
        } / if options.brief { 4.0 } else { 1.0 };
        let count = ((data / forward.bytes).ceil() as usize).clamp(1, 128);
        let mut sets: Vec<S::Set> = (0..count).map(|_| self.set(&source)).collect();
        let speed = |timing: Timing, bytes: f64, flop: f64| {
            let (tbs, tflops) = (bytes / timing.ms / 1e9, flop / timing.ms / 1e9);
            Speed {
                timing,
                tbs,
                tflops,
                of_copy: machine.copy_tbs.map(|copy| tbs / copy),
                of_matmul: machine.matmul_tflops.map(|matmul| tflops / matmul),
            }
        };
        let mut next = 0;
        let timing = clock.time(|| {
            self.forward(&mut sets[next]);
            next = (next + 1) % count;
        });
        row.forward = Some(speed(timing, forward.bytes, forward.flop));
        let Some(backward) = backward.filter(|_| !options.forward_only) else { return };
        if !self.backward(&mut sets[0]) {
            row.note = Some("no backward without autodiff".to_string());
            return;
        }
        let timing = clock.time(|| {
            self.forward(&mut sets[next]);
            self.backward(&mut sets[next]);
            next = (next + 1) % count;
        });
        row.both = Some(speed(timing, forward.bytes + backward.bytes, forward.flop + backward.flop));
    }
}

/// Name of the path that is none.
const REFERENCE: &str = "reference";

/// Largest relative error that is still the same function. The reports show how far below it results lie.
fn tolerance(dtype: DType, reference: bool) -> f64 {
    match dtype {
        DType::BF16 => 1e-2,
        DType::F16 => 2e-3,
        // Burn's float32 products may run in TF32.
        _ if reference => 2e-3,
        _ => 1e-4,
    }
}

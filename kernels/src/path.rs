//! Which implementation of an operation runs: the reference, or a path made for the backend.

use std::cell::Cell;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use burn::tensor::DType;

use crate::KernelBackend;

/// Operations that may have a fast path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Op {
    /// [`crate::causal_conv1d`]
    CausalConv1d,
    /// [`crate::selective_scan`]
    SelectiveScan,
    /// [`crate::ssd`]
    Ssd,
    /// [`crate::rms_norm_gated`]
    RmsNormGated,
    /// [`crate::attention`]
    Attention,
    /// [`crate::linear`]
    Linear,
    /// [`crate::cross_entropy`]
    CrossEntropy,
    /// [`crate::norm_residual`]
    NormResidual,
    /// [`crate::embedding`]; the fast path is that of the gradient
    Embedding,
    /// [`crate::cumsum`]
    Cumsum,
    /// [`crate::rotary`]
    Rotary,
    /// [`crate::glu`]
    Glu,
}

impl Op {
    /// All operations, in the order of the model.
    pub const ALL: [Op; 12] = [
        Op::Embedding,
        Op::NormResidual,
        Op::Linear,
        Op::CausalConv1d,
        Op::SelectiveScan,
        Op::Ssd,
        Op::RmsNormGated,
        Op::Rotary,
        Op::Attention,
        Op::Glu,
        Op::CrossEntropy,
        Op::Cumsum,
    ];

    /// Name as printed.
    pub fn name(self) -> &'static str {
        match self {
            Op::CausalConv1d => "causal_conv1d",
            Op::SelectiveScan => "selective_scan",
            Op::Ssd => "ssd",
            Op::RmsNormGated => "rms_norm_gated",
            Op::Attention => "attention",
            Op::Linear => "linear",
            Op::CrossEntropy => "cross_entropy",
            Op::NormResidual => "norm_residual",
            Op::Embedding => "embedding",
            Op::Cumsum => "cumsum",
            Op::Rotary => "rotary",
            Op::Glu => "glu",
        }
    }
}

/// The user's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KernelChoice {
    /// The fast path where there is one, else the reference.
    #[default]
    Auto,
    /// Always the reference.
    Reference,
    /// The fast path. Where there is none this behaves as `Auto`; a front end that promises `Fused` asks
    /// [`report`] first.
    Fused,
}

static CHOICE: AtomicU8 = AtomicU8::new(0);

/// Sets the choice for the whole process.
pub fn set_choice(choice: KernelChoice) {
    CHOICE.store(choice as u8, Ordering::Relaxed);
}

thread_local! {
    /// Takes the place of the choice in force, while what was queued under another one runs.
    pub(crate) static PINNED: Cell<Option<KernelChoice>> = const { Cell::new(None) };
}

/// The choice in force.
pub fn choice() -> KernelChoice {
    if let Some(choice) = PINNED.get() {
        return choice;
    }
    match CHOICE.load(Ordering::Relaxed) {
        1 => KernelChoice::Reference,
        2 => KernelChoice::Fused,
        _ => KernelChoice::Auto,
    }
}

/// What an operation will run on a backend, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Operation.
    pub op: Op,
    /// Name of the fast path, or `None` for the reference.
    pub fused: Option<&'static str>,
    /// Reason in words.
    pub why: String,
}

/// The fast path that `op` takes under the choice in force, if any.
pub fn fused<B: KernelBackend>(op: Op, dtype: DType) -> Option<&'static str> {
    if choice() == KernelChoice::Reference { None } else { B::fused(op, dtype) }
}

/// Whether the fast path of `op` runs a call of these sizes, see [`KernelBackend::takes`].
pub(crate) fn runs<B: KernelBackend>(op: Op, dtype: DType, sizes: &[usize], device: &B::Device) -> bool {
    fused::<B>(op, dtype).is_some() && B::takes(op, sizes, device)
}

/// Says in the log which path an operation takes, the first time it runs.
pub(crate) fn announce<B: KernelBackend>(op: Op, dtype: DType) {
    static SAID: AtomicU16 = AtomicU16::new(0);
    let bit = 1u16 << op as u16;
    if SAID.load(Ordering::Relaxed) & bit == 0 && SAID.fetch_or(bit, Ordering::Relaxed) & bit == 0 {
        log::info!("{} in {dtype:?}: {}", op.name(), fused::<B>(op, dtype).unwrap_or("reference"));
    }
}

/// What each operation runs on backend `B` for tensors of `dtype`.
pub fn report<B: KernelBackend>(dtype: DType) -> Vec<Path> {
    Op::ALL
        .into_iter()
        .map(|op| {
            let fast = B::fused(op, dtype);
            let why = match (choice(), fast) {
                (KernelChoice::Reference, Some(_)) => "the reference was asked for".to_string(),
                (_, Some(name)) => format!("{name} handles {dtype:?}"),
                (_, None) => format!("no fast path for {dtype:?} on this backend yet: plain tensor operations"),
            };
            Path { op, fused: fused::<B>(op, dtype), why }
        })
        .collect()
}

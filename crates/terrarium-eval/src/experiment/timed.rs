//! What a cell of the speed experiment took, or why it took nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::DType;
use serde::{Deserialize, Serialize};
use terrarium_kernels::TrainBackend;
use terrarium_kernels::measure::Machine;
use terrarium_models::{Decoder, DecoderConfig};
use terrarium_runtime::prefill_chunk;

use super::Finding;
use super::stats::short;
use crate::timing::{Decode, capacity};

/// What it took.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Timed {
    /// Milliseconds of a call forward, or of a step.
    pub ms: Option<f64>,
    /// Milliseconds of a call forward and backward.
    pub both_ms: Option<f64>,
    /// Of a whole model.
    pub tokens_per_s: Option<f64>,
    /// The most memory that was taken at once, bytes: from the device by its pools, or by this process on a CPU.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Bytes of the cache when decoding.
    #[serde(default)]
    pub cache_bytes: Option<u64>,
    /// Bytes that a decoding step cannot but move.
    #[serde(default)]
    pub floor_bytes: Option<f64>,
    /// Rate of a copy on the device, TB/s.
    #[serde(skip)]
    pub copy_tbs: Option<f64>,
    /// What ran.
    pub path: String,
    /// Why something is missing.
    pub note: Option<String>,
}

impl Finding for Timed {
    fn words(&self) -> String {
        let mut words: Vec<String> = Vec::new();
        words.extend(self.ms.map(|ms| format!("{ms:.3} ms")));
        words.extend(self.both_ms.map(|ms| format!("with backward {ms:.3} ms")));
        words.extend(self.tokens_per_s.map(|speed| format!("{} tokens/s", short(speed))));
        words.extend(self.note.clone());
        words.join(", ")
    }

    fn judge(&mut self, machine: Option<&Machine>) {
        self.copy_tbs = machine.and_then(|machine| machine.copy_tbs);
    }
}

impl Timed {
    /// The least that a decoding step can take at the rate of a copy, milliseconds.
    pub(super) fn floor_ms(&self) -> Option<f64> {
        Some(self.floor_bytes? / self.copy_tbs? / 1e9)
    }

    /// That over what it takes.
    pub(super) fn of_floor(&self) -> Option<f64> {
        Some(self.floor_ms()? / self.ms?)
    }
}

/// Does what may be too much for the device's memory, which it says by an error or a panic: a cell ends by that, not the experiment.
pub(super) fn caught<T>(work: impl FnOnce() -> terrarium_runtime::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Err(text.unwrap_or_else(|| "panicked".to_string()))
        }
    }
}

/// Decodes with the model that `make` gives, unless it cannot fit: then the note says so.
pub(super) fn attempt<B: TrainBackend>(
    config: &DecoderConfig,
    decode: &Decode,
    dtype: DType,
    make: impl FnOnce() -> Decoder<B::InnerBackend>,
    device: &B::Device,
) -> Timed {
    let path = format!("{dtype:?}").to_lowercase();
    let mut timed = Timed { path, floor_bytes: Some(decode.floor(config, dtype)), ..Timed::default() };
    let needs = decode.needs(config, dtype, prefill_chunk::<B::InnerBackend>(device));
    if let Some(there) = capacity::<B::InnerBackend>(device).map(|bytes| bytes as f64).filter(|there| needs > *there) {
        timed.note = Some(format!("does not fit: needs {:.1} GB of {:.1}", needs / 1e9, there / 1e9));
        return timed;
    }
    match caught(|| decode.run(&make(), config, device)) {
        Ok(found) => {
            timed.ms = found.ms.get(found.ms.len() / 2).copied();
            timed.tokens_per_s = timed.ms.map(|ms| decode.batch as f64 / ms * 1e3);
            timed.memory_bytes = found.memory;
            timed.cache_bytes = Some(found.cache);
        }
        Err(reason) => timed.note = Some(format!("failed: {reason}")),
    }
    timed
}

//! Folding an adapter into its base model.

use std::path::{Path, PathBuf};

use burn::module::AutodiffModule;
use serde::Serialize;
use terrarium_kernels::TrainBackend;
use terrarium_kernels::backend::{BackendTask, DeviceSpec, with_backend};
use terrarium_runtime::{LoadOptions, SaveOptions};

use crate::TrainError;

/// What was merged.
#[derive(Debug, Clone, Serialize)]
pub struct MergeReport {
    /// The written directory.
    pub dir: PathBuf,
    /// Projections that got an adapter.
    pub adapted: Vec<String>,
    /// What loading decided; print it.
    pub notes: Vec<String>,
}

/// Adds the adapter in `adapter_dir` (PEFT layout) to the model in `base_dir`, and writes a Hugging Face directory in the base's dtype.
///
/// # Errors
/// When the two do not fit, or the disk refuses; nothing half-written is left.
pub fn merge(base_dir: &Path, adapter_dir: &Path, out_dir: &Path, device: &DeviceSpec) -> Result<MergeReport, TrainError> {
    struct Task<'a>(&'a Path, &'a Path, &'a Path);
    impl BackendTask for Task<'_> {
        type Output = Result<MergeReport, TrainError>;
        fn run<B: TrainBackend>(self, device: &B::Device) -> Self::Output {
            let Self(base_dir, adapter_dir, out_dir) = self;
            let loaded = terrarium_runtime::load::<B>(base_dir, &LoadOptions::default(), device)?;
            let (model, report, adapter) = terrarium_runtime::load_adapter::<B>(adapter_dir, loaded.model, &loaded.config, device)?;
            let save = SaveOptions { files_from: Some(base_dir.to_path_buf()), base_model: adapter.base_model, ..SaveOptions::default() };
            terrarium_runtime::save(out_dir, &model.merge_lora().valid(), &loaded.config, &save)?;
            Ok(MergeReport { dir: out_dir.to_path_buf(), adapted: report.adapted, notes: loaded.notes })
        }
    }
    with_backend(device, Task(base_dir, adapter_dir, out_dir))?
}

//! Tests of [`terrarium_kernels::path`].

use burn::tensor::DType;
use terrarium_kernels::path::{Op, report};

use crate::common::*;

#[test]
fn the_report_names_a_path_for_every_operation() {
    for paths in [report::<Plain>(DType::F32), report::<Train>(DType::F32)] {
        assert_eq!(paths.iter().map(|path| path.op).collect::<Vec<_>>(), Op::ALL);
        for path in paths {
            let memory_bound = matches!(
                path.op,
                Op::RmsNormGated | Op::NormResidual | Op::CrossEntropy | Op::Embedding | Op::Cumsum | Op::Rotary | Op::Glu
            );
            // The reference of a running sum is linear in time on CPUs.
            let expected = if cfg!(any(feature = "vulkan", feature = "cuda")) { memory_bound } else { path.op != Op::Cumsum };
            assert!(path.fused.is_some() || !expected, "{path:?}");
            assert!(!path.why.is_empty());
        }
    }
}

#[test]
fn a_dtype_that_no_fast_path_handles_runs_the_reference() {
    assert!(report::<Plain>(DType::F64).iter().all(|path| path.fused.is_none()));
}

//! Adapters: every one trains, nothing else does, and merging changes no answer.

use terrarium::burn::module::AutodiffModule;
use terrarium::models::{Layout, LoraConfig, LoraError, LoraTargets};

use crate::common::*;

const ALL: LoraConfig = LoraConfig { rank: 2, alpha: 4.0, targets: LoraTargets::All };

#[test]
fn every_adapter_gets_a_gradient_and_nothing_else_does() {
    let device = device();
    for config in configs() {
        let (model, report) = model::<A>(&config, 31, &device).attach_lora(&ALL, 1, &device).unwrap();
        assert!(report.untouched.is_empty());
        let logits = model.forward(tensor(&ids(60, 12, 61), [1, 12], &device), None, &Layout::full(1, 12)).0;
        let grads = gradients(&model, &logits.powi_scalar(2).mean().backward());
        assert_eq!(grads.len(), 2 * report.adapted.len(), "{}: {:?}", config.family, grads.keys());
        for path in &report.adapted {
            // b starts at zero, so the first gradient of a is zero; that of b is not.
            let b = &grads[&format!("{path}.lora.b")];
            assert!(b.iter().any(|v| v.abs() > 1e-9), "{}: {path} gets no gradient", config.family);
            assert!(grads[&format!("{path}.lora.a")].iter().all(|v| *v == 0.0));
        }
    }
}

#[test]
fn merged_adapters_compute_the_same() {
    let device = device();
    for config in configs() {
        let (mut model, _) = model::<A>(&config, 32, &device).attach_lora(&ALL, 1, &device).unwrap();
        let mut seed = 0;
        model.for_each_linear(&mut |_, linear| {
            seed += 1;
            let lora = linear.lora.as_mut().unwrap();
            let noise: Vec<f32> = ids(seed, lora.b.val().dims().iter().product(), 200).iter().map(|v| *v as f32 / 500.0 - 0.2).collect();
            let shape = lora.b.val().dims();
            let data = terrarium::burn::tensor::TensorData::new(noise, shape);
            lora.b = terrarium::burn::module::Param::from_tensor(terrarium::burn::tensor::Tensor::from_data(data, &device));
        });
        let run = |model: &terrarium::models::Decoder<B>| {
            floats(model.forward(tensor(&ids(61, 9, 61), [1, 9], &device), None, &Layout::full(1, 9)).0)
        };
        let attached = run(&model.valid());
        let merged = model.merge_lora();
        assert!(!merged.has_lora());
        assert_close(config.family.name(), &run(&merged.valid()), &attached, 2e-5);
    }
}

#[test]
fn targets_that_match_nothing_are_refused() {
    let device = device();
    let attach = |config: usize, targets: LoraTargets, rank: usize| {
        model::<A>(&configs()[config], 33, &device)
            .attach_lora(&LoraConfig { rank, alpha: 1.0, targets }, 1, &device)
            .map(|(_, report)| report)
    };
    assert!(matches!(attach(0, LoraTargets::Attention, 2), Err(LoraError::NoMatch { .. })));
    let names = LoraTargets::Names(vec!["in_proj".into(), "nothing".into()]);
    assert!(matches!(attach(0, names, 2), Err(LoraError::NoMatch { target, .. }) if target == "nothing"));
    assert!(matches!(attach(0, LoraTargets::All, 0), Err(LoraError::Rank { .. })));
    assert!(matches!(attach(0, LoraTargets::All, 1000), Err(LoraError::Rank { .. })));
    let report = attach(1, LoraTargets::Ssm, 2).unwrap();
    assert_eq!(report.adapted.len(), 4);
    assert!(report.to_string().starts_with("adapting 4 of 12 projections"), "{report}");
}

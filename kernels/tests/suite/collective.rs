//! Sums over devices, where there are several of a kind that can make them.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use terrarium_kernels::backend::{DevicesTask, with_backends};
use terrarium_kernels::collective::Collective;
use terrarium_kernels::{KernelBackend, TrainBackend};

/// Lengths that are none of a vector's, and one that takes many blocks.
const LENGTHS: [usize; 4] = [1, 7, 300, 70_001];

fn value(rank: usize, tensor: usize, at: usize) -> f32 {
    (rank as f32 + 1.0) * ((at * 31 + tensor * 7) % 97) as f32 / 8.0 - 3.0
}

/// What the device of `rank` is left with.
fn sums<B: KernelBackend>(link: &Arc<dyn Collective<B>>, rank: usize, device: &B::Device) -> Vec<Vec<f32>> {
    let tensor = |(index, n): (usize, usize)| {
        let values: Vec<f32> = (0..n).map(|at| value(rank, index, at)).collect();
        Tensor::<B, 1>::from_data(TensorData::new(values, [n]), device) + 0.0
    };
    let tensors: Vec<Tensor<B, 1>> = LENGTHS.into_iter().enumerate().map(tensor).collect();
    // Someone else holds the first: it must not change.
    let kept = tensors[0].clone();
    let sums = link.sum(tensors).into_iter().map(|sum| (sum * 2.0).into_data().to_vec::<f32>().unwrap()).collect();
    assert_eq!(kept.into_data().to_vec::<f32>().unwrap(), [value(rank, 0, 0)]);
    sums
}

struct Task;

impl DevicesTask for Task {
    type Output = ();
    fn run<B: TrainBackend>(self, devices: &[B::Device]) {
        assert!(B::InnerBackend::collective(&devices[..1]).is_none(), "one device has nothing to sum with");
        let twice = [devices[0].clone(), devices[0].clone()];
        assert!(B::InnerBackend::collective(&twice).is_none(), "NCCL takes each device once");
        let link = B::InnerBackend::collective(devices).expect("libnccl is installed");
        let expected: Vec<Vec<f32>> = LENGTHS
            .into_iter()
            .enumerate()
            .map(|(index, n)| (0..n).map(|at| 2.0 * (value(0, index, at) + value(1, index, at))).collect())
            .collect();
        for _ in 0..3 {
            let found: Vec<Vec<Vec<f32>>> = std::thread::scope(|scope| {
                let ranks = devices.iter().enumerate().map(|(rank, device)| {
                    let link = &link;
                    scope.spawn(move || sums::<B::InnerBackend>(link, rank, device))
                });
                ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            assert!(found.iter().all(|sums| *sums == expected), "sums differ from {:?}", &expected[1]);
        }
    }
}

#[test]
fn all_devices_get_the_sums() {
    let devices = ["cuda:0", "cuda:1"].map(|name| name.parse().unwrap());
    // Without a second device there is nothing to do.
    if let Err(error) = with_backends(&devices, Task) {
        eprintln!("not run: {error}");
    }
}

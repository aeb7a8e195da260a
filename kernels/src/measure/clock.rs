//! Times on a device that works through a queue.

use std::time::Instant;

use burn::tensor::{DType, Tensor};

use crate::KernelBackend;

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Effort {
    /// Batches that count; the median is reported.
    pub batches: usize,
    /// A batch is repeated calls, enough for this many milliseconds, with one wait at the end.
    pub batch_ms: f64,
    /// The device is a GPU: the queue runs ahead of it.
    pub queued: bool,
    /// Calls that are queued behind other work, where more would fill the driver's queue, and how often.
    pub behind: usize,
    pub rounds: usize,
}

/// Times of one call, milliseconds.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Timing {
    /// Median over batches.
    pub ms: f64,
    /// Fastest batch.
    pub min: f64,
    /// Slowest batch.
    pub max: f64,
    /// Batches.
    pub batches: usize,
    /// Calls of a batch.
    pub calls: usize,
    /// Time per call when calls are queued one after another without preparation. Larger than `ms` where the host
    /// cannot queue as fast as the device computes.
    pub queued_ms: f64,
    /// Time that the host spends on queueing one call.
    pub host_ms: f64,
}

/// Measures calls on one device.
pub(super) struct Clock<'a, B: KernelBackend> {
    device: &'a B::Device,
    effort: Effort,
    /// Work that keeps the device busy while calls are queued behind it.
    plug: Option<(Tensor<B, 1>, f64)>,
}

impl<'a, B: KernelBackend> Clock<'a, B> {
    pub fn new(device: &'a B::Device, effort: Effort) -> Self {
        Self { device, effort, plug: None }
    }

    /// Waits for the device.
    pub fn sync(&self) {
        if let Err(error) = B::sync(self.device) {
            panic!("the device failed: {error:?}");
        }
    }

    /// Milliseconds until everything queued by `work` is done, and until it was queued.
    fn once(&self, work: &mut dyn FnMut()) -> (f64, f64) {
        let start = Instant::now();
        work();
        let queued = start.elapsed().as_secs_f64() * 1e3;
        self.sync();
        (start.elapsed().as_secs_f64() * 1e3, queued)
    }

    /// Warms up (kernels are compiled and tuned in the first calls), then times.
    pub fn time(&mut self, mut call: impl FnMut()) -> Timing {
        self.sync();
        for _ in 0..3 {
            self.once(&mut call);
        }
        // Repeat until a wait's own cost no longer counts.
        let mut calls = 1;
        let mut per_call = f64::MAX;
        while calls < 1 << 16 {
            let total = self.once(&mut || (0..calls).for_each(|_| call())).0;
            per_call = total / calls as f64;
            if total >= self.effort.batch_ms / 4.0 {
                break;
            }
            calls *= if total > 0.2 { 2 } else { 8 };
        }
        let calls = ((self.effort.batch_ms / per_call).ceil() as usize).clamp(1, 1 << 16);
        // A slow call needs no crowd around it.
        let batches = if per_call > 10.0 * self.effort.batch_ms { self.effort.batches.min(3) } else { self.effort.batches };
        let runs: Vec<(f64, f64)> = (0..batches).map(|_| self.once(&mut || (0..calls).for_each(|_| call()))).collect();
        let each = |pick: fn(&(f64, f64)) -> f64| -> Vec<f64> {
            let mut all: Vec<f64> = runs.iter().map(|run| pick(run) / calls as f64).collect();
            all.sort_by(f64::total_cmp);
            all
        };
        let (times, host) = (each(|run| run.0), each(|run| run.1));
        let queued_ms = median(&times);
        let host_ms = median(&host);
        if !self.effort.queued || host_ms < 0.5 * queued_ms {
            return Timing { ms: queued_ms, min: times[0], max: times[times.len() - 1], batches, calls, queued_ms, host_ms };
        }
        let times = self.behind_plug(&mut call, host_ms);
        Timing {
            ms: median(&times),
            min: times[0],
            max: times[times.len() - 1],
            batches: times.len(),
            calls: self.effort.behind,
            queued_ms,
            host_ms,
        }
    }

    /// Times of calls that were all queued before the first one ran, so that the device runs them back to back.
    fn behind_plug(&mut self, call: &mut dyn FnMut(), host_ms: f64) -> Vec<f64> {
        let (tensor, unit_ms) = self.take_plug();
        let Effort { behind, rounds, .. } = self.effort;
        let units = (4.0 * host_ms * behind as f64 / unit_ms).ceil().max(4.0) as usize;
        let plug = |tensor: &Tensor<B, 1>| (0..units).for_each(|_| drop(tensor.clone().mul_scalar(1.5)));
        let mut times: Vec<f64> = (0..rounds)
            .map(|_| {
                let alone = self.once(&mut || plug(&tensor)).0;
                let both = self.once(&mut || {
                    plug(&tensor);
                    (0..behind).for_each(|_| call());
                });
                (both.0 - alone) / behind as f64
            })
            .collect();
        times.sort_by(f64::total_cmp);
        self.plug = Some((tensor, unit_ms));
        times
    }

    fn take_plug(&mut self) -> (Tensor<B, 1>, f64) {
        if let Some(plug) = self.plug.take() {
            return plug;
        }
        let tensor = Tensor::<B, 1>::ones([1 << 26], (self.device, DType::F32));
        let mut unit = || (0..8).for_each(|_| drop(tensor.clone().mul_scalar(1.5)));
        self.once(&mut unit);
        let unit_ms = self.once(&mut unit).0 / 8.0;
        (tensor, unit_ms)
    }
}

/// Of sorted values.
fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    type B = burn::backend::Flex;

    #[test]
    fn calls_that_the_host_is_slow_to_queue_are_timed_behind_other_work() {
        let device = Default::default();
        let effort = Effort { batches: 3, batch_ms: 0.01, queued: true, behind: 4, rounds: 2 };
        let mut clock = Clock::<B>::new(&device, effort);
        let mut calls = 0;
        // This device computes while it queues, so the host is always the slow one.
        let timing = clock.time(|| {
            calls += 1;
            std::thread::sleep(std::time::Duration::from_millis(20));
        });
        assert_eq!((timing.batches, timing.calls), (2, 4));
        // Three to warm up, one to find out how many make a batch, three batches of one, and two rounds of four.
        assert_eq!(calls, 3 + 1 + 3 + 2 * 4);
        assert!(timing.host_ms >= 20.0 && timing.queued_ms >= timing.host_ms, "{timing:?}");
        assert!(timing.min <= timing.ms && timing.ms <= timing.max, "{timing:?}");
    }
}

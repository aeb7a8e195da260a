//! Tests of [`terrarium_kernels::record`].

use terrarium_kernels::KernelBackend;

use crate::common::Plain;

type B = Plain;

#[test]
fn a_backend_without_recordings_says_so() {
    assert_eq!(B::recorder(&Default::default()).is_some(), cfg!(feature = "cuda"));
}

#[test]
fn devices_tell_how_much_memory_they_have() {
    let (memory, capacity) = (B::memory(&Default::default()), B::capacity(&Default::default()));
    assert_eq!((memory.is_some(), capacity.is_some()), (cfg!(any(feature = "cuda", feature = "vulkan")), cfg!(feature = "cuda")));
    assert!(capacity.zip(memory).is_none_or(|(bytes, memory)| bytes >= memory.reserved && memory.reserved >= memory.in_use));
}

#[cfg(feature = "cuda")]
mod cuda {
    use burn::tensor::{DType, Int, Tensor, TensorData};
    use terrarium_kernels::argmax::argmax;
    use terrarium_kernels::causal_conv1d::{ConvArgs, causal_conv1d};
    use terrarium_kernels::embedding::embedding;
    use terrarium_kernels::linear::linear;
    use terrarium_kernels::record::{Recorder, Recording};

    use super::*;
    use crate::common::Train;

    fn ramp<const D: usize>(shape: [usize; D], step: f32) -> Tensor<B, D> {
        let n = shape.iter().product::<usize>();
        let values: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) * step).collect();
        Tensor::from_data(TensorData::new(values, shape), (&Default::default(), DType::F32))
    }

    /// A tiny model with a state.
    struct Toy {
        table: Tensor<B, 2>,
        taps: Tensor<B, 2>,
        head: Tensor<B, 2>,
    }

    impl Toy {
        fn new() -> Self {
            Self { table: ramp([29, 16], 0.02), taps: ramp([16, 4], 0.01), head: ramp([29, 16], 0.03) }
        }

        /// Reads `ids [2, 1]`; what it chooses next lies where they lay.
        fn step(&self, ids: Tensor<B, 2, Int>, state: Tensor<B, 3>) -> (Tensor<B, 2, Int>, Tensor<B, 3>) {
            let x = embedding(self.table.clone(), ids.clone());
            let args = ConvArgs { x, weight: self.taps.clone(), bias: None, state: Some(state), segments: None, silu: true };
            let out = causal_conv1d(args);
            let logits = linear(out.y.reshape([2, 16]), self.head.clone(), None);
            (argmax(logits, 29, Some(ids)), out.state)
        }
    }

    fn start() -> (Tensor<B, 2, Int>, Tensor<B, 3>) {
        (Tensor::from_data(TensorData::new(vec![3i32, 8], [2, 1]), &Default::default()), ramp([2, 3, 16], 0.05))
    }

    fn ids(tensor: &Tensor<B, 2, Int>) -> Vec<i64> {
        tensor.clone().into_data().iter::<i64>().collect()
    }

    /// What the toy chooses in `steps` steps, and its last state.
    fn plainly(steps: usize) -> (Vec<Vec<i64>>, TensorData) {
        let (toy, (mut next, mut state)) = (Toy::new(), start());
        let mut chosen = Vec::new();
        for _ in 0..steps {
            (next, state) = toy.step(next, state);
            chosen.push(ids(&next));
        }
        (chosen, state.into_data())
    }

    fn recorder() -> Box<dyn Recorder<B>> {
        B::recorder(&Default::default()).expect("CUDA records")
    }

    fn within<T>(recorder: &dyn Recorder<B>, work: impl FnOnce() -> T) -> T {
        let (mut work, mut done) = (Some(work), None);
        recorder.within(&mut || done = work.take().map(|work| work()));
        done.unwrap()
    }

    /// A toy after two steps of its own and with a third recorded.
    struct Recorded {
        recording: Box<dyn Recording>,
        next: Tensor<B, 2, Int>,
        state: Tensor<B, 3>,
        toy: Toy,
        recorder: Box<dyn Recorder<B>>,
    }

    fn recorded() -> (Vec<Vec<i64>>, Recorded) {
        let recorder = recorder();
        let toy = Toy::new();
        let mut carried = Some(within(recorder.as_ref(), start));
        let mut chosen = Vec::new();
        for _ in 0..2 {
            within(recorder.as_ref(), || carried = carried.take().map(|(next, state)| toy.step(next, state)));
            let next = &carried.as_ref().unwrap().0;
            chosen.push(within(recorder.as_ref(), || ids(next)));
        }
        let places = |(next, state): &(Tensor<B, 2, Int>, Tensor<B, 3>)| {
            let next = recorder.int_address(&next.clone().into_primitive()).unwrap();
            (next, recorder.address(&state.clone().into_primitive().tensor()).unwrap())
        };
        let before = places(carried.as_ref().unwrap());
        let recording = recorder.record(&mut || carried = carried.take().map(|(next, state)| toy.step(next, state))).unwrap();
        assert_eq!(places(carried.as_ref().unwrap()), before, "a step goes on where it was");
        let (next, state) = carried.unwrap();
        (chosen, Recorded { recording, next, state, toy, recorder })
    }

    #[test]
    fn replays_are_the_steps_that_follow() {
        let (expected, last) = plainly(9);
        let (mut chosen, it) = recorded();
        assert_eq!(it.recording.operations(), 4, "embedding, convolution, product, choice");
        assert_eq!(within(it.recorder.as_ref(), || ids(&it.next)), expected[1], "recording a step does not take it");
        for _ in 2..9 {
            it.recording.replay();
            chosen.push(within(it.recorder.as_ref(), || ids(&it.next)));
        }
        it.recording.check().unwrap();
        assert_eq!(chosen, expected);
        assert_eq!(within(it.recorder.as_ref(), || it.state.clone().into_data()), last);
    }

    /// Without the wait the second use of the memory may come before the recorder's stream has read the first: on a GPU under load, and
    /// always on the emulator with `TERRARIUM_EMULATOR_LATE=1`.
    #[test]
    fn memory_that_was_waited_for_may_be_used_again() {
        let recorder = recorder();
        let source = ramp([256, 16], 0.02);
        let expected: Vec<f32> = source.clone().into_data().iter::<f32>().map(|v| v * 2.0).collect();
        let doubled = within(recorder.as_ref(), || source.clone() * 2.0);
        recorder.wait().unwrap();
        drop(source);
        // The caller's stream gives the memory to these.
        let later: Vec<Tensor<B, 2>> = (0..4).map(|i| ramp([256, 16], 1.0 + i as f32)).collect();
        later.into_iter().for_each(|tensor| drop(tensor.into_data()));
        assert_eq!(within(recorder.as_ref(), || doubled.into_data()).iter::<f32>().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn tokens_can_be_put_in_its_way() {
        let (_, it) = recorded();
        let place = it.next.clone().into_primitive();
        it.recorder.overwrite(&place, &[11, 2]).unwrap();
        assert_eq!(within(it.recorder.as_ref(), || ids(&it.next)), [11, 2]);
        let (other, state) = within(it.recorder.as_ref(), || (it.next.clone(), it.state.clone()));
        let expected = within(it.recorder.as_ref(), || ids(&it.toy.step(other, state).0));
        it.recording.replay();
        assert_eq!(within(it.recorder.as_ref(), || ids(&it.next)), expected);
        assert!(it.recorder.overwrite(&place, &[1, 2, 3]).is_err());
    }

    /// Memory of a recording's own: what others allocate and fill meanwhile does not reach it.
    #[test]
    fn others_may_allocate_between_replays() {
        let (expected, _) = plainly(6);
        let (_, it) = recorded();
        for step in expected.iter().skip(2) {
            let others: Vec<Tensor<B, 2>> = (1..40).map(|i| Tensor::ones([i, 16], &Default::default()) * 1e9).collect();
            it.recording.replay();
            assert_eq!(&within(it.recorder.as_ref(), || ids(&it.next)), step);
            assert!(others.into_iter().all(|other| other.min().into_scalar() == 1e9));
        }
    }

    #[test]
    fn what_cannot_be_repeated_is_refused() {
        let recorder = recorder();
        let upload = || drop(ramp([8, 8], 1.0) + 1.0);
        assert_eq!(recorder.uploads(&mut || upload()), Ok(true));
        let logits = within(recorder.as_ref(), || ramp([2, 128], 0.1));
        assert_eq!(recorder.uploads(&mut || drop(argmax(logits.clone(), 128, None))), Ok(false));
        // More than CubeCL holds before it lets go of the first.
        for many in [64, 128, 200] {
            assert_eq!(recorder.uploads(&mut || (0..many).for_each(|_| upload())), Ok(true), "{many}");
        }
        let refused = recorder.record(&mut || upload()).map(|_| ()).unwrap_err();
        assert!(refused.to_string().contains("between host and device"), "{refused}");
        // And what follows is none the worse for it.
        assert_eq!(within(recorder.as_ref(), || (ramp([2, 2], 1.0) + 1.0).into_data()), (ramp([2, 2], 1.0) + 1.0).into_data());
    }

    #[test]
    fn streams_are_given_back() {
        let held: Vec<_> = (0..20).map_while(|_| B::recorder(&Default::default())).collect();
        assert!((1..=8).contains(&held.len()), "{}", held.len());
        drop(held);
        assert!((0..300).all(|_| B::recorder(&Default::default()).is_some()), "none is used up");
        // Differentiation needs values of before: nothing is recorded there.
        assert!(Train::recorder(&Default::default()).is_none());
    }
}

//! The backend under test, test data, and the comparisons that every operation goes through.

use burn::backend::Autodiff;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};
use terrarium_kernels::KernelBackend;

#[cfg(feature = "cuda")]
pub type Plain = burn::backend::Cuda<f32, i32>;
#[cfg(all(feature = "vulkan", not(feature = "cuda")))]
pub type Plain = burn::backend::Vulkan<f32, i32>;
#[cfg(all(feature = "ndarray", not(any(feature = "cuda", feature = "vulkan"))))]
pub type Plain = burn::backend::NdArray<f32>;
#[cfg(all(feature = "flex", not(any(feature = "cuda", feature = "ndarray", feature = "vulkan"))))]
pub type Plain = burn::backend::Flex;

/// The backend that trains.
pub type Train = Autodiff<Plain>;

/// A software GPU: only small sizes finish.
pub const SLOW: bool = cfg!(feature = "vulkan");
/// f16 and bf16 work.
pub const HALF: bool = cfg!(any(feature = "cuda", all(feature = "flex", not(any(feature = "ndarray", feature = "vulkan")))));

/// The half precisions that work, with the error that rounding to them allows.
pub fn halves() -> Vec<(DType, f64)> {
    let both = vec![(DType::F16, 5.1e-4), (DType::BF16, 4.1e-3)];
    if HALF {
        both
    } else if cfg!(all(feature = "vulkan", not(feature = "cuda"))) && Plain::supports_dtype(&Default::default(), DType::F16) {
        both[..1].to_vec()
    } else {
        Vec::new()
    }
}

/// Relative to the largest value. NdArray's vector reciprocals and a GPU's exponentials are approximations.
pub const TOLERANCE: f64 = if cfg!(any(feature = "ndarray", feature = "vulkan", feature = "cuda")) { 5e-5 } else { 1e-5 };

/// The same for what is made of Burn's matrix products: on CUDA these may round float32 factors to the 10 bits of TF32.
pub const PRODUCTS: f64 = if cfg!(feature = "cuda") { 2e-3 } else { TOLERANCE };

/// Small deterministic generator (splitmix64).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678)
    }

    /// Uniform in `[low, high)`, in steps that bfloat16 represents when the range lies within -2..2.
    pub fn uniform(&mut self, low: f64, high: f64, count: usize) -> Vec<f64> {
        (0..count).map(|_| ((low + (high - low) * self.unit()) * 64.0).round() / 64.0).collect()
    }

    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Named values; absent names are arguments that the case leaves out.
#[derive(Debug, Clone)]
pub struct Bag<T>(pub Vec<(&'static str, T)>);

impl<T: Clone> Bag<T> {
    pub fn opt(&self, name: &str) -> Option<T> {
        self.0.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone())
    }

    pub fn get(&self, name: &str) -> T {
        self.opt(name).unwrap_or_else(|| panic!("no input {name}"))
    }
}

/// Document ids and what they are compared with; printed short.
#[derive(Clone)]
pub struct Ids(pub Vec<i32>, pub Vec<i32>);

impl std::fmt::Debug for Ids {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ids", self.0.len())
    }
}

/// Which implementation a case runs.
#[derive(Debug, Clone)]
pub enum Way {
    /// The reference; for `ssd` the chunked form.
    Reference,
    /// For `ssd` the recurrence; elsewhere as `Reference`.
    Recurrent,
    /// The public function.
    Public,
    /// The public function on pieces that end at these positions, each starting from the last one's state.
    Pieces(Vec<usize>),
    /// The public function on pieces that end at these positions, each from no state: separate documents.
    Separate(Vec<usize>),
}

/// One set of arguments of an operation.
pub trait Case {
    fn inputs(&self) -> Bag<Vec<f64>>;
    /// The operation in scalar float64 arithmetic.
    fn scalar(&self, inputs: &Bag<Vec<f64>>) -> Vec<Vec<f64>>;
    /// How far float32 results of `way` may be from the scalar loop, relative to the largest.
    fn tolerance(&self, _way: &Way) -> f64 {
        TOLERANCE
    }
    /// The operation on flat tensors. Activations are cast to `dtype` first.
    fn run<B: KernelBackend>(&self, inputs: &Bag<Tensor<B, 1>>, way: &Way, dtype: DType) -> Vec<Tensor<B, 1>>;
}

pub fn tensor<B: Backend>(values: &[f64]) -> Tensor<B, 1> {
    let values: Vec<f32> = values.iter().map(|&v| v as f32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), (&Default::default(), DType::F32))
}

pub fn values<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

/// Flat and float32.
pub fn flat<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Tensor<B, 1> {
    let count = tensor.shape().num_elements();
    tensor.cast(DType::F32).reshape([count])
}

/// Outputs of a case on the plain backend.
pub fn outputs<C: Case>(case: &C, way: &Way, dtype: DType) -> Vec<Vec<f64>> {
    let inputs = Bag(case.inputs().0.iter().map(|(name, v)| (*name, tensor::<Plain>(v))).collect());
    case.run::<Plain>(&inputs, way, dtype).into_iter().map(values).collect()
}

/// Weights of the outputs in the loss whose gradients are compared.
pub fn cotangents(sizes: &[usize]) -> Vec<Vec<f64>> {
    sizes.iter().enumerate().map(|(i, &size)| Rng::new(900 + i as u64).uniform(-1.0, 1.0, size)).collect()
}

/// Gradients of every input for a loss on the outputs in `used`; also the loss's own outputs.
pub fn gradients<C: Case>(case: &C, way: &Way, dtype: DType, used: &[usize]) -> Bag<Vec<f64>> {
    let leaves = Bag(case.inputs().0.iter().map(|(name, v)| (*name, tensor::<Train>(v).require_grad())).collect());
    let outputs = case.run::<Train>(&leaves, way, dtype);
    let weights = cotangents(&outputs.iter().map(|t| t.shape().num_elements()).collect::<Vec<_>>());
    let mut loss = Tensor::<Train, 1>::zeros([1], (&Default::default(), DType::F32));
    for &i in used {
        loss = loss + (outputs[i].clone() * tensor::<Train>(&weights[i])).sum();
    }
    let grads = loss.backward();
    let inner = |leaf: &Tensor<Train, 1>| match leaf.grad(&grads) {
        Some(grad) => values(grad),
        None => vec![0.0; leaf.shape().num_elements()],
    };
    Bag(leaves.0.iter().map(|(name, leaf)| (*name, inner(leaf))).collect())
}

/// Central differences of the scalar loop, for the same loss as [`gradients`].
pub fn differences<C: Case>(case: &C, used: &[usize]) -> Bag<Vec<f64>> {
    const STEP: f64 = 1e-5;
    let inputs = case.inputs();
    let sizes: Vec<usize> = case.scalar(&inputs).iter().map(Vec::len).collect();
    let weights = cotangents(&sizes);
    let loss = |inputs: &Bag<Vec<f64>>| -> f64 {
        let outputs = case.scalar(inputs);
        used.iter().map(|&i| outputs[i].iter().zip(&weights[i]).map(|(o, w)| o * w).sum::<f64>()).sum()
    };
    let mut result = Vec::new();
    for (index, (name, original)) in inputs.0.iter().enumerate() {
        let mut moved = inputs.clone();
        let grad = (0..original.len()).map(|i| {
            moved.0[index].1[i] = original[i] + STEP;
            let up = loss(&moved);
            moved.0[index].1[i] = original[i] - STEP;
            let down = loss(&moved);
            moved.0[index].1[i] = original[i];
            (up - down) / (2.0 * STEP)
        });
        result.push((*name, grad.collect()));
    }
    Bag(result)
}

/// Panics unless all differences are within `tolerance` of the largest expected value.
#[track_caller]
pub fn close(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: counts differ");
    let largest = want.iter().fold(0.0f64, |m, v| m.max(v.abs())).max(1e-3);
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (g - w).abs() / largest;
        assert!(error <= tolerance, "{what}: element {i} of {} is {g}, expected {w} (relative {error:.2e})", got.len());
    }
}

#[track_caller]
pub fn close_lists(what: &str, got: &[Vec<f64>], want: &[Vec<f64>], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        close(&format!("{what}, output {i}"), g, w, tolerance);
    }
}

#[track_caller]
pub fn close_bags(what: &str, got: &Bag<Vec<f64>>, want: &Bag<Vec<f64>>, tolerance: f64) {
    assert_eq!(got.0.len(), want.0.len());
    for ((name, g), (_, w)) in got.0.iter().zip(&want.0) {
        close(&format!("{what}, gradient of {name}"), g, w, tolerance);
    }
}

/// Values of `ways` against the scalar loop.
#[track_caller]
pub fn check_values<C: Case + std::fmt::Debug>(case: &C, ways: &[Way]) {
    let want = case.scalar(&case.inputs());
    for way in ways {
        close_lists(&format!("{way:?} of {case:?}"), &outputs(case, way, DType::F32), &want, case.tolerance(way));
    }
}

/// Gradients of `ways` against central differences; a loss on all outputs, and on each alone.
#[track_caller]
pub fn check_differences<C: Case + std::fmt::Debug>(case: &C, ways: &[Way], outputs: usize) {
    for used in uses(outputs) {
        let want = differences(case, &used);
        for way in ways {
            close_bags(
                &format!("{way:?} of {case:?}, loss on {used:?}"),
                &gradients(case, way, DType::F32, &used),
                &want,
                case.tolerance(way),
            );
        }
    }
}

/// Gradients of `way` against those of the reference.
#[track_caller]
pub fn check_gradients<C: Case + std::fmt::Debug>(case: &C, way: &Way, outputs: usize) {
    for used in uses(outputs) {
        let want = gradients(case, &Way::Reference, DType::F32, &used);
        close_bags(&format!("{way:?} of {case:?}, loss on {used:?}"), &gradients(case, way, DType::F32, &used), &want, 2.0 * TOLERANCE);
    }
}

/// Values and gradients, bit for bit, on one thread and on three. The case has to be large enough to use them.
#[track_caller]
pub fn check_threads<C: Case + Sync>(case: &C, outputs: usize) {
    let used: Vec<usize> = (0..outputs).collect();
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| (self::outputs(case, &Way::Public, DType::F32), gradients(case, &Way::Public, DType::F32, &used).0))
    };
    let (one, three) = (on(1), on(3));
    assert!(one == three, "results depend on the number of threads");
    assert!(one == on(3), "results differ from run to run");
}

fn uses(outputs: usize) -> Vec<Vec<usize>> {
    let all: Vec<usize> = (0..outputs).collect();
    let mut uses: Vec<Vec<usize>> = if outputs > 1 { all.iter().map(|&i| vec![i]).collect() } else { Vec::new() };
    uses.insert(0, all);
    uses
}

/// Ids and previous ids for three rows of length `l`: documents that begin inside and at the edge of a chunk of 16
/// with padding behind; nothing but padding; an incoming state of another document.
pub fn three_rows(l: usize) -> Ids {
    let pad = (l / 5).min(7);
    let first = (0..l).map(|t| if t + pad >= l { -1 } else { i32::from(t >= 5) + i32::from(t >= 16) + i32::from(t >= 40) });
    let second = (0..l).map(|_| -1);
    let third = (0..l).map(|t| if t + 1 == l && l > 2 { -1 } else { 3 + (t / 33) as i32 });
    Ids(first.chain(second).chain(third).collect(), vec![0, 4, 2])
}

/// Part of a row's ids, with the id before it.
pub fn piece(ids: &[i32], prev: &[i32], l: usize, from: usize, to: usize) -> (Vec<i32>, Vec<i32>) {
    let rows = prev.len();
    let part = (0..rows).flat_map(|row| ids[row * l + from..row * l + to].to_vec()).collect();
    let before = (0..rows).map(|row| ids[row * l..row * l + from].iter().rev().copied().find(|&id| id >= 0).unwrap_or(prev[row]));
    (part, before.collect())
}

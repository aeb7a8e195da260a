//! Times of the operations at the sizes of a 130M-parameter Mamba or Mamba-2, fast path against reference.
//!
//! `cargo bench -p terrarium-kernels --bench cpu_ops -- [part of a name]`, with `--features` as for the tests.

use std::time::Instant;

use burn::backend::Autodiff;
use burn::tensor::backend::Backend;
use burn::tensor::{DType, Distribution, Tensor};
use terrarium_kernels::attention::{AttentionArgs, AttentionMask, attention};
use terrarium_kernels::causal_conv1d::{ConvArgs, causal_conv1d};
use terrarium_kernels::linear::linear;
use terrarium_kernels::path::{KernelChoice, set_choice};
use terrarium_kernels::rms_norm_gated::{NormArgs, rms_norm_gated};
use terrarium_kernels::selective_scan::{ScanArgs, selective_scan};
use terrarium_kernels::ssd::{SsdArgs, SsdOptions, ssd};
use terrarium_kernels::{KernelBackend, TrainBackend};

#[cfg(feature = "ndarray")]
type Plain = burn::backend::NdArray<f32>;
#[cfg(all(feature = "flex", not(feature = "ndarray")))]
type Plain = burn::backend::Flex;

type Train = Autodiff<Plain>;

fn random<B: Backend, const D: usize>(shape: [usize; D]) -> Tensor<B, D> {
    Tensor::random(shape, Distribution::Uniform(-1.0, 1.0), (&Default::default(), DType::F32))
}

/// Best of several runs, in milliseconds.
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let start = Instant::now();
    let mut best = f64::INFINITY;
    for _ in 0..400 {
        let run = Instant::now();
        f();
        best = best.min(run.elapsed().as_secs_f64());
        if start.elapsed().as_secs_f64() > 1.0 {
            break;
        }
    }
    best * 1e3
}

/// Prints both times if `what` contains the first argument, if any; returns that of the fast path.
fn compare(what: &str, mut f: impl FnMut()) -> f64 {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    if !what.contains(&filter) {
        return f64::NAN;
    }
    set_choice(KernelChoice::Auto);
    let fast = best(&mut f);
    set_choice(KernelChoice::Reference);
    let slow = best(&mut f);
    println!("{what:<52} {fast:>9.3} ms   reference {slow:>9.3} ms   {:>6.1}x", slow / fast);
    fast
}

fn scan<B: KernelBackend>(l: usize, state: bool) -> SsdArgs<B> {
    let (h, p, g, n) = (24, 64, 1, 128);
    SsdArgs {
        x: random([1, l, h, p]),
        dt: random([1, l, h]),
        a: random([h]).abs().neg(),
        b: random([1, l, g, n]),
        c: random([1, l, g, n]),
        d: Some(random([h])),
        dt_bias: Some(random([h])),
        state: state.then(|| random([1, h, p, n])),
        segments: None,
        options: SsdOptions::default(),
    }
}

fn scan_backward<B: TrainBackend>(l: usize) {
    let mut args = scan::<B>(l, true);
    let tracked = |t: Tensor<B, 4>| t.require_grad();
    (args.x, args.b, args.c) = (tracked(args.x), tracked(args.b), tracked(args.c));
    (args.dt, args.a) = (args.dt.require_grad(), args.a.require_grad());
    let weight = random::<B, 4>([1, l, 24, 64]);
    compare(&format!("ssd l={l} h=24 p=64 n=128 forward + backward"), || {
        let out = ssd(args.clone());
        let _ = (out.y * weight.clone()).sum().backward();
    });
}

/// Channels and states of the selective scan.
const SELECTIVE: [usize; 2] = [1536, 16];

fn selective<B: KernelBackend>(l: usize) -> ScanArgs<B> {
    let [e, n] = SELECTIVE;
    ScanArgs {
        u: random([1, l, e]),
        delta: random([1, l, e]),
        a: random([e, n]).abs().neg(),
        b: random([1, l, n]),
        c: random([1, l, n]),
        d: Some(random([e])),
        // As the second half of a projection.
        z: Some(random([1, l, 2 * e]).narrow(2, e, e)),
        delta_bias: Some(random([e])),
        state: Some(random([1, e, n])),
        segments: None,
        delta_softplus: true,
    }
}

fn per_state(l: usize, ms: f64) {
    if ms.is_finite() {
        println!("    {:.3} ns per token, channel and state", ms * 1e6 / (l * SELECTIVE[0] * SELECTIVE[1]) as f64);
    }
}

fn selective_backward<B: TrainBackend>(l: usize) {
    let args = selective::<B>(l);
    let tracked = |t: Tensor<B, 3>| t.require_grad();
    let args = ScanArgs {
        u: tracked(args.u),
        delta: tracked(args.delta),
        a: args.a.require_grad(),
        b: tracked(args.b),
        c: tracked(args.c),
        z: args.z.map(tracked),
        ..args
    };
    let weight = random::<B, 3>([1, l, SELECTIVE[0]]);
    let ms = compare(&format!("selective_scan l={l} e=1536 n=16 forward + backward"), || {
        let _ = (selective_scan(args.clone()).y * weight.clone()).sum().backward();
    });
    per_state(l, ms);
}

fn conv<B: KernelBackend>(l: usize) -> ConvArgs<B> {
    let (e, k) = (1792, 4);
    let state = Some(random([1, k - 1, e]));
    ConvArgs { x: random([1, l, e]), weight: random([e, k]), bias: Some(random([e])), state, segments: None, silu: true }
}

fn main() {
    // `cargo test --all-targets` builds and runs this as a test.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    for l in [512, 2048, 64, 16, 2, 1] {
        let args = scan::<Plain>(l, true);
        compare(&format!("ssd l={l} h=24 p=64 n=128 forward"), || {
            let _ = ssd(args.clone());
        });
    }
    scan_backward::<Train>(512);
    scan_backward::<Train>(64);
    for l in [256, 2048, 64, 16, 4, 1] {
        let args = selective::<Plain>(l);
        let ms = compare(&format!("selective_scan l={l} e=1536 n=16 forward"), || {
            let _ = selective_scan(args.clone());
        });
        per_state(l, ms);
    }
    selective_backward::<Train>(256);
    selective_backward::<Train>(2048);
    for l in [512, 1] {
        let args = conv::<Plain>(l);
        compare(&format!("causal_conv1d l={l} e=1792 k=4 forward"), || {
            let _ = causal_conv1d(args.clone());
        });
    }
    let mut args = conv::<Train>(512);
    (args.x, args.weight) = (args.x.require_grad(), args.weight.require_grad());
    compare("causal_conv1d l=512 e=1792 k=4 forward + backward", || {
        let _ = causal_conv1d(args.clone()).y.sum().backward();
    });
    for l in [512, 1] {
        let args =
            NormArgs::<Plain> { y: random([1, l, 1536]), z: Some(random([1, l, 1536])), weight: random([1536]), groups: 1, eps: 1e-5 };
        compare(&format!("rms_norm_gated l={l} e=1536 forward"), || {
            let _ = rms_norm_gated(args.clone());
        });
    }
    for (rows, inputs, outputs) in [
        (1, 576, 49152),
        (1, 768, 50288),
        (1, 768, 3352),
        (4, 576, 49152),
        (16, 576, 49152),
        (64, 576, 1536),
        (512, 576, 1536),
        (512, 1536, 576),
        (512, 768, 3352),
    ] {
        let (x, weight) = (random::<Plain, 2>([rows, inputs]), random::<Plain, 2>([outputs, inputs]));
        let ms = compare(&format!("linear {rows} x {inputs} by {outputs}"), || {
            let _ = linear(x.clone(), weight.clone(), None);
        });
        if ms.is_finite() {
            println!("    {:.1} GB/s of weight", (inputs * outputs * 4) as f64 / ms / 1e6);
        }
    }
    let [q, k, v] = [9, 3, 3].map(|heads| random::<Train, 4>([1, heads, 512, 64]).require_grad());
    compare("attention l=512 s=512 h=9 g=3 p=64 forward + backward", || {
        let mask = AttentionMask::causal(512, 512);
        let _ = attention(AttentionArgs { q: q.clone(), k: k.clone(), v: v.clone(), scale: 0.125, mask }).sum().backward();
    });
    for (l, s) in [(1, 512), (1, 4096), (512, 512), (2048, 2048)] {
        let args = AttentionArgs::<Plain> {
            q: random([1, 9, l, 64]),
            k: random([1, 3, s, 64]),
            v: random([1, 3, s, 64]),
            scale: 0.125,
            mask: AttentionMask::causal(l, s),
        };
        compare(&format!("attention l={l} s={s} h=9 g=3 p=64 forward"), || {
            let _ = attention(args.clone());
        });
    }
}

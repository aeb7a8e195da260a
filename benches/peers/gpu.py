#!/usr/bin/env python3
"""Other implementations of the operations on one GPU, in the format of `terrarium bench ops --json`.

  python gpu.py --mamba DIR [--conv DIR] [--op ssd,attention] [--case l=2048] [--out PEERS.jsonl] [--budget SECONDS]

DIR is a checkout of state-spaces/mamba (the folder that holds `mamba_ssm/`, and `csrc/` for the CUDA selective scan) and of
Dao-AILab/causal-conv1d; a file COMMIT beside them is noted in the output. Needs torch, triton and einops (which may lie in DIR too).

| operation | peers |
|---|---|
| ssd, ssd_step | Triton kernels of mamba_ssm: mamba_chunk_scan_combined, selective_state_update |
| selective_scan | mamba_ssm's CUDA extension, built here for what is measured (see gpu_build.py); left out without nvcc |
| causal_conv1d | the CUDA extension of causal-conv1d, likewise |
| rms_norm_gated, rms_norm | mamba_ssm's Triton norms; torch's RMSNorm |
| attention | torch's SDPA with FlashAttention-2, and with cuDNN |
| cross_entropy, embedding_backward | torch |

How it measures: each call is captured in a CUDA graph over rotating inputs (0.5 GB) and replayed, several replays to a batch of 50 ms,
seven batches: no launch gaps, inputs out of the cache. What cannot be captured is timed back to back in a plain loop, and says so.
Triton's autotuner sees every configuration of the original, with 5 and 20 ms for each instead of 25 and 100. Its kernels are compiled
ahead by processes that never touch the GPU (triton_ahead.py). Integers of the SSD kernels that only shape the grid are not specialised, so that one
compilation serves all lengths. Errors are relative Frobenius errors against a float64 recurrence, with the gradient of the output zero
outside of the last row, as in `terrarium bench ops`.
"""
import argparse, contextlib, gc, json, math, os, sys, time, traceback, types

START = time.time()
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--mamba", default="", help="checkout of state-spaces/mamba")
parser.add_argument("--conv", default="", help="checkout of Dao-AILab/causal-conv1d")
parser.add_argument("--op", default="", help="operations, separated by commas")
parser.add_argument("--case", default="", help="only cases whose `operation shape` contains this")
parser.add_argument("--out", default="-", help="file for the JSON lines")
parser.add_argument("--budget", type=float, default=3600, help="seconds after which no further case begins")
parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile Triton kernels ahead")
parser.add_argument("--cache", default=os.path.abspath("peers_cache"), help="compiled kernels and extensions")
parser.add_argument("--dry", action="store_true", help="walk through the Triton cases on the CPU without running a kernel")
args = parser.parse_args()
os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(args.cache, "triton"))
os.makedirs(os.environ["TRITON_CACHE_DIR"], exist_ok=True)

import torch
import torch.nn.functional as F

import gpu_build
import triton_ahead

DEV = "cpu" if args.dry else "cuda"
bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64
TOKENS = 4096 if args.dry else 65536
LENGTHS = [512 << i for i in range(3 if args.dry else 8)]
DATA = 512e6          # bytes of inputs that rotate
BATCH_MS, BATCHES = 50.0, 7
OUT = sys.stdout if args.out == "-" else open(args.out, "w")


def say(*words):
    print(f"[{time.time() - START:6.1f}]", *words, file=sys.stderr, flush=True)


def emit(value):
    print(json.dumps(value), file=OUT, flush=True)


# ------------------------------------------------------------------------------------------------- timing
def events(work, count):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def timed(work, calls):
    """Milliseconds of one of the `calls` calls in `work`: median, fastest and slowest batch."""
    once = events(work, 1)
    count = max(1, math.ceil(BATCH_MS / max(once, 1e-3)))
    batches = 3 if once > 10 * BATCH_MS else BATCHES
    times = sorted(events(work, count) / count / calls for _ in range(batches))
    return dict(ms=times[len(times) // 2], min=times[0], max=times[-1], batches=batches, calls=count * calls)


def measure(run, sets):
    """Times run(set) over all sets, from a CUDA graph where possible."""
    if args.dry:
        run(sets[0])
        return dict(ms=1.0, min=1.0, max=1.0, batches=0, calls=0)
    for _ in range(3):
        for one in sets[:4]:
            run(one)
    torch.cuda.synchronize()
    gc.collect()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=STREAM):
            for one in sets:
                run(one)
    except Exception as error:
        say("no graph:", str(error)[:120])
        torch.cuda.synchronize()
        result = timed(lambda: [run(one) for one in sets], len(sets))
        return dict(result, graph=False)
    graph.replay()
    torch.cuda.synchronize()
    result = timed(graph.replay, len(sets))
    del graph
    return dict(result, graph=True)


def copies(make, bytes_of_one):
    count = 1 if args.dry else min(64, max(1, math.ceil(DATA / bytes_of_one)))
    return [make() for _ in range(count)]


class Table:
    """Runs the cases that were asked for, and prints a line for each."""

    def __init__(self):
        self.ops = [name for name in args.op.split(",") if name]

    def wants(self, op):
        return not self.ops or op in self.ops

    def case(self, op, case, path, work, dtype="BF16"):
        """`work()` returns a dict with forward, both, errors, note as far as it has them."""
        if not self.wants(op) or args.case not in f"{op} {case}":
            return
        row = dict(op=op, case=case, dtype=dtype, path=path, errors=[], forward=None, both=None, note=None, failed=False)
        if time.time() - START > args.budget:
            row["note"] = "no time left"
        else:
            try:
                row.update(work())
            except Exception as error:
                row.update(note=f"{type(error).__name__}: {str(error)[:300]}", failed=True)
                say(traceback.format_exc()[-1500:])
        show = [f"{name} {row[name]['ms']:.4f}" for name in ("forward", "both") if row[name]]
        say(path, op, case, *show, row["note"] or "")
        emit(row)
        gc.collect()
        if not args.dry:
            torch.cuda.empty_cache()


def rand(*shape, dtype=bf16, grad=True):
    return torch.randn(*shape, device=DEV, dtype=dtype).requires_grad_(grad)


def spread(*shape, low, high):
    return torch.rand(*shape, device=DEV) * (high - low) + low


def no_grad(run):
    def inner(one):
        with torch.no_grad():
            run(one)
    return inner


def relative(name, got, want):
    got, want = got.detach().double(), want.detach().double()
    return dict(name=name, error=float((got - want).norm() / want.norm()))


# ------------------------------------------------------------------------------------------------- SSD
def ssd_inputs(b, l, h, p, g, n, state=False, softplus=False, segments=False):
    one = dict(x=rand(b, l, h, p), dt=rand(b, l, h, dtype=f32) if softplus else torch.exp(spread(b, l, h, low=math.log(1e-3), high=math.log(1e-1))),
               a=spread(h, low=-16, high=-1), b=rand(b, l, g, n), c=rand(b, l, g, n), d=rand(h, dtype=f32))
    if softplus:
        one["dt_bias"] = spread(h, low=-6, high=-3)
    if state:
        one["state"] = rand(b, h, p, n, dtype=f32)
    for tensor in one.values():
        tensor.requires_grad_(True)
    one["leaves"] = list(one.values())
    one["dy"] = rand(b, l, h, p, grad=False)
    if state:
        one["dstate"] = rand(b, h, p, n, dtype=f32, grad=False)
    if segments:
        length = max(1, min(700, l // 3))
        at = torch.arange(l, device=DEV)[None] + 61 * torch.arange(b, device=DEV)[:, None]
        one["ids"] = (at // length).to(torch.int32)
    return one


def ssd_run(one):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    out = mamba_chunk_scan_combined(one["x"], one["dt"], one["a"], one["b"], one["c"], 256, D=one["d"], dt_bias=one.get("dt_bias"),
                                    initial_states=one.get("state"), seq_idx=one.get("ids"), dt_softplus="dt_bias" in one,
                                    return_final_states="state" in one)
    return out if isinstance(out, tuple) else (out,)


def ssd_both(one):
    return torch.autograd.grad(ssd_run(one), one["leaves"], [one[name] for name in ("dy", "dstate") if name in one])


def ssd_errors(one):
    """The last row against a float64 recurrence; l must be small."""
    dy = torch.zeros_like(one["dy"])
    dy[-1] = one["dy"][-1]
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    y, final = mamba_chunk_scan_combined(one["x"], one["dt"], one["a"], one["b"], one["c"], 256, D=one["d"], return_final_states=True)
    grads = torch.autograd.grad(y, one["leaves"], dy)
    row = {k: (v.detach()[-1] if v.dim() > 1 else v.detach()).double().requires_grad_(True) for k, v in one.items() if k in "x dt a b c d".split()}
    l, h, p = row["x"].shape
    ratio = h // row["b"].shape[1]
    b, c = row["b"].repeat_interleave(ratio, 1), row["c"].repeat_interleave(ratio, 1)
    state, ys = torch.zeros(h, p, b.shape[-1], device=DEV, dtype=f64), []
    for t in range(l):
        state = state * torch.exp(row["dt"][t] * row["a"])[:, None, None] + (row["dt"][t, :, None] * row["x"][t])[..., None] * b[t][:, None, :]
        ys.append((state * c[t][:, None, :]).sum(-1))
    bare = torch.stack(ys)
    skip = row["d"][:, None] * row["x"]
    wanted = torch.autograd.grad(bare + skip, list(row.values()), dy[-1].double())
    found = [relative("y", y[-1], bare + skip), relative("y-dx", y[-1].double() - skip, bare), relative("state", final[-1], state)]
    for name, got, want in zip(row, grads, wanted):
        found.append(relative("d" + name, got[-1] if got.dim() > 1 else got, want))
    return found


def ssd_cases(table):
    shapes = [(TOKENS // l, l, 32, 64, 1, n, "") for n in (128, 64, 256) for l in LENGTHS]
    for tokens in (8192, 16384):
        shapes += [(tokens // l, l, 32, 64, 1, n, "") for n, l in ((128, 2048), (64, 2048), (256, 2048), (128, tokens), (128, 512))]
    for l in (2048, 16384):
        shapes += [(TOKENS // l, l, 32, 64, g, 128, v) for g, v in ((8, ""), (1, " state"), (1, " softplus"), (1, " segments"), (8, " state softplus segments"))]
    shapes += [(65, 1000, 32, 64, 1, 128, ""), (4, 16385, 32, 64, 1, 128, ""), (8, 2048, 64, 64, 1, 128, ""), (8, 2048, 24, 64, 1, 128, "")]
    for b, l, h, p, g, n, variant in shapes:
        if args.dry and (b == 0 or b * l > TOKENS):
            continue
        def work():
            words = variant.split()
            make = lambda: ssd_inputs(b, l, h, p, g, n, *(word in words for word in ("state", "softplus", "segments")))
            sets = copies(make, 2 * b * l * (h * p + 2 * g * n))
            errors = ssd_errors(sets[0]) if l == 1024 and not variant and not args.dry else []
            return dict(forward=measure(no_grad(ssd_run), sets), both=measure(ssd_both, sets), errors=errors)
        table.case("ssd", f"b={b} l={l} h={h} p={p} g={g} n={n}{variant}", "triton", work)


def ssd_step_cases(table):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    h, p, n = 64, 64, 128
    for b in (1, 16, 64, 128, 256):
        def work():
            def make():
                wide = lambda t, *shape: t.expand(*shape)
                return dict(state=rand(b, h, p, n, dtype=f32, grad=False), x=rand(b, h, p, grad=False),
                            dt=wide(torch.exp(spread(b, h, low=math.log(1e-3), high=math.log(1e-1)))[:, :, None], b, h, p),
                            a=wide(spread(h, low=-16, high=-1)[:, None, None], h, p, n), b=rand(b, 1, n, grad=False), c=rand(b, 1, n, grad=False),
                            d=wide(rand(h, dtype=f32, grad=False)[:, None], h, p), bias=wide(torch.zeros(h, device=DEV)[:, None], h, p))
            # This version asks for strides of the bias even where there is none.
            run = lambda s: selective_state_update(s["state"], s["x"], s["dt"], s["a"], s["b"], s["c"], s["d"], dt_bias=s["bias"])
            return dict(forward=measure(run, copies(make, b * h * p * n * 4)))
        table.case("ssd_step", f"b={b} h={h} p={p} g=1 n={n}", "triton", work)


# ------------------------------------------------------------------------------------------------- Mamba-1, convolution
def scan_cases(table):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    e, n = 2048, 16
    for l, gate in [(l, False) for l in LENGTHS] + [(2048, True)]:
        b = TOKENS // l
        def work():
            def make():
                one = dict(u=rand(b, e, l), delta=rand(b, e, l), a=spread(e, n, low=-n, high=-1), b=rand(b, n, l), c=rand(b, n, l),
                           d=rand(e, dtype=f32), bias=spread(e, low=-6.9, high=-2.3))
                if gate:
                    one["z"] = rand(b, e, l)
                for tensor in one.values():
                    tensor.requires_grad_(True)
                return dict(one, leaves=list(one.values()), dy=rand(b, e, l, grad=False))
            def run(s):
                return selective_scan_fn(s["u"], s["delta"], s["a"], s["b"], s["c"], s["d"], z=s.get("z"), delta_bias=s["bias"], delta_softplus=True)
            both = lambda s: torch.autograd.grad(run(s), s["leaves"], s["dy"])
            sets = copies(make, 4 * b * l * e)
            return dict(forward=measure(no_grad(run), sets), both=measure(both, sets))
        table.case("selective_scan", f"b={b} l={l} e={e} n={n}{' z' if gate else ''}", "cuda", work)


def conv_cases(table, conv):
    k = 4
    for b, l, e in ((32, 2048, 4352), (1, 65536, 4352), (32, 2048, 1792)):
        def work():
            def make():  # channels last, as Mamba-2 calls it
                x = torch.randn(b, l, e, device=DEV, dtype=bf16).transpose(1, 2).requires_grad_(True)
                dy = torch.randn(b, l, e, device=DEV, dtype=bf16).transpose(1, 2)
                return x, spread(e, k, low=-0.5, high=0.5), spread(e, low=-0.5, high=0.5), dy
            fwd = lambda s: conv.causal_conv1d_fwd(s[0], s[1], s[2], None, None, torch.empty_like(s[0]), None, True)
            def both(s):
                fwd(s)
                x, w, bias, dy = s
                dw, dbias = torch.zeros_like(w), torch.zeros_like(bias)
                conv.causal_conv1d_bwd(x, w, bias, dy, None, None, None, torch.empty_like(x), dw, dbias, None, True)
            sets = copies(make, 2 * b * l * e)
            return dict(forward=measure(no_grad(fwd), sets), both=measure(no_grad(both), sets))
        table.case("causal_conv1d", f"b={b} l={l} e={e} k={k}", "cuda", work)


# ------------------------------------------------------------------------------------------------- norms
def norm_cases(table, mamba):
    b, l = 32, (128 if args.dry else 2048)
    def pair(run, make, bytes_of_one):
        both = lambda s: torch.autograd.grad(run(s), [t for t in s[:-1] if t is not None], s[-1])
        sets = copies(make, bytes_of_one)
        return dict(forward=measure(no_grad(run), sets), both=measure(both, sets))
    for e, groups in ((4096, 1), (4096, 8), (1536, 1)):
        def work():
            from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
            make = lambda: (rand(b, l, e), rand(b, l, e), rand(e, dtype=f32), rand(b, l, e, grad=False))
            return pair(lambda s: rmsnorm_fn(s[0], s[2], None, z=s[1], eps=1e-5, group_size=e // groups, norm_before_gate=False), make, 4 * b * l * e)
        if mamba:
            table.case("rms_norm_gated", f"b={b} l={l} e={e} groups={groups}", "triton", work)
    for e in (4096, 2048, 768):
        make = lambda: (rand(b, l, e), rand(e, dtype=f32), rand(b, l, e, grad=False))
        def triton_norm():
            from mamba_ssm.ops.triton.layer_norm import rms_norm_fn
            return pair(lambda s: rms_norm_fn(s[0], s[1], None, eps=1e-5), make, 2 * b * l * e)
        def torch_norm():
            make16 = lambda: (rand(b, l, e), rand(e), rand(b, l, e, grad=False))
            return pair(lambda s: F.rms_norm(s[0], (e,), s[1], 1e-5), make16, 2 * b * l * e)
        if mamba:
            table.case("rms_norm", f"b={b} l={l} e={e} groups=1", "triton", triton_norm)
        table.case("rms_norm", f"b={b} l={l} e={e} groups=1", "torch", torch_norm)


# ------------------------------------------------------------------------------------------------- attention, losses, tables
def attention_cases(table):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    kinds = (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION))
    for h, p in ((32, 64), (16, 128)):
        for l in LENGTHS[2:]:
            for path, kind in kinds:
                b = TOKENS // l
                def work():
                    def make():  # [b, l, h, p] in memory, as projections give them
                        q, k, v = (rand(b, l, h, p) for _ in range(3))
                        return q, k, v, rand(b, l, h, p, grad=False).transpose(1, 2)
                    def run(s):
                        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in s[:3]), is_causal=True)
                    both = lambda s: torch.autograd.grad(run(s), s[:3], s[3])
                    with sdpa_kernel([kind]):
                        sets = copies(make, 8 * b * l * h * p)
                        return dict(forward=measure(no_grad(run), sets), both=measure(both, sets))
                table.case("attention", f"b={b} l={l} h={h} g={h} p={p}", path, work)


def loss_cases(table):
    for rows, v in ((16384, 50288), (8192, 128256)):
        def work():
            make = lambda: (rand(rows, v), torch.randint(0, v, (rows,), device=DEV))
            run = lambda s: F.cross_entropy(s[0], s[1])
            both = lambda s: torch.autograd.grad(run(s), s[0])
            sets = copies(make, 2 * rows * v)
            return dict(forward=measure(no_grad(run), sets), both=measure(both, sets))
        table.case("cross_entropy", f"rows={rows} v={v}", "torch", work)
    for v, d in ((50288, 2048), (50288, 768)):
        def work():
            make = lambda: (rand(65536, d, grad=False), torch.randint(0, v, (65536,), device=DEV))
            run = lambda s: torch.ops.aten.embedding_dense_backward(s[0], s[1], v, -1, False)
            return dict(forward=measure(run, copies(make, 2 * 65536 * d)))
        table.case("embedding_backward", f"tokens=65536 v={v} d={d}", "torch", work)


# ------------------------------------------------------------------------------------------------- main
def ceilings():
    x = torch.randn(1 << 29, device=DEV, dtype=bf16)
    y = torch.empty_like(x)
    copy = measure(lambda s: y.copy_(x), [None])["ms"]
    a, b = (torch.randn(8192, 8192, device=DEV, dtype=bf16) for _ in range(2))
    matmul = measure(lambda s: a @ b, [None])["ms"]
    return dict(copy_tbs=4 * x.numel() / copy / 1e9, matmul_tflops=2 * 8192**3 / matmul / 1e9)


def commit(folder):
    file = os.path.join(folder, "COMMIT")
    return open(file).read().strip()[:12] if folder and os.path.exists(file) else ""


def stub_package(folder):
    """mamba_ssm without its __init__, which imports models and kernels that are not measured."""
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [os.path.join(folder, "mamba_ssm")]
    sys.modules["mamba_ssm"] = package
    sys.path.append(folder)


def warm_triton(table):
    """What the Triton cases compile, on tensors without values; runs where no kernel is launched."""
    words = [()] + ([("state",), ("softplus",), ("segments",), ("state", "softplus", "segments")] if table.wants("ssd") else [])
    if table.wants("ssd"):
        for n in (128, 64, 256):
            for g, variant in [(1, ())] + ([(8, ())] + [(1, w) for w in words[1:4]] + [(8, words[4])] if n == 128 else []):
                one = ssd_inputs(2, 512, 32, 64, g, n, *(w in variant for w in ("state", "softplus", "segments")))
                ssd_both(one)
    if table.wants("rms_norm_gated"):
        from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
        x, z, w = rand(2, 8, 4096), rand(2, 8, 4096), rand(4096, dtype=f32)
        torch.autograd.grad(rmsnorm_fn(x, w, None, z=z, eps=1e-5, norm_before_gate=False), (x, z, w), torch.empty_like(x))


def main():
    global STREAM
    table = Table()
    machine = dict(device="dry", dtype="BF16", copy_tbs=None, matmul_tflops=None, torch=torch.__version__, mamba=commit(args.mamba), conv=commit(args.conv))
    children, builds = None, {}
    if args.mamba:
        stub_package(args.mamba)
        triton_ahead.prepare()
        if any(table.wants(op) for op in ("ssd", "rms_norm_gated")) or args.dry:
            if args.dry:
                triton_ahead.pretend()
                say("kernels that would be compiled:", triton_ahead.count(lambda: warm_triton(table)))
            else:
                # Forked before this process touches the GPU.
                children = triton_ahead.start(args.processes, args.cache, lambda: warm_triton(table), device_of=lambda name: globals().__setitem__("DEV", name))
    if not args.dry:
        builds = gpu_build.start(args.mamba, args.conv, args.cache, [op for op in ("selective_scan", "causal_conv1d") if table.wants(op)])
        properties = torch.cuda.get_device_properties(0)
        machine.update(device=f"{properties.name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
        STREAM = torch.cuda.Stream()
        torch.cuda.set_stream(STREAM)  # graphs are captured from the stream that everything runs on
        machine.update(ceilings())
    emit(machine)
    say(machine)

    def section(op, run, *more):
        if table.wants(op) or any(table.wants(other) for other in more):
            try:
                run()
            except Exception as error:  # a package that does not import, say
                say(op, traceback.format_exc()[-1500:])
                emit(dict(op=op, case="", dtype="BF16", path="", errors=[], forward=None, both=None, note=f"{type(error).__name__}: {error}"[:300], failed=True))

    if not args.dry:
        section("attention", lambda: attention_cases(table))
        section("cross_entropy", lambda: loss_cases(table), "embedding_backward")
    if children is not None:
        say("compiled ahead:", triton_ahead.finish(children))
    if args.mamba:
        section("ssd", lambda: ssd_cases(table))
        if not args.dry:
            section("ssd_step", lambda: ssd_step_cases(table))
    section("rms_norm", lambda: norm_cases(table, args.mamba), "rms_norm_gated")
    for op, cases in (("selective_scan", lambda extension: scan_cases(table)), ("causal_conv1d", lambda extension: conv_cases(table, extension))):
        if op in builds:
            extension, why = gpu_build.finish(builds[op])
            if extension is None:
                say(op, why)
                emit(dict(op=op, case="", dtype="BF16", path="cuda", errors=[], forward=None, both=None, note=why, failed=False))
            else:
                section(op, lambda: cases(extension))
    say("done")


if __name__ == "__main__":
    main()

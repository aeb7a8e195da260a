#!/usr/bin/env python3
"""Errors of the SSD scan and of its gradients, ours and the Triton kernels of mamba_ssm, on the same inputs, against a float64 recurrence.

  cargo build --release -p terrarium-kernels --no-default-features --features cuda --example ssd_files
  python ssd_errors.py --mamba DIR --exe SSD_FILES [--draws 5] [--sizes 128x1024,64x1024,256x1024]

DIR is a checkout of state-spaces/mamba, SSD_FILES the example built above, sizes are STATExLENGTH. One row, 32 heads of 64, one group, bf16.
A line per draw, then means over the draws. Errors are relative Frobenius errors; `y-dx` is y without the skip connection D x.
"""
import argparse, math, os, subprocess, sys, tempfile, types

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--mamba", required=True)
parser.add_argument("--exe", required=True)
parser.add_argument("--draws", type=int, default=5)
parser.add_argument("--sizes", default="128x1024,64x1024,256x1024")
parser.add_argument("--cache", default=os.path.abspath("peers_cache"), help="compiled kernels, as of gpu.py")
args = parser.parse_args()
os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(args.cache, "triton"))

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
package = types.ModuleType("mamba_ssm")
package.__path__ = [os.path.join(args.mamba, "mamba_ssm")]
sys.modules["mamba_ssm"] = package
sys.path.append(args.mamba)
import triton_ahead

triton_ahead.prepare()
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

DEV, ROWS, HEADS, WIDTH, GROUPS = "cuda", 1, 32, 64, 1
NAMES = "y y-dx state dx ddt da db dc dd".split()


def inputs(n, l):
    normal = lambda *shape: torch.randn(*shape, device=DEV).bfloat16()
    steps = torch.exp(torch.rand(ROWS, l, HEADS, device=DEV) * math.log(100) + math.log(1e-3))
    return dict(x=normal(ROWS, l, HEADS, WIDTH), dt=steps, a=-(torch.rand(HEADS, device=DEV) * 15 + 1), b=normal(ROWS, l, GROUPS, n),
                c=normal(ROWS, l, GROUPS, n), d=torch.randn(HEADS, device=DEV)), normal(ROWS, l, HEADS, WIDTH)


def recurrence(given, dy):
    """Bare output, skip connection, last state and gradients, in float64."""
    x, dt, a, b, c, d = leaves = [v.detach().double().requires_grad_(True) for v in given.values()]
    state = torch.zeros(HEADS, WIDTH, b.shape[-1], device=DEV, dtype=torch.float64)
    y = []
    for t in range(x.shape[1]):
        state = state * torch.exp(dt[0, t] * a)[:, None, None] + (dt[0, t, :, None] * x[0, t])[..., None] * b[0, t, 0]
        y.append(state @ c[0, t, 0])
    bare, skip = torch.stack(y)[None], d[:, None] * x
    return bare.detach(), skip.detach(), state.detach(), torch.autograd.grad(bare + skip, leaves, dy.double())


def triton(given, dy):
    leaves = [v.detach().requires_grad_(True) for v in given.values()]
    x, dt, a, b, c, d = leaves
    y, state = mamba_chunk_scan_combined(x, dt, a, b, c, 256, D=d, return_final_states=True)
    return y, state[0], torch.autograd.grad(y, leaves, dy)


def ours(given, dy, n, l):
    with tempfile.TemporaryDirectory() as folder:
        for name, v in {**given, "dy": dy}.items():
            v.detach().float().cpu().numpy().tofile(f"{folder}/{name}.bin")
        subprocess.run([args.exe, folder, *map(str, (ROWS, l, HEADS, GROUPS, n))], check=True, stdout=subprocess.DEVNULL)
        read = lambda name, like: torch.from_numpy(np.fromfile(f"{folder}/o_{name}.bin", dtype=np.float32)).reshape(like).to(DEV)
        return read("y", given["x"].shape), read("state", (HEADS, WIDTH, n)), [read("d" + name, v.shape) for name, v in given.items()]


def errors(found, truth):
    y, state, grads = found
    bare, skip, last, wanted = truth
    pairs = [(y, bare + skip), (y.double() - skip, bare), (state, last), *zip(grads, wanted)]
    return [float((got.double() - want.double()).norm() / want.double().norm()) for got, want in pairs]


for size in args.sizes.split(","):
    n, l = map(int, size.split("x"))
    table = {"triton": [], "ours": []}
    for draw in range(args.draws):
        torch.manual_seed(draw)
        given, dy = inputs(n, l)
        truth = recurrence(given, dy)
        for name, found in (("triton", triton(given, dy)), ("ours", ours(given, dy, n, l))):
            table[name].append(errors(found, truth))
            print(f"n={n} l={l} draw {draw} {name:7s}", *(f"{k} {v:.2e}" for k, v in zip(NAMES, table[name][-1])), flush=True)
    for name, rows in table.items():
        print(f"n={n} l={l} mean   {name:7s}", *(f"{k} {v:.2e}" for k, v in zip(NAMES, np.mean(rows, axis=0))), flush=True)

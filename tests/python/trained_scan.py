"""Selective scans of trained Mamba-1 blocks, with what a float64 recurrence makes of them.

The weights are those of typeseg 0.2.7 (PyPI, Apache-2.0), a byte tagger with six Mamba-1 blocks of 256 channels and 16
states: `typeseg/data/mamba_al.npz` of its wheel. A short text goes through all of them; each block's scan is written down.
The scan treats channels alone, so that every fourth one is enough.

    python trained_scan.py MODEL.npz OUT.safetensors
"""
import sys

import numpy as np
from safetensors.numpy import save_file

TEXT = b"<p>x = 3</p>\ndef f(n):\n  return n * 2;\n"
STATES, RANK, EVERY = 16, 16, 4


def softplus(x):
    return np.logaddexp(0.0, x)


def silu(x):
    return x / (1.0 + np.exp(-x))


def layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


def conv(x, kernel, bias):
    """Depthwise, padded to the same length, as the model was trained; kernel [k, 1, e]."""
    k = kernel.shape[0]
    low = (k - 1) // 2
    padded = np.pad(x, ((low, k - 1 - low), (0, 0)))
    return sum(padded[j:j + len(x)] * kernel[j, 0] for j in range(k)) + bias


def scan(u, step, a, b, c):
    """u, step [l, e]; a [e, n]; b, c [l, n] -> what tokens read from the states [l, e], the last state [e, n]."""
    h = np.zeros_like(a)
    read = np.empty_like(u)
    for t in range(len(u)):
        h = np.exp(step[t][:, None] * a) * h + (step[t] * u[t])[:, None] * b[t]
        read[t] = h @ c[t]
    return read, h


def block(w, x, saved):
    """One block, and its scan as our operation sees it: inputs rounded to float32 first."""
    dense = lambda i, x: x @ w[f"Dense_{i}__kernel"] + w[f"Dense_{i}__bias"]
    u, z = np.split(dense(0, layer_norm(x, w["LayerNorm_0__scale"], w["LayerNorm_0__bias"])), 2, axis=-1)
    u = silu(conv(u, w["Conv_0__kernel"], w["Conv_0__bias"]))
    low, b, c = np.split(dense(1, u), [RANK, RANK + STATES], axis=-1)
    delta, bias, a, d = low @ w["Dense_2__kernel"], w["Dense_2__bias"], -np.exp(w["A_log"]), w["D"]

    part = {"u": u[:, ::EVERY], "delta": delta[:, ::EVERY], "z": z[:, ::EVERY], "b": b, "c": c}
    part |= {"a": a[::EVERY], "d": d[::EVERY], "delta_bias": bias[::EVERY]}
    part = {name: value.astype(np.float32) for name, value in part.items()}
    v = {name: value.astype(np.float64) for name, value in part.items()}
    read, h = scan(v["u"], softplus(v["delta"] + v["delta_bias"]), v["a"], v["b"], v["c"])
    part |= {"y": (read + v["d"] * v["u"]) * silu(v["z"]), "state": h}
    for name, value in part.items():
        saved.setdefault(name, []).append(value.astype(np.float32))

    # The model itself scans in both directions, and raises step sizes by 1e-4.
    step = softplus(delta + bias) + 1e-4
    forth = scan(u, step, a, b, c)[0]
    back = scan(u[::-1], step[::-1], a, b[::-1], c[::-1])[0][::-1]
    return x + dense(3, (forth + back + 2 * d * u) * silu(z))


def main(model, out):
    weights = {name: value.astype(np.float64) for name, value in np.load(model).items()}
    x = weights["Embed_0__embedding"][np.frombuffer(TEXT, np.uint8)]
    saved = {}
    for i in range(6):
        prefix = f"CheckpointMambaBlock1D_{i}__"
        x = block({name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, x, saved)
    save_file({name: np.stack(values) for name, values in saved.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

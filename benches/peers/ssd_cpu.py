#!/usr/bin/env python3
"""The SSD scan on the CPU in float32: PyTorch (`ssd_minimal` of mamba_ssm, and a scan token by token) against `terrarium bench ops`, side by side.

  python ssd_cpu.py --mamba DIR --terrarium target/release/terrarium [--rounds 5] [--threads 2] [--json OUT.json]

DIR is a checkout of state-spaces/mamba; of it only mamba_ssm/modules/ssd_minimal.py is read, which is PyTorch alone (it needs einops). Its chunk
length is the faster one of 64 and 128 here. Every round times all of the peer, then all of ours, on the same threads: one unmeasured pass, then
the median of those that fit into a second. A ratio is peer time / our time within one round (above 1: terrarium is faster).
"""
import argparse, json, os, pathlib, statistics, subprocess, sys, time

ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
ap.add_argument('--mamba', required=True, type=pathlib.Path)
ap.add_argument('--terrarium', required=True)
ap.add_argument('--rounds', type=int, default=5)
ap.add_argument('--threads', type=int, default=2)
ap.add_argument('--json', type=pathlib.Path)
args = ap.parse_args()
sys.path.insert(0, str(args.mamba))
os.environ.setdefault('OMP_NUM_THREADS', str(args.threads))
import torch
torch.set_num_threads(args.threads)


# Rows up to this many tokens are also walked token by token: of 2048 one pass and its gradients take half a minute.
LONGEST = 512


def ssd_minimal():
    """The function, from its file without the line that imports Triton."""
    path = args.mamba / 'mamba_ssm/modules/ssd_minimal.py'
    lines = [line for line in path.read_text().splitlines() if not line.startswith('from mamba_ssm')]
    space = {}
    exec(compile('\n'.join(lines), str(path), 'exec'), space)
    return space['ssd_minimal_discrete']


def naive(x, a, b, c):
    """The recurrence, a token at a time: x [b, l, h, p] times step sizes, a [b, l, h] times step sizes, b and c [b, l, h, n]."""
    state, out = x.new_zeros(*x.shape[0:1], *x.shape[2:], b.shape[-1]), []
    for t in range(x.shape[1]):
        state = state * a[:, t, :, None, None].exp() + x[:, t, :, :, None] * b[:, t, :, None, :]
        out.append((state * c[:, t, :, None, :]).sum(-1))
    return torch.stack(out, 1)


def timed(run, seconds=1.0):
    run()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def peer(shape):
    b, l, h, p, g, n = (shape[k] for k in 'blhpgn')
    torch.manual_seed(0)
    leaf = lambda *size: torch.randn(*size).requires_grad_()
    x, dt, keys, queries = leaf(b, l, h, p), torch.rand(b, l, h).mul(0.1).requires_grad_(), leaf(b, l, g, n), leaf(b, l, g, n)
    a = (-torch.rand(h) * 8).requires_grad_()
    up = torch.randn(b, l, h, p)
    minimal = ssd_minimal()

    def chunked(chunk):
        spread = lambda t: t.repeat_interleave(h // g, 2)
        return minimal(x * dt[..., None], a * dt, spread(keys), spread(queries), chunk)[0]

    def scan():
        spread = lambda t: t.repeat_interleave(h // g, 2)
        return naive(x * dt[..., None], a * dt, spread(keys), spread(queries))

    def both(forward):
        for t in (x, dt, a, keys, queries):
            t.grad = None
        forward().backward(up)

    result = {}
    with torch.no_grad():
        chunks = {chunk: timed(lambda: chunked(chunk)) for chunk in (64, 128)}
        chunk = min(chunks, key=chunks.get)
        result['forward'] = chunks[chunk]
        if l <= LONGEST:
            result['naive_forward'] = timed(scan)
            slow = scan()
            worst = (chunked(chunk) - slow).abs().max() / slow.abs().max()
            assert worst < 1e-4, f'the two peers differ by {worst}'
    result['both'] = timed(lambda: both(lambda: chunked(chunk)))
    if l <= LONGEST:
        result['naive_both'] = timed(lambda: both(scan))
    return result


def ours(case):
    command = [args.terrarium, 'bench', 'ops', '--op', 'ssd', '--case', case, '--size', 'cpu', '--no-check', '--device', 'cpu', '--threads', str(args.threads), '--json']
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    for line in map(json.loads, lines):
        if line.get('case') == case:
            return {part: line[part]['ms'] for part in ('forward', 'both')}
    raise SystemExit(f'no case {case!r} in {[json.loads(line).get("case") for line in lines]}')


CASES = ['b=1 l=512 h=24 p=64 g=1 n=128', 'b=1 l=2048 h=24 p=64 g=1 n=128']
rows = []
for case in CASES:
    shape = {k: int(v) for k, v in (pair.split('=') for pair in case.split() if '=' in pair)}
    rounds = []
    for _ in range(args.rounds):
        theirs, mine = peer(shape), ours(case)
        rounds.append({'theirs': theirs, 'ours': mine})
    spread = lambda values: f'{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})'
    for part, name in (('forward', 'ssd_minimal'), ('both', 'ssd_minimal'), ('naive_forward', 'token by token'), ('naive_both', 'token by token')):
        if part not in rounds[0]['theirs']:
            continue
        own = part.removeprefix('naive_')
        ratio = [r['theirs'][part] / r['ours'][own] for r in rounds]
        row = dict(case=case, part=own, peer=name, theirs_ms=spread([r['theirs'][part] for r in rounds]), ours_ms=spread([r['ours'][own] for r in rounds]), ratio=spread(ratio))
        rows.append(row)
        print(f"| {case} | {own} | {name} | {row['theirs_ms']} | {row['ours_ms']} | {row['ratio']} |", flush=True)
if args.json:
    args.json.write_text(json.dumps(rows, indent=1) + '\n')

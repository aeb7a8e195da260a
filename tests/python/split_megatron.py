#!/usr/bin/env python3
"""Divide a Megatron hybrid of make_fixtures.py over tensor-parallel ranks, as a training run of that many would have saved it.

  python split_megatron.py SRC DST [--tp 2] [--iteration 7]

Rows of column-parallel layers, columns of row-parallel ones; the input projection and the convolution of Mamba layers component by
component; norms on every rank. DST is an iteration folder (`iter_0000007`) with the expected values of SRC, which stay true.
"""
import argparse, pathlib, shutil, sys
import torch
import make_fixtures


def shard(name, w, parts, tp, rank):
    rows = lambda t: t.chunk(tp, 0)[rank]
    if '.in_proj.' in name:
        return torch.cat([rows(p) for p in w.split(parts, 0)])
    if '.conv1d.' in name:
        return torch.cat([rows(p) for p in w.split(parts[1:4], 0)])
    if name.endswith(('.out_proj.weight', '.linear_proj.weight', '.linear_fc2.weight')):
        return w.chunk(tp, 1)[rank]
    if 'mixer.norm' in name or not ('norm' in name):
        return rows(w)
    return w


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('src', type=pathlib.Path)
    ap.add_argument('dst', type=pathlib.Path)
    ap.add_argument('--tp', type=int, default=2)
    ap.add_argument('--iteration', type=int, default=7)
    a = ap.parse_args()
    import enum
    kind = enum.Enum('ModelType', {'encoder_or_decoder': 1})
    make_fixtures.fake_module('megatron.core.enums', ModelType=kind)
    ck = torch.load(a.src / 'release/mp_rank_00/model_optim_rng.pt', weights_only=False)
    import json
    arch = json.loads((a.src / 'expected.json').read_text())['arch']
    model = {k: v for k, v in ck['model'].items()}
    first = next(k for k in model if k.endswith('in_proj.weight')).replace('in_proj.weight', '')
    inner, heads = model[first + 'norm.weight'].shape[0], model[first + 'A_log'].shape[0]
    shared = arch['mamba_num_groups'] * arch['mamba_state_dim']
    parts = [inner, inner, shared, shared, heads]
    if a.dst.exists():
        shutil.rmtree(a.dst)
    ck['args'].tensor_model_parallel_size = a.tp
    ck['iteration'] = a.iteration
    for rank in range(a.tp):
        folder = a.dst / f'iter_{a.iteration:07d}' / f'mp_rank_{rank:02d}'
        folder.mkdir(parents=True)
        ck['model'] = {k: shard(k, v, parts, a.tp, rank).clone() if torch.is_tensor(v) else v for k, v in model.items()}
        torch.save(ck, folder / 'model_optim_rng.pt')
    (a.dst / 'latest_checkpointed_iteration.txt').write_text(f'{a.iteration}\n')
    for f in a.src.glob('expected*'):
        shutil.copyfile(f, a.dst / f.name)


if __name__ == '__main__':
    sys.exit(main())

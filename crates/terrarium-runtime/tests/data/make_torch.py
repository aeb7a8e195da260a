#!/usr/bin/env python3
"""Writes the PyTorch and Megatron goldens beside this file. Needs torch and numpy; the values are formulas that the tests know.

  python make_torch.py
"""
import argparse, collections, enum, io, os, pickle, shutil, sys, types
import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
FLAT, MEGATRON = os.path.join(HERE, 'torch'), os.path.join(HERE, 'megatron')


def ramp(*shape, dtype=torch.float32, start=0):
    """start, start + 1, ... in the given shape."""
    n = 1
    for d in shape:
        n *= d
    return torch.arange(start, start + n).reshape(shape).to(dtype)


def flat():
    kinds = collections.OrderedDict()
    for name in ('float64', 'float32', 'float16', 'bfloat16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'uint16', 'uint32', 'uint64'):
        kinds[name] = ramp(2, 3, dtype=getattr(torch, name))
    kinds['bool'] = torch.tensor([True, False, True])
    kinds['float8'] = ramp(4).to(torch.float8_e4m3fn)
    kinds['complex'] = torch.zeros(2, dtype=torch.complex64)
    torch.save(kinds, f'{FLAT}/kinds.bin')

    base = ramp(4, 6)
    model = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(ramp(2, 3))
    marked = ramp(2, 2)
    marked.note = 'attributes make torch write another constructor'
    views = collections.OrderedDict([
        ('embed', base), ('tied', base), ('transposed', base.t()), ('slice', base[1:3, 2:5]), ('last_row', base[3]), ('step', base[::2, ::3]),
        ('expanded', ramp(3)[:, None].expand(3, 1)), ('scalar', torch.tensor(7.5)), ('empty', torch.zeros(0, 4)), ('repeated', ramp(2, 1, start=5).expand(2, 1)),
        ('permuted', ramp(2, 3, 4).permute(2, 0, 1)), ('parameter', torch.nn.Parameter(ramp(3))), ('module', model.weight), ('marked', marked),
        ('layer._extra_state', None), ('other._extra_state', io.BytesIO(b'abc')), ('bytes._extra_state', b'\x00\xff'),
    ])
    torch.save(views, f'{FLAT}/views.bin')
    torch.save(model.state_dict(), f'{FLAT}/state_dict.bin')
    torch.save({'w': ramp(2, 2)}, f'{FLAT}/protocol4.bin', pickle_protocol=4)
    torch.save({'w': ramp(2, 2)}, f'{FLAT}/protocol5.bin', pickle_protocol=5)
    torch.save({'w': ramp(2)}, f'{FLAT}/legacy.bin', _use_new_zipfile_serialization=False)
    torch.save({'step': 3, 'model': {'w': ramp(2)}}, f'{FLAT}/training.bin')
    torch.save({'conj': torch.zeros(2, dtype=torch.complex64).conj()}, f'{FLAT}/conj.bin')
    torch.save({'sparse': ramp(2, 2).to_sparse()}, f'{FLAT}/sparse.bin')
    with open(f'{FLAT}/plain.bin', 'wb') as f:
        pickle.dump({'w': [1.0]}, f, protocol=4)
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), f'{FLAT}/script.bin')


def fake(module, **names):
    """A module whose classes pickle under its name."""
    m = types.ModuleType(module)
    for name, value in names.items():
        value.__module__ = module
        setattr(m, name, value)
    for i, part in enumerate(module.split('.')):
        prefix = '.'.join(module.split('.')[:i + 1])
        sys.modules.setdefault(prefix, types.ModuleType(prefix))
    sys.modules[module] = m


D, H, P, G, N, F, V = 4, 4, 2, 2, 3, 6, 8                    # width, heads, head size, groups, state, mlp, ids
DI = H * P


def whole(layers, swiglu=False):
    """The merged model: every element is its place in the model, so a wrong merge cannot go unseen."""
    shapes = {'embedding.word_embeddings.weight': (V, D)}
    for i, kind in enumerate(layers):
        k = f'decoder.layers.{i}.'
        if kind == 'M':
            shapes |= {k + 'norm.weight': (D,), k + 'mixer.dt_bias': (H,), k + 'mixer.A_log': (H,), k + 'mixer.D': (H,),
                       k + 'mixer.in_proj.weight': (2 * DI + 2 * G * N + H, D), k + 'mixer.conv1d.weight': (DI + 2 * G * N, 1, 4),
                       k + 'mixer.conv1d.bias': (DI + 2 * G * N,), k + 'mixer.norm.weight': (DI,), k + 'mixer.out_proj.weight': (D, DI)}
        elif kind == '*':
            shapes |= {k + 'self_attention.linear_qkv.layer_norm_weight': (D,), k + 'self_attention.linear_qkv.weight': (8, D),
                       k + 'self_attention.linear_proj.weight': (D, 4), k + 'self_attention.linear_proj.bias': (D,)}
        else:
            shapes |= {k + 'mlp.linear_fc1.layer_norm_weight': (D,), k + 'mlp.linear_fc1.weight': (2 * F if swiglu else F, D), k + 'mlp.linear_fc2.weight': (D, F)}
    shapes |= {'decoder.final_norm.weight': (D,), 'output_layer.weight': (V, D)}
    model, start = {}, 0
    for key, shape in shapes.items():
        model[key] = ramp(*shape, start=start)
        start += model[key].numel()
    return model


PARTS = {'in_proj.weight': [DI, DI, G * N, G * N, H], 'conv1d.weight': [DI, G * N, G * N], 'conv1d.bias': [DI, G * N, G * N]}
COLUMNS = ('out_proj.weight', 'linear_fc2.weight', 'linear_proj.weight')
ROWS = ('word_embeddings.weight', 'output_layer.weight', 'A_log', '.D', 'dt_bias', 'mixer.norm.weight', 'linear_fc1.weight', 'linear_qkv.weight')


def shard(key, w, rank, tp, swiglu):
    """What Megatron's tensor parallelism leaves to a rank."""
    parts = next((p for end, p in PARTS.items() if key.endswith(end)), None)
    if swiglu and key.endswith('linear_fc1.weight'):
        parts = [F, F]
    if parts:
        return torch.cat([c.chunk(tp, 0)[rank] for c in w.split(parts, 0)]).clone()
    if key.endswith(COLUMNS):
        return w.chunk(tp, 1)[rank].clone()
    return w.chunk(tp, 0)[rank].clone() if key.endswith(ROWS) else w.clone()


def megatron(name, layers, stages, tp=1, swiglu=False, latest='release'):
    ModelType = enum.Enum('ModelType', {'encoder_or_decoder': 1})
    fake('megatron.core.enums', ModelType=ModelType)
    model, pp = whole(layers, swiglu), len(stages)
    folder = 'release' if latest == 'release' else f'iter_{int(latest):07d}'
    first = 0
    for stage, count in enumerate(stages):
        for rank in range(tp):
            part = {}
            for key, w in model.items():
                if key.startswith('decoder.layers.'):
                    i, rest = key[len('decoder.layers.'):].split('.', 1)
                    if not first <= int(i) < first + count:
                        continue
                    key = f'decoder.layers.{int(i) - first}.{rest}'
                elif key.startswith('embedding.') and stage or not key.startswith('embedding.') and stage != pp - 1:
                    continue
                part[key] = shard(key, w, rank, tp, swiglu)
                if key.endswith('linear_fc1.weight'):
                    part[key.replace('weight', '_extra_state')] = io.BytesIO(b'\x00\x01') if rank else None
            args = argparse.Namespace(
                num_layers=len(layers), hidden_size=D, norm_epsilon=1e-5, swiglu=swiglu, hybrid_override_pattern=layers, data_path=['a', 'b'],
                lr_warmup=None, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, mamba_num_groups=G, params_dtype=torch.bfloat16,
                model_type=ModelType.encoder_or_decoder, rank=rank, big=1 << 80, limits=(0.0, float('inf')))
            state = {'args': args, 'checkpoint_version': 3.0, 'iteration': 5, 'model': part,
                     'rng_state': [{'np_rng_state': np.random.RandomState(0).get_state()[:1] + (np.arange(3, dtype=np.uint32),), 'torch_rng_state': torch.arange(3, dtype=torch.uint8)}]}
            out = f'{MEGATRON}/{name}/{folder}/mp_rank_{rank:02d}' + (f'_{stage:03d}' if pp > 1 else '')
            os.makedirs(out)
            torch.save(state, f'{out}/model_optim_rng.pt')
        first += count
    with open(f'{MEGATRON}/{name}/latest_checkpointed_iteration.txt', 'w') as f:
        f.write(latest)


if __name__ == '__main__':
    for folder in (FLAT, MEGATRON):
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    flat()
    megatron('one', 'M*-', [3])
    megatron('tp2', 'M*-', [3], tp=2, swiglu=True)
    megatron('pp2', 'M*-M', [2, 2], latest='20')
    megatron('tp2-pp2', 'M*-M', [3, 1], tp=2, latest='3')

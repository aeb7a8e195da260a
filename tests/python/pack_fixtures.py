#!/usr/bin/env python3
"""Copy one directory written by make_fixtures.py into tests/fixtures, in full or light.

  python pack_fixtures.py SRC DST          everything
  python pack_fixtures.py SRC DST --light  without the gradients and the per-layer hidden states

The weights and the remaining arrays are bit for bit those of SRC, so a test reads a packed and a fresh directory alike.
"""
import argparse, pathlib, shutil
from safetensors.torch import load_file, save_file


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('src', type=pathlib.Path)
    ap.add_argument('dst', type=pathlib.Path)
    ap.add_argument('--light', action='store_true')
    a = ap.parse_args()
    if a.dst.exists():
        shutil.rmtree(a.dst)
    a.dst.mkdir(parents=True)
    for f in sorted(a.src.iterdir()):
        if a.light and f.name == 'expected_grads.safetensors':
            continue
        out = a.dst / f.name
        if f.is_dir():                                       # Megatron's release/mp_rank_00/
            shutil.copytree(f, out, copy_function=shutil.copyfile)
            continue
        if a.light and f.name == 'expected.safetensors':
            save_file({k: v for k, v in load_file(f).items() if not k.startswith('hidden.')}, out)
        else:
            shutil.copyfile(f, out)
        out.chmod(0o644)


if __name__ == '__main__':
    main()

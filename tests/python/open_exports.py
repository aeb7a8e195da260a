#!/usr/bin/env python3
"""Export reference checkpoints with terrarium, open what it wrote with transformers, and compare the logits.

  python open_exports.py --terrarium target/release/terrarium [FIXTURE ...]      default: every directory in tests/fixtures

For each fixture: `terrarium export FIXTURE OUT --layout hf`, then transformers on OUT, in float32 and in float64, against the
fixture's `logits_f64`; missing, unused or mis-shaped tensors are an error. A fixture that terrarium refuses to export is listed
with the reason. Exit code 1 when logits differ by more than --tolerance (float64; transformers keeps norms in float32) or 5e-5
(float32).
"""
import argparse, json, pathlib, subprocess, sys, tempfile
import torch
from safetensors.torch import load_file


def opened(directory, dtype):
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation='eager', output_loading_info=True)
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v and k.endswith('_keys')}
    if wrong:
        raise SystemExit(f'{directory}: tensors do not fit {type(model).__name__}: {json.dumps(wrong)}')
    return model.eval()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('fixtures', nargs='*', type=pathlib.Path)
    ap.add_argument('--terrarium', required=True)
    ap.add_argument('--tolerance', type=float, default=1e-5)
    a = ap.parse_args()
    here = pathlib.Path(__file__).resolve().parent.parent / 'fixtures'
    fixtures = a.fixtures or sorted(p for p in here.iterdir() if (p / 'expected.safetensors').exists())
    failed = False
    for fixture in fixtures:
        with tempfile.TemporaryDirectory() as scratch:
            out = pathlib.Path(scratch) / 'out'
            command = [a.terrarium, 'export', str(fixture), str(out), '--layout', 'hf']
            if (fixture / 'latest_checkpointed_iteration.txt').exists():
                arch = json.loads((fixture / 'expected.json').read_text())['arch']
                command += ['--set', f"mamba_num_groups={arch['mamba_num_groups']}"]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                print(f'{fixture.name:28s} not exported: {run.stderr.strip().splitlines()[0]}')
                continue
            expected = load_file(fixture / 'expected.safetensors')
            ids, truth = expected['input_ids'], expected['logits_f64'].double()
            worst = {}
            for dtype in (torch.float32, torch.float64):
                model = opened(out, dtype)
                with torch.inference_mode():
                    worst[dtype] = float((model(ids, use_cache=False).logits.double() - truth).abs().max())
            good = worst[torch.float32] <= 5e-5 and worst[torch.float64] <= a.tolerance
            failed |= not good
            print(f'{fixture.name:28s} {type(model).__name__:30s} float32 {worst[torch.float32]:.1e}  float64 {worst[torch.float64]:.1e}'
                  f'  {"ok" if good else "FAILED"}')
    sys.exit(failed)


if __name__ == '__main__':
    main()

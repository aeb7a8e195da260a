#!/usr/bin/env python3
"""Open a Hugging Face directory with transformers and print what it computes, as one JSON object.

  python open_with_transformers.py DIR [--ids 5,17,3] [--new 16] [--logits none|last|all]

Shows that a directory saved by terrarium is a checkpoint for others too: it fails on missing, unused or mis-shaped tensors.
Output: {"model", "parameters", "ids", "logits" [[..]] (float32), "logprobs" of ids[1..], "greedy_ids"}. Without --ids a
fixed short sequence within the vocabulary is used.
"""
import argparse, json, sys
import torch


def load(directory):
    """The model in float32, or SystemExit when the tensors do not fit the architecture exactly."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v and k.endswith('_keys')}
    if wrong:
        raise SystemExit(f'{directory}: tensors do not fit {type(model).__name__}: {json.dumps(wrong)}')
    return model.eval()


@torch.inference_mode()
def logits(model, ids):
    """[len, vocab] of one sequence, float32, without a cache."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].float()


def logprobs(rows, ids):
    """Natural log probability of each of ids[1:]."""
    return torch.log_softmax(rows[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def greedy(model, ids, new):
    """`new` greedy ids (no stop at eos) and the smallest gap between the two best logits on the way."""
    ids, start, gap = list(ids), len(ids), float('inf')
    for _ in range(new):
        best = logits(model, ids)[-1].topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return ids[start:], gap


def default_ids(vocab, n=12):
    return [(7 * i * i + 5 * i + 3) % vocab for i in range(n)]


def parse_ids(text):
    return [int(t) for t in text.replace(' ', ',').split(',') if t]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('dir')
    ap.add_argument('--ids', type=parse_ids)
    ap.add_argument('--new', type=int, default=16)
    ap.add_argument('--logits', choices=['none', 'last', 'all'], default='last')
    a = ap.parse_args()
    model = load(a.dir)
    ids = a.ids or default_ids(model.config.vocab_size)
    rows = logits(model, ids)
    shown = {'none': rows[:0], 'last': rows[-1:], 'all': rows}[a.logits]
    json.dump({'model': type(model).__name__, 'parameters': sum(p.numel() for p in model.parameters()), 'ids': ids,
               'logits': shown.tolist(), 'logprobs': logprobs(rows, ids).tolist(), 'greedy_ids': greedy(model, ids, a.new)[0]}, sys.stdout)
    print()


if __name__ == '__main__':
    main()

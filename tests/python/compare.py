#!/usr/bin/env python3
"""Compare `terrarium` with transformers on one Hugging Face directory.

  python compare.py --terrarium target/release/terrarium DIR [--ids 5,17,3 ...] [--new 16] [--tolerance 1e-4]

Scores the same ids with `terrarium score --input` and with transformers (float32), and continues the first sequence greedily
with both. Prints one JSON object with the largest difference of log probabilities; exit 1 when it exceeds the tolerance or
a greedy choice differs by more than a tie. Without --ids: several sequences, lengths 2 to 70, within the vocabulary.
"""
import argparse, json, subprocess, sys, tempfile
import torch
from open_with_transformers import greedy, load, logits, logprobs, parse_ids

TIE = 1e-3      # logits closer than this may be chosen either way


def terrarium(binary, *args):
    """Standard output of one call, or SystemExit with its error."""
    r = subprocess.run([binary, *map(str, args)], capture_output=True, text=True)
    if r.returncode:
        raise SystemExit(f'{binary} {" ".join(map(str, args))}: exit {r.returncode}\n{r.stderr}')
    return r.stdout


def score(binary, directory, sequences):
    with tempfile.NamedTemporaryFile('w', suffix='.jsonl') as f:
        f.writelines(json.dumps({'ids': s}) + '\n' for s in sequences)
        f.flush()
        lines = terrarium(binary, 'score', '--model', directory, '--input', f.name).splitlines()
    out = [json.loads(line) for line in lines if line.startswith('{')]
    if len(out) != len(sequences):
        raise SystemExit(f'score: {len(sequences)} lines in, {len(out)} out')
    return out


def default_sequences(vocab):
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, vocab, (n,), generator=g).tolist() for n in (21, 2, 3, 5, 16, 33, 70)]


def difference(ours, model, ids):
    """Largest |Δ log probability| of one sequence; the `tokens`, `sum` and `greedy` fields must be consistent."""
    rows = logits(model, ids)
    want, got = logprobs(rows, ids), torch.tensor(ours['logprobs'])
    assert ours['tokens'] == ids[1:], f'scored tokens {ours["tokens"]}, expected {ids[1:]}'
    assert abs(ours['sum'] - sum(ours['logprobs'])) <= 1e-3 * max(1, abs(ours['sum'])), 'sum is not the sum of logprobs'
    best = rows[:-1].topk(2).values
    for i, flag in enumerate(ours['greedy']):
        clear = best[i, 0] - best[i, 1] > TIE
        assert not clear or flag == (int(rows[i].argmax()) == ids[i + 1]), f'greedy flag {i} is wrong'
    return float((got - want).abs().max())


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('dir')
    ap.add_argument('--terrarium', required=True, metavar='BINARY')
    ap.add_argument('--ids', type=parse_ids, action='append')
    ap.add_argument('--new', type=int, default=16)
    ap.add_argument('--tolerance', type=float, default=1e-4)
    a = ap.parse_args()
    model = load(a.dir)
    sequences = a.ids or default_sequences(model.config.vocab_size)
    worst = max(difference(o, model, s) for o, s in zip(score(a.terrarium, a.dir, sequences), sequences))

    prompt = sequences[0]
    want, gap = greedy(model, prompt, a.new)
    out = terrarium(a.terrarium, 'generate', '--model', a.dir, '--ids', ','.join(map(str, prompt)),
                    '--max-new-tokens', a.new, '--temperature', 0, '--json')
    got = json.loads(out)['ids']
    # ours may stop early, at an eos of the config, with or without printing it
    same = got == want[:len(got)] and (len(got) == a.new or is_stop(model, want, len(got)))
    ok = worst <= a.tolerance and (same or gap < TIE)
    json.dump({'dir': a.dir, 'sequences': len(sequences), 'max_logprob_difference': worst, 'greedy_equal': same,
               'greedy_ours': got, 'greedy_transformers': want, 'smallest_top2_gap': gap, 'ok': ok}, sys.stdout)
    print()
    sys.exit(0 if ok else 1)


def is_stop(model, ids, n):
    """Did a continuation of n ids end at an eos (as its last id, or just before it)?"""
    eos = model.generation_config.eos_token_id or []
    eos = [eos] if isinstance(eos, int) else eos
    return any(i in eos for i in ids[max(0, n - 1):n + 1])


if __name__ == '__main__':
    main()

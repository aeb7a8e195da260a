#!/usr/bin/env python3
"""PyTorch + transformers against `terrarium bench`, on the CPU, float32, side by side.

  python cpu.py --smol DIR                                    the peer alone, SmolLM2-135M and a random Mamba-2 of the 130m shape
  python cpu.py --smol DIR --terrarium target/release/terrarium [--rounds 5] [--json OUT.json]
  python cpu.py --save-mamba2 DIR                             write the random Mamba-2 as a Hugging Face directory and stop

Parts, batch 1: `decode` (64 greedy tokens after a prompt of 32, with the cache; ms per token), `prefill` (512 tokens into an empty
cache, logits of the last), `train256`/`train512` (forward, loss, backward, AdamW update of one sequence).

The peer runs eager and under torch.compile (each in its own process; a compile that exceeds --compile-limit seconds is given up), and the
faster of the two stands for it in each part: SDPA attention, fused AdamW, static key/value cache where that compiles, inference mode.
Every round then runs all parts of the peer, then all of ours, each after one unmeasured pass, on the same CPUs. A ratio is peer
time / our time within one round (above 1: terrarium is faster). Report figures from an idle machine only: other load touches both sides,
but not equally (with 5 runnable processes on 2 cores PyTorch's decode took 7 times its idle time), so busy rounds flatter terrarium.

Needs torch, transformers. Ours must print, for `terrarium bench --model DIR --prompt-tokens 32 --new-tokens 64 --prefill 512
--train-tokens 256 --repeats 2 --json`, {"decode_ms_per_token": [..], "prefill_ms": [..], "train_step_ms": [..], "threads": n};
0 tokens leave a part out, with an empty list.
"""
import argparse, json, os, pathlib, platform, selectors, signal, statistics, subprocess, sys, tempfile, time

PROMPT, NEW, PREFILL = 32, 64, 512
PARTS = ('decode', 'prefill', 'train256', 'train512')
TARGET = dict(decode=1.0, prefill=0.8, train256=0.5, train512=0.5)      # peer / ours that the project aims for
TOKENS = dict(decode=1, prefill=PREFILL, train256=256, train512=512)    # per measured unit


# ------------------------------------------------------------------------------------------------- the peer, in its own process
def mamba2_130m():
    import torch, transformers
    torch.manual_seed(0)
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
        vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64, state_size=128, n_groups=1, expand=2,
        conv_kernel=4, chunk_size=256, layer_norm_epsilon=1e-5, tie_word_embeddings=True))


class Peer:
    """One model in this process; each method runs one unit of a part and returns milliseconds."""

    def __init__(self, directory, compiled, threads):
        import torch, transformers
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self.torch, self.transformers, self.compiled = torch, transformers, compiled
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.call = torch.compile(self.model.forward) if compiled else self.model.forward
        self.cache_name = 'cache_params' if self.model.config.model_type == 'mamba2' else 'past_key_values'
        self.x = torch.randint(3, self.model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(1))
        self.optimizer = None

    def cache(self):
        T, config = self.transformers, self.model.config
        if self.compiled and self.cache_name == 'past_key_values':
            return T.StaticCache(config=config, max_cache_len=PROMPT + NEW)
        return T.DynamicCache(config=config)

    def decode(self):
        with self.torch.inference_mode():
            kw = {self.cache_name: self.cache(), 'use_cache': True, 'logits_to_keep': 1}
            t = self.model(self.x[:, :PROMPT], **kw).logits[:, -1].argmax(-1, keepdim=True)
            start = time.perf_counter()
            for _ in range(NEW):
                t = self.call(t, **kw).logits[:, -1].argmax(-1, keepdim=True)
            return (time.perf_counter() - start) * 1e3 / NEW

    def prefill(self):
        with self.torch.inference_mode():
            start = time.perf_counter()
            self.call(self.x[:, :PREFILL], use_cache=True, logits_to_keep=1)
            return (time.perf_counter() - start) * 1e3

    def train(self, length):
        self.model.train()
        self.optimizer = self.optimizer or self.torch.optim.AdamW(self.model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
        x = self.x[:, :length]
        start = time.perf_counter()
        self.call(x, labels=x, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        ms = (time.perf_counter() - start) * 1e3
        self.model.eval()
        return ms

    def run(self, part, warm, repeats):
        unit = {'decode': self.decode, 'prefill': self.prefill}.get(part) or (lambda: self.train(int(part.removeprefix('train'))))
        for _ in range(warm):
            unit()
        return [unit() for _ in range(repeats)]


def worker(directory, compiled, threads):
    """Serve requests {part, warm, repeats} from standard input, one answer line each."""
    peer = Peer(directory, compiled, threads)
    for line in sys.stdin:
        print(json.dumps(peer.run(**json.loads(line))), flush=True)


class Worker:
    """Handle of a peer process. `run` returns milliseconds, or None when it failed or exceeded its time."""

    live = set()

    def __init__(self, directory, variant, opts):
        self.variant, self.log = variant, tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), '--worker', variant, '--smol', str(directory), '--threads', str(opts.threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, start_new_session=True, env=environment(opts))
        Worker.live.add(self)

    def run(self, part, warm, repeats, limit=None):
        try:
            self.process.stdin.write(json.dumps(dict(part=part, warm=warm, repeats=repeats)) + '\n')
            self.process.stdin.flush()
            with selectors.DefaultSelector() as s:
                s.register(self.process.stdout, selectors.EVENT_READ)
                line = self.process.stdout.readline() if s.select(limit) else None
        except BrokenPipeError:
            line = ''
        if line:
            return json.loads(line)
        self.log.seek(0)
        why = f'gave up after {limit} s' if line is None else 'failed: ' + (self.log.read().strip().splitlines() or ['?'])[-1]
        note(f'  {part} {self.variant}: {why}')
        return None

    def close(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)      # its own session: the compiler processes it started go with it
        self.process.wait()
        Worker.live.discard(self)


def environment(opts):
    n = str(opts.threads)
    return dict(os.environ, OMP_NUM_THREADS=n, MKL_NUM_THREADS=n, RAYON_NUM_THREADS=n, TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')


# ------------------------------------------------------------------------------------------------- ours
def ours(binary, directory, opts):
    """All parts of one round: {part: [ms]}."""
    def bench(new, prefill, train):
        r = subprocess.run([binary, 'bench', '--model', str(directory), '--prompt-tokens', str(PROMPT), '--new-tokens', str(new), '--prefill', str(prefill),
                            '--train-tokens', str(train), '--repeats', str(opts.repeats), '--json'], capture_output=True, text=True, env=environment(opts))
        if r.returncode:
            raise SystemExit(f'terrarium bench: exit {r.returncode}\n{r.stderr}')
        return json.loads(r.stdout.strip().splitlines()[-1])
    a, b = bench(NEW, PREFILL, 256), bench(0, 0, 512)
    if a['threads'] != opts.threads:
        note(f'  terrarium used {a["threads"]} threads, not {opts.threads}')
    return dict(decode=a['decode_ms_per_token'], prefill=a['prefill_ms'], train256=a['train_step_ms'], train512=b['train_step_ms'])


# ------------------------------------------------------------------------------------------------- rounds and report
def choose(directory, opts):
    """The faster way to run the peer, per part: {part: Worker}, and the trial figures {part: {variant: [ms]}}."""
    eager, chosen, trials = Worker(directory, 'eager', opts), {}, {}
    for part in opts.parts:
        trials[part] = {'eager': eager.run(part, 1, 3)}
        if trials[part]['eager'] is None:
            raise SystemExit('the peer does not run here')
        chosen[part] = eager
        if opts.compile != 'off':
            w = Worker(directory, 'compile', opts)
            start, ms = time.time(), w.run(part, 3, 3, opts.compile_limit)
            if ms:
                trials[part]['compile'] = ms
                note(f'  {part}: eager {median(trials[part]["eager"]):.1f} ms, compiled {median(ms):.1f} ms ({time.time() - start:.0f} s to get there)')
            if ms and median(ms) < median(trials[part]['eager']):
                chosen[part] = w
            else:
                w.close()
    return chosen, trials


def measure(name, directory, opts):
    note(f'{name}: {directory}')
    chosen, trials = choose(directory, opts)
    result = {p: dict(variant=chosen[p].variant, trials_ms=trials[p], peer_ms=[], ours_ms=[]) for p in opts.parts}
    for i in range(opts.rounds):
        for p in opts.parts:
            result[p]['peer_ms'].append(chosen[p].run(p, 1, opts.repeats))
        if opts.terrarium:
            for p, ms in ours(opts.terrarium, directory, opts).items():
                if p in result:
                    result[p]['ours_ms'].append(ms)
        note(f'  round {i + 1}/{opts.rounds}, load {os.getloadavg()[0]:.1f}: ' + ', '.join(
            f'{p} {median(r["peer_ms"][-1]):.1f}' + (f' / {median(r["ours_ms"][-1]):.1f}' if r['ours_ms'] else '') for p, r in result.items()))
    return result


median = statistics.median


def note(text):
    print(text, file=sys.stderr, flush=True)


def flat(rounds):
    return [ms for r in rounds for ms in r]


def spread(ms):
    return f'{median(ms):.1f} ({min(ms):.1f}-{max(ms):.1f})'


def ratios(r):
    """peer / ours of every round."""
    return [median(p) / median(o) for p, o in zip(r['peer_ms'], r['ours_ms'])]


def table(results):
    rows = ['| model | part | peer, ms (range) | peer tokens/s | as | terrarium, ms (range) | peer/ours (range) | aim |', '|---|---|---|---|---|---|---|---|']
    for model, parts in results.items():
        for part, r in parts.items():
            peer, q = flat(r['peer_ms']), ratios(r)
            mine = spread(flat(r['ours_ms'])) if q else '-'
            ratio = f'**{median(q):.2f}** ({min(q):.2f}-{max(q):.2f})' if q else '-'
            rows.append(f'| {model} | {part} | {spread(peer)} | {1e3 * TOKENS[part] / median(peer):.0f} | {r["variant"]} | {mine} | {ratio} | {TARGET[part]} |')
    return '\n'.join(rows)


def cpu_name():
    try:
        return next(line.split(':', 1)[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor()


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--smol', type=pathlib.Path, metavar='DIR', help='SmolLM2-135M, Hugging Face layout')
    ap.add_argument('--mamba2', type=pathlib.Path, metavar='DIR', help='a directory written by --save-mamba2; without it a temporary one')
    ap.add_argument('--save-mamba2', type=pathlib.Path, metavar='DIR')
    ap.add_argument('--terrarium', metavar='BINARY')
    ap.add_argument('--models', default='smollm2-135m,mamba2-130m')
    ap.add_argument('--parts', default=','.join(PARTS))
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--repeats', type=int, default=2, help='measured units per part and round')
    ap.add_argument('--threads', type=int, default=2)
    ap.add_argument('--compile', choices=['auto', 'off'], default='auto')
    ap.add_argument('--compile-limit', type=float, default=600, metavar='SECONDS', help='per part, trial runs included')
    ap.add_argument('--json', type=pathlib.Path, metavar='OUT')
    ap.add_argument('--worker', choices=['eager', 'compile'], help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.worker:
        return worker(a.smol, a.worker == 'compile', a.threads)
    if a.save_mamba2:
        return mamba2_130m().save_pretrained(a.save_mamba2)
    a.parts = [p for p in PARTS if p in a.parts.split(',')]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:a.threads])      # inherited by both sides

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # through the clean-up below
    import torch, transformers
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for model in a.models.split(','):
            directory = {'smollm2-135m': a.smol, 'mamba2-130m': a.mamba2}[model]
            if directory is None and model == 'mamba2-130m':
                directory = pathlib.Path(scratch)
                mamba2_130m().save_pretrained(directory)
            if directory is None:
                note(f'{model}: no directory given (--smol DIR), left out')
                continue
            try:
                results[model] = measure(model, directory, a)
            finally:
                for w in list(Worker.live):
                    w.close()
    report = dict(peer=dict(torch=torch.__version__, transformers=transformers.__version__, dtype='float32', threads=a.threads), cpu=cpu_name(),
                  rounds=a.rounds, repeats=a.repeats, load_after=os.getloadavg(), time=time.strftime('%Y-%m-%d %H:%M:%S'),
                  results={m: {p: dict(r, peer_median_ms=median(flat(r['peer_ms'])), ratios=ratios(r)) for p, r in parts.items()} for m, parts in results.items()})
    if a.json:
        a.json.write_text(json.dumps(report, indent=1))
    print(f'{report["cpu"]}, {a.threads} threads, float32; torch {torch.__version__}, transformers {transformers.__version__}; median of {a.rounds} rounds\n')
    print(table(results))


if __name__ == '__main__':
    main()

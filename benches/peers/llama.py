#!/usr/bin/env python3
"""llama.cpp against `terrarium bench`, decoding a random Mamba-2 of the 130m shape on the CPU at equal precision, side by side.

  python llama.py --terrarium target/release/terrarium [--types f32,bf16,f16] [--threads 2] [--rounds 5] [--json OUT.json]

Per type one checkpoint is made twice from the same numbers: a Hugging Face directory for terrarium and a GGUF file for llama.cpp, matrices in
the type, vectors in float32 on either side. Both decode 64 tokens greedily, one row, after a prompt of 32 tokens, with as many threads; every round runs one
after the other, each after one unmeasured pass. A ratio is llama.cpp's time / ours within a round (above 1: terrarium is faster). Report figures from an idle
machine only. Before timing, both score the same ids: that their log-probabilities agree says that both compute the same model.

Needs numpy, gguf and llama-cpp-python (pip builds it for the machine's own CPU).
"""
import argparse, json, pathlib, statistics, subprocess, tempfile, time

import numpy as np

PROMPT, NEW = 32, 64
D, LAYERS, HEADS, P, N, K, VOCAB = 768, 24, 24, 64, 128, 4, 50288
INNER = HEADS * P
CHANNELS = INNER + 2 * N


def weights():
    """Names and float32 values in the layout of transformers, of about the size that training leaves."""
    r = np.random.default_rng(0)
    normal = lambda *shape: (r.standard_normal(shape) * 0.02).astype(np.float32)
    yield 'backbone.embeddings.weight', normal(VOCAB, D)
    yield 'backbone.norm_f.weight', np.ones(D, np.float32)
    for i in range(LAYERS):
        at = f'backbone.layers.{i}.'
        yield at + 'norm.weight', np.ones(D, np.float32)
        yield at + 'mixer.A_log', np.log(r.uniform(1, 16, HEADS)).astype(np.float32)
        yield at + 'mixer.D', np.ones(HEADS, np.float32)
        yield at + 'mixer.dt_bias', r.uniform(-6, -2, HEADS).astype(np.float32)
        yield at + 'mixer.conv1d.weight', r.uniform(-0.5, 0.5, (CHANNELS, 1, K)).astype(np.float32)
        yield at + 'mixer.conv1d.bias', normal(CHANNELS)
        yield at + 'mixer.in_proj.weight', normal(INNER + CHANNELS + HEADS, D)
        yield at + 'mixer.norm.weight', np.ones(INNER, np.float32)
        yield at + 'mixer.out_proj.weight', normal(D, INNER)


def bf16(values):
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def encoded(name, values, kind):
    """Bytes of a tensor and their type: matrices of products in `kind`, all else float32."""
    if kind == 'f32' or not (values.ndim == 2 and values.shape[-1] > 1):
        return 'F32', values.astype(np.float32)
    return ('F16', values.astype(np.float16)) if kind == 'f16' else ('BF16', bf16(values))


def hugging_face(directory, kind):
    config = dict(model_type='mamba2', architectures=['Mamba2ForCausalLM'], vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS, num_heads=HEADS,
                  head_dim=P, state_size=N, n_groups=1, expand=2, conv_kernel=K, chunk_size=256, layer_norm_epsilon=1e-5, tie_word_embeddings=True,
                  use_bias=False, use_conv_bias=True, rms_norm=True, hidden_act='silu', torch_dtype=dict(f32='float32', f16='float16', bf16='bfloat16')[kind])
    directory.mkdir(parents=True, exist_ok=True)
    (directory / 'config.json').write_text(json.dumps(config, indent=2))
    header, blobs, end = {'__metadata__': {'format': 'pt'}}, [], 0
    for name, values in weights():
        dtype, data = encoded(name, values, kind)
        blob = data.tobytes()
        header[name] = dict(dtype=dtype, shape=list(values.shape), data_offsets=[end, end + len(blob)])
        end += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(directory / 'model.safetensors', 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for blob in blobs:
            file.write(blob)


def gguf_file(path, kind):
    """As llama.cpp's own converter writes Mamba2ForCausalLM, without a vocabulary."""
    import gguf
    writer = gguf.GGUFWriter(str(path), 'mamba2')
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(LAYERS)
    writer.add_vocab_size(VOCAB)
    writer.add_ssm_conv_kernel(K)
    writer.add_ssm_inner_size(INNER)
    writer.add_ssm_state_size(N)
    writer.add_ssm_time_step_rank(HEADS)
    writer.add_ssm_group_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model('none')
    names = {'norm.weight': 'attn_norm.weight', 'mixer.A_log': 'ssm_a', 'mixer.D': 'ssm_d', 'mixer.dt_bias': 'ssm_dt.bias', 'mixer.conv1d.weight': 'ssm_conv1d.weight',
             'mixer.conv1d.bias': 'ssm_conv1d.bias', 'mixer.in_proj.weight': 'ssm_in.weight', 'mixer.norm.weight': 'ssm_norm.weight',
             'mixer.out_proj.weight': 'ssm_out.weight'}
    for name, values in weights():
        if name == 'backbone.embeddings.weight':
            to = 'token_embd.weight'
        elif name == 'backbone.norm_f.weight':
            to = 'output_norm.weight'
        else:
            _, _, layer, rest = name.split('.', 3)
            to = f'blk.{layer}.{names[rest]}'
            if rest == 'mixer.A_log':
                values = -np.exp(values).reshape(HEADS, 1)
            elif rest == 'mixer.D':
                values = values.reshape(HEADS, 1)
            elif rest == 'mixer.conv1d.weight':
                values = values.reshape(CHANNELS, K)
            elif rest == 'mixer.norm.weight':
                values = values.reshape(1, INNER)
        dtype, data = encoded(name, values if to.split('.')[-2] in ('token_embd', 'ssm_in', 'ssm_out') else values.reshape(-1), kind)
        data = data.reshape(values.shape)
        if dtype == 'BF16':
            writer.add_tensor(to, data.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(to, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    def __init__(self, path, threads):
        import llama_cpp.llama_cpp as c
        self.c = c
        self.quiet = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self.quiet, None)
        c.llama_backend_init()
        params = c.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = c.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f'llama.cpp cannot read {path}'
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 512, 512, threads, threads
        self.context = c.llama_init_from_model(self.model, params)

    def feed(self, ids):
        array = (self.c.llama_token * len(ids))(*ids)
        assert self.c.llama_decode(self.context, self.c.llama_batch_get_one(array, len(ids))) == 0
        return np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, -1), (VOCAB,))

    def begin(self, ids):
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        return self.feed(ids)

    def decode(self):
        logits = self.begin(prompt())
        start = time.perf_counter()
        for _ in range(NEW):
            logits = self.feed([int(logits.argmax())])
        return (time.perf_counter() - start) * 1e3 / NEW


def prompt():
    return [int(i) for i in np.random.default_rng(1).integers(3, VOCAB, PROMPT)]


def far(peer, opts, directory, kind):
    """Largest difference of the log-probabilities of the prompt's tokens after the first."""
    ids, theirs = prompt(), []
    logits = peer.begin(ids[:1])
    for token in ids[1:]:
        values = logits.astype(np.float64)
        top = values.max()
        theirs.append(values[token] - top - np.log(np.exp(values - top).sum()))
        logits = peer.feed([token])
    command = [opts.terrarium, 'score', '--model', directory, '--input', '-', '--device', 'cpu', '--dtype', kind]
    found = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, input=json.dumps({'ids': ids}) + '\n').stdout
    return float(np.abs(np.array(json.loads(found)['logprobs']) - np.array(theirs)).max())


def ours(opts, directory, kind):
    command = [opts.terrarium, 'bench', '--model', directory, '--prompt-tokens', PROMPT, '--new-tokens', NEW, '--prefill', 0, '--train-tokens', 0, '--repeats', 1,
               '--threads', opts.threads, '--device', 'cpu', '--dtype', kind, '--json']
    found = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
    return statistics.median(json.loads(found)['decode_ms_per_token'])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--terrarium', default='target/release/terrarium')
    parser.add_argument('--types', default='f32,bf16,f16')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--keep', help='folder for the checkpoints [default: a temporary one]')
    parser.add_argument('--json')
    opts = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(opts.keep or temporary)
        for kind in opts.types.split(','):
            directory, path = folder / kind, folder / f'{kind}.gguf'
            hugging_face(directory, kind)
            gguf_file(path, kind)
            peer = Llama(path, opts.threads)
            apart = far(peer, opts, directory, kind)
            # Activations are rounded to the type here, and stay float32 there.
            assert apart < dict(f32=1e-3, f16=0.02, bf16=0.15)[kind], f'{kind}: log-probabilities differ by {apart}: not the same model'
            peer.decode()
            rounds = [(peer.decode(), ours(opts, directory, kind)) for _ in range(opts.rounds)]
            ratio = sorted(theirs / own for theirs, own in rounds)
            results[kind] = dict(apart=apart, llama_cpp_ms=[a for a, _ in rounds], terrarium_ms=[b for _, b in rounds], ratio=statistics.median(ratio))
            theirs, own = ([f'{statistics.median(x):.1f} ({min(x):.1f}-{max(x):.1f})' for x in zip(*rounds)])
            print(f'{kind}: llama.cpp {theirs} ms a token, terrarium {own}: {statistics.median(ratio):.2f} ({ratio[0]:.2f}-{ratio[-1]:.2f}); log-probabilities differ by up to {apart:.1e}', flush=True)
    if opts.json:
        pathlib.Path(opts.json).write_text(json.dumps(results, indent=2))


if __name__ == '__main__':
    main()

#!/usr/bin/env python3
"""A training step of whole models in PyTorch on one GPU, for the shapes of `terrarium bench train`.

  python models.py [--mamba DIR] [--models pythia-160m,pythia-1.4b,mamba2-130m,mamba2-1.3b] [--batch 8] [--tokens 2048] [--attention cudnn,flash]
  terrarium bench train --preset pythia-160m --batch 8 --tokens 2048 --device cuda --json     # ours, in the same run

Pythia's shapes are written out here (LayerNorm, rotary positions on a quarter of each head, attention beside the GELU MLP, untied embeddings); Mamba-2 is
`MambaLMHeadModel` of mamba_ssm, from the checkout DIR of state-spaces/mamba (with its Triton kernels; needs einops). A step is forward, loss, backward, clipping
and fused AdamW; bf16 autocast with float32 weights, captured as one CUDA graph. A line of JSON per model: milliseconds (median, least, most), tokens/s, peak memory.
"""
import argparse, gc, json, os, statistics, sys, types

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--mamba", default="")
parser.add_argument("--models", default="pythia-160m,pythia-1.4b,mamba2-130m,mamba2-1.3b")
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--attention", default="cudnn,flash")
parser.add_argument("--repeats", type=int, default=7)
parser.add_argument("--cache", default=os.path.abspath("peers_cache"), help="compiled kernels, as of gpu.py")
args = parser.parse_args()
os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(args.cache, "triton"))

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

DEV = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 50304
PYTHIA = {"pythia-160m": (12, 768, 12), "pythia-410m": (24, 1024, 16), "pythia-1b": (16, 2048, 8), "pythia-1.4b": (24, 2048, 16)}
MAMBA = {"mamba2-130m": (24, 768), "mamba2-1.3b": (48, 2048)}
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.turned = self.head // 4
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, cos, sin):
        b, l, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, l, 3, self.heads, self.head).permute(2, 0, 3, 1, 4)

        def rotate(t):
            t1, t2 = t[..., : self.turned].chunk(2, -1)
            return torch.cat((t1 * cos - t2 * sin, t2 * cos + t1 * sin, t[..., self.turned :]), -1)

        attended = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return x + self.out(attended.transpose(1, 2).reshape(b, l, d)) + self.down(F.gelu(self.up(self.ln2(x))))


class Pythia(nn.Module):
    def __init__(self, layers, width, heads):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB, bias=False)
        self.blocks, self.norm = nn.ModuleList(Block(width, heads) for _ in range(layers)), nn.LayerNorm(width)
        turned = width // heads // 4
        angles = torch.outer(torch.arange(args.tokens), 10000.0 ** (-torch.arange(0, turned, 2) / turned))
        self.register_buffer("cos", angles.cos().bfloat16())
        self.register_buffer("sin", angles.sin().bfloat16())

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def mamba(layers, width):
    if "mamba_ssm" not in sys.modules:
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
        package = types.ModuleType("mamba_ssm")
        package.__path__ = [os.path.join(args.mamba, "mamba_ssm")]
        sys.modules["mamba_ssm"] = package
        sys.path.append(args.mamba)
        import triton_ahead

        triton_ahead.prepare()
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    return MambaLMHeadModel(MambaConfig(d_model=width, n_layer=layers, vocab_size=50288, ssm_cfg=dict(layer="Mamba2"), rms_norm=True,
                                        residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=16), device=DEV)


def measure(model, vocab):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True, capturable=DEV == "cuda")
    ids = torch.randint(0, vocab, (args.batch, args.tokens + 1), device=DEV)
    given, wanted = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1).contiguous()

    def step():
        with torch.autocast(DEV, dtype=torch.bfloat16):
            logits = model(given)
            logits = logits.logits if hasattr(logits, "logits") else logits
            loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if DEV == "cpu":
        return step() or [0.0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    for _ in range(2):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(args.repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(events, events[1:]))


for name in args.models.split(","):
    kinds = args.attention.split(",") if name in PYTHIA else [""]
    for kind in kinds:
        line = dict(model=name, attention=kind or None, batch=args.batch, tokens=args.tokens)
        try:
            torch.manual_seed(0)
            if name in PYTHIA:
                model = Pythia(*PYTHIA[name]).to(DEV)
                with sdpa_kernel(BACKENDS[kind]):
                    ms = measure(model, VOCAB)
            else:
                model = mamba(*MAMBA[name])
                ms = measure(model, 50288)
            middle = statistics.median(ms)
            line |= dict(parameters=sum(p.numel() for p in model.parameters()), ms=middle, min=ms[0], max=ms[-1])
            if DEV == "cuda":
                line |= dict(tokens_per_s=args.batch * args.tokens / middle * 1e3, memory=torch.cuda.max_memory_reserved())
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps(line), flush=True)
        model = None
        gc.collect()
        if DEV == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

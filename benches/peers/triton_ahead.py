"""Compiles Triton kernels in forked processes that never touch the GPU.

A process walks through the same Python code on CPU tensors without values; a driver that only claims to be an H100 stands for the real one, the
autotuner compiles all configurations instead of timing them, and nothing is launched. Processes share the work by claim files,
and leave their results in Triton's cache, where the measuring process finds them.
"""
import contextlib, glob, hashlib, json, os, sys, time, traceback, types

import torch
import torch.nn.functional as F
import triton
import triton.runtime.autotuner as autotuner
import triton.runtime.jit as jit
import triton.testing

# Only shape the grid.
GRID_ONLY = {"batch", "nchunks", "nheads_ngroups_ratio", "nheads_per_program", "M", "rows_per_program"}
ARCH = 90


def prepare():
    """Before any kernel of mamba_ssm is compiled, here and in the processes: fewer variants, shorter tuning."""
    import mamba_ssm.ops.triton.layernorm_gated, mamba_ssm.ops.triton.ssd_combined  # noqa: F401
    for name, module in list(sys.modules.items()):
        if not name.startswith("mamba_ssm.ops.triton.ssd"):
            continue
        for value in vars(module).values():
            while isinstance(value, (autotuner.Autotuner, autotuner.Heuristics)):
                value = value.fn
            if isinstance(value, jit.JITFunction):
                for parameter in value.params:
                    if parameter.name in GRID_ONLY and not parameter.is_constexpr:
                        parameter.do_not_specialize = True
    short = lambda fn, quantiles: triton.testing.do_bench(fn, warmup=5, rep=20, quantiles=quantiles)
    autotuner.Autotuner.do_bench = staticmethod(short)


class FakeDriver:
    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cuda


SEEN = set()


def pretend(compile_one=None):
    """No kernel runs from here on. `compile_one(kernel, key, go)` is asked once for each variant; `go()` compiles it."""
    triton.runtime.driver.set_active(FakeDriver())
    torch.cuda.device = lambda *a, **k: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *a, **k: types.SimpleNamespace(multi_processor_count=132, name="fake", gcnArchName="")
    F.linear = lambda x, w, b=None: torch.empty(*x.shape[:-1], w.shape[0], dtype=x.dtype)
    real = jit.JITFunction.run

    def run(self, *a, grid, warmup, **options):
        asked = dict(options, debug=options.get("debug", self.debug) or False, instrumentation_mode=triton.knobs.compilation.instrumentation_mode)
        _, keys, _, _, binder = self.device_caches[0]
        _, specialization, rest = binder(*a, **asked)
        key = self.fn.__name__ + str(jit.compute_cache_key(keys, specialization, rest))
        if key in SEEN:
            return
        SEEN.add(key)
        if compile_one is not None:
            compile_one(self.fn.__name__, key, lambda: real(self, *a, grid=grid, warmup=True, **options))

    def run_all(self, *a, **options):
        self.nargs = dict(zip(self.arg_names, a))
        for config in self.prune_configs(options) if len(self.configs) > 1 else self.configs:
            self.fn.run(*a, **options, **config.all_kwargs())
        self.best_config, self.nargs = self.configs[0], None

    jit.JITFunction.run = run
    autotuner.Autotuner.run = run_all


def count(walk):
    walk()
    return len(SEEN)


def start(processes, cache, walk, device_of):
    """Forks; `device_of("cpu")` moves the walk's tensors there."""
    claims = os.path.join(cache, f"claims.{os.getpid()}")
    os.makedirs(claims, exist_ok=True)
    pids = []
    for i in range(processes):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        log = dict(compiled=0, seconds=0.0, errors=[])
        try:
            torch.set_num_threads(1)
            device_of("cpu")

            def compile_one(name, key, go):
                try:
                    os.close(os.open(os.path.join(claims, hashlib.sha1(key.encode()).hexdigest()), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                except FileExistsError:
                    return
                begin = time.time()
                try:
                    go()
                    log["compiled"] += 1
                except BaseException as error:
                    log["errors"].append(f"{name}: {type(error).__name__} {str(error)[:150]}")
                log["seconds"] += time.time() - begin

            pretend(compile_one)
            walk()
        except BaseException:
            log["errors"].append(traceback.format_exc()[-1500:])
        with open(os.path.join(claims, f"log.{i}"), "w") as file:
            json.dump(log, file)
        os._exit(0)
    return claims, pids


def finish(started):
    claims, pids = started
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    logs = [json.load(open(file)) for file in glob.glob(os.path.join(claims, "log.*"))]
    errors = sorted({error for log in logs for error in log["errors"]})
    return dict(kernels=sum(log["compiled"] for log in logs), cpu_seconds=round(sum(log["seconds"] for log in logs)), errors=errors[:6])

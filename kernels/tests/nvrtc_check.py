#!/usr/bin/env python3
"""Compiles generated CUDA C++ with NVRTC where there is no GPU: registers and spills of every variant of our kernels.

  python3 nvrtc_check.py FOLDER|FILE.cu ... [--arch sm_80,sm_90a] [--all] [--install VENV] [--markdown]

FOLDER holds what the tests generated under the emulator with TERRARIUM_EMULATOR_SOURCES=FOLDER (cuda_emulator/README.md). Only kernels that
this crate defines are compiled, unless --all: Burn's own lie there too. What uses instructions of Hopper is left out for older GPUs.
--install makes a virtual environment with NVRTC from PyPI the first time, and uses it; what it compiled is remembered there. Exit code 1 if
anything does not compile, 2 if NVRTC cannot be had.

The table has a line for each variant and architecture: threads of a block, registers of a thread, statically allocated shared memory,
bytes of the stack, and bytes that registers spill to it, stored and loaded.
"""
import argparse, concurrent.futures, ctypes, glob, hashlib, os, pathlib, re, site, subprocess, sys

PACKAGES = ["nvidia-cuda-nvrtc==13.0.*", "nvidia-cuda-runtime==13.0.*", "nvidia-cuda-cccl==13.0.*", "nvidia-cuda-crt==13.0.*"]
CRATE = pathlib.Path(__file__).resolve().parent.parent
HOPPER = ("cp.async.bulk", "cuTensorMap", "CUtensorMap", "wgmma", "cluster", "setmaxnreg", "elect.sync", "stmatrix")


def library():
    """The folder of the CUDA packages, or None."""
    for folder in site.getsitepackages() + [site.getusersitepackages()]:
        for root in glob.glob(os.path.join(folder, "nvidia", "cu13")):
            return root
    return None


def restart(options):
    """Goes on in an interpreter that sees NVRTC: in the environment of --install, with its libraries on the path."""
    root = library()
    if root is None:
        if options.install is None:
            sys.exit("NVRTC is not installed here: --install VENV, or pip install " + " ".join(f"'{name}'" for name in PACKAGES))
        python = os.path.join(options.install, "bin", "python")
        if os.path.realpath(sys.prefix) == os.path.realpath(options.install):
            sys.exit(f"{options.install} has no NVRTC although it was installed")
        if not os.path.exists(python):
            subprocess.run([sys.executable, "-m", "venv", options.install], check=True)
        if subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"] + PACKAGES).returncode:
            print("NVRTC could not be installed from PyPI (no network?), so no kernel was compiled", file=sys.stderr)
            sys.exit(2)
        os.execv(python, [python] + sys.argv)
    if os.path.join(root, "lib") not in os.environ.get("LD_LIBRARY_PATH", ""):
        # NVRTC opens its builtins by plain name. Whatever else stood there (an emulator, say) must not be found.
        os.environ["LD_LIBRARY_PATH"] = os.path.join(root, "lib")
        os.execv(sys.executable, [sys.executable] + sys.argv)
    return root


def own_kernels():
    """Names of this crate's `#[cube(launch..)]` functions, each with the modules that define it."""
    pattern = re.compile(r"#\[cube\([^\]]*\blaunch[^\]]*\)\](?:\s*#\[[^\]]*\]|\s*//[^\n]*)*\s*(?:pub(?:\([^)]*\))?\s+)?fn\s+(\w+)")
    found = {}
    for path in sorted((CRATE / "src").rglob("*.rs")):
        for name in pattern.findall(path.read_text()):
            found.setdefault(name, []).append(path.relative_to(CRATE / "src").parts[0])
    return found


def kernel_name(source):
    found = re.search(r"__global__\s+void\s*(?:__launch_bounds__\s*\((\d+)[^)]*\))?\s*(?:__cluster_dims__\s*\([^)]*\))?\s*(\w+)\s*\(", source)
    return (found.group(2), int(found.group(1) or 0)) if found else (None, 0)


def is_own(name, own):
    """Modules of the kernel with this name; CubeCL appends types and sizes to it."""
    kernel = max((kernel for kernel in own if name == kernel or name.startswith(kernel + "_")), key=len, default=None)
    return own.get(kernel, [])


def text(nvrtc, program, size, get):
    length = ctypes.c_size_t()
    getattr(nvrtc, size)(program, ctypes.byref(length))
    buffer = ctypes.create_string_buffer(max(1, length.value))
    getattr(nvrtc, get)(program, buffer)
    return buffer.value.decode(errors="replace")


def compile_one(root, source, arch):
    """(compiled, log); the log holds what ptxas says about resources."""
    nvrtc = ctypes.CDLL(os.path.join(root, "lib", "libnvrtc.so.13"))
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None):
        return False, "nvrtcCreateProgram failed"
    # As CubeCL calls it, and with the assembler's report.
    options = [f"--gpu-architecture={arch}", f"--include-path={root}/include", f"--include-path={root}/include/cccl", "-lineinfo", "--ptxas-options=-v"]
    code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[option.encode() for option in options]))
    log = text(nvrtc, program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code == 0, log


def resources(log):
    """Registers, shared, stack, spills out of ptxas' report."""
    def number(pattern):
        found = re.search(pattern, log)
        return int(found.group(1)) if found else 0
    return dict(registers=number(r"Used (\d+) registers"), shared=number(r"(\d+) bytes smem"), stack=number(r"(\d+) bytes stack frame"),
                stores=number(r"(\d+) bytes spill stores"), loads=number(r"(\d+) bytes spill loads"))


def job(item):
    root, file, arch, memory = item
    source = pathlib.Path(file).read_text()
    kept = memory and os.path.join(memory, hashlib.sha256("\n".join([*PACKAGES, arch, source]).encode()).hexdigest())
    if kept and os.path.exists(kept):
        return file, arch, True, pathlib.Path(kept).read_text()
    compiled, log = compile_one(root, source, arch)
    if kept and compiled:
        os.makedirs(memory, exist_ok=True)
        pathlib.Path(f"{kept}.{os.getpid()}").write_text(log)
        os.rename(f"{kept}.{os.getpid()}", kept)
    return file, arch, compiled, log


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--arch", default="sm_80,sm_90a")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--install", metavar="VENV")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    root = restart(options)

    files = [file for source in options.sources for file in (sorted(glob.glob(os.path.join(source, "*.cu"))) if os.path.isdir(source) else [source])]
    own, jobs, names = own_kernels(), [], {}
    memory = options.install and os.path.join(options.install, "compiled")
    for file in files:
        source = pathlib.Path(file).read_text()
        name, threads = kernel_name(source)
        if name is None or not (options.all or not os.path.isdir(options.sources[0]) or is_own(name, own)):
            continue
        names[file] = "|".join(sorted(set(is_own(name, own)))), name, threads, hashlib.sha256(source.encode()).hexdigest()[:6]
        hopper = any(word in source for word in HOPPER)
        jobs += [(root, file, arch, memory) for arch in options.arch.split(",") if arch.startswith("sm_9") or arch.startswith("sm_1") or not hopper]
    if not jobs:
        print(f"no kernels of this crate among {len(files)} sources")
        return 1 if own else 0
    rows, failed = [], []
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for file, arch, compiled, log in pool.map(job, jobs):
            if compiled:
                rows.append((names[file], arch, resources(log)))
            else:
                failed.append((names[file], file, arch, log))
    rows.sort(key=lambda row: (row[0], row[1]))
    headings = ["in", "kernel", "variant", "arch", "threads", "registers", "shared", "stack", "spill stores", "spill loads"]
    lines = [[module, name, variant, arch, threads, *(use[key] for key in ("registers", "shared", "stack", "stores", "loads"))]
             for (module, name, threads, variant), arch, use in rows]
    if options.markdown:
        print("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
        for line in lines:
            print("| " + " | ".join(map(str, line)) + " |")
    else:
        first, second = (max([len(line[i]) for line in lines], default=6) for i in (0, 1))
        print(f"{'in':<{first}} {'kernel':<{second}} {'':6} {'arch':<7} {'threads':>7} {'regs':>5} {'shared':>7} {'stack':>6} {'spills':>13}")
        for module, name, variant, arch, threads, registers, shared, stack, stores, loads in lines:
            print(f"{module:<{first}} {name:<{second}} {variant:6} {arch:<7} {threads:>7} {registers:>5} {shared:>7} {stack:>6} {stores:>6}/{loads:<6}")
    for (_, name, _, variant), file, arch, log in failed:
        print(f"\nFAILED {name} {variant} {arch}: {file}\n{log[:3000]}", file=sys.stderr)
    spilled = sum(1 for _, _, use in rows if use["stores"] or use["loads"])
    never = sorted(kernel for kernel in own if not any(name == kernel or name.startswith(kernel + "_") for _, name, _, _ in names.values()))
    if never and os.path.isdir(options.sources[0]):
        print("never generated: " + ", ".join(never))
    print(f"{len(names)} variants, {len(rows)} compiled, {spilled} spill, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

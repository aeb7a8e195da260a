"""Builds the CUDA extensions of mamba_ssm (selective scan) and causal-conv1d, cut down to what gpu.py measures.

Nothing in a kernel changes: only instantiations are left out, so that the build takes a minute or two instead of half an hour. Kept: bfloat16
activations with float32 weights; for the scan real A, B and C that vary over time, softplus, more than 256 tokens and a multiple of the
tile, with a gate and without; for the convolution width 4. Compiler flags are those of the packages' own builds.
"""
import os, re, shutil, subprocess, sys

FLAGS = ["-O3", "--use_fast_math", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_OPERATORS__",
         "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__", "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
         "--expt-relaxed-constexpr", "--expt-extended-lambda", "-lineinfo"]

# A switch over a constant that is always true here compiles one side; the other stops the program.
ONE_SIDED = """#pragma once
#include <c10/util/Exception.h>
#define BOOL_SWITCH_BOTH(COND, NAME, ...) [&] { if (COND) { constexpr bool NAME = true; return __VA_ARGS__(); } \\
    else { constexpr bool NAME = false; return __VA_ARGS__(); } }()
#define BOOL_SWITCH_TRUE(COND, NAME, ...) [&] { TORCH_CHECK(COND, "left out of this build: not " #NAME); constexpr bool NAME = true; return __VA_ARGS__(); }()
#define BOOL_SWITCH_FALSE(COND, NAME, ...) [&] { TORCH_CHECK(!(COND), "left out of this build: " #NAME); constexpr bool NAME = false; return __VA_ARGS__(); }()
#define BOOL_SWITCH_kIsEvenLen(...) BOOL_SWITCH_TRUE(__VA_ARGS__)
#define BOOL_SWITCH_kIsVariableB(...) BOOL_SWITCH_TRUE(__VA_ARGS__)
#define BOOL_SWITCH_kIsVariableC(...) BOOL_SWITCH_TRUE(__VA_ARGS__)
#define BOOL_SWITCH_kDeltaSoftplus(...) BOOL_SWITCH_TRUE(__VA_ARGS__)
#define BOOL_SWITCH_kHasZ(...) BOOL_SWITCH_BOTH(__VA_ARGS__)
#define BOOL_SWITCH_kIsVecLoad(...) BOOL_SWITCH_TRUE(__VA_ARGS__)
#define BOOL_SWITCH_kHasSeqIdx(...) BOOL_SWITCH_FALSE(__VA_ARGS__)
#define BOOL_SWITCH_kSiluAct(...) BOOL_SWITCH_BOTH(__VA_ARGS__)
#define BOOL_SWITCH_kHasDfinalStates(...) BOOL_SWITCH_FALSE(__VA_ARGS__)
#define BOOL_SWITCH_kChunkSizeL64(...) BOOL_SWITCH_FALSE(__VA_ARGS__)
#define BOOL_SWITCH_kDeterministic(...) BOOL_SWITCH_FALSE(__VA_ARGS__)
#define BOOL_SWITCH(COND, NAME, ...) BOOL_SWITCH_##NAME(COND, NAME, __VA_ARGS__)
"""


def only_types(text):
    """The dispatch macros: bfloat16 inputs, float32 weights."""
    def cut(name, alias, kind, cxx):
        nonlocal text
        body = f"#define {name}({alias.upper()[0]}TYPE, NAME, ...) {{ TORCH_CHECK({alias.upper()[0]}TYPE == at::ScalarType::{kind}, \"left out of this build\"); using {alias} = {cxx}; __VA_ARGS__(); }}\n"
        text = re.sub(r"#define %s\(.*?\n(?:.*\\\n)*.*\n" % name, lambda m: body, text, count=1)
    cut("DISPATCH_ITYPE_FLOAT_AND_HALF_AND_BF16", "input_t", "BFloat16", "at::BFloat16")
    cut("DISPATCH_WTYPE_FLOAT_AND_HALF_AND_BF16", "weight_t", "Float", "float")
    cut("DISPATCH_WTYPE_FLOAT_AND_COMPLEX", "weight_t", "Float", "float")
    return text


def selective_scan(source, folder):
    shutil.copytree(os.path.join(source, "csrc", "selective_scan"), folder, dirs_exist_ok=True)
    edit(folder, "selective_scan.cpp", only_types)
    short = lambda text: re.sub(r"selective_scan_(fwd|bwd)_launch<32, [48], input_t, weight_t>\(params, stream\);", 'TORCH_CHECK(false, "left out of this build");', text)
    edit(folder, "selective_scan_fwd_kernel.cuh", short)
    edit(folder, "selective_scan_bwd_kernel.cuh", short)
    write(folder, "fwd.cu", '#include "selective_scan_fwd_kernel.cuh"\ntemplate void selective_scan_fwd_cuda<at::BFloat16, float>(SSMParamsBase &, cudaStream_t);\n')
    write(folder, "bwd.cu", '#include "selective_scan_bwd_kernel.cuh"\ntemplate void selective_scan_bwd_cuda<at::BFloat16, float>(SSMParamsBwd &, cudaStream_t);\n')
    return "selective_scan_cuda", ["selective_scan.cpp", "fwd.cu", "bwd.cu"]


def causal_conv1d(source, folder):
    shutil.copytree(os.path.join(source, "csrc"), folder, dirs_exist_ok=True)
    edit(folder, "causal_conv1d.cpp", only_types)
    def cut(text):
        text = re.sub(r"template void \w+<(?!at::BFloat16, float>)[^;]*;", "", text)
        # Widths other than 4.
        return re.sub(r"if \(params\.width == ([23])\) \{\s*\w+<[^;]*;\s*\} else ", "", text)
    files = ["causal_conv1d_fwd.cu", "causal_conv1d_bwd.cu", "causal_conv1d_update.cu"]
    for file in files:
        edit(folder, file, cut)
    return "causal_conv1d_cuda", ["causal_conv1d.cpp"] + files


def edit(folder, file, change):
    path = os.path.join(folder, file)
    text = open(path).read()
    with open(path, "w") as out:
        out.write(change(text))


def write(folder, file, text):
    with open(os.path.join(folder, file), "w") as out:
        out.write(text)


def sources(op, checkout, cache):
    """Writes the cut-down sources; the extension's name and files."""
    folder = os.path.join(cache, "build", op)
    os.makedirs(folder, exist_ok=True)
    name, files = (selective_scan if op == "selective_scan" else causal_conv1d)(checkout, folder)
    write(folder, "static_switch.h", ONE_SIDED)
    return folder, name, files


# Run in a process of its own, so that builds go on while other things are measured.
BUILD = """
import sys, torch.utils.cpp_extension as ext
folder, name, *files = sys.argv[1:]
ext.load(name=name, sources=[folder + "/" + f for f in files], build_directory=folder, extra_include_paths=[folder],
         extra_cflags=["-O3"], extra_cuda_cflags={flags!r}, verbose=False)
"""


def start(mamba, conv, cache, ops):
    """Begins the builds of `ops`; what to give to finish()."""
    started = {}
    for op in ops:
        checkout = mamba if op == "selective_scan" else conv
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        nvcc = shutil.which("nvcc") or (os.path.join(home, "bin/nvcc") if os.path.exists(os.path.join(home, "bin/nvcc")) else None)
        if not checkout or not os.path.isdir(os.path.join(checkout, "csrc")):
            started[op] = "no checkout with csrc/ was given: left out"
        elif nvcc is None:
            started[op] = "no nvcc on this machine: left out"
        else:
            folder, name, files = sources(op, checkout, cache)
            log = os.path.join(folder, "log")
            environment = dict(os.environ, TORCH_CUDA_ARCH_LIST=os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0"), CUDA_HOME=os.path.dirname(os.path.dirname(nvcc)), MAX_JOBS="4")
            command = [sys.executable, "-c", BUILD.format(flags=FLAGS), folder, name] + files
            started[op] = folder, name, log, subprocess.Popen(command, env=environment, stdout=open(log, "w"), stderr=subprocess.STDOUT)
    return started


def finish(started):
    """The extension, or None and why."""
    if isinstance(started, str):
        return None, started
    folder, name, log, process = started
    if process.wait() != 0:
        errors = [line for line in open(log) if "error" in line]
        return None, "did not build: " + "".join(errors[:3])[:300]
    sys.path.insert(0, folder)
    # Made before mamba_ssm looked for it.
    for module in [m for m in sys.modules if m.startswith("mamba_ssm.ops.selective_scan_interface")]:
        del sys.modules[module]
    try:
        return __import__(name), ""
    except ImportError as error:
        return None, f"does not import: {error}"[:300]

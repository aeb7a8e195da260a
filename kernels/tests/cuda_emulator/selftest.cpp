// Checks the emulator by itself: matrix layouts against plain products, and that mistakes in
// kernels are reported. `build.sh` builds it next to the libraries; run it with their env.sh.
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using Handle = void *;
using std::string;

void *driver, *compiler;
template <class... A> int call(void *library, const char *name, A... arguments) {
    auto f = reinterpret_cast<int (*)(A...)>(dlsym(library, name));
    if (!f) { fprintf(stderr, "no function %s\n", name); exit(1); }
    int result = f(arguments...);
    if (result) fprintf(stderr, "%s gives %d\n", name, result);
    return result;
}

Handle load(const string &source) {
    Handle program, module, function;
    call(compiler, "nvrtcCreateProgram", &program, source.c_str(), (const char *)nullptr, 0, (void *)nullptr, (void *)nullptr);
    if (call(compiler, "nvrtcCompileProgram", program, 0, (void *)nullptr)) {
        size_t size;
        call(compiler, "nvrtcGetProgramLogSize", program, &size);
        string log(size, 0);
        call(compiler, "nvrtcGetProgramLog", program, log.data());
        fprintf(stderr, "%s\n", log.c_str());
        exit(1);
    }
    size_t size;
    call(compiler, "nvrtcGetPTXSize", program, &size);
    string ptx(size, 0);
    call(compiler, "nvrtcGetPTX", program, ptx.data());
    call(driver, "cuModuleLoadData", &module, (const char *)ptx.c_str());
    call(driver, "cuModuleGetFunction", &function, module, (const char *)"k");
    return function;
}

// Runs kernel `k(float *)` with one block; gives what the first `count` floats become.
std::vector<float> run(const string &body, unsigned threads, size_t count, unsigned shared = 4096) {
    Handle f = load("#include <cuda_runtime.h>\ntypedef unsigned uint32; typedef unsigned char uint8;\n" + body);
    uint64_t memory;
    call(driver, "cuMemAlloc_v2", &memory, count * 4);
    void *parameters[] = {&memory};
    call(driver, "cuLaunchKernel", f, 1u, 1u, 1u, threads, 1u, 1u, shared, (Handle) nullptr, (void **)parameters, (void **)nullptr);
    std::vector<float> out(count);
    memcpy(out.data(), reinterpret_cast<void *>(memory), count * 4);
    return out;
}
string kernel(const string &body) {
    return "extern \"C\" __global__ void __launch_bounds__(128) k (float* out) {\n"
           "extern __shared__ __align__(16) uint8 dynamic_shared_mem[];\n" + body + "\n}";
}

int failures;
void check(const string &name, bool good) {
    printf("%s %s\n", good ? "ok  " : "FAIL", name.c_str());
    failures += !good;
}

// A mistake must end the process with a report that says `message`.
void reports(const string &name, const string &message, const string &body, unsigned threads) {
    int ends[2];
    if (pipe(ends)) exit(1);
    fflush(stdout);
    pid_t child = fork();
    if (!child) {
        dup2(ends[1], 2);
        run(body, threads, 64);
        _exit(0);
    }
    close(ends[1]);
    string text;
    char buffer[4096];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, size_t(n));
    close(ends[0]);
    int status;
    waitpid(child, &status, 0);
    bool good = status != 0 && text.find(message) != string::npos;
    check(name, good);
    if (!good) fprintf(stderr, "%s\n", text.c_str());
}

// Row and column of element i of a lane's registers, as the PTX manual gives them.
string positions(int per_register) {
    string e = std::to_string(per_register);
    return "auto row_a = [&](int i) { return lane / 4 + (i / " + e + " & 1) * 8; };\n"
           "auto col_a = [&](int i) { return lane % 4 * " + e + " + i % " + e + " + 4 * " + e + " * (i / (2 * " + e + ") & 1); };\n"
           "auto row_b = [&](int i) { return lane % 4 * " + e + " + i % " + e + " + " + e + " * 4 * (i / " + e + "); };\n"
           "auto row_c = [&](int i) { return lane / 4 + ((i << 2) & 8); };\n"
           "auto col_c = [&](int i) { return lane % 4 * 2 + i % 2; };\n";
}

void check_mma(const string &type, const string &element, const string &result, int size) {
    int per = 4 / size, k = 8 * per;
    string K = std::to_string(k), out = result == "s32" ? "int" : "float", letter = result == "s32" ? "r" : "f";
    string code = "int lane = threadIdx.x;\n" + positions(per) + element + " a[" + std::to_string(4 * per) + "], b[" + std::to_string(2 * per) + "]; " + out + " c[4], d[4];\n"
        "for (int i = 0; i < " + std::to_string(4 * per) + "; i++) a[i] = " + element + "((row_a(i) * 3 + col_a(i) * 5) % 11);\n"
        "for (int i = 0; i < " + std::to_string(2 * per) + "; i++) b[i] = " + element + "((row_b(i) * 7 + lane / 4 * 2) % 13);\n"
        "for (int i = 0; i < 4; i++) c[i] = " + out + "(row_c(i) + 100 * col_c(i));\n"
        "uint32 *A = (uint32 *)a, *B = (uint32 *)b;\n"
        "asm volatile(\"mma.sync.aligned.m16n8k" + K + ".row.col." + result + "." + type + "." + type + "." + result + "\"\n"
        "  \" {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};\"\n"
        "  : \"=" + letter + "\"(d[0]), \"=" + letter + "\"(d[1]), \"=" + letter + "\"(d[2]), \"=" + letter + "\"(d[3])\n"
        "  : \"r\"(A[0]), \"r\"(A[1]), \"r\"(A[2]), \"r\"(A[3]), \"r\"(B[0]), \"r\"(B[1]), \"" + letter + "\"(c[0]), \"" + letter + "\"(c[1]), \"" + letter + "\"(c[2]), \"" + letter + "\"(c[3]));\n"
        "for (int i = 0; i < 4; i++) out[row_c(i) * 8 + col_c(i)] = float(d[i]);\n";
    auto got = run(kernel(code), 32, 128);
    bool good = true;
    for (int r = 0; r < 16; r++)
        for (int n = 0; n < 8; n++) {
            float sum = r + 100 * n;
            for (int q = 0; q < k; q++) sum += float((r * 3 + q * 5) % 11 * ((q * 7 + n * 2) % 13));
            good &= got[r * 8 + n] == sum;
        }
    check("mma " + type, good);
}

void check_ldmatrix(bool transpose) {
    string t = transpose ? ".trans" : "";
    auto got = run(kernel("unsigned short *s = (unsigned short *)dynamic_shared_mem; int lane = threadIdx.x;\n"
        "for (int i = lane; i < 256; i += 32) s[i] = i;\n__syncwarp();\nuint32 r[4], addr = __cvta_generic_to_shared(s + lane * 8);\n"
        "asm volatile(\"ldmatrix.sync.aligned.m8n8.x4" + t + ".shared::cta.b16\" \" {%0, %1, %2, %3}, [%4];\"\n"
        "  : \"=r\"(r[0]), \"=r\"(r[1]), \"=r\"(r[2]), \"=r\"(r[3]) : \"r\"(addr));\n"
        "for (int m = 0; m < 4; m++) for (int h = 0; h < 2; h++) out[(m * 32 + lane) * 2 + h] = r[m] >> 16 * h & 0xFFFF;"), 32, 256);
    bool good = true;
    for (int m = 0; m < 4; m++)
        for (int lane = 0; lane < 32; lane++)
            for (int h = 0; h < 2; h++) {
                int row = lane / 4, column = lane % 4 * 2 + h;
                good &= got[(m * 32 + lane) * 2 + h] == float(m * 64 + (transpose ? column * 8 + row : row * 8 + column));
            }
    check("ldmatrix" + t, good);
}

// A box of a tensor map that hangs over the edge, in and out through shared memory.
void check_tensor_map(int swizzle) {
    const unsigned rows = 20, columns = 64, box_rows = 8, box_columns = 32;
    uint64_t from, to, dims[] = {columns, rows}, strides[] = {columns * 4};
    unsigned box[] = {box_columns, box_rows}, steps[] = {1, 1};
    call(driver, "cuMemAlloc_v2", &from, size_t(rows * columns * 4));
    call(driver, "cuMemAlloc_v2", &to, size_t(rows * columns * 4));
    auto source = reinterpret_cast<float *>(from), target = reinterpret_cast<float *>(to);
    for (unsigned i = 0; i < rows * columns; i++) source[i] = float(i);
    alignas(64) char maps[2][128];
    for (int i = 0; i < 2; i++)
        call(driver, "cuTensorMapEncodeTiled", (void *)maps[i], 7, 2u, reinterpret_cast<void *>(i ? to : from), (const uint64_t *)dims,
             (const uint64_t *)strides, (const unsigned *)box, (const unsigned *)steps, 0, swizzle, 0, 0);
    Handle f = load("#include <cuda/barrier>\ntypedef unsigned char uint8;\ntypedef struct CUtensorMap_st {\nalignas(64) unsigned long long int opaque[16];\n} CUtensorMap;\n"
        "extern \"C\" __global__ void __launch_bounds__(32) k (const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b) {\n"
        "extern __shared__ __align__(1024) uint8 dynamic_shared_mem[];\n"
        "auto &bar = *(cuda::barrier<cuda::thread_scope_block> *)(dynamic_shared_mem + 1024);\nif (threadIdx.x == 0) init(&bar, 32);\n__syncthreads();\n"
        "if (threadIdx.x == 0) { cuda::device::experimental::cp_async_bulk_tensor_2d_global_to_shared(dynamic_shared_mem, &a, 32, 16, bar);\n"
        "  bar.wait(cuda::device::barrier_arrive_tx(bar, 1, 1024)); }\nelse bar.arrive_and_wait();\n"
        "if (threadIdx.x == 0) cuda::device::experimental::cp_async_bulk_tensor_2d_shared_to_global(&b, 32, 16, dynamic_shared_mem);\n}\n");
    void *parameters[] = {maps[0], maps[1]};
    call(driver, "cuLaunchKernel", f, 1u, 1u, 1u, 32u, 1u, 1u, 2048u, (Handle) nullptr, (void **)parameters, (void **)nullptr);
    bool good = true;
    for (unsigned r = 0; r < rows; r++)
        for (unsigned c = 0; c < columns; c++) {
            float got = target[r * columns + c];
            good &= r >= 16 && c >= 32 ? got == source[r * columns + c] : std::isnan(got);
        }
    check("tensor map, swizzle " + std::to_string(swizzle), good);
}

int main() {
    driver = dlopen("libcuda.so", RTLD_NOW);
    compiler = dlopen("libnvrtc.so", RTLD_NOW);
    if (!driver || !compiler) { fprintf(stderr, "%s\n", dlerror()); return 1; }
    call(driver, "cuInit", 0u);
    // Before any launch: a child has only the thread that forks.
    const string barrier = "cuda::barrier<cuda::thread_scope_block> &b = *(cuda::barrier<cuda::thread_scope_block> *)dynamic_shared_mem; int t = threadIdx.x;\n";
    reports("deadlock at __syncthreads and a barrier", "deadlock", kernel(barrier + "if (t == 0) init(&b, 2);\n__syncthreads();\nif (t == 0) b.arrive_and_wait(); else __syncthreads();"), 64);
    reports("divergent warp", "divergent warp", kernel("if (threadIdx.x < 16) out[0] = __shfl_sync(-1, 1.f, 0);\nelse __syncwarp();"), 32);
    reports("divergent __syncthreads", "different __syncthreads", kernel("if (threadIdx.x < 16) __syncthreads();\nelse\n__syncthreads();"), 32);
    reports("barrier without init", "before its initialisation", kernel(barrier + "b.arrive();"), 32);
    reports("too many arrivals", "arrivals at a barrier", kernel(barrier + "if (t == 0) { init(&b, 1); cuda::device::barrier_expect_tx(b, 4); b.arrive(); b.arrive(); }"), 32);
    reports("write past shared memory", "invalid or misaligned", kernel("dynamic_shared_mem[4096 + threadIdx.x] = 1;"), 32);
    reports("write far outside", "invalid or misaligned", kernel("out[1 << 28] = 1;"), 32);
    reports("matrix operation of half a warp", "does not exist", kernel("uint32 r; asm volatile(\"ldmatrix.sync.aligned.m8n8.x1.shared::cta.b16\" \" {%0}, [%1];\" : \"=r\"(r) : \"r\"(0u));"), 16);
    setenv("TERRARIUM_EMULATOR_CHECK", "1", 1);
    reports("misaligned vector", "misaligned", kernel("float4 v = *(float4 *)(dynamic_shared_mem + 4 * threadIdx.x);\nout[0] = v.x;"), 32);
    unsetenv("TERRARIUM_EMULATOR_CHECK");
    reports("unknown assembly", "does not know", kernel("asm volatile(\"wgmma.fence.sync.aligned;\" ::: \"memory\");"), 32);

    check_mma("bf16", "__nv_bfloat16", "f32", 2);
    check_mma("f16", "__half", "f32", 2);
    check_mma("tf32", "float", "f32", 4);
    check_mma("s8", "int8_t", "s32", 1);
    check_mma("u8", "uint8_t", "s32", 1);
    check_ldmatrix(false);
    check_ldmatrix(true);

    auto copied = run(kernel(barrier + "float *s = (float *)(dynamic_shared_mem + 16);\nif (t == 0) init(&b, 32);\n__syncthreads();\nout[t] = float(t);\n"
        "asm volatile(\"cp.async.ca.shared::cta.global [%0], [%1], %2, %2;\" :: \"r\"(16u + 4 * t), \"l\"((unsigned long long)(out + t)), \"n\"(4) : \"memory\");\n"
        "asm volatile(\"cp.async.mbarrier.arrive.shared::cta.b64 [%0];\" :: \"r\"(0u));\nauto token = b.arrive();\nout[32 + t] = s[t];\nb.wait(token);\nout[64 + t] = s[(t + 1) % 32];"), 32, 96);
    // The last thread to arrive may read at once.
    int early = 0;
    for (int t = 0; t < 32; t++) early += std::isnan(copied[32 + t]);
    bool good = true;
    for (int t = 0; t < 32; t++) good &= copied[64 + t] == float((t + 1) % 32);
    check("cp.async lands at its barrier", good && early == 31);

    check_tensor_map(0);
    check_tensor_map(3);

    auto spun = run(kernel("int *flag = (int *)dynamic_shared_mem; int t = threadIdx.x;\nif (t == 0) *flag = 0;\n__syncthreads();\nif (t == 40) while (atomicAdd(flag, 0) == 0) {}\nelse if (t == 63) atomicExch(flag, 1);\n__syncwarp();\nout[t] = 1;"), 64, 64);
    check("spinning threads", spun[40] == 1);

    auto fresh = run(kernel("out[0] = ((float *)dynamic_shared_mem)[threadIdx.x];"), 1, 2);
    check("fresh memory is NaN", std::isnan(fresh[0]) && std::isnan(fresh[1]));
    auto sums = run(kernel("float v = threadIdx.x;\nfor (int o = 1; o < 32; o *= 2) v += __shfl_xor_sync(-1, v, o);\nout[threadIdx.x] = v;\natomicAdd(&out[32], 0.f);"), 32, 33);
    check("shuffles", sums[0] == 496 && sums[31] == 496);
    return failures != 0;
}

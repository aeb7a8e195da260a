// The few functions of libcublasLt that matrix products take, on the memory of the emulated device: column-major operands of
// float32, bfloat16 or float16, sums in float32, a bias as the only epilogue. Stricter than the real one about what it is given.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <functional>
#include <immintrin.h>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Status { SUCCESS = 0, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };
enum Type { F32 = 0, F16 = 2, BF16 = 14 };

struct Call { int compute, scale; int32_t turned_a = 0, turned_b = 0, epilogue = 1; uint64_t bias = 0; };
struct Layout { int type; uint64_t rows, columns; int64_t pitch; };
struct Wishes { uint64_t workspace = 0; uint32_t alignment[4] = {256, 256, 256, 256}; };
struct Algorithm { uint64_t mark, workspace; uint32_t alignment[4]; uint64_t unused[4]; };
struct Found { Algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };
static_assert(sizeof(Algorithm) == 64);

const uint64_t MARK = 0x5445525241; // an algorithm comes from the heuristic

EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT int cublasLtCreate(void **handle) { *handle = new char; return SUCCESS; }
EXPORT int cublasLtDestroy(void *handle) { delete static_cast<char *>(handle); return SUCCESS; }

EXPORT int cublasLtMatmulDescCreate(Call **call, int compute, int scale) {
    const int float32 = 68;
    if (compute != float32 || scale != F32) return NOT_SUPPORTED;
    *call = new Call{compute, scale};
    return SUCCESS;
}
EXPORT int cublasLtMatmulDescDestroy(Call *call) { delete call; return SUCCESS; }
EXPORT int cublasLtMatmulDescSetAttribute(Call *call, int attribute, const void *value, size_t size) {
    void *field = attribute == 3 ? static_cast<void *>(&call->turned_a) : attribute == 4 ? &call->turned_b : attribute == 7 ? &call->epilogue
        : attribute == 8 ? static_cast<void *>(&call->bias) : nullptr;
    if (!field || size != (attribute == 8 ? 8 : 4)) return INVALID_VALUE;
    memcpy(field, value, size);
    return SUCCESS;
}

EXPORT int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns, int64_t pitch) {
    if ((type != F32 && type != F16 && type != BF16) || !rows || !columns || pitch < int64_t(rows)) return INVALID_VALUE;
    *layout = new Layout{type, rows, columns, pitch};
    return SUCCESS;
}
EXPORT int cublasLtMatrixLayoutDestroy(Layout *layout) { delete layout; return SUCCESS; }

EXPORT int cublasLtMatmulPreferenceCreate(Wishes **wishes) { *wishes = new Wishes; return SUCCESS; }
EXPORT int cublasLtMatmulPreferenceDestroy(Wishes *wishes) { delete wishes; return SUCCESS; }
EXPORT int cublasLtMatmulPreferenceSetAttribute(Wishes *wishes, int attribute, const void *value, size_t size) {
    if (attribute == 1 && size == 8) memcpy(&wishes->workspace, value, 8);
    else if (attribute >= 5 && attribute <= 8 && size == 4) memcpy(&wishes->alignment[attribute - 5], value, 4);
    else return INVALID_VALUE;
    return SUCCESS;
}

namespace {
// Rows and columns as multiplied.
uint64_t rows(const Layout *l, bool turned) { return turned ? l->columns : l->rows; }
uint64_t columns(const Layout *l, bool turned) { return turned ? l->rows : l->columns; }

bool fits(const Call *call, const Layout *a, const Layout *b, const Layout *c, const Layout *d) {
    return c == d && a->type == b->type && a->type == d->type && columns(a, call->turned_a) == rows(b, call->turned_b)
        && rows(a, call->turned_a) == d->rows && columns(b, call->turned_b) == d->columns && (call->epilogue == 1 || call->epilogue == 4);
}

float widen(const char *base, uint64_t at, int type) {
    if (type == F32) return reinterpret_cast<const float *>(base)[at];
    uint16_t bits = reinterpret_cast<const uint16_t *>(base)[at];
    if (type == F16) return _cvtsh_ss(bits);
    uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

void narrow(char *base, uint64_t at, int type, float value) {
    if (type == F32) { reinterpret_cast<float *>(base)[at] = value; return; }
    uint16_t bits = 0;
    if (type == F16) bits = _cvtss_sh(value, 0);
    else {
        uint32_t wide;
        memcpy(&wide, &value, 4);
        bits = value != value ? 0x7FC0 : uint16_t((wide + 0x7FFF + (wide >> 16 & 1)) >> 16);
    }
    reinterpret_cast<uint16_t *>(base)[at] = bits;
}

// The matrix as multiplied, by rows.
std::vector<float> read(const char *base, const Layout *l, bool turned) {
    uint64_t m = rows(l, turned), n = columns(l, turned);
    std::vector<float> values(m * n);
    for (uint64_t i = 0; i < m; i++)
        for (uint64_t j = 0; j < n; j++) values[i * n + j] = widen(base, turned ? i * l->pitch + j : j * l->pitch + i, l->type);
    return values;
}
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, Call *call, Layout *a, Layout *b, Layout *c, Layout *d, Wishes *wishes, int, Found *found, int *count) {
    *count = 0;
    if (!handle || !fits(call, a, b, c, d)) return INVALID_VALUE;
    Found best{};
    best.algorithm.mark = MARK;
    // Some want scratch memory, some none.
    best.workspace = best.algorithm.workspace = columns(a, call->turned_a) > 64 ? wishes->workspace : 0;
    memcpy(best.algorithm.alignment, wishes->alignment, sizeof wishes->alignment);
    *found = best;
    *count = 1;
    return SUCCESS;
}

namespace {
void multiply(const Call *call, const char *a, const Layout *la, const char *b, const Layout *lb, char *d, const Layout *ld, const Algorithm *algorithm, char *workspace) {
    if (algorithm->workspace) memset(workspace, 0xFF, algorithm->workspace);
    uint64_t m = ld->rows, n = ld->columns, k = columns(la, call->turned_a);
    std::vector<float> left = read(a, la, call->turned_a), right = read(b, lb, call->turned_b), sums(n);
    for (uint64_t i = 0; i < m; i++) {
        std::fill(sums.begin(), sums.end(), call->epilogue == 4 ? widen(reinterpret_cast<const char *>(call->bias), i, ld->type) : 0.0f);
        for (uint64_t l = 0; l < k; l++)
            for (uint64_t j = 0; j < n; j++) sums[j] += left[i * k + l] * right[l * n + j];
        for (uint64_t j = 0; j < n; j++) narrow(d, j * ld->pitch + i, ld->type, sums[j]);
    }
}
}

EXPORT int cublasLtMatmul(void *handle, Call *call, const float *alpha, const char *a, Layout *la, const char *b, Layout *lb, const float *beta,
                          const char *c, Layout *lc, char *d, Layout *ld, const Algorithm *algorithm, char *workspace, size_t size, void *stream) {
    if (!handle || !stream || !fits(call, la, lb, lc, ld) || !algorithm || algorithm->mark != MARK || *alpha != 1 || *beta != 0) return INVALID_VALUE;
    const char *places[] = {a, b, c, d};
    for (int i = 0; i < 4; i++)
        if (!places[i] || uint64_t(places[i]) % algorithm->alignment[i]) return INVALID_VALUE;
    if (size < algorithm->workspace || (call->epilogue == 4 && !call->bias)) return INVALID_VALUE;
    // Copies of all descriptions: a noted product runs later.
    std::function<void()> work = [=, call = *call, la = *la, lb = *lb, ld = *ld, algorithm = *algorithm] {
        multiply(&call, a, &la, b, &lb, d, &ld, &algorithm, workspace);
    };
    static void *driver = dlopen("libcuda.so", RTLD_NOW);
    auto note = reinterpret_cast<bool (*)(void *, std::function<void()> *)>(driver ? dlsym(driver, "emulator_note") : nullptr);
    if (!note || !note(stream, &work)) work();
    return SUCCESS;
}

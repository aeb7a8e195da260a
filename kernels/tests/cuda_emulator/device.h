// The device side of CUDA C++, as far as CubeCL emits it, for a CPU compiler.
// It stands for all CUDA headers; the emulator's NVRTC removes their #include lines.
#pragma once
#include "runtime.h"

#include <immintrin.h>

#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <math.h>
#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__

// The driver sets it when it loads the library.
extern "C" __attribute__((visibility("default"))) const __emu::Api *__emu_api;
// Kernels shadow it by a reference to their thread's line.
static int __emu_line;
constexpr int warpSize = 32;

// ---------------------------------------------------------------- vectors

#define __EMU_VECTORS(T, name) \
    struct name##1 { T x; }; \
    struct __align__(2 * sizeof(T)) name##2 { T x, y; }; \
    struct name##3 { T x, y, z; }; \
    struct __align__(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
__EMU_VECTORS(float, float) __EMU_VECTORS(double, double)
__EMU_VECTORS(signed char, char) __EMU_VECTORS(unsigned char, uchar)
__EMU_VECTORS(short, short) __EMU_VECTORS(unsigned short, ushort)
__EMU_VECTORS(int, int) __EMU_VECTORS(unsigned, uint)
__EMU_VECTORS(long long, longlong) __EMU_VECTORS(unsigned long long, ulonglong)
#undef __EMU_VECTORS
struct dim3 { unsigned x = 1, y = 1, z = 1; };

// ---------------------------------------------------------------- 16-bit floats

namespace __emu {

template <class To, class From> inline To bit_cast(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    memcpy(&out, &v, sizeof out);
    return out;
}

struct F16 {
    static float decode(uint16_t b) { return _cvtsh_ss(b); }
    static uint16_t encode(float f) { return _cvtss_sh(f, 0); }
};
struct Bf16 {
    static float decode(uint16_t b) { return bit_cast<float>(unsigned(b) << 16); }
    static uint16_t encode(float f) {
        unsigned b = bit_cast<unsigned>(f);
        if ((b & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
        return uint16_t((b + 0x7FFF + (b >> 16 & 1)) >> 16);  // to nearest, ties to even
    }
};

template <class C> struct Small {
    uint16_t bits;
    Small() = default;
    Small(float f) : bits(C::encode(f)) {}
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>> Small(T v) : bits(C::encode(float(v))) {}
    operator float() const { return C::decode(bits); }
    Small &operator+=(Small o) { return *this = *this + o; }
    Small &operator-=(Small o) { return *this = *this - o; }
    Small &operator*=(Small o) { return *this = *this * o; }
    Small &operator/=(Small o) { return *this = *this / o; }
    friend Small operator+(Small a, Small b) { return float(a) + float(b); }
    friend Small operator-(Small a, Small b) { return float(a) - float(b); }
    friend Small operator*(Small a, Small b) { return float(a) * float(b); }
    friend Small operator/(Small a, Small b) { return float(a) / float(b); }
    friend Small operator-(Small a) { a.bits ^= 0x8000; return a; }
};

template <class C> struct __align__(4) Pair {
    Small<C> x, y;
    Pair() = default;
    Pair(Small<C> a, Small<C> b) : x(a), y(b) {}
    explicit Pair(Small<C> a) : x(a), y(a) {}
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>> explicit Pair(T a) : x(a), y(a) {}
    Pair &operator+=(Pair o) { return *this = *this + o; }
    Pair &operator-=(Pair o) { return *this = *this - o; }
    Pair &operator*=(Pair o) { return *this = *this * o; }
    Pair &operator/=(Pair o) { return *this = *this / o; }
    friend Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
    friend Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }
    friend Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
    friend Pair operator/(Pair a, Pair b) { return {a.x / b.x, a.y / b.y}; }
    friend Pair operator-(Pair a) { return {-a.x, -a.y}; }
};

}  // namespace __emu

using __half = __emu::Small<__emu::F16>;
using __nv_bfloat16 = __emu::Small<__emu::Bf16>;
using __half2 = __emu::Pair<__emu::F16>;
using __nv_bfloat162 = __emu::Pair<__emu::Bf16>;
using half = __half;
using half2 = __half2;

#define __EMU_UNARY(name, expression) \
    template <class C> inline __emu::Small<C> h##name(__emu::Small<C> a) { float v = a; return __emu::Small<C>(float(expression)); } \
    template <class C> inline __emu::Pair<C> h2##name(__emu::Pair<C> a) { return {h##name(a.x), h##name(a.y)}; }
__EMU_UNARY(exp, expf(v)) __EMU_UNARY(exp2, exp2f(v)) __EMU_UNARY(log, logf(v)) __EMU_UNARY(log2, log2f(v))
__EMU_UNARY(sin, sinf(v)) __EMU_UNARY(cos, cosf(v)) __EMU_UNARY(tanh, tanhf(v))
__EMU_UNARY(sqrt, sqrtf(v)) __EMU_UNARY(rsqrt, 1.f / sqrtf(v)) __EMU_UNARY(rcp, 1.f / v)
__EMU_UNARY(ceil, ceilf(v)) __EMU_UNARY(floor, floorf(v)) __EMU_UNARY(trunc, truncf(v)) __EMU_UNARY(rint, rintf(v))
#undef __EMU_UNARY

template <class C> inline __emu::Small<C> __hmax(__emu::Small<C> a, __emu::Small<C> b) { return fmaxf(a, b); }
template <class C> inline __emu::Small<C> __hmin(__emu::Small<C> a, __emu::Small<C> b) { return fminf(a, b); }
template <class C> inline __emu::Pair<C> __hmax2(__emu::Pair<C> a, __emu::Pair<C> b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
template <class C> inline __emu::Pair<C> __hmin2(__emu::Pair<C> a, __emu::Pair<C> b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
template <class C> inline __emu::Small<C> __habs(__emu::Small<C> a) { a.bits &= 0x7FFF; return a; }
template <class C> inline bool __hisnan(__emu::Small<C> a) { return std::isnan(float(a)); }
template <class C> inline bool __hisinf(__emu::Small<C> a) { return std::isinf(float(a)); }
template <class C> inline __emu::Pair<C> __h2isnan(__emu::Pair<C> a) { return {float(__hisnan(a.x)), float(__hisnan(a.y))}; }
template <class C> inline __emu::Pair<C> __h2isinf(__emu::Pair<C> a) { return {float(__hisinf(a.x)), float(__hisinf(a.y))}; }
template <class C> inline __emu::Small<C> fma(__emu::Small<C> a, __emu::Small<C> b, __emu::Small<C> c) { return fmaf(a, b, c); }
template <class C> inline __emu::Small<C> __hfma(__emu::Small<C> a, __emu::Small<C> b, __emu::Small<C> c) { return fmaf(a, b, c); }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline float __half2float(__half a) { return a; }
inline __nv_bfloat16 __float2bfloat16(float a) { return a; }
inline __half __float2half(float a) { return a; }

// ---------------------------------------------------------------- arithmetic

namespace __emu {
template <class A, class B> using Common = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>>;
}
template <class A, class B> inline __emu::Common<A, B> max(A a, B b) {
    using T = __emu::Common<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
    else return T(a) > T(b) ? T(a) : T(b);
}
template <class A, class B> inline __emu::Common<A, B> min(A a, B b) {
    using T = __emu::Common<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
    else return T(a) < T(b) ? T(a) : T(b);
}
inline unsigned abs(unsigned a) { return a; }
inline unsigned long long abs(unsigned long long a) { return a; }

inline float rsqrt(float a) { return 1.f / sqrtf(a); }
inline double rsqrt(double a) { return 1. / ::sqrt(a); }
inline float rsqrtf(float a) { return rsqrt(a); }
inline float rhypotf(float a, float b) { return 1.f / hypotf(a, b); }
inline double rhypot(double a, double b) { return 1. / ::hypot(a, b); }
inline float __expf(float a) { return expf(a); }
inline float __exp10f(float a) { return powf(10.f, a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __tanf(float a) { return tanf(a); }
inline float __tanhf(float a) { return tanhf(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return 1.f / sqrtf(a); }

inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline int __clz(int a) { return a ? __builtin_clz(a) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll(a) : 64; }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline unsigned long long __brevll(unsigned long long a) {
    unsigned long long r = 0;
    for (int i = 0; i < 64; i++) r |= (a >> i & 1) << (63 - i);
    return r;
}
inline unsigned __brev(unsigned a) { return unsigned(__brevll(a) >> 32); }
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline long long __mul64hi(long long a, long long b) { return (long long)((__int128)a * b >> 64); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)((unsigned __int128)a * b >> 64); }

// ---------------------------------------------------------------- threads, warps, blocks

namespace __emu {

inline void sync_warp(unsigned mask) {
    __emu_api->collective("__syncwarp", mask, &mask, [](void **, const void *) {}, nullptr);
}

// Values travel as 64 bits; larger ones in parts.
template <class T> T shuffle(Shuffle kind, unsigned mask, T value, unsigned argument, unsigned width) {
    static_assert(std::is_trivially_copyable_v<T>);
    uint64_t parts[(sizeof(T) + 7) / 8] = {};
    memcpy(parts, &value, sizeof value);
    for (auto &part : parts) part = __emu_api->shuffle(kind, mask, part, argument, width);
    memcpy(&value, parts, sizeof value);
    return value;
}
inline int vote_threads(int predicate, int kind) {
    int any, count = __emu_api->vote_threads(kind == 1 ? !predicate : predicate, &any);
    return kind == 0 ? count : kind == 1 ? !any : any;
}

}  // namespace __emu

#define __EMU_AT (__emu_line = __LINE__)
#define __syncthreads() (__EMU_AT, __emu_api->sync_threads())
#define __syncthreads_count(p) (__EMU_AT, __emu::vote_threads(p, 0))
#define __syncthreads_and(p) (__EMU_AT, __emu::vote_threads(p, 1))
#define __syncthreads_or(p) (__EMU_AT, __emu::vote_threads(p, 2))
#define __EMU_FIRST(mask, ...) mask
#define __syncwarp(...) (__EMU_AT, __emu::sync_warp(__EMU_FIRST(__VA_ARGS__ __VA_OPT__(,) ~0u)))
#define __EMU_WIDTH(a, width, ...) width
#define __EMU_SHUFFLE(kind, mask, value, ...) \
    (__EMU_AT, __emu::shuffle(__emu::Shuffle::kind, mask, value, __EMU_FIRST(__VA_ARGS__), __EMU_WIDTH(__VA_ARGS__, 32, 0)))
#define __shfl_sync(mask, value, ...) __EMU_SHUFFLE(index, mask, value, __VA_ARGS__)
#define __shfl_xor_sync(mask, value, ...) __EMU_SHUFFLE(bit_xor, mask, value, __VA_ARGS__)
#define __shfl_up_sync(mask, value, ...) __EMU_SHUFFLE(up, mask, value, __VA_ARGS__)
#define __shfl_down_sync(mask, value, ...) __EMU_SHUFFLE(down, mask, value, __VA_ARGS__)
#define __ballot_sync(mask, p) (__EMU_AT, __emu_api->ballot(mask, bool(p)))
#define __any_sync(mask, p) (__EMU_AT, __emu_api->ballot(mask, bool(p)) != 0)
#define __all_sync(mask, p) (__EMU_AT, __emu_api->ballot(mask, !bool(p)) == 0)
inline unsigned __activemask() { return __emu_api->active_mask(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}
inline void __threadfence_system() { __threadfence(); }
inline void __nanosleep(unsigned) { __emu_api->pause(); }

// Shared addresses are offsets into the block's memory.
inline size_t __cvta_generic_to_shared(const void *p) { return size_t((const unsigned char *)p - __emu_api->self()->shared); }

// ---------------------------------------------------------------- atomics

namespace __emu {

template <size_t N> struct Word;
template <> struct Word<1> { using T = uint8_t; };
template <> struct Word<2> { using T = uint16_t; };
template <> struct Word<4> { using T = uint32_t; };
template <> struct Word<8> { using T = uint64_t; };

template <class T, class F> T update(T *p, F f) {
    // Loops that wait for another thread do it by atomics.
    static thread_local unsigned count;
    if (++count % 64 == 0) __emu_api->pause();
    using W = typename Word<sizeof(T)>::T;
    auto word = (W *)p;
    W old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(word, &old, bit_cast<W>(T(f(bit_cast<T>(old)))), false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {}
    return bit_cast<T>(old);
}

}  // namespace __emu

#define __EMU_ATOMIC(name, expression) \
    template <class T, class V> inline T name(T *p, V value) { T v = T(value); return __emu::update(p, [&](T o) { return T(expression); }); }
__EMU_ATOMIC(atomicAdd, o + v) __EMU_ATOMIC(atomicSub, o - v) __EMU_ATOMIC(atomicExch, (void(o), v))
__EMU_ATOMIC(atomicMax, o > v ? o : v) __EMU_ATOMIC(atomicMin, o < v ? o : v)
__EMU_ATOMIC(atomicAnd, o & v) __EMU_ATOMIC(atomicOr, o | v) __EMU_ATOMIC(atomicXor, o ^ v)
#undef __EMU_ATOMIC
template <class T, class A, class B> inline T atomicCAS(T *p, A expected, B value) {
    return __emu::update(p, [&](T o) { return o == T(expected) ? T(value) : o; });
}
// Vectors are atomic by element, as on a GPU.
inline float2 atomicAdd(float2 *p, float2 v) { return {atomicAdd(&p->x, v.x), atomicAdd(&p->y, v.y)}; }
inline float4 atomicAdd(float4 *p, float4 v) { return {atomicAdd(&p->x, v.x), atomicAdd(&p->y, v.y), atomicAdd(&p->z, v.z), atomicAdd(&p->w, v.w)}; }

// ---------------------------------------------------------------- what inline assembly becomes

namespace __emu {

template <class T> unsigned bits(const T &v) { static_assert(sizeof(T) == 4); return bit_cast<unsigned>(v); }
template <class T> unsigned *word(T &v) { static_assert(sizeof(T) == 4); return (unsigned *)&v; }

inline void ldmatrix(int count, bool transpose, unsigned **out, const unsigned *in) { __emu_api->ldmatrix(count, transpose, out, in[0]); }
inline void stmatrix(int count, bool transpose, unsigned **, const unsigned *in) { __emu_api->stmatrix(count, transpose, in + 1, in[0]); }
inline void mma(Type cd, Type a, Type b, int k, unsigned **out, const unsigned *in) { __emu_api->mma(cd, a, b, k, out, in); }

inline void cp_async(unsigned shared, uint64_t global, int size) { __emu_api->cp_async(shared, (const void *)global, size, size); }
inline void cp_async(unsigned shared, uint64_t global, int size, int source_size) { __emu_api->cp_async(shared, (const void *)global, size, source_size); }
inline void *shared_pointer(unsigned address) { return __emu_api->self()->shared + address; }

inline int saturate(long long v) { return v > INT_MAX ? INT_MAX : v < INT_MIN ? INT_MIN : int(v); }
inline int add_saturated(int a, int b) { return saturate((long long)a + b); }
inline int sub_saturated(int a, int b) { return saturate((long long)a - b); }
inline unsigned elect() {
    unsigned alive = __emu_api->ballot(~0u, 1);
    return __emu_api->self()->lane == unsigned(__builtin_ctz(alive));
}

}  // namespace __emu

// ---------------------------------------------------------------- barriers and asynchronous copies

namespace cooperative_groups {
struct thread_block {
    static unsigned size() { auto &d = __emu_api->self()->block_dim; return d.x * d.y * d.z; }
    static unsigned thread_rank() { return __emu_api->self()->rank; }
    static void sync() { __emu_api->sync_threads(); }
};
struct thread { static unsigned size() { return 1; } static unsigned thread_rank() { return 0; } };
inline thread_block this_thread_block() { return {}; }
inline thread this_thread() { return {}; }
// Clusters have one block.
struct cluster_group {
    static unsigned block_rank() { return 0; }
    static dim3 block_index() { return {0, 0, 0}; }
    static void sync() { __emu_api->sync_threads(); }
};
inline cluster_group this_cluster() { return {}; }
template <class G, class T, class S> void memcpy_async(const G &group, T *target, S *source, size_t size) {
    if (group.thread_rank() == 0) memcpy((void *)target, (const void *)source, size);
}
inline void wait(thread) {}
inline void wait(thread_block g) { g.sync(); }
}  // namespace cooperative_groups

namespace cuda {
enum thread_scope { thread_scope_system, thread_scope_device, thread_scope_block, thread_scope_thread };

template <thread_scope S> class barrier {
    uint64_t state;
    friend void init(barrier *b, int count) { __emu_api->barrier_init(b, count); }
public:
    struct arrival_token { unsigned phase; };
    arrival_token arrive(int count = 1) { return {__emu_api->barrier_arrive(this, count, 0)}; }
    void wait(arrival_token token) { __emu_api->barrier_wait(this, token.phase); }
    void wait_parity(bool phase) { __emu_api->barrier_wait(this, phase); }
    void arrive_and_wait() { wait(arrive()); }
};

template <class T, class F, thread_scope S> void memcpy_async(T *target, F *source, size_t size, barrier<S> &b) {
    __emu_api->barrier_copy(&b, (void *)target, (const void *)source, size, false);
}
// All threads call it; one copies for them.
template <class G, class T, class F, thread_scope S> void memcpy_async(const G &group, T *target, F *source, size_t size, barrier<S> &b) {
    if (group.thread_rank() == 0) memcpy_async(target, source, size, b);
}

namespace device {
template <thread_scope S> unsigned long long *barrier_native_handle(barrier<S> &b) { return (unsigned long long *)&b; }
template <thread_scope S> typename barrier<S>::arrival_token barrier_arrive_tx(barrier<S> &b, int count, int bytes) {
    return {__emu_api->barrier_arrive(&b, count, bytes)};
}
template <thread_scope S> void barrier_expect_tx(barrier<S> &b, int bytes) { __emu_api->barrier_expect(&b, bytes); }
template <class T, class F, thread_scope S> void memcpy_async_tx(T *target, F *source, size_t size, barrier<S> &b) {
    __emu_api->barrier_copy(&b, (void *)target, (const void *)source, size, true);
}

namespace experimental {
inline void fence_proxy_async_shared_cta() {}
inline void cp_async_bulk_commit_group() {}
template <int N> void cp_async_bulk_wait_group() {}
template <int N> void cp_async_bulk_wait_group_read() {}
// Stores happen at once.
#define __EMU_TENSOR(rank, parameters, ...) \
    template <thread_scope S> void cp_async_bulk_tensor_##rank##d_global_to_shared(void *target, const void *map, parameters, barrier<S> &b) { \
        int at[] = {__VA_ARGS__}; __emu_api->tensor_load(&b, target, map, at, rank); } \
    inline void cp_async_bulk_tensor_##rank##d_shared_to_global(const void *map, parameters, const void *source) { \
        int at[] = {__VA_ARGS__}; __emu_api->tensor_store(source, map, at, rank); }
#define __EMU_COMMA ,
__EMU_TENSOR(1, int a, a)
__EMU_TENSOR(2, int a __EMU_COMMA int b0, a, b0)
__EMU_TENSOR(3, int a __EMU_COMMA int b0 __EMU_COMMA int c, a, b0, c)
__EMU_TENSOR(4, int a __EMU_COMMA int b0 __EMU_COMMA int c __EMU_COMMA int d, a, b0, c, d)
__EMU_TENSOR(5, int a __EMU_COMMA int b0 __EMU_COMMA int c __EMU_COMMA int d __EMU_COMMA int e, a, b0, c, d, e)
#undef __EMU_TENSOR
#undef __EMU_COMMA
}  // namespace experimental
}  // namespace device
}  // namespace cuda

// ---------------------------------------------------------------- warp matrices (wmma)

namespace nvcuda::wmma {
inline float __float_to_tf32(float v) {  // to nearest, ties away from zero
    return __emu::bit_cast<float>((__emu::bit_cast<unsigned>(v) + 0x1000) & 0xFFFFE000);
}
struct matrix_a; struct matrix_b; struct accumulator; struct row_major; struct col_major;
namespace precision { struct tf32; }
enum layout_t { mem_row_major, mem_col_major };
template <class T> struct Storage { using Type = T; };
template <> struct Storage<precision::tf32> { using Type = float; };

// Which elements a lane holds is not part of the interface: here, N neighbours of the row-major matrix.
template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    using Element = typename Storage<T>::Type;
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M, columns = std::is_same_v<Use, matrix_a> ? K : N;
    static constexpr int num_elements = rows * columns / 32;
    Element x[num_elements];
};

template <class F> void fill_fragment(F &f, typename F::Element v) { for (auto &e : f.x) e = v; }

inline size_t at(int row, int column, unsigned stride, bool by_column) {
    return by_column ? size_t(column) * stride + row : size_t(row) * stride + column;
}
template <class F, class P> void load(F &f, const P *p, unsigned stride, bool by_column) {
    __emu::sync_warp(~0u);
    unsigned first = __emu_api->self()->lane * F::num_elements;
    for (int i = 0; i < F::num_elements; i++) f.x[i] = typename F::Element(p[at((first + i) / F::columns, (first + i) % F::columns, stride, by_column)]);
}
template <class Use, int M, int N, int K, class T, class L, class P>
void load_matrix_sync(fragment<Use, M, N, K, T, L> &f, const P *p, unsigned stride) { load(f, p, stride, std::is_same_v<L, col_major>); }
template <class F, class P> void load_matrix_sync(F &f, const P *p, unsigned stride, layout_t layout) { load(f, p, stride, layout == mem_col_major); }
template <class F, class P> void store_matrix_sync(P *p, const F &f, unsigned stride, layout_t layout) {
    __emu::sync_warp(~0u);
    unsigned first = __emu_api->self()->lane * F::num_elements;
    for (int i = 0; i < F::num_elements; i++) p[at((first + i) / F::columns, (first + i) % F::columns, stride, layout == mem_col_major)] = f.x[i];
    __emu::sync_warp(~0u);
}

template <class D, class A, class B, class C> struct Operands { D *d; const A *a; const B *b; const C *c; };
template <class T> using Sum = std::conditional_t<std::is_same_v<T, int>, int, float>;

template <class D, class A, class B, class C> void compute_mma(void **operand, const void *) {
    constexpr int M = A::rows, K = A::columns, N = B::columns;
    using S = Sum<typename C::Element>;
    auto lanes = (Operands<D, A, B, C> **)operand;
    S a[M * K], b[K * N], sum[M * N];
    for (int l = 0; l < 32; l++) {
        if (!lanes[l]) return __emu_api->fail("wmma: a lane of the warp does not exist or has finished");
        for (int i = 0; i < A::num_elements; i++) a[l * A::num_elements + i] = S(lanes[l]->a->x[i]);
        for (int i = 0; i < B::num_elements; i++) b[l * B::num_elements + i] = S(lanes[l]->b->x[i]);
        for (int i = 0; i < C::num_elements; i++) sum[l * C::num_elements + i] = S(lanes[l]->c->x[i]);
    }
    for (int m = 0; m < M; m++)
        for (int k = 0; k < K; k++)
            for (int n = 0; n < N; n++) sum[m * N + n] += a[m * K + k] * b[k * N + n];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < D::num_elements; i++) lanes[l]->d->x[i] = typename D::Element(sum[l * D::num_elements + i]);
}
template <class D, class A, class B, class C> void mma_sync(D &d, const A &a, const B &b, const C &c) {
    Operands<D, A, B, C> o{&d, &a, &b, &c};
    __emu_api->collective("wmma::mma_sync", ~0u, &o, compute_mma<D, A, B, C>, nullptr);
}
}  // namespace nvcuda::wmma

// ---------------------------------------------------------------- launches

namespace __emu {
template <class... P, size_t... I> void call(void (*kernel)(P...), void **parameters, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<P> *)parameters[I]...);
}
template <class... P> void launch(void (*kernel)(P...), void **parameters) { call(kernel, parameters, std::index_sequence_for<P...>()); }
template <class... P> void sizes(void (*)(P...), void (*each)(void *, size_t), void *to) { (each(to, sizeof(std::remove_reference_t<P>)), ...); }
}

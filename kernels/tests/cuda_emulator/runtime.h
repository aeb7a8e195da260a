// What compiled kernels and the driver share: who a thread is, and the calls a thread makes to
// the driver. The driver hands its table of functions to every kernel library that it loads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace __emu {

struct Dim3 { unsigned x, y, z; };

// One running device thread. `line` is the source line of its latest collective operation.
struct Thread {
    Dim3 thread_idx, block_idx, block_dim, grid_dim;
    unsigned lane;          // in its warp
    unsigned rank;          // in its block
    int line;
    unsigned char *shared;  // the block's dynamic shared memory
    const unsigned *offsets;  // where its pieces start
};

enum class Type : int { f32, f16, bf16, tf32, f64, s8, u8, s32, e4m3, e5m2, e3m2, e2m3, e2m1 };
enum class Shuffle : int { index, bit_xor, up, down };

// Computes a warp operation once all lanes arrived; `operand[i]` is null for absent lanes.
using Compute = void (*)(void **operand, const void *context);

struct Api {
    Thread *(*self)();
    void (*fail)(const char *message);
    void (*pause)();
    void (*keep_in_step)();
    void (*sync_threads)();
    int (*vote_threads)(int predicate, int *any);  // how many threads of the block say yes
    void (*collective)(const char *name, unsigned mask, void *operand, Compute compute, const void *context);
    unsigned (*active_mask)();
    uint64_t (*shuffle)(Shuffle kind, unsigned mask, uint64_t value, unsigned argument, unsigned width);
    unsigned (*ballot)(unsigned mask, int predicate);
    void (*ldmatrix)(int count, bool transpose, unsigned *out[], unsigned address);
    void (*stmatrix)(int count, bool transpose, const unsigned *in, unsigned address);
    void (*mma)(Type cd, Type a, Type b, int k, unsigned *d[], const unsigned *abc);
    void (*cp_async)(unsigned shared_address, const void *source, int size, int source_size);
    void (*cp_async_arrive)(void *barrier, bool counted);
    void (*cp_async_wait)(int groups_left);
    void (*cp_async_commit)();
    void (*barrier_init)(void *barrier, int count);
    unsigned (*barrier_arrive)(void *barrier, int count, int transaction);  // gives the phase
    void (*barrier_wait)(void *barrier, unsigned phase);
    void (*barrier_expect)(void *barrier, int transaction);
    void (*barrier_copy)(void *barrier, void *target, const void *source, size_t size, bool transaction);
    void (*tensor_load)(void *barrier, void *target, const void *map, const int *coordinates, int rank);
    void (*tensor_store)(const void *source, const void *map, const int *coordinates, int rank);
};

}  // namespace __emu

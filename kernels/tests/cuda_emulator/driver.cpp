// A CUDA driver that runs kernels on the CPU: the subset of libcuda that CubeCL uses.
// A block runs on one operating-system thread; its device threads are fibers that switch at
// barriers and warp operations. See README.md.
#include "runtime.h"

#include <dlfcn.h>
#include <immintrin.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

using namespace __emu;

namespace {

constexpr size_t STACK = 256 << 10, PAGE = 4096, SHARED_LIMIT = 232448;
constexpr unsigned WARP = 32, MAX_THREADS = 1024;

long setting(const char *name, long fallback) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : fallback;
}
const long GUARD = setting("TERRARIUM_EMULATOR_GUARD", 0);
const long TRACE = setting("TERRARIUM_EMULATOR_TRACE", 0);
const long LATE = setting("TERRARIUM_EMULATOR_LATE", 0);
// How ready threads are picked: 0 in turn, -1 latest first, any other number seeds a random order.
const long ORDER = setting("TERRARIUM_EMULATOR_ORDER", 0);
const long SM = setting("TERRARIUM_EMULATOR_SM", 90);
const long MEMORY = setting("TERRARIUM_EMULATOR_MEMORY_GB", 16);
const int DEVICES = setting("TERRARIUM_EMULATOR_DEVICES", 2);

// ---------------------------------------------------------------- kernels and launches

struct Module { void *library; std::string source; std::vector<unsigned> offsets; };
struct Function {
    std::string name, source;
    std::vector<unsigned> offsets;
    void (*entry)(void **parameters);
    std::vector<size_t> sizes;  // of the parameters
    int dynamic_shared;
};
struct Launch {
    const Function *function;
    Dim3 grid, block;
    size_t shared;
    void **parameters;
};

// ---------------------------------------------------------------- fibers

struct Copy { unsigned char *target; const unsigned char *source; size_t size, source_size; bool transaction; };

#include "tensor_map.h"

struct Fiber {
    void *stack_pointer;
    unsigned char *stack;
    Thread thread;
    const char *waits_for;   // null while it can run
    void *waits_at;          // the memory barrier that it waits for
    bool done;
    std::vector<std::vector<Copy>> groups;  // cp.async groups; the last one is still open
};

struct Warp {
    unsigned alive, arrived, mask;
    unsigned in_step;  // lanes that wait for the others to stop, too
    int line;
    const char *name;
    Compute compute;
    const void *context;
    void *operand[WARP];
};

// The 8 bytes of a barrier in shared memory.
struct Barrier {
    int32_t transactions;
    uint16_t pending;
    uint16_t expected : 15, phase : 1;
};
static_assert(sizeof(Barrier) == 8);
// Asynchronous copies land only when the phase that they belong to ends: reading earlier shows.
struct Pending { std::vector<Copy> copies; std::vector<Box> boxes; };

struct Worker {
    void *scheduler;                 // stack pointer of the scheduler
    Fiber *current;
    std::vector<Fiber> fibers;
    std::vector<Fiber *> ready;      // a ring
    size_t head, count;
    std::vector<Warp> warps;
    unsigned threads, alive, at_barrier, votes;
    unsigned last_votes;
    std::unordered_map<void *, Pending> barriers;
    unsigned char *shared_map, *shared;
    const Launch *launch;
    uint64_t random;
};
__attribute__((tls_model("initial-exec"))) thread_local Worker *worker;

extern "C" void emu_switch(void **save, void *load);
asm(R"(
.text
.type emu_switch,@function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

// ---------------------------------------------------------------- reports

std::mutex report_lock;

void describe_threads() {
    // Thread ranges that wait for the same thing at the same line share a row.
    std::map<std::pair<std::string, int>, std::vector<unsigned>> rows;
    for (unsigned i = 0; i < worker->threads; i++) {
        Fiber &f = worker->fibers[i];
        std::string what = f.done ? "finished" : f.waits_for ? f.waits_for : &f == worker->current ? "running" : "ready to run";
        rows[{what, f.done ? 0 : f.thread.line}].push_back(i);
    }
    for (auto &[key, threads] : rows) {
        fprintf(stderr, "  threads");
        for (size_t i = 0; i < threads.size();) {
            size_t j = i;
            while (j + 1 < threads.size() && threads[j + 1] == threads[j] + 1) j++;
            if (i == j) fprintf(stderr, " %u", threads[i]);
            else fprintf(stderr, " %u-%u", threads[i], threads[j]);
            i = j + 1;
        }
        fprintf(stderr, ": %s", key.first.c_str());
        if (key.second) fprintf(stderr, " (line %d)", key.second);
        fprintf(stderr, "\n");
    }
}

void describe() {
    if (!worker || !worker->launch) return;
    const Launch &l = *worker->launch;
    Dim3 b = worker->threads ? worker->fibers[0].thread.block_idx : Dim3{};
    fprintf(stderr, "  kernel %s, block (%u, %u, %u) of (%u, %u, %u), %u threads, %zu bytes of shared memory\n  source %s\n",
            l.function->name.c_str(), b.x, b.y, b.z, l.grid.x, l.grid.y, l.grid.z, worker->threads, l.shared,
            l.function->source.c_str());
    if (worker->current)
        fprintf(stderr, "  in thread %u (warp %u, lane %u), after line %d\n", worker->current->thread.rank,
                worker->current->thread.rank / WARP, worker->current->thread.lane, worker->current->thread.line);
    describe_threads();
}

[[noreturn]] void failf(const char *format, ...) {
    std::lock_guard lock(report_lock);
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "\nCUDA emulator: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    describe();
    fflush(stdout);
    _exit(134);
}
void fail(const char *message) { failf("%s", message); }

struct Signal { int number; const char *meaning; struct sigaction old; };
Signal signals[] = {{SIGSEGV, "invalid or misaligned memory access", {}},
                    {SIGBUS, "invalid memory access", {}},
                    {SIGFPE, "integer division by zero", {}},
                    {SIGILL, "misaligned access, or a cast or shift out of range", {}}};

void on_signal(int number, siginfo_t *info, void *context) {
    Signal &s = *std::find_if(std::begin(signals), std::end(signals), [=](Signal &s) { return s.number == number; });
    if (worker && worker->launch) {
        report_lock.lock();  // for good
        // Freed memory and the end of a stack look the same from here.
        fprintf(stderr, "\nCUDA emulator: %s (address %p)\n", s.meaning, info->si_addr);
        describe();
        _exit(134);
    }
    if (s.old.sa_flags & SA_SIGINFO) return s.old.sa_sigaction(number, info, context);
    if (s.old.sa_handler == SIG_IGN) return;
    if (s.old.sa_handler != SIG_DFL) return s.old.sa_handler(number);
    signal(number, SIG_DFL);
    raise(number);
}

void catch_signals() {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (Signal &s : signals) sigaction(s.number, &action, &s.old);
}

// ---------------------------------------------------------------- scheduling

uint64_t next_random() {
    uint64_t &s = worker->random;
    s ^= s << 13; s ^= s >> 7; s ^= s << 17;
    return s;
}

void push_ready(Fiber *f) {
    f->waits_for = nullptr;
    f->waits_at = nullptr;
    worker->ready[(worker->head + worker->count++) % MAX_THREADS] = f;
}

Fiber *pop_ready() {
    if (!worker->count) return nullptr;
    auto at = [](size_t i) -> Fiber *& { return worker->ready[(worker->head + i) % MAX_THREADS]; };
    worker->count--;
    if (ORDER == 0) {
        Fiber *f = at(0);
        worker->head = (worker->head + 1) % MAX_THREADS;
        return f;
    }
    if (ORDER > 0) std::swap(at(next_random() % (worker->count + 1)), at(worker->count));
    return at(worker->count);
}

void switch_to_next() {
    Fiber *from = worker->current, *to = pop_ready();
    if (to == from) return;
    worker->current = to;
    emu_switch(&from->stack_pointer, to ? to->stack_pointer : worker->scheduler);
}

// Once every lane waits for something, those that keep in step go on.
void release_in_step(Warp &w) {
    Fiber *first = &worker->fibers[(&w - worker->warps.data()) * WARP];
    for (unsigned i = 0; i < WARP; i++) if (w.alive >> i & 1 && !first[i].waits_for) return;
    unsigned lanes = w.in_step;
    w.in_step = 0;
    for (unsigned i = 0; i < WARP; i++) if (lanes >> i & 1) push_ready(&first[i]);
}

// Runs another thread; comes back when this one is ready again.
void give_way(const char *reason, void *at = nullptr) {
    Fiber *from = worker->current;
    from->waits_for = reason;
    from->waits_at = at;
    Warp &w = worker->warps[from->thread.rank / WARP];
    if (w.in_step) release_in_step(w);
    switch_to_next();
}

// A GPU mostly runs a warp in step, and some kernels depend on it.
void keep_in_step() {
    Thread &t = worker->current->thread;
    worker->warps[t.rank / WARP].in_step |= 1u << t.lane;
    give_way("the other lanes, to keep in step");
}

// Lets the others run, for threads that spin.
void pause() {
    if (!worker->count) return;
    push_ready(worker->current);
    switch_to_next();
}

void finish_warp_operation(Warp &w) {
    w.compute(w.operand, w.context);
    unsigned arrived = w.arrived;
    w.arrived = 0;
    Fiber *first = &worker->fibers[(&w - worker->warps.data()) * WARP];
    for (unsigned i = 0; i < WARP; i++)
        if (arrived >> i & 1 && &first[i] != worker->current) push_ready(&first[i]);
}

void release_block() {
    for (unsigned i = 0; i < worker->threads; i += WARP) {
        int line = 0;
        for (unsigned j = i; j < std::min(i + WARP, worker->threads); j++) {
            Fiber &f = worker->fibers[j];
            if (f.done) continue;
            if (line && f.thread.line != line) failf("lanes of warp %u meet at different __syncthreads", i / WARP);
            line = f.thread.line;
        }
    }
    worker->at_barrier = 0;
    worker->last_votes = worker->votes;
    worker->votes = 0;
    for (unsigned i = 0; i < worker->threads; i++) {
        Fiber &f = worker->fibers[i];
        if (!f.done && &f != worker->current) push_ready(&f);
    }
}

[[noreturn]] void fiber_main() {
    worker->launch->function->entry(worker->launch->parameters);
    Fiber *self = worker->current;
    self->done = true;
    worker->alive--;
    Warp &w = worker->warps[self->thread.rank / WARP];
    w.alive &= ~(1u << self->thread.lane);
    // The others may have waited for this thread only.
    if (w.arrived && w.arrived == (w.mask & w.alive)) finish_warp_operation(w);
    if (worker->alive && worker->at_barrier == worker->alive) release_block();
    if (w.in_step) release_in_step(w);
    Fiber *to = pop_ready();
    worker->current = to;
    void *dropped;
    emu_switch(&dropped, to ? to->stack_pointer : worker->scheduler);
    __builtin_unreachable();
}

void start_fiber(Fiber &f, unsigned rank, Dim3 block_idx) {
    const Launch &l = *worker->launch;
    f.thread = {{rank % l.block.x, rank / l.block.x % l.block.y, rank / l.block.x / l.block.y},
                block_idx, l.block, l.grid, rank % WARP, rank, 0, worker->shared, l.function->offsets.data()};
    f.waits_for = nullptr;
    f.done = false;
    if (!f.groups.empty()) f.groups.clear();
    // Stacks of equal page offset would all fall into the same cache sets.
    auto top = reinterpret_cast<void **>(f.stack + STACK - (rank % 32) * 192 - 64);
    *--top = nullptr;                                    // alignment of a call
    *--top = reinterpret_cast<void *>(fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    f.stack_pointer = top;
}

void run_block(Dim3 block_idx) {
    const Launch &l = *worker->launch;
    worker->threads = worker->alive = l.block.x * l.block.y * l.block.z;
    worker->head = worker->count = worker->at_barrier = worker->votes = 0;
    worker->barriers.clear();
    memset(worker->shared, 0xFF, l.shared);
    worker->warps.assign((worker->threads + WARP - 1) / WARP, Warp{});
    for (unsigned i = 0; i < worker->threads; i++) {
        start_fiber(worker->fibers[i], i, block_idx);
        worker->warps[i / WARP].alive |= 1u << i % WARP;
        push_ready(&worker->fibers[i]);
    }
    Fiber *first = pop_ready();
    worker->current = first;
    emu_switch(&worker->scheduler, first->stack_pointer);
    if (worker->alive) failf("deadlock: no thread of the block can run");
}

unsigned char *map_with_guard(size_t size) {
    auto p = static_cast<unsigned char *>(mmap(nullptr, size + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (p == MAP_FAILED) failf("no memory for %zu bytes of stack", size);
    mprotect(p, PAGE, PROT_NONE);
    mprotect(p + PAGE + size, PAGE, PROT_NONE);
    return p + PAGE;
}

constexpr size_t SHARED_MAP = (SHARED_LIMIT + 2048 + PAGE - 1) / PAGE * PAGE;

void prepare(const Launch &l) {
    worker->launch = &l;
    size_t threads = size_t(l.block.x) * l.block.y * l.block.z;
    while (worker->fibers.size() < threads) {
        worker->fibers.emplace_back();
        worker->fibers.back().stack = map_with_guard(STACK);
    }
    // Its end touches a guard page, as far as the alignment of its start allows.
    size_t alignment = l.shared % 1024 == 0 ? 1024 : 128;
    worker->shared = worker->shared_map + SHARED_MAP - (l.shared + alignment - 1) / alignment * alignment;
}

Worker *new_worker(unsigned index) {
    auto w = new Worker{};
    w->fibers.reserve(MAX_THREADS);
    w->ready.resize(MAX_THREADS);
    w->shared_map = map_with_guard(SHARED_MAP);
    w->random = 0x9E3779B97F4A7C15ull * (index + 1) + uint64_t(ORDER);
    stack_t alternative = {};
    alternative.ss_size = 1 << 16;
    alternative.ss_sp = malloc(alternative.ss_size);
    sigaltstack(&alternative, nullptr);
    return w;
}

// Threads that run blocks. One launch at a time: streams are synchronous.
struct Pool {
    std::mutex launches, lock;
    std::condition_variable wake, finished;
    const Launch *launch = nullptr;
    std::atomic<uint64_t> next{0};
    unsigned generation = 0, busy = 0, size;

    Pool() {
        size = setting("TERRARIUM_EMULATOR_THREADS", std::max(1u, std::thread::hardware_concurrency()));
        for (unsigned i = 0; i < size; i++) std::thread([this, i] { work(i); }).detach();
    }
    void work(unsigned index) {
        worker = new_worker(index);
        for (unsigned seen = 0;;) {
            std::unique_lock hold(lock);
            wake.wait(hold, [&] { return generation != seen; });
            seen = generation;
            const Launch *l = launch;
            hold.unlock();
            run_blocks(*l);
            hold.lock();
            if (--busy == 0) finished.notify_all();
        }
    }
    void run_blocks(const Launch &l) {
        prepare(l);
        uint64_t blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
        for (uint64_t i; (i = next++) < blocks;) {
            uint64_t b = ORDER < 0 ? blocks - 1 - i : i;
            run_block({unsigned(b % l.grid.x), unsigned(b / l.grid.x % l.grid.y), unsigned(b / l.grid.x / l.grid.y)});
        }
        worker->launch = nullptr;
    }
    void run(const Launch &l) {
        std::lock_guard one(launches);
        std::unique_lock hold(lock);
        launch = &l;
        next = 0;
        busy = size;
        generation++;
        wake.notify_all();
        uint64_t blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
        for (unsigned minutes = 1; !finished.wait_for(hold, std::chrono::minutes(1), [&] { return busy == 0; }); minutes++)
            fprintf(stderr, "CUDA emulator: kernel %s runs since %u minutes, %lu of %lu blocks have started\n  source %s\n", l.function->name.c_str(),
                    minutes, std::min(next.load(), blocks), blocks, l.function->source.c_str());
    }
};
Pool &pool() { static Pool *p = new Pool; return *p; }

// ---------------------------------------------------------------- what kernels call

Thread *self() { return &worker->current->thread; }
Warp &own_warp() { return worker->warps[self()->rank / WARP]; }

void collective(const char *name, unsigned mask, void *operand, Compute compute, const void *context) {
    Thread &t = *self();
    Warp &w = own_warp();
    if (!(mask >> t.lane & 1)) failf("%s: the lane is not in its own mask %08x", name, mask);
    if (!w.arrived) {
        w.name = name; w.mask = mask; w.line = t.line; w.compute = compute; w.context = context;
        memset(w.operand, 0, sizeof w.operand);
    } else if (w.line != t.line || w.compute != compute || w.mask != mask || (w.name != name && strcmp(w.name, name))) {
        failf("divergent warp: lane %u comes to %s (line %d), other lanes (mask %08x) wait at %s (line %d)",
              t.lane, name, t.line, w.arrived, w.name, w.line);
    }
    w.operand[t.lane] = operand;
    w.arrived |= 1u << t.lane;
    if (w.arrived == (w.mask & w.alive)) finish_warp_operation(w);
    else give_way(name);
}

void sync_threads() {
    if (++worker->at_barrier == worker->alive) release_block();
    else give_way("__syncthreads");
}

int vote_threads(int predicate, int *any) {
    if (predicate) worker->votes++;
    sync_threads();
    *any = worker->last_votes != 0;
    return worker->last_votes;
}

unsigned active_mask() { return own_warp().alive; }

struct ShuffleOperand { uint64_t value, result; unsigned source; };

void compute_shuffle(void **operand, const void *) {
    auto lanes = reinterpret_cast<ShuffleOperand **>(operand);
    for (unsigned i = 0; i < WARP; i++)
        // What an absent lane would give is undefined on a GPU.
        if (lanes[i]) lanes[i]->result = lanes[lanes[i]->source] ? lanes[lanes[i]->source]->value : ~uint64_t(0);
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned argument, unsigned width) {
    unsigned lane = self()->lane, first = lane & ~(width - 1), source = lane;
    switch (kind) {
        case Shuffle::index: source = first + (argument & (width - 1)); break;
        case Shuffle::bit_xor: source = lane ^ argument; if (source >= first + width) source = lane; break;
        case Shuffle::up: source = lane >= first + argument ? lane - argument : lane; break;
        case Shuffle::down: source = lane + argument < first + width ? lane + argument : lane; break;
    }
    ShuffleOperand o{value, value, source % WARP};
    collective("shuffle", mask, &o, compute_shuffle, nullptr);
    return o.result;
}

void compute_ballot(void **operand, const void *) {
    auto lanes = reinterpret_cast<unsigned **>(operand);
    unsigned votes = 0;
    for (unsigned i = 0; i < WARP; i++) if (lanes[i] && *lanes[i]) votes |= 1u << i;
    for (unsigned i = 0; i < WARP; i++) if (lanes[i]) *lanes[i] = votes;
}

unsigned ballot(unsigned mask, int predicate) {
    unsigned o = predicate != 0;
    collective("vote", mask, &o, compute_ballot, nullptr);
    return o;
}

// ---------------------------------------------------------------- matrix operations

// Matrix operations are for whole warps.
void need_all_lanes(const char *name, void **operand) {
    for (unsigned i = 0; i < WARP; i++) if (!operand[i]) failf("%s: lane %u of the warp does not exist or has finished", name, i);
}

struct MatrixOperand { unsigned *word[4]; unsigned address; };
struct MatrixContext { int count; bool transpose; const char *name; };

// The 8 rows of each 8x8 matrix of 16-bit elements, whose addresses lanes 8i to 8i+7 give.
void matrix_rows(MatrixOperand **lanes, const MatrixContext &c, uint16_t *rows[4][8]) {
    for (int m = 0; m < c.count; m++)
        for (int r = 0; r < 8; r++) {
            unsigned address = lanes[m * 8 + r]->address;
            if (address % 16) failf("%s: the row address %u of lane %d is no multiple of 16", c.name, address, m * 8 + r);
            if (address + 16 > worker->launch->shared) failf("%s: the row address %u of lane %d is outside shared memory", c.name, address, m * 8 + r);
            rows[m][r] = reinterpret_cast<uint16_t *>(worker->shared + address);
        }
}

template <bool STORE> void compute_matrix(void **operand, const void *context) {
    auto lanes = reinterpret_cast<MatrixOperand **>(operand);
    auto &c = *static_cast<const MatrixContext *>(context);
    need_all_lanes(c.name, operand);
    uint16_t *rows[4][8];
    matrix_rows(lanes, c, rows);
    for (int m = 0; m < c.count; m++)
        for (unsigned i = 0; i < WARP; i++) {
            // A lane holds two neighbours of a row; of a column, when transposed.
            unsigned r = i / 4, e = i % 4 * 2;
            uint16_t *low = c.transpose ? &rows[m][e][r] : &rows[m][r][e];
            uint16_t *high = c.transpose ? &rows[m][e + 1][r] : low + 1;
            unsigned &word = *lanes[i]->word[m];
            if (STORE) { *low = uint16_t(word); *high = uint16_t(word >> 16); }
            else word = *low | unsigned(*high) << 16;
        }
}

void ldmatrix(int count, bool transpose, unsigned *out[], unsigned address) {
    MatrixOperand o{{}, address};
    for (int i = 0; i < count; i++) o.word[i] = out[i];
    MatrixContext c{count, transpose, "ldmatrix"};
    collective(transpose ? "ldmatrix.trans" : "ldmatrix", ~0u, &o, compute_matrix<false>, &c);
}

void stmatrix(int count, bool transpose, const unsigned *in, unsigned address) {
    MatrixOperand o{{}, address};
    for (int i = 0; i < count; i++) o.word[i] = const_cast<unsigned *>(&in[i]);
    MatrixContext c{count, transpose, "stmatrix"};
    collective(transpose ? "stmatrix.trans" : "stmatrix", ~0u, &o, compute_matrix<true>, &c);
}

float bits_to_float(unsigned bits) { float f; memcpy(&f, &bits, 4); return f; }

float fp8_to_float(Type type, unsigned char bits) {
    int mantissa_bits = type == Type::e4m3 ? 3 : 2, bias = type == Type::e4m3 ? 7 : 15;
    int mantissa = bits & ((1 << mantissa_bits) - 1), exponent = (bits & 127) >> mantissa_bits;
    float sign = bits & 128 ? -1.f : 1.f;
    if (type == Type::e4m3 && (bits & 127) == 127) return __builtin_nanf("");
    if (type == Type::e5m2 && exponent == 31) return mantissa ? __builtin_nanf("") : sign * __builtin_inff();
    float m = exponent ? 1.f + float(mantissa) / (1 << mantissa_bits) : float(mantissa) / (1 << mantissa_bits);
    return sign * __builtin_ldexpf(m, (exponent ? exponent : 1) - bias);
}

// Elements of a 32-bit register as f32; integers of 8 bits are exact in it.
template <Type TYPE> inline void unpack(unsigned word, float *out) {
    switch (TYPE) {
        case Type::bf16: out[0] = bits_to_float(word << 16); out[1] = bits_to_float(word & 0xFFFF0000); break;
        case Type::f16: out[0] = _cvtsh_ss(uint16_t(word)); out[1] = _cvtsh_ss(uint16_t(word >> 16)); break;
        case Type::tf32: out[0] = bits_to_float(word & 0xFFFFE000); break;  // the unit ignores the low bits
        case Type::s8: for (int i = 0; i < 4; i++) out[i] = int8_t(word >> 8 * i); break;
        case Type::u8: for (int i = 0; i < 4; i++) out[i] = uint8_t(word >> 8 * i); break;
        case Type::e4m3: case Type::e5m2: for (int i = 0; i < 4; i++) out[i] = fp8_to_float(TYPE, word >> 8 * i); break;
        default: break;
    }
}
constexpr int elements(Type type) {
    switch (type) { case Type::tf32: return 1; case Type::f16: case Type::bf16: return 2; default: return 4; }
}

struct MmaOperand { const unsigned *a, *b, *c; unsigned *d[4]; };

// mma.m16n8k{8,16,32}: the register layout of all element sizes follows one rule.
template <Type CD, Type A, Type B> void compute_mma(void **operand, const void *) {
    auto lanes = reinterpret_cast<MmaOperand **>(operand);
    need_all_lanes("mma", operand);
    alignas(32) float a[16][32], b[32][8], d[16][8];
    constexpr int e = elements(A);
    for (unsigned i = 0; i < WARP; i++) {
        unsigned group = i / 4, member = i % 4;
        for (int r = 0; r < 4; r++) unpack<A>(lanes[i]->a[r], &a[group + 8 * (r & 1)][member * e + (r >> 1) * 4 * e]);
        for (int r = 0; r < 2; r++) {
            float column[4];
            unpack<B>(lanes[i]->b[r], column);
            for (int q = 0; q < e; q++) b[member * e + r * 4 * e + q][group] = column[q];
        }
        for (int r = 0; r < 4; r++) {
            unsigned word = lanes[i]->c[r];
            d[group + 8 * (r >> 1)][member * 2 + (r & 1)] = CD == Type::s32 ? 0 : bits_to_float(word);
        }
    }
    for (int row = 0; row < 16; row += 8) {
        __m256 sum[8];
        for (int r = 0; r < 8; r++) sum[r] = _mm256_load_ps(d[row + r]);
        for (int q = 0; q < 8 * e; q++) {
            __m256 right = _mm256_load_ps(b[q]);
            for (int r = 0; r < 8; r++) sum[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(&a[row + r][q]), right, sum[r]);
        }
        for (int r = 0; r < 8; r++) _mm256_store_ps(d[row + r], sum[r]);
    }
    for (unsigned i = 0; i < WARP; i++)
        for (int r = 0; r < 4; r++) {
            float value = d[i / 4 + 8 * (r >> 1)][i % 4 * 2 + (r & 1)];
            // 32 products of 8 bits stay below 2^24: exact in f32.
            if (CD == Type::s32) *lanes[i]->d[r] = lanes[i]->c[r] + unsigned(int(value));
            else memcpy(lanes[i]->d[r], &value, 4);
        }
}

struct MmaKind { Type cd, a, b; Compute compute; };
template <Type CD, Type A, Type B> constexpr MmaKind mma_kind() { return {CD, A, B, compute_mma<CD, A, B>}; }
constexpr MmaKind MMA_KINDS[] = {
    mma_kind<Type::f32, Type::bf16, Type::bf16>(), mma_kind<Type::f32, Type::f16, Type::f16>(), mma_kind<Type::f32, Type::tf32, Type::tf32>(),
    mma_kind<Type::s32, Type::s8, Type::s8>(), mma_kind<Type::s32, Type::u8, Type::u8>(),
    mma_kind<Type::s32, Type::s8, Type::u8>(), mma_kind<Type::s32, Type::u8, Type::s8>(),
    mma_kind<Type::f32, Type::e4m3, Type::e4m3>(), mma_kind<Type::f32, Type::e5m2, Type::e5m2>(),
    mma_kind<Type::f32, Type::e4m3, Type::e5m2>(), mma_kind<Type::f32, Type::e5m2, Type::e4m3>(),
};

void mma(Type cd, Type a, Type b, int k, unsigned *d[], const unsigned *abc) {
    auto kind = std::find_if(std::begin(MMA_KINDS), std::end(MMA_KINDS), [=](const MmaKind &m) { return m.cd == cd && m.a == a && m.b == b; });
    if (kind == std::end(MMA_KINDS) || k != 8 * elements(a)) failf("mma: these types or k=%d are not supported", k);
    // Inputs are copied: an output register may be an input too.
    unsigned in[10];
    memcpy(in, abc, sizeof in);
    MmaOperand o{in, in + 4, in + 6, {d[0], d[1], d[2], d[3]}};
    collective("mma", ~0u, &o, kind->compute, nullptr);
}

// ---------------------------------------------------------------- barriers and asynchronous copies

#include "tensor_copy.h"

void run_copy(const Copy &c) {
    memcpy(c.target, c.source, c.source_size);
    memset(c.target + c.source_size, 0, c.size - c.source_size);
}

Barrier &barrier_at(void *p, Pending **pending = nullptr) {
    auto found = worker->barriers.find(p);
    if (found == worker->barriers.end()) failf("a barrier at %p is used before its initialisation", p);
    if (pending) *pending = &found->second;
    return *static_cast<Barrier *>(p);
}

// Ends the phase if all arrivals and bytes are there.
void try_complete(void *p) {
    Pending *pending;
    Barrier &b = barrier_at(p, &pending);
    if (b.pending) return;
    for (const Copy &c : pending->copies) {
        run_copy(c);
        if (c.transaction) b.transactions -= int(c.size);
    }
    pending->copies.clear();
    for (const Box &box : pending->boxes) b.transactions -= int(load_box(box));
    pending->boxes.clear();
    if (b.transactions < 0) failf("more bytes were copied to a barrier than it expects (by %d)", -b.transactions);
    if (b.transactions) return;
    b.phase ^= 1;
    b.pending = b.expected;
    for (unsigned i = 0; i < worker->threads; i++) {
        Fiber &f = worker->fibers[i];
        if (f.waits_at == p && !f.done) push_ready(&f);
    }
}

void barrier_init(void *p, int count) {
    if (count <= 0) failf("a barrier is initialised for %d arrivals", count);
    worker->barriers[p] = {};
    *static_cast<Barrier *>(p) = {0, uint16_t(count), uint16_t(count), 0};
}

unsigned barrier_arrive(void *p, int count, int transaction) {
    Barrier &b = barrier_at(p);
    unsigned phase = b.phase;
    if (count > b.pending) failf("%d arrivals at a barrier that waits for %d", count, b.pending);
    b.pending -= count;
    b.transactions += transaction;
    try_complete(p);
    return phase;
}

void barrier_wait(void *p, unsigned phase) {
    while (barrier_at(p).phase == (phase & 1)) give_way("a barrier's phase", p);
}

void barrier_expect(void *p, int transaction) { barrier_at(p).transactions += transaction; }

void barrier_copy(void *p, void *target, const void *source, size_t size, bool transaction) {
    Pending *pending;
    Barrier &b = barrier_at(p, &pending);
    pending->copies.push_back({static_cast<unsigned char *>(target), static_cast<const unsigned char *>(source), size, size, transaction});
    if (!b.pending) try_complete(p);
}

void tensor_load(void *p, void *target, const void *map, const int *at, int rank) {
    Pending *pending;
    Barrier &b = barrier_at(p, &pending);
    Box box{static_cast<unsigned char *>(target), tensor_map(map), {}, rank};
    std::copy(at, at + rank, box.at);
    pending->boxes.push_back(box);
    if (!b.pending) try_complete(p);
}

std::vector<std::vector<Copy>> &groups() {
    auto &g = worker->current->groups;
    if (g.empty()) g.emplace_back();
    return g;
}

void cp_async(unsigned address, const void *source, int size, int source_size) {
    if (address + unsigned(size) > worker->launch->shared) failf("cp.async: the target %u is outside shared memory", address);
    if (address % size || reinterpret_cast<uintptr_t>(source) % size) failf("cp.async: an address is no multiple of %d", size);
    if (source_size < 0 || source_size > size) failf("cp.async: %d source bytes for a copy of %d", source_size, size);
    groups().back().push_back({worker->shared + address, static_cast<const unsigned char *>(source), size_t(size), size_t(source_size), false});
}

// Copies so far belong to the barrier's phase. Without `counted` the arrival adds itself to the
// count first, so that the copies hold the phase up and nothing else changes.
void cp_async_arrive(void *p, bool counted) {
    Pending *pending;
    barrier_at(p, &pending);
    for (auto &group : groups()) pending->copies.insert(pending->copies.end(), group.begin(), group.end());
    groups().assign(1, {});
    if (counted) barrier_arrive(p, 1, 0);
}

void cp_async_commit() { groups().emplace_back(); }

void cp_async_wait(int left) {
    auto &g = groups();
    size_t keep = size_t(left) + 1;  // the open group counts as none
    while (g.size() > keep) {
        for (const Copy &c : g.front()) run_copy(c);
        g.erase(g.begin());
    }
}

const Api API = {self, fail, pause, keep_in_step, sync_threads, vote_threads, collective, active_mask, shuffle, ballot, ldmatrix, stmatrix, mma,
                 cp_async, cp_async_arrive, cp_async_wait, cp_async_commit, barrier_init, barrier_arrive, barrier_wait,
                 barrier_expect, barrier_copy, tensor_load, tensor_store};

// ---------------------------------------------------------------- memory

struct Allocation { unsigned char *map; size_t size; };
std::mutex memory_lock;
std::unordered_map<uint64_t, Allocation> allocations;
size_t allocated;

// Fresh memory reads as NaN. Large mappings share one poisoned file until they are written.
constexpr size_t CHUNK = 16 << 20;
int poison_file() {
    static int file = [] {
        int f = memfd_create("poison", 0);
        std::vector<char> bytes(CHUNK, char(0xFF));
        if (f < 0 || write(f, bytes.data(), CHUNK) != ssize_t(CHUNK)) failf("no memory for the poison file");
        return f;
    }();
    return file;
}

uint64_t allocate(size_t size) {
    size_t pages = (size + PAGE - 1) / PAGE * PAGE;
    size_t total = pages + 2 * PAGE;
    auto map = static_cast<unsigned char *>(mmap(nullptr, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (map == MAP_FAILED) return 0;
    for (size_t at = 0; at < pages; at += CHUNK)
        if (mmap(map + PAGE + at, std::min(CHUNK, pages - at), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, poison_file(), 0) == MAP_FAILED) return 0;
    // With guards, the end of the allocation touches the page behind it.
    uint64_t start = uint64_t(map + PAGE) + (GUARD ? (pages - size) / 16 * 16 : 0);
    std::lock_guard lock(memory_lock);
    allocations[start] = {map, total};
    allocated += total;
    return start;
}

bool release(uint64_t start) {
    std::lock_guard lock(memory_lock);
    auto found = allocations.find(start);
    if (found == allocations.end()) return false;
    munmap(found->second.map, found->second.size);
    allocated -= found->second.size;
    allocations.erase(found);
    return true;
}

double now_ms() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

#include "driver_api.h"

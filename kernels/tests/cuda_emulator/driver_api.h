// The functions of libcuda that programs call. Part of driver.cpp.
// Streams are synchronous: when a call returns, its work is done, or noted if the stream is being captured. With
// TERRARIUM_EMULATOR_LATE they are as late as CUDA allows: work is done when somebody waits for it.
#define EXPORT extern "C" __attribute__((visibility("default")))

enum Result { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, NOT_FOUND = 500, NOT_SUPPORTED = 801 };
using Handle = void *;

EXPORT int cuInit(unsigned) {
    static std::once_flag once;
    std::call_once(once, catch_signals);
    return SUCCESS;
}
EXPORT int cuDriverGetVersion(int *v) { *v = 13000; return SUCCESS; }
EXPORT int cuGetErrorString(int e, const char **text) {
    *text = e == SUCCESS ? "no error" : e == INVALID_VALUE ? "invalid value" : e == OUT_OF_MEMORY ? "out of memory"
        : e == INVALID_IMAGE ? "invalid kernel image" : e == NOT_FOUND ? "not found" : e == NOT_SUPPORTED ? "not supported by the emulator" : "unknown error";
    return SUCCESS;
}
EXPORT int cuGetErrorName(int e, const char **text) { return cuGetErrorString(e, text); }

// ---------------------------------------------------------------- devices and contexts

EXPORT int cuDeviceGetCount(int *n) { *n = DEVICES; return SUCCESS; }
EXPORT int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal >= 0 && ordinal < DEVICES ? SUCCESS : 101; }
EXPORT int cuDeviceGetName(char *name, int size, int) { snprintf(name, size, "CPU emulator of an H100"); return SUCCESS; }
EXPORT int cuDeviceGetUuid(char *bytes, int d) { memset(bytes, 7 + d, 16); return SUCCESS; }
EXPORT int cuDeviceGetUuid_v2(char *bytes, int d) { return cuDeviceGetUuid(bytes, d); }
EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int) { *bytes = size_t(MEMORY) << 30; return SUCCESS; }

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
        case 1: *value = 1024; break;                       // threads of a block
        case 2: case 3: *value = 1024; break;
        case 4: *value = 64; break;
        case 5: *value = 2147483647; break;                 // blocks of a grid
        case 6: case 7: *value = 65535; break;
        case 8: *value = 49152; break;                      // shared memory of a block
        case 9: *value = 65536; break;                      // constant memory
        case 10: *value = 32; break;                        // warp
        case 11: *value = 2147483647; break;                // pitch
        case 12: case 82: *value = 65536; break;            // registers
        case 13: *value = 1980000; break;                   // clock, kHz
        case 14: *value = 512; break;                       // texture alignment
        case 16: *value = 132; break;                       // multiprocessors
        case 31: case 41: case 83: case 115: *value = 1; break;
        case 36: *value = 2619000; break;                   // memory clock, kHz
        case 37: *value = 5120; break;                      // memory bus, bits
        case 38: *value = 52428800; break;                  // L2 cache
        case 39: *value = 2048; break;                      // threads of a multiprocessor
        case 75: *value = int(SM / 10); break;
        case 76: *value = int(SM % 10); break;
        case 81: *value = 233472; break;                    // shared memory of a multiprocessor
        case 97: *value = int(SHARED_LIMIT); break;
        case 106: *value = 32; break;                       // blocks of a multiprocessor
        case 111: *value = 1024; break;
        default: *value = 0;
    }
    return SUCCESS;
}

char some_context;
thread_local Handle current_context;
EXPORT int cuDevicePrimaryCtxRetain(Handle *c, int) { *c = &some_context; return SUCCESS; }
EXPORT int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
EXPORT int cuCtxCreate_v4(Handle *c, void *, unsigned, int) { *c = current_context = &some_context; return SUCCESS; }
EXPORT int cuCtxDestroy_v2(Handle) { return SUCCESS; }
EXPORT int cuCtxSetCurrent(Handle c) { current_context = c; return SUCCESS; }
EXPORT int cuCtxGetCurrent(Handle *c) { *c = current_context; return SUCCESS; }
EXPORT int cuCtxRecordEvent(Handle, Handle) { return SUCCESS; }
EXPORT int cuCtxWaitEvent(Handle, Handle) { return SUCCESS; }
void catch_up_all();
EXPORT int cuCtxSynchronize() { catch_up_all(); return SUCCESS; }
EXPORT int cuCtxSetLimit(int, size_t) { return SUCCESS; }
EXPORT int cuCtxGetLimit(size_t *v, int) { *v = 1024; return SUCCESS; }
EXPORT int cuCtxSetFlags(unsigned) { return SUCCESS; }
EXPORT int cuCtxGetStreamPriorityRange(int *a, int *b) { *a = *b = 0; return SUCCESS; }
EXPORT int cuCtxEnablePeerAccess(Handle, unsigned) { return SUCCESS; }
EXPORT int cuDeviceCanAccessPeer(int *can, int, int) { *can = 0; return SUCCESS; }

// ---------------------------------------------------------------- streams and events

EXPORT int cuStreamCreate(Handle *s, unsigned) { *s = new char; return SUCCESS; }
EXPORT int cuStreamCreateWithPriority(Handle *s, unsigned, int) { *s = new char; return SUCCESS; }
// Work that was asked for and is not done.
struct Queue { std::deque<std::function<void()>> work; uint64_t done = 0; };
std::recursive_mutex late;
std::unordered_map<Handle, Queue> queues;

// Does the first `until` things that were ever asked for on the stream.
void catch_up(Handle stream, uint64_t until = ~uint64_t(0)) {
    std::lock_guard one(late);
    auto found = queues.find(stream);
    if (found == queues.end()) return;
    Queue &queue = found->second;  // stays where it is when others are added
    while (!queue.work.empty() && queue.done < until) {
        auto work = std::move(queue.work.front());
        queue.work.pop_front();
        queue.done++;
        if (work) work();
    }
}
void catch_up_all() {
    std::lock_guard one(late);
    std::vector<Handle> streams;
    for (auto &queue : queues) streams.push_back(queue.first);
    for (Handle stream : streams) catch_up(stream);
}
uint64_t asked(Handle stream) {
    std::lock_guard one(late);
    auto found = queues.find(stream);
    return found == queues.end() ? 0 : found->second.done + found->second.work.size();
}

EXPORT int cuStreamDestroy_v2(Handle s) {
    catch_up(s);
    std::lock_guard one(late);
    queues.erase(s);
    delete static_cast<char *>(s);
    return SUCCESS;
}
EXPORT int cuStreamSynchronize(Handle s) {
    if (s) catch_up(s);
    else catch_up_all();
    return SUCCESS;
}
EXPORT int cuStreamGetCtx(Handle, Handle *c) { *c = &some_context; return SUCCESS; }
EXPORT int cuStreamQuery(Handle s) { return cuStreamSynchronize(s); }
// ---------------------------------------------------------------- graphs

enum NodeType { KERNEL = 0, COPY = 1, FILL = 2, WAIT = 6, RECORD = 7, ALLOCATE = 10, FREE = 11 };
enum MemoryType { HOST = 1, DEVICE = 2 };
struct Node { NodeType type; std::function<void()> work; MemoryType from, to; };
using Graph = std::vector<Node>;
std::mutex capturing;
std::unordered_map<Handle, Graph *> captures;

bool captured(Handle stream) {
    std::lock_guard one(capturing);
    return captures.count(stream);
}

// Notes the work if the stream is being captured, or late; without, the caller does it.
bool note(Handle stream, NodeType type, std::function<void()> work, MemoryType from = DEVICE, MemoryType to = DEVICE) {
    {
        std::lock_guard one(capturing);
        auto found = captures.find(stream);
        if (found != captures.end()) {
            found->second->push_back({type, std::move(work), from, to});
            if (TRACE && type != KERNEL) fprintf(stderr, "CUDA emulator: a captured stream notes node type %d\n", type);
            return true;
        }
    }
    if (!LATE) return false;
    if (!stream) { catch_up_all(); return false; }
    std::lock_guard one(late);
    queues[stream].work.push_back(std::move(work));
    return true;
}
// The same for other libraries: a kernel.
EXPORT bool emulator_note(Handle stream, std::function<void()> *work) { return note(stream, KERNEL, *work); }

EXPORT int cuStreamIsCapturing(Handle s, int *status) { std::lock_guard one(capturing); *status = int(captures.count(s)); return SUCCESS; }
EXPORT int cuStreamBeginCapture_v2(Handle s, int) {
    std::lock_guard one(capturing);
    return captures.emplace(s, new Graph).second ? SUCCESS : INVALID_VALUE;
}
EXPORT int cuStreamEndCapture(Handle s, Handle *graph) {
    std::lock_guard one(capturing);
    auto found = captures.find(s);
    if (found == captures.end()) return INVALID_VALUE;
    *graph = found->second;
    captures.erase(found);
    return SUCCESS;
}
EXPORT int cuGraphGetNodes(Handle g, Node **nodes, size_t *count) {
    auto &graph = *static_cast<Graph *>(g);
    if (nodes) for (size_t i = 0; i < std::min(*count, graph.size()); i++) nodes[i] = &graph[i];
    *count = graph.size();
    return SUCCESS;
}
EXPORT int cuGraphNodeGetType(Node *node, int *type) { *type = node->type; return SUCCESS; }
EXPORT int cuGraphMemcpyNodeGetParams(Node *node, void *parameters) {
    // CUDA_MEMCPY3D: the kinds of memory lie behind four offsets, and behind four more fields and four offsets.
    memcpy(static_cast<char *>(parameters) + 32, &node->from, 4);
    memcpy(static_cast<char *>(parameters) + 120, &node->to, 4);
    return SUCCESS;
}
EXPORT int cuGraphInstantiateWithFlags(Handle *exec, Handle graph, unsigned long long) { *exec = new Graph(*static_cast<Graph *>(graph)); return SUCCESS; }
EXPORT int cuGraphLaunch(Handle exec, Handle s) {
    auto work = [graph = *static_cast<Graph *>(exec)] { for (auto &node : graph) if (node.work) node.work(); };
    if (!note(s, KERNEL, work)) work();
    return SUCCESS;
}
EXPORT int cuGraphDestroy(Handle graph) { delete static_cast<Graph *>(graph); return SUCCESS; }
EXPORT int cuGraphExecDestroy(Handle exec) { delete static_cast<Graph *>(exec); return SUCCESS; }

// ---------------------------------------------------------------- more of streams, and events

struct Event { double time; Handle stream; uint64_t until; };

EXPORT int cuStreamWaitEvent(Handle s, Handle e, unsigned) {
    note(s, WAIT, [event = *static_cast<Event *>(e)] { catch_up(event.stream, event.until); });
    return SUCCESS;
}
EXPORT int cuStreamAttachMemAsync(Handle, uint64_t, size_t, unsigned) { return SUCCESS; }
EXPORT int cuLaunchHostFunc(Handle s, void (*f)(void *), void *data) {
    if (captured(s) || !note(s, KERNEL, [=] { f(data); })) f(data);
    return SUCCESS;
}

EXPORT int cuEventCreate(Handle *e, unsigned) { *e = new Event{}; return SUCCESS; }
EXPORT int cuEventDestroy_v2(Handle e) { delete static_cast<Event *>(e); return SUCCESS; }
EXPORT int cuEventRecord(Handle e, Handle s) {
    if (captured(s)) note(s, RECORD, {});
    *static_cast<Event *>(e) = {now_ms(), s, asked(s)};
    return SUCCESS;
}
EXPORT int cuEventSynchronize(Handle e) {
    auto event = static_cast<Event *>(e);
    catch_up(event->stream, event->until);
    return SUCCESS;
}
EXPORT int cuEventQuery(Handle e) { return cuEventSynchronize(e); }
EXPORT int cuEventElapsedTime(float *ms, Handle a, Handle b) { *ms = float(static_cast<Event *>(b)->time - static_cast<Event *>(a)->time); return SUCCESS; }
EXPORT int cuEventElapsedTime_v2(float *ms, Handle a, Handle b) { return cuEventElapsedTime(ms, a, b); }

// ---------------------------------------------------------------- memory

EXPORT int cuMemAlloc_v2(uint64_t *p, size_t size) {
    if (TRACE) fprintf(stderr, "CUDA emulator: allocate %zu bytes\n", size);
    *p = allocate(size);
    return *p ? SUCCESS : OUT_OF_MEMORY;
}
EXPORT int cuMemAllocAsync(uint64_t *p, size_t size, Handle s) {
    if (captured(s)) note(s, ALLOCATE, {});
    return cuMemAlloc_v2(p, size);
}
EXPORT int cuMemAllocManaged(uint64_t *p, size_t size, unsigned) { return cuMemAlloc_v2(p, size); }
EXPORT int cuMemFree_v2(uint64_t p) { catch_up_all(); return release(p) ? SUCCESS : INVALID_VALUE; }
EXPORT int cuMemFreeAsync(uint64_t p, Handle s) {
    if (captured(s)) note(s, FREE, {});
    else if (note(s, FREE, [=] { release(p); })) return SUCCESS;
    return cuMemFree_v2(p);
}
// Pinned memory: copies read and write it when their turn comes. Other memory of the host is done with when a call returns.
std::mutex pins;
std::map<uint64_t, size_t> pinned;
EXPORT int cuMemAllocHost_v2(void **p, size_t size) {
    *p = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    std::lock_guard one(pins);
    if (*p) pinned[uint64_t(*p)] = size;
    return *p ? SUCCESS : OUT_OF_MEMORY;
}
EXPORT int cuMemHostAlloc(void **p, size_t size, unsigned) { return cuMemAllocHost_v2(p, size); }
EXPORT int cuMemFreeHost(void *p) {
    catch_up_all();
    std::lock_guard one(pins);
    pinned.erase(uint64_t(p));
    free(p);
    return SUCCESS;
}
bool is_pinned(uint64_t at) {
    std::lock_guard one(pins);
    auto above = pinned.upper_bound(at);
    return above != pinned.begin() && at < std::prev(above)->first + std::prev(above)->second;
}
EXPORT int cuMemGetInfo_v2(size_t *left, size_t *total) {
    *total = size_t(MEMORY) << 30;
    *left = *total > allocated ? *total - allocated : 0;
    return SUCCESS;
}

int copy(uint64_t to, uint64_t from, size_t n) { memmove(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), n); return SUCCESS; }
// Waits like a call without a stream does.
int copy_now(uint64_t to, uint64_t from, size_t n) { catch_up_all(); return copy(to, from, n); }
EXPORT int cuMemcpyHtoD_v2(uint64_t d, const void *h, size_t n) { return copy_now(d, uint64_t(h), n); }
int copy_later(Handle s, uint64_t to, uint64_t from, size_t n, MemoryType source, MemoryType target) {
    uint64_t host = source == HOST ? from : target == HOST ? to : 0;
    if (LATE && host && !is_pinned(host) && !captured(s)) {
        catch_up(s);
        return copy(to, from, n);
    }
    return note(s, COPY, [=] { copy(to, from, n); }, source, target) ? SUCCESS : copy(to, from, n);
}
EXPORT int cuMemcpyHtoDAsync_v2(uint64_t d, const void *h, size_t n, Handle s) { return copy_later(s, d, uint64_t(h), n, HOST, DEVICE); }
EXPORT int cuMemcpyDtoH_v2(void *h, uint64_t d, size_t n) { return copy_now(uint64_t(h), d, n); }
EXPORT int cuMemcpyDtoHAsync_v2(void *h, uint64_t d, size_t n, Handle s) { return copy_later(s, uint64_t(h), d, n, DEVICE, HOST); }
EXPORT int cuMemcpyDtoD_v2(uint64_t a, uint64_t b, size_t n) { return copy_now(a, b, n); }
EXPORT int cuMemcpyDtoDAsync_v2(uint64_t a, uint64_t b, size_t n, Handle s) { return copy_later(s, a, b, n, DEVICE, DEVICE); }
EXPORT int cuMemcpyAsync(uint64_t a, uint64_t b, size_t n, Handle s) { catch_up(s); return copy(a, b, n); }
EXPORT int cuMemcpyPeerAsync(uint64_t a, Handle, uint64_t b, Handle, size_t n, Handle s) { return copy_later(s, a, b, n, DEVICE, DEVICE); }
int fill(uint64_t d, unsigned char v, size_t n) { memset(reinterpret_cast<void *>(d), v, n); return SUCCESS; }
EXPORT int cuMemsetD8_v2(uint64_t d, unsigned char v, size_t n) { catch_up_all(); return fill(d, v, n); }
EXPORT int cuMemsetD8Async(uint64_t d, unsigned char v, size_t n, Handle s) {
    return note(s, FILL, [=] { fill(d, v, n); }) ? SUCCESS : fill(d, v, n);
}

struct Copy2D {
    size_t from_x, from_y; int from_type; const char *from_host; uint64_t from_device; Handle from_array; size_t from_pitch;
    size_t to_x, to_y; int to_type; char *to_host; uint64_t to_device; Handle to_array; size_t to_pitch;
    size_t width, height;
};
int copy_rows(const Copy2D *c) {
    const char *from = (c->from_type == HOST ? c->from_host : reinterpret_cast<const char *>(c->from_device)) + c->from_y * c->from_pitch + c->from_x;
    char *to = (c->to_type == HOST ? c->to_host : reinterpret_cast<char *>(c->to_device)) + c->to_y * c->to_pitch + c->to_x;
    for (size_t row = 0; row < c->height; row++) memcpy(to + row * c->to_pitch, from + row * c->from_pitch, c->width);
    return SUCCESS;
}
EXPORT int cuMemcpy2DAsync_v2(const Copy2D *c, Handle s) {
    uint64_t host = c->from_type == HOST ? uint64_t(c->from_host) : c->to_type == HOST ? uint64_t(c->to_host) : 0;
    if (LATE && host && !is_pinned(host) && !captured(s)) {
        catch_up(s);
        return copy_rows(c);
    }
    return note(s, COPY, [c = *c] { copy_rows(&c); }, MemoryType(c->from_type), MemoryType(c->to_type)) ? SUCCESS : copy_rows(c);
}
EXPORT int cuMemcpy2D_v2(const Copy2D *c) { catch_up_all(); return copy_rows(c); }

// ---------------------------------------------------------------- modules and launches

// The image is what the emulator's NVRTC gave: a comment with the path of a library.
EXPORT int cuModuleLoadData(Handle *module, const char *image) {
    const char *mark = "// emulator ";
    if (strncmp(image, mark, strlen(mark))) return INVALID_IMAGE;
    std::string path = image + strlen(mark);
    std::vector<unsigned> offsets;
    for (size_t at = path.find('\n') + 1; at < path.size(); at = path.find('\n', at) + 1) offsets.push_back(unsigned(atoi(&path[at])));
    path.resize(path.find('\n'));
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) { fprintf(stderr, "CUDA emulator: %s\n", dlerror()); return INVALID_IMAGE; }
    *static_cast<const Api **>(dlsym(library, "__emu_api")) = &API;
    *module = new Module{library, path.substr(0, path.size() - 3) + ".cu", offsets};
    return SUCCESS;
}
EXPORT int cuModuleLoadDataEx(Handle *module, const char *image, unsigned, void *, void *) { return cuModuleLoadData(module, image); }
EXPORT int cuModuleUnload(Handle) { return SUCCESS; }
EXPORT int cuModuleGetFunction(Handle *function, Handle m, const char *name) {
    auto module = static_cast<Module *>(m);
    void *entry = dlsym(module->library, (std::string("__emu_launch_") + name).c_str());
    if (!entry) return NOT_FOUND;
    auto f = new Function{name, module->source, module->offsets, reinterpret_cast<void (*)(void **)>(entry), {}, 0};
    auto sizes = reinterpret_cast<void (*)(void (*)(void *, size_t), void *)>(dlsym(module->library, (std::string("__emu_sizes_") + name).c_str()));
    sizes([](void *to, size_t size) { static_cast<std::vector<size_t> *>(to)->push_back(size); }, &f->sizes);
    *function = f;
    return SUCCESS;
}
EXPORT int cuModuleGetGlobal_v2(uint64_t *, size_t *, Handle, const char *) { return NOT_FOUND; }

EXPORT int cuFuncSetAttribute(Handle f, int attribute, int value) {
    if (attribute == 8 && value > int(SHARED_LIMIT)) return INVALID_VALUE;
    if (attribute == 8) static_cast<Function *>(f)->dynamic_shared = value;
    return SUCCESS;
}
EXPORT int cuFuncGetAttribute(int *value, int attribute, Handle f) {
    *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : attribute == 8 ? static_cast<Function *>(f)->dynamic_shared : 0;
    return SUCCESS;
}
EXPORT int cuFuncSetCacheConfig(Handle, int) { return SUCCESS; }
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, Handle, int block, size_t shared) {
    *n = int(std::min<size_t>({32, 2048 / size_t(std::max(block, 1)), shared ? 233472 / (shared + 1024) : 32}));
    return SUCCESS;
}
EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, Handle f, int block, size_t shared, unsigned) {
    return cuOccupancyMaxActiveBlocksPerMultiprocessor(n, f, block, shared);
}

EXPORT int cuLaunchKernel(Handle f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned shared, Handle stream, void **parameters, void **) {
    auto function = static_cast<Function *>(f);
    uint64_t threads = uint64_t(bx) * by * bz;
    if (!threads || threads > MAX_THREADS || bz > 64 || !gx || !gy || !gz || gy > 65535 || gz > 65535) return INVALID_VALUE;
    if (shared > 49152 && int(shared) > function->dynamic_shared) return INVALID_VALUE;
    auto noted = [&] {
        if (TRACE) fprintf(stderr, "CUDA emulator: launch %s\n", function->name.c_str());
        std::vector<std::vector<char>> values;
        for (size_t i = 0; i < function->sizes.size(); i++) {
            auto value = static_cast<const char *>(parameters[i]);
            values.emplace_back(value, value + function->sizes[i]);
        }
        return note(stream, KERNEL, [=] () mutable {
            std::vector<void *> places;
            for (auto &value : values) places.push_back(value.data());
            pool().run({function, {gx, gy, gz}, {bx, by, bz}, shared, places.data()});
        });
    };
    if (noted()) return SUCCESS;
    double start = now_ms();
    pool().run({function, {gx, gy, gz}, {bx, by, bz}, shared, parameters});
    if (TRACE) fprintf(stderr, "CUDA emulator: %s, grid (%u, %u, %u), block (%u, %u, %u), %u bytes shared: %.1f ms, %s\n",
                       function->name.c_str(), gx, gy, gz, bx, by, bz, shared, now_ms() - start, function->source.c_str());
    return SUCCESS;
}
EXPORT int cuLaunchCooperativeKernel(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void **) { return NOT_SUPPORTED; }

struct LaunchConfig { unsigned grid[3], block[3], shared; Handle stream; void *attributes; unsigned count; };
EXPORT int cuLaunchKernelEx(const LaunchConfig *c, Handle f, void **parameters, void **extra) {
    return cuLaunchKernel(f, c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared, c->stream, parameters, extra);
}

// ---------------------------------------------------------------- tensor maps

EXPORT int cuTensorMapEncodeTiled(void *out, int type, unsigned rank, void *address, const uint64_t *dims, const uint64_t *strides,
                                  const unsigned *box, const unsigned *steps, int interleave, int swizzle, int, int fill) {
    const uint8_t sizes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    if (rank < 1 || rank > 5 || type > 12 || interleave || swizzle > 3 || uint64_t(address) % 16) return INVALID_VALUE;
    TensorMap map{};
    map.address = uint64_t(address);
    map.rank = rank;
    map.element = sizes[type];
    map.swizzle = swizzle;
    map.nan_fill = fill;
    for (unsigned d = 0; d < rank; d++) {
        if (!box[d] || box[d] > 256 || !steps[d] || steps[d] > 8 || (d && strides[d - 1] % 16)) return INVALID_VALUE;
        map.dims[d] = dims[d];
        map.strides[d] = d ? strides[d - 1] : map.element;
        map.box[d] = box[d];
        map.steps[d] = steps[d];
    }
    const unsigned rows[] = {~0u, 32, 64, 128};
    if (swizzle && box[0] * map.element > rows[swizzle]) return INVALID_VALUE;
    memset(out, 0, 128);
    memcpy(out, &map, sizeof map);
    return SUCCESS;
}
EXPORT int cuTensorMapEncodeIm2col(void *, int, unsigned, void *, const uint64_t *, const uint64_t *, const int *, const int *, unsigned, unsigned,
                                   const unsigned *, int, int, int, int) { return NOT_SUPPORTED; }

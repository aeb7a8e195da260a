// Copies of boxes by tensor maps (TMA). Part of driver.cpp.
// The 16-byte chunks of a shared-memory row change places by a pattern of its address.
size_t swizzled(const TensorMap &map, size_t offset) {
    size_t mask[] = {0, 0x10, 0x30, 0x70};
    return map.swizzle < 4 ? offset ^ (offset >> 3 & mask[map.swizzle]) : offset;
}

// Calls f(shared offset, global address or 0) for every element of the box.
template <class F> size_t for_box(const TensorMap &map, const int *at, int rank, size_t base, F f) {
    if (rank != map.rank) failf("a tensor map of rank %d is used as rank %d", map.rank, rank);
    size_t offset = 0;
    unsigned i[5] = {};
    for (;;) {
        uint64_t address = map.address;
        bool inside = true;
        for (int d = 0; d < rank; d++) {
            int64_t index = int64_t(at[d]) + int64_t(i[d]) * map.steps[d];
            inside &= index >= 0 && uint64_t(index) < map.dims[d];
            address += uint64_t(index) * map.strides[d];
        }
        f(swizzled(map, base + offset), inside ? address : 0);
        offset += map.element;
        int d = 0;
        while (d < rank && ++i[d] == map.box[d]) i[d++] = 0;
        if (d == rank) return offset;
    }
}

size_t shared_offset(const void *p) {
    size_t offset = size_t(static_cast<const unsigned char *>(p) - worker->shared);
    if (offset >= worker->launch->shared) failf("a tensor copy uses an address outside shared memory");
    return offset;
}

const TensorMap &tensor_map(const void *p) { return *static_cast<const TensorMap *>(p); }

size_t load_box(const Box &box) {
    const TensorMap &map = box.map;
    return for_box(map, box.at, box.rank, shared_offset(box.target), [&](size_t offset, uint64_t address) {
        if (offset + map.element > worker->launch->shared) failf("a tensor copy leaves shared memory");
        unsigned char *target = worker->shared + offset;
        if (address) memcpy(target, reinterpret_cast<void *>(address), map.element);
        else memset(target, map.nan_fill ? 0xFF : 0, map.element);
    });
}

void tensor_store(const void *source, const void *p, const int *at, int rank) {
    const TensorMap &map = tensor_map(p);
    for_box(map, at, rank, shared_offset(source), [&](size_t offset, uint64_t address) {
        if (address) memcpy(reinterpret_cast<void *>(address), worker->shared + offset, map.element);
    });
}

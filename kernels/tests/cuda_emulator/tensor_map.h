// Tensor maps (TMA): what cuTensorMapEncodeTiled stores. Part of driver.cpp.
struct TensorMap {
    uint64_t address, dims[5], strides[5];  // strides in bytes; the first one is the element
    uint16_t box[5];
    uint8_t steps[5], rank, element, swizzle, interleave, nan_fill;
};
static_assert(sizeof(TensorMap) <= 128);

// A copy by a tensor map: which box goes where. It keeps the map: the thread's own copy may be gone.
struct Box { unsigned char *target; TensorMap map; int at[5]; int rank; };

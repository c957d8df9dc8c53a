// What measurements need: plain reads and copies, the measure of everything that memory bounds, and random
// operands. Zeros would do for the sums, but they take less power, and the clock rises.

// LOADS  loads of 16 bytes that a thread has in flight
#if !defined(LOADS)
#error "a constant is missing: src/backend/cuda/kernels/measure.rs declares them"
#endif

/// Reads `count` times 16 bytes; `sums` gets a word a block, so that nothing can be left out.
extern "C" __global__ void read(const uint4* from, long long count, u32* sums) {
    __shared__ u32 sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    long long stride = (long long)gridDim.x * blockDim.x;
    u32 own = 0;
    for (long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x; first < count; first += LOADS * stride) {
        uint4 values[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            values[i] = first + i * stride < count ? load_uncached(from + first + i * stride) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < LOADS; ++i) own += values[i].x ^ values[i].y ^ values[i].z ^ values[i].w;
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) own += __shfl_xor_sync(0xffffffffu, own, lanes);
    if (threadIdx.x % 32 == 0) atomicAdd(&sum, own);
    __syncthreads();
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

/// Copies `count` times 16 bytes.
extern "C" __global__ void copy(const uint4* from, long long count, uint4* to) {
    long long stride = (long long)gridDim.x * blockDim.x;
    for (long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x; first < count; first += LOADS * stride) {
        uint4 values[LOADS];
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            if (first + i * stride < count) values[i] = load_uncached(from + first + i * stride);
        }
#pragma unroll
        for (int i = 0; i < LOADS; ++i) {
            if (first + i * stride < count) to[first + i * stride] = values[i];
        }
    }
}

/// 32 bits of a position, by the finalizer of MurmurHash3.
static __device__ __forceinline__ u32 hashed(u32 at, u32 seed) {
    u32 bits = at * 0x9e3779b9u + seed * 0x85ebca6bu;
    bits = (bits ^ bits >> 16) * 0x85ebca6bu;
    bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
    return bits ^ bits >> 16;
}

/// Values in -1..1, two a word.
extern "C" __global__ void random_half(u32* to, int words, u32 seed) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= words) return;
    u32 bits = hashed(at, seed);
    const float unit = 1.0f / 32768.0f;
    to[at] = pack_half2(float(short(bits)) * unit, float(short(bits >> 16)) * unit);
}

/// Bytes, four a word: INT8.
extern "C" __global__ void random_int8(u32* to, int words, u32 seed) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < words) to[at] = hashed(at, seed);
}

/// Numbers of E4M3 below 4, half of them at least 2, a quarter at least 1, and so on.
extern "C" __global__ void random_fp8(u32* to, int words, u32 seed) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= words) return;
    u32 word = 0;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
        u32 bits = hashed(4u * at + byte, seed);
        u32 exponent = 8 - min(__clz(bits), 8);
        word |= ((bits & 0x80) | exponent << 3 | (bits & 7)) << (8 * byte);
    }
    to[at] = word;
}

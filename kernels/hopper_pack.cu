// Weights as hopper.cu reads them, from rows of codes. What lies beyond the last row or channel becomes zero.
//
// In a block of 64 rows and 128 places, thread t of a warpgroup holds, of rows g = t / 32 * 16 + t % 32 / 4 and g + 8,
// four places 4 * (t % 4) and on of every 16: the left operand of wgmma. Step s of 32 places has four registers:
// row g, row g + 8, and both again 16 places on. Of 4 bits, two registers make a word.
//
// Macros: W_BITS 4 or 8, W_FP4, GROUP (32, 64 or 128).

typedef unsigned short u16;

#define GROUPS_A_STAGE (128 / GROUP)
#define CODE_BYTES (64 * 128 * W_BITS / 8)
#define BLOCK_BYTES (CODE_BYTES + GROUPS_A_STAGE * 64 * 2)

struct Rows {
    const i8* codes;
    int rows;
    long long width;

    __device__ __forceinline__ int at(int row, long long place) const { return row < rows && place < width ? codes[row * width + place] : 0; }
};

/// Sign and lower bits of a code as hopper.cu unpacks them.
static __device__ __forceinline__ u32 sign_of(int code) { return code < 0; }
static __device__ __forceinline__ u32 low_bits_of(int code) {
#if W_FP4
    int magnitude = code < 0 ? -code : code;
    // The index of a magnitude among 0 1 2 3 4 6 8 12.
    return magnitude < 5 ? magnitude : magnitude == 6 ? 5 : magnitude == 8 ? 6 : 7;
#else
    return code < 0 ? ~code & 7 : code;
#endif
}

/// Four codes of row `row` as bytes, and eight codes of rows `row` and `row + 8` as a word.
static __device__ __forceinline__ u32 bytes_of(const Rows& from, int row, long long place) {
    u32 bytes = 0;
    for (int i = 0; i < 4; i++) bytes |= (u32)(from.at(row, place + i) & 255) << 8 * i;
    return bytes;
}
static __device__ __forceinline__ u32 word_of(const Rows& from, int row, long long place) {
    u32 word = 0;
    for (int i = 0; i < 4; i++) {
        int x = from.at(row, place + i), y = from.at(row + 8, place + i);
        word |= sign_of(x) << (8 * i + 7) | sign_of(y) << (8 * i + 3);
#if W_FP4
        word |= low_bits_of(x) << 4 * i | low_bits_of(y) << (4 * i + 16);
#else
        word |= low_bits_of(x) << 8 * i | low_bits_of(y) << (8 * ((i + 3) % 4) + 4);
#endif
    }
    return word;
}

/// Blocks [row tiles][panels][BLOCK_BYTES] of codes [rows, groups * GROUP] and their scales, f16 values in
/// f32, [ceil(rows / rows_per_scale), groups]. A block of 128 threads for each, panels in x, row tiles in y.
extern "C" __global__ void __launch_bounds__(128)
    pack_weights(const i8* codes, const float* scales, int rows, int groups, int rows_per_scale, unsigned char* blocks) {
    const Rows from{codes, rows, (long long)groups * GROUP};
    const int thread = threadIdx.x, panel = blockIdx.x, first_row = blockIdx.y * 64;
    const int row = first_row + thread / 32 * 16 + thread % 32 / 4;
    unsigned char* block = blocks + ((long long)blockIdx.y * gridDim.x + panel) * BLOCK_BYTES;
    for (int step = 0; step < 4; step++) {
        const long long place = panel * 128ll + step * 32 + thread % 4 * 4;
#if W_BITS == 4
        *reinterpret_cast<uint2*>(block + step / 2 * 2048 + thread * 16 + step % 2 * 8) =
            make_uint2(word_of(from, row, place), word_of(from, row, place + 16));
#else
        *reinterpret_cast<uint4*>(block + step * 2048 + thread * 16) =
            make_uint4(bytes_of(from, row, place), bytes_of(from, row + 8, place), bytes_of(from, row, place + 16), bytes_of(from, row + 8, place + 16));
#endif
    }
    if (thread < 64) {
        for (int i = 0; i < GROUPS_A_STAGE; i++) {
            const int group = panel * GROUPS_A_STAGE + i, own = first_row + thread;
            const float scale = own < rows && group < groups ? scales[(long long)(own / rows_per_scale) * groups + group] : 0.0f;
            *reinterpret_cast<half*>(block + CODE_BYTES + i * 128 + thread * 2) = to_half(scale);
        }
    }
}

/// Blocks [row tiles][halves][4096 + 128] of outlier codes [rows, width] and their scales [rows]. As pack_weights, with 64
/// channels a block.
extern "C" __global__ void __launch_bounds__(128) pack_outliers(const i8* codes, const float* scales, int rows, int width, unsigned char* blocks) {
    const Rows from{codes, rows, width};
    const int thread = threadIdx.x, row = blockIdx.y * 64 + thread / 32 * 16 + thread % 32 / 4;
    unsigned char* block = blocks + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * (4096 + 128);
    for (int step = 0; step < 2; step++) {
        const long long place = blockIdx.x * 64ll + step * 32 + thread % 4 * 4;
        *reinterpret_cast<uint4*>(block + step * 2048 + thread * 16) =
            make_uint4(bytes_of(from, row, place), bytes_of(from, row + 8, place), bytes_of(from, row, place + 16), bytes_of(from, row + 8, place + 16));
    }
    if (thread < 64) {
        const int own = blockIdx.y * 64 + thread;
        *reinterpret_cast<half*>(block + 4096 + thread * 2) = to_half(own < rows ? scales[own] : 0.0f);
    }
}

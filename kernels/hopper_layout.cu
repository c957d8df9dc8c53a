// What the products for Hopper read (hopper.cuh), from rows of codes, and back. What lies beyond the last row or channel
// becomes zero.
//
// In a block of 64 rows and 128 slots, thread t of a warpgroup holds, of rows g = t / 32 * 16 + t % 32 / 4 and g + 8,
// four slots 4 * (t % 4) and on of every 16: the left operand of wgmma. Step s of 32 slots has four registers:
// row g, row g + 8, and both again 16 slots on. Of 4 bits, two registers make a word.
//
// Macros: W_BITS 4 or 8, W_FP4, GROUP (32, 64 or 128); sizes of blocks and panels.

#if !defined(GROUP) || !defined(W_BITS) || !defined(W_FP4) || !defined(PANEL) || !defined(BLOCK_ROWS) || \
    !defined(SCALE_GROUPS) || !defined(OUTLIER_PART) || !defined(CODE_BYTES) || !defined(BLOCK_BYTES) || \
    !defined(OUTLIER_CODE_BYTES) || !defined(OUTLIER_BYTES) || !defined(THREADS) || !defined(PACK_THREADS) || \
    !defined(TOKEN_MULTIPLE) || !defined(CHUNK)
#error "a constant is missing: src/backend/cuda/kernels/hopper_layout.rs declares them"
#endif
static_assert(PANEL == 128 && BLOCK_ROWS == 64 && SCALE_GROUPS == 8 && OUTLIER_PART == 64 && TOKEN_MULTIPLE == 8 && CHUNK == 16, "what wgmma and bulk copies take");
static_assert(THREADS == 256 && PACK_THREADS == 128, "a warpgroup packs a block");

#define GROUPS_A_STAGE (PANEL / GROUP)

struct Rows {
    const i8* codes;
    const int* order;   // the row that each is, -1 for zeros; absent, each is itself
    int rows;
    long long width;

    /// Which row of the codes and scales is row `row`, or -1.
    __device__ __forceinline__ int own(int row) const { return row >= rows ? -1 : order ? order[row] : row; }
    __device__ __forceinline__ int at(int row, long long slot) const {
        const int own = this->own(row);
        return own >= 0 && slot < width ? codes[own * width + slot] : 0;
    }
};

/// Sign and lower bits of a code as hopper.cuh unpacks them.
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
static __device__ __forceinline__ u32 bytes_of(const Rows& from, int row, long long slot) {
    u32 bytes = 0;
    for (int i = 0; i < 4; i++) bytes |= (u32)(from.at(row, slot + i) & 255) << 8 * i;
    return bytes;
}
static __device__ __forceinline__ u32 word_of(const Rows& from, int row, long long slot) {
    u32 word = 0;
    for (int i = 0; i < 4; i++) {
        int x = from.at(row, slot + i), y = from.at(row + 8, slot + i);
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
/// f32, [ceil(rows / rows_per_scale), groups]. A block of 128 threads for each, panels in x, row tiles in y. With `order`, row i
/// becomes row order[i] of the codes, or zeros for -1, and `rows` counts the order.
extern "C" __global__ void __launch_bounds__(PACK_THREADS)
    pack_weights(const i8* codes, const float* scales, const int* order, int rows, int groups, int rows_per_scale, u8* blocks) {
    const Rows from{codes, order, rows, (long long)groups * GROUP};
    const int thread = threadIdx.x, panel = blockIdx.x, first_row = blockIdx.y * 64;
    const int row = first_row + thread / 32 * 16 + thread % 32 / 4;
    u8* block = blocks + ((long long)blockIdx.y * gridDim.x + panel) * BLOCK_BYTES;
    for (int step = 0; step < 4; step++) {
        const long long slot = panel * 128ll + step * 32 + thread % 4 * 4;
#if W_BITS == 4
        *reinterpret_cast<uint2*>(block + step / 2 * 2048 + thread * 16 + step % 2 * 8) =
            make_uint2(word_of(from, row, slot), word_of(from, row, slot + 16));
#else
        *reinterpret_cast<uint4*>(block + step * 2048 + thread * 16) =
            make_uint4(bytes_of(from, row, slot), bytes_of(from, row + 8, slot), bytes_of(from, row, slot + 16), bytes_of(from, row + 8, slot + 16));
#endif
    }
    if (thread < 64) {
        for (int i = 0; i < GROUPS_A_STAGE; i++) {
            const int group = panel * GROUPS_A_STAGE + i, own = from.own(first_row + thread);
            const float scale = own >= 0 && group < groups ? scales[(long long)(own / rows_per_scale) * groups + group] : 0.0f;
            *reinterpret_cast<half*>(block + CODE_BYTES + i * 128 + thread * 2) = to_half(scale);
        }
    }
}

/// Blocks [row tiles][halves][OUTLIER_BYTES] of outlier codes [rows, width] and their scales [rows]. As pack_weights, with 64
/// channels a block.
extern "C" __global__ void __launch_bounds__(PACK_THREADS) pack_outliers(const i8* codes, const float* scales, const int* order, int rows, int width, u8* blocks) {
    const Rows from{codes, order, rows, width};
    const int thread = threadIdx.x, row = blockIdx.y * 64 + thread / 32 * 16 + thread % 32 / 4;
    u8* block = blocks + ((long long)blockIdx.y * gridDim.x + blockIdx.x) * OUTLIER_BYTES;
    for (int step = 0; step < 2; step++) {
        const long long slot = blockIdx.x * 64ll + step * 32 + thread % 4 * 4;
        *reinterpret_cast<uint4*>(block + step * 2048 + thread * 16) =
            make_uint4(bytes_of(from, row, slot), bytes_of(from, row + 8, slot), bytes_of(from, row, slot + 16), bytes_of(from, row + 8, slot + 16));
    }
    if (thread < 64) {
        const int own = from.own(blockIdx.y * 64 + thread);
        *reinterpret_cast<half*>(block + OUTLIER_CODE_BYTES + thread * 2) = to_half(own >= 0 ? scales[own] : 0.0f);
    }
}

/// Where the 16 bytes of chunk `chunk` of token `token` in a panel lie.
static __device__ __forceinline__ long long chunk_at(int panel, int padded, int token, int chunk) {
    return (((long long)panel * padded + token) * 8 + (chunk ^ (token & 7))) * 16;
}

/// Panels [panels][padded][128] of rows of codes [tokens, width]; with `magnitudes` as signs and magnitudes. A thread for each
/// 16 slots: panels * padded * 8.
extern "C" __global__ void __launch_bounds__(THREADS)
    tile_codes(const i8* codes, int tokens, int width, int padded, int panels, int magnitudes, u8* to) {
    const long long own = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (own >= (long long)panels * padded * 8) return;
    const int chunk = int(own % 8), token = int(own / 8 % padded), panel = int(own / 8 / padded);
    const Rows from{codes, nullptr, tokens, width};
    u32 words[4] = {};
    for (int i = 0; i < 16; i++) {
        const int code = from.at(token, panel * 128ll + chunk * 16 + i);
        const u32 byte = magnitudes ? (code < 0 ? 128 - code : code) : code & 255;
        words[i / 4] |= byte << i % 4 * 8;
    }
    *reinterpret_cast<uint4*>(to + chunk_at(panel, padded, token, chunk)) = make_uint4(words[0], words[1], words[2], words[3]);
}

/// The inverse, to rows of `width` codes; a byte a thread.
extern "C" __global__ void __launch_bounds__(THREADS)
    untile_codes(const u8* from, int tokens, int width, int padded, int magnitudes, i8* codes) {
    const long long own = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (own >= (long long)tokens * width) return;
    const int token = int(own / width), slot = int(own % width);
    const int byte = from[chunk_at(slot / 128, padded, token, slot % 128 / 16) + slot % 16];
    codes[own] = i8(magnitudes && byte > 127 ? 128 - byte : byte);
}

/// Panels with signs and magnitudes as panels in two's complement; four bytes a thread.
extern "C" __global__ void __launch_bounds__(THREADS) widen_codes(const u32* from, long long words, u32* to) {
    const long long own = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (own >= words) return;
    u32 word = 0;
    for (int i = 0; i < 32; i += 8) {
        const u32 byte = from[own] >> i & 255;
        word |= (byte > 127 ? (128 - byte) & 255 : byte) << i;
    }
    to[own] = word;
}

/// Scales [ceil(groups / 8)][padded][8] in f16 from [groups][stride] in f32; eight groups of a token a thread.
extern "C" __global__ void __launch_bounds__(THREADS) tile_scales(const float* scales, int groups, int stride, int tokens, int padded, half* to) {
    const long long own = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int token = int(own % padded), first = int(own / padded) * 8;
    if (first >= groups) return;
    for (int i = 0; i < 8; i++)
        to[own * 8 + i] = to_half(first + i < groups && token < tokens ? scales[(long long)(first + i) * stride + token] : 0.0f);
}

/// The inverse; a scale a thread.
extern "C" __global__ void __launch_bounds__(THREADS) untile_scales(const half* from, int groups, int stride, int tokens, int padded, float* scales) {
    const long long own = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int token = int(own % stride), group = int(own / stride);
    if (group < groups && token < tokens) scales[own] = to_float(from[((long long)(group / 8) * padded + token) * 8 + group % 8]);
}

// Keys and values into the pages of the cache (pages.cuh): rotary embedding, mean keys, the basis, the codes.
//
// HEAD_DIM  channels of a head, a multiple of 16 up to 128
// KV_BITS   2 to 4, held in 4 bits; 5 to 8, held in 8; or 16: f16, neither rotated nor quantized
// ROTATED   1: heads are quantized in the basis of a Hadamard transform
//
// append: THREADS threads, grid (pages that the longest addition touches, kv_heads, sequences); append_single: 64 threads, grid
// (1, kv_heads, sequences), for sequences of at most one new token, keys by the first warp and values by the second. No dynamic shared
// memory. A block makes one page of one head, so that no other block writes to its words:
//
//     rows of k and v        lanes: a head each           shared memory            words
//     [16 tokens, head] ---> embed, centre, transform, ---> [16, channels] codes ---> of the page, with what it
//                            grid, codes                    of keys and of values     held before in other tokens' bits

#if !defined(THREADS)
#error "a constant is missing: src/backend/cuda/kernels/cache.rs declares them"
#endif

template <bool Q> struct Held {
    typedef u8 Code;
};
template <> struct Held<false> {
    typedef u16 Code;
};
/// A code, or the bits of an f16.
typedef Held<QUANTIZED>::Code Code;

/// Values from row to row in shared memory.
#define CODE_PITCH (HEAD_DIM + 4)

/// What of a page is new, and where it goes.
struct PagePart {
    /// Tokens of the page.
    int from, to;
    /// The position of the page's first token, and the row of k and v that it would have.
    int position, row;
    u8* blob;

    __device__ __forceinline__ PagePart(u8* pool, const int* table, int table_stride, const int* rows, const int* held, int kv_heads) {
        const int sequence = blockIdx.z, before = held[sequence], added = rows[sequence + 1] - rows[sequence];
        const int page = before / PAGE_TOKENS + int(blockIdx.x);
        position = page * PAGE_TOKENS;
        row = rows[sequence] + position - before;
        from = max(before - position, 0);
        to = min(before + added - position, PAGE_TOKENS);
        if (from < to) blob = pool + ((long long)table[(long long)sequence * table_stride + page] * kv_heads + blockIdx.y) * PAGE_BYTES;
    }
};

/// The codes of the head `x` of a key (side 0) or value of the page's token `token`, into `codes`, with its scale and zero point into the page.
static __device__ __forceinline__ void make_codes(float (&x)[HELD], int side, int token, bool there, const PagePart& part, const float* cos, const float* sin,
                                                  const float* mean, float clip, Code* codes, float* exchange) {
    if (side == 0) {
        const long long angle = (long long)(part.position + (there ? token : part.from)) * (HEAD_DIM / 2);
        embed(x, load_angle(cos + angle, sin + angle), exchange);
        if (QUANTIZED && mean) {
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (channel_of(i) < HEAD_DIM) x[i] -= mean[blockIdx.y * HEAD_DIM + channel_of(i)];
        }
    }
#if QUANTIZED
    half* numbers = reinterpret_cast<half*>(part.blob + 2 * SIDE_BYTES);
    if (ROTATED) transform(x);
    const Grid grid = grid_of(x, clip);
    if (there && threadIdx.x % HEAD_LANES == 0) {
        numbers[side == 0 ? key_scale_at(token) : value_scale_at(token)] = to_half(grid.scale);
        numbers[side == 0 ? key_scale_at(token) + 1 : value_zero_at(token)] = to_half(grid.zero);
    }
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (there && channel_of(i) < HEAD_DIM) codes[channel_of(i)] = Code(int(code_of(grid, x[i])));
#else
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (there && channel_of(i) < HEAD_DIM) codes[channel_of(i)] = to_half(x[i]).bits;
#endif
}

/// New codes of a lane's word of a tile, and in `mask` the bits that they take. `codes(token, channel)` are those of tokens `from` to `to`.
template <class Codes> static __device__ __forceinline__ u32 word_of(int side, int tile, int lane, int which, int from, int to, u32& mask, Codes codes) {
    u32 word = 0;
    mask = 0;
#pragma unroll
    for (int part = 0; part < 32 / CODE_BITS; part++) {
        const int reg = which * WORD_REGISTERS + part % WORD_REGISTERS, odd = part / WORD_REGISTERS;
        const int row = lane / 4 + reg % 2 * 8, column = lane % 4 * 2 + reg / 2 * 8 + odd;
        const int token = side == 0 ? row : column, channel = tile * 16 + (side == 0 ? column : row);
        if (token < from || token >= to) continue;
        word |= u32(codes(token, channel)) << (part * CODE_BITS);
        mask |= ((1u << CODE_BITS) - 1) << (part * CODE_BITS);
    }
    return word;
}

/// Adds tokens to sequences. Those of sequence i are rows `rows[i]` to `rows[i + 1]` of k and v (`row_stride`
/// values from row to row, a multiple of four), which come after the `held[i]` tokens that it has; cos and sin:
/// [positions, HEAD_DIM / 2]; mean: [kv_heads, HEAD_DIM] or null, subtracted from the embedded keys; pool: [pages,
/// kv_heads, PAGE_BYTES]; table: [sequences, table_stride], the pages of each sequence.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    append(const half* k, const half* v, long long row_stride, const float* cos, const float* sin, const float* mean,
           u8* pool, const int* table, int table_stride, const int* rows, const int* held, int kv_heads, float clip) {
    __shared__ Code codes[2][PAGE_TOKENS][CODE_PITCH];
#if QUADS
    float(*exchange)[HEAD_DIM] = nullptr;
#else
    __shared__ float exchange[THREADS / 32][HEAD_DIM];
#endif
    pdl_wait();
    const PagePart part(pool, table, table_stride, rows, held, kv_heads);
    if (part.from >= part.to) return;

    // Keys, then values: all lanes do the same.
    constexpr int SLOTS = THREADS / HEAD_LANES;
    const int slot = threadIdx.x / HEAD_LANES, first_slot = threadIdx.x / 32 * 32 / HEAD_LANES;
#pragma unroll 1
    for (int side = 0; side < 2; side++) {
#pragma unroll 1
        for (int token = slot, first = first_slot; first < PAGE_TOKENS; token += SLOTS, first += SLOTS) {
            // Entire warps with nothing to do are left out, since shuffles name all lanes.
            if (first + 32 / HEAD_LANES <= part.from || first >= part.to) continue;
            const bool there = token >= part.from && token < part.to;
            float x[HELD];
            load_head(x, (side == 0 ? k : v) + (part.row + (there ? token : part.from)) * row_stride + blockIdx.y * HEAD_DIM, there);
            make_codes(x, side, token, there, part, cos, sin, mean, clip, codes[side][token], QUADS ? nullptr : exchange[threadIdx.x / 32]);
        }
    }
    __syncthreads();

    constexpr int WORDS = SIDE_BYTES / 4;
#pragma unroll
    for (int index = threadIdx.x; index < 2 * WORDS; index += THREADS) {
        const int side = index / WORDS, at = index % WORDS;
        // The inverse of word_at.
        constexpr int CHUNK = 128 * TILE_WORDS;
        const int chunk = QUANTIZED ? at / CHUNK * 4 : 0, width = TILES - chunk < 4 ? TILES - chunk : 4;
        const int lane = QUANTIZED ? at % CHUNK / (width * TILE_WORDS) : at / 4 % 32;
        const int tile = QUANTIZED ? chunk + at % CHUNK / TILE_WORDS % width : at / 128, which = at % TILE_WORDS;
        u32 mask;
        const u32 word = word_of(side, tile, lane, which, part.from, part.to, mask, [&](int token, int channel) { return codes[side][token][channel]; });
        u32* own = reinterpret_cast<u32*>(part.blob) + index;
        if (mask == 0xffffffffu) *own = word;
        else if (mask != 0) *own = (*own & ~mask) | word;
    }
}

/// The same for sequences of at most one new token, which touches a few words of its page.
extern "C" __global__ void __launch_bounds__(64)
    append_single(const half* k, const half* v, long long row_stride, const float* cos, const float* sin, const float* mean,
                  u8* pool, const int* table, int table_stride, const int* rows, const int* held, int kv_heads, float clip) {
    __shared__ Code codes[2][CODE_PITCH];
#if QUADS
    float(*exchange)[HEAD_DIM] = nullptr;
#else
    __shared__ float exchange[2][HEAD_DIM];
#endif
    pdl_wait();
    const PagePart part(pool, table, table_stride, rows, held, kv_heads);
    if (part.from >= part.to) return;
    const int side = threadIdx.x / 32, lane = threadIdx.x % 32, token = part.from;

    // Lanes whose tiles hold something of the token: keys of 4, values of 8. What their words held comes while the codes are made.
    constexpr int MOST = (TILES * TILE_WORDS * 8 + 31) / 32;
    const int lanes = side == 0 ? 4 : 8, count = TILES * TILE_WORDS * lanes;
    u32* words = reinterpret_cast<u32*>(part.blob + side * SIDE_BYTES);
    auto tile_of = [&](int index) { return index / (lanes * TILE_WORDS); };
    auto lane_of = [&](int index) { return side == 0 ? token % 8 * 4 + index / TILE_WORDS % 4 : index / TILE_WORDS % 8 * 4 + token % 8 / 2; };
    u32 before[MOST];
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int index = lane + 32 * i;
        if (index < count) before[i] = words[word_at(tile_of(index), lane_of(index), index % TILE_WORDS)];
    }
    float x[HELD];
    load_head(x, (side == 0 ? k : v) + (part.row + token) * row_stride + blockIdx.y * HEAD_DIM, true);
    make_codes(x, side, token, true, part, cos, sin, mean, clip, codes[side], QUADS ? nullptr : exchange[side]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MOST; i++) {
        const int index = lane + 32 * i, tile = tile_of(index), own = lane_of(index), which = index % TILE_WORDS;
        u32 mask = 0, word = 0;
        if (index < count) word = word_of(side, tile, own, which, token, token + 1, mask, [&](int, int channel) { return codes[side][channel]; });
        if (mask != 0) words[word_at(tile, own, which)] = (before[i] & ~mask) | word;
    }
}

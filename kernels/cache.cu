// Keys and values into the pages of the cache (pages.cuh): rotary embedding, mean keys, the basis, the codes.
//
// HEAD_DIM  channels of a head, a multiple of 16 up to 128
// KV_BITS   2 to 4, held in 4 bits; 5 to 8, held in 8; or 16: f16, neither rotated nor quantized
// ROTATED   1: heads are quantized in the basis of a Hadamard transform
//
// append: THREADS threads, grid (pages that the longest addition touches, kv_heads, sequences), no dynamic
// shared memory. A block makes one page of one head, so that no other block writes to its words:
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

/// Adds tokens to sequences. Those of sequence i are rows `rows[i]` to `rows[i + 1]` of k and v (`row_stride`
/// values from row to row, a multiple of four), which come after the `held[i]` tokens that it has; cos and sin:
/// [positions, HEAD_DIM / 2]; mean: [kv_heads, HEAD_DIM] or null, subtracted from the embedded keys; pool: [pages,
/// kv_heads, PAGE_BYTES]; table: [sequences, table_stride], the pages of each sequence.
extern "C" __global__ void __launch_bounds__(THREADS)
    append(const half* k, const half* v, long long row_stride, const float* cos, const float* sin, const float* mean,
           u8* pool, const int* table, int table_stride, const int* rows, const int* held, int kv_heads, float clip) {
    __shared__ Code codes[2][PAGE_TOKENS][CODE_PITCH];
#if QUADS
    float(*exchange)[HEAD_DIM] = nullptr;
#else
    __shared__ float exchange[THREADS / 32][HEAD_DIM];
#endif
    pdl_wait();
    const int sequence = blockIdx.z, head = blockIdx.y;
    const int before = held[sequence], first_row = rows[sequence], added = rows[sequence + 1] - first_row;
    const int page = before / PAGE_TOKENS + int(blockIdx.x);
    // The page's tokens that are new.
    const int from = max(before - page * PAGE_TOKENS, 0), to = min(before + added - page * PAGE_TOKENS, PAGE_TOKENS);
    if (from >= to) return;
    u8* blob = pool + ((long long)table[(long long)sequence * table_stride + page] * kv_heads + head) * PAGE_BYTES;
    half* numbers = reinterpret_cast<half*>(blob + 2 * SIDE_BYTES);

    // Keys, then values: all lanes do the same.
    constexpr int SLOTS = THREADS / HEAD_LANES;
    const int slot = threadIdx.x / HEAD_LANES, first_slot = threadIdx.x / 32 * 32 / HEAD_LANES;
#pragma unroll
    for (int side = 0; side < 2; side++) {
#pragma unroll 1
        for (int token = slot, first = first_slot; first < PAGE_TOKENS; token += SLOTS, first += SLOTS) {
            // Entire warps with nothing to do are left out, since shuffles name all lanes.
            if (first + 32 / HEAD_LANES <= from || first >= to) continue;
            const bool there = token >= from && token < to;
            const int position = page * PAGE_TOKENS + token;
            const long long row = there ? first_row + position - before : first_row;
            float x[HELD];
            load_head(x, (side == 0 ? k : v) + row * row_stride + head * HEAD_DIM, there);
            if (side == 0) {
                const long long angle = (long long)(there ? position : before) * (HEAD_DIM / 2);
                embed(x, load_angle(cos + angle, sin + angle), QUADS ? nullptr : exchange[threadIdx.x / 32]);
                if (QUANTIZED && mean) {
#pragma unroll
                    for (int i = 0; i < HELD; i++)
                        if (channel_of(i) < HEAD_DIM) x[i] -= mean[head * HEAD_DIM + channel_of(i)];
                }
            }
#if QUANTIZED
            if (ROTATED) transform(x);
            const Grid grid = grid_of(x, clip);
            if (there && threadIdx.x % HEAD_LANES == 0) {
                numbers[side == 0 ? key_scale_at(token) : value_scale_at(token)] = to_half(grid.scale);
                numbers[side == 0 ? key_scale_at(token) + 1 : value_zero_at(token)] = to_half(grid.zero);
            }
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (there && channel_of(i) < HEAD_DIM) codes[side][token][channel_of(i)] = Code(int(code_of(grid, x[i])));
#else
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (there && channel_of(i) < HEAD_DIM) codes[side][token][channel_of(i)] = to_half(x[i]).bits;
#endif
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
        u32 word = 0, mask = 0;
#pragma unroll
        for (int part = 0; part < 32 / CODE_BITS; part++) {
            const int reg = which * WORD_REGISTERS + part % WORD_REGISTERS, odd = part / WORD_REGISTERS;
            const int row = lane / 4 + reg % 2 * 8, column = lane % 4 * 2 + reg / 2 * 8 + odd;
            const int token = side == 0 ? row : column, channel = tile * 16 + (side == 0 ? column : row);
            if (token < from || token >= to) continue;
            word |= u32(codes[side][token][channel]) << (part * CODE_BITS);
            mask |= ((1u << CODE_BITS) - 1) << (part * CODE_BITS);
        }
        u32* own = reinterpret_cast<u32*>(blob) + index;
        if (mask == 0xffffffffu) *own = word;
        else if (mask != 0) *own = (*own & ~mask) | word;
    }
}

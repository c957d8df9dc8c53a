// Keys and values into the pages of the cache (pages.cuh): rotary embedding, mean keys, the basis, the codes.
//
// HEAD_DIM  channels of a head, a multiple of 16 up to 128
// KV_BITS   2 to 4, held in 4 bits; 5 to 8, held in 8; or 16: f16, neither rotated nor quantized
// ROTATED   1: heads are quantized in the basis of a Hadamard transform
//
// BY_SHUFFLES  1: append puts the words of a page together by shuffles (heads of 128 in the basis, codes in 4 bits); 0: through shared memory
//
// append: THREADS threads, grid (pages that the longest addition touches, blocks of kv_heads, sequences); append_single: 64 threads, grid
// (1, kv_heads, sequences), for sequences of at most one new token, keys by the first warp and values by the second. No dynamic shared
// memory. A block makes one page of one head, so that no other block writes to its words:
//
//     rows of k and v        lanes: a head each           shared memory            words
//     [16 tokens, head] ---> embed, centre, transform, ---> [16, channels] codes ---> of the page, with what it
//                            grid, codes                    of keys and of values     held before in other tokens' bits
//
// BY_SHUFFLES a block makes that page of several heads, one after another, and a warp makes the words of four tokens of keys or of values:
//
//     warp w of four: tokens 2 w, 2 w + 1 in lanes 0 .. 15, 2 w + 8, 2 w + 9 in lanes 16 .. 31; the next head's values are in flight
//     codes ---> lanes 4 apart: channels c and c + 8 of a tile ---> lanes 16 apart: tokens t and t + 8 ---> words

#if !defined(THREADS) || !defined(BY_SHUFFLES)
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

    __device__ __forceinline__ PagePart(u8* pool, const int* table, int table_stride, const int* rows, const int* held, int kv_heads, int head) {
        const int sequence = blockIdx.z, before = held[sequence], added = rows[sequence + 1] - rows[sequence];
        const int page = before / PAGE_TOKENS + int(blockIdx.x);
        position = page * PAGE_TOKENS;
        row = rows[sequence] + position - before;
        // The shuffles: the compiler sees that a warp does not diverge.
        from = __shfl_sync(0xffffffffu, max(before - position, 0), 0);
        to = __shfl_sync(0xffffffffu, min(before + added - position, PAGE_TOKENS), 0);
        if (from < to) blob = pool + ((long long)table[(long long)sequence * table_stride + page] * kv_heads + head) * PAGE_BYTES;
    }
};

/// Subtracts the mean key of the head `head`.
static __device__ __forceinline__ void subtract_mean(float (&x)[HELD], const float* mean, int head) {
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (channel_of(i) < HEAD_DIM) x[i] -= mean[head * HEAD_DIM + channel_of(i)];
}

#if QUANTIZED
/// Stores scale and zero point of the page's token `token`.
static __device__ __forceinline__ void put_grid(const Grid& grid, int side, int token, half* numbers) {
    numbers[side == 0 ? key_scale_at(token) : value_scale_at(token)] = to_half(grid.scale);
    numbers[side == 0 ? key_scale_at(token) + 1 : value_zero_at(token)] = to_half(grid.zero);
}
#endif

/// The codes of the head `x` of a key (side 0) or value of the page's token `token`, into `codes`, with its scale and zero point into the page.
static __device__ __forceinline__ void make_codes(float (&x)[HELD], int side, int token, bool there, const PagePart& part, const float* cos, const float* sin,
                                                  const float* mean, float clip, Code* codes, float* exchange) {
    if (side == 0) {
        const long long angle = (long long)(part.position + (there ? token : part.from)) * (HEAD_DIM / 2);
        embed(x, load_angle(cos + angle, sin + angle), exchange);
        if (QUANTIZED && mean) subtract_mean(x, mean, blockIdx.y);
    }
#if QUANTIZED
    if (ROTATED) transform(x);
    const Grid grid = grid_of(x, clip);
    if (there && threadIdx.x % HEAD_LANES == 0) put_grid(grid, side, token, reinterpret_cast<half*>(part.blob + 2 * SIDE_BYTES));
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

#if BY_SHUFFLES
static_assert(CODE_BITS == 4 && ROTATED && HEAD_DIM == 128 && HEAD_LANES == 16, "words of eight codes, four lanes of a head for the channels of a tile");
static_assert(THREADS == 256, "four warps have a side of a page, each four of its tokens, two at a time");

/// A lane's eight codes, those of values i in byte i % 4 of word i / 4: `code_of` of each. The sum with 1.5 * 2^23 rounds to an integer, which its
/// bits hold.
static __device__ __forceinline__ uint2 codes_of(const Grid& grid, const float (&x)[HELD]) {
    constexpr int TOP = (1 << KV_BITS) - 1;
    const float round = 12582912.0f;
    const int zero = __float_as_int(grid.zero + round) - __float_as_int(round) - __float_as_int(round);
    u32 code[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) code[i] = max(min(__float_as_int(x[i] * grid.inverse + round) + zero, TOP), 0);
    return make_uint2(pack_codes(code[0], code[1], code[2], code[3]), pack_codes(code[4], code[5], code[6], code[7]));
}

/// Puts a word that is new where `mask` says so.
static __device__ __forceinline__ void put_word(u32* to, u32 word, u32 mask) {
    if (mask == 0xffffffffu) *to = word;
    else if (mask != 0) *to = (*to & ~mask) | (word & mask);
}

/// The eight values of a lane of a head, in f16: four of either half.
struct PackedHead {
    uint2 lower, upper;

    __device__ __forceinline__ void load(const half* from) {
        lower = *reinterpret_cast<const uint2*>(from);
        upper = *reinterpret_cast<const uint2*>(from + HEAD_DIM / 2);
    }
    __device__ __forceinline__ void unpack(float (&x)[HELD]) const {
        x[0] = low_half(lower.x), x[1] = high_half(lower.x), x[2] = low_half(lower.y), x[3] = high_half(lower.y);
        x[4] = low_half(upper.x), x[5] = high_half(upper.x), x[6] = low_half(upper.y), x[7] = high_half(upper.y);
    }
};

/// The bits of a warp's two words of a tile that are new: of keys those of tokens 2 w and 2 w + 8, then of 2 w + 1 and 2 w + 9; of values
/// those of all four, the same in both.
struct NewBits {
    u32 words[2];

    __device__ __forceinline__ NewBits(int side, int w, const PagePart& part) {
        auto of = [&](int token, u32 mask) { return token >= part.from && token < part.to ? mask : 0; };
        if (side == 0) {
            words[0] = of(2 * w, 0x0f0f0f0f) | of(2 * w + 8, 0xf0f0f0f0);
            words[1] = of(2 * w + 1, 0x0f0f0f0f) | of(2 * w + 9, 0xf0f0f0f0);
        } else {
            words[0] = words[1] = of(2 * w, 0xff) | of(2 * w + 8, 0xff00) | of(2 * w + 1, 0xff0000) | of(2 * w + 9, 0xff000000);
        }
    }
};

/// Puts the words of a side that a warp makes, of tokens 2 w, 2 w + 1, and those 8 on, which the upper half of the warp holds. `codes[i]` are those
/// of the lane's token i (`codes_of`): pair u of them is of tile 2 u + l / 8, channels 2 (l % 8) and the next.
static __device__ __forceinline__ void put_words(const uint2 (&codes)[2], int side, int w, const NewBits& bits, u32* words) {
    const int lane = threadIdx.x % 16, t = lane % 4;
    const bool upper = lane & 4, last = threadIdx.x & 16;
    // A lane with the lower eight channels of its tiles gets the upper ones of those of u 0 and 1, the other the lower ones of u 2 and 3.
    u32 low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const u32 own = upper ? codes[i].y : codes[i].x, other = __shfl_xor_sync(0xffffffffu, upper ? codes[i].x : codes[i].y, 4);
        low[i] = upper ? other : own;
        high[i] = upper ? own : other;
    }
    // Then the halves of the warp, of u even and odd.
    const int tile = (upper ? 4 : 0) + (last ? 2 : 0) + lane / 8;
    if (side == 0) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 even = __byte_perm(low[i], high[i], 0x5140), odd = __byte_perm(low[i], high[i], 0x7362);
            const u32 own = last ? odd : even, other = __shfl_xor_sync(0xffffffffu, last ? even : odd, 16);
            put_word(words + word_at(tile, 4 * (2 * w + i) + t, 0), last ? other | own << 4 : own | other << 4, bits.words[i]);
        }
    } else {
        const u32 now = low[0] | high[0] << 4, next = low[1] | high[1] << 4;
        const u32 even = __byte_perm(now, next, 0x5410), odd = __byte_perm(now, next, 0x7632);
        const u32 own = last ? odd : even, other = __shfl_xor_sync(0xffffffffu, last ? even : odd, 16);
        const u32 first = last ? other : own, second = last ? own : other;
        put_word(words + word_at(tile, 8 * t + w, 0), __byte_perm(first, second, 0x6240), bits.words[0]);
        put_word(words + word_at(tile, 8 * t + 4 + w, 0), __byte_perm(first, second, 0x7351), bits.words[1]);
    }
}

/// What warp w of the four of side SIDE makes of a page: its tokens of `heads` heads, the next one's values in flight. A token that is not new
/// is made from one that is, and not stored.
template <int SIDE>
static __device__ __forceinline__ void append_quarter(int w, const half* from, long long row_stride, const PagePart& part, int first_head, int heads,
                                                      const float* cos, const float* sin, const float* mean, float clip) {
    const NewBits bits(SIDE, w, part);
    if ((bits.words[0] | bits.words[1]) == 0) return;
    const int token = 2 * w + (threadIdx.x & 16 ? 8 : 0), at = threadIdx.x % 16 * 4;
    const half* rows[2];
    int angles[2];
    bool stored[2];
    PackedHead packed[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int held = min(max(token + i, part.from), part.to - 1);
        rows[i] = from + (part.row + held) * row_stride + first_head * HEAD_DIM + at;
        packed[i].load(rows[i]);
        angles[i] = (part.position + held) * (HEAD_DIM / 2);
        stored[i] = at == 0 && held == token + i;
    }
    u8* blob = part.blob;
#pragma unroll 1
    for (int head = 0; head < heads; head++, blob += PAGE_BYTES) {
        float x[2][HELD];
#pragma unroll
        for (int i = 0; i < 2; i++) packed[i].unpack(x[i]);
        if (head + 1 < heads) {
#pragma unroll
            for (int i = 0; i < 2; i++) packed[i].load(rows[i] += HEAD_DIM);
        }
        uint2 codes[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (SIDE == 0) {
                embed(x[i], load_angle(cos + angles[i], sin + angles[i]), nullptr);
                if (mean) subtract_mean(x[i], mean, first_head + head);
            }
            transform_spread(x[i]);
            const Grid grid = quick_grid(x[i], clip);
            if (stored[i]) put_grid(grid, SIDE, token + i, reinterpret_cast<half*>(blob + 2 * SIDE_BYTES));
            codes[i] = codes_of(grid, x[i]);
        }
        put_words(codes, SIDE, w, bits, reinterpret_cast<u32*>(blob + SIDE * SIDE_BYTES));
    }
}
#endif

/// Adds tokens to sequences. Those of sequence i are rows `rows[i]` to `rows[i + 1]` of k and v (`row_stride`
/// values from row to row, a multiple of four), which come after the `held[i]` tokens that it has; cos and sin:
/// [positions, HEAD_DIM / 2]; mean: [kv_heads, HEAD_DIM] or null, subtracted from the embedded keys; pool: [pages,
/// kv_heads, PAGE_BYTES]; table: [sequences, table_stride], the pages of each sequence.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    append(const half* k, const half* v, long long row_stride, const float* cos, const float* sin, const float* mean,
           u8* pool, const int* table, int table_stride, const int* rows, const int* held, int kv_heads, float clip) {
    pdl_wait();
    const int heads_each = (kv_heads + int(gridDim.y) - 1) / int(gridDim.y), first_head = int(blockIdx.y) * heads_each;
    const PagePart part(pool, table, table_stride, rows, held, kv_heads, first_head);
    if (part.from >= part.to) return;
#if BY_SHUFFLES
    // The shuffle: the compiler sees that a warp does not diverge.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), heads = min(heads_each, kv_heads - first_head);
    if (warp < 4) append_quarter<0>(warp, k, row_stride, part, first_head, heads, cos, sin, mean, clip);
    else append_quarter<1>(warp - 4, v, row_stride, part, first_head, heads, cos, sin, mean, clip);
#else
    __shared__ Code codes[2][PAGE_TOKENS][CODE_PITCH];
#if QUADS
    float(*exchange)[HEAD_DIM] = nullptr;
#else
    __shared__ float exchange[THREADS / 32][HEAD_DIM];
#endif

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
#endif
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
    const PagePart part(pool, table, table_stride, rows, held, kv_heads, blockIdx.y);
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

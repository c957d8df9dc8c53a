// The product of quantized activations and quantized weights on Hopper's tensor cores, y = x w^T in
// the arithmetic of docs/format.md.
//
// INT4 and FP4 codes are exact in E4M3: |n| with a sign in bit 7 is n * 2^-9, below 8 as a subnormal. Products
// of two such numbers, and their sums over a group, keep within the 14 bits that the tensor cores' FP8
// accumulators hold (up to 2^14 for groups of 128: 8 * 8 * 128 = 8192), so that a group's sum is the exact
// integer, already as a float. Codes of 8 bits, and the INT8 outliers, take the s8 instruction instead, and so do all
// codes of up to 16 tokens, by `mma.sync` (BY_WARPS).
//
// The weights are the left operand: 64 rows of them times TOKENS tokens. They come packed, in the order in
// which threads hold them (hopper_layout.cu makes it), are unpacked in registers, and never exist as bytes in memory.
// Tokens are the right operand and go from device memory to shared memory to the tensor cores as they are.
//
// Macros:
//     GROUP     32, 64 or 128
//     TOKENS    of a tile: 8, 16, 32 or 64 in product_stream.cu, 64 or 128 in product_tiles.cu
//     BLOCKS    blocks of 64 rows in a tile
//     STAGES    stages that shared memory holds
//     PANELS    panels of 128 slots in a stage: 1 or 2; 1 in product_tiles.cu
//     X_BITS    4: sign and magnitude; 8: two's complement
//     W_BITS    4 or 8: bits in which weights are packed
//     W_FP4     1: weights are FP4, doubled
//     BY_WARPS  1: products by mma.sync and not by wgmma (product_stream.cu)
//     THREADS   threads of the consumer (MMA) warpgroups, one for 64 rows
//     PRODUCERS threads of the producer warps
//     OUT       0: y is f32; 1: y is f16; 2: y is f32, and results are added to it
//
// Operands: tokens in panels of 128 slots, a row's sixteenths exchanged (the chunk c of token t is at c ^ t % 8),
// `padded` to a multiple of 8:
//     x   [panels][padded][128], sx [ceil(groups / 8)][padded][8] in f16, finite also where there is no group
//     xo  [ceil(halves / 2)][padded][128] s8, sxo [padded] in f32
// and weights in blocks of 64 rows and 128 slots, what lies beyond rows and channels being zero:
//     w   [ceil(rows / 64)][panels][BLOCK_BYTES]: the codes, then [128 / GROUP][64] scales in f16
//     wo  [ceil(rows / 64)][halves][OUTLIER_BYTES]: s8 codes of 64 outlier channels, then the rows' scales in f16
// y is [tokens, rows].

/// Results of 64 rows and TOKENS tokens that a thread of a warpgroup holds: those of tokens 8 j + 2 (t % 4) and the next,
/// in rows t % 32 / 4 and eight on of its warp's 16, are 4 j to 4 j + 3.
#define HELD (TOKENS / 2)
#define GROUPS_A_STAGE (PANEL / GROUP)
#define STEPS_A_GROUP (GROUP / 32)
/// Whether codes go through the FP8 units.
#define BY_FLOAT (X_BITS <= 4 && W_BITS <= 4)

#if !defined(GROUP) || !defined(W_BITS) || !defined(W_FP4) || !defined(PANEL) || !defined(BLOCK_ROWS) || \
    !defined(SCALE_GROUPS) || !defined(OUTLIER_PART) || !defined(CODE_BYTES) || !defined(BLOCK_BYTES) || \
    !defined(OUTLIER_CODE_BYTES) || !defined(OUTLIER_BYTES) || !defined(TOKENS) || !defined(BLOCKS) || !defined(PANELS) || \
    !defined(STAGES) || !defined(BY_WARPS) || !defined(X_BITS) || !defined(OUT) || !defined(THREADS) || !defined(PRODUCERS) || \
    !defined(TOKEN_CODES) || !defined(WEIGHTS) || !defined(STAGE_BYTES)
#error "a constant is missing: src/backend/cuda/kernels/product.rs declares them"
#endif
static_assert(PANEL == 128 && BLOCK_ROWS == 64 && SCALE_GROUPS == 8 && OUTLIER_PART == 64, "what wgmma and bulk copies take");

// A stage: scales of the tokens, their codes from TOKEN_CODES on, from WEIGHTS on the weights of each block of rows. The scales come first,
// because by compute-sanitizer's count wgmma reads 128 bytes a token of what is not swizzled, though it uses 16: after the last stage there
// may be no memory.

/// An address in shared memory as descriptions have it, without the block's rank in its cluster.
static __device__ __forceinline__ u32 place_of(u32 address) { return (address & 0x3ffff) >> 4; }
/// The lower half of what describes tokens at a multiple of 1024 in shared memory: rows of 128 bytes, swizzled, eight
/// rows after eight rows. 32 slots further on, it is greater by 2.
static __device__ __forceinline__ u32 describe(u32 address) { return place_of(address) | 1 << 16; }

#if !BY_WARPS && TOKENS != 32 && TOKENS != 64 && TOKENS != 128
#error "there is no tile of TOKENS tokens"
#endif

// ---- Weights ----
//
// A word holds eight codes of 4 bits: four of row g in what becomes register x, four of row g + 8 in y.
// Integers: of x, byte i has its sign in bit 7 and its lower bits in bits 0 to 2; of y, the sign is in bit 3 of
// byte i and the lower bits in bits 4 to 6 of the byte before it. The lower bits are those of the magnitude, less
// one if the code is negative (so -8 fits), which makes them those of two's complement, inverted.
// FP4: the sign bits are the same; the indices of magnitudes are in bits 4 i to 4 i + 2, first x's, then y's.

#if W_BITS == 4
#if W_FP4
static __device__ __forceinline__ void unpack(u32 word, u32& x, u32& y) {
    x = __byte_perm(0x03020100, 0x0c080604, word & 0x7777);
    y = __byte_perm(0x03020100, 0x0c080604, word >> 16 & 0x7777);
    const u32 x_signs = word & 0x80808080, y_signs = word << 4 & 0x80808080;
#if BY_FLOAT
    x |= x_signs;
    y |= y_signs;
#else
    // The negative is all bits inverted, and one more; a zero has no sign.
    x = (x ^ sign_bytes(x_signs)) + (x_signs >> 7);
    y = (y ^ sign_bytes(y_signs)) + (y_signs >> 7);
#endif
}
#else
static __device__ __forceinline__ void unpack(u32 word, u32& x, u32& y) {
    const u32 rotated = __funnelshift_l(word, word, 4);
#if BY_FLOAT
    x = word & 0x87878787;
    y = rotated & 0x87878787;
    x += (x & 0x80808080) >> 7;
    y += (y & 0x80808080) >> 7;
#else
    x = (word & 0x07070707) ^ sign_bytes(word);
    y = (rotated & 0x07070707) ^ sign_bytes(rotated);
#endif
}
#endif
#endif

/// A thread's part of STEPS times 32 slots of the weights: as they lie in a block, and as left operands.
template <int STEPS> struct Words {
    u32 v[STEPS * W_BITS / 2];

    /// Those from the 32 slots `first` of the block's 128 on.
    __device__ __forceinline__ void load(u32 block, int first) {
        const u32 own = block + threadIdx.x % 128 * 16;
#if W_BITS == 4
        if constexpr (STEPS == 1) {
            const uint2 two = load_shared_64(own + first / 2 * 2048 + first % 2 * 8);
            v[0] = two.x;
            v[1] = two.y;
            return;
        }
        first /= 2;
#endif
#pragma unroll
        for (int i = 0; i < STEPS * W_BITS / 8; i++) {
            const uint4 four = load_shared_128(own + (first + i) * 2048);
            v[4 * i] = four.x;
            v[4 * i + 1] = four.y;
            v[4 * i + 2] = four.z;
            v[4 * i + 3] = four.w;
        }
    }
    /// As left operands those from the 32 slots `first` on, as many as `a` holds.
    template <int COUNT> __device__ __forceinline__ void unpack_to(u32 (&a)[COUNT], int first) const {
#pragma unroll
        for (int i = 0; i < COUNT * W_BITS / 8; i++) {
            const u32 word = v[first * W_BITS / 2 + i];
#if W_BITS == 4
            unpack(word, a[2 * i], a[2 * i + 1]);
#else
            a[i] = word;
#endif
        }
    }
};

/// The scales, f16, of a thread's two rows, of the 64 at `from`.
struct RowScales {
    u16 low, high;
};
static __device__ __forceinline__ RowScales load_row_scales(u32 from) {
    RowScales scales;
    const u32 at = from + (threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) * 2;
    scales.low = load_shared_16(at);
    scales.high = load_shared_16(at + 16);
    return scales;
}

/// The scales of a thread's two rows as a left operand of 16 columns: that of `group` among eight has them, the others have
/// zeros.
struct RowColumns {
    u32 low, high;

    __device__ __forceinline__ RowColumns(const RowScales& scales, int group) {
        const bool own = threadIdx.x % 4 == group / 2 % 4;
        low = own ? (u32)scales.low << group % 2 * 16 : 0;
        high = own ? (u32)scales.high << group % 2 * 16 : 0;
    }
};

/// total = fma(s_x s_w, sum, total). Sums of FP8 products are by 2^18 too small: the totals are rescaled in the end.
static __device__ __forceinline__ void promote(float (&total)[HELD], const u32 (&sums)[HELD], const u32 (&scales)[HELD]) {
#pragma unroll
    for (int i = 0; i < HELD; i++)
        total[i] = fmaf(__uint_as_float(scales[i]), BY_FLOAT ? __uint_as_float(sums[i]) : __int2float_rn((int)sums[i]), total[i]);
}

// ---- Results ----

#if OUT == 1
typedef half Output;
#else
typedef float Output;
#endif

// ---- The ring of stages ----

struct Operands {
    const i8* x;
    const half* sx;
    const i8* xo;
    const float* sxo;
    const i8* w;
    const i8* wo;
    int tokens, padded, rows, panels, halves;
};

/// A slot of the ring of stages: where the stage and its barriers are. A warpgroup that takes every STRIDE-th stage begins at one
/// of the first STRIDE.
template <int STRIDE> struct Ring {
    u32 here, full, end, phase;

    __device__ __forceinline__ Ring(u32 stages, u32 barriers, int first)
        : here(stages + first * STAGE_BYTES), full(barriers + 8 * first), end(barriers + 8 * STAGES), phase(0) {
        // Kept, since finding them again takes longer.
        keep_apart(here);
        keep_apart(full);
        keep_apart(end);
    }
    __device__ __forceinline__ u32 empty() const { return full + 8 * STAGES; }
    __device__ __forceinline__ void next() {
        here += STRIDE * STAGE_BYTES;
        full += 8 * STRIDE;
        if (full >= end) {
            here -= STAGES * STAGE_BYTES;
            full -= 8 * STAGES;
            phase ^= 1;
        }
    }
    __device__ __forceinline__ void wait() const { barrier_wait(full, phase); }
};

/// Releases the stage of an `empty` barrier; called by entire warps.
static __device__ __forceinline__ void release(u32 empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

/// Sets up the barriers; the entire thread block calls it. `warps` warps release a stage.
static __device__ __forceinline__ void make_ring(u32 barriers, int warps) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers + 8 * i, 1);
            barrier_init(barriers + 8 * (STAGES + i), warps);
        }
        barrier_init_fence();
    }
    __syncthreads();
}

/// The weights of 64 outlier channels as left operands.
static __device__ __forceinline__ void load_outliers(u32* a, u32 block) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
        const uint4 v = load_shared_128(block + step * 2048 + threadIdx.x % 128 * 16);
        a[4 * step] = v.x;
        a[4 * step + 1] = v.y;
        a[4 * step + 2] = v.z;
        a[4 * step + 3] = v.w;
    }
}

#if !BY_WARPS
/// Steps of 32 slots of a group that are unpacked together.
#define STEPS_A_PART (GROUP == 128 ? 2 : STEPS_A_GROUP)
#define PARTS_A_GROUP (STEPS_A_GROUP / STEPS_A_PART)
/// The left operands of a group.
typedef u32 Left[PARTS_A_GROUP][4 * STEPS_A_PART];

/// Starts the products of group `group` of a panel: of its weights, which are in `words` from the 32 slots `first` on, with the
/// tokens' codes; and of the scales, which are of rank one: the tokens' 16 columns are twice the same eight groups. A product of
/// two f16 numbers is exact in f32. While some are multiplied, the next are unpacked.
template <int STEPS>
static __device__ __forceinline__ void start_group(u32 (&sums)[HELD], u32 (&scales)[HELD], Left& a, const Words<STEPS>& words, int first,
                                                   const RowColumns& columns, u32 token_scales, u32 token_codes, int group) {
    pin(sums);
    pin(scales);
    wgmma_fence();
    multiply_scales(scales, columns.low, columns.high, place_of(token_scales));
#pragma unroll
    for (int part = 0; part < PARTS_A_GROUP; part++) {
        words.unpack_to(a[part], first + part * STEPS_A_PART);
        pin(a[part]);
        // The compiler moves no unpacking to before a fence.
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < STEPS_A_PART; i++) {
            const int step = part * STEPS_A_PART + i;
            const u32 tokens = describe(token_codes) + 2 * (group * STEPS_A_GROUP + step);
#if BY_FLOAT
            multiply_e4m3(sums, a[part] + 4 * i, tokens, step > 0);
#else
            multiply_s8(sums, a[part] + 4 * i, tokens, step > 0);
#endif
        }
    }
    wgmma_commit();
}

/// Waits for what `start_group` started.
static __device__ __forceinline__ void finish_group(u32 (&sums)[HELD], u32 (&scales)[HELD], Left& a) {
    wgmma_wait<0>();
    pin(sums);
    pin(scales);
#pragma unroll
    for (int part = 0; part < PARTS_A_GROUP; part++) pin(a[part]);
}

/// Multiplies 32 * STEPS outlier channels, whose weights are `a`, with the tokens' codes at `token_codes`, and adds to the sums if `add`.
template <int STEPS> static __device__ __forceinline__ void multiply_outliers(u32 (&sums)[HELD], u32 (&a)[4 * STEPS], u32 token_codes, bool add) {
    pin(a);
    pin(sums);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++) multiply_s8(sums, a + 4 * step, token_codes + 2 * step, step > 0 || add);
    wgmma_commit();
    wgmma_wait<0>();
    pin(sums);
    pin(a);
}

#endif  // !BY_WARPS

/// Adds the outliers' sums to the totals, with the scales of any outlier stage.
static __device__ __forceinline__ void promote_outliers(float (&total)[HELD], const u32 (&sums)[HELD], u32 here, u32 block) {
    const RowScales row_scales = load_row_scales(block + OUTLIER_CODE_BYTES);
    const float low = to_float(half{row_scales.low}), high = to_float(half{row_scales.high});
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        const float2 s = load_shared_pair(here + (8 * j + threadIdx.x % 4 * 2) * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float& to = total[4 * j + i];
            to = fmaf((i % 2 ? s.y : s.x) * (i / 2 ? high : low), __int2float_rn((int)sums[4 * j + i]), to);
            // One after the other: all scales together would not fit into the registers.
            keep_apart(to);
        }
    }
}

/// Rescales the totals of products of FP8 numbers. A power of two changes no rounding.
static __device__ __forceinline__ void rescale(float (&total)[HELD]) {
#if BY_FLOAT
#pragma unroll
    for (int i = 0; i < HELD; i++) total[i] *= 262144.0f;
#endif
}

// The product of quantized activations and quantized weights on Hopper's tensor cores, y = x w^T in
// the arithmetic of docs/format.md.
//
// INT4 and FP4 codes are exact in E4M3: |n| with a sign in bit 7 is n * 2^-9, below 8 as a subnormal. Products
// of two such numbers, and their sums over a group, keep within the 14 bits that the tensor cores' FP8
// accumulators hold (up to 2^14 for groups of 128: 8 * 8 * 128 = 8192), so that a group's sum is the exact
// integer, already as a float. Codes of 8 bits, and the INT8 outliers, take the s8 instruction instead, and so do all
// codes of few tokens, by `mma.sync` (BY_WARPS).
//
// The weights are the left operand: 64 rows of them times TOKENS tokens. They come packed, in the order in
// which threads hold them (blocks.cu makes it), are unpacked in registers, and never exist as bytes in memory.
// Tokens are the right operand and go from device memory to shared memory to the tensor cores as they are.
//
// Macros:
//     GROUP     32, 64 or 128
//     TOKENS    of a tile: 8, 16, 32 or 64 in product_stream.cu, 128 in product_tiles.cu
//     BLOCKS    blocks of 64 rows in a tile
//     STAGES    stages that shared memory holds
//     PANELS    times 128 places in a stage: 1 or 2; 1 in product_tiles.cu
//     X_BITS    4: sign and magnitude; 8: two's complement
//     W_BITS    4 or 8: bits in which weights are packed
//     W_FP4     1: weights are FP4, doubled
//     BY_WARPS  1: few tokens, not multiplied by wgmma (product_stream.cu)
//     OUT       0: y is f32; 1: y is f16; 2, in product_tiles.cu: y is f32, and results are added to it
//
// Operands: tokens in panels of 128 places, a row's sixteenths exchanged (the chunk c of token t is at c ^ t % 8),
// `padded` to a multiple of 8:
//     x   [panels][padded][128], sx [ceil(groups / 8)][padded][8] in f16, finite also where there is no group
//     xo  [ceil(halves / 2)][padded][128] s8, sxo [padded] in f32
// and weights in blocks of 64 rows and 128 places, what lies beyond rows and channels being zero:
//     w   [ceil(rows / 64)][panels][BLOCK_BYTES]: the codes, then [128 / GROUP][64] scales in f16
//     wo  [ceil(rows / 64)][halves][OUTLIER_BYTES]: s8 codes of 64 outlier channels, then the rows' scales in f16
// y is [tokens, rows].

typedef unsigned short u16;

/// Results of 64 rows and TOKENS tokens that a thread of a warpgroup holds: those of tokens 8 j + 2 (t % 4) and the next,
/// in rows t % 32 / 4 and eight on of its warp's 16, are 4 j to 4 j + 3.
#define HELD (TOKENS / 2)
#define GROUPS_A_STAGE (128 / GROUP)
#define STEPS_A_GROUP (GROUP / 32)
/// Whether codes go through the FP8 units.
#define BY_FLOAT (X_BITS <= 4 && W_BITS <= 4)

#define CODE_BYTES (64 * 128 * W_BITS / 8)
#define BLOCK_BYTES (CODE_BYTES + GROUPS_A_STAGE * 64 * 2)
#define OUTLIER_BYTES (4096 + 64 * 2)
#define X_BYTES (TOKENS * 128)
/// Scales of eight groups, of which those of the stage are used; of outliers, one float a token.
#define SX_BYTES (TOKENS * 16)
/// A stage: scales of the tokens, their codes, weights of each block of rows. The scales come first, because by compute-sanitizer's
/// count wgmma reads 128 bytes a token of what is not swizzled, though it uses 16: behind the last stage there may be no memory.
#define TOKEN_CODES ((SX_BYTES + 1023) / 1024 * 1024)
#define WEIGHTS (TOKEN_CODES + PANELS * X_BYTES)
#define STAGE_BYTES ((WEIGHTS + PANELS * BLOCKS * BLOCK_BYTES + 1023) / 1024 * 1024)

// ---- Barriers and copies ----

static __device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
static __device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// By a whole warp, of which one lane arrives and announces `bytes`.
static __device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n@one mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n}" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
static __device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra ready;\nbra again;\nready:\n}" ::"r"(barrier), "r"(phase)
        : "memory");
}
/// Copies `bytes` (a multiple of 16) to shared memory; the barrier counts them. By a whole warp, of which one lane asks: for a lane that
/// goes its own way the compiler makes a loop of it, and no address stays in uniform registers.
static __device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
                 "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n}" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}
/// A named barrier of some of a block's threads.
static __device__ __forceinline__ void group_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }


// ---- wgmma ----

static __device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> static __device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/// An address in shared memory as descriptions have it, without the block's rank in its cluster.
static __device__ __forceinline__ u32 place_of(u32 address) { return (address & 0x3ffff) >> 4; }
/// The lower half of what describes tokens at a multiple of 1024 in shared memory: rows of 128 bytes, swizzled, eight
/// rows after eight rows. 32 places further on, it is greater by 2.
static __device__ __forceinline__ u32 describe(u32 address) { return place_of(address) | 1 << 16; }

#define D4(d, c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define D8(d, c, i) D4(d, c, i), D4(d, c, i + 4)
#define D16(d, c, i) D8(d, c, i), D8(d, c, i + 8)
#define D32(d, c, i) D16(d, c, i), D16(d, c, i + 16)
#define D64(d, c, i) D32(d, c, i), D32(d, c, i + 32)
#define R4 "%0, %1, %2, %3"
#define R8 R4 ", %4, %5, %6, %7"
#define R16 R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define R32 R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R64 R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/// The instructions for n tokens, whose sums are operands R of the assembler: d = a b, or with `add` d += a b, of 32 places
/// of codes; and d = a b of 16 columns of f16 with nothing in half of a. Sums are bits, floats or integers, so that
/// both can take the same registers. The operands after them have numbers: those of a, of what describes b, of the rest.
#define MULTIPLY(name, n, kind, factors, D, R, a0, a1, a2, a3, b_, add_)                                                         \
    static __device__ __forceinline__ void name(u32(&d)[n / 2], const u32* a, u32 b, int add) {                                  \
        asm volatile("{\n.reg .pred p;\n.reg .b64 tokens;\nsetp.ne.b32 p, %" add_ ", 0;\nmov.b64 tokens, {%" b_ ", 0x40000040};\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k32." kind " {" R "}, {%" a0 ", %" a1 ", %" a2 ", %" a3             \
                     "}, tokens, p" factors ";\n}"                                                                               \
                     : D(d, "+r", 0)                                                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add));                                            \
    }
#define MULTIPLY_SCALES(n, D, R, a0, a1, b_, zero)                                                                               \
    static __device__ __forceinline__ void multiply_scales(u32(&d)[n / 2], u32 low, u32 high, u32 b) {                           \
        asm volatile("{\n.reg .pred p;\n.reg .b64 tokens;\nsetp.ne.b32 p, %" zero ", 0;\nmov.b64 tokens, {%" b_ ", 0x00000008};\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" R "}, {%" a0 ", %" a1 ", %" zero ", %" zero      \
                     "}, tokens, p, 1, 1, 0;\n}"                                                                                 \
                     : D(d, "+r", 0)                                                                                             \
                     : "r"(low), "r"(high), "r"(b), "r"(0));                                                                     \
    }
#define INSTRUCTIONS(n, D, R, i0, i1, i2, i3, i4, i5)                                  \
    MULTIPLY(multiply_e4m3, n, "f32.e4m3.e4m3", ", 1, 1", D, R, i0, i1, i2, i3, i4, i5) \
    MULTIPLY(multiply_s8, n, "s32.s8.s8", "", D, R, i0, i1, i2, i3, i4, i5)             \
    MULTIPLY_SCALES(n, D, R, i0, i1, i2, i3)
#if BY_WARPS
// They have their own: product_stream.cu.
#elif TOKENS == 32
INSTRUCTIONS(32, D16, R16, "16", "17", "18", "19", "20", "21")
#elif TOKENS == 64
INSTRUCTIONS(64, D32, R32, "32", "33", "34", "35", "36", "37")
#elif TOKENS == 128
INSTRUCTIONS(128, D64, R64, "64", "65", "66", "67", "68", "69")
#else
#error "there is no tile of so many tokens"
#endif

/// Keeps the compiler from moving uses of what wgmma still reads or writes.
template <int COUNT> static __device__ __forceinline__ void pin(u32 (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(d[i])::"memory");
}

// ---- Weights ----
//
// A word holds eight codes of 4 bits: four of row g in what becomes register x, four of row g + 8 in y.
// Integers: of x, byte i has its sign in bit 7 and its lower bits in bits 0 to 2; of y, the sign is in bit 3 of
// byte i and the lower bits in bits 4 to 6 of the byte before it. The lower bits are those of the magnitude, less
// one if the code is negative (so -8 fits), which makes them those of two's complement, inverted.
// FP4: the sign bits are the same; the indices of magnitudes are in bits 4 i to 4 i + 2, first x's, then y's.

#if W_BITS == 4
#if !BY_FLOAT
/// Each byte as its sign: 255 or 0. (`__byte_perm` has no such selectors.)
static __device__ __forceinline__ u32 sign_bytes(u32 x) {
    u32 signs;
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(signs) : "r"(x));
    return signs;
}
#endif
#if W_FP4
static __device__ __forceinline__ void unpack(u32 word, u32& x, u32& y) {
    x = __byte_perm(0x03020100, 0x0c080604, word & 0x7777);
    y = __byte_perm(0x03020100, 0x0c080604, word >> 16 & 0x7777);
    const u32 x_signs = word & 0x80808080, y_signs = word << 4 & 0x80808080;
#if BY_FLOAT
    x |= x_signs;
    y |= y_signs;
#else
    // Minus is all bits turned, and one more; a zero has no sign.
    x = (x ^ sign_bytes(x_signs)) + (x_signs >> 7);
    y = (y ^ sign_bytes(y_signs)) + (y_signs >> 7);
#endif
}
#else
static __device__ __forceinline__ void unpack(u32 word, u32& x, u32& y) {
    const u32 turned = __funnelshift_l(word, word, 4);
#if BY_FLOAT
    x = word & 0x87878787;
    y = turned & 0x87878787;
    x += (x & 0x80808080) >> 7;
    y += (y & 0x80808080) >> 7;
#else
    x = (word & 0x07070707) ^ sign_bytes(word);
    y = (turned & 0x07070707) ^ sign_bytes(turned);
#endif
}
#endif
#endif

static __device__ __forceinline__ uint4 load_shared(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}
static __device__ __forceinline__ float2 load_pair(u32 address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}

/// What STEPS times 32 places of the weights are to a thread: as they lie in a block, and as left operands.
template <int STEPS> struct Words {
    u32 v[STEPS * W_BITS / 2];

    /// Those from the 32 places `first` of the block's 128 on.
    __device__ __forceinline__ void load(u32 block, int first) {
        const u32 own = block + threadIdx.x % 128 * 16;
#if W_BITS == 4
        if constexpr (STEPS == 1) {
            asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(own + first / 2 * 2048 + first % 2 * 8) : "memory");
            return;
        }
        first /= 2;
#endif
#pragma unroll
        for (int i = 0; i < STEPS * W_BITS / 8; i++) {
            const uint4 four = load_shared(own + (first + i) * 2048);
            v[4 * i] = four.x;
            v[4 * i + 1] = four.y;
            v[4 * i + 2] = four.z;
            v[4 * i + 3] = four.w;
        }
    }
    /// As left operands those from the 32 places `first` on, so many as there is room for.
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
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scales.low) : "r"(at) : "memory");
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(scales.high) : "r"(at + 16) : "memory");
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

/// total = fma(s_x s_w, sum, total). Sums of FP8 products are by 2^18 too small: the totals are set right in the end.
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

// ---- The road of a stage ----

struct Operands {
    const i8* x;
    const half* sx;
    const i8* xo;
    const float* sxo;
    const i8* w;
    const i8* wo;
    int tokens, padded, rows, panels, halves;
};

/// A place in the ring of stages: where the stage and its barriers are. Who takes every STRIDE-th stage begins at one of
/// the first STRIDE.
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

/// Gives back the stage of an `empty` barrier; called by whole warps.
static __device__ __forceinline__ void release(u32 empty) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

/// Sets up the barriers; the whole block of threads calls it. A stage is given back by `warps` warps.
static __device__ __forceinline__ void make_ring(u32 barriers, int warps) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers + 8 * i, 1);
            barrier_init(barriers + 8 * (STAGES + i), warps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
}

/// The weights of 64 outlier channels as left operands.
static __device__ __forceinline__ void load_outliers(u32* a, u32 block) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
        const uint4 v = load_shared(block + step * 2048 + threadIdx.x % 128 * 16);
        a[4 * step] = v.x;
        a[4 * step + 1] = v.y;
        a[4 * step + 2] = v.z;
        a[4 * step + 3] = v.w;
    }
}

#if !BY_WARPS
/// Times 32 places of a group that are unpacked together.
#define STEPS_A_PART (GROUP == 128 ? 2 : STEPS_A_GROUP)
#define PARTS_A_GROUP (STEPS_A_GROUP / STEPS_A_PART)
/// The left operands of a group.
typedef u32 Left[PARTS_A_GROUP][4 * STEPS_A_PART];

/// Starts the products of group `group` of a panel: of its weights, which are in `words` from the 32 places `first` on, with the
/// tokens' codes; and of the scales, which are of rank one: the tokens' 16 columns are twice the same eight groups. A product of
/// two f16 numbers is exact in f32. While some are multiplied, the next are unpacked.
template <int STEPS>
static __device__ __forceinline__ void start_group(u32 (&sums)[HELD], u32 (&scales)[HELD], Left& a, const Words<STEPS>& words, int first,
                                                   const RowColumns& columns, u32 token_scales, u32 token_codes, int group) {
    pin(sums);
    pin(scales);
    multiply_fence();
    multiply_scales(scales, columns.low, columns.high, place_of(token_scales));
#pragma unroll
    for (int part = 0; part < PARTS_A_GROUP; part++) {
        words.unpack_to(a[part], first + part * STEPS_A_PART);
        pin(a[part]);
        // The compiler moves no unpacking to before a fence.
        multiply_fence();
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
    multiply_commit();
}

/// Waits for what `start_group` started.
static __device__ __forceinline__ void finish_group(u32 (&sums)[HELD], u32 (&scales)[HELD], Left& a) {
    multiply_wait<0>();
    pin(sums);
    pin(scales);
#pragma unroll
    for (int part = 0; part < PARTS_A_GROUP; part++) pin(a[part]);
}

/// Multiplies 32 * STEPS outlier channels, whose weights are `a`, with the tokens' codes at `token_codes`, and adds to the sums if `add`.
template <int STEPS> static __device__ __forceinline__ void multiply_outliers(u32 (&sums)[HELD], u32 (&a)[4 * STEPS], u32 token_codes, bool add) {
    pin(a);
    pin(sums);
    multiply_fence();
#pragma unroll
    for (int step = 0; step < STEPS; step++) multiply_s8(sums, a + 4 * step, token_codes + 2 * step, step > 0 || add);
    multiply_commit();
    multiply_wait<0>();
    pin(sums);
    pin(a);
}

#endif  // !BY_WARPS

/// Adds the outliers' sums to the totals, with the scales of any outlier stage.
static __device__ __forceinline__ void promote_outliers(float (&total)[HELD], const u32 (&sums)[HELD], u32 here, u32 block) {
    const RowScales row_scales = load_row_scales(block + 4096);
    const float low = to_float(half{row_scales.low}), high = to_float(half{row_scales.high});
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        const float2 s = load_pair(here + (8 * j + threadIdx.x % 4 * 2) * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float& to = total[4 * j + i];
            to = fmaf((i % 2 ? s.y : s.x) * (i / 2 ? high : low), __int2float_rn((int)sums[4 * j + i]), to);
            // One after the other: all scales at once would not fit into the registers.
            asm volatile("" : "+f"(to));
        }
    }
}

/// Sets right the totals of products of FP8 numbers. A power of two changes no rounding.
static __device__ __forceinline__ void set_right(float (&total)[HELD]) {
#if BY_FLOAT
#pragma unroll
    for (int i = 0; i < HELD; i++) total[i] *= 262144.0f;
#endif
}

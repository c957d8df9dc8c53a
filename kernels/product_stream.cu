// Decode: the weights are read once, and speed depends on having enough of them in flight.
//
// A tile is 64 * BLOCKS rows and all tokens. Split-K: each of the gridDim.y thread blocks of a cluster takes an equal run of its
// stages. Slice-K: in a block SLICES warpgroups take the run's stages one after another. In the cluster reduction at the end each
// block takes some of the tokens and adds their totals from the shared memory of all, in the order of blocks and warpgroups.
// Macros and operands: hopper.cuh, and
//
//     SLICES        warpgroups of slice-K
//     BLOCKS_PER_SM occupancy: thread blocks that an SM should hold
//     PREFETCHED    stages whose weights are prefetched before the PDL wait
//     BY_WARPS      1: products by `mma.sync`, codes in two's complement. Its operands and sums lie in the
//                   registers as those of `wgmma`, but it is synchronous, and fewer registers are held
//
// A copy costs the warp that issues it some 140 cycles, whatever its size, which is why a stage holds several panels: their
// weights, and the tokens' codes, lie one after the other in device memory.

#if !defined(SLICES) || !defined(BLOCKS_PER_SM) || !defined(PREFETCHED)
#error "a constant is missing: src/backend/cuda/kernels/product.rs declares them"
#endif
static_assert(THREADS == 128 * BLOCKS * SLICES, "a warpgroup for each block of rows of each slice");

#define RELEASES_REGISTERS (PRODUCERS == 128)

/// Groups of a stage that are added together.
#define TOGETHER (BY_WARPS && PANELS * GROUPS_A_STAGE % 2 == 0 ? 2 : 1)
static_assert(!BY_WARPS || X_BITS == 8, "codes of products by mma.sync are in two's complement");

/// A token's totals of a tile's rows, as a warpgroup leaves them; four more, so that lanes meet different banks.
#define TOTALS (64 * BLOCKS + 4)
static_assert(PREFETCHED <= STAGES, "only free stages are prefetched");
static_assert(STAGES % SLICES == 0, "a warpgroup sees every round of its ring slots, and no other's");
static_assert(SLICES * TOKENS * TOTALS * 4 <= STAGES * STAGE_BYTES, "totals take the stages' memory");

/// A stage's panels, of all there are.
static __device__ __forceinline__ int panels_of(const Operands& of, int stage) { return min(PANELS, of.panels - stage * PANELS); }

/// Issues the part of warp `part` of WARPS of the copies of a stage's weights, when it is free, and announces all that it will hold. `units`
/// stages hold the groups, the others 64 outlier channels each.
template <int WARPS> static __device__ __forceinline__ void issue_weights(const Operands& of, const Ring<1>& ring, int tile, int units, int stage, int part) {
    // The last tile may have fewer blocks of rows: its last one is copied again, and those results are not written.
    const int last_block = (of.rows + 63) / 64 - 1, half = stage - units;
    const bool outliers = half >= 0;
    const int count = outliers ? 1 : panels_of(of, stage), bytes = outliers ? OUTLIER_BYTES : count * BLOCK_BYTES;
    barrier_wait(ring.empty(), ring.phase ^ 1);
    // Copies may be done before they are announced: the phase ends when they were.
    if (part == 0) barrier_expect_elected(ring.full, BLOCKS * bytes + of.padded * (count * 128 + (outliers ? 4 : 16)));
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        if ((i + 1) % WARPS != part) continue;
        const long long block = min(tile * BLOCKS + i, last_block);
        const i8* from = outliers ? of.wo + (block * of.halves + half) * OUTLIER_BYTES : of.w + (block * of.panels + stage * PANELS) * BLOCK_BYTES;
        copy_bulk_elected(ring.here + WEIGHTS + i * PANELS * BLOCK_BYTES, from, bytes, ring.full);
    }
}

/// Issues the copies of the tokens' codes and scales of a stage.
static __device__ __forceinline__ void issue_tokens(const Operands& of, const Ring<1>& ring, int units, int stage) {
    const int half = stage - units, panel_bytes = of.padded * 128;
    if (half < 0) {
        copy_bulk_elected(ring.here + TOKEN_CODES, of.x + (long long)stage * PANELS * panel_bytes, panels_of(of, stage) * panel_bytes, ring.full);
        copy_bulk_elected(ring.here, of.sx + (long long)(stage * PANELS * GROUPS_A_STAGE / 8) * of.padded * 8, of.padded * 16, ring.full);
    } else {
        copy_bulk_elected(ring.here + TOKEN_CODES, of.xo + (long long)(half / 2) * panel_bytes, panel_bytes, ring.full);
        copy_bulk_elected(ring.here, of.sxo, of.padded * 4, ring.full);
    }
}

/// What the producer warps issue: the first PREFETCHED stages' weights while the kernels before may still run, then everything.
template <int WARPS> static __device__ __forceinline__ void copy_stages(const Operands& of, Ring<1> ring, int tile, int units, int begin, int end, int part) {
    const int prefetched = min(begin + PREFETCHED, end);
    Ring<1> ahead = ring;
#pragma unroll 1
    for (int stage = begin; stage < prefetched; stage++, ahead.next()) issue_weights<WARPS>(of, ahead, tile, units, stage, part);
    if (part == 0) pdl_wait();
#pragma unroll 1
    for (int stage = begin; stage < end; stage++, ring.next()) {
        if (stage >= prefetched) issue_weights<WARPS>(of, ring, tile, units, stage, part);
        if (part == 0) issue_tokens(of, ring, units, stage);
    }
}

#if BY_WARPS
/// d += a b, as `mma_codes_32`.
static __device__ __forceinline__ void mma_codes(u32* d, const u32* a, u32 b0, u32 b1) {
    int(&sums)[4] = reinterpret_cast<int(&)[4]>(*d);
    mma_codes_32(sums, reinterpret_cast<const u32(&)[4]>(*a), b0, b1, sums[0], sums[1], sums[2], sums[3]);
}

/// Adds the products of STEPS times 32 slots of a warp's 16 rows, `a`, with the tokens' codes from the 32 slots `first` of the
/// panel at `codes` on. Operands and sums lie in the registers as those of `wgmma` do.
template <int STEPS> static __device__ __forceinline__ void multiply(u32 (&sums)[HELD], const u32* a, u32 codes, int first) {
    const int lane = threadIdx.x % 32, swizzle = lane % 8;
#if TOKENS == 8
    if constexpr (STEPS == 1) {
        u32 b[2];
        load_two_matrices(b, codes + swizzle * 128 + ((2 * first + lane / 8 % 2) ^ swizzle) * 16);
        mma_codes(sums, a, b[0], b[1]);
    } else {
#pragma unroll
        for (int step = 0; step < STEPS; step += 2) {
            u32 b[4];
            load_matrices(b, codes + swizzle * 128 + ((2 * (first + step) + lane / 8) ^ swizzle) * 16);
            mma_codes(sums, a + 4 * step, b[0], b[1]);
            mma_codes(sums, a + 4 * step + 4, b[2], b[3]);
        }
    }
#else
    const int token = lane / 16 * 8 + swizzle;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j += 2) {
            u32 b[4];
            load_matrices(b, codes + (8 * j + token) * 128 + ((2 * (first + step) + lane / 8 % 2) ^ swizzle) * 16);
            mma_codes(sums + 4 * j, a + 4 * step, b[0], b[1]);
            mma_codes(sums + 4 * j + 4, a + 4 * step, b[2], b[3]);
        }
    }
#endif
}

/// Scales of TOGETHER groups from `index` on, a multiple of it, of a thread's tokens.
struct TokenScales {
    u32 pairs[TOKENS / 4];

    __device__ __forceinline__ TokenScales(u32 token_scales, u32 index) {
        const u32 own = token_scales + threadIdx.x % 4 * 32 + index % 8 / 2 * 4;
#pragma unroll
        for (int i = 0; i < TOKENS / 4; i++) {
            pairs[i] = load_shared_32(own + (i / 2 * 8 + i % 2) * 16);
            if (TOGETHER == 1) pairs[i] >>= index % 2 * 16;
        }
    }
    /// Their products with those of a thread's rows, of the first or second group.
    __device__ __forceinline__ void with(u32 (&scales)[HELD], const RowScales& rows, int second) const {
        const float low = to_float(half{rows.low}), high = to_float(half{rows.high});
#pragma unroll
        for (int i = 0; i < TOKENS / 4; i++) {
            const float s = second ? high_half(pairs[i]) : low_half(pairs[i]);
            scales[i / 2 * 4 + i % 2] = __float_as_uint(s * low);
            scales[i / 2 * 4 + i % 2 + 2] = __float_as_uint(s * high);
        }
    }
};

/// Multiplies a block of 64 outlier channels with the odd or even half of the tokens' 128, and adds to the sums if `add`.
static __device__ __forceinline__ void multiply_outliers(u32 (&sums)[HELD], u32 here, u32 block, int odd, bool add) {
    u32 a[8];
    load_outliers(a, block);
    if (!add) {
#pragma unroll
        for (int i = 0; i < HELD; i++) sums[i] = 0;
    }
    multiply<2>(sums, a, here + TOKEN_CODES, odd * 2);
}
#else
/// The same.
static __device__ __forceinline__ void multiply_outliers(u32 (&sums)[HELD], u32 here, u32 block, int odd, bool add) {
    u32 a[8];
    load_outliers(a, block);
    multiply_outliers<2>(sums, a, describe(here + TOKEN_CODES) + 4 * odd, add);
}
#endif

/// Adds TOGETHER of a stage's `groups` to the totals, from `first` on; of all there are, that is group `index`. `blocks` are the
/// stage's weights, `panel_bytes` those of a panel of its tokens.
static __device__ __forceinline__ void add_groups(float (&total)[HELD], u32 blocks, u32 token_scales, u32 token_codes, int panel_bytes, int first, int groups, u32 index) {
#if BY_WARPS
    const TokenScales own(token_scales, index);
#endif
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
        const int panel = (first + i) / GROUPS_A_STAGE, group = (first + i) % GROUPS_A_STAGE;
        const u32 block = blocks + panel * BLOCK_BYTES, codes = token_codes + panel * panel_bytes;
        u32 sums[HELD], scales[HELD];
        Words<STEPS_A_GROUP> words;
        words.load(block, group * STEPS_A_GROUP);
        const RowScales row_scales = load_row_scales(block + CODE_BYTES + group * 128);
#if BY_WARPS
        u32 a[4 * STEPS_A_GROUP];
        words.unpack_to(a, 0);
#pragma unroll
        for (int j = 0; j < HELD; j++) sums[j] = 0;
        multiply<STEPS_A_GROUP>(sums, a, codes, group * STEPS_A_GROUP);
        own.with(scales, row_scales, i);
#else
        Left a;
        start_group(sums, scales, a, words, 0, RowColumns(row_scales, index + i), token_scales, codes, group);
        finish_group(sums, scales, a);
#endif
        // The last stage may have fewer panels: then what was there before was multiplied.
        if (i == 0 || first + i < groups) promote(total, sums, scales);
    }
}

/// Writes results of rows `row` and the three on; `row` is a multiple of 4.
static __device__ __forceinline__ void store_four(Output* y, int token, int row, int rows, const float4& v) {
    Output* to = y + (long long)token * rows + row;
#if OUT == 2
    // One thread only adds to a value, so that order does not matter: an atomic sum is asynchronous.
    if (rows % 4 == 0) {
        if (row < rows) add_four(to, v);
        return;
    }
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (row + i < rows) atomicAdd(to + i, values[i]);
    return;
#endif
#if OUT == 1
    if (rows % 4 == 0) {
        if (row < rows) *reinterpret_cast<uint2*>(to) = make_uint2(pack_half2(v.x, v.y), pack_half2(v.z, v.w));
        return;
    }
#endif
    if (row < rows) store(to, v.x);
    if (row + 1 < rows) store(to + 1, v.y);
    if (row + 2 < rows) store(to + 2, v.z);
    if (row + 3 < rows) store(to + 3, v.w);
}

/// Grid (ceil(most rows / (64 * BLOCKS)), splits, weights) in clusters of (1, splits, 1): up to three weights are multiplied by the same
/// tokens, each into results of its own; THREADS + PRODUCERS threads, and
/// STAGES * STAGE_BYTES + 1024 bytes of dynamic shared memory. At most TOKENS tokens.
extern "C" __global__ void __launch_bounds__(THREADS + PRODUCERS, BLOCKS_PER_SM)
    integer_stream(const i8* x, const half* sx, const i8* xo, const float* sxo, const i8* w, const i8* wo, Output* y, int rows,
                   const i8* w1, const i8* wo1, Output* y1, int rows1, const i8* w2, const i8* wo2, Output* y2, int rows2,
                   int tokens, int padded, int panels, int halves) {
    if (blockIdx.z == 1) w = w1, wo = wo1, y = y1, rows = rows1;
    if (blockIdx.z == 2) w = w2, wo = wo2, y = y2, rows = rows2;
    // Weights with fewer rows than the others: the entire cluster has none.
    if (int(blockIdx.x) * BLOCKS * 64 >= rows) return;
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES];
    const Operands of{x, sx, xo, sxo, w, wo, tokens, padded, rows, panels, halves};
    const u32 stages = (shared_address(memory) + 1023) / 1024 * 1024;
    make_ring(shared_address(barriers), 4 * BLOCKS);
    const int units = (panels + PANELS - 1) / PANELS, all = units + halves, splits = gridDim.y, rank = blockIdx.y;
    const int begin = all * rank / splits, end = all * (rank + 1) / splits;
    // The shuffle: the compiler sees that a warp does not diverge.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (warp >= THREADS / 32) {
#if RELEASES_REGISTERS
        release_registers<56>();
#endif
        const Ring<1> ring(stages, shared_address(barriers), 0);
        copy_stages<PRODUCERS / 32>(of, ring, blockIdx.x, units, begin, end, warp - THREADS / 32);
        if (splits > 1) {
            cluster_barrier();
            cluster_barrier();
        }
        return;
    }
#if RELEASES_REGISTERS
    take_registers<152>();
#endif
    const int thread = threadIdx.x % 128, group = threadIdx.x / 128, own = group % BLOCKS, slice = group / BLOCKS;
    Ring<SLICES> ring(stages, shared_address(barriers), slice);
    float total[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) total[i] = 0.0f;
    int stage = begin + slice;
#pragma unroll 1
    for (; stage < min(end, units); stage += SLICES) {
        ring.wait();
        // The same in all of a warp's threads, as the compiler sees by the shuffle: it keeps addresses of operands in uniform registers.
        const u32 here = __shfl_sync(0xffffffffu, ring.here, 0), blocks = here + WEIGHTS + own * PANELS * BLOCK_BYTES;
        const int groups = panels_of(of, stage) * GROUPS_A_STAGE;
        // Not unrolled: more than one group of 64 tokens take more registers than there are.
#pragma unroll 1
        for (int first = 0; first < groups; first += TOGETHER)
            add_groups(total, blocks, here, here + TOKEN_CODES, padded * 128, first, groups, stage * PANELS * GROUPS_A_STAGE + first);
        release(ring.empty());
        ring.next();
    }
    rescale(total);
    u32 sums[HELD];
#pragma unroll 1
    for (bool add = false; stage < end; stage += SLICES, add = true) {
        ring.wait();
        const u32 here = ring.here, block = here + WEIGHTS + own * PANELS * BLOCK_BYTES;
        multiply_outliers(sums, here, block, (stage - units) % 2, add);
        if (stage + SLICES >= end) promote_outliers(total, sums, here, block);
        release(ring.empty());
        ring.next();
    }
    // The stages have all been used, by every warpgroup: their memory is free.
    group_barrier(1, THREADS);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int token = i / 4 * 8 + thread % 4 * 2 + i % 2, row = own * 64 + thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
        store_shared(stages + ((slice * TOKENS + token) * TOTALS + row) * 4, total[i]);
    }
    if (splits > 1)
        cluster_barrier();
    else
        group_barrier(1, THREADS);
    const int each = (TOKENS + splits - 1) / splits, first = rank * each, mine = min(each, tokens - first);
    for (int index = threadIdx.x; index < mine * 16 * BLOCKS; index += THREADS) {
        const int token = first + index / (16 * BLOCKS), row = index % (16 * BLOCKS) * 4;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int part = 0; part < splits * SLICES; part++) {
            const float4 v = load_remote(stages + ((part % SLICES * TOKENS + token) * TOTALS + row) * 4, part / SLICES);
            sum.x += v.x;
            sum.y += v.y;
            sum.z += v.z;
            sum.w += v.w;
        }
        store_four(y, token, blockIdx.x * BLOCKS * 64 + row, rows, sum);
    }
    // No block leaves while others read its shared memory.
    if (splits > 1) cluster_barrier();
}

// Prefill: one thread block per SM, which takes tile after tile of 64 * BLOCKS rows by TOKENS tokens. Each of BLOCKS
// consumer warpgroups has 64 rows; a warp of one more is the producer. Macros and operands: hopper.cuh.
//
// A consumer warpgroup unpacks weights and starts their products, part by part, loads meanwhile what it needs of the next stage,
// waits and adds the sums to its totals. While it does that, the tensor cores work for the others.

// EPILOGUE_BYTES: shared memory in which results are transposed, a warpgroup's tokens by 64 rows in f16, or half of the tokens in f32.
#if !defined(EPILOGUE_BYTES)
#error "a constant is missing: src/backend/cuda/kernels/product.rs declares them"
#endif
static_assert(THREADS == 128 * BLOCKS && PRODUCERS == 128, "a warpgroup for each block of rows, and one that copies");

/// The barriers of a warpgroup's own threads.
#define OWN 1

/// TOKENS tokens by `blocks` blocks of 64 rows, of which `first_block` is the first.
struct Tile {
    int first_token, first_block, blocks;
};
/// Eight tiles of tokens go through all rows together, so that what runs at the same time reads few different
/// tiles of both operands. Tiles after the first `uncut` are cut into parts of one block, each with an index of its own.
static __device__ __forceinline__ Tile tile_of(int index, int uncut, int token_tiles, int row_tiles) {
    const int part = max(index - uncut, 0) % BLOCKS, tile = index < uncut ? index : uncut + (index - uncut) / BLOCKS;
    const int band = tile / (8 * row_tiles), within = tile % (8 * row_tiles);
    const int height = min(8, token_tiles - band * 8);
    return Tile{(band * 8 + within % height) * TOKENS, within / height * BLOCKS + part, index < uncut ? BLOCKS : 1};
}

/// Issues the copies of all stages of a tile, one after the other, as they are free; by a warp.
static __device__ __forceinline__ void copy_tile(const Operands& of, const Tile& tile, Ring<1>& ring) {
    const u32 count = min(TOKENS, of.padded - tile.first_token);
    // The last tile may have fewer blocks of rows: its last one is copied again, and those results are not written.
    const int last_block = (of.rows + 63) / 64 - 1;
    const i8 *weights[BLOCKS], *outliers[BLOCKS];
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        const int block = min(tile.first_block + i, last_block);
        weights[i] = of.w + (long long)block * of.panels * BLOCK_BYTES;
        outliers[i] = of.wo + (long long)block * of.halves * OUTLIER_BYTES;
    }
    const i8* codes = of.x + (long long)tile.first_token * 128;
    const half* scales = of.sx + (long long)tile.first_token * 8;
    for (int stage = 0; stage < of.panels; stage++) {
        barrier_wait(ring.empty(), ring.phase ^ 1);
        barrier_expect_elected(ring.full, count * 144 + tile.blocks * BLOCK_BYTES);
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            if (i < tile.blocks) copy_bulk_elected(ring.here + WEIGHTS + i * BLOCK_BYTES, weights[i], BLOCK_BYTES, ring.full);
            weights[i] += BLOCK_BYTES;
        }
        copy_bulk_elected(ring.here + TOKEN_CODES, codes, count * 128, ring.full);
        copy_bulk_elected(ring.here, scales, count * 16, ring.full);
        codes += (long long)of.padded * 128;
        // The scales of eight groups lie together.
        if ((stage + 1) * GROUPS_A_STAGE % 8 == 0) scales += (long long)of.padded * 8;
        ring.next();
    }
    codes = of.xo + (long long)tile.first_token * 128;
    for (int part = 0; part < of.halves; part++) {
        // A panel of the tokens' outliers comes with the first of its two parts.
        const bool first = part % 2 == 0;
        barrier_wait(ring.empty(), ring.phase ^ 1);
        barrier_expect_elected(ring.full, (first ? count * 132 : 0) + tile.blocks * OUTLIER_BYTES);
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
            if (i < tile.blocks) copy_bulk_elected(ring.here + WEIGHTS + i * BLOCK_BYTES, outliers[i], OUTLIER_BYTES, ring.full);
            outliers[i] += OUTLIER_BYTES;
        }
        if (first) {
            copy_bulk_elected(ring.here + TOKEN_CODES, codes, count * 128, ring.full);
            copy_bulk_elected(ring.here, of.sxo + tile.first_token, count * 4, ring.full);
            codes += (long long)of.padded * 128;
        }
        ring.next();
    }
}

/// Writes a result. One thread only adds to a value, so that order does not matter: an atomic sum is asynchronous.
static __device__ __forceinline__ void store_result(Output* to, float value) {
#if OUT == 2
    atomicAdd(to, value);
#else
    store(to, value);
#endif
}

/// Writes a warpgroup's 64 rows of TOKENS tokens.
static __device__ __forceinline__ void write(const float (&total)[HELD], Output* y, int first_token, int first_row, int tokens, int rows, u32 epilogue, int group) {
    // Computing the addresses again for each tile costs less than keeping them in registers.
    u32 in_block = threadIdx.x;
    keep_apart(in_block);
    keep_apart(epilogue);
    const int thread = in_block % 128, lane = thread % 32, warp = thread / 32;
#if OUT == 1
    if (rows % 8 == 0) {
        // A token's 64 values are a row, in pieces of 16 bytes that are swizzled.
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            const u32 low = pack_half2(total[4 * j], total[4 * j + 1]), high = pack_half2(total[4 * j + 2], total[4 * j + 3]);
            const u32 token = 8 * j + lane % 8, piece = warp * 2 + lane / 8 % 2;
            store_matrices_transposed(epilogue + token * 128 + (piece ^ (token & 7)) * 16, low, high);
        }
        group_barrier(OWN + group, 128);
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++) {
            const int token = i * 16 + thread / 8, piece = thread % 8, row = first_row + piece * 8;
            if (first_token + token < tokens && row < rows)
                *reinterpret_cast<uint4*>(y + (long long)(first_token + token) * rows + row) = load_shared_128(epilogue + token * 128 + (piece ^ (token & 7)) * 16);
        }
        group_barrier(OWN + group, 128);
        return;
    }
#elif OUT == 2
    if (rows % 4 == 0) {
        // A token's 64 values become a row, half of the tokens at a time, so that four are added together.
        constexpr int STRIDE = 256;
#pragma unroll
        for (int part = 0; part < 2; part++) {
            group_barrier(OWN + group, 128);
#pragma unroll
            for (int j = 0; j < TOKENS / 16; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    store_shared(epilogue + (8 * j + lane % 4 * 2 + e % 2) * STRIDE + (((warp * 16 + lane / 4 + e / 2 * 8) * 4) ^ (lane % 4 * 32)),
                                 total[part * (HELD / 2) + 4 * j + e]);
            }
            group_barrier(OWN + group, 128);
#pragma unroll
            for (int i = 0; i < TOKENS / 16; i++) {
                const int own = i * 8 + thread / 16, token = first_token + part * (TOKENS / 2) + own, row = first_row + thread % 16 * 4;
                if (token < tokens && row < rows) {
                    const uint4 v = load_shared_128(epilogue + own * STRIDE + (thread % 16 * 16 ^ own / 2 % 4 * 32));
                    add_four(y + (long long)token * rows + row,
                             make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)));
                }
            }
        }
        return;
    }
#endif
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int token = first_token + 8 * j + lane % 4 * 2 + e % 2, row = first_row + warp * 16 + lane / 4 + e / 2 * 8;
            if (token < tokens && row < rows) store_result(y + (long long)token * rows + row, total[4 * j + e]);
        }
    }
}

/// Whether a warpgroup loads what the next stage needs while products run. The tensor cores read the left operand's registers as
/// long as they work, which the compiler does not see: weights of 8 bits, which are those registers, are loaded when it is done.
#define AHEAD (W_BITS == 4)

/// Waits for the ring's current stage, and loads a warpgroup's part of it.
static __device__ __forceinline__ void load(Words<4>& words, RowScales (&scales)[GROUPS_A_STAGE], const Ring<1>& ring, int group) {
    ring.wait();
    const u32 block = ring.here + WEIGHTS + group * BLOCK_BYTES;
    words.load(block, 0);
#pragma unroll
    for (int g = 0; g < GROUPS_A_STAGE; g++) scales[g] = load_row_scales(block + CODE_BYTES + g * 128);
}

/// Takes ceil(tokens / TOKENS) * ceil(rows / (64 * BLOCKS)) tiles; those of a last round are cut, if the grid has a thread block for each part. THREADS + PRODUCERS
/// threads, and STAGES * STAGE_BYTES + BLOCKS * EPILOGUE_BYTES + 1024 bytes of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS + PRODUCERS, 1)
    integer_tiles(const i8* x, const half* sx, const i8* xo, const float* sxo, const i8* w, const i8* wo, Output* y, int tokens,
                  int padded, int rows, int panels, int halves) {
    extern __shared__ u8 memory[];
    __shared__ u64 barriers[2 * STAGES];
    const Operands of{x, sx, xo, sxo, w, wo, tokens, padded, rows, panels, halves};
    Ring<1> ring((shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers), 0);
    make_ring(ring.full, 4 * BLOCKS);
    const int token_tiles = (tokens + TOKENS - 1) / TOKENS, row_tiles = (rows + 64 * BLOCKS - 1) / (64 * BLOCKS);
    const int tiles = token_tiles * row_tiles, rest = tiles % gridDim.x, uncut = rest * BLOCKS <= gridDim.x ? tiles - rest : tiles;
    const int parts = uncut + (tiles - uncut) * BLOCKS;
    // The shuffle: the compiler sees that a warp does not diverge, and keeps what it waits for in uniform registers.
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    if (group == BLOCKS) {
        release_registers<24>();
        if (__shfl_sync(0xffffffffu, threadIdx.x / 32, 0) == 4 * BLOCKS) {
            pdl_wait();
            for (int index = blockIdx.x; index < parts; index += gridDim.x) copy_tile(of, tile_of(index, uncut, token_tiles, row_tiles), ring);
        }
    } else {
        take_registers<240>();
        const u32 epilogue = ring.here + STAGES * STAGE_BYTES + group * EPILOGUE_BYTES;
#pragma unroll 1
        for (int index = blockIdx.x; index < parts; index += gridDim.x) {
            const Tile tile = tile_of(index, uncut, token_tiles, row_tiles);
            if (group >= tile.blocks) {
                // Nothing to do: stages are only released.
                for (int stage = 0; stage < panels + halves; stage++) {
                    ring.wait();
                    release(ring.empty());
                    ring.next();
                }
                continue;
            }
            float total[HELD];
            u32 sums[HELD], scales[HELD];
#pragma unroll
            for (int i = 0; i < HELD; i++) total[i] = 0.0f;
            Left a;
            Words<4> words;
            RowScales row_scales[GROUPS_A_STAGE];
            load(words, row_scales, ring, group);
#pragma unroll 1
            for (int stage = 0; stage < panels; stage++) {
                const u32 here = ring.here, empty = ring.empty();
                ring.next();
#pragma unroll
                for (int g = 0; g < GROUPS_A_STAGE; g++) {
                    const RowColumns columns(row_scales[g], stage * GROUPS_A_STAGE + g);
                    start_group(sums, scales, a, words, g * STEPS_A_GROUP, columns, here, here + TOKEN_CODES, g);
                    const bool more = g == GROUPS_A_STAGE - 1 && stage + 1 < panels;
                    if (AHEAD && more) load(words, row_scales, ring, group);
                    finish_group(sums, scales, a);
                    if (!AHEAD && more) load(words, row_scales, ring, group);
                    promote(total, sums, scales);
                }
                release(empty);
            }
            rescale(total);
#pragma unroll 1
            for (int part = 0; part < halves; part += 2) {
                const bool both = part + 1 < halves;
                const u32 here = ring.here, block = here + WEIGHTS + group * BLOCK_BYTES, empty = ring.empty();
                u32 a[16];
                ring.wait();
                load_outliers(a, block);
                ring.next();
                if (both) {
                    ring.wait();
                    load_outliers(a + 8, ring.here + WEIGHTS + group * BLOCK_BYTES);
                } else {
#pragma unroll
                    for (int i = 8; i < 16; i++) a[i] = 0;
                }
                multiply_outliers<4>(sums, a, describe(here + TOKEN_CODES), part > 0);
                if (part + 2 >= halves) promote_outliers(total, sums, here, block);
                release(empty);
                if (both) {
                    release(ring.empty());
                    ring.next();
                }
            }
            write(total, y, tile.first_token, (tile.first_block + group) * 64, tokens, rows, epilogue, group);
        }
    }
}

// Many tokens: one block of threads an SM, which takes tile after tile of 64 * BLOCKS rows by TOKENS tokens. Each of BLOCKS
// warpgroups has 64 rows, one more copies. Macros and operands: hopper.cuh.
//
// A warpgroup starts a stage's products, loads meanwhile what it needs of the next stage, waits, adds the sums to its
// totals and unpacks the next weights. While it does that, the tensor cores work for the others.

/// Room in which results are turned around, a warpgroup's tokens by 64 rows in f16.
#define TURN_BYTES (TOKENS * 128)

/// The barriers of a warpgroup's own threads.
#define OWN 1

struct Tile {
    int first_token, row_tile;
};
/// Eight tiles of tokens go through all rows together, so that what runs at the same time reads few different
/// tiles of both operands.
static __device__ __forceinline__ Tile tile_of(int index, int token_tiles, int row_tiles) {
    const int band = index / (8 * row_tiles), within = index % (8 * row_tiles);
    const int height = min(8, token_tiles - band * 8);
    return Tile{(band * 8 + within % height) * TOKENS, within / height * BLOCKS};
}

/// Asks for BLOCKS blocks of weights of a stage, when it is free, and announces all that the stage will hold.
static __device__ __forceinline__ void ask_for_weights(const Operands& of, const Ring<1>& ring, int first_token, int row_tile, int stage) {
    const u32 to = ring.here + WEIGHTS, full = ring.full, count = min(TOKENS, of.padded - first_token);
    const bool outliers = stage >= of.panels;
    const int stages = outliers ? of.halves : of.panels, bytes = outliers ? OUTLIER_BYTES : BLOCK_BYTES;
    const i8* from = outliers ? of.wo + (long long)(stage - of.panels) * OUTLIER_BYTES : of.w + (long long)stage * BLOCK_BYTES;
    // A tile at the end may have fewer blocks of rows: the last one is copied again, and its results are not written.
    const int last_block = (of.rows + 63) / 64 - 1;
    barrier_wait(ring.empty(), ring.phase ^ 1);
    barrier_expect(full, count * (outliers ? 132 : 144) + BLOCKS * bytes);
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) copy_bulk(to + i * BLOCK_BYTES, from + (long long)min(row_tile + i, last_block) * stages * bytes, bytes, full);
}

/// Asks for the tokens' codes and scales of a stage.
static __device__ __forceinline__ void ask_for_tokens(const Operands& of, const Ring<1>& ring, int first_token, int stage) {
    const u32 to = ring.here, full = ring.full, count = min(TOKENS, of.padded - first_token);
    if (stage < of.panels) {
        copy_bulk(to + TOKEN_CODES, of.x + ((long long)stage * of.padded + first_token) * 128, count * 128, full);
        copy_bulk(to, of.sx + ((long long)(stage * GROUPS_A_STAGE / 8) * of.padded + first_token) * 8, count * 16, full);
    } else {
        copy_bulk(to + TOKEN_CODES, of.xo + ((long long)((stage - of.panels) / 2) * of.padded + first_token) * 128, count * 128, full);
        copy_bulk(to, of.sxo + first_token, count * 4, full);
    }
}

/// Writes a result. A value is added to by one thread only, so that its order does not matter: an atomic sum is not waited for.
static __device__ __forceinline__ void give(Output* to, float value) {
#if OUT == 2
    atomicAdd(to, value);
#else
    store(to, value);
#endif
}

/// Writes a warpgroup's 64 rows of TOKENS tokens.
static __device__ __forceinline__ void write(const float (&total)[HELD], Output* y, int first_token, int first_row, int tokens, int rows, u32 turn, int group) {
    // Computing the addresses again for each tile costs less than keeping them in registers.
    u32 in_block = threadIdx.x;
    keep_apart(in_block);
    keep_apart(turn);
    const int thread = in_block % 128, lane = thread % 32, warp = thread / 32;
#if OUT == 1
    if (rows % 8 == 0) {
        // A token's 64 values are a row, in pieces of 16 bytes that are swizzled.
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++) {
            const u32 low = pack_half2(total[4 * j], total[4 * j + 1]), high = pack_half2(total[4 * j + 2], total[4 * j + 3]);
            const u32 token = 8 * j + lane % 8, piece = warp * 2 + lane / 8 % 2;
            asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(turn + token * 128 + (piece ^ (token & 7)) * 16),
                         "r"(low), "r"(high)
                         : "memory");
        }
        group_barrier(OWN + group, 128);
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++) {
            const int token = i * 16 + thread / 8, piece = thread % 8, row = first_row + piece * 8;
            if (first_token + token < tokens && row < rows)
                *reinterpret_cast<uint4*>(y + (long long)(first_token + token) * rows + row) = load_shared(turn + token * 128 + (piece ^ (token & 7)) * 16);
        }
        group_barrier(OWN + group, 128);
        return;
    }
#endif
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int token = first_token + 8 * j + lane % 4 * 2 + e % 2, row = first_row + warp * 16 + lane / 4 + e / 2 * 8;
            if (token < tokens && row < rows) give(y + (long long)token * rows + row, total[4 * j + e]);
        }
    }
}

/// Whether a warpgroup loads what the next stage needs while products run. The tensor cores read the left operand's registers as
/// long as they work, and the compiler does not know: weights of 8 bits, which are those registers, come when it is done.
#define AHEAD (W_BITS == 4)

/// Waits for the stage at which the ring is, and loads what is a warpgroup's of it.
static __device__ __forceinline__ void load(Words<4>& words, RowScales (&scales)[GROUPS_A_STAGE], const Ring<1>& ring, int group) {
    ring.wait();
    const u32 block = ring.here + WEIGHTS + group * BLOCK_BYTES;
    words.load(block, 0);
#pragma unroll
    for (int g = 0; g < GROUPS_A_STAGE; g++) scales[g] = load_row_scales(block + CODE_BYTES + g * 128);
}

#define THREADS (128 * BLOCKS + 128)

/// Grid: at most as many blocks as there are tiles, ceil(tokens / TOKENS) * ceil(rows / (64 * BLOCKS)). THREADS threads, and
/// STAGES * STAGE_BYTES + BLOCKS * TURN_BYTES + 1024 bytes of dynamic shared memory.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    integer_tiles(const i8* x, const half* sx, const i8* xo, const float* sxo, const i8* w, const i8* wo, Output* y, int tokens,
                  int padded, int rows, int panels, int halves) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * STAGES];
    const Operands of{x, sx, xo, sxo, w, wo, tokens, padded, rows, panels, halves};
    Ring<1> ring((shared_address(memory) + 1023) / 1024 * 1024, shared_address(barriers), 0);
    make_ring(ring.full, 4 * BLOCKS);
    const int token_tiles = (tokens + TOKENS - 1) / TOKENS, row_tiles = (rows + 64 * BLOCKS - 1) / (64 * BLOCKS);
    const int group = threadIdx.x / 128;
    if (group == BLOCKS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 128 * BLOCKS) {
            await_kernels_before();
            for (int index = blockIdx.x; index < token_tiles * row_tiles; index += gridDim.x) {
                const Tile tile = tile_of(index, token_tiles, row_tiles);
                for (int stage = 0; stage < panels + halves; stage++) {
                    ask_for_weights(of, ring, tile.first_token, tile.row_tile, stage);
                    ask_for_tokens(of, ring, tile.first_token, stage);
                    ring.next();
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const u32 turn = ring.here + STAGES * STAGE_BYTES + group * TURN_BYTES;
#pragma unroll 1
        for (int index = blockIdx.x; index < token_tiles * row_tiles; index += gridDim.x) {
            const Tile tile = tile_of(index, token_tiles, row_tiles);
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
            set_right(total);
#pragma unroll 1
            for (int part = 0; part < halves; part++) {
                ring.wait();
                const u32 here = ring.here, block = here + WEIGHTS + group * BLOCK_BYTES;
                multiply_outliers(sums, here, block, part % 2, part > 0);
                if (part == halves - 1) promote_outliers(total, sums, here, block);
                release(ring.empty());
                ring.next();
            }
            write(total, y, tile.first_token, (tile.row_tile + group) * 64, tokens, rows, turn, group);
        }
    }
}

// The product of quantized activations and quantized weights, y = x w^T, in the bits of the
// specification: for each output, group by group in ascending order,
// acc = fma(s_x s_w, the exact integer dot product, acc), and last the outlier block.
//
// Macros: GROUP (a multiple of 16, up to an entire row), OUT_HALF (0: y is f32; 1: f16) and NIBBLES (1: codes of groups are
// two a byte, the first in the lower half, and are multiplied by the INT4 tensor cores that sm_80 to sm_89 have; GROUP
// is then a multiple of 32). UNIT: bytes of a group. GROUPS_A_STAGE: a stage holds several groups where they are short, else an equal part
// of one group, in 128 bytes a row. STAGE_BYTES: codes and scales of a tile of tokens and a tile of rows. STAGES: how many there are.
//
// Layout: codes are rows of bytes, x [tokens, groups * UNIT] and w [rows, groups * UNIT]. Scales lie with
// the group outside, so that a tile reads neighbours: sx [groups, tokens rounded up to a multiple of 4]
// and sw [groups, rows rounded up to a multiple of 4]; what the rounding adds is read and never used.
// Outliers: xo [tokens, op] and wo [rows, op] with op a multiple of 32 (0: none, and the pointers are not
// used), sxo [tokens] and swo [rows]. All but sxo and swo are aligned to 16 bytes, y to 8.
//
// integer_product: THREADS threads, ceil(tokens / 128) * ceil(rows / 128) blocks in one
// dimension, and STAGES * STAGE_BYTES bytes of dynamic shared memory.
//
// add_float_outliers: THREADS threads, grid (ceil(rows / 64), ceil(tokens / 64)).

#if !defined(GROUP) || !defined(OUT_HALF) || !defined(NIBBLES) || !defined(THREADS) || !defined(TILE) || !defined(FLOAT_TILE) || \
    !defined(UNIT) || !defined(GROUPS_A_STAGE) || !defined(STAGE_BYTES) || !defined(STAGES) || !defined(SCALE_MULTIPLE)
#error "a constant is missing: src/backend/cuda/kernels/integer.rs declares them"
#endif

#define PARTS_A_GROUP (UNIT <= 128 ? 1 : (UNIT + 127) / 128)
/// Bytes of a row that a stage holds, rounded up to 32 for a part. The last part of a group may be
/// shorter; zeros follow it.
#define SPAN (UNIT <= 128 ? GROUPS_A_STAGE * UNIT : ((UNIT + PARTS_A_GROUP - 1) / PARTS_A_GROUP + 31) / 32 * 32)
/// Bytes that a matrix instruction takes of a row: two groups never share one.
#define DEPTH (UNIT <= 128 && UNIT % 32 != 0 ? 16 : 32)

static_assert(TILE == 128 && FLOAT_TILE == 64 && THREADS == 256, "a warp makes 64 x 32 results, a thread 4 x 4 of floating-point outliers");
static_assert(UNIT >= 16 && UNIT % 16 == 0, "groups are multiples of 16-byte pieces");
static_assert(STAGES >= 2, "a stage is multiplied while another one is copied");

// ---- Matrix instructions ----
//
// A warp makes 64 tokens x 32 rows of y as 4 x 4 results of 16 x 8. In lane 4 g + t:
//     result:             [0], [1]: token g, rows 2 t and 2 t + 1; [2], [3]: token g + 8, the same rows;
//     left, 32 deep:      registers 0, 1: bytes 4 t..4 t + 4 of tokens g and g + 8; 2, 3: 16 bytes on;
//     right, 32 deep:     register 0: bytes 4 t..4 t + 4 of row g; 1: 16 bytes on;
//     16 deep:            the registers of the first 16 bytes alone.
// A matrix of ldmatrix is eight rows of 16 bytes, of which lane 4 g + t receives bytes 4 t..4 t + 4 of
// row g: just one of these registers.

/// What the sums begin with. Up to 256 channels, a sum of products of codes lies within +-2^22. With the
/// bits of 1.5 * 2^23 below it, it is the float 1.5 * 2^23 + sum, exactly, which a subtraction turns
/// into the sum at many times the rate of a conversion.
static constexpr bool BY_BITS = GROUP <= 256;
static constexpr int START = BY_BITS ? 0x4b400000 : 0;

static __device__ __forceinline__ float float_of_sum(int sum) {
    return BY_BITS ? __int_as_float(sum) - 12582912.0f : __int2float_rn(sum);
}

/// Codes of 64 tokens and 32 rows, of one step.
struct Codes {
    u32 x[4][4];
    u32 w[2][4];
};

/// Loads step `step` of a stage: `x_at` and `w_at` are this lane's addresses in the first step.
template <int DEEP> static __device__ __forceinline__ void load_codes(Codes& codes, u32 x_at, u32 w_at, int step) {
    // The swizzle works on address bits 4 to 6, and stages begin at multiples of 128.
    if (DEEP == 32) {
        // x: matrices 0 1 are tokens 0..8 and 8..16, 2 3 the next 16 bytes; w: 0 1 the two halves of 32
        // bytes, 2 3 the next 8 rows.
#pragma unroll
        for (int m = 0; m < 4; m++) load_matrices(codes.x[m], (x_at ^ (step * 32)) + m * 16 * 128);
#pragma unroll
        for (int n = 0; n < 2; n++) load_matrices(codes.w[n], (w_at ^ (step * 32)) + n * 16 * 128);
    } else {
        // Each time, four matrices are 32 neighbouring tokens or rows.
#pragma unroll
        for (int m = 0; m < 2; m++) load_matrices(codes.x[m], (x_at ^ (step * 16)) + m * 32 * 128);
        load_matrices(codes.w[0], (w_at ^ (step * 16)));
    }
}

/// One of the 4 x 4 results: d = c + its product.
template <int DEEP, bool PAIRS>
static __device__ __forceinline__ void multiply(int (&d)[4], const Codes& codes, int m, int n, int c0, int c1, int c2, int c3) {
    if (DEEP == 32 && PAIRS)
        mma_nibbles_32(d, codes.x[m], codes.w[n / 2][n % 2 * 2], codes.w[n / 2][n % 2 * 2 + 1], c0, c1, c2, c3);
    else if (PAIRS)
        mma_nibbles_16(d, codes.x[m / 2][m % 2 * 2], codes.x[m / 2][m % 2 * 2 + 1], codes.w[0][n], c0, c1, c2, c3);
    else if (DEEP == 32)
        mma_codes_32(d, codes.x[m], codes.w[n / 2][n % 2 * 2], codes.w[n / 2][n % 2 * 2 + 1], c0, c1, c2, c3);
    else
        mma_codes_16(d, codes.x[m / 2][m % 2 * 2], codes.x[m / 2][m % 2 * 2 + 1], codes.w[0][n], c0, c1, c2, c3);
}

/// This lane's address in the first step of a tile, `first` rows into it.
template <int DEEP, bool LEFT> static __device__ __forceinline__ u32 place_of_lane(int first, int lane) {
    int row = DEEP == 16 ? lane : LEFT ? lane % 16 : lane % 8 + lane / 16 * 8;
    int piece = DEEP == 16 ? 0 : LEFT ? lane / 16 : lane / 8 % 2;
    return (first + row) * 128 + (piece ^ (row & 7)) * 16;
}

// ---- The product ----

/// Where a thread stands: warps are 2 along the tokens and 4 along the rows of a tile. Computed again
/// wherever it is used, to leave the registers to the sums.
struct Stand {
    int lane, token, row;
};
static __device__ __forceinline__ Stand stand() {
    u32 thread = threadIdx.x;
    keep_apart(thread);
    return Stand{int(thread % 32), int(thread / 32 % 2 * 64), int(thread / 64 * 32)};
}

/// The scales of a lane's 8 tokens and 8 rows.
struct Scales {
    float x[4][2];
    float w[4][2];
};

/// Loads them from the 128 of the tokens and the 128 of the rows of a tile and group.
static __device__ __forceinline__ void load_scales(Scales& scales, const float* of_group, const Stand& own) {
    const float* of_x = of_group + own.token + own.lane / 4;
    const float* of_w = of_group + TILE + own.row + own.lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        scales.x[i][0] = of_x[16 * i];
        scales.x[i][1] = of_x[16 * i + 8];
        float2 pair = *(const float2*)(of_w + 8 * i);
        scales.w[i][0] = pair.x;
        scales.w[i][1] = pair.y;
    }
}

/// acc = fma(s_x s_w, sum, acc) for the results of 16 tokens. Where a group takes several stages, its sums
/// begin again here.
static __device__ __forceinline__ void promote(float (&acc)[4][4], int (&sums)[4][4], const Scales& scales, int m) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            acc[n][e] = fmaf(scales.x[m][e / 2] * scales.w[n][e % 2], float_of_sum(sums[n][e]), acc[n][e]);
            if (PARTS_A_GROUP > 1) sums[n][e] = START;
        }
    }
}

#if OUT_HALF
typedef half Output;
static __device__ __forceinline__ void store_pair(half* to, float first, float second) { *(u32*)to = pack_half2(first, second); }
#else
typedef float Output;
static __device__ __forceinline__ void store_pair(float* to, float first, float second) { *(float2*)to = make_float2(first, second); }
#endif

/// y [tokens, rows]; the other operands are described at the head of this file.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    integer_product(const i8* x, const float* sx, const i8* xo, const float* sxo, const i8* w, const float* sw, const i8* wo,
                    const float* swo, Output* y, int tokens, int rows, int groups, int op) {
    extern __shared__ __align__(128) u8 memory[];
    // Eight tiles of tokens go through all rows together: blocks that run at the same time then read
    // few different tiles of both operands, which L2 holds.
    const int token_tiles = (tokens + TILE - 1) / TILE, row_tiles = (rows + TILE - 1) / TILE;
    const int band = blockIdx.x / (8 * row_tiles), in_band = blockIdx.x % (8 * row_tiles);
    const int height = min(8, token_tiles - band * 8);
    const int first_token = (band * 8 + in_band % height) * TILE, first_row = in_band / height * TILE;

    const long long row_bytes = (long long)groups * UNIT;
    const int token_stride = (tokens + SCALE_MULTIPLE - 1) / SCALE_MULTIPLE * SCALE_MULTIPLE, row_stride = (rows + SCALE_MULTIPLE - 1) / SCALE_MULTIPLE * SCALE_MULTIPLE;
    const int group_stages = UNIT <= 128 ? (groups + GROUPS_A_STAGE - 1) / GROUPS_A_STAGE : groups * PARTS_A_GROUP;
    const int stages = group_stages + (op + 127) / 128;
    const u32 base = shared_address(memory);

    auto copy_stage = [&](int stage) {
        // A thread copies 16 bytes of every 32nd token and row. Computing the addresses again for each
        // stage costs less than keeping them in registers.
        u32 thread = threadIdx.x;
        keep_apart(thread);
        const int copy_row = thread / 8, copy_piece = thread % 8;
        auto copy_codes = [&](u32 to, const i8* from, long long stride, int first, int count, bool there) {
            to += copy_row * 128 + (copy_piece ^ (copy_row & 7)) * 16;
            from += (first + copy_row) * stride;
#pragma unroll
            for (int i = 0; i < TILE / 32; i++)
                copy16(to + i * 32 * 128, from + i * 32 * stride, there && first + copy_row + i * 32 < count);
        };
        const u32 x_to = base + stage % STAGES * STAGE_BYTES, w_to = x_to + TILE * 128;
        if (stage < group_stages) {
            // What lies beyond the part, the group or the row is zero, and adds nothing to a sum.
            const int group = stage / PARTS_A_GROUP * GROUPS_A_STAGE, part = stage % PARTS_A_GROUP;
            const long long begin = (long long)group * UNIT + part * SPAN + copy_piece * 16;
            const long long end = UNIT <= 128 ? row_bytes : (long long)(group + 1) * UNIT;
            if (copy_piece * 16 < SPAN) {
                copy_codes(x_to, x + begin, row_bytes, first_token, tokens, begin < end);
                copy_codes(w_to, w + begin, row_bytes, first_row, rows, begin < end);
            }
            // Scales: 32 pieces of four for the tokens of a group, and as many for the rows. Absent
            // groups get zeros and change nothing: an f32 sum that began at +0 never becomes -0.
            if (thread < GROUPS_A_STAGE * 64) {
                const int own = group + int(thread / 64), piece = thread % 32 * 4;
                const bool of_rows = thread / 32 % 2;
                const int at = (of_rows ? first_row : first_token) + piece, stride = of_rows ? row_stride : token_stride;
                copy16(x_to + 2 * TILE * 128 + thread * 16, (of_rows ? sw : sx) + (long long)own * stride + at,
                       own < groups && at < stride);
            }
#if UNIT < 32
            // Eight groups have 512 pieces.
            {
                const int own = group + 4 + int(thread / 64), piece = thread % 32 * 4;
                const bool of_rows = thread / 32 % 2;
                const int at = (of_rows ? first_row : first_token) + piece, stride = of_rows ? row_stride : token_stride;
                copy16(x_to + 2 * TILE * 128 + (THREADS + thread) * 16,
                       (of_rows ? sw : sx) + (long long)own * stride + at, own < groups && at < stride);
            }
#endif
        } else if (stage < stages) {
            const int begin = (stage - group_stages) * 128 + copy_piece * 16;
            copy_codes(x_to, xo + begin, op, first_token, tokens, begin < op);
            copy_codes(w_to, wo + begin, op, first_row, rows, begin < op);
        }
        copy_commit();
    };

    int sums[4][4][4];
    float acc[4][4][4];
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sums[m][n][e] = START;
                acc[m][n][e] = 0.0f;
            }
        }
    }

#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) copy_stage(stage);

#pragma unroll 1
    for (int stage = 0; stage < group_stages; stage++) {
        // This stage has arrived for every warp, and every warp has left the one before it, whose memory
        // the next copy takes.
        copy_wait<STAGES - 2>();
        __syncthreads();
        copy_stage(stage + STAGES - 1);
        const Stand own = stand();
        const u32 here = base + stage % STAGES * STAGE_BYTES;
        const u32 x_at = here + place_of_lane<DEPTH, true>(own.token, own.lane);
        const u32 w_at = here + place_of_lane<DEPTH, false>(own.row, own.lane) + TILE * 128;
        const float* stage_scales = (const float*)(memory + stage % STAGES * STAGE_BYTES + 2 * TILE * 128);
        constexpr int STEPS_A_GROUP = UNIT <= 128 ? UNIT / DEPTH : SPAN / DEPTH;
#pragma unroll
        for (int step = 0; step < SPAN / DEPTH; step++) {
            // Where each step ends a group, loads stay after barriers: scales and codes of several steps
            // would not fit into the registers.
            if (STEPS_A_GROUP == 1) __syncwarp();
            Codes codes;
            load_codes<DEPTH>(codes, x_at, w_at, step);
            // A group of several stages goes on where the last stage ended; START is then set at its end.
            const bool first = PARTS_A_GROUP == 1 && step % STEPS_A_GROUP == 0;
            const bool last = step % STEPS_A_GROUP == STEPS_A_GROUP - 1 && stage % PARTS_A_GROUP == PARTS_A_GROUP - 1;
            Scales scales;
            if (STEPS_A_GROUP == 1 && DEPTH == 32) __syncwarp();
            if (last) load_scales(scales, stage_scales + step / STEPS_A_GROUP * 2 * TILE, own);
#pragma unroll
            for (int m = 0; m < 4; m++) {
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    int(&sum)[4] = sums[m][n];
                    if (first)
                        multiply<DEPTH, NIBBLES>(sum, codes, m, n, START, START, START, START);
                    else
                        multiply<DEPTH, NIBBLES>(sum, codes, m, n, sum[0], sum[1], sum[2], sum[3]);
                }
                // The sums of a group are promoted after its last products, result by result, so that
                // the tensor cores and the float units work at the same time.
                if (last && m > 0) promote(acc[m - 1], sums[m - 1], scales, m - 1);
            }
            if (last) promote(acc[3], sums[3], scales, 3);
        }
    }

    if (op > 0) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) sums[m][n][e] = 0;
            }
        }
#pragma unroll 1
        for (int stage = group_stages; stage < stages; stage++) {
            copy_wait<STAGES - 2>();
            __syncthreads();
            copy_stage(stage + STAGES - 1);
            const Stand own = stand();
            const u32 here = base + stage % STAGES * STAGE_BYTES;
            const u32 x_at = here + place_of_lane<32, true>(own.token, own.lane);
            const u32 w_at = here + place_of_lane<32, false>(own.row, own.lane) + TILE * 128;
#pragma unroll
            for (int step = 0; step < 4; step++) {
                Codes codes;
                load_codes<32>(codes, x_at, w_at, step);
#pragma unroll
                for (int m = 0; m < 4; m++) {
#pragma unroll
                    for (int n = 0; n < 4; n++)
                        multiply<32, false>(sums[m][n], codes, m, n, sums[m][n][0], sums[m][n][1], sums[m][n][2], sums[m][n][3]);
                }
            }
        }
        const Stand own = stand();
        Scales scales;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int token = first_token + own.token + 16 * i + 8 * h + own.lane / 4;
                const int row = first_row + own.row + 8 * i + own.lane % 4 * 2 + h;
                scales.x[i][h] = token < tokens ? sxo[token] : 0.0f;
                scales.w[i][h] = row < rows ? swo[row] : 0.0f;
            }
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    acc[m][n][e] = fmaf(scales.x[m][e / 2] * scales.w[n][e % 2], __int2float_rn(sums[m][n][e]), acc[m][n][e]);
            }
        }
    }

    const Stand own = stand();
    // Pairs of outputs are aligned where rows of y are.
    const bool pairs = rows % 2 == 0;
#pragma unroll
    for (int m = 0; m < 4; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int token = first_token + own.token + 16 * m + 8 * h + own.lane / 4;
            if (token < tokens) {
                Output* to = y + (long long)token * rows;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const int row = first_row + own.row + 8 * n + own.lane % 4 * 2;
                    if (pairs) {
                        if (row < rows) store_pair(to + row, acc[m][n][2 * h], acc[m][n][2 * h + 1]);
                    } else {
                        if (row < rows) store(to + row, acc[m][n][2 * h]);
                        if (row + 1 < rows) store(to + row + 1, acc[m][n][2 * h + 1]);
                    }
                }
            }
        }
    }
}

// ---- Outliers in f16 or FP8 ----

/// FP8's numbers come with their scales multiplied in, which is exact in f32.
///
/// Goes on with y [tokens, rows] in place: acc = fma(xo, wo, acc) channel by channel, with xo [tokens, o]
/// and wo [rows, o].
extern "C" __global__ void __launch_bounds__(THREADS)
    add_float_outliers(const float* xo, const float* wo, float* y, int tokens, int rows, int o) {
    // 64 tokens x 64 rows, 32 channels at a time; a thread has every 16th token and row. The odd width
    // keeps the columns that are read in different banks.
    __shared__ float x_part[64][33], w_part[64][33];
    const int thread = threadIdx.x, own_token = thread / 16, own_row = thread % 16;
    const int first_token = blockIdx.y * 64, first_row = blockIdx.x * 64;
    float acc[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int token = first_token + own_token + 16 * i, row = first_row + own_row + 16 * j;
            acc[i][j] = token < tokens && row < rows ? y[(long long)token * rows + row] : 0.0f;
        }
    }
    for (int begin = 0; begin < o; begin += 32) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int line = thread / 32 + 8 * i, channel = begin + thread % 32;
            const int token = first_token + line, row = first_row + line;
            x_part[line][thread % 32] = token < tokens && channel < o ? xo[(long long)token * o + channel] : 0.0f;
            w_part[line][thread % 32] = row < rows && channel < o ? wo[(long long)row * o + channel] : 0.0f;
        }
        __syncthreads();
        const int count = min(32, o - begin);
        for (int channel = 0; channel < count; channel++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++)
                    acc[i][j] = fmaf(x_part[own_token + 16 * i][channel], w_part[own_row + 16 * j][channel], acc[i][j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int token = first_token + own_token + 16 * i, row = first_row + own_row + 16 * j;
            if (token < tokens && row < rows) y[(long long)token * rows + row] = acc[i][j];
        }
    }
}

// ---- Codes of 4 bits ----

/// Eight bytes of codes a word, `words` words.
extern "C" __global__ void __launch_bounds__(THREADS) pack_nibbles(const uint2* codes, long long words, u32* to) {
    const long long own = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (own >= words) return;
    const uint2 v = codes[own];
    // Neighbours meet in a byte: bits 0 to 3 of byte 1 go to bits 4 to 7 of byte 0, and of byte 3 to byte 2.
    const u32 low = (v.x & 0x000f000f) | (v.x >> 4 & 0x00f000f0), high = (v.y & 0x000f000f) | (v.y >> 4 & 0x00f000f0);
    to[own] = __byte_perm(low, high, 0x6420);
}

/// The way back.
extern "C" __global__ void __launch_bounds__(THREADS) unpack_nibbles(const u32* from, long long words, uint2* codes) {
    const long long own = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (own >= words) return;
    u32 both[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        both[half] = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int code = (int)(from[own] << (28 - (half * 16 + i * 4))) >> 28;
            both[half] |= (u32)(code & 255) << (8 * i);
        }
    }
    codes[own] = make_uint2(both[0], both[1]);
}

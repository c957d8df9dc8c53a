// Causal attention over entire windows, on what prepare.cu makes.
//
// HEAD_DIM  channels of a head, even, 2 to 256
// ROTATED   1: values come in the basis of a Hadamard transform, outputs leave it
// WINDOWED  1: a query sees `reach` keys at most, its own among them
//
// flash_attention: THREADS threads, grid (ceil(seq_len / QUERY_ROWS), heads, windows), and dynamic shared memory for the queries and two
// stages of keys and of values: (QUERY_ROWS + 4 * KEY_ROWS) * PITCH bytes, at most 98304.

#if !defined(HEAD_DIM) || !defined(PADDED_HEAD) || !defined(ROTATED) || !defined(WINDOWED) || !defined(THREADS) || \
    !defined(QUERY_ROWS) || !defined(KEY_ROWS) || !defined(PITCH)
#error "a constant is missing: src/backend/cuda/kernels/attention.rs declares them"
#endif
static_assert(THREADS == 128, "four warps share a tile of queries");

// Four warps share a tile of queries; each has 16 * TILES_M of its rows and sees all keys. Two tiles of
// 16 rows a warp use each key and value that is read from shared memory twice; with one, reading would
// take as long as multiplying.
//
// A 16 x 8 result of the matrix instruction, in lane 4 g + t:
//     [0], [1]: row g, columns 2 t and 2 t + 1;   [2], [3]: row g + 8, the same columns.
// The left operand, 16 x 16, has the same shape twice: registers 0 and 1 are rows g and g + 8 of columns
// 0..8, registers 2 and 3 of columns 8..16. So two neighbouring results of the first product, packed,
// are a left operand of the second one.

static constexpr int TILES_M = QUERY_ROWS / 64;
static constexpr int KEY_TILES = KEY_ROWS / 8;
static constexpr int DEPTH = PADDED_HEAD / 16;
static constexpr int OUT_TILES = PADDED_HEAD / 8;
/// Whether a warp's queries stay in registers; for wide heads the outputs take their registers.
static constexpr bool HOLDS_QUERIES = PADDED_HEAD <= 64;

/// Where 16-byte piece `piece` of row `row` lies, in bytes.
static __device__ __forceinline__ u32 offset_of(u32 row, u32 piece) {
    return row * PITCH + (PADDED_HEAD % 64 == 0 ? piece ^ (row & 7) : piece) * 16;
}

/// The offset after `offset_of(row, piece)` with `steps` more 16-value columns; `steps` is a constant, and
/// `piece` 0 or 1.
static __device__ __forceinline__ u32 further(u32 address, int steps) {
    // The swizzle works on address bits 4 to 6. Buffers begin at multiples of 128.
    if (PADDED_HEAD % 64 == 0) return (address ^ ((steps & 3) * 32)) + (steps >> 2) * 128;
    return address + steps * 32;
}

/// Starts the copy of ROWS rows from `first` on; rows from `end` on become zeros.
template <int ROWS> static __device__ __forceinline__ void copy_rows(u32 to, const half* from, u32 thread, int first, int end) {
    constexpr int PIECES = PADDED_HEAD / 8, ALL = ROWS * PIECES;
    from += (long long)first * PADDED_HEAD;
    end -= first;
#pragma unroll
    for (int i = 0; i < (ALL + THREADS - 1) / THREADS; i++) {
        const u32 index = thread + i * THREADS, row = index / PIECES, piece = index % PIECES;
        if (ALL % THREADS == 0 || index < ALL)
            copy16(to + offset_of(row, piece), from + row * PADDED_HEAD + piece * 8, int(row) < end);
    }
}

/// The Hadamard transform of each row of a warp's outputs. A column is 8 n + 2 t + e for tile n, lane
/// t of four and element e, so distance 1 is between elements, 2 and 4 between lanes, 8 and more
/// between tiles.
static __device__ __forceinline__ void transform_outputs(float (&o)[OUT_TILES][4], int lane) {
#pragma unroll
    for (int n = 0; n < OUT_TILES; n++) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            float left = o[n][e], right = o[n][e + 1];
            o[n][e] = left + right;
            o[n][e + 1] = left - right;
        }
    }
#pragma unroll
    for (int distance = 1; distance < 4 && 2 * distance < BLOCK; distance *= 2) {
#pragma unroll
        for (int n = 0; n < OUT_TILES; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float other = __shfl_xor_sync(0xffffffffu, o[n][e], distance);
                o[n][e] = lane & distance ? other - o[n][e] : o[n][e] + other;
            }
        }
    }
#pragma unroll
    for (int step = 1; step < BLOCK / 8; step *= 2) {
#pragma unroll
        for (int n = 0; n < OUT_TILES; n++) {
            if ((n & step) == 0) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float left = o[n][e], right = o[(n + step) % OUT_TILES][e];
                    o[n][e] = left + right;
                    o[(n + step) % OUT_TILES][e] = left - right;
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < OUT_TILES; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) o[n][e] *= BLOCK_SCALE;
    }
}

/// q: [windows, heads, seq_len, PADDED_HEAD]; k and v: [windows, kv_heads, seq_len, PADDED_HEAD]; out: [windows * seq_len,
/// heads * HEAD_DIM]. Scores are multiplied by `scale`, which is positive.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    flash_attention(const half* q, const half* k, const half* v, half* out, int seq_len, int heads, int kv_heads, float scale, int reach) {
    extern __shared__ __align__(128) u8 memory[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Tiles late in the window, which see most keys, begin first, or one would be left at the end.
    const int first_query = int(gridDim.x - 1 - blockIdx.x) * QUERY_ROWS;
    const int head = blockIdx.y, window = blockIdx.z;
    const int kv_head = head / (heads / kv_heads);
    q += ((long long)window * heads + head) * seq_len * PADDED_HEAD;
    const long long kv_start = ((long long)window * kv_heads + kv_head) * seq_len * PADDED_HEAD;

    constexpr u32 TILE_BYTES = KEY_ROWS * PITCH;
    const u32 queries = shared_address(memory), keys = queries + QUERY_ROWS * PITCH, values = keys + 2 * TILE_BYTES;
    const int last_query = min(first_query + QUERY_ROWS, seq_len) - 1;
    const int tiles = last_query / KEY_ROWS + 1;
    pdl_wait();
    copy_rows<QUERY_ROWS>(queries, q, threadIdx.x, first_query, seq_len);
    copy_rows<KEY_ROWS>(keys, k + kv_start, threadIdx.x, 0, seq_len);
    copy_rows<KEY_ROWS>(values, v + kv_start, threadIdx.x, 0, seq_len);
    copy_commit();

    // Which row and piece a lane names to load four 8 x 8 matrices:
    //     queries, left operand:          matrices 0 1 are rows 0..8 and 8..16, 2 3 the next 8 columns;
    //     keys, two right operands:       matrices 0 1 are columns 0..8 and 8..16, 2 3 the next 8 keys;
    //     values, transposed, two of them: matrices 0 1 are keys 0..8 and 8..16, 2 3 the next 8 columns.
    const int first_row = warp * 16 * TILES_M;
    const u32 query_at = queries + offset_of(first_row + lane % 16, lane / 16);
    const u32 key_at = keys + offset_of(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const u32 value_at = values + offset_of(lane % 16, lane / 16);

    u32 held[HOLDS_QUERIES ? DEPTH : 1][TILES_M][4];
    if (HOLDS_QUERIES) {
        copy_wait<0>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < DEPTH; step++) {
#pragma unroll
            for (int m = 0; m < TILES_M; m++)
                load_matrices(held[HOLDS_QUERIES ? step : 0][m], further(query_at, step) + m * 16 * PITCH);
        }
    }

    float o[TILES_M][OUT_TILES][4];
    float largest[TILES_M][2], sums[TILES_M][2];
#pragma unroll
    for (int m = 0; m < TILES_M; m++) {
#pragma unroll
        for (int n = 0; n < OUT_TILES; n++) {
#pragma unroll
            for (int e = 0; e < 4; e++) o[m][n][e] = 0.0f;
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            largest[m][h] = __uint_as_float(0xff800000u);
            sums[m][h] = 0.0f;
        }
    }
    // e^(scale (s - max)) = 2^(s factor - max factor).
    const float factor = scale * 1.44269504f;
    const int warp_query = first_query + first_row;

#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        const int first_key = tile * KEY_ROWS;
        const u32 stage = tile % 2 * TILE_BYTES;
        // This tile has arrived for every warp, and every warp has left the one before it, so its memory
        // is free for the next.
        copy_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles) {
            // Computing the addresses again costs less than keeping all of them in registers.
            u32 thread = threadIdx.x;
            long long start = kv_start;
            keep_apart(thread);
            keep_apart(start);
            copy_rows<KEY_ROWS>(keys + (TILE_BYTES - stage), k + start, thread, first_key + KEY_ROWS, seq_len);
            copy_rows<KEY_ROWS>(values + (TILE_BYTES - stage), v + start, thread, first_key + KEY_ROWS, seq_len);
        }
        copy_commit();
        // All of these keys come after all of this warp's queries.
        if (first_key >= warp_query + 16 * TILES_M) continue;
#if WINDOWED
        // All of them come too long before.
        if (first_key + KEY_ROWS <= warp_query - reach + 1) continue;
#endif

        float s[TILES_M][KEY_TILES][4];
#pragma unroll
        for (int m = 0; m < TILES_M; m++) {
#pragma unroll
            for (int n = 0; n < KEY_TILES; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] = 0.0f;
            }
        }
#pragma unroll
        for (int step = 0; step < DEPTH; step++) {
            u32 a[TILES_M][4];
#pragma unroll
            for (int m = 0; m < TILES_M; m++) {
                if (HOLDS_QUERIES) {
#pragma unroll
                    for (int i = 0; i < 4; i++) a[m][i] = held[HOLDS_QUERIES ? step : 0][m][i];
                } else {
                    load_matrices(a[m], further(query_at, step) + m * 16 * PITCH);
                }
            }
#pragma unroll
            for (int n = 0; n < KEY_TILES; n += 2) {
                u32 b[4];
                load_matrices(b, further(key_at + stage, step) + n * 8 * PITCH);
#pragma unroll
                for (int m = 0; m < TILES_M; m++) {
                    mma_half(s[m][n], a[m], b[0], b[1]);
                    mma_half(s[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }

        if (WINDOWED || first_key + KEY_ROWS - 1 > warp_query) {
#pragma unroll
            for (int m = 0; m < TILES_M; m++) {
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int key = first_key + 8 * n + lane % 4 * 2 + e % 2;
                        int query = warp_query + 16 * m + lane / 4 + e / 2 * 8;
                        if (key > query || (WINDOWED && key <= query - reach)) s[m][n][e] = __uint_as_float(0xff800000u);
                    }
                }
            }
        }

        // Key 0 is seen by every query, so after the first tile the maximum is finite if the scores are. With WINDOWED a row may
        // have seen nothing yet: its powers are zero then.
        // A NaN is passed over by the maximum and shows in the power.
        float corrections[TILES_M][2];
        bool moved = false;
#pragma unroll
        for (int m = 0; m < TILES_M; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float best = largest[m][h];
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++) best = fmaxf(best, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
                best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
#if WINDOWED
                corrections[m][h] = largest[m][h] == best ? 1.0f : power_of_two((largest[m][h] - best) * factor);
#else
                corrections[m][h] = power_of_two((largest[m][h] - best) * factor);
#endif
                moved = moved || !(corrections[m][h] == 1.0f);
                largest[m][h] = best;
                const float offset = WINDOWED && best == __uint_as_float(0xff800000u) ? 0.0f : -best * factor;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < KEY_TILES; n++) {
#pragma unroll
                    for (int e = 2 * h; e < 2 * h + 2; e++) {
                        s[m][n][e] = power_of_two(fmaf(s[m][n][e], factor, offset));
                        sum += s[m][n][e];
                    }
                }
                sums[m][h] = fmaf(sums[m][h], corrections[m][h], sum);
            }
        }
        // After some tiles the maxima rarely move.
        if (__any_sync(0xffffffffu, moved)) {
#pragma unroll
            for (int m = 0; m < TILES_M; m++) {
#pragma unroll
                for (int n = 0; n < OUT_TILES; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) o[m][n][e] *= corrections[m][e / 2];
                }
            }
        }

#pragma unroll
        for (int step = 0; step < KEY_ROWS / 16; step++) {
            u32 a[TILES_M][4];
#pragma unroll
            for (int m = 0; m < TILES_M; m++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float(&pair)[4] = s[m][2 * step + i / 2];
                    a[m][i] = pack_half2(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (int n = 0; n < OUT_TILES; n += 2) {
                u32 b[4];
                load_matrices_transposed(b, further(value_at + stage, n / 2) + step * 16 * PITCH);
#pragma unroll
                for (int m = 0; m < TILES_M; m++) {
                    mma_half(o[m][n], a[m], b[0], b[1]);
                    mma_half(o[m][n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

#pragma unroll
    for (int m = 0; m < TILES_M; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = sums[m][h];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float inverse = __frcp_rn(sum);
#pragma unroll
            for (int n = 0; n < OUT_TILES; n++) {
                o[m][n][2 * h] *= inverse;
                o[m][n][2 * h + 1] *= inverse;
            }
        }
        if (ROTATED) transform_outputs(o[m], lane);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int query = warp_query + 16 * m + lane / 4 + 8 * h;
            if (query < seq_len) {
                half* row = out + ((long long)window * seq_len + query) * heads * HEAD_DIM + (long long)head * HEAD_DIM;
#pragma unroll
                for (int n = 0; n < OUT_TILES; n++) {
                    int column = 8 * n + lane % 4 * 2;
                    if (column < HEAD_DIM) *(u32*)(row + column) = pack_half2(o[m][n][2 * h], o[m][n][2 * h + 1]);
                }
            }
        }
    }
}

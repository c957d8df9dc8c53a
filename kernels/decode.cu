// Attention of one new token of each sequence over the pages of the cache (pages.cuh).
//
// HEAD_DIM  channels of a head, a multiple of 16 up to 128
// KV_BITS   4 or 8: pages of codes; 16: of f16
// ROTATED   1: keys and values come in the basis of a Hadamard transform: queries enter it, outputs leave it
// SINGLE    1: a key and value head serves one query head
// TILE_HEADS  query heads of a tile: 1 or 8
// WARPS     warps of a block
// GROUP     pages that a warp works on together
// BLOCKS_PER_SM  occupancy: thread blocks per SM
// BULK      1: pages are copied by one instruction each
// WINDOWED  1: only the last tokens of a sequence are seen
// MOST_STAGES  groups of pages that a warp has in flight at most
// PART_PITCH  floats from row to row of outputs: after a head's come its maximum and its sum. Lanes that write 8 channels of 8 heads meet
//           32 banks
//
// decode_attention: THREADS threads, grid (splits, kv_heads * head tiles, sequences); dynamic shared memory for
// `stages` times STAGE_BYTES of each warp, 1 to MOST_STAGES (without BULK, 2), and at least for a part of each warp. A head tile is up to
// TILE_HEADS query heads of a key and value head.
//
//     a sequence's pages  | split 0                 | split 1                 | ...          a block each
//     a split's pages     | 0 0 | 1 1 | 2 2 | .. | 7 7 | 0 0 | 1 1 | ..                      GROUP pages after another to its warps
//
// Each warp copies its own pages, `stages` groups of them in flight, and holds its own running maximum, sums and
// outputs; no warp waits for another one until the end. Tokens are the rows of the matrix instruction and query
// heads its columns, of which there are eight:
//
//     scores  [16 tokens, 8 heads]    += keys   [16 tokens, 16 channels] queries [16 channels, 8 heads]
//     outputs [16 channels, 8 heads]  += values [16 channels, 16 tokens] p       [16 tokens, 8 heads]
//
// Codes go into the products as they are (pages.cuh): what scales and zero points do to them is done to the scores
// and to p, once a token instead of once a value:
//
//     score = scale_k (sum q code - zero_k sum q)        output = sum (p scale_v) code - sum (p scale_v) zero_v
//
// The last sum is a product with a row of zero points. p scale_v is rounded to f16 and must neither overflow nor vanish:
// it is multiplied by a power of two that follows the largest scale so far, as the maximum follows the scores.
//
// Warps' parts are added in order, then splits' parts by the block that is last to finish, in order again.

#if !defined(WINDOWED) || !defined(SINGLE) || !defined(TILE_HEADS) || !defined(WARPS) || !defined(GROUP) || !defined(BLOCKS_PER_SM) || !defined(BULK) || \
    !defined(MOST_STAGES) || !defined(PART_PITCH)
#error "a constant is missing: src/backend/cuda/kernels/decode.rs declares them"
#endif

#define THREADS (WARPS * 32)
#define STAGE_BYTES (GROUP * PAGE_BYTES)
/// Values from row to row of queries: lanes that read pairs of 8 rows meet 32 banks.
#define QUERY_PITCH (HEAD_DIM + 8)

static constexpr float LOWEST = -1e30f;

/// 1 where a token of a pair is below `count`, as a mask of f16.
static __device__ __forceinline__ u32 pair_mask(int token, int count) {
    return (token < count ? 0xffffu : 0) | (token + 1 < count ? 0xffff0000u : 0);
}

/// Words of a lane's codes of keys or values.
#define LANE_WORDS (TILES * (QUANTIZED ? TILE_WORDS : 1))

/// A lane's words of all tiles of keys or values: four tiles together, four words a load.
static __device__ __forceinline__ void load_words(u32 (&words)[LANE_WORDS], const u8* side, int lane) {
    const u32* from = reinterpret_cast<const u32*>(side);
#pragma unroll
    for (int first = 0; first < LANE_WORDS; first += 4 * TILE_WORDS) {
        const int left = LANE_WORDS - first, width = left < 4 * TILE_WORDS ? left : 4 * TILE_WORDS;
        const u32* at = from + first * 32 + lane * width;
#pragma unroll
        for (int i = 0; i < width; i += 4) {
            if (width % 4 == 0) {
                uint4 four = *reinterpret_cast<const uint4*>(at + i);
                words[first + i] = four.x, words[first + i + 1] = four.y, words[first + i + 2] = four.z, words[first + i + 3] = four.w;
            } else {
#pragma unroll
                for (int j = i; j < i + 4 && j < width; j++) words[first + j] = at[j];
            }
        }
    }
}

/// What registers 1 and 3 of a tile of codes are multiplied by, in addition to 2^-24.
#define ODD_REGISTERS (CODE_BITS == 4 ? 16.0f : 1.0f)

/// Register fragments of tile `tile` of codes, each times 2^-24, of registers 1 and 3 times ODD_REGISTERS as well.
static __device__ __forceinline__ void unpack_tile(u32 (&a)[4], const u32 (&words)[LANE_WORDS], int tile) {
    if (CODE_BITS == 4) {
        const u32 word = words[tile], upper = word >> 8;
        a[0] = word & 0x000f000f, a[1] = word & 0x00f000f0, a[2] = upper & 0x000f000f, a[3] = upper & 0x00f000f0;
    } else {
        const u32 first = words[tile * 2 % LANE_WORDS], second = words[(tile * 2 + 1) % LANE_WORDS];
        a[0] = first & 0x00ff00ff, a[1] = (first >> 8) & 0x00ff00ff, a[2] = second & 0x00ff00ff, a[3] = (second >> 8) & 0x00ff00ff;
    }
}

/// Puts the parts of one head together, for the channels that the lane holds: `row(i)` is part i of up to PARTS, outputs,
/// maximum and sum. Returns the sum and sets the maximum.
template <int PARTS, class Row>
static __device__ __forceinline__ float join(float (&x)[HELD], float& maximum, Row row, int parts) {
    maximum = LOWEST;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) x[i] = 0.0f;
    float weights[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        weights[part] = part < parts ? row(part)[HEAD_DIM] : LOWEST;
        maximum = fmaxf(maximum, weights[part]);
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
        if (part >= parts) break;
        const float* own = row(part);
        const float weight = power_of_two(weights[part] - maximum);
        sum = fmaf(weight, own[HEAD_DIM + 1], sum);
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (channel_of(i) < HEAD_DIM) x[i] = fmaf(weight, own[channel_of(i)], x[i]);
    }
    return sum;
}

/// Keeps the lane's channels of a head, with its maximum and its sum, as a part.
static __device__ __forceinline__ void keep(const float (&x)[HELD], float maximum, float sum, float* row) {
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (channel_of(i) < HEAD_DIM) row[channel_of(i)] = x[i];
    if (threadIdx.x % HEAD_LANES == 0) {
        row[HEAD_DIM] = maximum;
        row[HEAD_DIM + 1] = sum;
    }
}


/// q: a row of `query_stride` values for each sequence, heads before the rotary embedding, its last token's; cos and
/// sin: [positions, HEAD_DIM / 2]; pool: [pages, kv_heads, PAGE_BYTES]; table: [sequences, table_stride], the pages of each
/// sequence; lengths: [sequences], tokens with the last one; out: [sequences, heads * HEAD_DIM]. A split has
/// `split_pages` pages. parts: [sequences, gridDim.y, splits, TILE_HEADS, PART_PITCH], finished: [sequences, gridDim.y],
/// zero before and after, neither of them used where there is one split. Scores are multiplied by `scale`, which is
/// positive. With WINDOWED only the last `reach` tokens are seen.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    decode_attention(const half* q, long long query_stride, const float* cos, const float* sin, const u8* pool, const int* table,
                     int table_stride, const int* lengths, half* out, float* parts, u32* finished, int heads, int kv_heads,
                     int split_pages, int stages, float scale, int reach) {
    extern __shared__ __align__(128) u8 memory[];
    __shared__ __align__(16) half queries[8 * QUERY_PITCH];
    // A warp's number from a lane of it: the compiler sees that all have the same.
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), g = lane / 4, t = lane % 4;
    const int sequence = blockIdx.z, split = blockIdx.x, tiles = int(gridDim.y) / kv_heads;
    const int kv_head = int(blockIdx.y) / tiles, tile = int(blockIdx.y) % tiles, group = heads / kv_heads;
    const int first_head = kv_head * group + tile * TILE_HEADS, head_count = min(group - tile * TILE_HEADS, TILE_HEADS);
    // A lane has the numbers of the warp's next pages, GROUP after another, 32 at a time, and of the 32 after them, so that
    // no load waits for the table; the first ones, not even for the length.
#if WINDOWED
    // Of tokens before the window no page is read but the one that the window begins in.
    const int unseen = max(load_now(lengths + sequence) - reach, 0), skipped = unseen / PAGE_TOKENS;
#else
    constexpr int skipped = 0;
#endif
    const int first_page = skipped + split * split_pages, table_pages = table_stride - first_page;
    const int* own_table = table + (long long)sequence * table_stride + first_page;
    auto page_number = [&](int i) {
        const int page = (i / GROUP * WARPS + warp) * GROUP + i % GROUP;
        return page < table_pages ? load_now(own_table + page) : 0;
    };
    int numbers = page_number(lane);
    const int length = load_now(lengths + sequence), pages = (length + PAGE_TOKENS - 1) / PAGE_TOKENS;
    int next_numbers = page_number(lane + 32);
    const int own_pages = max(min(pages - first_page, split_pages), 0);
    // A split that the sequence does not reach has nothing to say, but for an empty sequence's first.
    if (own_pages == 0 && split > 0) return;
    const int groups = (own_pages + GROUP - 1) / GROUP, own_groups = (groups - warp + WARPS - 1) / WARPS;
    u8* own_stages = memory + warp * stages * STAGE_BYTES;
    const u32 own_address = shared_address(own_stages);

    // Table and lengths come from the host: what follows, from kernels.
    pdl_wait();
    // The query's loads go first: after those of the pages they would wait for all of them.
    constexpr int SLOTS = THREADS / HEAD_LANES;
    float x[HELD];
    load_head(x, q + sequence * query_stride + (first_head + int(threadIdx.x) / HEAD_LANES) * HEAD_DIM, int(threadIdx.x) / HEAD_LANES < head_count);
    const long long position = (long long)max(length - 1, 0) * (HEAD_DIM / 2);
    const Angle angle = load_angle(cos + position, sin + position);
#if BULK
    __shared__ u64 arrivals[WARPS * MOST_STAGES];
    const u32 arrived = shared_address(arrivals + warp * MOST_STAGES);
    if (lane < stages) {
        barrier_init(arrived + 8 * lane, 1);
        barrier_init_fence();
    }
    __syncwarp();
#endif
    auto start_copy = [&](int i, int stage) {
        if (i > 0 && i * GROUP % 32 == 0) {
            numbers = next_numbers;
            next_numbers = page_number(i * GROUP + 32 + lane);
        }
        const int count = min(own_pages - (i * WARPS + warp) * GROUP, GROUP);
        const u32 to = own_address + stage * STAGE_BYTES;
#if BULK
        if (lane == 0) barrier_expect(arrived + 8 * stage, count * PAGE_BYTES);
#endif
#pragma unroll
        for (int page = 0; page < GROUP; page++) {
            const int number = __shfl_sync(0xffffffffu, numbers, (i * GROUP + page) % 32);
            if (page >= count) break;
            const u8* from = pool + ((long long)number * kv_heads + kv_head) * PAGE_BYTES;
#if BULK
            if (lane == 0) copy_bulk(to + page * PAGE_BYTES, from, PAGE_BYTES, arrived + 8 * stage);
#else
#pragma unroll
            for (int at = lane * 16; at < PAGE_BYTES; at += 512) copy16(to + page * PAGE_BYTES + at, from + at, true);
#endif
        }
#if !BULK
        copy_commit();
#endif
    };
#pragma unroll 1
    for (int i = 0; i < stages && i < own_groups; i++) start_copy(i, i);

    // Queries, while the first pages are in flight. Columns without a head are zeros.
    for (int i = threadIdx.x; i < 8 * QUERY_PITCH / 2; i += THREADS) reinterpret_cast<u32*>(queries)[i] = 0;
    __syncthreads();
    {
#if QUADS
        float* exchange = nullptr;
#else
        __shared__ float exchanges[WARPS][HEAD_DIM];
        float* exchange = exchanges[warp];
#endif
#pragma unroll 1
        for (int base = 0; base + warp * 32 / HEAD_LANES < head_count; base += SLOTS) {
            const int head = base + int(threadIdx.x) / HEAD_LANES;
            const bool there = head < head_count;
            if (base > 0) load_head(x, q + sequence * query_stride + (first_head + head) * HEAD_DIM, there);
            embed(x, angle, exchange);
            if (ROTATED) transform(x);
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (there && channel_of(i) < HEAD_DIM) queries[head * QUERY_PITCH + channel_of(i)] = to_half(x[i]);
        }
    }
    __syncthreads();
    u32 query[TILES][2];
#pragma unroll
    for (int s = 0; s < TILES; s++) {
        const u32* row = reinterpret_cast<const u32*>(queries + g * QUERY_PITCH + s * 16 + t * 2);
        query[s][0] = row[0];
        query[s][1] = row[4];
    }
    // Scores become exponents of two. Codes come times 2^-24.
    const float factor = scale * 1.44269504f * (QUANTIZED ? 16777216.0f : 1.0f);
    float query_sum[4] = {};
    if (QUANTIZED) {
        const u32 ones[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
#pragma unroll
        for (int s = 0; s < TILES; s++) mma_half(query_sum, ones, query[s][0], query[s][1]);
#pragma unroll
        for (int i = 0; i < 4; i++) query_sum[i] *= (i < 2 ? -1.0f : -ODD_REGISTERS) / 16777216.0f;
    }

    // A lane has columns 2 t and 2 t + 1, of scores as of outputs; with SINGLE only the first counts.
    constexpr int COLUMNS = SINGLE ? 1 : 2;
    float o[TILES][4], zeros[4] = {}, maximum[2] = {LOWEST, LOWEST}, sum[2] = {};
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) o[j][e] = 0.0f;
    }
    // The power of two with the largest scale of values so far, as bits, and what p is multiplied with for it.
    u32 largest = 0x33800000u;
    constexpr u32 LIFT = (127u + 127u + 14u) << 23;

    int stage = 0;
    u32 phase = 0;
#pragma unroll 1
    for (int i = 0; i < own_groups; i++) {
#if BULK
        barrier_wait(arrived + 8 * stage, phase);
#else
        // All but the group after this one, where there is one: without BULK there are two stages.
        if (i + 1 < own_groups) copy_wait<1>();
        else copy_wait<0>();
        __syncwarp();
#endif
        const u8* group_at = own_stages + stage * STAGE_BYTES;
        const int group_page = (i * WARPS + warp) * GROUP;
        // Tokens from the group's first to the end of the sequence or the split.
        const int tokens = min(length - (first_page + group_page) * PAGE_TOKENS, (own_pages - group_page) * PAGE_TOKENS);

        float s[GROUP][4], value_scale[GROUP][2];
#pragma unroll
        for (int page = 0; page < GROUP; page++) {
#pragma unroll
            for (int e = 0; e < 4; e++) s[page][e] = LOWEST;
            value_scale[page][0] = value_scale[page][1] = 0.0f;
            const int valid = tokens - page * PAGE_TOKENS;
            if (valid <= 0) continue;
            const u8* blob = group_at + page * PAGE_BYTES;
            // Two chains of sums, since each product waits for the one before it.
            float even[4] = {}, odd[4] = {};
            if (QUANTIZED) {
                u32 words[LANE_WORDS];
                load_words(words, blob, lane);
#pragma unroll
                for (int step = 0; step < TILES; step++) {
                    u32 a[4];
                    unpack_tile(a, words, step);
                    mma_half(step % 2 ? odd : even, a, query[step][0], query[step][1]);
                }
                const uint2 keys = *reinterpret_cast<const uint2*>(blob + 2 * SIDE_BYTES + 8 * g);
                const u32 values = *reinterpret_cast<const u32*>(blob + 2 * SIDE_BYTES + 64 + 4 * g);
                const float low = low_half(keys.x) * factor, high = low_half(keys.y) * (factor / ODD_REGISTERS);
                const float low_zero = high_half(keys.x), high_zero = high_half(keys.y);
#pragma unroll
                for (int e = 0; e < COLUMNS; e++) {
                    s[page][e] = fmaf(low_zero, query_sum[e], even[e] + odd[e]) * low;
                    s[page][e + 2] = fmaf(high_zero, query_sum[e + 2], even[e + 2] + odd[e + 2]) * high;
                }
                value_scale[page][0] = low_half(values);
                value_scale[page][1] = high_half(values);
            } else {
#pragma unroll
                for (int step = 0; step < TILES; step++) {
                    const uint4 four = *reinterpret_cast<const uint4*>(blob + (step * 32 + lane) * 16);
                    const u32 a[4] = {four.x, four.y, four.z, four.w};
                    mma_half(step % 2 ? odd : even, a, query[step][0], query[step][1]);
                }
#pragma unroll
                for (int e = 0; e < 4; e++) s[page][e] = (even[e] + odd[e]) * factor;
            }
#if WINDOWED
            const int before = unseen - (first_page + group_page + page) * PAGE_TOKENS;
            if (before > 0) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (g + e / 2 * 8 < before) s[page][e] = LOWEST;
                }
#pragma unroll
                for (int h = 0; h < 2; h++)
                    if (g + h * 8 < before) value_scale[page][h] = 0.0f;
            }
#endif
            if (valid < PAGE_TOKENS) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    if (g + e / 2 * 8 >= valid) s[page][e] = LOWEST;
                }
#pragma unroll
                for (int h = 0; h < 2; h++)
                    if (g + h * 8 >= valid) value_scale[page][h] = 0.0f;
            }
        }

        // New maxima, seldom greater than before.
        float greatest[2] = {LOWEST, LOWEST}, scale_found = 0.0f;
#pragma unroll
        for (int page = 0; page < GROUP; page++) {
#pragma unroll
            for (int e = 0; e < COLUMNS; e++) greatest[e] = fmaxf(greatest[e], fmaxf(s[page][e], s[page][e + 2]));
            if (QUANTIZED) scale_found = fmaxf(scale_found, fmaxf(value_scale[page][0], value_scale[page][1]));
        }
        bool grows = QUANTIZED && (__float_as_uint(scale_found) & 0x7f800000u) > largest;
#pragma unroll
        for (int e = 0; e < COLUMNS; e++) grows = grows || greatest[e] > maximum[e];
        if (__any_sync(0xffffffffu, grows)) {
            u32 power = __float_as_uint(scale_found) & 0x7f800000u;
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                if (QUANTIZED) power = max(power, __shfl_xor_sync(0xffffffffu, power, lanes));
#pragma unroll
                for (int e = 0; e < COLUMNS; e++) greatest[e] = fmaxf(greatest[e], __shfl_xor_sync(0xffffffffu, greatest[e], lanes));
            }
            power = max(power, largest);
            // 2^(old - new), exact.
            const float lowered = QUANTIZED ? __uint_as_float(largest + (127u << 23) - power) : 1.0f;
            largest = power;
#pragma unroll
            for (int e = 0; e < COLUMNS; e++) {
                const float now = fmaxf(maximum[e], greatest[e]), shrink = power_of_two(maximum[e] - now);
                maximum[e] = now;
                sum[e] *= shrink;
                const float both = shrink * lowered;
#pragma unroll
                for (int j = 0; j < TILES; j++) {
                    o[j][e] *= both;
                    o[j][e + 2] *= both;
                }
                zeros[e] *= both;
                zeros[e + 2] *= both;
            }
        }

        const float lift = __uint_as_float(LIFT - largest);
#pragma unroll
        for (int page = 0; page < GROUP; page++) {
            const int valid = tokens - page * PAGE_TOKENS;
            if (valid <= 0) continue;
            const u8* blob = group_at + page * PAGE_BYTES;
            float p[4] = {};
#pragma unroll
            for (int e = 0; e < COLUMNS; e++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    p[e + 2 * h] = power_of_two(s[page][e + 2 * h] - maximum[e]);
                    sum[e] += p[e + 2 * h];
                    p[e + 2 * h] *= QUANTIZED ? value_scale[page][h] * lift : 16384.0f;
                }
            }
            const u32 b0 = transposed(pack_half2(p[0], p[1])), b1 = transposed(pack_half2(p[2], p[3]));
            u32 low_mask = 0xffffffffu, high_mask = 0xffffffffu;
            if (valid < PAGE_TOKENS) {
                low_mask = pair_mask(2 * t, valid);
                high_mask = pair_mask(2 * t + 8, valid);
            }
            if (QUANTIZED) {
                u32 words[LANE_WORDS];
                load_words(words, blob + SIDE_BYTES, lane);
                const uint2 own = *reinterpret_cast<const uint2*>(blob + 2 * SIDE_BYTES + 96 + 8 * t);
                const u32 pairs[4] = {own.x & low_mask, own.x & low_mask, own.y & high_mask, own.y & high_mask};
                mma_half(zeros, pairs, b0, b1);
#pragma unroll
                for (int j = 0; j < TILES; j++) {
                    u32 a[4];
                    unpack_tile(a, words, j);
                    mma_half(o[j], a, b0, b1);
                }
            } else {
#pragma unroll
                for (int j = 0; j < TILES; j++) {
                    const uint4 four = *reinterpret_cast<const uint4*>(blob + SIDE_BYTES + (j * 32 + lane) * 16);
                    const u32 a[4] = {four.x & low_mask, four.y & low_mask, four.z & high_mask, four.w & high_mask};
                    mma_half(o[j], a, b0, b1);
                }
            }
        }
        // All lanes have read the stage.
        __syncwarp();
        if (i + stages < own_groups) start_copy(i + stages, stage);
        if (++stage == stages) stage = 0, phase ^= 1;
    }

    // The warp's part, in the stages' memory: every copy has arrived, and every warp has read its own.
    __syncthreads();
    float* rows = reinterpret_cast<float*>(memory);
    const float lowered = QUANTIZED ? __uint_as_float(largest - (14u << 23)) : 1.0f / 16384.0f;
#pragma unroll
    for (int e = 0; e < COLUMNS; e++) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], lanes);
        if (2 * t + e >= TILE_HEADS) continue;
        float* row = rows + (warp * TILE_HEADS + 2 * t + e) * PART_PITCH;
#pragma unroll
        for (int j = 0; j < TILES; j++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const float value = QUANTIZED ? fmaf(o[j][e + 2 * h], h ? 16777216.0f / ODD_REGISTERS : 16777216.0f, -zeros[e]) : o[j][e + 2 * h];
                row[j * 16 + h * 8 + g] = value * lowered;
            }
        }
        if (g == 0) {
            row[HEAD_DIM] = maximum[e];
            row[HEAD_DIM + 1] = sum[e];
        }
    }
    __syncthreads();

    // The block's part of a head, from its warps'.
    auto own_part = [&](float (&x)[HELD], float& most, int head) {
        return join<WARPS>(x, most, [&](int part) { return rows + (part * TILE_HEADS + head) * PART_PITCH; }, head < head_count ? WARPS : 0);
    };
    const int slot = int(threadIdx.x) / HEAD_LANES;
    int joined = WARPS;
    const int splits = (pages - skipped + split_pages - 1) / split_pages;
    if (splits > 1) {
        const long long unit = (long long)sequence * gridDim.y + blockIdx.y;
        float* shared_parts = parts + unit * gridDim.x * (TILE_HEADS * PART_PITCH);
#pragma unroll 1
        for (int base = 0; base < head_count; base += SLOTS) {
            float x[HELD], most;
            const float all = own_part(x, most, base + slot);
            if (base + slot < head_count) keep(x, most, all, shared_parts + (split * TILE_HEADS + base + slot) * PART_PITCH);
        }
        __shared__ u32 before;
        __syncthreads();
        // Releases what the block has written, and acquires what the others have.
        if (threadIdx.x == 0) {
            before = count_in(finished + unit);
            if (before == u32(splits - 1)) finished[unit] = 0;
        }
        __syncthreads();
        if (before != u32(splits - 1)) return;
        // Each head's splits go to as many warps as there are for it, one after another; a lane has four channels.
        joined = max(WARPS / head_count, 1);
#pragma unroll 1
        for (int head = warp % head_count, slice = warp / head_count; slice < joined && head < head_count; head += WARPS) {
            const float* from = shared_parts + head * PART_PITCH;
            float x[4] = {}, most = LOWEST, all = 0.0f;
            constexpr int TOGETHER = 8;
#pragma unroll 1
            for (int first_part = slice; first_part < splits; first_part += TOGETHER * joined) {
                float4 values[TOGETHER], ends[TOGETHER];
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    ends[i] = make_float4(LOWEST, 0.0f, 0.0f, 0.0f), values[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (first_part + i * joined >= splits) continue;
                    const float4* row = reinterpret_cast<const float4*>(from + (first_part + i * joined) * (TILE_HEADS * PART_PITCH));
                    ends[i] = load_coherent(row + HEAD_DIM / 4);
                    values[i] = load_coherent(row + min(lane, HEAD_DIM / 4 - 1));
                }
                float now = most;
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) now = fmaxf(now, ends[i].x);
                const float shrink = power_of_two(most - now);
                most = now;
                all *= shrink;
#pragma unroll
                for (int e = 0; e < 4; e++) x[e] *= shrink;
#pragma unroll
                for (int i = 0; i < TOGETHER; i++) {
                    const float weight = power_of_two(ends[i].x - now);
                    all = fmaf(weight, ends[i].y, all);
                    x[0] = fmaf(weight, values[i].x, x[0]);
                    x[1] = fmaf(weight, values[i].y, x[1]);
                    x[2] = fmaf(weight, values[i].z, x[2]);
                    x[3] = fmaf(weight, values[i].w, x[3]);
                }
            }
            float* row = rows + (slice * TILE_HEADS + head) * PART_PITCH;
            if (lane < HEAD_DIM / 4) *reinterpret_cast<float4*>(row + lane * 4) = make_float4(x[0], x[1], x[2], x[3]);
            if (lane == 0) {
                row[HEAD_DIM] = most;
                row[HEAD_DIM + 1] = all;
            }
        }
        __syncthreads();
    }

#pragma unroll 1
    for (int base = 0; base + warp * 32 / HEAD_LANES < head_count; base += SLOTS) {
        const int head = base + slot;
        const bool there = head < head_count;
        float x[HELD], most;
        const float all = join<WARPS>(x, most, [&](int part) { return rows + (part * TILE_HEADS + head) * PART_PITCH; }, there ? joined : 0);
        const float inverse = all == 0.0f ? 0.0f : __fdiv_rn(1.0f, all);
#pragma unroll
        for (int i = 0; i < HELD; i++) x[i] *= inverse;
        if (ROTATED) transform(x);
        half* to = out + ((long long)sequence * heads + first_head + head) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (there && channel_of(i) < HEAD_DIM) to[channel_of(i)] = to_half(x[i]);
    }
}

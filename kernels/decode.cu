// Attention of one new token of each sequence over the pages of the cache (pages.cuh).
//
// HEAD_DIM  channels of a head, a multiple of 16 up to 128
// KV_BITS   less than 16: pages of codes; 16: of f16
// ROTATED   1: keys and values come in the basis of a Hadamard transform: queries enter it, outputs leave it
// SINGLE    1: a key and value head serves one query head
//
// decode_attention: DECODE_THREADS threads, grid (splits, kv_heads * head tiles, sequences), DECODE_SHARED bytes of
// dynamic shared memory. A head tile is up to TILE_HEADS query heads of a key and value head.
//
//     a sequence's pages  | split 0                 | split 1                 | ...          a block each
//     a split's pages     | 0 0 | 1 1 | 2 2 | .. | 7 7 | 0 0 | 1 1 | ..                      GROUP pages in turn to its warps
//
// Each warp copies its own pages, STAGES groups of them in flight, and holds its own running maximum, sums and
// outputs; nothing waits for another warp until the end. Tokens are the rows of the matrix instruction and query
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

#ifndef WARPS
#define WARPS 8
#endif
#define DECODE_THREADS (WARPS * 32)
#ifndef GROUP
#define GROUP (KV_BITS < 16 ? 2 : 1)
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef RESIDENT
#define RESIDENT (KV_BITS < 16 ? 2 : 1)
#endif
#define TILE_HEADS (SINGLE ? 1 : 8)
#define STAGE_BYTES (GROUP * PAGE_BYTES)
/// Floats from row to row of outputs: behind a head's come its maximum and its sum. Lanes that write 8 channels of 8
/// heads meet 32 banks.
#define PART_PITCH (HEAD_DIM + 4)
#define PART_BYTES (WARPS * TILE_HEADS * PART_PITCH * 4)
#define DECODE_SHARED (WARPS * STAGES * STAGE_BYTES > PART_BYTES ? WARPS * STAGES * STAGE_BYTES : PART_BYTES)
/// Values from row to row of queries: lanes that read pairs of 8 rows meet 32 banks.
#define QUERY_PITCH (HEAD_DIM + 8)

#ifndef BULK
#if __CUDA_ARCH__ >= 900
#define BULK 1
#else
#define BULK 0
#endif
#endif

static constexpr float LOWEST = -1e30f;

static __device__ __forceinline__ float power_of_two(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

/// An 8 x 8 matrix of 16-bit values, a row of which four lanes hold, transposed.
static __device__ __forceinline__ u32 transposed(u32 x) {
    u32 value;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(value) : "r"(x));
    return value;
}

/// 1 where a token of a pair is below `count`, as a mask of f16.
static __device__ __forceinline__ u32 pair_mask(int token, int count) {
    return (token < count ? 0xffffu : 0) | (token + 1 < count ? 0xffff0000u : 0);
}

#if BULK
static __device__ __forceinline__ void barrier_init(u32 barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
static __device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(barrier),
                 "r"(phase)
                 : "memory");
}
static __device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
#endif

/// A value that another block wrote.
static __device__ __forceinline__ float4 load_shared_result(const float4* from) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from));
    return x;
}

/// A lane's words of all tiles of keys or values: four tiles a load, the rest two or one.
static __device__ __forceinline__ void load_words(u32 (&words)[TILES], const unsigned char* side, int lane) {
    const u32* from = reinterpret_cast<const u32*>(side);
#pragma unroll
    for (int first = 0; first < TILES; first += 4) {
        const int width = TILES - first < 4 ? TILES - first : 4;
        const u32* at = from + first * 32 + lane * width;
        if (width == 4) {
            uint4 four = *reinterpret_cast<const uint4*>(at);
            words[first] = four.x, words[first + 1] = four.y, words[first + 2] = four.z, words[first + 3] = four.w;
        } else {
#pragma unroll
            for (int i = 0; i < width; i++) words[first + i] = at[i];
        }
    }
}

/// Register fragments of a tile of codes, each times 2^-24, of registers 1 and 3 times 2^-20.
static __device__ __forceinline__ void spread(u32 (&a)[4], u32 word) {
    const u32 upper = word >> 8;
    a[0] = word & 0x000f000f, a[1] = word & 0x00f000f0, a[2] = upper & 0x000f000f, a[3] = upper & 0x00f000f0;
}

/// What a warp, or a block, has of a tile of heads: rows of PART_PITCH floats, of which this puts together `parts`
/// that lie `stride` floats apart, for the head and the channels that the lane holds. Returns the sum, and sets
/// the maximum.
static __device__ __forceinline__ float join(float (&x)[HELD], float& maximum, const float* from, int stride, int parts, bool there) {
    maximum = LOWEST;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) x[i] = 0.0f;
    if (!there) return sum;
    for (int part = 0; part < parts; part++) maximum = fmaxf(maximum, from[part * stride + HEAD_DIM]);
    for (int part = 0; part < parts; part++) {
        const float* own = from + part * stride;
        const float weight = power_of_two(own[HEAD_DIM] - maximum);
        sum = fmaf(weight, own[HEAD_DIM + 1], sum);
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (channel_of(i) < HEAD_DIM) x[i] = fmaf(weight, own[channel_of(i)], x[i]);
    }
    return sum;
}

/// q: a row of `query_stride` values for each sequence, heads before the rotary embedding, its last token's; cos and
/// sin: [positions, HEAD_DIM / 2]; pool: [pages, kv_heads, PAGE_BYTES]; table: [sequences, table_stride], the pages of each
/// sequence; lengths: [sequences], tokens with the last one; out: [sequences, heads * HEAD_DIM]. A split has
/// `split_pages` pages. parts: [sequences, gridDim.y, splits, TILE_HEADS, PART_PITCH], finished: [sequences, gridDim.y],
/// zero before and after, neither of them used where there is one split. Scores are multiplied by `scale`.
extern "C" __global__ void __launch_bounds__(DECODE_THREADS, RESIDENT)
    decode_attention(const half* q, long long query_stride, const float* cos, const float* sin, const unsigned char* pool, const int* table,
                     int table_stride, const int* lengths, half* out, float* parts, u32* finished, int heads, int kv_heads,
                     int split_pages, float scale) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ __align__(16) half queries[8 * QUERY_PITCH];
    __shared__ bool last;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int sequence = blockIdx.z, split = blockIdx.x, tiles = int(gridDim.y) / kv_heads;
    const int kv_head = int(blockIdx.y) / tiles, tile = int(blockIdx.y) % tiles, group = heads / kv_heads;
    const int first_head = kv_head * group + tile * TILE_HEADS, head_count = min(group - tile * TILE_HEADS, TILE_HEADS);
    const int length = lengths[sequence], pages = (length + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const int first_page = split * split_pages, own_pages = min(pages - first_page, split_pages);
    // An empty sequence has outputs too.
    if (own_pages <= 0 && split > 0) return;

    // The warp's pages, counted on their own: GROUP in turn.
    const int groups = (own_pages + GROUP - 1) / GROUP, own_groups = (groups - warp + WARPS - 1) / WARPS;
    const int* own_table = table + (long long)sequence * table_stride + first_page;
    auto page_number = [&](int i) {
        const int page = (i / GROUP * WARPS + warp) * GROUP + i % GROUP;
        return page < own_pages ? own_table[page] : 0;
    };
    // Of 32 pages at a time, a lane each, and of the next 32, so that nothing waits for the table.
    int numbers = page_number(lane), next_numbers = page_number(lane + 32);
    const u32 stages = shared_address(memory) + warp * STAGES * STAGE_BYTES;
#if BULK
    __shared__ u64 arrivals[WARPS * STAGES];
    const u32 arrived = shared_address(arrivals + warp * STAGES);
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; i++) barrier_init(arrived + 8 * i);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
#endif
    auto start_copy = [&](int i) {
        if (i > 0 && i * GROUP % 32 == 0) {
            numbers = next_numbers;
            next_numbers = page_number(i * GROUP + 32 + lane);
        }
        const int stage = i % STAGES, count = min(own_pages - (i * WARPS + warp) * GROUP, GROUP);
        const u32 to = stages + stage * STAGE_BYTES;
#if BULK
        const int number = __shfl_sync(0xffffffffu, numbers, (i * GROUP + lane % GROUP) % 32);
        if (lane == 0) barrier_expect(arrived + 8 * stage, count * PAGE_BYTES);
        __syncwarp();
        if (lane < count) copy_bulk(to + lane * PAGE_BYTES, pool + ((long long)number * kv_heads + kv_head) * PAGE_BYTES, PAGE_BYTES, arrived + 8 * stage);
#else
        for (int page = 0; page < count; page++) {
            const int number = __shfl_sync(0xffffffffu, numbers, (i * GROUP + page) % 32);
            const unsigned char* from = pool + ((long long)number * kv_heads + kv_head) * PAGE_BYTES;
#pragma unroll
            for (int at = lane * 16; at < PAGE_BYTES; at += 512) copy16(to + page * PAGE_BYTES + at, from + at, true);
        }
#endif
    };
#pragma unroll
    for (int i = 0; i < STAGES; i++) {
        if (i < own_groups) start_copy(i);
#if !BULK
        copy_commit();
#endif
    }

    // Queries, while the first pages are on their way. Columns without a head are zeros.
    for (int i = threadIdx.x; i < 8 * QUERY_PITCH / 2; i += DECODE_THREADS) reinterpret_cast<u32*>(queries)[i] = 0;
    __syncthreads();
    {
#if QUADS
        float* exchange = nullptr;
#else
        __shared__ float exchanges[WARPS][HEAD_DIM];
        float* exchange = exchanges[warp];
#endif
        const long long angle = (long long)max(length - 1, 0) * (HEAD_DIM / 2);
#pragma unroll 1
        for (int base = 0; base < head_count * HEAD_LANES; base += DECODE_THREADS) {
            if ((base + warp * 32) / HEAD_LANES >= head_count) break;
            const int head = (base + int(threadIdx.x)) / HEAD_LANES;
            const bool there = head < head_count;
            float x[HELD];
            load_head(x, q + sequence * query_stride + (first_head + head) * HEAD_DIM, there);
            embed_by(x, cos + angle, sin + angle, exchange);
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
        for (int i = 0; i < 4; i++) query_sum[i] *= i < 2 ? -1.0f / 16777216.0f : -1.0f / 1048576.0f;
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

#pragma unroll 1
    for (int i = 0; i < own_groups; i++) {
#if BULK
        barrier_wait(arrived + 8 * (i % STAGES), i / STAGES % 2);
#else
        copy_wait<STAGES - 1>();
        __syncwarp();
#endif
        const unsigned char* group_at = memory + (warp * STAGES + i % STAGES) * STAGE_BYTES;
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
            const unsigned char* blob = group_at + page * PAGE_BYTES;
            // Two chains of sums, since each product waits for the one before it.
            float even[4] = {}, odd[4] = {};
            if (QUANTIZED) {
                u32 words[TILES];
                load_words(words, blob, lane);
#pragma unroll
                for (int step = 0; step < TILES; step++) {
                    u32 a[4];
                    spread(a, words[step]);
                    mma_half(step % 2 ? odd : even, a, query[step][0], query[step][1]);
                }
                const uint2 keys = *reinterpret_cast<const uint2*>(blob + 2 * SIDE_BYTES + 8 * g);
                const u32 values = *reinterpret_cast<const u32*>(blob + 2 * SIDE_BYTES + 64 + 4 * g);
                const float low = low_half(keys.x) * factor, high = low_half(keys.y) * (factor * 0.0625f);
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
            const unsigned char* blob = group_at + page * PAGE_BYTES;
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
                u32 words[TILES];
                load_words(words, blob + SIDE_BYTES, lane);
                const uint2 own = *reinterpret_cast<const uint2*>(blob + 2 * SIDE_BYTES + 96 + 8 * t);
                const u32 pairs[4] = {own.x & low_mask, own.x & low_mask, own.y & high_mask, own.y & high_mask};
                mma_half(zeros, pairs, b0, b1);
#pragma unroll
                for (int j = 0; j < TILES; j++) {
                    u32 a[4];
                    spread(a, words[j]);
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
        if (i + STAGES < own_groups) start_copy(i + STAGES);
#if !BULK
        copy_commit();
#endif
    }

    // The warp's part, in the stages' place: every copy has arrived, and every warp has read its own.
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
                const float value = QUANTIZED ? fmaf(o[j][e + 2 * h], h ? 1048576.0f : 16777216.0f, -zeros[e]) : o[j][e + 2 * h];
                row[j * 16 + h * 8 + g] = value * lowered;
            }
        }
        if (g == 0) {
            row[HEAD_DIM] = maximum[e];
            row[HEAD_DIM + 1] = sum[e];
        }
    }
    __syncthreads();

    const int splits = max((pages + split_pages - 1) / split_pages, 1);
    const long long unit = (long long)sequence * gridDim.y + blockIdx.y;
    float* shared_parts = parts + unit * gridDim.x * (TILE_HEADS * PART_PITCH);
    if (splits > 1) {
#pragma unroll 1
        for (int base = 0; base < head_count * HEAD_LANES; base += DECODE_THREADS) {
            const int head = (base + int(threadIdx.x)) / HEAD_LANES;
            const bool there = head < head_count;
            float x[HELD], most;
            const float all = join(x, most, rows + head * PART_PITCH, TILE_HEADS * PART_PITCH, WARPS, there);
            if (!there) continue;
            float* to = shared_parts + (split * TILE_HEADS + head) * PART_PITCH;
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (channel_of(i) < HEAD_DIM) to[channel_of(i)] = x[i];
            if (threadIdx.x % HEAD_LANES == 0) {
                to[HEAD_DIM] = most;
                to[HEAD_DIM + 1] = all;
            }
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(finished + unit, 1u) == u32(splits - 1);
            if (last) finished[unit] = 0;
        }
        __syncthreads();
        if (!last) return;
        __threadfence();
        // A warp takes every WARPS-th split, four channels a lane and all heads at once.
        float x[TILE_HEADS][4], most[TILE_HEADS], all[TILE_HEADS];
#pragma unroll
        for (int head = 0; head < TILE_HEADS; head++) {
            most[head] = LOWEST, all[head] = 0.0f;
            x[head][0] = x[head][1] = x[head][2] = x[head][3] = 0.0f;
        }
        for (int part = warp; part < splits; part += WARPS) {
            float4 values[TILE_HEADS], ends[TILE_HEADS];
#pragma unroll
            for (int head = 0; head < TILE_HEADS; head++) {
                if (head >= head_count) continue;
                const float4* row = reinterpret_cast<const float4*>(shared_parts + (part * TILE_HEADS + head) * PART_PITCH);
                ends[head] = load_shared_result(row + HEAD_DIM / 4);
                values[head] = load_shared_result(row + min(lane, HEAD_DIM / 4 - 1));
            }
#pragma unroll
            for (int head = 0; head < TILE_HEADS; head++) {
                if (head >= head_count) continue;
                const float now = fmaxf(most[head], ends[head].x);
                const float before = power_of_two(most[head] - now), weight = power_of_two(ends[head].x - now);
                most[head] = now;
                all[head] = fmaf(weight, ends[head].y, all[head] * before);
                x[head][0] = fmaf(weight, values[head].x, x[head][0] * before);
                x[head][1] = fmaf(weight, values[head].y, x[head][1] * before);
                x[head][2] = fmaf(weight, values[head].z, x[head][2] * before);
                x[head][3] = fmaf(weight, values[head].w, x[head][3] * before);
            }
        }
#pragma unroll
        for (int head = 0; head < TILE_HEADS; head++) {
            if (head >= head_count) continue;
            float* row = rows + (warp * TILE_HEADS + head) * PART_PITCH;
            if (lane < HEAD_DIM / 4) *reinterpret_cast<float4*>(row + lane * 4) = make_float4(x[head][0], x[head][1], x[head][2], x[head][3]);
            if (lane == 0) {
                row[HEAD_DIM] = most[head];
                row[HEAD_DIM + 1] = all[head];
            }
        }
        __syncthreads();
    }

#pragma unroll 1
    for (int base = 0; base < head_count * HEAD_LANES; base += DECODE_THREADS) {
        if ((base + warp * 32) / HEAD_LANES >= head_count) break;
        const int head = (base + int(threadIdx.x)) / HEAD_LANES;
        const bool there = head < head_count;
        float x[HELD], most;
        const float all = join(x, most, rows + head * PART_PITCH, TILE_HEADS * PART_PITCH, WARPS, there);
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

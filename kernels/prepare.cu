// Queries, keys and values as the products of attention see them: rotary embedding, the basis that heads are
// quantized in, what the cache returns.
//
// Heads lie in registers as heads.cuh says. With QUADS, several heads of a token are loaded together, for enough
// bytes in flight, and share the cosines and sines.
//
// HEAD_DIM    channels of a head, even, 2 to 256
// KV_BITS     2 to 8, or 16: nothing is quantized
// ROTATED     1: heads are quantized in the basis of a Hadamard transform
// QUAD_HEADS  heads of a token that the same lanes take, with QUADS
// AFTER_ROPE  1: keys are quantized after the rotary embedding, 0: before it
//
// prepare_queries, prepare_keys, prepare_values: THREADS threads, no dynamic shared memory. With
// QUADS, HEAD_LANES lanes for each token and QUAD_HEADS heads of it, so ceil(tokens * ceil(heads /
// QUAD_HEADS) / (THREADS / HEAD_LANES)) blocks; else a warp for each token and head, so
// ceil(tokens * heads / (THREADS / 32)) blocks.

#if !defined(AFTER_ROPE) || !defined(THREADS) || !defined(QUAD_HEADS)
#error "a constant is missing: src/backend/cuda/kernels/prepare.rs declares them"
#endif

enum class Role { Query, Key, Value };

#if QUADS

template <Role ROLE>
static __device__ __forceinline__ void prepare(const half* x, long long row_stride, const float* cos, const float* sin, half* out,
                                               int tokens, int heads, int seq_len, float clip, const float* mean) {
    constexpr int HALF = HEAD_DIM / 2;
    u32 tiles = (heads + QUAD_HEADS - 1) / QUAD_HEADS;
    u32 task = blockIdx.x * (THREADS / HEAD_LANES) + threadIdx.x / HEAD_LANES;
    int token = int(task / tiles), first = int(task % tiles) * QUAD_HEADS, at = int(threadIdx.x % HEAD_LANES) * 4;
    // Keys that are quantized before the rotary embedding go through two transforms.
    constexpr bool SPREAD = SPREADS && (ROLE == Role::Value || AFTER_ROPE);
    // Lanes with nothing to do go along, since the others' shuffles name all lanes.
    bool there = token < tokens && at < HALF;
    int window = token / seq_len, position = token % seq_len;
    x += token * row_stride + (long long)first * HEAD_DIM + at;
    out += (((long long)window * heads + first) * seq_len + position) * PADDED_HEAD;

    uint2 packed[QUAD_HEADS][2];
#pragma unroll
    for (int i = 0; i < QUAD_HEADS; i++) {
        packed[i][0] = packed[i][1] = make_uint2(0, 0);
        if (there && first + i < heads) {
            packed[i][0] = *reinterpret_cast<const uint2*>(x + i * HEAD_DIM);
            packed[i][1] = *reinterpret_cast<const uint2*>(x + i * HEAD_DIM + HALF);
        }
    }
    float c[4] = {}, s[4] = {};
    if (ROLE != Role::Value && there) {
        float4 cosines = *reinterpret_cast<const float4*>(cos + (long long)position * HALF + at);
        float4 sines = *reinterpret_cast<const float4*>(sin + (long long)position * HALF + at);
        c[0] = cosines.x, c[1] = cosines.y, c[2] = cosines.z, c[3] = cosines.w;
        s[0] = sines.x, s[1] = sines.y, s[2] = sines.z, s[3] = sines.w;
    }
#pragma unroll
    for (int i = 0; i < QUAD_HEADS; i++) {
        float values[HELD];
#pragma unroll
        for (int side = 0; side < 2; side++) {
            values[4 * side] = low_half(packed[i][side].x);
            values[4 * side + 1] = high_half(packed[i][side].x);
            values[4 * side + 2] = low_half(packed[i][side].y);
            values[4 * side + 3] = high_half(packed[i][side].y);
        }
        if (ROLE == Role::Query || (ROLE == Role::Key && AFTER_ROPE)) embed(values, c, s);
        if (ROLE == Role::Key && AFTER_ROPE && mean && there && first + i < heads) {
            const float* own = mean + (long long)(first + i) * HEAD_DIM + at;
#pragma unroll
            for (int j = 0; j < HELD; j++) values[j] -= own[j / 4 * HALF + j % 4];
        }
        half* to = out + (long long)i * seq_len * PADDED_HEAD;
        const bool stored = there && first + i < heads;
#if SPREADS
        if constexpr (SPREAD) {
            transform_spread(values);
            if (ROLE != Role::Query) quick_round_trip(values, clip);
#pragma unroll
            for (int u = 0; u < HELD / 2; u++)
                if (stored) *reinterpret_cast<u32*>(to + spread_channel(u)) = pack_half2(values[2 * u], values[2 * u + 1]);
            continue;
        }
#endif
        if (ROTATED && (ROLE != Role::Query || AFTER_ROPE)) transform(values);
        if (ROLE != Role::Query && KV_BITS < 16) round_trip(values, clip);
        if (ROLE == Role::Key && !AFTER_ROPE) {
            if (ROTATED) transform(values);
            embed(values, c, s);
        }
        if (stored) {
#pragma unroll
            for (int side = 0; side < 2; side++)
                *reinterpret_cast<uint2*>(to + at + side * HALF) = make_uint2(pack_half2(values[4 * side], values[4 * side + 1]),
                                                                              pack_half2(values[4 * side + 2], values[4 * side + 3]));
        }
    }
}

#else

template <Role ROLE>
static __device__ __forceinline__ void prepare(const half* x, long long row_stride, const float* cos, const float* sin, half* out,
                                               int tokens, int heads, int seq_len, float clip, const float* mean) {
    __shared__ float exchange[THREADS / 32][HEAD_DIM];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long task = (long long)blockIdx.x * (THREADS / 32) + warp;
    if (task >= (long long)tokens * heads) return;
    int token = int(task / heads), head = int(task % heads);
    int window = token / seq_len, position = token % seq_len;
    x += token * row_stride + (long long)head * HEAD_DIM;
    cos += (long long)position * (HEAD_DIM / 2);
    sin += (long long)position * (HEAD_DIM / 2);
    out += (((long long)window * heads + head) * seq_len + position) * PADDED_HEAD;

    float values[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int index = lane + 32 * i;
        values[i] = index < HEAD_DIM ? to_float(x[index]) : 0.0f;
    }
    if (ROLE == Role::Query) {
        embed(values, cos, sin, exchange[warp]);
        if (ROTATED && AFTER_ROPE) transform(values);
    } else {
        if (ROLE == Role::Key && AFTER_ROPE) embed(values, cos, sin, exchange[warp]);
        if (ROLE == Role::Key && AFTER_ROPE && mean) {
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                int index = lane + 32 * i;
                if (index < HEAD_DIM) values[i] -= mean[(long long)head * HEAD_DIM + index];
            }
        }
        if (ROTATED) transform(values);
        if (KV_BITS < 16) round_trip(values, clip);
        if (ROLE == Role::Key && !AFTER_ROPE) {
            if (ROTATED) transform(values);
            embed(values, cos, sin, exchange[warp]);
        }
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int index = lane + 32 * i;
        if (index < PADDED_HEAD) out[index] = to_half(index < HEAD_DIM ? values[i] : 0.0f);
    }
}

#endif

/// x: tokens of `heads` heads, `row_stride` values from token to token, with QUADS a multiple of four;
/// cos and sin: [seq_len, HEAD_DIM / 2]; out: [tokens / seq_len, heads, seq_len, PADDED_HEAD]. Queries as the
/// products see them.
extern "C" __global__ void __launch_bounds__(THREADS)
    prepare_queries(const half* x, long long row_stride, const float* cos, const float* sin, half* out, int tokens, int heads,
                    int seq_len, float clip, const float* mean) {
    pdl_wait();
    prepare<Role::Query>(x, row_stride, cos, sin, out, tokens, heads, seq_len, clip, mean);
}

/// As prepare_queries, for keys as the cache returns them; `mean` [heads, HEAD_DIM], if not null, is subtracted
/// from the embedded keys first (with AFTER_ROPE).
extern "C" __global__ void __launch_bounds__(THREADS)
    prepare_keys(const half* x, long long row_stride, const float* cos, const float* sin, half* out, int tokens, int heads,
                 int seq_len, float clip, const float* mean) {
    pdl_wait();
    prepare<Role::Key>(x, row_stride, cos, sin, out, tokens, heads, seq_len, clip, mean);
}

/// As prepare_queries, for values as the cache returns them, still rotated; cos and sin are unused.
extern "C" __global__ void __launch_bounds__(THREADS)
    prepare_values(const half* x, long long row_stride, const float* cos, const float* sin, half* out, int tokens, int heads,
                   int seq_len, float clip, const float* mean) {
    pdl_wait();
    prepare<Role::Value>(x, row_stride, cos, sin, out, tokens, heads, seq_len, clip, mean);
}

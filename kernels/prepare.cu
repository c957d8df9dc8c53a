// Queries, keys and values as the products of attention see them: rotary embedding, the basis that heads are
// quantized in, what the cache gives back.
//
// Two ways. Where heads are whole quads of values in either half (and, if they are transformed, powers
// of two), a lane holds the same quad of both halves: the rotary embedding needs no other lane, two
// bytes become eight an access, and a head of 128 takes half a warp, so that shuffles and whatever is
// computed once a head serve two. Several heads of a token are loaded at once, for enough bytes in
// flight, and share the cosines and sines. Any other shape goes a warp a head, a value a lane.
//
// HEAD_DIM    channels of a head, even, 2 to 256
// KV_BITS     2 to 8, or 16: nothing is quantized
// ROTATED     1: heads are quantized in the basis of a Hadamard transform
// AFTER_ROPE  1: keys are quantized after the rotary embedding, 0: before it
//
// prepare_queries, prepare_keys, prepare_values: PREPARE_THREADS threads, no dynamic shared memory. With
// QUADS, QUAD_LANES lanes for each token and QUAD_HEADS heads of it, so ceil(tokens * ceil(heads /
// QUAD_HEADS) / (PREPARE_THREADS / QUAD_LANES)) blocks; else a warp for each token and head, so
// ceil(tokens * heads / (PREPARE_THREADS / 32)) blocks.

#define PREPARE_THREADS 256

/// Whether a lane holds quads.
#define QUADS (HEAD_DIM % 16 == 0 && (!ROTATED || (HEAD_DIM & (HEAD_DIM - 1)) == 0))
/// Lanes of a head: a power of two, of which the last ones may hold nothing.
#define QUAD_LANES (HEAD_DIM <= 16 ? 2 : HEAD_DIM <= 32 ? 4 : HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32)
/// Heads of a token that the same lanes take.
#define QUAD_HEADS 4

enum class Role { Query, Key, Value };

/// The nearest integer, ties to even, of what is small; what is large, and clamped afterwards, stays
/// large.
static __device__ __forceinline__ float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

#if QUADS

/// Registers of a lane: values 4 * lane + 0..4 of the head, then as many values of its upper half.
static constexpr int HELD = 8;

/// A product with 1 or -1 is exact: one instruction adds or subtracts.
static __device__ __forceinline__ void butterfly(float (&x)[HELD], int lanes) {
    float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) x[i] = fmaf(x[i], sign, __shfl_xor_sync(0xffffffffu, x[i], lanes));
}

static __device__ __forceinline__ void butterfly_within(float (&x)[HELD], int distance) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        if (i & distance) continue;
        float left = x[i], right = x[i + distance];
        x[i] = left + right;
        x[i + distance] = left - right;
    }
}

/// Butterflies at distances 1, 2, 4, ..., HEAD_DIM / 2, then the scale.
static __device__ __forceinline__ void transform(float (&x)[HELD]) {
    butterfly_within(x, 1);
    butterfly_within(x, 2);
#pragma unroll
    for (int lanes = 1; lanes < QUAD_LANES; lanes *= 2) butterfly(x, lanes);
    butterfly_within(x, 4);
#pragma unroll
    for (int i = 0; i < HELD; i++) x[i] *= BLOCK_SCALE;
}

/// Rotary embedding with the halves of the head as pairs.
static __device__ __forceinline__ void embed(float (&x)[HELD], const float (&cos)[4], const float (&sin)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float left = x[i], right = x[i + 4];
        x[i] = left * cos[i] - right * sin[i];
        x[i + 4] = right * cos[i] + left * sin[i];
    }
}

/// Clamps to 0..=top; a NaN stays one. What is clamped is never -0.
static __device__ __forceinline__ float clamp(float x, float top) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(0.0f));
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(top));
    return x;
}

/// What the cache gives back for a head: codes of KV_BITS bits on a grid with an f16 step and a zero
/// point.
static __device__ __forceinline__ void round_trip(float (&x)[HELD], float clip) {
    constexpr float TOP = (1 << (KV_BITS % 16)) - 1;
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        // A NaN is passed over here and shows in its own code.
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
#pragma unroll
    for (int lanes = QUAD_LANES / 2; lanes > 0; lanes /= 2) {
        low = fminf(low, __shfl_xor_sync(0xffffffffu, low, lanes));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, lanes));
    }
    low *= clip;
    high *= clip;
    float scale = to_float(to_half(__fdiv_rn(high - low, TOP)));
    float inverse = scale == 0.0f ? 0.0f : __frcp_rn(scale);
    float zero = clamp(nearest(-low * inverse), TOP);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float code = clamp(nearest(x[i] * inverse) + zero, TOP);
        x[i] = (code - zero) * scale;
    }
}

template <Role ROLE>
static __device__ __forceinline__ void prepare(const half* x, long long row_stride, const float* cos, const float* sin, half* out,
                                               int tokens, int heads, int seq_len, float clip, const float* mean) {
    constexpr int HALF = HEAD_DIM / 2;
    u32 tiles = (heads + QUAD_HEADS - 1) / QUAD_HEADS;
    u32 task = blockIdx.x * (PREPARE_THREADS / QUAD_LANES) + threadIdx.x / QUAD_LANES;
    int token = int(task / tiles), first = int(task % tiles) * QUAD_HEADS, at = int(threadIdx.x % QUAD_LANES) * 4;
    // Lanes with nothing to do go along, since the others' shuffles name all lanes.
    bool there = token < tokens && at < HALF;
    int window = token / seq_len, position = token % seq_len;
    x += token * row_stride + (long long)first * HEAD_DIM + at;
    out += (((long long)window * heads + first) * seq_len + position) * DP + at;

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
        if (ROLE == Role::Query) {
            embed(values, c, s);
            if (ROTATED && AFTER_ROPE) transform(values);
        } else {
            if (ROLE == Role::Key && AFTER_ROPE) embed(values, c, s);
            if (ROLE == Role::Key && AFTER_ROPE && mean && there && first + i < heads) {
                const float* own = mean + (long long)(first + i) * HEAD_DIM + at;
#pragma unroll
                for (int j = 0; j < HELD; j++) values[j] -= own[j / 4 * HALF + j % 4];
            }
            if (ROTATED) transform(values);
            if (KV_BITS < 16) round_trip(values, clip);
            if (ROLE == Role::Key && !AFTER_ROPE) {
                if (ROTATED) transform(values);
                embed(values, c, s);
            }
        }
        if (there && first + i < heads) {
            half* to = out + (long long)i * seq_len * DP;
#pragma unroll
            for (int side = 0; side < 2; side++)
                *reinterpret_cast<uint2*>(to + side * HALF) = make_uint2(pack_half2(values[4 * side], values[4 * side + 1]),
                                                                         pack_half2(values[4 * side + 2], values[4 * side + 3]));
        }
    }
}

#else

/// Registers of a lane: value i of a head is in lane i % 32, register i / 32.
static constexpr int HELD = (HEAD_DIM + 31) / 32;

/// Butterflies at distances 1, 2, 4, ... within blocks of BLOCK values, then the scale. Blocks divide
/// the head, so what lies beyond it in the last register never meets a value.
static __device__ __forceinline__ void transform(float (&x)[HELD], int lane) {
#pragma unroll
    for (int distance = 1; distance < BLOCK && distance < 32; distance *= 2) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            float other = __shfl_xor_sync(0xffffffffu, x[i], distance);
            x[i] = lane & distance ? other - x[i] : x[i] + other;
        }
    }
#pragma unroll
    for (int step = 1; step < BLOCK / 32; step *= 2) {
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if ((i & step) == 0) {
                float left = x[i], right = x[(i + step) % HELD];
                x[i] = left + right;
                x[(i + step) % HELD] = left - right;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) x[i] *= BLOCK_SCALE;
}

/// Rotary embedding with the halves of the head as pairs.
static __device__ __forceinline__ void embed(float (&x)[HELD], int lane, const float* cos, const float* sin, float* exchange) {
    constexpr int HALF = HEAD_DIM / 2;
    float partners[HELD];
    if (HALF % 32 == 0) {
#pragma unroll
        for (int i = 0; i < HELD; i++) partners[i] = x[(i + HALF / 32) % HELD];
    } else {
        // The pair lies in another lane, at a distance that need not be a power of two.
        __syncwarp();
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (lane + 32 * i < HEAD_DIM) exchange[lane + 32 * i] = x[i];
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            int index = lane + 32 * i;
            partners[i] = index < HEAD_DIM ? exchange[index < HALF ? index + HALF : index - HALF] : 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int index = lane + 32 * i;
        if (index < HEAD_DIM) {
            bool left = index < HALF;
            float c = cos[left ? index : index - HALF], s = sin[left ? index : index - HALF];
            // left: left cos - right sin; right: right cos + left sin.
            float own = x[i] * c, other = partners[i] * s;
            x[i] = left ? own - other : own + other;
        }
    }
}

/// Clamps to 0..=top. Comparisons and not fmaxf, so that a NaN stays one.
static __device__ __forceinline__ float clamp(float x, float top) {
    x = x < 0.0f ? 0.0f : x;
    return x > top ? top : x;
}

/// What the cache gives back for a head: codes of KV_BITS bits on a grid with an f16 step and a zero
/// point.
static __device__ __forceinline__ void round_trip(float (&x)[HELD], int lane, float clip) {
    constexpr float TOP = (1 << (KV_BITS % 16)) - 1;
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        // Beyond the head lie zeros, which the range contains anyway. A NaN is passed over here and
        // shows in its own code.
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        low = fminf(low, __shfl_xor_sync(0xffffffffu, low, distance));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, distance));
    }
    low *= clip;
    high *= clip;
    float scale = to_float(to_half(__fdiv_rn(high - low, TOP)));
    float inverse = scale == 0.0f ? 0.0f : __frcp_rn(scale);
    float zero = clamp(nearest(-low * inverse), TOP);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        float code = clamp(nearest(x[i] * inverse) + zero, TOP);
        x[i] = (code - zero) * scale;
    }
}

template <Role ROLE>
static __device__ __forceinline__ void prepare(const half* x, long long row_stride, const float* cos, const float* sin, half* out,
                                               int tokens, int heads, int seq_len, float clip, const float* mean) {
    __shared__ float exchange[PREPARE_THREADS / 32][HEAD_DIM];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    long long task = (long long)blockIdx.x * (PREPARE_THREADS / 32) + warp;
    if (task >= (long long)tokens * heads) return;
    int token = int(task / heads), head = int(task % heads);
    int window = token / seq_len, position = token % seq_len;
    x += token * row_stride + (long long)head * HEAD_DIM;
    cos += (long long)position * (HEAD_DIM / 2);
    sin += (long long)position * (HEAD_DIM / 2);
    out += (((long long)window * heads + head) * seq_len + position) * DP;

    float values[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int index = lane + 32 * i;
        values[i] = index < HEAD_DIM ? to_float(x[index]) : 0.0f;
    }
    if (ROLE == Role::Query) {
        embed(values, lane, cos, sin, exchange[warp]);
        if (ROTATED && AFTER_ROPE) transform(values, lane);
    } else {
        if (ROLE == Role::Key && AFTER_ROPE) embed(values, lane, cos, sin, exchange[warp]);
        if (ROLE == Role::Key && AFTER_ROPE && mean) {
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                int index = lane + 32 * i;
                if (index < HEAD_DIM) values[i] -= mean[(long long)head * HEAD_DIM + index];
            }
        }
        if (ROTATED) transform(values, lane);
        if (KV_BITS < 16) round_trip(values, lane, clip);
        if (ROLE == Role::Key && !AFTER_ROPE) {
            if (ROTATED) transform(values, lane);
            embed(values, lane, cos, sin, exchange[warp]);
        }
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int index = lane + 32 * i;
        if (index < DP) out[index] = to_half(index < HEAD_DIM ? values[i] : 0.0f);
    }
}

#endif

/// x: tokens of `heads` heads, `row_stride` values from token to token, with QUADS a multiple of four;
/// cos and sin: [seq_len, HEAD_DIM / 2]; out: [tokens / seq_len, heads, seq_len, DP]. Queries as the
/// products see them.
extern "C" __global__ void __launch_bounds__(PREPARE_THREADS)
    prepare_queries(const half* x, long long row_stride, const float* cos, const float* sin, half* out, int tokens, int heads,
                    int seq_len, float clip, const float* mean) {
    prepare<Role::Query>(x, row_stride, cos, sin, out, tokens, heads, seq_len, clip, mean);
}

/// As prepare_queries, for keys as the cache gives them back; `mean` [heads, HEAD_DIM], if not null, is taken
/// from the embedded keys first (with AFTER_ROPE).
extern "C" __global__ void __launch_bounds__(PREPARE_THREADS)
    prepare_keys(const half* x, long long row_stride, const float* cos, const float* sin, half* out, int tokens, int heads,
                 int seq_len, float clip, const float* mean) {
    prepare<Role::Key>(x, row_stride, cos, sin, out, tokens, heads, seq_len, clip, mean);
}

/// As prepare_queries, for values as the cache gives them back, still rotated; cos and sin are unused.
extern "C" __global__ void __launch_bounds__(PREPARE_THREADS)
    prepare_values(const half* x, long long row_stride, const float* cos, const float* sin, half* out, int tokens, int heads,
                   int seq_len, float clip, const float* mean) {
    prepare<Role::Value>(x, row_stride, cos, sin, out, tokens, heads, seq_len, clip, mean);
}

// Heads in registers: which lane holds which value, rotary embedding, the basis that heads are quantized in, and
// the grid of their codes. What cache, decode and prepare have in common; each file includes it after common.cuh.
//
// Two ways. Where heads are entire quads of values in either half (and, if they are transformed, powers
// of two), a lane holds the same quad of both halves: the rotary embedding needs no other lane, two
// bytes become eight an access, and a head of 128 takes half a warp, so that shuffles and whatever is
// computed once a head serve two. Any other shape goes a warp a head, a value a lane.
//
// HEAD_DIM  channels of a head, even, 2 to 256
// KV_BITS   2 to 8, or 16: nothing is quantized
// ROTATED   1: heads are quantized in the basis of a Hadamard transform
// QUADS     1: a lane holds quads
// HEAD_LANES  lanes that hold a head, a power of two, of which the last ones may hold nothing

#if !defined(HEAD_DIM) || !defined(KV_BITS) || !defined(ROTATED) || !defined(PADDED_HEAD) || !defined(QUADS) || \
    !defined(HEAD_LANES)
#error "a constant is missing: src/backend/cuda/kernels/heads.rs declares them"
#endif

/// The nearest integer, ties to even, of what is small; what is large, and clamped afterwards, stays
/// large.
static __device__ __forceinline__ float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

/// Clamps to 0..=top; a NaN stays one. What is clamped is never -0.
static __device__ __forceinline__ float clamp(float x, float top) {
    return min_or_nan(max_or_nan(x, 0.0f), top);
}

/// The grid that a head's codes lie on: an f16 step and a zero point (src/quant/kv.rs).
struct Grid {
    float scale, inverse, zero;
};

/// The least and the greatest value of a head that HEAD_LANES lanes hold, clipped; what lies beyond the head is 0, which the range contains anyway.
template <int COUNT> static __device__ __forceinline__ void range_of(const float (&x)[COUNT], float clip, float& low, float& high) {
    low = high = 0.0f;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        // A NaN is passed over here and shows in its own code.
        low = fminf(low, x[i]);
        high = fmaxf(high, x[i]);
    }
#pragma unroll
    for (int lanes = HEAD_LANES / 2; lanes > 0; lanes /= 2) {
        low = fminf(low, __shfl_xor_sync(0xffffffffu, low, lanes));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, lanes));
    }
    low *= clip;
    high *= clip;
}

/// The grid of a head that HEAD_LANES lanes hold.
template <int COUNT> static __device__ __forceinline__ Grid grid_of(const float (&x)[COUNT], float clip) {
    constexpr float TOP = (1 << (KV_BITS % 16)) - 1;
    float low, high;
    range_of(x, clip, low, high);
    Grid grid;
    grid.scale = to_float(to_half(__fdiv_rn(high - low, TOP)));
    grid.inverse = grid.scale == 0.0f ? 0.0f : __frcp_rn(grid.scale);
    grid.zero = clamp(nearest(-low * grid.inverse), TOP);
    return grid;
}

static __device__ __forceinline__ float code_of(const Grid& grid, float x) {
    constexpr float TOP = (1 << (KV_BITS % 16)) - 1;
    return clamp(nearest(x * grid.inverse) + grid.zero, TOP);
}

/// `grid_of` without a division: of every finite range the quotient by 2^n - 1, n up to 8, is the rounded one after one correction, and the reciprocal of every
/// number of f16 after one step of Newton's. A head that is not finite gets a scale that is none, like its codes.
template <int COUNT> static __device__ __forceinline__ Grid quick_grid(const float (&x)[COUNT], float clip) {
    constexpr float TOP = (1 << (KV_BITS % 16)) - 1, INVERSE = 1.0f / TOP;
    float low, high;
    range_of(x, clip, low, high);
    const float range = high - low, near = range * INVERSE;
    Grid grid;
    grid.scale = to_float(to_half(fmaf(fmaf(-TOP, near, range), INVERSE, near)));
    const float inverse = near_reciprocal(grid.scale);
    grid.inverse = grid.scale == 0.0f ? 0.0f : fmaf(fmaf(-grid.scale, inverse, 1.0f), inverse, inverse);
    grid.zero = clamp(nearest(-low * grid.inverse), TOP);
    return grid;
}

/// What the cache returns for a head: codes of KV_BITS bits on their grid.
template <int COUNT> static __device__ __forceinline__ void round_trip(float (&x)[COUNT], float clip) {
    Grid grid = grid_of(x, clip);
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = (code_of(grid, x[i]) - grid.zero) * grid.scale;
}
/// The same of `quick_grid`. The sum with 1.5 * 2^23 rounds to an integer, which is clamped without the zero point.
template <int COUNT> static __device__ __forceinline__ void quick_round_trip(float (&x)[COUNT], float clip) {
    constexpr float TOP = (1 << (KV_BITS % 16)) - 1;
    const float round = 12582912.0f;
    const Grid grid = quick_grid(x, clip);
    const float least = round - grid.zero, greatest = least + TOP;
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = (min_or_nan(max_or_nan(x[i] * grid.inverse + round, least), greatest) - round) * grid.scale;
}

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
    for (int lanes = 1; lanes < HEAD_LANES; lanes *= 2) butterfly(x, lanes);
    butterfly_within(x, 4);
#pragma unroll
    for (int i = 0; i < HELD; i++) x[i] *= BLOCK_SCALE;
}

/// Whether a transform may leave a head in other lanes (`transform_spread`).
#define SPREADS (ROTATED && HEAD_DIM == 128)

#if SPREADS
/// `transform`, with half as many shuffles: before a butterfly between lanes, each passes on the half of its values that the other one
/// needs, so that the butterfly is one of registers. In the end a lane l of 16 holds channels 2 l, 2 l + 1 and those 32, 64 and 96 on: value i
/// is channel 2 l + i % 2 + 32 * (i / 2). A lane that has passed on sums holds a pair in the other order; what that does to the sign of the
/// next difference is the same for all it holds, and goes into the scale.
static __device__ __forceinline__ void transform_spread(float (&x)[HELD]) {
    butterfly_within(x, 1);
#pragma unroll
    for (int lanes = 1; lanes < 16; lanes *= 2) {
        const float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (i & 2) continue;
            const float left = x[i], right = x[i + 2];
            x[i] = fmaf(right, sign, left);
            x[i + 2] = __shfl_xor_sync(0xffffffffu, fmaf(right, -sign, left), lanes);
        }
    }
    butterfly_within(x, 2);
    butterfly_within(x, 4);
    const float low = __popc(threadIdx.x & threadIdx.x / 2 & 7) % 2 ? -BLOCK_SCALE : BLOCK_SCALE, high = threadIdx.x & 8 ? -low : low;
#pragma unroll
    for (int i = 0; i < HELD; i++) x[i] *= i & 2 ? high : low;
}

/// The first of the two channels of a pair that `transform_spread` leaves in values 2 u and 2 u + 1.
static __device__ __forceinline__ int spread_channel(int u) { return int(threadIdx.x % HEAD_LANES) * 2 + 32 * u; }
#endif

/// Rotary embedding with the halves of the head as pairs.
static __device__ __forceinline__ void embed(float (&x)[HELD], const float (&cos)[4], const float (&sin)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float left = x[i], right = x[i + 4];
        x[i] = left * cos[i] - right * sin[i];
        x[i + 4] = right * cos[i] + left * sin[i];
    }
}

/// The channel of a lane's value i; HEAD_DIM or more where it holds none.
static __device__ __forceinline__ int channel_of(int i) {
    const int at = int(threadIdx.x % HEAD_LANES) * 4;
    return at < HEAD_DIM / 2 ? i / 4 * (HEAD_DIM / 2) + at + i % 4 : HEAD_DIM;
}

/// A head of f16, its address a multiple of 8; zeros where `there` is false.
static __device__ __forceinline__ void load_head(float (&x)[HELD], const half* from, bool there) {
    const int at = int(threadIdx.x % HEAD_LANES) * 4;
#pragma unroll
    for (int side = 0; side < 2; side++) {
        uint2 packed = make_uint2(0, 0);
        if (there && at < HEAD_DIM / 2) packed = *reinterpret_cast<const uint2*>(from + side * (HEAD_DIM / 2) + at);
        x[4 * side] = low_half(packed.x);
        x[4 * side + 1] = high_half(packed.x);
        x[4 * side + 2] = low_half(packed.y);
        x[4 * side + 3] = high_half(packed.y);
    }
}

/// A lane's part of a row of the tables of the rotary embedding, loaded before it is needed.
struct Angle {
    float cos[4], sin[4];
};
static __device__ __forceinline__ Angle load_angle(const float* cos, const float* sin) {
    const int at = int(threadIdx.x % HEAD_LANES) * 4;
    Angle angle = {};
    if (at < HEAD_DIM / 2) {
        const float4 c = *reinterpret_cast<const float4*>(cos + at), s = *reinterpret_cast<const float4*>(sin + at);
        angle.cos[0] = c.x, angle.cos[1] = c.y, angle.cos[2] = c.z, angle.cos[3] = c.w;
        angle.sin[0] = s.x, angle.sin[1] = s.y, angle.sin[2] = s.z, angle.sin[3] = s.w;
    }
    return angle;
}
static __device__ __forceinline__ void embed(float (&x)[HELD], const Angle& angle, float*) { embed(x, angle.cos, angle.sin); }

#else

/// Registers of a lane: value i of a head is in lane i % 32, register i / 32.
static constexpr int HELD = (HEAD_DIM + 31) / 32;

/// Butterflies at distances 1, 2, 4, ... within blocks of BLOCK values, then the scale. Blocks divide
/// the head, so what lies beyond it in the last register never meets a value.
static __device__ __forceinline__ void transform(float (&x)[HELD]) {
    const int lane = threadIdx.x % 32;
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
static __device__ __forceinline__ void embed(float (&x)[HELD], const float* cos, const float* sin, float* exchange) {
    constexpr int HALF = HEAD_DIM / 2;
    const int lane = threadIdx.x % 32;
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

/// The channel of a lane's value i; HEAD_DIM or more where it holds none.
static __device__ __forceinline__ int channel_of(int i) { return int(threadIdx.x % 32) + 32 * i; }

/// A head of f16; zeros where `there` is false.
static __device__ __forceinline__ void load_head(float (&x)[HELD], const half* from, bool there) {
#pragma unroll
    for (int i = 0; i < HELD; i++) x[i] = there && channel_of(i) < HEAD_DIM ? to_float(from[channel_of(i)]) : 0.0f;
}

/// A row of the tables of the rotary embedding.
struct Angle {
    const float *cos, *sin;
};
static __device__ __forceinline__ Angle load_angle(const float* cos, const float* sin) { return {cos, sin}; }
/// `exchange` [HEAD_DIM] is the warp's own.
static __device__ __forceinline__ void embed(float (&x)[HELD], const Angle& angle, float* exchange) {
    embed(x, angle.cos, angle.sin, exchange);
}

#endif

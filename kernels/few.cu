// As fused.cu, for few rows, where a step of decoding waits for every microsecond: a warp makes one panel of one row, four slots
// a lane, so that the little work is shared out among many warps, and takes little shared memory, so that the product after it may
// fetch its weights in the meantime. codes.cuh has the layout and the macros.
//
// grid (rows, slices), blocks of any number of warps: block (t, s) makes the panels from s * slice_panels on of row t, the last slice the
// outliers as well. Where an order picks from all over a row, the block stages the row in shared memory:
//
//     order, norm's weight ---> registers, before the kernel before has ended
//     row ---> shared memory ---> sum of squares, by one warp ---> panels: norm, transform, peak, scale, codes

#if !defined(MOST_THREADS)
#error "a constant is missing: src/backend/cuda/kernels/few.rs declares them"
#endif

/// Registers of a lane: slots 4 * lane + 0..4 of a panel.
#define HELD 4

/// What a site's order says of a lane's slots.
struct Picks {
    int4 at;
    float4 weight;

    __device__ __forceinline__ Picks(const int* slots, const void* other, int panel) {
        const int first = panel * PANEL + threadIdx.x % 32 * HELD;
        at = *reinterpret_cast<const int4*>(slots + first);
        if (FROM == NORM) weight = *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(other) + first);
    }
    /// The values, from a staged row; the norm's factor is `inverse`.
    __device__ __forceinline__ void load(float* v, const In* row, float inverse) const {
        v[0] = to_float(row[at.x]);
        v[1] = to_float(row[at.y]);
        v[2] = to_float(row[at.z]);
        v[3] = to_float(row[at.w]);
        if (FROM == NORM) {
            v[0] = v[0] * inverse * weight.x;
            v[1] = v[1] * inverse * weight.y;
            v[2] = v[2] * inverse * weight.z;
            v[3] = v[3] * inverse * weight.w;
        }
    }
};

/// Butterflies at distances 1, 2, ..., GROUP / 2. A product with 1 or -1 is exact: one instruction adds or subtracts.
static __device__ __forceinline__ void transform(float (&v)[HELD]) {
    const float sums[2] = {v[0] + v[1], v[2] + v[3]}, differences[2] = {v[0] - v[1], v[2] - v[3]};
    v[0] = sums[0] + sums[1];
    v[1] = differences[0] + differences[1];
    v[2] = sums[0] - sums[1];
    v[3] = differences[0] - differences[1];
#pragma unroll
    for (int lanes = 1; lanes * HELD < GROUP; lanes *= 2) {
        const float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) v[i] = fmaf(v[i], sign, __shfl_xor_sync(0xffffffffu, v[i], lanes));
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) v[i] *= BLOCK_SCALE;
}

/// The greatest peak of the values of `LANES` lanes.
template <int LANES, int COUNT> static __device__ __forceinline__ u32 peak_among(const float (&v)[COUNT]) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) most = max(most, peak_of(v[i]));
#pragma unroll
    for (int lanes = 1; lanes < LANES; lanes *= 2) most = max(most, __shfl_xor_sync(0xffffffffu, most, lanes));
    return most;
}

/// The codes of a panel of groups.
static __device__ __forceinline__ void make_groups(float (&v)[HELD], int token, int panel, const Shape& shape, const Target& target) {
    const int lane = threadIdx.x % 32, chunk = lane / 4;
    constexpr int LANES = GROUP / HELD;
    if (TRANSFORM) transform(v);
    const float scale = target.scale_of_group(peak_among<LANES>(v)), inverse = quick_inverse(scale);
    if (lane % LANES == 0) target.put_scale(shape, token, panel * (PANEL / GROUP) + lane / LANES, scale);
    if (target.has(shape, panel, -1, chunk))
        *reinterpret_cast<u32*>(target.at(shape, token, panel, -1, chunk) + lane % 4 * 4) = group_word(v, inverse, target.least, target.greatest);
}

/// The codes of the outliers, one or two panels.
static __device__ __forceinline__ void make_outliers(const float (&v)[2 * HELD], int token, const Shape& shape, const Target& target) {
    const int lane = threadIdx.x % 32, chunk = lane / 4;
    const float scale = scale_of(peak_magnitude(peak_among<32>(v)), 1.0f, 127.0f), inverse = inverse_of(scale);
    if (lane == 0) target.put_outlier_scale(token, scale);
#pragma unroll
    for (int panel = 0; panel < 2; panel++) {
        if (panel < shape.outlier_panels() && target.has(shape, panel, panel, chunk))
            *reinterpret_cast<u32*>(target.at(shape, token, panel, panel, chunk) + lane % 4 * 4) = plain_word(v + HELD * panel, inverse, -127.0f, 127.0f, false);
    }
}

#if ORDERED
/// Stages a row, by all threads, with zeros before it.
static __device__ __forceinline__ const In* stage_row(const In* x, int columns) {
    constexpr int WIDTH = 16 / sizeof(In);
    In* row = reinterpret_cast<In*>(shared_bytes + BEFORE);
    if (threadIdx.x == 0) *reinterpret_cast<uint4*>(shared_bytes + BEFORE - 16) = make_uint4(0, 0, 0, 0);
    if (columns % WIDTH == 0) {
        for (int i = threadIdx.x * WIDTH; i < columns; i += blockDim.x * WIDTH) copy16(shared_address(row + i), x + i, true);
        copy_commit();
        copy_wait<0>();
    } else {
        for (int i = threadIdx.x; i < columns; i += blockDim.x) row[i] = x[i];
    }
    __syncthreads();
    return row;
}
#endif

#if FROM == NORM
/// 1 / sqrt(mean of squares + epsilon) of a staged row, by a warp: sums run in 16 lanes, folded in halves.
static __device__ __forceinline__ float norm_factor(const float* row, int columns, float epsilon) {
    float sum = 0.0f;
    int i = threadIdx.x % 16;
#pragma unroll 1
    for (; i + 15 * 16 < columns; i += 256) {
        float part[16];
#pragma unroll
        for (int j = 0; j < 16; j++) part[j] = row[i + 16 * j];
#pragma unroll
        for (int j = 0; j < 16; j++) sum += part[j] * part[j];
    }
    for (; i < columns; i += 16) sum += row[i] * row[i];
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    return __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, (float)columns) + epsilon));
}
#endif

#if !ORDERED
/// The products of a lane's columns, from `first` on: zeros from `end` on.
static __device__ __forceinline__ void load_products(float* v, const half* gate, const half* up, int first, int end, bool quads) {
    if (quads && first + HELD <= end) {
        const uint2 g = *reinterpret_cast<const uint2*>(gate + first), u = *reinterpret_cast<const uint2*>(up + first);
        v[0] = silu_mul<false>(low_half(g.x), low_half(u.x));
        v[1] = silu_mul<false>(high_half(g.x), high_half(u.x));
        v[2] = silu_mul<false>(low_half(g.y), low_half(u.y));
        v[3] = silu_mul<false>(high_half(g.y), high_half(u.y));
        return;
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) v[i] = first + i < end ? silu_mul<false>(to_float(gate[first + i]), to_float(up[first + i])) : 0.0f;
}
#endif

/// Codes of `[tokens, columns]`; arguments as those of fused_quantize, `stages` is not used.
extern "C" __global__ void __launch_bounds__(MOST_THREADS) few_quantize(
    const In* x, const void* other, const int* slots, int tokens, int columns, int groups, int outliers, int slice_panels, int stages, float epsilon,
    float clip, float top, float inverse_top, int signed_scales, float scale_unit, float least, float greatest, i8* codes, float* scales, int scale_stride,
    i8* outlier_codes, float* outlier_scales, int padded_outliers, u32* bad
) {
    const Shape shape{tokens, columns, groups, outliers};
    const Target target{clip, top, inverse_top, signed_scales, scale_unit, least, greatest, codes, scales, scale_stride, outlier_codes, outlier_scales, padded_outliers, bad};
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, token = blockIdx.x;
    const int first = blockIdx.y * slice_panels, end = min(first + slice_panels, shape.panels());
    const bool has_outliers = outliers > 0 && blockIdx.y == gridDim.y - 1;
    // The task after the slice's panels is the outliers.
    int panel = first + warp;
#if ORDERED
    const int last_slots = shape.panels() + shape.outlier_panels() - 1;
    Picks picks(slots, other, min(panel < end ? panel : shape.panels(), last_slots));
    pdl_wait();
    const In* row = stage_row(x + (long long)token * columns, columns);
    float inverse = 1.0f;
#if FROM == NORM
    __shared__ float factor;
    if (warp == 0) {
        const float own = norm_factor(row, columns, epsilon);
        if (threadIdx.x == 0) factor = own;
    }
    __syncthreads();
    inverse = factor;
#endif
    for (; panel < end; panel += warps) {
        float v[HELD];
        picks.load(v, row, inverse);
        make_groups(v, token, panel, shape, target);
        if (panel + warps < end + has_outliers) picks = Picks(slots, other, panel + warps < end ? panel + warps : shape.panels());
    }
    if (has_outliers && panel == end) {
        float v[2 * HELD] = {};
        picks.load(v, row, inverse);
        if (shape.outlier_panels() > 1) Picks(slots, other, shape.panels() + 1).load(v + HELD, row, inverse);
        make_outliers(v, token, shape, target);
    }
#else
    const int lane = threadIdx.x % 32;
    const half *gate = x + (long long)token * columns, *up = reinterpret_cast<const half*>(other) + (long long)token * columns;
    const bool quads = columns % HELD == 0;
    pdl_wait();
    for (; panel < end; panel += warps) {
        float v[HELD];
        load_products(v, gate, up, panel * PANEL + lane * HELD, shape.grouped(), quads);
        make_groups(v, token, panel, shape, target);
    }
    if (has_outliers && panel == end) {
        float v[2 * HELD];
#pragma unroll
        for (int half = 0; half < 2; half++) load_products(v + HELD * half, gate, up, shape.grouped() + half * PANEL + lane * HELD, columns, quads);
        make_outliers(v, token, shape, target);
    }
#endif
}

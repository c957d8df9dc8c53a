// What every kernel file begins with, after ptx.cuh: scales, codes, warp sums. Compiled with --fmad=false: a product
// and a sum are fused only where the code says fma.

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

static __device__ __forceinline__ void store(float* to, float value) { *to = value; }
static __device__ __forceinline__ void store(half* to, float value) { *to = to_half(value); }

static __device__ __forceinline__ float low_half(u32 packed) { return to_float(half{(u16)packed}); }
static __device__ __forceinline__ float high_half(u32 packed) { return to_float(half{(u16)(packed >> 16)}); }

static __device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

/// The greater magnitude, as bit patterns: a NaN is the greatest of all.
static __device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

/// A value as a peak: magnitudes compare like their bit patterns, NaN the greatest, and the sign lies below
/// (src/quant/grid.rs, Peak).
static __device__ __forceinline__ u32 peak_of(float x) {
    u32 bits = __float_as_uint(x);
    return bits << 1 | bits >> 31;
}
static __device__ __forceinline__ float peak_magnitude(u32 peak) { return __uint_as_float(peak >> 1); }
/// A scale with the sign that brings the peak to the least code.
static __device__ __forceinline__ float signed_scale(float scale, u32 peak) { return (peak & 1) || scale == 0.0f ? scale : -scale; }

/// What values are multiplied with to become codes: 0 for the scale of a group of zeros.
static __device__ __forceinline__ float inverse_of(float scale) { return scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale); }

/// The scale of a clipped absmax; infinite if f16 cannot hold it.
static __device__ __forceinline__ float scale_of(float absmax, float clip, float greatest) {
    return to_float(to_half(__fdiv_rn(absmax * clip, greatest)));
}

/// The code, in two's complement, in the lowest byte. The limits are integers, so that clamping first
/// and rounding then is the same as rounding first; and the sum with 1.5 * 2^23 rounds to an integer,
/// ties to even, that its lowest bits hold. Conversions would take four times as long as additions.
static __device__ __forceinline__ u32 code_of(float value, float inverse, float least, float greatest) {
    return __float_as_uint(fminf(fmaxf(value * inverse, least), greatest) + 12582912.0f);
}
static __device__ __forceinline__ u32 pack_codes(u32 a, u32 b, u32 c, u32 d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

/// The number of a small floating-point format nearest to a value, ties to even, held within the format
/// (src/quant/float.rs): `steps` numbers from a power of two to the next, equal steps below `normal`.
/// What is added leaves no bit below a step.
static __device__ __forceinline__ float round_float(float value, float steps, float normal, float highest) {
    value = fminf(fmaxf(value, -highest), highest);
    float power = fmaxf(__uint_as_float(__float_as_uint(value) & 0x7f800000u), normal);
    float rounder = power * (12582912.0f / steps);
    return (value + rounder) - rounder;
}
/// E2M1, doubled so that its numbers are integers: up to 12.
static __device__ __forceinline__ float nearest_e2m1_doubled(float value) { return round_float(value, 2.0f, 2.0f, 12.0f); }
/// E4M3, up to 448.
static __device__ __forceinline__ float nearest_e4m3(float value) { return round_float(value, 8.0f, 0.015625f, 448.0f); }

#ifdef SCALE_GRID
enum { F16_GRID, BF16_GRID, E4M3_GRID, POWER_OF_TWO_GRID };

/// The scale on the grid SCALE_GRID nearest to `scale` (src/quant/scale.rs): not finite if it is beyond f16, or
/// if `scale` is. `unit` is the power of two that numbers of E4M3 are multiplied with.
static __device__ __forceinline__ float round_scale(float scale, float unit) {
    u32 bits = __float_as_uint(scale);
    if (SCALE_GRID == F16_GRID || !is_finite(scale)) return to_float(to_half(scale));
    if (SCALE_GRID == E4M3_GRID) return nearest_e4m3(__fdiv_rn(scale, unit)) * unit;
    // Half of the lowest bit that stays, and one more where that bit is set: ties to even.
    if (SCALE_GRID == BF16_GRID) bits = bits + 0x7fffu + (bits >> 16 & 1) & 0xffff0000u;
    if (SCALE_GRID == POWER_OF_TWO_GRID) bits = bits + 0x00200000u & 0x7f800000u;
    return to_float(to_half(__uint_as_float(bits)));
}

/// The scale of a group: its clipped absmax becomes `top`, and with `signed_scales` its peak the least code.
static __device__ __forceinline__ float group_scale(u32 peak, float clip, float top, int signed_scales, float scale_unit) {
    float scale = round_scale(__fdiv_rn(peak_magnitude(peak) * clip, top), scale_unit);
    return signed_scales ? signed_scale(scale, peak) : scale;
}
#endif

/// What makes a Hadamard transform of LENGTH values, a power of two, orthonormal: 1 / sqrt(LENGTH), computed
/// in f64 and rounded once.
template <int LENGTH> static __device__ constexpr float hadamard_scale() {
    int log = 0;
    for (int length = LENGTH; length > 1; length /= 2) log++;
    double even = 1.0 / (double)(1 << (log / 2));
    return (float)(log % 2 == 0 ? even : even * 0.70710678118654752440);
}

#ifdef HEAD_DIM
/// The length of the blocks that a Hadamard transform of a head works on, 2 to 256.
static constexpr int BLOCK = HEAD_DIM & -HEAD_DIM;
static constexpr float BLOCK_SCALE = hadamard_scale<BLOCK>();
#endif

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}
static __device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}
static __device__ __forceinline__ u32 warp_max(u32 x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
}
static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
    return x;
}

// Codes of a site's activation, what the kernels that make them have in common (fused.cu, few.cu): the numbers, and where they go.
//
// FROM       NORM: RMSNorm of f32 rows; HALF: f16 rows as they are; SILU: f16 rows of gate and up
// GROUP      channels of a group: 32, 64 or 128
// TRANSFORM  1: Hadamard transform of each group
// ORDERED    1: the kernel permutes; 0 (with SILU): rows are in the site's order, padding included
// TILED      1: codes as the product for Hopper reads them; 0: rows of codes
// MAGNITUDES 1: codes as signs and magnitudes, with TILED; 0: in two's complement
// FP4        1: FP4 codes, doubled numbers of E2M1; 0: integers
// SCALE_GRID the grid that scales of groups are rounded to (common.cuh)
// BEFORE (ORDERED): bytes before a staged row, of which the last are zeros, what an order's -1 picks
//
// A slot is where the order puts a channel; a panel is 128 of them, one or more groups, the last panel filled up
// with zeros; INT8 outliers are one or two panels after the others, without a transform.
//
// With TILED codes are bytes [panels][tokens_padded][128], the sixteenths of a row's 128 bytes exchanged (the
// chunk c of row t is at c ^ t % 8), tokens padded to a multiple of 8. Sign and magnitude are E4M3 for the code
// times 2^-9. Scales are f16, [ceil(groups / 8)][tokens_padded][8].

#if !defined(FROM) || !defined(GROUP) || !defined(TRANSFORM) || !defined(ORDERED) || !defined(TILED) || !defined(MAGNITUDES) || \
    !defined(FP4) || !defined(PANEL) || !defined(SCALE_GROUPS) || !defined(SCALE_GRID)
#error "a constant is missing: src/backend/cuda/kernels/fused.rs declares them"
#endif
#if ORDERED && !defined(BEFORE)
#error "a constant is missing: src/backend/cuda/kernels/fused.rs declares them"
#endif
static_assert(PANEL == 128 && SCALE_GROUPS == 8, "what the product for Hopper reads");

#define NORM 0
#define HALF 1
#define SILU 2

#if FROM == NORM
typedef float In;
#else
typedef half In;
#endif

static constexpr float BLOCK_SCALE = hadamard_scale<GROUP>();

extern __shared__ __align__(16) u8 shared_bytes[];


/// What lies where in a row of values or of codes.
struct Shape {
    int tokens, columns, groups, outliers;

    __device__ __forceinline__ int grouped() const { return groups * GROUP; }
    __device__ __forceinline__ int panels() const { return (grouped() + PANEL - 1) / PANEL; }
    __device__ __forceinline__ int outlier_panels() const { return (outliers + PANEL - 1) / PANEL; }
};

/// The operations of cpu/elementwise.rs: e^-x without the exponent, which is in the low bits of `shifted`.
static __device__ __forceinline__ float exp_of_minus(float x, float& shifted) {
    const float round = 12582912.0f, ln2_high = 0.6933594f, ln2_low = -2.1219444e-4f;
    shifted = fmaf(-x, 1.44269504088896340736f, round);
    float n = shifted - round;
    float r = fmaf(n, -ln2_low, fmaf(n, -ln2_high, -x));
    float tail = 1.0f / 5040.0f;
    tail = fmaf(tail, r, 1.0f / 720.0f);
    tail = fmaf(tail, r, 1.0f / 120.0f);
    tail = fmaf(tail, r, 1.0f / 24.0f);
    tail = fmaf(tail, r, 1.0f / 6.0f);
    tail = fmaf(tail, r, 1.0f / 2.0f);
    return fmaf(r * r, tail, r) + 1.0f;
}
/// Gates further from 0 need silu_mul_any.
#define USUAL_GATE 80.0f

/// silu(gate) * up, of gates that are not usual if need be. The quotient is the rounded one: a single correction makes it
/// so for every gate that f16 has (tests of src/backend/cuda/fused.rs).
template <bool USUAL> static __device__ __forceinline__ float silu_mul(float gate, float up) {
    // The greatest gates leave a divisor of 1, and below -88.7 it is infinite.
    float held = USUAL ? gate : fminf(fmaxf(gate, -88.6875f), USUAL_GATE);
    float shifted;
    float power = exp_of_minus(held, shifted);
    // The low bits of `shifted` are the exponent; those above them leave with the shift.
    float divisor = 1.0f + __uint_as_float(__float_as_uint(power) + (__float_as_uint(shifted) << 23));
    // A quarter of it, so that no reciprocal is subnormal.
    if (!USUAL) divisor *= 0.25f;
    float inverse = near_reciprocal(divisor);
    float quotient = held * inverse;
    quotient = fmaf(fmaf(-divisor, quotient, held), inverse, quotient);
    if (!USUAL) {
        quotient = gate > USUAL_GATE ? gate : quotient * 0.25f;
        // Zero, and NaN for what is no number.
        quotient = gate >= -88.72284f ? quotient : gate * 0.0f;
    }
    return quotient * up;
}

/// As group_scale without signs, with the divisor's reciprocal: the corrected quotient is the rounded one.
static __device__ __forceinline__ float quick_scale(float absmax, float clip, float top, float inverse_top, float unit) {
    float x = absmax * clip;
    float quotient = x * inverse_top;
    quotient = fmaf(fmaf(-top, quotient, x), inverse_top, quotient);
    return round_scale(quotient, unit);
}
/// As inverse_of: one step of Newton's from within an ulp returns the rounded reciprocal of every number but those with
/// all bits of the significand set, which f16 has not.
static __device__ __forceinline__ float quick_inverse(float scale) {
    float near = near_reciprocal(scale);
    near = fmaf(fmaf(-scale, near, 1.0f), near, near);
    return scale == 0.0f ? 0.0f : near;
}
/// Four codes in two's complement.
static __device__ __forceinline__ u32 plain_word(const float* v, float inverse, float least, float greatest, bool fp4) {
    u32 code[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
        code[j] = fp4 ? __float_as_uint(nearest_e2m1_doubled(v[j] * inverse) + 12582912.0f) : code_of(v[j], inverse, least, greatest);
    return pack_codes(code[0], code[1], code[2], code[3]);
}

/// Four codes as sign and magnitude.
static __device__ __forceinline__ u32 signed_word(const float* v, float inverse, float least, float greatest) {
#if __CUDA_ARCH__ >= 890
    // Up to 16 the steps of E4M3 are 2^-9: its rounding is that to integers.
    const float unit = 1.0f / 512.0f;
    least *= unit;
    greatest *= unit;
    float scaled = inverse * unit, p[4];
#pragma unroll
    for (int j = 0; j < 4; j++) p[j] = FP4 ? nearest_e2m1_doubled(v[j] * inverse) * unit : fminf(fmaxf(v[j] * scaled, least), greatest);
    u32 packed = pack_e4m3(p[0], p[1]) | pack_e4m3(p[2], p[3]) << 16;
    // No zero has a sign.
    return packed & (((packed & 0x7f7f7f7fu) + 0x7f7f7f7fu) | 0x7f7f7f7fu);
#else
    u32 word = plain_word(v, inverse, least, greatest, FP4), negative = word >> 7 & 0x01010101u;
    return (word ^ negative * 255) + negative | negative << 7;
#endif
}

/// Four codes of a group.
static __device__ __forceinline__ u32 group_word(const float* v, float inverse, float least, float greatest) {
    return MAGNITUDES ? signed_word(v, inverse, least, greatest) : plain_word(v, inverse, least, greatest, FP4);
}


/// What is known of the codes of groups, and where all goes.
struct Target {
    float clip, top, inverse_top;
    int signed_scales;
    float scale_unit, least, greatest;
    i8* codes;
    float* scales;
    int scale_stride;
    i8* outlier_codes;
    float* outlier_scales;
    int padded_outliers;
    u32* bad;

    /// Where a chunk of a row of a panel goes; `outlier_panel` is not negative for outliers.
    __device__ __forceinline__ i8* at(const Shape& shape, long long token, int panel, int outlier_panel, int chunk) const {
        if (TILED) {
            i8* to = outlier_panel < 0 ? codes : outlier_codes;
            long long row = (long long)(outlier_panel < 0 ? panel : outlier_panel) * scale_stride + token;
            return to + row * PANEL + (chunk ^ (int)(token & 7)) * 16;
        }
        return outlier_panel < 0 ? codes + token * shape.grouped() + panel * PANEL + chunk * 16
                                 : outlier_codes + token * padded_outliers + outlier_panel * PANEL + chunk * 16;
    }
    /// Stores the scale of a group.
    __device__ __forceinline__ void put_scale(const Shape& shape, int token, int group, float scale) const {
        if (TILED) {
            half* eight = reinterpret_cast<half*>(scales) + ((long long)(group / 8) * scale_stride + token) * 8;
            eight[group % 8] = to_half(scale);
            // The last eight groups may be fewer. What there is not has finite scales, too.
            if (group + 1 == shape.panels() * (PANEL / GROUP))
                for (int none = group % 8 + 1; none < 8; none++) eight[none] = half{0};
        } else if (group < shape.groups)
            scales[(long long)group * scale_stride + token] = scale;
        if (!is_finite(scale)) atomicMin(bad, (u32)token);
    }
    /// Stores the scale of a row's outliers.
    __device__ __forceinline__ void put_outlier_scale(int token, float scale) const {
        outlier_scales[token] = scale;
        if (!is_finite(scale)) atomicMin(bad, (u32)token);
    }
    /// The scale of a group with this peak.
    __device__ __forceinline__ float scale_of_group(u32 peak) const {
        float scale = quick_scale(peak_magnitude(peak), clip, top, inverse_top, scale_unit);
        return signed_scales ? signed_scale(scale, peak) : scale;
    }
    /// Whether it is there.
    __device__ __forceinline__ bool has(const Shape& shape, int panel, int outlier_panel, int chunk) const {
        if (TILED) return true;
        return outlier_panel < 0 ? panel * PANEL + chunk * 16 < shape.grouped() : outlier_panel * PANEL + chunk * 16 < padded_outliers;
    }
};

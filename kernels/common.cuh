// What every kernel file begins with: 16-bit floats without headers, warp sums, and the few
// instructions that CUDA C++ has no name for. Compiled with --fmad=false: a product and a sum are
// fused only where the code says fma.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;

struct half {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(half x) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
}
static __device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

static __device__ __forceinline__ half to_half(float x) {
    half value;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
    return value;
}
static __device__ __forceinline__ void store(float* to, float value) { *to = value; }
static __device__ __forceinline__ void store(half* to, float value) { *to = to_half(value); }

/// Two values as f16: `low` in the lower half.
static __device__ __forceinline__ u32 pack_half2(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
static __device__ __forceinline__ float low_half(u32 packed) { return to_float(half{(unsigned short)packed}); }
static __device__ __forceinline__ float high_half(u32 packed) { return to_float(half{(unsigned short)(packed >> 16)}); }

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

/// The scale of a group: its clipped absmax becomes `top`, and with `signed_scales` its peak the least code.
static __device__ __forceinline__ float group_scale(u32 peak, float clip, float top, int signed_scales) {
    float scale = scale_of(peak_magnitude(peak), clip, top);
    return signed_scales ? signed_scale(scale, peak) : scale;
}

/// The code, in two's complement, in the lowest byte. The limits are integers, so that clamping first
/// and rounding then gives what rounding first does; and the sum with 1.5 * 2^23 rounds to an integer,
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

/// What makes a Hadamard transform of LENGTH values, a power of two, orthonormal: 1 / sqrt(LENGTH), computed
/// in f64 and rounded once.
template <int LENGTH> static __device__ constexpr float hadamard_scale() {
    int log = 0;
    for (int length = LENGTH; length > 1; length /= 2) log++;
    double even = 1.0 / (double)(1 << (log / 2));
    return (float)(log % 2 == 0 ? even : even * 0.70710678118654752440);
}

#ifdef HEAD_DIM
/// Values of a head in memory: a multiple of the depth of one matrix instruction.
#define DP ((HEAD_DIM + 15) / 16 * 16)
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

static __device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

/// Makes the compiler forget what it knows about a value, so that what is computed from it stays where
/// it is written: in a loop, say, instead of in registers that the loop needs.
static __device__ __forceinline__ void keep_apart(u32& x) { asm volatile("" : "+r"(x)); }
static __device__ __forceinline__ void keep_apart(long long& x) { asm volatile("" : "+l"(x)); }

/// Copies 16 bytes to shared memory, or zeros where `there` is false.
static __device__ __forceinline__ void copy16(u32 to, const void* from, bool there) {
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> static __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/// Four 8x8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8.
static __device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
static __device__ __forceinline__ void load_matrices_transposed(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

/// d += a b: f16 operands, f32 sums, 16 x 16 times 16 x 8.
static __device__ __forceinline__ void mma_half(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// d = c + a b: s8 operands, i32 sums, 16 x 32 times 32 x 8.
static __device__ __forceinline__ void mma_codes_32(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, int c0, int c1, int c2, int c3) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c0), "r"(c1), "r"(c2), "r"(c3));
}

/// Waits until the kernels before this one have ended, then allows the next to begin. On Hopper a kernel may begin while the one before
/// it ends (`Family::overlaps` in src/backend/cuda/kernels.rs): it reads what that one may have written, and writes what that one may have
/// read, only behind this.
static __device__ __forceinline__ void await_kernels_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

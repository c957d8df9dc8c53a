// The instructions that CUDA C++ has no name for, each wrapped once; no other file has inline assembly. Also the integer types, and
// 16-bit floats without headers.
//
// Addresses in shared memory are u32, as `shared_address` returns them. "By a warp" means that all lanes of a converged warp call the
// function and that the hardware elects one to issue: for a lane that diverges the compiler makes a loop of it, and no address stays in
// uniform registers.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;

struct half {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

// ---- Conversions and arithmetic ----

static __device__ __forceinline__ float to_float(half x) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
}
static __device__ __forceinline__ half to_half(float x) {
    half value;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
    return value;
}
/// Two values as f16: `low` in the lower half.
static __device__ __forceinline__ u32 pack_half2(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
#if __CUDA_ARCH__ >= 890
/// Two values as E4M3, held within its range: `low` in the lower byte.
static __device__ __forceinline__ u32 pack_e4m3(float low, float high) {
    u16 packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}
#endif

/// The greater value, NaN if one of them is NaN.
static __device__ __forceinline__ float max_or_nan(float a, float b) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
}
/// The lesser value, NaN if one of them is NaN.
static __device__ __forceinline__ float min_or_nan(float a, float b) {
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
    return least;
}
/// max(a, |b|) of two pairs of f16, NaN where one is NaN.
static __device__ __forceinline__ u32 abs_max_or_nan2(u32 a, u32 b) {
    u32 most;
    asm("{.reg .b32 t; abs.f16x2 t, %2; max.NaN.f16x2 %0, %1, t;}" : "=r"(most) : "r"(a), "r"(b));
    return most;
}
/// 2^x, approximately.
static __device__ __forceinline__ float power_of_two(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}
/// 1 / x to within an ulp.
static __device__ __forceinline__ float near_reciprocal(float x) {
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}
/// Each byte as its sign: 255 or 0. (`__byte_perm` has no such selectors.)
static __device__ __forceinline__ u32 sign_bytes(u32 x) {
    u32 signs;
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(signs) : "r"(x));
    return signs;
}

// ---- Hints to the compiler ----

/// Hides a value's origin from the compiler, so that what is computed from it stays where it is written: in a loop, say,
/// instead of in registers that the loop needs.
static __device__ __forceinline__ void keep_apart(u32& x) { asm volatile("" : "+r"(x)); }
static __device__ __forceinline__ void keep_apart(long long& x) { asm volatile("" : "+l"(x)); }
static __device__ __forceinline__ void keep_apart(float& x) { asm volatile("" : "+f"(x)); }

/// Keeps the compiler from moving uses of registers that wgmma still reads or writes.
template <int COUNT> static __device__ __forceinline__ void pin(u32 (&d)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(d[i])::"memory");
}

// ---- Loads, stores and atomic operations ----

/// A load that is issued where it is written, and not after what comes before.
static __device__ __forceinline__ int load_now(const int* from) {
    int x;
    asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(x) : "l"(from));
    return x;
}
/// A load past the first-level cache.
static __device__ __forceinline__ uint2 load_uncached(const uint2* from) {
    uint2 value;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(from));
    return value;
}
/// A load past the first-level cache that brings 256 bytes to the second-level cache.
static __device__ __forceinline__ uint4 load_uncached(const uint4* from) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
}
/// A load of what another thread block wrote.
static __device__ __forceinline__ float4 load_coherent(const float4* from) {
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from));
    return x;
}

/// Adds 1 and returns the value before. Releases what the thread block has written before a barrier, and acquires what those wrote that
/// added before.
static __device__ __forceinline__ u32 count_in(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

static __device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

static __device__ __forceinline__ u16 load_shared_16(u32 address) {
    u16 x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
    return x;
}
static __device__ __forceinline__ u32 load_shared_32(u32 address) {
    u32 x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
static __device__ __forceinline__ uint2 load_shared_64(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}
static __device__ __forceinline__ float2 load_shared_pair(u32 address) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(address) : "memory");
    return v;
}
static __device__ __forceinline__ uint4 load_shared_128(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}
static __device__ __forceinline__ void store_shared(u32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// ---- Asynchronous copies of 16 bytes ----

/// Copies 16 bytes to shared memory, or zeros where `there` is false.
static __device__ __forceinline__ void copy16(u32 to, const void* from, bool there) {
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> static __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- Matrices ----

/// Four 8x8 matrices of 16-bit values; lane i holds the address of row i % 8 of matrix i / 8.
static __device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
static __device__ __forceinline__ void load_matrices_transposed(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}
/// Two 8x8 matrices, of which lanes 0 to 15 hold the addresses.
static __device__ __forceinline__ void load_two_matrices(u32 (&to)[2], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(address) : "memory");
}
/// An 8 x 8 matrix of 16-bit values, a row of which four lanes hold, transposed.
static __device__ __forceinline__ u32 transposed(u32 x) {
    u32 value;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(value) : "r"(x));
    return value;
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
/// `mma_codes_32` with 16 bytes of codes.
static __device__ __forceinline__ void mma_codes_16(int (&d)[4], u32 a0, u32 a1, u32 b0, int c0, int c1, int c2, int c3) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a0), "r"(a1), "r"(b0), "r"(c0), "r"(c1), "r"(c2), "r"(c3));
}
/// The same bytes as twice as many codes of 4 bits.
static __device__ __forceinline__ void mma_nibbles_32(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, int c0, int c1, int c2, int c3) {
    asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c0), "r"(c1), "r"(c2), "r"(c3));
}
static __device__ __forceinline__ void mma_nibbles_16(int (&d)[4], u32 a0, u32 a1, u32 b0, int c0, int c1, int c2, int c3) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a0), "r"(a1), "r"(b0), "r"(c0), "r"(c1), "r"(c2), "r"(c3));
}

// ---- Barriers of some threads ----

/// A named barrier of `threads` of a thread block's threads.
static __device__ __forceinline__ void group_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
/// The same of a number of threads that is known when the kernel is compiled.
template <int ID, int THREADS_OF_IT> static __device__ __forceinline__ void fixed_barrier() {
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS_OF_IT) : "memory");
}

// ---- Barriers in shared memory ----

static __device__ __forceinline__ void barrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
static __device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}
/// Arrives when the thread's copies by `copy16` are done.
static __device__ __forceinline__ void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
/// Waits for the end of the phase of this parity.
static __device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
#if __CUDA_ARCH__ >= 900
#define TEST "mbarrier.try_wait.parity.shared::cta.b64"
#else
#define TEST "mbarrier.test_wait.parity.shared::cta.b64"
#endif
    asm volatile("{\n.reg .pred done;\nagain:\n" TEST " done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier), "r"(phase)
                 : "memory");
#undef TEST
}

// ---- Hopper and later ----

/// Programmatic dependent launch (PDL): waits until the kernels before this one have ended, then allows the next one to begin. A kernel of a
/// family with `pdl` (src/backend/cuda/kernels) may begin while the one before it ends: it reads what that one may have written, and writes
/// what that one may have read, only after this.
static __device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 900
/// Shows initialized barriers to the copy engine and to the other thread blocks of the cluster.
static __device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

/// Arrives and announces `bytes`.
static __device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/// The same by a warp, of which one lane arrives.
static __device__ __forceinline__ void barrier_expect_elected(u32 barrier, u32 bytes) {
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n@one mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n}" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
/// Copies `bytes` (a multiple of 16) to shared memory; the barrier counts them.
static __device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
/// The same by a warp, of which one lane issues the copy.
static __device__ __forceinline__ void copy_bulk_elected(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
                 "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n}" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

/// A barrier of all threads of a cluster.
static __device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// Four floats of the shared memory of the cluster's thread block `rank`, at this block's address.
static __device__ __forceinline__ float4 load_remote(u32 address, int rank) {
    float4 v;
    asm volatile("{\n.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address), "r"(rank) : "memory");
    return v;
}

/// Two 8x8 matrices of 16-bit values, transposed; lanes 0 to 15 hold the addresses.
static __device__ __forceinline__ void store_matrices_transposed(u32 address, u32 first, u32 second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(first), "r"(second) : "memory");
}
/// Adds to four floats in device memory.
static __device__ __forceinline__ void add_four(float* to, const float4& v) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
/// Gives registers back, by a warpgroup, down to COUNT a thread.
template <int COUNT> static __device__ __forceinline__ void release_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
/// Takes registers, by a warpgroup, up to COUNT a thread.
template <int COUNT> static __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

static __device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> static __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define D4(d, c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define D8(d, c, i) D4(d, c, i), D4(d, c, i + 4)
#define D16(d, c, i) D8(d, c, i), D8(d, c, i + 8)
#define D32(d, c, i) D16(d, c, i), D16(d, c, i + 16)
#define D64(d, c, i) D32(d, c, i), D32(d, c, i + 32)
#define R4 "%0, %1, %2, %3"
#define R8 R4 ", %4, %5, %6, %7"
#define R16 R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define R32 R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R64 R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/// The instructions for n columns, whose sums are operands R of the assembler: d = a b, or with `add` d += a b, of depth 32, `b` being
/// the lower half of a descriptor of rows of 128 swizzled bytes; and d = a b of depth 16 in f16 with zeros in the upper half of a, `b`
/// being that of rows of 16 bytes that are not swizzled. Sums are bits, floats or integers, so that both can take the same registers.
/// The operands after them have numbers: those of a, of the descriptor, of the rest.
#define MULTIPLY(name, n, kind, factors, D, R, a0, a1, a2, a3, b_, add_)                                                         \
    static __device__ __forceinline__ void name(u32(&d)[n / 2], const u32* a, u32 b, int add) {                                  \
        asm volatile("{\n.reg .pred p;\n.reg .b64 tokens;\nsetp.ne.b32 p, %" add_ ", 0;\nmov.b64 tokens, {%" b_ ", 0x40000040};\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k32." kind " {" R "}, {%" a0 ", %" a1 ", %" a2 ", %" a3             \
                     "}, tokens, p" factors ";\n}"                                                                               \
                     : D(d, "+r", 0)                                                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add));                                            \
    }
#define MULTIPLY_SCALES(n, D, R, a0, a1, b_, zero)                                                                               \
    static __device__ __forceinline__ void multiply_scales(u32(&d)[n / 2], u32 low, u32 high, u32 b) {                           \
        asm volatile("{\n.reg .pred p;\n.reg .b64 tokens;\nsetp.ne.b32 p, %" zero ", 0;\nmov.b64 tokens, {%" b_ ", 0x00000008};\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" R "}, {%" a0 ", %" a1 ", %" zero ", %" zero      \
                     "}, tokens, p, 1, 1, 0;\n}"                                                                                 \
                     : D(d, "+r", 0)                                                                                             \
                     : "r"(low), "r"(high), "r"(b), "r"(0));                                                                     \
    }
#define INSTRUCTIONS(n, D, R, i0, i1, i2, i3, i4, i5)                                  \
    MULTIPLY(multiply_e4m3, n, "f32.e4m3.e4m3", ", 1, 1", D, R, i0, i1, i2, i3, i4, i5) \
    MULTIPLY(multiply_s8, n, "s32.s8.s8", "", D, R, i0, i1, i2, i3, i4, i5)             \
    MULTIPLY_SCALES(n, D, R, i0, i1, i2, i3)
INSTRUCTIONS(32, D16, R16, "16", "17", "18", "19", "20", "21")
INSTRUCTIONS(64, D32, R32, "32", "33", "34", "35", "36", "37")
INSTRUCTIONS(128, D64, R64, "64", "65", "66", "67", "68", "69")
#endif

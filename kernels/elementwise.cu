// Everything in a block that is no product and moves no channel: embedding, norm, activation, residual,
// and the conversion of weights.

#if !defined(THREADS) || !defined(ADDED) || !defined(SILU_VALUES)
#error "a constant is missing: src/backend/cuda/kernels/elementwise.rs declares them"
#endif
static_assert(ADDED == 4 && SILU_VALUES == 8, "16 bytes a thread");

template <class In> static __device__ __forceinline__ void embed(const In* table, const u32* tokens, int hidden, float* y) {
    const In* row = table + (long long)tokens[blockIdx.x] * hidden;
    y += (long long)blockIdx.x * hidden;
    for (int i = threadIdx.x; i < hidden; i += THREADS) y[i] = to_float(row[i]);
}

/// Rows of `table` `[vocabulary, hidden]` that `tokens` name, in f32. One block a token.
extern "C" __global__ void __launch_bounds__(THREADS) embed_half(const half* table, const u32* tokens, int hidden, float* y) {
    embed(table, tokens, hidden, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) embed_bf16(const bf16* table, const u32* tokens, int hidden, float* y) {
    embed(table, tokens, hidden, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) embed_float(const float* table, const u32* tokens, int hidden, float* y) {
    embed(table, tokens, hidden, y);
}

template <class T> static __device__ __forceinline__ void select(const T* x, const u32* rows, int columns, T* y) {
    const T* row = x + (long long)rows[blockIdx.x] * columns;
    y += (long long)blockIdx.x * columns;
    for (int i = threadIdx.x; i < columns; i += THREADS) y[i] = row[i];
}

/// Rows of `x` `[.., columns]` that `rows` names. One block a row of `y`.
extern "C" __global__ void __launch_bounds__(THREADS) select_half(const half* x, const u32* rows, int columns, half* y) {
    select(x, rows, columns, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) select_float(const float* x, const u32* rows, int columns, float* y) {
    select(x, rows, columns, y);
}

/// RMSNorm of each row of `x` `[rows, n]`, to f16. One block a row; four values a thread at a time
/// where rows begin at multiples of 16 bytes.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(const float* x, const float* weight, int n, float epsilon, half* y) {
    __shared__ float parts[THREADS / 32];
    x += (long long)blockIdx.x * n;
    y += (long long)blockIdx.x * n;
    int fours = n % 4 == 0 ? n / 4 : 0;
    const float4* x4 = reinterpret_cast<const float4*>(x);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < fours; i += THREADS) {
        float4 v = x4[i];
        sum += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    for (int i = 4 * fours + threadIdx.x; i < n; i += THREADS) sum += x[i] * x[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; i++) total += parts[i];
    float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(total, (float)n) + epsilon));
    const float4* weight4 = reinterpret_cast<const float4*>(weight);
    uint2* y4 = reinterpret_cast<uint2*>(y);
    for (int i = threadIdx.x; i < fours; i += THREADS) {
        float4 v = x4[i], w = weight4[i];
        y4[i] = make_uint2(pack_half2(v.x * inverse * w.x, v.y * inverse * w.y), pack_half2(v.z * inverse * w.z, v.w * inverse * w.w));
    }
    for (int i = 4 * fours + threadIdx.x; i < n; i += THREADS) y[i] = to_half(x[i] * inverse * weight[i]);
}

static __device__ __forceinline__ float silu_mul(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}
static __device__ __forceinline__ u32 silu_mul2(u32 gate, u32 up) {
    return pack_half2(silu_mul(low_half(gate), low_half(up)), silu_mul(high_half(gate), high_half(up)));
}

/// `x - y` in f16, held within its range: a hidden state may differ by more.
template <class In> static __device__ __forceinline__ void difference(const In* x, const In* y, long long count, half* to) {
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    float value = to_float(x[i]) - to_float(y[i]);
    // Comparisons, so that a NaN stays one.
    value = value > 65504.0f ? 65504.0f : value;
    to[i] = to_half(value < -65504.0f ? -65504.0f : value);
}
extern "C" __global__ void __launch_bounds__(THREADS) difference_half(const half* x, const half* y, long long count, half* to) {
    difference(x, y, count, to);
}
extern "C" __global__ void __launch_bounds__(THREADS) difference_float(const float* x, const float* y, long long count, half* to) {
    difference(x, y, count, to);
}

/// `gate = silu(gate) * up`, `count` values in place, eight a thread.
extern "C" __global__ void __launch_bounds__(THREADS) silu_mul_half(half* gate, const half* up, long long count) {
    long long first = ((long long)blockIdx.x * THREADS + threadIdx.x) * 8;
    if (first + 8 <= count) {
        uint4 g = *reinterpret_cast<const uint4*>(gate + first), u = *reinterpret_cast<const uint4*>(up + first);
        *reinterpret_cast<uint4*>(gate + first) = make_uint4(silu_mul2(g.x, u.x), silu_mul2(g.y, u.y), silu_mul2(g.z, u.z), silu_mul2(g.w, u.w));
    } else {
        for (long long i = first; i < count; i++) gate[i] = to_half(silu_mul(to_float(gate[i]), to_float(up[i])));
    }
}

/// `silu(gate) * up` of rows of `slots` values, each to the channel that `order` names; -1 is padding. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS)
    silu_mul_permuted(const half* gate, const half* up, const int* order, int slots, int channels, half* y) {
    const long long first = (long long)blockIdx.x * slots;
    for (int i = threadIdx.x; i < slots; i += THREADS) {
        const int channel = order[i];
        if (channel >= 0) y[(long long)blockIdx.x * channels + channel] = to_half(silu_mul(to_float(gate[first + i]), to_float(up[first + i])));
    }
}

/// `gate = gelu(gate) * up`, `count` values in place: `x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))`, which is GELU
/// approximated by a hyperbolic tangent.
extern "C" __global__ void __launch_bounds__(THREADS) gelu_mul_half(half* gate, const half* up, long long count) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    const float x = to_float(gate[i]);
    const float inner = 1.5957691f * (x + 0.044715f * x * x * x);
    gate[i] = to_half(__fdividef(x, 1.0f + __expf(-inner)) * to_float(up[i]));
}

/// `x *= factor`, `count` values.
extern "C" __global__ void __launch_bounds__(THREADS) scale_float(float* x, long long count, float factor) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) x[i] *= factor;
}

/// `x += factor * y`, `count` values, four a thread.
extern "C" __global__ void __launch_bounds__(THREADS) add_half(float* x, const half* y, long long count, float factor) {
    long long first = ((long long)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (first + 4 <= count) {
        float4 a = *reinterpret_cast<const float4*>(x + first);
        uint2 b = *reinterpret_cast<const uint2*>(y + first);
        a.x = fmaf(factor, low_half(b.x), a.x);
        a.y = fmaf(factor, high_half(b.x), a.y);
        a.z = fmaf(factor, low_half(b.y), a.z);
        a.w = fmaf(factor, high_half(b.y), a.w);
        *reinterpret_cast<float4*>(x + first) = a;
    } else {
        for (long long i = first; i < count; i++) x[i] = fmaf(factor, to_float(y[i]), x[i]);
    }
}

/// `x += y` in f32, `count` values, four a thread.
extern "C" __global__ void __launch_bounds__(THREADS) add_float(float* x, const float* y, long long count) {
    long long first = ((long long)blockIdx.x * THREADS + threadIdx.x) * 4;
    if (first + 4 <= count) {
        float4 a = *reinterpret_cast<const float4*>(x + first);
        const float4 b = *reinterpret_cast<const float4*>(y + first);
        a.x += b.x;
        a.y += b.y;
        a.z += b.z;
        a.w += b.w;
        *reinterpret_cast<float4*>(x + first) = a;
    } else {
        for (long long i = first; i < count; i++) x[i] += y[i];
    }
}

/// `y[row] += bias` for each row of `y` `[rows, n]`. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS) add_bias_half(half* y, const float* bias, int n) {
    y += (long long)blockIdx.x * n;
    for (int i = threadIdx.x; i < n; i += THREADS) y[i] = to_half(to_float(y[i]) + bias[i]);
}

/// RMSNorm of each of `vectors` vectors of `n` values, in place; one warp a vector.
extern "C" __global__ void __launch_bounds__(THREADS) norm_in_place(half* x, const float* weight, int vectors, int n, float epsilon) {
    const int vector = (int)(blockIdx.x * (THREADS / 32) + threadIdx.x / 32), lane = threadIdx.x % 32;
    if (vector >= vectors) return;
    x += (long long)vector * n;
    float sum = 0.0f;
    for (int i = lane; i < n; i += 32) sum = fmaf(to_float(x[i]), to_float(x[i]), sum);
    sum = warp_sum(sum);
    const float inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, (float)n) + epsilon));
    for (int i = lane; i < n; i += 32) x[i] = to_half(to_float(x[i]) * inverse * weight[i]);
}

/// `x[i] *= weights[i]`, rows of `n` values. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS) scale_rows_half(half* x, const float* weights, int n) {
    x += (long long)blockIdx.x * n;
    const float weight = weights[blockIdx.x];
    for (int i = threadIdx.x; i < n; i += THREADS) x[i] = to_half(to_float(x[i]) * weight);
}

/// `x[rows[i]] += weights[i] * y[i]`, rows of `n` values. One block a row; no row is named twice.
extern "C" __global__ void __launch_bounds__(THREADS) add_rows_half(float* x, const half* y, const u32* rows, const float* weights, int n) {
    x += (long long)rows[blockIdx.x] * n;
    y += (long long)blockIdx.x * n;
    const float weight = weights[blockIdx.x];
    for (int i = threadIdx.x; i < n; i += THREADS) x[i] = fmaf(weight, to_float(y[i]), x[i]);
}

/// `bad` becomes the least index of a value that is not finite, or with `to` (which gets the values in
/// f16) beyond f16.
template <class In> static __device__ __forceinline__ void convert(const In* x, long long count, half* to, u64* bad) {
    long long step = (long long)gridDim.x * THREADS;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < count; i += step) {
        float value = to_float(x[i]);
        if (to) {
            half rounded = to_half(value);
            to[i] = rounded;
            value = to_float(rounded);
        }
        if (!is_finite(value)) atomicMin(bad, (u64)i);
    }
}
extern "C" __global__ void __launch_bounds__(THREADS) convert_half(const half* x, long long count, half* to, u64* bad) {
    convert(x, count, to, bad);
}
extern "C" __global__ void __launch_bounds__(THREADS) convert_bf16(const bf16* x, long long count, half* to, u64* bad) {
    convert(x, count, to, bad);
}
extern "C" __global__ void __launch_bounds__(THREADS) convert_float(const float* x, long long count, half* to, u64* bad) {
    convert(x, count, to, bad);
}

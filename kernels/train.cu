// The backward pass (src/backend/train.rs has the equations), in f32: all of it that is no product and knows no heads.
//
// Sums over tokens are made in parts of PART_ROWS rows, which reduce.cu adds in order.

#if !defined(THREADS) || !defined(PART_ROWS)
#error "a constant is missing: src/backend/cuda/kernels/train.rs declares them"
#endif
#define WARPS (THREADS / 32)

/// The sum of all threads' values, in every thread.
static __device__ __forceinline__ double block_sum(double x) {
    __shared__ double parts[WARPS];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    double sum = 0.0;
    for (int i = 0; i < WARPS; i++) sum += parts[i];
    return sum;
}
static __device__ __forceinline__ float block_max(float x) {
    __shared__ float parts[WARPS];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) x = fmaxf(x, parts[i]);
    return x;
}

/// f16 as f32.
extern "C" __global__ void __launch_bounds__(THREADS) widen(const half* x, long long count, float* y) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) y[i] = to_float(x[i]);
}

/// Adds the gradient of RMSNorm's input to `d_x` `[rows, n]`; 1 / sqrt(mean of squares + epsilon) of each row goes to `inverses`.
/// One block a row.
template <class T> static __device__ __forceinline__ void norm_backward(const T* x, const float* weight, int n, float epsilon, const float* d_y, float* d_x, float* inverses) {
    const long long first = (long long)blockIdx.x * n;
    x += first, d_y += first, d_x += first;
    double squares = 0.0, dot = 0.0;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const float own = to_float(x[i]);
        squares += (double)own * own;
        dot += (double)own * (d_y[i] * weight[i]);
    }
    squares = block_sum(squares);
    dot = block_sum(dot);
    const float inverse = (float)(1.0 / sqrt(squares / n + epsilon)), along = inverse * inverse * (float)(dot / n);
    for (int i = threadIdx.x; i < n; i += THREADS) d_x[i] += inverse * (d_y[i] * weight[i] - to_float(x[i]) * along);
    if (threadIdx.x == 0) inverses[blockIdx.x] = inverse;
}
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_backward_float(const float* x, const float* weight, int n, float epsilon, const float* d_y, float* d_x, float* inverses) {
    norm_backward(x, weight, n, epsilon, d_y, d_x, inverses);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_backward_half(const half* x, const float* weight, int n, float epsilon, const float* d_y, float* d_x, float* inverses) {
    norm_backward(x, weight, n, epsilon, d_y, d_x, inverses);
}

/// Parts of the gradient of RMSNorm's weight, `[ceil(rows / PART_ROWS), n]`. Grid (ceil(n / THREADS), parts), a thread a column.
template <class T> static __device__ __forceinline__ void norm_weight_parts(const T* x, const float* d_y, const float* inverses, int rows, int n, double* parts) {
    const int column = blockIdx.x * THREADS + threadIdx.x, first = blockIdx.y * PART_ROWS;
    if (column >= n) return;
    double sum = 0.0;
    for (int row = first; row < min(first + PART_ROWS, rows); row++) {
        const long long at = (long long)row * n + column;
        sum += d_y[at] * (to_float(x[at]) * inverses[row]);
    }
    parts[(long long)blockIdx.y * n + column] = sum;
}
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_weight_parts_float(const float* x, const float* d_y, const float* inverses, int rows, int n, double* parts) {
    norm_weight_parts(x, d_y, inverses, rows, n, parts);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_weight_parts_half(const half* x, const float* d_y, const float* inverses, int rows, int n, double* parts) {
    norm_weight_parts(x, d_y, inverses, rows, n, parts);
}

/// The gradients of gate and, in place of `d_z`, of up.
extern "C" __global__ void __launch_bounds__(THREADS) silu_backward(const half* gate, const half* up, long long count, float* d_z, float* d_gate) {
    const long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count) return;
    const float g = to_float(gate[i]), d = d_z[i], logistic = 1.0f / (1.0f + expf(-g));
    d_gate[i] = d * to_float(up[i]) * (logistic * (1.0f + g * (1.0f - logistic)));
    d_z[i] = d * (g * logistic);
}

/// q - p in place of `changed`, the logits of q; those of p are `logits`, both `[rows, vocabulary]`. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS) divergence_backward(float* changed, const float* logits, int vocabulary) {
    const long long first = (long long)blockIdx.x * vocabulary;
    changed += first, logits += first;
    float most[2] = {__uint_as_float(0xff800000u), __uint_as_float(0xff800000u)};
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        most[0] = fmaxf(most[0], changed[i]);
        most[1] = fmaxf(most[1], logits[i]);
    }
    most[0] = block_max(most[0]);
    most[1] = block_max(most[1]);
    double sums[2] = {0.0, 0.0};
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        sums[0] += expf(changed[i] - most[0]);
        sums[1] += expf(logits[i] - most[1]);
    }
    const float of_q = (float)(1.0 / block_sum(sums[0])), of_p = (float)(1.0 / block_sum(sums[1]));
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) changed[i] = expf(changed[i] - most[0]) * of_q - expf(logits[i] - most[1]) * of_p;
}

/// A head's weights `[tokens, tokens]`, in place of `scores`, before their factor, and the gradient of these in place of `d_weights`. Token i
/// sees the `reach` tokens that end with it. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS) weights_backward(float* scores, float* d_weights, int tokens, int reach, float factor) {
    const int row = blockIdx.x, end = row + 1, first = max(end - reach, 0);
    scores += (long long)row * tokens;
    d_weights += (long long)row * tokens;
    float most = __uint_as_float(0xff800000u);
    for (int i = first + threadIdx.x; i < end; i += THREADS) most = fmaxf(most, scores[i]);
    most = block_max(most);
    double sum = 0.0, dot = 0.0;
    for (int i = first + threadIdx.x; i < end; i += THREADS) {
        const float weight = expf((scores[i] - most) * factor);
        scores[i] = weight;
        sum += weight;
        dot += (double)weight * d_weights[i];
    }
    sum = block_sum(sum);
    dot = block_sum(dot);
    const float inverse = (float)(1.0 / sum), mean = (float)(dot / sum);
    for (int i = threadIdx.x; i < tokens; i += THREADS) {
        const bool seen = i >= first && i < end;
        const float weight = seen ? scores[i] * inverse : 0.0f;
        scores[i] = weight;
        d_weights[i] = seen ? weight * (d_weights[i] - mean) * factor : 0.0f;
    }
}

/// Passes `d` `[tokens, width]` back through the quantizer of `x`: what was clipped has no gradient. `codes` `[tokens, groups * group_size]`,
/// `scales` `[groups, stride]`. Parts of the gradient of the clip ratio, `[ceil(tokens / PART_ROWS), groups]`. Grid (groups, parts), a warp a token.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantizer_backward(const float* x, const i8* codes, const float* scales, int stride, float* d, int tokens, int width, int groups, int group_size,
                       float least, float greatest, float clip, double* parts) {
    __shared__ double sums[WARPS];
    const int group = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = blockIdx.y * PART_ROWS;
    double sum = 0.0;
    for (int token = first + warp; token < min(first + PART_ROWS, tokens); token += WARPS) {
        const float scale = scales[(long long)group * stride + token];
        if (scale == 0.0f) continue;
        const float inverse = inverse_of(scale);
        const long long at = (long long)token * width + group * group_size, codes_at = (long long)token * groups * group_size + group * group_size;
        float of_scale = 0.0f;
        for (int k = lane; k < group_size; k += 32) {
            const float place = x[at + k] * inverse, number = (float)codes[codes_at + k], own = d[at + k];
            const bool inside = place >= least && place <= greatest;
            of_scale += own * (inside ? number - place : number);
            if (!inside) d[at + k] = 0.0f;
        }
        sum += (double)(warp_sum(of_scale) * (scale / clip));
    }
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < WARPS; i++) sum += sums[i];
    parts[(long long)blockIdx.y * groups + group] = sum;
}

/// The transposes of transform and permutation: from `d` `[tokens, width]` to `to` `[tokens, channels]`. `scale` is that of the transform
/// of blocks of `block` values, a power of two, of the first `grouped`, and 0 for none. One block a row, which has `width` floats of shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    permutation_backward(const float* d, const int* order, int width, int channels, int grouped, int block, float scale, float* to) {
    extern __shared__ float row[];
    d += (long long)blockIdx.x * width;
    to += (long long)blockIdx.x * channels;
    for (int i = threadIdx.x; i < width; i += THREADS) row[i] = d[i];
    for (int distance = 1; scale != 0.0f && distance < block; distance *= 2) {
        __syncthreads();
        for (int pair = threadIdx.x; pair < grouped / 2; pair += THREADS) {
            const int i = pair / distance * 2 * distance + pair % distance;
            const float a = row[i], b = row[i + distance];
            row[i] = a + b;
            row[i + distance] = a - b;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < width; i += THREADS)
        if (order[i] >= 0) to[order[i]] = scale != 0.0f && i < grouped ? row[i] * scale : row[i];
}

/// Gradients of scales of groups, `[ceil(rows / rows_per_scale), groups]`, from `d` `[rows, width]`, those of the weights that `codes`
/// `[rows, groups * group_size]` stand for. A warp a scale.
extern "C" __global__ void __launch_bounds__(THREADS)
    scale_gradients(const float* d, const i8* codes, int rows, int width, int groups, int group_size, int rows_per_scale, float* to) {
    const long long own = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    const int scale_row = int(own / groups), group = int(own % groups), first = scale_row * rows_per_scale;
    if (first >= rows) return;
    float sum = 0.0f;
    for (int row = first; row < min(first + rows_per_scale, rows); row++) {
        const float* products = d + (long long)row * width + group * group_size;
        const i8* numbers = codes + ((long long)row * groups + group) * group_size;
        for (int k = threadIdx.x % 32; k < group_size; k += 32) sum += products[k] * (float)numbers[k];
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) to[own] = sum;
}

/// The same of each row's `outliers`, the last columns of `d`: numbers are INT8 `codes` `[rows, padded]`, or `values` `[rows, outliers]`
/// divided by the row's scale. A warp a row.
extern "C" __global__ void __launch_bounds__(THREADS)
    outlier_gradients(const float* d, const i8* codes, int padded, const float* values, const float* scales, int rows, int width, int outliers, float* to) {
    const int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    const float* products = d + (long long)row * width + width - outliers;
    float sum = 0.0f;
    for (int k = threadIdx.x % 32; k < outliers; k += 32)
        sum += products[k] * (codes ? (float)codes[(long long)row * padded + k] : values[(long long)row * outliers + k] * inverse_of(scales[row]));
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) to[row] = sum;
}

// Sums over tokens and over the vocabulary. No atomics: every sum has one order, so results do not
// change from run to run.

#if !defined(THREADS) || !defined(ENERGY_CHANNELS)
#error "a constant is missing: src/backend/cuda/kernels/reduce.rs declares them"
#endif
static_assert(ENERGY_CHANNELS == 64, "two channels a lane");

/// Sums of squares of each channel of `x` `[tokens, channels]` over part `blockIdx.y` of the tokens,
/// `[parts, channels]`. A block has 64 channels, two a lane; its warps take turns with the tokens.
extern "C" __global__ void __launch_bounds__(THREADS) energy_parts(const half* x, int tokens, int channels, int tokens_per_part, double* parts) {
    __shared__ double sums[THREADS / 32][64];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int channel = blockIdx.x * 64 + 2 * lane;
    int first = blockIdx.y * tokens_per_part, end = min(tokens, first + tokens_per_part);
    bool pairs = channels % 2 == 0 && channel + 1 < channels;
    double low = 0.0, high = 0.0;
    // Sixteen squares at a time are summed in f32, whose rounding is far below the energies' use.
    for (int token = first + warp; token < end;) {
        float a = 0.0f, b = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; i++, token += THREADS / 32) {
            if (token >= end) break;
            const half* row = x + (long long)token * channels;
            if (pairs) {
                u32 two = *reinterpret_cast<const u32*>(row + channel);
                a = fmaf(low_half(two), low_half(two), a);
                b = fmaf(high_half(two), high_half(two), b);
            } else {
                if (channel < channels) a = fmaf(to_float(row[channel]), to_float(row[channel]), a);
                if (channel + 1 < channels) b = fmaf(to_float(row[channel + 1]), to_float(row[channel + 1]), b);
            }
        }
        low += a;
        high += b;
    }
    sums[warp][2 * lane] = low;
    sums[warp][2 * lane + 1] = high;
    __syncthreads();
    int own = threadIdx.x;
    if (own < 64 && blockIdx.x * 64 + own < channels) {
        double sum = 0.0;
#pragma unroll
        for (int i = 0; i < THREADS / 32; i++) sum += sums[i][own];
        parts[(long long)blockIdx.y * channels + blockIdx.x * 64 + own] = sum;
    }
}

/// Sums over the tokens of one head of one window, `keys` `[windows, heads, seq_len, width]`: a block each,
/// `sums` `[windows, heads, head_dim]`. Warps take turns with the tokens, lanes with the channels.
extern "C" __global__ void __launch_bounds__(THREADS) key_parts(const half* keys, int seq_len, int head_dim, int width, double* sums) {
    __shared__ double parts[THREADS / 32][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    keys += (long long)blockIdx.x * seq_len * width;
    for (int first = 0; first < head_dim; first += 32) {
        double sum = 0.0;
        if (first + lane < head_dim) {
            for (int token = warp; token < seq_len; token += THREADS / 32) sum += to_float(keys[(long long)token * width + first + lane]);
        }
        parts[warp][lane] = sum;
        __syncthreads();
        if (warp == 0 && first + lane < head_dim) {
            for (int i = 1; i < THREADS / 32; i++) sum += parts[i][lane];
            sums[(long long)blockIdx.x * head_dim + first + lane] = sum;
        }
        __syncthreads();
    }
}

/// Sums `parts` `[parts, channels]` in order.
extern "C" __global__ void __launch_bounds__(THREADS) sum_parts(const double* parts, int count, int channels, double* sums) {
    int channel = blockIdx.x * THREADS + threadIdx.x;
    if (channel >= channels) return;
    double sum = 0.0;
    for (int part = 0; part < count; part++) sum += parts[(long long)part * channels + channel];
    sums[channel] = sum;
}

/// Negative log likelihood of each row's target under `logits` `[rows, vocabulary]`, in nats. One block
/// a row.
extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy(const float* logits, const u32* targets, int vocabulary, double* nats) {
    __shared__ float most_of[THREADS / 32];
    __shared__ double sum_of[THREADS / 32];
    logits += (long long)blockIdx.x * vocabulary;
    float most = __uint_as_float(0xff800000u);
    bool sound = true;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        sound = sound && logits[i] == logits[i];
        most = fmaxf(most, logits[i]);
    }
    sound = __syncthreads_and(sound);
    most = warp_max(most);
    if (threadIdx.x % 32 == 0) most_of[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < THREADS / 32; i++) most = fmaxf(most, most_of[i]);
    double sum = 0.0;
    float part = 0.0f;
    int taken = 0;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        part += expf(logits[i] - most);
        if (++taken % 16 == 0) {
            sum += part;
            part = 0.0f;
        }
    }
    sum = warp_sum(sum + part);
    if (threadIdx.x % 32 == 0) sum_of[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (int i = 0; i < THREADS / 32; i++) total += sum_of[i];
        // fmaxf passes over a NaN.
        nats[blockIdx.x] = sound ? log(total) + most - logits[targets[blockIdx.x]] : __longlong_as_double(0x7ff8000000000000ll);
    }
}

/// The first of the largest `logits` `[rows, vocabulary]` of each row. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS) argmax(const float* logits, int vocabulary, u32* tokens) {
    __shared__ float most_of[THREADS / 32];
    __shared__ u32 first_of[THREADS / 32];
    logits += (long long)blockIdx.x * vocabulary;
    float most = __uint_as_float(0xff800000u);
    u32 first = 0xffffffffu;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        if (logits[i] > most) {
            most = logits[i];
            first = i;
        }
    }
    float all = warp_max(most);
    // The least of those that have it, as the largest complement.
    first = ~warp_max(most == all ? ~first : 0u);
    if (threadIdx.x % 32 == 0) {
        most_of[threadIdx.x / 32] = all;
        first_of[threadIdx.x / 32] = first;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < THREADS / 32; i++) {
            if (most_of[i] > all || (most_of[i] == all && first_of[i] < first)) {
                all = most_of[i];
                first = first_of[i];
            }
        }
        tokens[blockIdx.x] = first;
    }
}

/// Sums of `a * b` over the blocks' parts of `count` values.
extern "C" __global__ void __launch_bounds__(THREADS) dot_parts(const float* a, const float* b, long long count, double* parts) {
    __shared__ double sum_of[THREADS / 32];
    long long per_block = (count + gridDim.x - 1) / gridDim.x, first = blockIdx.x * per_block;
    long long end = min(count, first + per_block);
    double sum = 0.0;
    for (long long i = first + threadIdx.x; i < end; i += THREADS) sum += (double)a[i] * (double)b[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sum_of[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (int i = 0; i < THREADS / 32; i++) total += sum_of[i];
        parts[blockIdx.x] = total;
    }
}

/// `|x - y|^2 / |y|^2` of rows `[columns]`; 0 where nothing changed. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS) relative_squared_errors(const float* x, const float* y, int columns, double* errors) {
    __shared__ double change_of[THREADS / 32], total_of[THREADS / 32];
    x += (long long)blockIdx.x * columns;
    y += (long long)blockIdx.x * columns;
    double change = 0.0, total = 0.0;
    for (int i = threadIdx.x; i < columns; i += THREADS) {
        double difference = (double)x[i] - (double)y[i];
        change += difference * difference;
        total += (double)y[i] * (double)y[i];
    }
    change = warp_sum(change);
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) {
        change_of[threadIdx.x / 32] = change;
        total_of[threadIdx.x / 32] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        change = total = 0.0;
        for (int i = 0; i < THREADS / 32; i++) {
            change += change_of[i];
            total += total_of[i];
        }
        errors[blockIdx.x] = change == 0.0 ? 0.0 : change / total;
    }
}

/// KL(p || q) in nats of the distributions with `logits` `[rows, vocabulary]` (p) and `changed` (q). One
/// block a row. With t = p's logit less its greatest and s likewise of q: sum p (t - s) - ln sum e^t + ln sum e^s,
/// p = e^t / sum e^t. A NaN in either stays one.
extern "C" __global__ void __launch_bounds__(THREADS) kl_divergence(const float* changed, const float* logits, int vocabulary, double* nats) {
    __shared__ float most_of[2][THREADS / 32];
    __shared__ double sum_of[3][THREADS / 32];
    logits += (long long)blockIdx.x * vocabulary;
    changed += (long long)blockIdx.x * vocabulary;
    float most = __uint_as_float(0xff800000u), other = most;
    bool sound = true;
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        sound = sound && logits[i] == logits[i] && changed[i] == changed[i];
        most = fmaxf(most, logits[i]);
        other = fmaxf(other, changed[i]);
    }
    sound = __syncthreads_and(sound);
    most = warp_max(most);
    other = warp_max(other);
    if (threadIdx.x % 32 == 0) {
        most_of[0][threadIdx.x / 32] = most;
        most_of[1][threadIdx.x / 32] = other;
    }
    __syncthreads();
    for (int i = 0; i < THREADS / 32; i++) {
        most = fmaxf(most, most_of[0][i]);
        other = fmaxf(other, most_of[1][i]);
    }
    double sums[3] = {0.0, 0.0, 0.0};
    for (int i = threadIdx.x; i < vocabulary; i += THREADS) {
        float t = logits[i] - most, s = changed[i] - other, weight = expf(t);
        sums[0] += weight;
        sums[1] += expf(s);
        sums[2] += (double)weight * ((double)t - (double)s);
    }
#pragma unroll
    for (int k = 0; k < 3; k++) {
        sums[k] = warp_sum(sums[k]);
        if (threadIdx.x % 32 == 0) sum_of[k][threadIdx.x / 32] = sums[k];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double total[3] = {0.0, 0.0, 0.0};
        for (int i = 0; i < THREADS / 32; i++) {
            for (int k = 0; k < 3; k++) total[k] += sum_of[k][i];
        }
        nats[blockIdx.x] = sound ? total[2] / total[0] - log(total[0]) + log(total[1]) : __longlong_as_double(0x7ff8000000000000ll);
    }
}

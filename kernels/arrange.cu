// A site's channel order, its transform and its quantization (docs/format.md; src/quant/site.rs is the
// definition, and these kernels give its bits). Also the way back from codes to values.
//
// One block of threads a row: the row is staged in shared memory, since the order picks from all over
// it, and each warp makes whole groups. Lane l holds the group's values l * LANE_VALUES and on, so
// that codes leave in whole words, and the transform's butterflies are registers for small distances
// and shuffles for the others.
//
// GROUP      channels of a group, a multiple of 16
// TRANSFORM  1: Hadamard transform of each group
// IN         half, bf16 or float: the row's type

#ifndef THREADS
#define THREADS 256
#endif
#define WARPS (THREADS / 32)

// The largest power of two that divides a group: the length of the transform's blocks.
#define BLOCK (GROUP & -GROUP)

// Groups that fit a warp's registers; any other is worked on in shared memory.
#if GROUP == 32 || GROUP == 64 || GROUP == 128 || GROUP == 256 || GROUP == 512 || GROUP == 1024
#define IN_REGISTERS 1
#define LANE_VALUES (GROUP / 32)
#else
#define IN_REGISTERS 0
#define LANE_VALUES 1
#endif

// 1 / sqrt(BLOCK), computed in f64 and rounded once.
static __device__ __forceinline__ float block_scale() {
    constexpr int log = BLOCK == 1 ? 0 : BLOCK == 2 ? 1 : BLOCK == 4 ? 2 : BLOCK == 8 ? 3 : BLOCK == 16 ? 4
        : BLOCK == 32 ? 5 : BLOCK == 64 ? 6 : BLOCK == 128 ? 7 : BLOCK == 256 ? 8 : BLOCK == 512 ? 9 : BLOCK == 1024 ? 10
        : BLOCK == 2048 ? 11 : BLOCK == 4096 ? 12 : BLOCK == 8192 ? 13 : BLOCK == 16384 ? 14 : 15;
    constexpr double halved = 1.0 / (double)(1 << (log / 2));
    return (float)(log % 2 == 0 ? halved : halved * 0.70710678118654752440);
}

struct Row {
    const IN* values;
    const int* order;

    __device__ __forceinline__ float at(int place) const { return pick(order[place]); }
    __device__ __forceinline__ float pick(int channel) const { return channel < 0 ? 0.0f : to_float(values[channel]); }
};

/// Copies a row to shared memory where `staged` says that there is room for it.
static __device__ __forceinline__ Row stage(const IN* row, const int* order, int channels, bool staged, IN* shared) {
    if (!staged) return Row{row, order};
    if (channels * sizeof(IN) % 16 == 0) {
        const uint4* from = reinterpret_cast<const uint4*>(row);
        uint4* to = reinterpret_cast<uint4*>(shared);
        for (int i = threadIdx.x; i < channels * (int)sizeof(IN) / 16; i += THREADS) to[i] = from[i];
    } else {
        for (int i = threadIdx.x; i < channels; i += THREADS) shared[i] = row[i];
    }
    __syncthreads();
    return Row{shared, order};
}

#if IN_REGISTERS
/// A warp's share of one group, transformed.
struct Group {
    float v[LANE_VALUES];

    __device__ __forceinline__ void load(const Row& row, int group, float*) {
        int lane = threadIdx.x % 32, first = group * GROUP + lane * LANE_VALUES;
#if LANE_VALUES % 4 == 0
#pragma unroll
        for (int i = 0; i < LANE_VALUES; i += 4) {
            int4 channels = *reinterpret_cast<const int4*>(row.order + first + i);
            v[i] = row.pick(channels.x);
            v[i + 1] = row.pick(channels.y);
            v[i + 2] = row.pick(channels.z);
            v[i + 3] = row.pick(channels.w);
        }
#else
#pragma unroll
        for (int i = 0; i < LANE_VALUES; i++) v[i] = row.at(first + i);
#endif
        if (TRANSFORM) transform();
    }

    __device__ __forceinline__ void transform() {
#pragma unroll
        for (int distance = 1; distance < LANE_VALUES; distance *= 2) {
#pragma unroll
            for (int i = 0; i < LANE_VALUES; i++) {
                if (i & distance) continue;
                float a = v[i], b = v[i + distance];
                v[i] = a + b;
                v[i + distance] = a - b;
            }
        }
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            bool upper = threadIdx.x & distance;
#pragma unroll
            for (int i = 0; i < LANE_VALUES; i++) {
                float other = __shfl_xor_sync(0xffffffffu, v[i], distance);
                v[i] = upper ? other - v[i] : v[i] + other;
            }
        }
#pragma unroll
        for (int i = 0; i < LANE_VALUES; i++) v[i] *= block_scale();
    }

    template <class Visit> __device__ __forceinline__ void each(Visit visit) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < LANE_VALUES; i++) visit(lane * LANE_VALUES + i, v[i]);
    }
};
#else
/// One group in a warp's part of shared memory, transformed.
struct Group {
    float* v;

    __device__ void load(const Row& row, int group, float* shared) {
        v = shared + (threadIdx.x / 32) * GROUP;
        int lane = threadIdx.x % 32;
        __syncwarp();
        for (int i = lane; i < GROUP; i += 32) v[i] = row.at(group * GROUP + i);
        __syncwarp();
        if (TRANSFORM) transform();
    }

    __device__ void transform() {
        int lane = threadIdx.x % 32;
        for (int distance = 1; distance < BLOCK; distance *= 2) {
            for (int pair = lane; pair < GROUP / 2; pair += 32) {
                int i = pair / distance * 2 * distance + pair % distance;
                float a = v[i], b = v[i + distance];
                v[i] = a + b;
                v[i + distance] = a - b;
            }
            __syncwarp();
        }
        for (int i = lane; i < GROUP; i += 32) v[i] *= block_scale();
        __syncwarp();
    }

    template <class Visit> __device__ void each(Visit visit) {
        for (int i = threadIdx.x % 32; i < GROUP; i += 32) visit(i, v[i]);
        __syncwarp();
    }
};
#endif

/// Shared memory: the staged row, rounded up to 16 bytes, then the groups that are not in registers.
static __device__ __forceinline__ float* groups_of(unsigned char* shared, int channels, bool staged) {
    return reinterpret_cast<float*>(shared + (staged ? (channels * sizeof(IN) + 15) / 16 * 16 : 0));
}

extern __shared__ __align__(16) unsigned char shared_bytes[];

template <class Out> static __device__ __forceinline__ void arrange(
    const IN* x, const int* order, int channels, int groups, int outliers, int staged, Out* y
) {
    long long token = blockIdx.x;
    int width = groups * GROUP + outliers;
    Row row = stage(x + token * channels, order, channels, staged, reinterpret_cast<IN*>(shared_bytes));
    float* spare = groups_of(shared_bytes, channels, staged);
    y += token * width;
    Group values;
    for (int group = threadIdx.x / 32; group < groups; group += WARPS) {
        values.load(row, group, spare);
        values.each([&](int i, float value) { store(y + group * GROUP + i, value); });
    }
    for (int i = groups * GROUP + threadIdx.x; i < width; i += THREADS) store(y + i, row.at(i));
}

/// `[rows, channels]` in the site's order, transformed, `[rows, width]`. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS) arrange_to_half(
    const IN* x, const int* order, int channels, int groups, int outliers, int staged, half* y
) {
    arrange(x, order, channels, groups, outliers, staged, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) arrange_to_float(
    const IN* x, const int* order, int channels, int groups, int outliers, int staged, float* y
) {
    arrange(x, order, channels, groups, outliers, staged, y);
}

/// The scale of a clipped absmax, and its inverse; the first is infinite if f16 cannot hold it.
static __device__ __forceinline__ float scale_of(float absmax, float clip, float greatest) {
    return to_float(to_half(__fdiv_rn(absmax * clip, greatest)));
}
static __device__ __forceinline__ float inverse_of(float scale) { return scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale); }

static __device__ __forceinline__ int code_of(float value, float inverse, float least, float greatest) {
    return (int)fminf(fmaxf(rintf(value * inverse), least), greatest);
}

/// Quantizes `[tokens, channels]`: codes `[tokens, groups * GROUP]`, scales `[groups, scale_stride]`; the
/// outliers' codes `[tokens, padded_outliers]` with zeros behind and scales `[tokens]`, or with
/// `f16_outliers` their values `[tokens, outliers]`. `bad` becomes the least row that holds a value
/// that is not finite or beyond f16. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS, 4) quantize(
    const IN* x, const int* order, int channels, int groups, int outliers, int padded_outliers, int f16_outliers, int staged,
    float clip, float least, float greatest, i8* codes, float* scales, int scale_stride, i8* outlier_codes, float* outlier_scales,
    float* outlier_values, u32* bad
) {
    long long token = blockIdx.x;
    int lane = threadIdx.x % 32;
    Row row = stage(x + token * channels, order, channels, staged, reinterpret_cast<IN*>(shared_bytes));
    float* spare = groups_of(shared_bytes, channels, staged);
    bool sound = true;
    Group values;
    for (int group = threadIdx.x / 32; group < groups; group += WARPS) {
        values.load(row, group, spare);
        u32 most = 0;
        values.each([&](int, float value) { most = max(most, magnitude(value)); });
        float scale = scale_of(__uint_as_float(warp_max(most)), clip, greatest);
        float inverse = inverse_of(scale);
        sound = sound && is_finite(scale);
        if (lane == 0) scales[(long long)group * scale_stride + token] = scale;
        i8* to = codes + (token * groups + group) * GROUP;
#if IN_REGISTERS && LANE_VALUES % 4 == 0
#pragma unroll
        for (int i = 0; i < LANE_VALUES; i += 4) {
            u32 word = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) word |= (u32)(code_of(values.v[i + j], inverse, least, greatest) & 0xff) << (8 * j);
            *reinterpret_cast<u32*>(to + lane * LANE_VALUES + i) = word;
        }
#else
        values.each([&](int i, float value) { to[i] = (i8)code_of(value, inverse, least, greatest); });
#endif
    }
    // The last warp has the fewest groups, or none.
    if (outliers > 0 && threadIdx.x / 32 == WARPS - 1) {
        int first = groups * GROUP;
        if (f16_outliers) {
            for (int i = lane; i < outliers; i += 32) {
                float value = to_float(to_half(row.at(first + i)));
                sound = sound && is_finite(value);
                outlier_values[token * outliers + i] = value;
            }
        } else {
            u32 most = 0;
            for (int i = lane; i < outliers; i += 32) most = max(most, magnitude(row.at(first + i)));
            float scale = scale_of(__uint_as_float(warp_max(most)), 1.0f, 127.0f);
            float inverse = inverse_of(scale);
            sound = sound && is_finite(scale);
            if (lane == 0) outlier_scales[token] = scale;
            for (int i = lane; i < padded_outliers; i += 32) {
                float value = i < outliers ? row.at(first + i) : 0.0f;
                outlier_codes[token * padded_outliers + i] = (i8)code_of(value, inverse, -127.0f, 127.0f);
            }
        }
    }
    if (!sound) atomicMin(bad, (u32)token);
}

template <class Out> static __device__ __forceinline__ void dequantize(
    const i8* codes, const float* scales, const i8* outlier_codes, const float* outlier_scales, const float* outlier_values,
    int groups, int outliers, int padded_outliers, int rows_per_scale, int row_stride, int group_stride, Out* y
) {
    long long row = blockIdx.x;
    int grouped = groups * GROUP, width = grouped + outliers;
    codes += row * grouped;
    scales += row / rows_per_scale * row_stride;
    y += row * width;
    bool aligned = width % 8 == 0;
    // Sixteen codes a thread: they lie in one group.
    for (int i = threadIdx.x * 16; i < grouped; i += THREADS * 16) {
        int4 packed = *reinterpret_cast<const int4*>(codes + i);
        const i8* code = reinterpret_cast<const i8*>(&packed);
        float scale = scales[(long long)(i / GROUP) * group_stride];
        if (sizeof(Out) == 2 && aligned) {
            u32 words[8];
#pragma unroll
            for (int j = 0; j < 8; j++) words[j] = pack_half2((float)code[2 * j] * scale, (float)code[2 * j + 1] * scale);
            uint4* to = reinterpret_cast<uint4*>(y + i);
            to[0] = make_uint4(words[0], words[1], words[2], words[3]);
            to[1] = make_uint4(words[4], words[5], words[6], words[7]);
        } else {
#pragma unroll
            for (int j = 0; j < 16; j++) store(y + i + j, (float)code[j] * scale);
        }
    }
    for (int i = threadIdx.x; i < outliers; i += THREADS) {
        float value = outlier_values ? outlier_values[row * outliers + i]
                                     : (float)outlier_codes[row * padded_outliers + i] * outlier_scales[row];
        store(y + grouped + i, value);
    }
}

/// The values that codes stand for, `[rows, groups * GROUP + outliers]`, of activations
/// (`rows_per_scale` 1) or of weights; the scale of a row and group is
/// `scales[row / rows_per_scale * row_stride + group * group_stride]`. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS) dequantize_to_half(
    const i8* codes, const float* scales, const i8* outlier_codes, const float* outlier_scales, const float* outlier_values,
    int groups, int outliers, int padded_outliers, int rows_per_scale, int row_stride, int group_stride, half* y
) {
    dequantize(codes, scales, outlier_codes, outlier_scales, outlier_values, groups, outliers, padded_outliers, rows_per_scale, row_stride, group_stride, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) dequantize_to_float(
    const i8* codes, const float* scales, const i8* outlier_codes, const float* outlier_scales, const float* outlier_values,
    int groups, int outliers, int padded_outliers, int rows_per_scale, int row_stride, int group_stride, float* y
) {
    dequantize(codes, scales, outlier_codes, outlier_scales, outlier_values, groups, outliers, padded_outliers, rows_per_scale, row_stride, group_stride, y);
}

/// For each row of a weight `[rows, channels]` and of its codes: the sums over the source's channels of
/// `energy * (w - q)^2` and of `energy * w^2`, `[rows, 2]`. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS, 4) energy_errors(
    const IN* x, const int* order, int channels, int groups, int outliers, int padded_outliers, int staged, const i8* codes,
    const float* scales, const i8* outlier_codes, const float* outlier_scales, const float* outlier_values, int rows_per_scale,
    const double* energy, double* sums
) {
    __shared__ double parts[WARPS][2];
    long long own = blockIdx.x;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Row row = stage(x + own * channels, order, channels, staged, reinterpret_cast<IN*>(shared_bytes));
    float* spare = groups_of(shared_bytes, channels, staged);
    double lost = 0.0, total = 0.0;
    Group values;
    for (int group = warp; group < groups; group += WARPS) {
        values.load(row, group, spare);
        float scale = scales[own / rows_per_scale * groups + group];
        const i8* code = codes + (own * groups + group) * GROUP;
        values.each([&](int i, float& value) { value = (float)code[i] * scale - value; });
        // The transform is its own inverse: back to single channels.
        if (TRANSFORM) values.transform();
        values.each([&](int i, float& value) {
            int channel = order[group * GROUP + i];
            if (channel >= 0) lost += energy[channel] * ((double)value * value);
        });
    }
    for (int i = threadIdx.x; i < outliers; i += THREADS) {
        int place = groups * GROUP + i;
        float value = outlier_values ? outlier_values[own * outliers + i]
                                     : (float)outlier_codes[own * padded_outliers + i] * outlier_scales[own];
        double error = value - row.at(place);
        lost += energy[order[place]] * (error * error);
    }
    for (int i = threadIdx.x; i < channels; i += THREADS) {
        double value = to_float(row.values[i]);
        total += energy[i] * (value * value);
    }
    lost = warp_sum(lost);
    total = warp_sum(total);
    if (lane == 0) {
        parts[warp][0] = lost;
        parts[warp][1] = total;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        double sum = 0.0;
        for (int i = 0; i < WARPS; i++) sum += parts[i][threadIdx.x];
        sums[2 * own + threadIdx.x] = sum;
    }
}

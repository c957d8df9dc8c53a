// A site's channel order, its transform and its quantization (docs/format.md; src/quant/site.rs is the
// definition, and these kernels compute its bits). Also the way back from codes to values.
//
// One thread block a row: the row is staged in shared memory, since the order picks from all over
// it, and each warp makes entire groups. Lane l holds the group's values l * LANE_VALUES and on, so
// that codes are stored in entire words, and the transform's butterflies are registers for small distances
// and shuffles for the others.
//
// GROUP      channels of a group, a multiple of 16
// TRANSFORM  1: Hadamard transform of each group
// IN         half, bf16 or float: the row's type
// THREADS    threads of a block
// IN_REGISTERS  1: groups are worked on in registers; 0: in shared memory
// CODES      1: `quantize` is compiled; IN is half
// PAIRED     1: `quantize` takes two rows a block (see Span); GROUP is 32, 64, 128 or 256
// FP4        1: `quantize` makes FP4 codes, doubled numbers of E2M1; 0: integers
// SCALE_GRID the grid that scales of groups are rounded to (common.cuh)
// FP8        1: outliers that are no codes are FP8 (E4M3) times a scale; 0: f16

#if !defined(GROUP) || !defined(TRANSFORM) || !defined(IN) || !defined(THREADS) || !defined(PAIRED) || !defined(FP4) || \
    !defined(FP8) || !defined(CODES) || !defined(IN_REGISTERS) || !defined(ROW_MULTIPLE) || !defined(PAIR_HEAD_WORDS) || \
    !defined(SCALE_GRID)
#error "a constant is missing: src/backend/cuda/kernels/permute.rs declares them"
#endif

#define WARPS (THREADS / 32)

// The largest power of two that divides a group: the length of the transform's blocks.
#define BLOCK (GROUP & -GROUP)

// Groups that fit a warp's registers; any other is worked on in shared memory.
#if IN_REGISTERS
#define LANE_VALUES (GROUP / 32)
#else
#define LANE_VALUES 1
#endif

static constexpr float BLOCK_SCALE = hadamard_scale<BLOCK>();

struct Row {
    const IN* values;
    const int* order;

    __device__ __forceinline__ float at(int slot) const { return pick(order[slot]); }
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
/// A warp's part of one group, transformed.
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
        for (int i = 0; i < LANE_VALUES; i++) v[i] *= BLOCK_SCALE;
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
        for (int i = lane; i < GROUP; i += 32) v[i] *= BLOCK_SCALE;
        __syncwarp();
    }

    template <class Visit> __device__ void each(Visit visit) {
        for (int i = threadIdx.x % 32; i < GROUP; i += 32) visit(i, v[i]);
        __syncwarp();
    }
};
#endif

/// Shared memory: the staged row, rounded up to 16 bytes, then the groups that are not in registers.
static __device__ __forceinline__ float* groups_of(u8* shared, int channels, bool staged) {
    return reinterpret_cast<float*>(shared + (staged ? (channels * sizeof(IN) + ROW_MULTIPLE - 1) / ROW_MULTIPLE * ROW_MULTIPLE : 0));
}

extern __shared__ __align__(16) u8 shared_bytes[];

template <class Out> static __device__ __forceinline__ void permute(
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
extern "C" __global__ void __launch_bounds__(THREADS) permute_to_half(
    const IN* x, const int* order, int channels, int groups, int outliers, int staged, half* y
) {
    permute(x, order, channels, groups, outliers, staged, y);
}
extern "C" __global__ void __launch_bounds__(THREADS) permute_to_float(
    const IN* x, const int* order, int channels, int groups, int outliers, int staged, float* y
) {
    permute(x, order, channels, groups, outliers, staged, y);
}

#if CODES
/// The code of a value in a group: as code_of, or FP4.
static __device__ __forceinline__ u32 group_code(float value, float inverse, float least, float greatest) {
#if FP4
    return __float_as_uint(nearest_e2m1_doubled(value * inverse) + 12582912.0f);
#else
    return code_of(value, inverse, least, greatest);
#endif
}

#if PAIRED
/// Values of a span: 256 slots of the order, of two rows.
#define SPAN 256

/// Stages two rows, the values of a channel next to each other in one word: one access to shared memory
/// then gathers for both rows, and the order is read once for both. Word -1, which is what an order's
/// -1 picks, is zero.
static __device__ __forceinline__ const u32* stage_pair(const IN* first, const IN* second, int channels, u32* shared) {
    u32* row = shared + PAIR_HEAD_WORDS;
    if (threadIdx.x == 0) row[-1] = 0;
    if (channels % 4 == 0) {
        constexpr int FLIGHT = 4;
        const uint2 *left = reinterpret_cast<const uint2*>(first), *right = reinterpret_cast<const uint2*>(second);
        for (int start = threadIdx.x; start < channels / 4; start += FLIGHT * THREADS) {
            uint2 a[FLIGHT], b[FLIGHT];
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) {
                int at = start + i * THREADS;
                if (at < channels / 4) {
                    a[i] = load_uncached(left + at);
                    b[i] = load_uncached(right + at);
                }
            }
#pragma unroll
            for (int i = 0; i < FLIGHT; i++) {
                int at = start + i * THREADS;
                if (at < channels / 4)
                    reinterpret_cast<uint4*>(row)[at] =
                        make_uint4(__byte_perm(a[i].x, b[i].x, 0x5410), __byte_perm(a[i].x, b[i].x, 0x7632),
                                   __byte_perm(a[i].y, b[i].y, 0x5410), __byte_perm(a[i].y, b[i].y, 0x7632));
            }
        }
    } else {
        for (int i = threadIdx.x; i < channels; i += THREADS) row[i] = first[i].bits | (u32)second[i].bits << 16;
    }
    __syncthreads();
    return row;
}

/// A warp's part of a pair of rows: the groups of one span, transformed.
///
/// Shuffles and gathers from shared memory, not arithmetic, limit the speed. With sixteen
/// neighbouring values of one row in a lane four of the butterflies' distances are registers, the
/// groups of eight lanes (for GROUP 128) share each remaining shuffle and each division, and codes
/// leave sixteen bytes at a time. But the order is read, and the words of both rows are gathered, best
/// with the slots of lanes side by side. Between the two forms lie two exchanges, made with 16-bit
/// values still packed, so that each costs a quarter of what a butterfly of distance 4 would:
///
///     bits of a slot, and the row   registers       lanes
///     gathered                       0 1 7 row       2 3 4 5 6
///     slot 7 against slot 2        0 1 2 row       7 3 4 5 6
///     row against slot 3            0 1 2 3         7 row 4 5 6
struct Span {
    float v[16];

    __device__ __forceinline__ static int row() { return threadIdx.x >> 1 & 1; }
    /// The slot of the first value, from the span's first on.
    __device__ __forceinline__ static int slot() { return (threadIdx.x & 1) * 128 + (threadIdx.x >> 2 & 7) * 16; }

    /// The span that begins at slot `first`; zeros from slot `end` on.
    __device__ __forceinline__ void load(const u32* words, const int* order, int first, int end) {
        const u32 all = 0xffffffffu;
        int lane = threadIdx.x % 32, near = first + lane * 4, far = near + 128;
        int4 nothing = make_int4(-1, -1, -1, -1);
        int4 here = near < end ? *reinterpret_cast<const int4*>(order + near) : nothing;
        int4 there = far < end ? *reinterpret_cast<const int4*>(order + far) : nothing;
        u32 low[4] = {words[here.x], words[here.y], words[here.z], words[here.w]};
        u32 high[4] = {words[there.x], words[there.y], words[there.z], words[there.w]};
        u32 eight[8];
        bool upper = lane & 1;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 other = __shfl_xor_sync(all, upper ? low[i] : high[i], 1);
            eight[i] = upper ? other : low[i];
            eight[4 + i] = upper ? high[i] : other;
        }
        upper = lane & 2;
        u32 own_halves = upper ? 0x7632 : 0x5410, other_halves = upper ? 0x5410 : 0x7632;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 own = __byte_perm(eight[2 * i], eight[2 * i + 1], own_halves);
            u32 other = __shfl_xor_sync(all, __byte_perm(eight[2 * i], eight[2 * i + 1], other_halves), 2);
            u32 left = upper ? other : own, right = upper ? own : other;
            v[2 * i] = to_float(IN{(u16)left});
            v[2 * i + 1] = to_float(IN{(u16)(left >> 16)});
            v[8 + 2 * i] = to_float(IN{(u16)right});
            v[8 + 2 * i + 1] = to_float(IN{(u16)(right >> 16)});
        }
        if (TRANSFORM) transform();
    }

    __device__ __forceinline__ void transform() {
#pragma unroll
        for (int distance = 1; distance < 16; distance *= 2) {
#pragma unroll
            for (int i = 0; i < 16; i++) {
                if (i & distance) continue;
                float a = v[i], b = v[i + distance];
                v[i] = a + b;
                v[i + distance] = a - b;
            }
        }
        butterfly<16>(4);
        butterfly<32>(8);
        butterfly<64>(16);
        butterfly<128>(1);
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] *= BLOCK_SCALE;
    }

    /// A product with 1 or -1 is exact: one instruction adds or subtracts.
    template <int DISTANCE> __device__ __forceinline__ void butterfly(int lanes) {
        if (DISTANCE >= GROUP) return;
        float sign = threadIdx.x & lanes ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < 16; i++) v[i] = fmaf(v[i], sign, __shfl_xor_sync(0xffffffffu, v[i], lanes));
    }

    /// The peak of the lane's group.
    __device__ __forceinline__ u32 peak() const {
        u32 most[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            most[i] = max(max(peak_of(v[4 * i]), peak_of(v[4 * i + 1])), max(peak_of(v[4 * i + 2]), peak_of(v[4 * i + 3])));
        u32 all = max(max(most[0], most[1]), max(most[2], most[3]));
        if (GROUP > 16) all = max(all, __shfl_xor_sync(0xffffffffu, all, 4));
        if (GROUP > 32) all = max(all, __shfl_xor_sync(0xffffffffu, all, 8));
        if (GROUP > 64) all = max(all, __shfl_xor_sync(0xffffffffu, all, 16));
        if (GROUP > 128) all = max(all, __shfl_xor_sync(0xffffffffu, all, 1));
        return all;
    }
};

/// What rows[row] of the pair holds at a slot of the order.
static __device__ __forceinline__ float at(const u32* words, int channel, int row) {
    return to_float(IN{(u16)(words[channel] >> (16 * row))});
}
#endif

/// Quantizes `[tokens, channels]`: codes `[tokens, groups * GROUP]`, scales `[groups, scale_stride]`; the
/// outliers' codes `[tokens, padded_outliers]` with zeros after them and scales `[tokens]`, or with
/// `float_outliers` their values `[tokens, outliers]`, and FP8's scales. `bad` becomes the least row that
/// holds a value that is not finite or beyond f16. One block a row; with PAIRED one block two rows,
/// `staged` says how many rows there are, and shared memory holds a word a channel after PAIR_HEAD_WORDS.
extern "C" __global__ void __launch_bounds__(THREADS, 4) quantize(
    const IN* x, const int* order, int channels, int groups, int outliers, int padded_outliers, int float_outliers, int staged,
    float clip, float top, int signed_scales, float scale_unit, float least, float greatest, i8* codes, float* scales, int scale_stride, i8* outlier_codes, float* outlier_scales,
    float* outlier_values, u32* bad
) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    bool sound = true;
#if PAIRED
    // The last row may have no partner; it is then its own.
    long long pair = 2ll * blockIdx.x;
    bool both = pair + 1 < staged;
    const u32* words = stage_pair(x + pair * channels, x + (pair + both) * channels, channels, reinterpret_cast<u32*>(shared_bytes));
    int end = groups * GROUP;
    long long token = pair + (Span::row() && both);
    bool stored = both || Span::row() == 0;
    for (int first = warp * SPAN; first < end; first += WARPS * SPAN) {
        Span span;
        span.load(words, order, first, end);
        float scale = group_scale(span.peak(), clip, top, signed_scales, scale_unit);
        float inverse = inverse_of(scale);
        sound = sound && is_finite(scale);
        int slot = first + Span::slot();
        if (stored && slot < end) {
            if (slot % GROUP == 0) scales[(long long)(slot / GROUP) * scale_stride + token] = scale;
            u32 packed[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                packed[i] = pack_codes(group_code(span.v[4 * i], inverse, least, greatest), group_code(span.v[4 * i + 1], inverse, least, greatest),
                                       group_code(span.v[4 * i + 2], inverse, least, greatest), group_code(span.v[4 * i + 3], inverse, least, greatest));
            *reinterpret_cast<uint4*>(codes + token * end + slot) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        }
    }
    if (!sound) atomicMin(bad, (u32)token);
    // The last warps have the fewest spans, or none; each takes one row's outliers.
    int side = WARPS - 1 - warp;
    if (outliers == 0 || side > both) return;
    sound = true;
    token = pair + side;
    auto outlier = [&](int i) { return at(words, order[end + i], side); };
#else
    long long token = blockIdx.x;
    Row row = stage(x + token * channels, order, channels, staged, reinterpret_cast<IN*>(shared_bytes));
    float* spare = groups_of(shared_bytes, channels, staged);
    Group values;
    for (int group = warp; group < groups; group += WARPS) {
        values.load(row, group, spare);
        u32 most = 0;
        values.each([&](int, float value) { most = max(most, peak_of(value)); });
        float scale = group_scale(warp_max(most), clip, top, signed_scales, scale_unit);
        float inverse = inverse_of(scale);
        sound = sound && is_finite(scale);
        if (lane == 0) scales[(long long)group * scale_stride + token] = scale;
        i8* to = codes + (token * groups + group) * GROUP;
#if IN_REGISTERS && LANE_VALUES % 4 == 0
#pragma unroll
        for (int i = 0; i < LANE_VALUES; i += 4) {
            *reinterpret_cast<u32*>(to + lane * LANE_VALUES + i) =
                pack_codes(group_code(values.v[i], inverse, least, greatest), group_code(values.v[i + 1], inverse, least, greatest),
                           group_code(values.v[i + 2], inverse, least, greatest), group_code(values.v[i + 3], inverse, least, greatest));
        }
#else
        values.each([&](int i, float value) { to[i] = (i8)group_code(value, inverse, least, greatest); });
#endif
    }
    // The last warp has the fewest groups, or none.
    bool takes_outliers = outliers > 0 && warp == WARPS - 1;
    auto outlier = [&](int i) { return row.at(groups * GROUP + i); };
    if (!takes_outliers) {
        if (!sound) atomicMin(bad, (u32)token);
        return;
    }
#endif
    if (float_outliers) {
#if FP8
        u32 most = 0;
        for (int i = lane; i < outliers; i += 32) most = max(most, magnitude(outlier(i)));
        float scale = scale_of(__uint_as_float(warp_max(most)), 1.0f, 448.0f);
        float inverse = inverse_of(scale);
        sound = sound && is_finite(scale);
        if (lane == 0) outlier_scales[token] = scale;
        for (int i = lane; i < outliers; i += 32) outlier_values[token * outliers + i] = nearest_e4m3(outlier(i) * inverse) * scale;
#else
        for (int i = lane; i < outliers; i += 32) {
            float value = to_float(to_half(outlier(i)));
            sound = sound && is_finite(value);
            outlier_values[token * outliers + i] = value;
        }
#endif
    } else {
        u32 most = 0;
        for (int i = lane; i < outliers; i += 32) most = max(most, magnitude(outlier(i)));
        float scale = scale_of(__uint_as_float(warp_max(most)), 1.0f, 127.0f);
        float inverse = inverse_of(scale);
        sound = sound && is_finite(scale);
        if (lane == 0) outlier_scales[token] = scale;
        for (int i = lane; i < padded_outliers; i += 32) {
            float value = i < outliers ? outlier(i) : 0.0f;
            outlier_codes[token * padded_outliers + i] = (i8)code_of(value, inverse, -127.0f, 127.0f);
        }
    }
    if (!sound) atomicMin(bad, (u32)token);
}
#endif

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
extern "C" __global__ void __launch_bounds__(THREADS, 4) dequantize_to_half(
    const i8* codes, const float* scales, const i8* outlier_codes, const float* outlier_scales, const float* outlier_values,
    int groups, int outliers, int padded_outliers, int rows_per_scale, int row_stride, int group_stride, half* y
) {
    dequantize(codes, scales, outlier_codes, outlier_scales, outlier_values, groups, outliers, padded_outliers, rows_per_scale, row_stride, group_stride, y);
}
extern "C" __global__ void __launch_bounds__(THREADS, 4) dequantize_to_float(
    const i8* codes, const float* scales, const i8* outlier_codes, const float* outlier_scales, const float* outlier_values,
    int groups, int outliers, int padded_outliers, int rows_per_scale, int row_stride, int group_stride, float* y
) {
    dequantize(codes, scales, outlier_codes, outlier_scales, outlier_values, groups, outliers, padded_outliers, rows_per_scale, row_stride, group_stride, y);
}

/// For each row of a weight `[rows, channels]` and of its codes: the sums over the source's channels of
/// `energy * (w - q)^2` and of `energy * w^2`, `[rows, 2]`. One block a row.
extern "C" __global__ void __launch_bounds__(THREADS, 2) energy_errors(
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
        int slot = groups * GROUP + i;
        float value = outlier_values ? outlier_values[own * outliers + i]
                                     : (float)outlier_codes[own * padded_outliers + i] * outlier_scales[own];
        double error = value - row.at(slot);
        lost += energy[order[slot]] * (error * error);
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

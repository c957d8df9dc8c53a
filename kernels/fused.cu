// A site's activation from what comes before it in one kernel: RMSNorm, or the product of SiLU and up, or
// nothing; then order, transform, codes (docs/format.md). Every value is f32 from its input to its code and
// is computed as the CPU computes it (src/backend/cpu/elementwise.rs), so codes and scales are its bits.
//
// codes.cuh has the layout and the other macros; few.cu makes the codes of few rows. A thread block stays on
// its SM and takes units of TOKENS rows. Where an order picks from all over a row, one warp stages entire units in a ring in
// shared memory, from which the others read; rows in the site's order need no unit, and each warp stages its own next
// panel. A warp makes 8 rows' panels at a time:
//
//     lane   0 .. 7    slots  0 ..  31     of TOKENS rows, and of 8 / TOKENS panels
//            8 .. 15          32 ..  63     of the same
//           16 .. 23          64 ..  95
//           24 .. 31          96 .. 127
//
// Rows begin 128 / TOKENS bytes apart (modulo 128), so that lanes of different rows never meet in a bank, and a
// thread's 32 values make most of a transform without another thread's. What a butterfly at a distance of 32 or
// 64 needs is handed over by halves: the butterfly before it leaves in registers 0-15 what a lane keeps and in
// 16-31 what it passes on, which costs it a sign. Register r of lane (A, B), bits of a slot in brackets:
//
//     loaded                          r0 r1 r2 r3 r4 [0 1 2 3 4]     A B [5 6]
//     distances 1 2 4 8, then 16      r0 r1 r2 r3 r4 [0 1 2 3 4]     A B [5 6]
//     half handed over, then 32       r0 r1 r2 r3 r4 [0 1 2 3 5]     A B [4 6]
//     half handed over, then 64       r0 r1 r2 r3 r4 [0 1 2 3 6]     A B [4 5]
//
// In the end a thread has two times 16 neighbouring slots: codes leave 16 bytes at a time.
//
// TOKENS     rows of a unit: 1, 2, 4 or 8; 8 where rows are in the site's order
// WARPS      warps of a block, one to an SM
// MOST_STAGES, HEAD_BYTES, ROW_MULTIPLE (ORDERED): stages that there are barriers for; shared memory before the order; a staged
//            row's length is a multiple of this
// STAGE_STRIDE, STAGE_BYTES (not ORDERED): from row to row of a staged panel; a warp's stage

#if !defined(TOKENS) || !defined(WARPS)
#error "a constant is missing: src/backend/cuda/kernels/fused.rs declares them"
#endif
#if ORDERED
#if !defined(MOST_STAGES) || !defined(HEAD_BYTES) || !defined(ROW_MULTIPLE)
#error "a constant is missing: src/backend/cuda/kernels/fused.rs declares them"
#endif
#else
#if !defined(STAGE_STRIDE) || !defined(STAGE_BYTES)
#error "a constant is missing: src/backend/cuda/kernels/fused.rs declares them"
#endif
#endif

/// Where rows are gathered from, one of a block's warps stages rows and SUMMERS add up squares: those of a unit TEAM of them.
#define TEAM 2
#define SUMMERS (FROM == NORM ? 2 * TEAM : 0)
#define MAKERS (WARPS - SUMMERS - 1)
#define THREADS (32 * WARPS)
#if !ORDERED
static_assert(FROM == 2 && TOKENS == 8, "panels are staged by entire warps");
#endif
/// Panels that a warp makes at a time.
#define SETS (8 / TOKENS)

#if ORDERED
/// From one staged row of `columns` values to the next.
static __device__ __forceinline__ int row_stride(int columns) {
    return (columns * (int)sizeof(In) + ROW_MULTIPLE - 1) / ROW_MULTIPLE * ROW_MULTIPLE + ROW_MULTIPLE / TOKENS;
}
#endif

/// A thread's position in its warp.
struct Lane {
    int row, set, part;

    __device__ __forceinline__ Lane() {
        int lane = threadIdx.x % 32;
        row = lane % TOKENS;
        set = lane % 8 / TOKENS;
        part = lane / 8;
    }
};

#if FROM == SILU
/// Eight products.
template <bool USUAL> static __device__ __forceinline__ void silu_mul8(float* v, const uint4& gate, const uint4& up) {
    u32 g[4] = {gate.x, gate.y, gate.z, gate.w}, u[4] = {up.x, up.y, up.z, up.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        v[2 * i] = silu_mul<USUAL>(low_half(g[i]), low_half(u[i]));
        v[2 * i + 1] = silu_mul<USUAL>(high_half(g[i]), high_half(u[i]));
    }
}
#endif

#if ORDERED
/// A row in shared memory, and the order.
struct Source {
    const u8 *row, *other;   // `other` of up
    const int* slots;                  // the channel of each slot of each panel, -1 for none
    const float* weights;               // the norm's, of each slot of each panel
    float inverse;                      // the norm's

    /// 32 slots.
    __device__ __forceinline__ void load(float (&v)[32], int first) const {
        const In* values = reinterpret_cast<const In*>(row);
#if FROM == SILU
        const half* ups = reinterpret_cast<const half*>(other);
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
            int4 at = *reinterpret_cast<const int4*>(slots + first + i);
            most = abs_max_or_nan2(most, values[at.x].bits | (u32)values[at.y].bits << 16);
            most = abs_max_or_nan2(most, values[at.z].bits | (u32)values[at.w].bits << 16);
        }
        bool usual = max_or_nan(low_half(most), high_half(most)) <= USUAL_GATE;
        if (usual) products<true>(v, values, ups, first);
        else products<false>(v, values, ups, first);
#else
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
            int4 at = *reinterpret_cast<const int4*>(slots + first + i);
            v[i] = to_float(values[at.x]);
            v[i + 1] = to_float(values[at.y]);
            v[i + 2] = to_float(values[at.z]);
            v[i + 3] = to_float(values[at.w]);
        }
#if FROM == NORM
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
            float4 weight = *reinterpret_cast<const float4*>(weights + first + i);
            v[i] = v[i] * inverse * weight.x;
            v[i + 1] = v[i + 1] * inverse * weight.y;
            v[i + 2] = v[i + 2] * inverse * weight.z;
            v[i + 3] = v[i + 3] * inverse * weight.w;
        }
#endif
#endif
    }
#if FROM == SILU
    template <bool USUAL> __device__ __forceinline__ void products(float (&v)[32], const half* gates, const half* ups, int first) const {
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
            int4 at = *reinterpret_cast<const int4*>(slots + first + i);
            v[i] = silu_mul<USUAL>(to_float(gates[at.x]), to_float(ups[at.x]));
            v[i + 1] = silu_mul<USUAL>(to_float(gates[at.y]), to_float(ups[at.y]));
            v[i + 2] = silu_mul<USUAL>(to_float(gates[at.z]), to_float(ups[at.z]));
            v[i + 3] = silu_mul<USUAL>(to_float(gates[at.w]), to_float(ups[at.w]));
        }
    }
#endif
};
#endif

/// The butterfly of registers `i` and `i + distance`.
template <int FROM_DISTANCE, int TO_DISTANCE> static __device__ __forceinline__ void butterflies(float (&v)[32]) {
#pragma unroll
    for (int distance = FROM_DISTANCE; distance < TO_DISTANCE; distance *= 2) {
#pragma unroll
        for (int i = 0; i < 32; i++) {
            if (i & distance) continue;
            float a = v[i], b = v[i + distance];
            v[i] = a + b;
            v[i + distance] = a - b;
        }
    }
}

/// Registers 16-31 for those of the other lane.
static __device__ __forceinline__ void hand_over(float (&v)[32], int lanes) {
#pragma unroll
    for (int i = 16; i < 32; i++) v[i] = __shfl_xor_sync(0xffffffffu, v[i], lanes);
}

/// Transforms the groups of a panel. A product with 1 or -1 is exact: one instruction adds or subtracts.
static __device__ __forceinline__ void transform(float (&v)[32], int part) {
    float a = part & 1 ? -1.0f : 1.0f, b = part & 2 ? -1.0f : 1.0f;
    float low = BLOCK_SCALE, high = BLOCK_SCALE;
    butterflies<1, 16>(v);
    if (GROUP == 32) butterflies<16, 32>(v);
    if (GROUP >= 64) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float x = v[i], y = v[i + 16];
            v[i] = fmaf(y, a, x);
            v[i + 16] = fmaf(y, -a, x);
        }
        hand_over(v, 8);
        // Upper lanes hold the minuend in the upper registers: their differences have the wrong sign.
        if (GROUP == 64) {
            butterflies<16, 32>(v);
            high *= a;
        }
    }
    if (GROUP == 128) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            float x = v[i], y = v[i + 16];
            v[i] = fmaf(y, b, x);
            v[i + 16] = fmaf(y, -b, x);
        }
        hand_over(v, 16);
        butterflies<16, 32>(v);
        if (part & 2) {
            low *= a;
            high *= -a;
        }
    }
#pragma unroll
    for (int i = 0; i < 16; i++) {
        v[i] *= low;
        v[i + 16] *= high;
    }
}

/// The sixteenth of a panel that a thread's registers 0-15 or 16-31 hold.
static __device__ __forceinline__ int chunk(int half, int part, bool transformed) {
    if (TRANSFORM && GROUP == 128 && transformed) return part | half << 2;
    if (TRANSFORM && GROUP == 64 && transformed) return (part & 1) | half << 1 | (part & 2) << 1;
    return half | part << 1;
}

/// The peak of a thread's values: as integers the greatest is the greatest positive one, as unsigned integers the
/// negative one of greatest magnitude, and NaN of either sign is beyond the others.
static __device__ __forceinline__ u32 peak_of_all(const float (&v)[32]) {
    int above = 0;
    u32 below = 0;
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        above = max(above, max(__float_as_int(v[i]), __float_as_int(v[i + 1])));
        below = max(below, max(__float_as_uint(v[i]), __float_as_uint(v[i + 1])));
    }
    u32 negative = (int)below < 0 ? below & 0x7fffffffu : 0;
    return max((u32)above << 1, (int)below < 0 ? negative << 1 | 1 : 0);
}
/// Sixteen codes of a group, or of outliers.
static __device__ __forceinline__ uint4 group_words(const float* v, float inverse, float least, float greatest) {
    return make_uint4(group_word(v, inverse, least, greatest), group_word(v + 4, inverse, least, greatest),
                      group_word(v + 8, inverse, least, greatest), group_word(v + 12, inverse, least, greatest));
}
static __device__ __forceinline__ uint4 outlier_words(const float* v, float inverse) {
    return make_uint4(plain_word(v, inverse, -127.0f, 127.0f, false), plain_word(v + 4, inverse, -127.0f, 127.0f, false),
                      plain_word(v + 8, inverse, -127.0f, 127.0f, false), plain_word(v + 12, inverse, -127.0f, 127.0f, false));
}


/// The codes of a warp's panels of groups.
static __device__ __forceinline__ void group_codes(float (&v)[32], int part, int token, int panel, bool there, const Shape& shape, const Target& target) {
    if (TRANSFORM) transform(v, part);
    u32 most = peak_of_all(v);
    if (GROUP >= 64) most = max(most, __shfl_xor_sync(0xffffffffu, most, 8));
    if (GROUP >= 128) most = max(most, __shfl_xor_sync(0xffffffffu, most, 16));
    float scale = target.scale_of_group(most);
    float inverse = quick_inverse(scale);
    if (there && part % (GROUP / 32) == 0) target.put_scale(shape, token, panel * (PANEL / GROUP) + part / (GROUP / 32), scale);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int at = chunk(half, part, true);
        uint4 codes = group_words(v + 16 * half, inverse, target.least, target.greatest);
        if (there && target.has(shape, panel, -1, at)) *reinterpret_cast<uint4*>(target.at(shape, token, panel, -1, at)) = codes;
    }
}

/// The codes of a warp's panels of outliers, whose values `load` returns: all of them are read for the scale before the first
/// becomes codes.
template <class Load> static __device__ __forceinline__ void outlier_codes(int part, int token, bool there, const Shape& shape, const Target& target, Load load) {
    int panels = shape.outlier_panels();
    u32 peak = 0;
#pragma unroll 1
    for (int step = 0; step < 2 * panels; step++) {
        int panel = step < panels ? step : step - panels;
        float v[32];
        load(v, panel);
        if (step < panels) {
            u32 most = peak_of_all(v);
            most = max(most, __shfl_xor_sync(0xffffffffu, most, 8));
            peak = max(peak, max(most, __shfl_xor_sync(0xffffffffu, most, 16)));
            continue;
        }
        float scale = scale_of(peak_magnitude(peak), 1.0f, 127.0f);
        if (there && part == 0) target.put_outlier_scale(token, scale);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int at = chunk(half, part, false);
            uint4 codes = outlier_words(v + 16 * half, inverse_of(scale));
            if (there && target.has(shape, panel, panel, at)) *reinterpret_cast<uint4*>(target.at(shape, token, panel, panel, at)) = codes;
        }
    }
}

#if ORDERED
/// Whether rows are staged by the copy engine: one instruction a row instead of one for 16 bytes.
#define BULK (__CUDA_ARCH__ >= 900)

/// The stages in shared memory, in the ring's order: barriers of rows that arrived, of rows that are done with, and of sums;
/// then the norms' factors, the order, the norm's weights, and the rows.
static_assert(HEAD_BYTES == 3 * 8 * MOST_STAGES + 4 * 8 * MOST_STAGES, "barriers and factors");

struct Ring {
    int stages, stage_bytes;
    int stage, parity;      // of the current unit; the parity is that of its arrival
    int rows_at;            // after the order and the norm's weights

    __device__ __forceinline__ Ring(int stages, int stage_bytes, int rows_at) : stages(stages), stage_bytes(stage_bytes), stage(0), parity(0), rows_at(rows_at) {}
    __device__ __forceinline__ void advance() {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }
    __device__ __forceinline__ u32 arrived() const { return shared_address(shared_bytes) + 8 * stage; }
    __device__ __forceinline__ u32 done() const { return arrived() + 8 * MOST_STAGES; }
    __device__ __forceinline__ u32 summed() const { return arrived() + 16 * MOST_STAGES; }
    __device__ __forceinline__ float* factors() const { return reinterpret_cast<float*>(shared_bytes + 24 * MOST_STAGES) + 8 * stage; }
    __device__ __forceinline__ u8* rows() const { return shared_bytes + rows_at + stage * stage_bytes + BEFORE; }
};

/// Stages a unit's rows, by a warp. What no row fills holds anything: nothing of it is stored.
static __device__ __forceinline__ int stage_rows(const In* x, const Shape& shape, int row, int stride, u8* to, u32 arrived) {
    constexpr int WIDTH = 16 / sizeof(In);
    int lane = threadIdx.x % 32, count = shape.columns, bytes = 0;
    if (shape.columns % WIDTH == 0) {
#if BULK
        if (lane < TOKENS && row + lane < shape.tokens) {
            bytes = count * sizeof(In);
            copy_bulk(shared_address(to + lane * stride), x + (long long)(row + lane) * shape.columns, bytes, arrived);
        }
#else
        for (int i = 0; i < TOKENS && row + i < shape.tokens; i++) {
            const In* from = x + (long long)(row + i) * shape.columns;
            for (int at = lane * WIDTH; at < count; at += 32 * WIDTH) copy16(shared_address(to + i * stride + at * (int)sizeof(In)), from + at, true);
        }
#endif
    } else {
        for (int i = 0; i < TOKENS && row + i < shape.tokens; i++) {
            const In* from = x + (long long)(row + i) * shape.columns;
            for (int at = lane; at < count; at += 32) reinterpret_cast<In*>(to + i * stride)[at] = from[at];
        }
    }
    return bytes;
}

/// What the staging warp does: every gridDim-th unit of TOKENS rows, as soon as a stage is free.
static __device__ __forceinline__ void stage_units(const In* x, const void* other, const Shape& shape, Ring ring) {
    int stride = row_stride(shape.columns);
    bool first = true;
    pdl_wait();
    for (int row = blockIdx.x * TOKENS; row < shape.tokens; row += gridDim.x * TOKENS) {
        if (!first) barrier_wait(ring.done(), ring.parity ^ 1);
        int bytes = stage_rows(x, shape, row, stride, ring.rows(), ring.arrived());
        if (FROM == SILU) bytes += stage_rows(reinterpret_cast<const In*>(other), shape, row, stride, ring.rows() + TOKENS * stride, ring.arrived());
#if BULK
        barrier_expect(ring.arrived(), bytes);
#else
        bool copied = shape.columns % (16 / (int)sizeof(In)) == 0;
        if (copied) barrier_arrive_after_copies(ring.arrived());
        else barrier_arrive(ring.arrived());
#endif
        ring.advance();
        // The first round finds every stage free.
        if (ring.stage == 0) first = false;
    }
}

/// What a warp does that makes codes: of each unit every MAKERS-th task, which is SETS panels or the outliers.
static __device__ __forceinline__ void make(const int* slots, const float* weights, const Shape& shape, int slice_panels, const Target& target, int warp, Ring ring) {
    Lane lane;
    int stride = row_stride(shape.columns), slot = lane.part * 32;
    int first = blockIdx.y * slice_panels, last = min(first + slice_panels, shape.panels());
    int panel_tasks = (last - first + SETS - 1) / SETS;
    int tasks = panel_tasks + (shape.outliers > 0 && blockIdx.y == gridDim.y - 1);
    Source source;
    source.slots = slots;
    source.weights = weights;
    int task = warp;
    for (int row = blockIdx.x * TOKENS; row < shape.tokens; row += gridDim.x * TOKENS, ring.advance(), task -= tasks) {
        barrier_wait(ring.arrived(), ring.parity);
        if (FROM == NORM) {
            barrier_wait(ring.summed(), ring.parity);
            source.inverse = ring.factors()[lane.row];
        }
        source.row = ring.rows() + lane.row * stride;
        source.other = source.row + TOKENS * stride;
        int token = row + lane.row;
        for (; task < tasks; task += MAKERS) {
            if (task < panel_tasks) {
                int own = first + task * SETS + lane.set, panel = min(own, last - 1);
                float v[32];
                source.load(v, panel * PANEL + slot);
                group_codes(v, lane.part, token, panel, token < shape.tokens && own < last, shape, target);
            } else {
                outlier_codes(lane.part, token, token < shape.tokens && lane.set == 0, shape, target,
                              [&](float (&v)[32], int panel) { source.load(v, (shape.panels() + panel) * PANEL + slot); });
            }
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(ring.done());
    }
}

#if FROM == NORM
/// What a summing warp does: 1 / sqrt(mean of squares + epsilon) of its team's rows of every (SUMMERS / TEAM)-th unit. Sums run in
/// 16 lanes, folded in halves; a warp takes two rows that lie half of the banks apart. A row's sum is a chain of additions: with
/// fewer summing warps the makers of codes wait for it.
static __device__ __forceinline__ void sum_units(const Shape& shape, float epsilon, int summer, Ring ring) {
    int turn = summer / TEAM;
    int lane = threadIdx.x % 16, upper = threadIdx.x / 16 % 2, columns = shape.columns;
    for (int first = blockIdx.x * TOKENS; first < shape.tokens; first += gridDim.x * TOKENS, ring.advance()) {
        // Every unit is waited for and left, so that no warp is a round ahead of a barrier.
        barrier_wait(ring.arrived(), ring.parity);
        bool own = turn == 0;
        turn = own ? SUMMERS / TEAM - 1 : turn - 1;
#pragma unroll 1
        for (int pair = summer % TEAM; own && pair < (TOKENS + 1) / 2; pair += TEAM) {
            int row = TOKENS > 1 ? pair + upper * (TOKENS / 2) : 0;
            const float* values = reinterpret_cast<const float*>(ring.rows() + row * row_stride(columns));
            float sum = 0.0f;
            int i = lane;
#pragma unroll 1
            for (; i + 15 * 16 < columns; i += 256) {
                float part[16];
#pragma unroll
                for (int j = 0; j < 16; j++) part[j] = values[i + 16 * j];
#pragma unroll
                for (int j = 0; j < 16; j++) sum += part[j] * part[j];
            }
            for (; i < columns; i += 16) sum += values[i] * values[i];
#pragma unroll
            for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
            if (lane == 0) ring.factors()[row] = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(sum, (float)columns) + epsilon));
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            if (own) barrier_arrive(ring.summed());
            barrier_arrive(ring.done());
        }
    }
}
#endif

#else
static_assert(STAGE_BYTES == 2 * TOKENS * STAGE_STRIDE, "a warp's stage: TOKENS rows of a panel of gates, then of up");

/// Stages a panel of TOKENS rows. What no row fills holds anything.
static __device__ __forceinline__ void stage_panel(const half* gate, const half* up, const Shape& shape, int row, int panel, u8* to) {
    int lane = threadIdx.x % 32, column = panel * PANEL + lane % 16 * 8;
    if (column < shape.grouped()) {
#pragma unroll
        for (int i = lane / 16; i < TOKENS; i += 2) {
            if (row + i >= shape.tokens) break;
            long long at = (long long)(row + i) * shape.columns + column;
            u32 there = shared_address(to + i * STAGE_STRIDE + lane % 16 * 16);
            copy16(there, gate + at, true);
            copy16(there + TOKENS * STAGE_STRIDE, up + at, true);
        }
    }
    copy_commit();
}

/// What every warp does: panels of TOKENS rows, with the next one in flight.
static __device__ __forceinline__ void make(const half* gate, const half* up, const Shape& shape, const Target& target, int warp) {
    Lane lane;
    int part = lane.part, slots = shape.panels() + (shape.outliers > 0);
    bool vectors = shape.columns % 8 == 0;
    u8* stages = shared_bytes + 2 * warp * STAGE_BYTES;
    // Item i is the slot i % slots of unit i / slots; the slot after the panels is the outliers.
    int step = gridDim.x * (blockDim.x / 32), units_a_step = step / slots, slots_a_step = step % slots;
    int item = warp * gridDim.x + blockIdx.x, row = item / slots * TOKENS, slot = item % slots;
    auto staged = [&](int slot) { return vectors && slot < shape.panels(); };
    if (row < shape.tokens && staged(slot)) stage_panel(gate, up, shape, row, slot, stages);
    for (int stage = 0; row < shape.tokens; stage ^= 1) {
        int next_row = row + units_a_step * TOKENS, next_slot = slot + slots_a_step;
        if (next_slot >= slots) {
            next_slot -= slots;
            next_row += TOKENS;
        }
        if (next_row < shape.tokens && staged(next_slot)) stage_panel(gate, up, shape, next_row, next_slot, stages + (stage ^ 1) * STAGE_BYTES);
        else copy_commit();
        int token = row + lane.row;
        bool there = token < shape.tokens;
        // Values that are not staged, from column `first` on.
        auto load = [&](float (&v)[32], int first, int end) {
            const long long at = (long long)(there ? token : 0) * shape.columns;
#pragma unroll
            for (int i = 0; i < 32; i++) {
                int column = first + part * 32 + i;
                v[i] = column < end ? silu_mul<false>(to_float(gate[at + column]), to_float(up[at + column])) : 0.0f;
            }
        };
        if (slot == shape.panels()) {
            outlier_codes(part, token, there, shape, target, [&](float (&v)[32], int panel) { load(v, shape.grouped() + panel * PANEL, shape.columns); });
        } else {
            float v[32];
            if (vectors) {
                copy_wait<1>();
                __syncwarp();
                const uint4* gates = reinterpret_cast<const uint4*>(stages + stage * STAGE_BYTES + lane.row * STAGE_STRIDE + part * 64);
                const uint4* ups = reinterpret_cast<const uint4*>(reinterpret_cast<const u8*>(gates) + TOKENS * STAGE_STRIDE);
                u32 most = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    uint4 g = gates[i];
                    most = abs_max_or_nan2(abs_max_or_nan2(most, g.x), g.y);
                    most = abs_max_or_nan2(abs_max_or_nan2(most, g.z), g.w);
                }
                if (max_or_nan(low_half(most), high_half(most)) <= USUAL_GATE) {
#pragma unroll
                    for (int i = 0; i < 4; i++) silu_mul8<true>(v + 8 * i, gates[i], ups[i]);
                } else {
#pragma unroll
                    for (int i = 0; i < 4; i++) silu_mul8<false>(v + 8 * i, gates[i], ups[i]);
                }
                // Groups end at multiples of 32. The panel's number is the same in all lanes: only the last one takes the branch.
                if ((slot + 1) * PANEL > shape.grouped()) {
                    bool none = slot * PANEL + part * 32 >= shape.grouped();
#pragma unroll
                    for (int i = 0; i < 32; i++) {
                        keep_apart(v[i]);
                        v[i] = none ? 0.0f : v[i];
                    }
                }
            } else {
                load(v, slot * PANEL, shape.grouped());
            }
            group_codes(v, part, token, slot, there, shape, target);
        }
        __syncwarp();
        row = next_row;
        slot = next_slot;
    }
}
#endif

/// Codes of `[tokens, columns]`: `x`, of SILU the gates, and `other`, the weights of NORM in the order of `slots` or SILU's rows
/// of up. `slots` holds the channel of each slot, -1 for none, in entire panels: those of the groups, then the outliers'. `bad`
/// becomes the least row with a scale that is not finite. Ordered, block (b, s) takes every gridDim.x-th unit of TOKENS rows and
/// of it the panels s * slice_panels and on, with `stages` units in flight.
extern "C" __global__ void __launch_bounds__(THREADS, 1) fused_quantize(
    const In* x, const void* other, const int* slots, int tokens, int columns, int groups, int outliers, int slice_panels, int stages, float epsilon,
    float clip, float top, float inverse_top, int signed_scales, float scale_unit, float least, float greatest, i8* codes, float* scales, int scale_stride,
    i8* outlier_codes, float* outlier_scales, int padded_outliers, u32* bad
) {
    Shape shape{tokens, columns, groups, outliers};
    Target target{clip, top, inverse_top, signed_scales, scale_unit, least, greatest, codes, scales, scale_stride, outlier_codes, outlier_scales, padded_outliers, bad};
    // The shuffle: the compiler sees that a warp does not diverge.
    int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
#if ORDERED
    int rows = TOKENS * (FROM == SILU ? 2 : 1), stride = row_stride(columns), all_slots = (shape.panels() + shape.outlier_panels()) * PANEL;
    int* order = reinterpret_cast<int*>(shared_bytes + HEAD_BYTES);
    float* weights = reinterpret_cast<float*>(order + all_slots);
    Ring ring(stages, BEFORE + rows * stride, HEAD_BYTES + all_slots * (FROM == NORM ? 8 : 4));
    if (threadIdx.x < stages) {
        u32 barrier = shared_address(shared_bytes) + 8 * threadIdx.x;
        barrier_init(barrier, 32);
        barrier_init(barrier + 8 * MOST_STAGES, MAKERS + SUMMERS);
        barrier_init(barrier + 16 * MOST_STAGES, TEAM);
#if BULK
        barrier_init_fence();
#endif
    }
    for (int i = threadIdx.x; i < stages * rows; i += THREADS)
        *reinterpret_cast<uint4*>(shared_bytes + ring.rows_at + i / rows * ring.stage_bytes + i % rows * stride) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    // Rows are in flight while the order comes.
    if (warp == WARPS - 1) stage_units(x, other, shape, ring);
    else for (int i = threadIdx.x; i < all_slots / 4; i += 32 * (WARPS - 1)) {
        copy16(shared_address(order + 4 * i), slots + 4 * i, true);
        if (FROM == NORM) copy16(shared_address(weights + 4 * i), reinterpret_cast<const float*>(other) + 4 * i, true);
    }
    if (warp == WARPS - 1) return;
    copy_commit();
    copy_wait<0>();
    fixed_barrier<1, 32 * (WARPS - 1)>();
#if FROM == NORM
    if (warp >= MAKERS) {
        sum_units(shape, epsilon, warp - MAKERS, ring);
        return;
    }
#endif
    make(order, weights, shape, slice_panels, target, warp, ring);
#else
    pdl_wait();
    make(x, reinterpret_cast<const half*>(other), shape, target, warp);
#endif
}

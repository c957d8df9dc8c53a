// GPTQ: the damped Hessian's factor, the sweep, and what it cost.
//
// The sweep is in the form that needs no inverse. With H = R D R^T, R unit upper triangular, GPTQ's
// update is
//     w'_j = w_j + sum over i < j of (w_i - q_i) R_ij,      q_j = the code nearest to w'_j,
// where w is the weight before any update. It is the same sequence of decisions as gptq.py's, which
// propagates (w'_i - q_i) / U_ii by the rows of U, U^T U = H^-1: both say that each column is set to its
// best value given the errors of those before it. R comes from one Cholesky factorization: with J the
// reversal of rows and columns, J H J = L L^T yields R = J L J divided by its diagonal, column by column.
//
// Columns go in blocks of at most 128: a warp sweeps its rows inside a block in registers, and a matrix
// product propagates the block's w - q to the columns after it (src/backend/cuda/gptq.rs).

// FP4  1: codes are FP4, doubled numbers of E2M1, 0: integers
// SCALE_GRID  the grid that scales are rounded to (common.cuh)
// FACTORS, FACTOR_COUNT  factors on a group's scale that are tried, 1 the first

#if !defined(FP4) || !defined(THREADS) || !defined(SPAN) || !defined(TILE) || !defined(SCALE_GRID) || !defined(FACTORS) || !defined(FACTOR_COUNT)
#error "a constant is missing: src/backend/cuda/kernels/gptq.rs declares them"
#endif
static_assert(SPAN == 128 && TILE == 32, "a span is four registers of a warp, a tile as wide as a warp");

/// Mirrors the upper triangle of `h` `[n, n]` to the lower one, a tile of 32 x 32 a block.
extern "C" __global__ void __launch_bounds__(THREADS) mirror(float* h, int n) {
    __shared__ float tile[32][33];
    if (blockIdx.x < blockIdx.y) return;
    int x = threadIdx.x % 32, y = threadIdx.x / 32;
    for (int i = y; i < 32; i += THREADS / 32) {
        int row = blockIdx.y * 32 + i, column = blockIdx.x * 32 + x;
        if (row < n && column < n) tile[i][x] = h[(long long)row * n + column];
    }
    __syncthreads();
    for (int i = y; i < 32; i += THREADS / 32) {
        int row = blockIdx.x * 32 + i, column = blockIdx.y * 32 + x;
        if (column < row && row < n) h[(long long)row * n + column] = tile[x][i];
    }
}

/// The diagonal of `h` `[n, n]`.
extern "C" __global__ void __launch_bounds__(THREADS) diagonal(const float* h, int n, float* to) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < n) to[i] = h[(long long)i * n + i];
}

/// The lower triangle of J H J, row by row, with `damp` added to its diagonal; a channel that no token
/// used has a diagonal of 1. A row a block of `blockIdx.y`.
extern "C" __global__ void __launch_bounds__(THREADS) flip(const float* h, int n, float damp, float* to) {
    long long row = blockIdx.y;
    int column = blockIdx.x * THREADS + threadIdx.x;
    if (column > row) return;
    float value = h[(n - 1 - row) * n + (n - 1 - column)];
    if (column == row) value = (value > 0.0f ? value : 1.0f) + damp;
    to[row * n + column] = value;
}

/// The diagonal of L from its last entry to its first: what each column of R is divided by.
extern "C" __global__ void __launch_bounds__(THREADS) divisors(const float* l, int n, float* to) {
    int i = blockIdx.x * THREADS + threadIdx.x;
    if (i < n) to[i] = l[(long long)(n - 1 - i) * n + (n - 1 - i)];
}

/// R above its diagonal from L below it and on it, in one buffer; L stays: R[i][j] = L[n-1-i][n-1-j] / L[n-1-j][n-1-j].
extern "C" __global__ void __launch_bounds__(THREADS) unit_upper(float* l, const float* divisors, int n) {
    long long i = blockIdx.y;
    int j = blockIdx.x * THREADS + threadIdx.x;
    if (j <= i || j >= n) return;
    l[i * n + j] = __fdiv_rn(l[(n - 1 - i) * n + (n - 1 - j)], divisors[j]);
}

/// How the codes of a sweep are held.
struct Grid {
    float ratio, least, greatest;
    int signed_scales;
    float scale_unit;

    __device__ __forceinline__ float scale(u32 peak, float factor = 1.0f) const {
        float scale = round_scale(peak_magnitude(peak) * ratio * factor, scale_unit);
        return signed_scales ? signed_scale(scale, peak) : scale;
    }
    __device__ __forceinline__ float code(float value, float inverse) const {
#if FP4
        return nearest_e2m1_doubled(value * inverse);
#else
        return fminf(fmaxf(rintf(value * inverse), least), greatest);
#endif
    }
};

/// The scale of one group, columns `first` to `first + size` of the rows that share it, where a group
/// is wider than a span. A warp a scale.
extern "C" __global__ void __launch_bounds__(THREADS) wide_group_scales(
    const float* weights, int rows, int width, int rows_per_scale, int first, int size, int group, int groups,
    float ratio, int signed_scales, float scale_unit, float* scales, u32* bad
) {
    int set = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (set * rows_per_scale >= rows) return;
    u32 most = 0;
    for (int row = set * rows_per_scale; row < min(rows, (set + 1) * rows_per_scale); row++) {
        const float* values = weights + (long long)row * width + first;
        for (int i = lane; i < size; i += 32) most = max(most, peak_of(values[i]));
    }
    Grid grid{ratio, 0.0f, 0.0f, signed_scales, scale_unit};
    float scale = grid.scale(warp_max(most));
    if (lane == 0) {
        scales[(long long)set * groups + group] = scale;
        if (!is_finite(scale)) atomicMin(bad, (u32)(set * rows_per_scale));
    }
}

/// A warp's part of a span: column i is in lane i % 32, register i / 32.
template <int ROWS> struct Span {
    float v[ROWS][4];
};

/// Visits columns `start` to `end` in order: `target` returns what a column becomes, from the value it
/// has by then, and what that loses of the weight before any update goes to the columns after it.
template <int ROWS, class Target> static __device__ __forceinline__ void propagate(
    Span<ROWS>& w, const Span<ROWS>& original, const float* tile, int start, int end, int feedback, Target target
) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        int last = min(32, end - 32 * c);
        for (int from = max(0, start - 32 * c); from < last; from++) {
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                float value = __shfl_sync(0xffffffffu, w.v[row][c], from);
                float before = __shfl_sync(0xffffffffu, original.v[row][c], from);
                float lost = before - target(row, c, from, value);
                if (feedback) {
                    const float* r = tile + (32 * c + from) * SPAN + lane;
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        if (k >= c) w.v[row][k] = fmaf(lost, r[32 * k], w.v[row][k]);
                    }
                }
            }
        }
    }
}

/// Sweeps columns `first` to `first + count` (at most SPAN). `weights` includes every update from the
/// columns before them, `original` none; both `[rows, width]`. Leaves codes, the scales of groups that
/// begin in the span (unless `wide`: then the span's one scale is there already), and w - q in
/// `difference` `[rows, SPAN]`. With `feedback` 0 each column is rounded on its own.
///
/// `errors` `[rows, 2]` gathers what the sweep costs: with the damped Hessian, E H E^T is the sum over the
/// columns of (pivot_j (w'_j - q_j))^2, D's entries being the squares of the pivots; and E E^T, to take
/// the damping out of it. As a product with H it would be a small difference of large numbers.
///
/// A group's scale is taken from the values its columns would have if none of them were rounded, as
/// gptq.py's update leaves them at that moment: what earlier columns lost, propagated over the group in its
/// order. `unrounded` (not null) takes these values of the entire span instead of codes.
template <int ROWS> static __device__ __forceinline__ void sweep(
    const float* weights, const float* original, const float* r, int rows, int width, int first, int count,
    int group_size, int groups, int wide, int feedback, Grid grid, i8* codes, float* scales, float* difference,
    float* unrounded, const float* pivots, double* errors, u32* bad
) {
    extern __shared__ float tile[];
    // R's part above the diagonal, zeros elsewhere, so that an update never changes a finished column.
    if (feedback) {
        for (int i = threadIdx.x; i < count * SPAN; i += THREADS) {
            int row = i / SPAN, column = i % SPAN;
            tile[i] = row < column && column < count ? r[(long long)(first + row) * width + first + column] : 0.0f;
        }
        __syncthreads();
    }
    int set = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (set * ROWS >= rows) return;
    int grouped = groups * group_size;
    Span<ROWS> w, before, lost;
    int code[ROWS][4];
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        bool there = set * ROWS + row < rows;
        long long at = (long long)(set * ROWS + row) * width + first;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int column = c * 32 + lane;
            bool inside = there && column < count;
            w.v[row][c] = inside ? weights[at + column] : 0.0f;
            before.v[row][c] = inside ? original[at + column] : 0.0f;
            lost.v[row][c] = 0.0f;
            code[row][c] = 0;
        }
    }
    auto itself = [](int, int, int, float value) { return value; };
    if (unrounded) {
        propagate(w, before, tile, 0, count, feedback, itself);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int column = c * 32 + lane;
                if (set * ROWS + row < rows && column < count) {
                    long long own = set * ROWS + row;
                    unrounded[own * width + first + column] = w.v[row][c];
                    difference[own * SPAN + column] = before.v[row][c] - w.v[row][c];
                }
            }
        }
        return;
    }
    float cost[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; row++) cost[row] = 0.0f;
    for (int start = 0; start < count;) {
        int end = wide ? count : min(count, start + group_size);
        float scale;
        if (wide) {
            scale = scales[(long long)set * groups + first / group_size];
        } else {
            Span<ROWS> values = w;
            // Nothing is lost before the first column.
            if (feedback && first + start > 0) propagate(values, before, tile, start, end, 1, itself);
            u32 most = 0;
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    int column = c * 32 + lane;
                    if (column >= start && column < end) most = max(most, peak_of(values.v[row][c]));
                }
            }
            most = warp_max(most);
            scale = grid.scale(most);
#if FACTOR_COUNT > 1
            // Of the scales that are tried, the one with which the group costs the least; the first of equals.
            const float factors[FACTOR_COUNT] = {FACTORS};
            float least_cost = __uint_as_float(0x7f800000u);
            for (int i = 0; i < FACTOR_COUNT; i++) {
                float tried = grid.scale(most, factors[i]), own_inverse = inverse_of(tried);
                if (!is_finite(tried)) continue;
                float costs[ROWS] = {};
                Span<ROWS> trial = w;
                propagate(trial, before, tile, start, end, feedback, [&](int row, int c, int from, float value) {
                    float q = grid.code(value, own_inverse) * tried;
                    float own = value - q;
                    if (feedback) own *= pivots[first + 32 * c + from];
                    costs[row] = fmaf(own, own, costs[row]);
                    return q;
                });
                float all = 0.0f;
                for (int row = 0; row < ROWS; row++) all += costs[row];
                if (all < least_cost) {
                    least_cost = all;
                    scale = tried;
                }
            }
#endif
            if (lane == 0) {
                scales[(long long)set * groups + (first + start) / group_size] = scale;
                if (!is_finite(scale)) atomicMin(bad, (u32)(set * ROWS));
            }
        }
        float inverse = inverse_of(scale);
        propagate(w, before, tile, start, end, feedback, [&](int row, int c, int from, float value) {
            float code_of_value = grid.code(value, inverse), q = code_of_value * scale;
            if (lane == from) {
                code[row][c] = (int)code_of_value;
                lost.v[row][c] = before.v[row][c] - q;
            }
            if (feedback) {
                float own = pivots[first + 32 * c + from] * (value - q);
                cost[row] = fmaf(own, own, cost[row]);
            }
            return q;
        });
        start = end;
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        long long own = set * ROWS + row;
        if (own >= rows) break;
        if (feedback) {
            float square = 0.0f;
#pragma unroll
            for (int c = 0; c < 4; c++) square = fmaf(lost.v[row][c], lost.v[row][c], square);
            square = warp_sum(square);
            if (lane == 0) {
                errors[2 * own] += cost[row];
                errors[2 * own + 1] += square;
            }
        }
#pragma unroll
        for (int c = 0; c < 4; c++) {
            int column = c * 32 + lane;
            if (column < count) {
                codes[own * grouped + first + column] = (i8)code[row][c];
                if (feedback) difference[own * SPAN + column] = lost.v[row][c];
            }
        }
    }
}
extern "C" __global__ void __launch_bounds__(THREADS, 2) sweep_rows(
    const float* weights, const float* original, const float* r, int rows, int width, int first, int count,
    int group_size, int groups, int wide, int feedback, float ratio, int signed_scales, float scale_unit, float least, float greatest, i8* codes, float* scales,
    float* difference, float* unrounded, const float* pivots, double* errors, u32* bad
) {
    Grid grid{ratio, least, greatest, signed_scales, scale_unit};
    sweep<1>(weights, original, r, rows, width, first, count, group_size, groups, wide, feedback, grid, codes, scales, difference, unrounded, pivots, errors, bad);
}
/// The same where two rows share their scales.
extern "C" __global__ void __launch_bounds__(THREADS, 2) sweep_row_pairs(
    const float* weights, const float* original, const float* r, int rows, int width, int first, int count,
    int group_size, int groups, int wide, int feedback, float ratio, int signed_scales, float scale_unit, float least, float greatest, i8* codes, float* scales,
    float* difference, float* unrounded, const float* pivots, double* errors, u32* bad
) {
    Grid grid{ratio, least, greatest, signed_scales, scale_unit};
    sweep<2>(weights, original, r, rows, width, first, count, group_size, groups, wide, feedback, grid, codes, scales, difference, unrounded, pivots, errors, bad);
}

/// The outlier block, the last `outliers` columns of `weights` `[rows, width]`: INT8 codes
/// `[rows, padded]` with zeros after them and one scale a row; or with `values` (not null) FP8's numbers
/// times one scale a row, or without `scales` (null) values rounded to f16. A warp a row.
extern "C" __global__ void __launch_bounds__(THREADS) outlier_block(
    const float* weights, int rows, int width, int outliers, int padded, float ratio, i8* codes, float* scales, float* values, u32* bad
) {
    long long row = (blockIdx.x * THREADS + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (row >= rows) return;
    const float* own = weights + row * width + (width - outliers);
    bool sound = true;
    if (values && !scales) {
        for (int i = lane; i < outliers; i += 32) {
            float value = to_float(to_half(own[i]));
            sound = sound && is_finite(value);
            values[row * outliers + i] = value;
        }
    } else {
        u32 most = 0;
        for (int i = lane; i < outliers; i += 32) most = max(most, peak_of(own[i]));
        Grid grid{ratio, 0.0f, 0.0f, 0, 1.0f};
        float scale = grid.scale(warp_max(most));
        float inverse = inverse_of(scale);
        sound = is_finite(scale);
        if (lane == 0) scales[row] = scale;
        if (values) {
            for (int i = lane; i < outliers; i += 32) values[row * outliers + i] = nearest_e4m3(own[i] * inverse) * scale;
        } else {
            for (int i = lane; i < padded; i += 32) {
                float code = i < outliers ? fminf(fmaxf(rintf(own[i] * inverse), -127.0f), 127.0f) : 0.0f;
                codes[row * padded + i] = (i8)code;
            }
        }
    }
    if (!sound) atomicMin(bad, (u32)row);
}

/// Adds to `errors` what the outlier columns cost (see sweep). `weights` holds the best value of each if
/// none were rounded; they are, without feedback, so the residue of each is its own rounding and what
/// the rounding of those before it brings. A warp a row.
extern "C" __global__ void __launch_bounds__(THREADS) outlier_errors(
    const float* weights, const float* original, const float* r, const float* pivots, int rows, int width, int outliers,
    int padded, const i8* codes, const float* scales, const float* values, double* errors
) {
    long long row = (blockIdx.x * THREADS + threadIdx.x) / 32;
    int lane = threadIdx.x % 32;
    if (row >= rows) return;
    int first = width - outliers;
    auto rounded = [&](int i) { return values ? values[row * outliers + i] : (float)codes[row * padded + i] * scales[row]; };
    float cost = 0.0f, square = 0.0f;
    for (int base = 0; base < outliers; base += 128) {
        float residue[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        for (int i = 0; i < min(outliers, base + 128); i++) {
            float lost = weights[row * width + first + i] - rounded(i);
            const float* coefficients = r + (long long)(first + i) * width + first;
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int j = base + 32 * k + lane;
                if (j > i && j < outliers) residue[k] = fmaf(lost, coefficients[j], residue[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int j = base + 32 * k + lane;
            if (j >= outliers) continue;
            float own = pivots[first + j] * (weights[row * width + first + j] - rounded(j) + residue[k]);
            float lost = original[row * width + first + j] - rounded(j);
            cost = fmaf(own, own, cost);
            square = fmaf(lost, lost, square);
        }
    }
    cost = warp_sum(cost);
    square = warp_sum(square);
    if (lane == 0) {
        errors[2 * row] += cost;
        errors[2 * row + 1] += square;
    }
}

/// `to` is `x` `[rows, n]` with its columns reversed. A row a block of `blockIdx.x`: all experts' rows may be more than a grid's
/// other dimensions hold.
extern "C" __global__ void __launch_bounds__(THREADS) reverse_columns(const float* x, int n, float* to) {
    long long row = blockIdx.x;
    int column = blockIdx.y * THREADS + threadIdx.x;
    if (column < n) to[row * n + column] = x[row * n + (n - 1 - column)];
}

/// `weights += share * change` for `weights` `[rows, n]` and a `change` whose columns are reversed.
extern "C" __global__ void __launch_bounds__(THREADS) add_reversed(float* weights, const float* change, int n, float share) {
    long long row = blockIdx.x;
    int column = blockIdx.y * THREADS + threadIdx.x;
    if (column < n) weights[row * n + column] = fmaf(share, change[row * n + (n - 1 - column)], weights[row * n + column]);
}

/// `x -= y`, `count` values.
extern "C" __global__ void __launch_bounds__(THREADS) subtract(float* x, const float* y, long long count) {
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i < count) x[i] -= y[i];
}

/// Scales `[ceil(rows / rows_per_scale), groups]` as the integer product reads them: one a row,
/// `[groups, stride]`.
extern "C" __global__ void __launch_bounds__(THREADS) expand_scales(
    const float* scales, int rows, int groups, int rows_per_scale, int stride, float* to
) {
    long long i = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (i >= (long long)rows * groups) return;
    to[i / rows * stride + i % rows] = scales[i % rows / rows_per_scale * groups + i / rows];
}

// The backward pass of what attention does to heads before its products: order, rotary embedding, basis, the cache's quantizer.
// f32; what heads are in registers is in heads.cuh. HEAD_LANES lanes a head, THREADS / HEAD_LANES heads a block.
//
// AFTER_ROPE  1: keys are quantized after the rotary embedding

#if !defined(THREADS) || !defined(AFTER_ROPE)
#error "a constant is missing: src/backend/cuda/kernels/train_heads.rs declares them"
#endif

/// A head of a token: in rows `[tokens, heads * HEAD_DIM]`, and in `[windows, heads, seq_len, PADDED_HEAD]`.
struct Place {
    bool there;
    int head, position;
    long long row, by_head;

    __device__ __forceinline__ Place(int tokens, int heads, int seq_len) {
        const long long all = (long long)tokens * heads, task = (long long)blockIdx.x * (THREADS / HEAD_LANES) + threadIdx.x / HEAD_LANES;
        there = task < all;
        const long long own = there ? task : 0;
        const int token = int(own / heads);
        head = int(own % heads);
        position = token % seq_len;
        row = own * HEAD_DIM;
        by_head = (((long long)(token / seq_len) * heads + head) * seq_len + position) * PADDED_HEAD;
    }
};

static __device__ __forceinline__ void load(float (&x)[HELD], const float* from) {
#pragma unroll
    for (int i = 0; i < HELD; i++) x[i] = channel_of(i) < HEAD_DIM ? from[channel_of(i)] : 0.0f;
}
static __device__ __forceinline__ void put(const float (&x)[HELD], const Place& place, float* to) {
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (place.there && channel_of(i) < HEAD_DIM) to[channel_of(i)] = x[i];
}

static __device__ __forceinline__ float* exchange_of_warp() {
#if QUADS
    return nullptr;
#else
    __shared__ float exchange[THREADS / 32][HEAD_DIM];
    return exchange[threadIdx.x / 32];
#endif
}

static __device__ __forceinline__ void embed_at(float (&x)[HELD], const float* cos, const float* sin, int position) {
    const long long angle = (long long)position * (HEAD_DIM / 2);
    embed(x, load_angle(cos + angle, sin + angle), exchange_of_warp());
}
/// The rotation by the negative angle: that of the conjugate, conjugated.
static __device__ __forceinline__ void embed_back(float (&x)[HELD], const float* cos, const float* sin, int position) {
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (channel_of(i) >= HEAD_DIM / 2) x[i] = -x[i];
    embed_at(x, cos, sin, position);
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (channel_of(i) >= HEAD_DIM / 2) x[i] = -x[i];
}

/// No gradient where the cache's quantizer clipped `x`.
static __device__ __forceinline__ void block_clipped(const float (&x)[HELD], float (&d)[HELD], float clip) {
#if KV_BITS < 16
    const Grid grid = grid_of(x, clip);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const float place = x[i] * grid.inverse + grid.zero;
        if (!(place >= 0.0f && place <= float((1 << KV_BITS) - 1))) d[i] = 0.0f;
    }
#endif
}

/// Gradients of outputs, by heads and in the basis of the values that were added up.
extern "C" __global__ void __launch_bounds__(THREADS) outputs_by_head(const float* d, int tokens, int heads, int seq_len, float* to) {
    const Place place(tokens, heads, seq_len);
    float x[HELD];
    load(x, d + place.row);
    if (ROTATED) transform(x);
    put(x, place, to + place.by_head);
    if (place.there && threadIdx.x % HEAD_LANES == 0)
        for (int i = HEAD_DIM; i < PADDED_HEAD; i++) to[place.by_head + i] = 0.0f;
}

/// Gradients of queries before the rotary embedding, from those of queries as the products see them.
extern "C" __global__ void __launch_bounds__(THREADS)
    queries_backward(const float* d, const float* cos, const float* sin, int tokens, int heads, int seq_len, float* to) {
    const Place place(tokens, heads, seq_len);
    float x[HELD];
    load(x, d + place.by_head);
    if (ROTATED && AFTER_ROPE) transform(x);
    embed_back(x, cos, sin, place.position);
    put(x, place, to + place.row);
}

/// The same of keys, which were `k` and lost `mean` [heads, HEAD_DIM], if it is not null.
extern "C" __global__ void __launch_bounds__(THREADS)
    keys_backward(const half* k, const float* d, const float* cos, const float* sin, const float* mean, float clip, int tokens, int heads, int seq_len, float* to) {
    const Place place(tokens, heads, seq_len);
    float x[HELD], gradient[HELD];
    load_head(x, k + place.row, place.there);
    load(gradient, d + place.by_head);
    if (!AFTER_ROPE) {
        embed_back(gradient, cos, sin, place.position);
        if (ROTATED) transform(gradient);
    } else {
        embed_at(x, cos, sin, place.position);
        if (mean) {
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (channel_of(i) < HEAD_DIM) x[i] -= mean[(long long)place.head * HEAD_DIM + channel_of(i)];
        }
    }
    if (ROTATED) transform(x);
    block_clipped(x, gradient, clip);
    if (ROTATED) transform(gradient);
    if (AFTER_ROPE) embed_back(gradient, cos, sin, place.position);
    put(gradient, place, to + place.row);
}

/// The same of values, which were `v`.
extern "C" __global__ void __launch_bounds__(THREADS) values_backward(const half* v, const float* d, float clip, int tokens, int heads, int seq_len, float* to) {
    const Place place(tokens, heads, seq_len);
    float x[HELD], gradient[HELD];
    load_head(x, v + place.row, place.there);
    load(gradient, d + place.by_head);
    if (ROTATED) transform(x);
    block_clipped(x, gradient, clip);
    if (ROTATED) transform(gradient);
    put(gradient, place, to + place.row);
}

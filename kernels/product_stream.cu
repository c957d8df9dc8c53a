// Few tokens: the weights are read once, and everything is about having enough of them on their way.
//
// A tile is 64 * BLOCKS rows and all tokens. A cluster of gridDim.y blocks of threads shares its stages, in equal
// runs, and in a block SPLIT warpgroups take the run's stages in turn. In the end they add their totals, in the
// order of blocks and warpgroups, through each other's shared memory. Macros and operands: hopper.cuh, and
//
//     SPLIT    warpgroups that take a run's stages in turn
//     PER_SM   blocks of threads that an SM should hold

/// Threads that multiply; a warp more copies.
#define THREADS (128 * BLOCKS * SPLIT)

static __device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/// A float of another block's shared memory, at this block's address.
static __device__ __forceinline__ float load_remote(u32 address, int rank) {
    float value;
    asm volatile("{\n.reg .u32 remote;\nmapa.shared::cluster.u32 remote, %1, %2;\nld.shared::cluster.f32 %0, [remote];\n}"
                 : "=f"(value) : "r"(address), "r"(rank) : "memory");
    return value;
}

/// Where result `i` of thread `thread` of a block of 64 rows belongs.
static __device__ __forceinline__ void place(Output* y, int i, int thread, int first_row, int tokens, int rows, float value) {
    const int token = i / 4 * 8 + thread % 4 * 2 + i % 2, row = first_row + thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
    if (token < tokens && row < rows) store(y + (long long)token * rows + row, value);
}

/// Grid (ceil(rows / (64 * BLOCKS)), splits) in clusters of (1, splits, 1); THREADS + 32 threads, and
/// STAGES * STAGE_BYTES + TOKENS * 128 + 1024 bytes of dynamic shared memory. At most TOKENS tokens.
extern "C" __global__ void __launch_bounds__(THREADS + 32, PER_SM)
    integer_stream(const i8* x, const half* sx, const i8* xo, const float* sxo, const i8* w, const i8* wo, Output* y, int tokens,
                   int padded, int rows, int panels, int halves) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * STAGES];
    const Operands of{x, sx, xo, sxo, w, wo, tokens, padded, rows, panels, halves};
    const u32 stages = (shared_address(memory) + 1023) / 1024 * 1024;
    make_ring(shared_address(barriers), 4 * BLOCKS);
    const int all = panels + halves, splits = gridDim.y, rank = blockIdx.y;
    const int begin = all * rank / splits, end = all * (rank + 1) / splits;
    if (threadIdx.x >= THREADS) {
        if (threadIdx.x == THREADS) {
            Ring<1> ring(stages, shared_address(barriers), 0);
            for (int stage = begin; stage < end; stage++, ring.next()) {
                ask_for_weights(of, ring, 0, blockIdx.x * BLOCKS, stage);
                ask_for_tokens(of, ring, 0, stage);
            }
        }
        __syncwarp();
        if (splits > 1) {
            cluster_barrier();
            cluster_barrier();
        }
        return;
    }
    const int thread = threadIdx.x % 128, group = threadIdx.x / 128, own = group % BLOCKS, turn = group / BLOCKS;
    Ring<SPLIT> ring(stages, shared_address(barriers), turn);
    float total[HELD];
    u32 sums[HELD], scales[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) total[i] = 0.0f;
    int stage = begin + turn;
#pragma unroll 1
    for (; stage < min(end, panels); stage += SPLIT) {
        ring.wait();
        const u32 here = ring.here, block = here + X_BYTES + own * BLOCK_BYTES;
        u32 a[16];
        Words words;
        words.load(block);
        words.unpack_to(a);
        pin(a);
#pragma unroll
        for (int g = 0; g < GROUPS_A_STAGE; g++) {
            const RowColumns columns(load_row_scales(block + CODE_BYTES + g * 128), stage * GROUPS_A_STAGE + g);
            start_group(sums, scales, a, columns, here, g);
            finish_group(sums, scales);
            promote(total, sums, scales);
        }
        release(ring.empty());
        ring.next();
    }
    set_right(total);
#pragma unroll 1
    for (bool add = false; stage < end; stage += SPLIT, add = true) {
        ring.wait();
        const u32 here = ring.here, block = here + X_BYTES + own * BLOCK_BYTES;
        multiply_outliers(sums, here, block, (stage - panels) % 2, add);
        if (stage + SPLIT >= end) promote_outliers(total, sums, here, block);
        release(ring.empty());
        ring.next();
    }
    const int first_row = (blockIdx.x * BLOCKS + own) * 64;
    if (SPLIT == 1 && splits == 1) {
#pragma unroll
        for (int i = 0; i < HELD; i++) place(y, i, thread, first_row, tokens, rows, total[i]);
        return;
    }
    // The stages have all been used, by every warpgroup: their memory is free.
    group_barrier(1, THREADS);
#pragma unroll
    for (int i = 0; i < HELD; i++)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(stages + ((group * HELD + i) * 128 + thread) * 4), "f"(total[i]) : "memory");
    if (splits > 1)
        cluster_barrier();
    else
        group_barrier(1, THREADS);
    for (int index = rank * THREADS + threadIdx.x; index < BLOCKS * HELD * 128; index += splits * THREADS) {
        float sum = 0.0f;
        for (int other = 0; other < splits; other++) {
#pragma unroll
            for (int part = 0; part < SPLIT; part++) sum += load_remote(stages + (part * BLOCKS * HELD * 128 + index) * 4, other);
        }
        place(y, index / 128 % HELD, index % 128, (blockIdx.x * BLOCKS + index / (HELD * 128)) * 64, tokens, rows, sum);
    }
    // Nobody leaves while others read.
    if (splits > 1) cluster_barrier();
}

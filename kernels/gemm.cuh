// Matrix products, out (rows, columns) = a (rows, depth) @ b (depth, columns): each output is one chain of fused
// multiply-adds over ascending k, starting from +0. How the outputs are tiled therefore cannot show in them.
//
// A block computes TILE x TILE outputs, a thread PER x PER of them. Slabs of SLAB values of k go through shared
// memory, laid out so that a thread reads its rows and columns as vectors; the next slab is on its way from
// global memory to registers while this one is multiplied.

namespace gpubn {

const int SLAB = 16;  // values of k in shared memory at a time

// One operand's way into shared memory. Its element (i, k), i a row of a or a column of b, lies at
// i * depth + k where K_INNERMOST, else at k * extent + i. Neighbours in memory go to neighbouring threads.
template <class T, int TILE, int THREADS, int K_INNERMOST>
struct Operand {
    static const int LOADS = TILE * SLAB / THREADS;
    static const int I_STEP = K_INNERMOST ? THREADS / SLAB : 0;  // from one load to the next
    static const int K_STEP = K_INNERMOST ? 0 : THREADS / TILE;
    const T* at;  // the next slab's first load
    long long i, k, extent, depth;
    int shared_i, shared_k;
    T next[LOADS];

    __device__ Operand(const T* values, long long extent_, long long depth_, long long first)
        : extent(extent_), depth(depth_) {
        int t = threadIdx.x;
        shared_i = K_INNERMOST ? t / SLAB : t % TILE;
        shared_k = K_INNERMOST ? t % SLAB : t / TILE;
        i = first + shared_i;
        k = shared_k;
        at = values + (K_INNERMOST ? i * depth + k : k * extent + i);
    }
    __device__ void fetch() {
        const long long step = K_INNERMOST ? I_STEP * depth : K_STEP * extent;
        const T* from = at;
#pragma unroll
        for (int load = 0; load < LOADS; load++, from += step) {
            bool inside = i + load * I_STEP < extent && k + load * K_STEP < depth;
            next[load] = inside ? *from : (T)0;
        }
        at += K_INNERMOST ? SLAB : SLAB * extent;
        k += SLAB;
    }
    __device__ void store(T (*shared)[TILE + 4]) const {
#pragma unroll
        for (int load = 0; load < LOADS; load++)
            shared[shared_k + load * K_STEP][shared_i + load * I_STEP] = next[load];
    }
};

// Which of the tile's rows, or columns, is number n of thread t's PER: runs of up to four neighbours.
template <int TILE, int PER>
__device__ inline int place(int t, int n) {
    const int RUN = PER < 4 ? PER : 4;
    return n / RUN * (TILE / (PER / RUN)) + t * RUN + n % RUN;
}

template <class T, int TILE, int PER, int A_K_INNERMOST, int B_K_INNERMOST>
__global__ void matmul(const T* a, const T* b, T* out, long long rows, long long columns,
                       long long depth) {
    using R = real<T>;
    const int ACROSS = TILE / PER, THREADS = ACROSS * ACROSS;
    __align__(16) __shared__ T left[2][SLAB][TILE + 4];  // + 4: the banks of neighbouring k differ
    __align__(16) __shared__ T right[2][SLAB][TILE + 4];
    const int tx = threadIdx.x % ACROSS, ty = threadIdx.x / ACROSS;
    long long across = (columns + TILE - 1) / TILE;
    long long row = blockIdx.x / across * TILE, column = blockIdx.x % across * TILE;
    Operand<T, TILE, THREADS, A_K_INNERMOST> from_a(a, rows, depth, row);
    Operand<T, TILE, THREADS, B_K_INNERMOST> from_b(b, columns, depth, column);

    R sum[PER][PER] = {};
    auto multiply = [&](int buffer, int k) {
        R u[PER], v[PER];
#pragma unroll
        for (int n = 0; n < PER; n++) {
            u[n] = R(left[buffer][k][place<TILE, PER>(ty, n)]);
            v[n] = R(right[buffer][k][place<TILE, PER>(tx, n)]);
        }
#pragma unroll
        for (int i = 0; i < PER; i++)
#pragma unroll
            for (int j = 0; j < PER; j++) sum[i][j] = fma(u[i], v[j], sum[i][j]);
    };

    from_a.fetch();
    from_b.fetch();
    int buffer = 0;
    for (long long slab = 0; slab < depth; slab += SLAB, buffer = 1 - buffer) {
        from_a.store(left[buffer]);
        from_b.store(right[buffer]);
        __syncthreads();  // one is enough: nobody writes to this buffer before all have passed the next
        from_a.fetch();
        from_b.fetch();
        if (depth - slab >= SLAB) {
#pragma unroll
            for (int k = 0; k < SLAB; k++) multiply(buffer, k);
        } else {  // a step too many would add +0, and turn a -0 into +0
            for (int k = 0; k < depth - slab; k++) multiply(buffer, k);
        }
    }

#pragma unroll
    for (int i = 0; i < PER; i++)
#pragma unroll
        for (int j = 0; j < PER; j++) {
            long long r = row + place<TILE, PER>(ty, i), c = column + place<TILE, PER>(tx, j);
            if (r < rows && c < columns) out[r * columns + c] = sum[i][j].v;
        }
}

}  // namespace gpubn

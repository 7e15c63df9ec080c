// RMS norm of every row of x (N, D), in the sample order. How rows are cut up is in rows.cuh.

namespace gpubn {

// Squares are scaled by a power of two near 1 / D before they are summed, so that their sum overflows
// only where their mean does.
template <class S, int V, int PER, int LANES>
__launch_bounds__(MAX_TEAM)
__global__ void rmsnorm_forward(const raw_of<S>* x, const typename storage<S>::type* gamma, raw_of<S>* out,
                                typename storage<S>::type* invrms, long long rows, long long columns,
                                typename storage<S>::type eps, typename storage<S>::type square_scale) {
    using T = typename storage<S>::type;
    using R = real<T>;
    using L = Layout<V, PER, LANES>;
    long long row = team_row();
    if (row >= rows) return;
    x += row * columns;
    out += row * columns;
    R d(columns), scale(square_scale), value[PER];
    auto read = [&](long long start, int count) {
        Chunk<raw_of<S>, V> chunk[L::CHUNKS];
        fetch<L>(x + start, count, chunk);
#pragma unroll
        for (int j = 0; j < PER; j++) value[j] = value_of<S, V>(chunk, j);
    };
    R sum = row_node<R>(columns, L::tile(), [&](long long start, int count) {
        read(start, count);
        R square[1][PER];
#pragma unroll
        for (int j = 0; j < PER; j++) {
            int place = L::place(j / V);
            square[0][j] = place < count ? (value[j] * scale) * value[j] : beyond<T>(place, count);
        }
        return team_sums<L, T, 1>(square, count).sum[0];
    });
    R s = R((T)1) / sqrt(sum / (d * scale) + R(eps));
    each_tile<L>(columns, read, [&](long long start, int count) {
#pragma unroll
        for (int t = 0; t < L::CHUNKS; t++) {
            if (L::place(t) >= count) continue;
            long long at = start + L::place(t);
            auto g = read_chunk<V>(gamma + at);
            Chunk<raw_of<S>, V> y;
#pragma unroll
            for (int i = 0; i < V; i++) y.value[i] = store<S>((value[t * V + i] * s) * R(g.value[i]));
            write_chunk(out + at, y);
        }
    });
    if (threadIdx.x == 0) invrms[row] = s.v;
}

// With g = dout * gamma and xhat = x * invrms: dx = invrms * (g - xhat * (sum(g * xhat) / D)).
// The gradient of gamma is the sum over the rows of dout * xhat.
template <class T>
struct RmsNorm {
    static const int SUMS = 1;
    const T* invrms;

    struct Row {
        real<T> s;
        __device__ real<T> xhat(real<T> x) const { return x * s; }
        __device__ real<T> dx(real<T> g, real<T> xhat, const real<T>* mean_of) const {
            return s * (g - xhat * mean_of[0]);
        }
    };
    __device__ Row row(long long r) const { return {real<T>(invrms[r])}; }
};

template <class S, int V, int PER, int LANES>
__launch_bounds__(MAX_TEAM)
__global__ void rmsnorm_backward_dx(const raw_of<S>* dout, const raw_of<S>* x,
                                    const typename storage<S>::type* invrms,
                                    const typename storage<S>::type* gamma, raw_of<S>* dx, long long rows,
                                    long long columns) {
    RmsNorm<typename storage<S>::type> norm = {invrms};
    backward_of_rows<S, Layout<V, PER, LANES>>(dout, x, norm, gamma, dx, rows, columns);
}

template <class S, int V, int PER, int LANES, int DX>
__launch_bounds__(MAX_TEAM)
__global__ void rmsnorm_gradients(const raw_of<S>* dout, const raw_of<S>* x,
                                  const typename storage<S>::type* invrms,
                                  const typename storage<S>::type* gamma, raw_of<S>* dx,
                                  typename storage<S>::type* parts, unsigned tiles, long long rows,
                                  long long columns) {
    RmsNorm<typename storage<S>::type> norm = {invrms};
    gradients_of_rows<S, Layout<V, PER, LANES>, DX>(dout, x, norm, gamma, dx, parts, tiles, rows, columns);
}

}  // namespace gpubn

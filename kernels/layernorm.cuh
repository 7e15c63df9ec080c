// Layer norm of every row of x (N, D), in the sample order. How rows are cut up is in rows.cuh.

namespace gpubn {

template <class S, int V, int PER, int LANES>
__launch_bounds__(MAX_TEAM)
__global__ void layernorm_forward(const raw_of<S>* x, const typename storage<S>::type* gamma,
                                  const typename storage<S>::type* beta, raw_of<S>* out,
                                  typename storage<S>::type* shift, typename storage<S>::type* mean,
                                  typename storage<S>::type* invstd, long long rows, long long columns,
                                  typename storage<S>::type eps) {
    using T = typename storage<S>::type;
    using R = real<T>;
    using L = Layout<V, PER, LANES>;
    long long row = team_row();
    if (row >= rows) return;
    x += row * columns;
    out += row * columns;
    R k(middle(load<S>(x[0]).v, load<S>(x[columns / 2]).v, load<S>(x[columns - 1]).v)), d[PER];
    auto read = [&](long long start, int count) {
        Chunk<raw_of<S>, V> chunk[L::CHUNKS];
        fetch<L>(x + start, count, chunk);
#pragma unroll
        for (int j = 0; j < PER; j++) d[j] = L::place(j / V) < count ? value_of<S, V>(chunk, j) - k : R((T)0);
    };
    Moments<T> all = row_node<Moments<T>>(columns, L::tile(), [&](long long start, int count) {
        read(start, count);
        return team_moments<L>(d, count);
    });
    R s = R((T)1) / sqrt(all.var + R(eps));
    each_tile<L>(columns, read, [&](long long start, int count) {
#pragma unroll
        for (int t = 0; t < L::CHUNKS; t++) {
            if (L::place(t) >= count) continue;
            long long at = start + L::place(t);
            auto g = read_chunk<V>(gamma + at), b = read_chunk<V>(beta + at);
            Chunk<raw_of<S>, V> y;
#pragma unroll
            for (int i = 0; i < V; i++)
                y.value[i] = store<S>(((d[t * V + i] - all.mean) * s) * R(g.value[i]) + R(b.value[i]));
            write_chunk(out + at, y);
        }
    });
    if (threadIdx.x == 0) {
        shift[row] = k.v;
        mean[row] = all.mean.v;
        invstd[row] = s.v;
    }
}

// With g = dout * gamma: dx = invstd * ((g - sum(g) / D) - xhat * (sum(g * xhat) / D)).
// The gradients of gamma and beta are the sums over the rows of dout * xhat and of dout.
template <class T>
struct LayerNorm {
    static const int SUMS = 2;
    const T *shift, *mean, *invstd;

    struct Row {
        real<T> k, m, s;
        __device__ real<T> xhat(real<T> x) const { return ((x - k) - m) * s; }
        __device__ real<T> dx(real<T> g, real<T> xhat, const real<T>* mean_of) const {
            return s * ((g - mean_of[1]) - xhat * mean_of[0]);
        }
    };
    __device__ Row row(long long r) const { return {real<T>(shift[r]), real<T>(mean[r]), real<T>(invstd[r])}; }
};

template <class S, int V, int PER, int LANES>
__launch_bounds__(MAX_TEAM)
__global__ void layernorm_backward_dx(const raw_of<S>* dout, const raw_of<S>* x,
                                      const typename storage<S>::type* shift,
                                      const typename storage<S>::type* mean,
                                      const typename storage<S>::type* invstd,
                                      const typename storage<S>::type* gamma, raw_of<S>* dx, long long rows,
                                      long long columns) {
    LayerNorm<typename storage<S>::type> norm = {shift, mean, invstd};
    backward_of_rows<S, Layout<V, PER, LANES>>(dout, x, norm, gamma, dx, rows, columns);
}

template <class S, int V, int PER, int LANES, int DX>
__launch_bounds__(MAX_TEAM)
__global__ void layernorm_gradients(const raw_of<S>* dout, const raw_of<S>* x,
                                    const typename storage<S>::type* shift,
                                    const typename storage<S>::type* mean,
                                    const typename storage<S>::type* invstd,
                                    const typename storage<S>::type* gamma, raw_of<S>* dx,
                                    typename storage<S>::type* parts, unsigned tiles, long long rows,
                                    long long columns) {
    LayerNorm<typename storage<S>::type> norm = {shift, mean, invstd};
    gradients_of_rows<S, Layout<V, PER, LANES>, DX>(dout, x, norm, gamma, dx, parts, tiles, rows, columns);
}

}  // namespace gpubn

// Layer norm of every row of x (N, D), in the sample order (samples.cuh). A block takes a row.

namespace gpubn {

template <class S>
__global__ void layernorm_forward(const raw_of<S>* x, const typename storage<S>::type* gamma,
                                  const typename storage<S>::type* beta, raw_of<S>* out,
                                  typename storage<S>::type* shift, typename storage<S>::type* mean,
                                  typename storage<S>::type* invstd, long long columns,
                                  typename storage<S>::type eps) {
    using T = typename storage<S>::type;
    using R = real<T>;
    long long row = blockIdx.x;
    x += row * columns;
    out += row * columns;
    R k(middle(load<S>(x[0]).v, load<S>(x[columns / 2]).v, load<S>(x[columns - 1]).v));
    Moments<T> all = row_moments<T>(columns, [=](long long j) { return load<S>(x[j]) - k; });
    R s = R((T)1) / sqrt(all.var + R(eps));
    for (long long j = threadIdx.x; j < columns; j += THREADS)
        out[j] = store<S>((((load<S>(x[j]) - k) - all.mean) * s) * R(gamma[j]) + R(beta[j]));
    if (threadIdx.x == 0) {
        shift[row] = k.v;
        mean[row] = all.mean.v;
        invstd[row] = s.v;
    }
}

// With g = dout * gamma: dx = invstd * ((g - sum(g) / D) - xhat * (sum(g * xhat) / D))
template <class S>
__global__ void layernorm_backward_dx(const raw_of<S>* dout, const raw_of<S>* x,
                                      const typename storage<S>::type* gamma,
                                      const typename storage<S>::type* shift,
                                      const typename storage<S>::type* mean,
                                      const typename storage<S>::type* invstd, raw_of<S>* dx,
                                      long long columns) {
    using T = typename storage<S>::type;
    using R = real<T>;
    long long row = blockIdx.x;
    dout += row * columns;
    x += row * columns;
    dx += row * columns;
    R k(shift[row]), m(mean[row]), s(invstd[row]), d(columns);
    auto xhat = [=](long long j) { return ((load<S>(x[j]) - k) - m) * s; };
    auto g = [=](long long j) { return load<S>(dout[j]) * R(gamma[j]); };
    R mean_g = row_sum<T>(columns, g) / d;
    R mean_gx = row_sum<T>(columns, [=](long long j) { return g(j) * xhat(j); }) / d;
    for (long long j = threadIdx.x; j < columns; j += THREADS)
        dx[j] = store<S>(s * ((g(j) - mean_g) - xhat(j) * mean_gx));
}

// Sums over the rows of dout * xhat and of dout: the gradients of gamma and beta.
template <class S, int COLUMNS>
__global__ void layernorm_sums(const raw_of<S>* dout, const raw_of<S>* x,
                               const typename storage<S>::type* shift,
                               const typename storage<S>::type* mean,
                               const typename storage<S>::type* invstd, typename storage<S>::type* out,
                               long long channels, long long tiles, long long rows, long long,
                               long long columns, long long) {
    using T = typename storage<S>::type;
    using R = real<T>;
    reduce_tile<2, COLUMNS, Sums<T, 2>>(channels, tiles, out, [=](long long leaf, long long column) {
        Sums<T, 2> node = {};
        R g[8] = {}, h[8] = {};
        node.rows = rows_of(leaf, 8, rows);
        for (int i = 0; i < node.rows; i++) {
            long long row = leaf * 8 + i, at = row * columns + column;
            g[i] = load<S>(dout[at]);
            h[i] = g[i] * (((load<S>(x[at]) - R(shift[row])) - R(mean[row])) * R(invstd[row]));
        }
        node.sum[0] = sum8(h);
        node.sum[1] = sum8(g);
        return node;
    });
}

}  // namespace gpubn

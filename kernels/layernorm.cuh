// Layer norm of every row of x (N, D), in the row order (rows.cuh). One block takes one row.

namespace gpubn {

// A row lies in cache, so its moments take two passes: the mean of the distances from K, then the mean
// square of the distances from that. The squares are scaled by a power of two near 1 / D before they
// are summed, so that their sum overflows only where the variance does.
template <class T>
__global__ void layernorm_forward(const T* x, const T* gamma, const T* beta, T* out, T* shift, T* mean,
                                  T* invstd, long long columns, T eps, T square_scale) {
    using R = real<T>;
    long long row = blockIdx.x;
    x += row * columns;
    out += row * columns;
    R k(middle(x[0], x[columns / 2], x[columns - 1]));
    R d(columns), scale(square_scale);
    R m = row_sum<T>(columns, [=](long long j) { return R(x[j]) - k; }) / d;
    R var = row_sum<T>(columns, [=](long long j) {
        R e = (R(x[j]) - k) - m;
        return (e * scale) * e;
    }) / (d * scale);
    R s = R((T)1) / sqrt(var + R(eps));
    for (long long j = threadIdx.x; j < columns; j += LANES)
        out[j] = ((((R(x[j]) - k) - m) * s) * R(gamma[j]) + R(beta[j])).v;
    if (threadIdx.x == 0) {
        shift[row] = k.v;
        mean[row] = m.v;
        invstd[row] = s.v;
    }
}

// With g = dout * gamma: dx = invstd * ((g - sum(g) / D) - xhat * (sum(g * xhat) / D))
template <class T>
__global__ void layernorm_backward_dx(const T* dout, const T* x, const T* gamma, const T* shift,
                                      const T* mean, const T* invstd, T* dx, long long columns) {
    using R = real<T>;
    long long row = blockIdx.x;
    dout += row * columns;
    x += row * columns;
    dx += row * columns;
    R k(shift[row]), m(mean[row]), s(invstd[row]), d(columns);
    auto xhat = [=](long long j) { return ((R(x[j]) - k) - m) * s; };
    auto g = [=](long long j) { return R(dout[j]) * R(gamma[j]); };
    R mean_g = row_sum<T>(columns, g) / d;
    R mean_gx = row_sum<T>(columns, [=](long long j) { return g(j) * xhat(j); }) / d;
    for (long long j = threadIdx.x; j < columns; j += LANES)
        dx[j] = (s * ((g(j) - mean_g) - xhat(j) * mean_gx)).v;
}

}  // namespace gpubn

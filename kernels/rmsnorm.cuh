// RMS norm of every row of x (N, D), in the sample order (samples.cuh). A block takes a row.

namespace gpubn {

// Squares are scaled by a power of two near 1 / D before they are summed, so that their sum overflows
// only where their mean does.
template <class S>
__global__ void rmsnorm_forward(const raw_of<S>* x, const typename storage<S>::type* gamma, raw_of<S>* out,
                                typename storage<S>::type* invrms, long long columns,
                                typename storage<S>::type eps, typename storage<S>::type square_scale) {
    using T = typename storage<S>::type;
    using R = real<T>;
    long long row = blockIdx.x;
    x += row * columns;
    out += row * columns;
    R d(columns), scale(square_scale);
    R sum = row_sum<T>(columns, [=](long long j) { return (load<S>(x[j]) * scale) * load<S>(x[j]); });
    R s = R((T)1) / sqrt(sum / (d * scale) + R(eps));
    for (long long j = threadIdx.x; j < columns; j += THREADS)
        out[j] = store<S>((load<S>(x[j]) * s) * R(gamma[j]));
    if (threadIdx.x == 0) invrms[row] = s.v;
}

// With g = dout * gamma and xhat = x * invrms: dx = invrms * (g - xhat * (sum(g * xhat) / D))
template <class S>
__global__ void rmsnorm_backward_dx(const raw_of<S>* dout, const raw_of<S>* x,
                                    const typename storage<S>::type* gamma,
                                    const typename storage<S>::type* invrms, raw_of<S>* dx,
                                    long long columns) {
    using T = typename storage<S>::type;
    using R = real<T>;
    long long row = blockIdx.x;
    dout += row * columns;
    x += row * columns;
    dx += row * columns;
    R s(invrms[row]), d(columns);
    auto xhat = [=](long long j) { return load<S>(x[j]) * s; };
    auto g = [=](long long j) { return load<S>(dout[j]) * R(gamma[j]); };
    R mean_gx = row_sum<T>(columns, [=](long long j) { return g(j) * xhat(j); }) / d;
    for (long long j = threadIdx.x; j < columns; j += THREADS)
        dx[j] = store<S>(s * (g(j) - xhat(j) * mean_gx));
}

}  // namespace gpubn

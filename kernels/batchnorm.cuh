// Batch norm over the rows of x (N, D), in the column order (columns.cuh).

namespace gpubn {

// The moments of x after the shift K: distances are taken from a sample of the channel, so that a mean
// of 1e6 beside a deviation of 0.5 keeps its variance, and a constant channel has a variance of exactly 0.
template <class T>
__global__ void batchnorm_moments(const T* x, const T* shift, T* out, long long columns,
                                  long long tiles, long long rows) {
    using R = real<T>;
    reduce_tile<2, Moments<T>>(columns, tiles, out, [=](long long leaf, long long column) {
        Moments<T> node = {};
        node.rows = rows_of(leaf, 8, rows);
        if (node.rows == 0) return node;
        R k(shift[column]), d[8] = {};
        for (int i = 0; i < node.rows; i++) d[i] = R(x[(leaf * 8 + i) * columns + column]) - k;
        // Eight is a power of two: there the division is a multiplication, and exact.
        R n(node.rows), eighth((T)0.125);
        R sum = sum8(d);
        node.mean = node.rows == 8 ? sum * eighth : sum / n;
        R square[8] = {};
        for (int i = 0; i < node.rows; i++) {
            R e = d[i] - node.mean;
            square[i] = (e * eighth) * e;
        }
        sum = sum8(square);
        node.var = node.rows == 8 ? sum : sum / (n * eighth);
        return node;
    });
}

template <class T>
__device__ inline T batchnorm_invstd(T var, T eps) {
    using R = real<T>;
    return (R((T)1) / sqrt(R(var) + R(eps))).v;
}

// running = momentum * running + (1 - momentum) * sample, where complement is 1 - momentum, rounded once.
template <class T>
__device__ inline T running_update(T running, T sample, T momentum, T complement) {
    using R = real<T>;
    return (R(momentum) * R(running) + R(complement) * R(sample)).v;
}

// ((x - K) - mean) * (gamma * invstd) + beta
template <class T>
__device__ inline T batchnorm_normalize(T x, T shift, T mean, T scale, T beta) {
    using R = real<T>;
    return (((R(x) - R(shift)) - R(mean)) * R(scale) + R(beta)).v;
}

// gamma * invstd * ((dout - sum(dout) / N) - xhat * (sum(dout * xhat) / N))
template <class T>
__device__ inline T batchnorm_dx(T dout, T x, T shift, T mean, T invstd, T scale, T dgamma_over_n,
                                 T dbeta_over_n) {
    using R = real<T>;
    R xhat = ((R(x) - R(shift)) - R(mean)) * R(invstd);
    return (R(scale) * ((R(dout) - R(dbeta_over_n)) - xhat * R(dgamma_over_n))).v;
}

}  // namespace gpubn

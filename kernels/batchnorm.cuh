// Batch norm: every channel normalized over its samples, in the sample order (samples.cuh). Statistics, scale
// and beta are arrays over the channels of all instances, so instance and group norm use it too.

namespace gpubn {

// The moments of x after the shift K: distances are taken from a sample of the channel, so that a mean
// of 1e6 beside a deviation of 0.5 keeps its variance, and a constant channel has a variance of exactly 0.
template <class S, int COLUMNS>
__global__ void batchnorm_moments(const raw_of<S>* x, const typename storage<S>::type* shift,
                                  typename storage<S>::type* out, long long channels, long long tiles,
                                  long long rows, long long batch, long long per_instance, long long inner) {
    using T = typename storage<S>::type;
    Shape shape = {batch, per_instance, inner};
    reduce_tile<2, COLUMNS, Moments<T>>(channels, tiles, out, [=](long long leaf, long long channel) {
        real<T> k(shift[channel]), d[8] = {};
        long long count = rows_of(leaf, 8, rows);
        Walk walk(shape, channel, leaf * 8);
        for (int i = 0; i < count; i++, walk.next()) d[i] = load<S>(x[walk.at]) - k;
        return moments_leaf(d, count);
    });
}

template <class T>
__device__ inline T batchnorm_invstd(T var, T eps) {
    using R = real<T>;
    return (R((T)1) / sqrt(R(var) + R(eps))).v;
}

// running = momentum * running + complement * sample; what has no weight has no part, an infinity either.
template <class T>
__device__ inline T running_update(T running, real<T> sample, T momentum, T complement) {
    using R = real<T>;
    R zero((T)0);
    if (!(R(complement) != zero)) return running;
    if (!(R(momentum) != zero)) return sample.v;
    return (R(momentum) * R(running) + R(complement) * sample).v;
}

// ((x - K) - mean) * (gamma * invstd) + beta, as it is stored
template <class S, class T>
__device__ inline raw_of<S> batchnorm_normalize(raw_of<S> x, T shift, T mean, T scale, T beta) {
    using R = real<T>;
    return store<S>(((load<S>(x) - R(shift)) - R(mean)) * R(scale) + R(beta));
}

// The same as ReLU after it, of what is stored; and as a sum with a residual and then ReLU.
template <class S, class T>
__device__ inline raw_of<S> batchnorm_relu(raw_of<S> x, T shift, T mean, T scale, T beta) {
    return store<S>(relu(load<S>(batchnorm_normalize<S>(x, shift, mean, scale, beta))));
}

template <class S, class T>
__device__ inline raw_of<S> batchnorm_add_relu(raw_of<S> x, raw_of<S> residual, T shift, T mean, T scale,
                                               T beta) {
    real_of<S> y = load<S>(batchnorm_normalize<S>(x, shift, mean, scale, beta));
    return store<S>(relu(load<S>(store<S>(y + load<S>(residual)))));
}

// dout where the output that ReLU saw was above 0, else +0.
template <class S>
__device__ inline real_of<S> relu_gradient(raw_of<S> dout, raw_of<S> out) {
    real_of<S> zero = {};
    return load<S>(out) > zero ? load<S>(dout) : zero;
}

// The gradient of what ReLU saw, where the output is computed anew.
template <class S, class T>
__device__ inline real_of<S> batchnorm_relu_gradient(raw_of<S> dout, raw_of<S> x, T shift, T mean, T scale,
                                                     T beta) {
    return relu_gradient<S>(dout, batchnorm_normalize<S>(x, shift, mean, scale, beta));
}

// (scale * g - constant) - xhat * slope: constant and slope are the shares of sum(g) and sum(g * xhat).
template <class S, class T>
__device__ inline raw_of<S> batchnorm_dx(real<T> g, raw_of<S> x, T shift, T mean, T invstd, T scale,
                                         T constant, T slope) {
    using R = real<T>;
    R xhat = ((load<S>(x) - R(shift)) - R(mean)) * R(invstd);
    return store<S>((R(scale) * g - R(constant)) - xhat * R(slope));
}

// Sums over each channel's samples of g * xhat and of g: the gradients of gamma and beta.
// `gradient(at, channel)` gives g.
template <class S, int COLUMNS, class T, class Gradient>
__device__ inline void gradient_sums(const raw_of<S>* x, const T* shift, const T* mean, const T* invstd,
                                     T* out, long long channels, long long tiles, long long rows,
                                     Shape shape, Gradient gradient) {
    using R = real<T>;
    reduce_tile<2, COLUMNS, Sums<T, 2>>(channels, tiles, out, [=](long long leaf, long long channel) {
        Sums<T, 2> node = {};
        R g[8] = {}, h[8] = {}, k(shift[channel]), m(mean[channel]), s(invstd[channel]);
        node.rows = rows_of(leaf, 8, rows);
        Walk walk(shape, channel, leaf * 8);
        for (int i = 0; i < node.rows; i++, walk.next()) {
            g[i] = gradient(walk.at, channel);
            h[i] = g[i] * (((load<S>(x[walk.at]) - k) - m) * s);
        }
        node.sum[0] = sum8(h);
        node.sum[1] = sum8(g);
        return node;
    });
}

template <class S, int COLUMNS>
__global__ void batchnorm_sums(const raw_of<S>* dout, const raw_of<S>* x,
                               const typename storage<S>::type* shift,
                               const typename storage<S>::type* mean,
                               const typename storage<S>::type* invstd, typename storage<S>::type* out,
                               long long channels, long long tiles, long long rows, long long batch,
                               long long per_instance, long long inner) {
    gradient_sums<S, COLUMNS>(x, shift, mean, invstd, out, channels, tiles, rows,
                              {batch, per_instance, inner},
                              [=](long long at, long long) { return load<S>(dout[at]); });
}

template <class S, int COLUMNS>
__global__ void batchnorm_relu_sums(const raw_of<S>* dout, const raw_of<S>* x,
                                    const typename storage<S>::type* shift,
                                    const typename storage<S>::type* mean,
                                    const typename storage<S>::type* invstd,
                                    const typename storage<S>::type* scale,
                                    const typename storage<S>::type* beta, typename storage<S>::type* out,
                                    long long channels, long long tiles, long long rows, long long batch,
                                    long long per_instance, long long inner) {
    gradient_sums<S, COLUMNS>(
        x, shift, mean, invstd, out, channels, tiles, rows, {batch, per_instance, inner},
        [=](long long at, long long c) {
            return batchnorm_relu_gradient<S>(dout[at], x[at], shift[c], mean[c], scale[c], beta[c]);
        });
}

// Writes the gradient of what ReLU saw, which is the residual's, to dresidual.
template <class S, int COLUMNS>
__global__ void batchnorm_add_relu_sums(const raw_of<S>* dout, const raw_of<S>* forward_out,
                                        raw_of<S>* dresidual, const raw_of<S>* x,
                                        const typename storage<S>::type* shift,
                                        const typename storage<S>::type* mean,
                                        const typename storage<S>::type* invstd,
                                        typename storage<S>::type* out, long long channels,
                                        long long tiles, long long rows, long long batch,
                                        long long per_instance, long long inner) {
    gradient_sums<S, COLUMNS>(x, shift, mean, invstd, out, channels, tiles, rows,
                              {batch, per_instance, inner}, [=](long long at, long long) {
                                  real_of<S> g = relu_gradient<S>(dout[at], forward_out[at]);
                                  dresidual[at] = store<S>(g);
                                  return g;
                              });
}

}  // namespace gpubn

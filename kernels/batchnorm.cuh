// Batch norm: every channel normalized over its samples, in the sample order (samples.cuh). Statistics, scale
// and beta are arrays over the channels of all instances, so instance and group norm use it too.

namespace gpubn {

// The shift K of a channel: the middle one of its first, central and last sample. Distances are taken from a
// sample of the channel, so that a mean of 1e6 beside a deviation of 0.5 keeps its variance, and a constant
// channel has a variance of exactly 0.
template <class S>
__device__ inline number_of<S> batchnorm_shift(const raw_of<S>* x, Shape shape, long long channel) {
    using T = number_of<S>;
    long long samples = shape.batch * shape.inner;
    Walk a(shape, channel, 0), b(shape, channel, samples / 2), c(shape, channel, samples - 1);
    return middle<T>(load<S>(x[a.at]).v, load<S>(x[b.at]).v, load<S>(x[c.at]).v);
}

// Moments of the values of a leaf, after each channel's shift.
template <class S, class L, class T>
__device__ inline Nodes<Moments<T>, L::channels> moments_of(const Values<S, L>& x,
                                                            PerChannel<T, L::channels> shift, int rows) {
    Nodes<Moments<T>, L::channels> nodes;
#pragma unroll
    for (int c = 0; c < L::channels; c++) {
        real<T> d[8] = {};
        for (int i = 0; i < 8; i++)
            if (i < rows) d[i] = load<S>(x.of[c][i]) - real<T>(shift[c]);
        nodes.of[c] = moments_leaf(d, rows);
    }
    return nodes;
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

// What is stored of one value, with what follows batch norm.
template <class S, class T>
__device__ inline raw_of<S> batchnorm_out(raw_of<S> x, bool add, raw_of<S> residual, bool relu, T shift,
                                          T mean, T scale, T beta) {
    if (add) return batchnorm_add_relu<S>(x, residual, shift, mean, scale, beta);
    return relu ? batchnorm_relu<S>(x, shift, mean, scale, beta)
                : batchnorm_normalize<S>(x, shift, mean, scale, beta);
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

// constant and slope: scale * (sum / N)
template <class T>
__device__ inline T batchnorm_share(T scale, T sum, long long samples) {
    return (real<T>(scale) * (real<T>(sum) / real<T>(samples))).v;
}

// --- Training: all in one launch where a channel fits on chip, else up to its statistics ------------

// found (6, channels): shift, mean, invstd, scale, and the next running mean and variance.
template <class S, class L, bool ON_CHIP>
__launch_bounds__(THREADS, blocks_of<S, L>())
__global__ void batchnorm_train(const raw_of<S>* x, const raw_of<S>* residual, bool relu,
                                const number_of<S>* gamma, const number_of<S>* beta,
                                const number_of<S>* running_mean, const number_of<S>* running_var,
                                number_of<S> eps, number_of<S> momentum, number_of<S> complement,
                                number_of<S> correction, raw_of<S>* out, number_of<S>* found,
                                number_of<S>* parts, unsigned* tickets, long long channels, long long tiles,
                                long long share, long long rows, long long batch, long long per_instance,
                                long long inner) {
    using T = number_of<S>;
    using R = real<T>;
    const int W = L::width, COUNT = L::channels;
    extern __shared__ uint4 memory[];
    Sizes s = {channels, tiles, share, rows, {batch, per_instance, inner}};
    Block<L> block(s);
    bool inside = block.channel < channels;
    Kept<S, W> kept = {ON_CHIP ? reinterpret_cast<Vector<S, W>*>(memory) : nullptr};
    PerChannel<T, COUNT> shift = {};
    for (int c = 0; c < COUNT && inside; c++) shift.of[c] = batchnorm_shift<S>(x + c, s.shape, block.channel);

    auto leaf_moments = [&](const Leaf<L>& leaf) {
        return moments_of<S, L>(read_leaf<S, L>(x, leaf, kept), shift, leaf.rows);
    };
    auto finish = [=](long long c, Moments<T> node) {
        T k = batchnorm_shift<S>(x, s.shape, c), invstd = batchnorm_invstd(node.var.v, eps);
        R mean = R(k) + node.mean, var = node.var * R(correction);
        found[c] = k;
        found[channels + c] = node.mean.v;
        found[2 * channels + c] = invstd;
        found[3 * channels + c] = (R(gamma[c]) * R(invstd)).v;
        found[4 * channels + c] = running_update(running_mean[c], mean, momentum, complement);
        found[5 * channels + c] = running_update(running_var[c], var, momentum, complement);
    };
    reduce_channels<Moments<T>, 2, L>(s, block, parts, tickets, leaf_moments, finish);
    if (!ON_CHIP) return;

    __syncthreads();  // what was found is the first threads', what was kept everybody's
    if (!inside) return;
    auto mean = read_channels<COUNT>(found + channels, block.channel);
    auto scale = read_channels<COUNT>(found + 3 * channels, block.channel);
    auto bias = read_channels<COUNT>(beta, block.channel);
    long long first = Walk(s.shape, block.channel, 0).at;
    for (unsigned v = thread_number(); v < L::count(s); v += THREADS) {
        long long at = L::place(s, first, v);
        Vector<S, W> a = kept[v], b = {}, y;
        if (residual) b = read<S, W>(residual + at);
#pragma unroll
        for (int i = 0; i < W; i++)
            y.of[i] = batchnorm_out<S>(a.of[i], residual != nullptr, b.of[i], relu, shift[i], mean[i],
                                       scale[i], bias[i]);
        write<S, W>(out + at, y);
    }
}

// found (2, channels): the mean and the variance after a shift that is given.
template <class S, class L>
__launch_bounds__(THREADS, blocks_of<S, L>())
__global__ void batchnorm_moments(const raw_of<S>* x, const number_of<S>* shift, number_of<S>* found,
                                  number_of<S>* parts, unsigned* tickets, long long channels, long long tiles,
                                  long long share, long long rows, long long batch, long long per_instance,
                                  long long inner) {
    using T = number_of<S>;
    Sizes s = {channels, tiles, share, rows, {batch, per_instance, inner}};
    Block<L> block(s);
    PerChannel<T, L::channels> k = {};
    if (block.channel < channels) k = read_channels<L::channels>(shift, block.channel);
    auto leaf_moments = [&](const Leaf<L>& leaf) {
        return moments_of<S, L>(read_leaf<S, L>(x, leaf), k, leaf.rows);
    };
    auto finish = [=](long long c, Moments<T> node) {
        found[c] = node.mean.v;
        found[channels + c] = node.var.v;
    };
    reduce_channels<Moments<T>, 2, L>(s, block, parts, tickets, leaf_moments, finish);
}

// --- Backward: all in one launch where a channel fits on chip, else up to the sums ------------------

// The sums over a leaf of g * xhat and of g; `gradient(c, i)` gives g.
template <class S, class L, class T, class Gradient>
__device__ inline Nodes<Sums<T, 2>, L::channels> gradient_sums(const Values<S, L>& x,
                                                               PerChannel<T, L::channels> shift,
                                                               PerChannel<T, L::channels> mean,
                                                               PerChannel<T, L::channels> invstd, int rows,
                                                               Gradient gradient) {
    using R = real<T>;
    Nodes<Sums<T, 2>, L::channels> nodes;
#pragma unroll
    for (int c = 0; c < L::channels; c++) {
        R g[8] = {}, h[8] = {};
        for (int i = 0; i < 8; i++) {
            if (i >= rows) continue;
            g[i] = gradient(c, i);
            h[i] = g[i] * (((load<S>(x.of[c][i]) - R(shift[c])) - R(mean[c])) * R(invstd[c]));
        }
        nodes.of[c].rows = rows;
        nodes.of[c].sum[0] = sum8(h);
        nodes.of[c].sum[1] = sum8(g);
    }
    return nodes;
}

// sums (4, channels): dgamma, dbeta, and what dx takes away, constant and slope.
template <class S, class L, bool ON_CHIP>
__launch_bounds__(THREADS, blocks_of<S, L>())
__global__ void batchnorm_backward(const raw_of<S>* dout, const raw_of<S>* x, bool relu,
                                   const number_of<S>* shift, const number_of<S>* mean,
                                   const number_of<S>* invstd, const number_of<S>* scale,
                                   const number_of<S>* beta, raw_of<S>* dx, number_of<S>* sums,
                                   number_of<S>* parts, unsigned* tickets, long long channels,
                                   long long tiles, long long share, long long rows, long long batch,
                                   long long per_instance, long long inner) {
    using T = number_of<S>;
    const int W = L::width, COUNT = L::channels;
    extern __shared__ uint4 memory[];
    Sizes s = {channels, tiles, share, rows, {batch, per_instance, inner}};
    Block<L> block(s);
    bool inside = block.channel < channels;
    Kept<S, W> kept_x = {}, kept_dout = {};
    if (ON_CHIP) {
        kept_x.vectors = reinterpret_cast<Vector<S, W>*>(memory);
        kept_dout = kept_x.after(L::count(s));
    }
    PerChannel<T, COUNT> k = {}, m = {}, is = {}, f = {}, b = {};
    if (inside) {
        k = read_channels<COUNT>(shift, block.channel);
        m = read_channels<COUNT>(mean, block.channel);
        is = read_channels<COUNT>(invstd, block.channel);
        f = read_channels<COUNT>(scale, block.channel);
        b = read_channels<COUNT>(beta, block.channel);
    }
    auto gradient = [&](int c, raw_of<S> g, raw_of<S> v) {
        return relu ? batchnorm_relu_gradient<S>(g, v, k[c], m[c], f[c], b[c]) : load<S>(g);
    };
    auto leaf_sums = [&](const Leaf<L>& leaf) {
        Values<S, L> g = read_leaf<S, L>(dout, leaf, kept_dout), v = read_leaf<S, L>(x, leaf, kept_x);
        return gradient_sums<S, L>(v, k, m, is, leaf.rows,
                                   [&](int c, int i) { return gradient(c, g.of[c][i], v.of[c][i]); });
    };
    auto finish = [=](long long c, Sums<T, 2> node) {
        sums[c] = node.value(0);
        sums[channels + c] = node.value(1);
        sums[2 * channels + c] = batchnorm_share(scale[c], node.value(1), rows);
        sums[3 * channels + c] = batchnorm_share(scale[c], node.value(0), rows);
    };
    reduce_channels<Sums<T, 2>, 2, L>(s, block, parts, tickets, leaf_sums, finish);
    if (!ON_CHIP) return;

    __syncthreads();  // the sums are the first threads', what was kept everybody's
    if (!inside) return;
    auto constant = read_channels<COUNT>(sums + 2 * channels, block.channel);
    auto slope = read_channels<COUNT>(sums + 3 * channels, block.channel);
    long long first = Walk(s.shape, block.channel, 0).at;
    for (unsigned v = thread_number(); v < L::count(s); v += THREADS) {
        Vector<S, W> g = kept_dout[v], a = kept_x[v], d;
#pragma unroll
        for (int i = 0; i < W; i++)
            d.of[i] = batchnorm_dx<S>(gradient(i, g.of[i], a.of[i]), a.of[i], k[i], m[i], is[i], f[i],
                                      constant[i], slope[i]);
        write<S, W>(dx + L::place(s, first, v), d);
    }
}

// sums (2, channels): dgamma and dbeta. The gradient of what ReLU saw is the residual's: to dresidual.
template <class S, class L>
__launch_bounds__(THREADS, blocks_of<S, L>())
__global__ void batchnorm_add_relu_sums(const raw_of<S>* dout, const raw_of<S>* forward_out,
                                        raw_of<S>* dresidual, const raw_of<S>* x, const number_of<S>* shift,
                                        const number_of<S>* mean, const number_of<S>* invstd,
                                        number_of<S>* sums, number_of<S>* parts, unsigned* tickets,
                                        long long channels, long long tiles, long long share, long long rows,
                                        long long batch, long long per_instance, long long inner) {
    using T = number_of<S>;
    const int COUNT = L::channels;
    Sizes s = {channels, tiles, share, rows, {batch, per_instance, inner}};
    Block<L> block(s);
    PerChannel<T, COUNT> k = {}, m = {}, is = {};
    if (block.channel < channels) {
        k = read_channels<COUNT>(shift, block.channel);
        m = read_channels<COUNT>(mean, block.channel);
        is = read_channels<COUNT>(invstd, block.channel);
    }
    auto leaf_sums = [&](const Leaf<L>& leaf) {
        Values<S, L> g = read_leaf<S, L>(dout, leaf), y = read_leaf<S, L>(forward_out, leaf);
#pragma unroll
        for (int c = 0; c < COUNT; c++)
            for (int i = 0; i < 8; i++) g.of[c][i] = store<S>(relu_gradient<S>(g.of[c][i], y.of[c][i]));
        write_leaf<S, L>(dresidual, leaf, g);
        return gradient_sums<S, L>(read_leaf<S, L>(x, leaf), k, m, is, leaf.rows,
                                   [&](int c, int i) { return load<S>(g.of[c][i]); });
    };
    auto finish = [=](long long c, Sums<T, 2> node) {
        sums[c] = node.value(0);
        sums[channels + c] = node.value(1);
    };
    reduce_channels<Sums<T, 2>, 2, L>(s, block, parts, tickets, leaf_sums, finish);
}

// --- Elementwise, a vector of W neighbours a thread -------------------------------------------------

enum { SAME, NEIGHBOURS, ANY };  // the channels of a vector's values

// A thread's vector, and the channels of its values: the array has fewer than 2^31 values. Blocks begin at
// the array's end: what the launch before read last is still in the cache.
template <int W, int CHANNELS>
struct Place {
    unsigned at, count, channel[W];

    __device__ Place(unsigned values, unsigned instance, unsigned channels, unsigned inner) {
        at = ((gridDim.x - 1 - blockIdx.x) * THREADS + threadIdx.x) * W;
        count = values;
        unsigned plane = at / inner, k = at - plane * inner;  // of an instance there are `instance` planes
        for (int i = 0; i < W; i++) {
            channel[i] = CHANNELS == NEIGHBOURS && i > 0 ? channel[0] + i
                         : CHANNELS == SAME && i > 0     ? channel[0]
                                                         : plane / instance * channels + plane % channels;
            if (++k == inner) {
                k = 0;
                plane++;
            }
        }
    }
    template <class S>
    __device__ Vector<S, W> read(const raw_of<S>* x) const {
        if (CHANNELS != ANY || at + W <= count) return gpubn::read<S, W>(x + at);
        Vector<S, W> part = {};
        for (int i = 0; i < W; i++)
            if (at + i < count) part.of[i] = x[at + i];
        return part;
    }
    template <class S>
    __device__ void write(raw_of<S>* x, Vector<S, W> values) const {
        if (CHANNELS != ANY || at + W <= count) return gpubn::write<S, W>(x + at, values);
        for (int i = 0; i < W; i++)
            if (at + i < count) x[at + i] = values.of[i];
    }
    // Numbers of the channels: as vectors too, where the channels are neighbours.
    template <class T>
    __device__ PerChannel<T, CHANNELS == SAME ? 1 : W> of(const T* numbers) const {
        const int COUNT = CHANNELS == SAME ? 1 : W, PART = 16 / sizeof(T) < W ? 16 / sizeof(T) : W;
        PerChannel<T, COUNT> result;
        if (CHANNELS == NEIGHBOURS)
            for (int i = 0; i < W; i += PART) {
                Vector<T, PART> part = gpubn::read<T, PART>(numbers + channel[0] + i);
                for (int j = 0; j < PART; j++) result.of[(i + j) % COUNT] = part.of[j];
            }
        else
            for (int i = 0; i < COUNT; i++) result.of[i] = numbers[channel[i]];
        return result;
    }
};

template <class S, int W, int CHANNELS>
__global__ void batchnorm_normalize_vectors(const raw_of<S>* x, const raw_of<S>* residual, bool relu,
                                            const number_of<S>* shift, const number_of<S>* mean,
                                            const number_of<S>* scale, const number_of<S>* beta,
                                            raw_of<S>* out, unsigned values, unsigned instance,
                                            unsigned channels, unsigned inner) {
    Place<W, CHANNELS> place(values, instance, channels, inner);
    if (place.at >= values) return;
    auto k = place.of(shift), m = place.of(mean), f = place.of(scale), b = place.of(beta);
    Vector<S, W> a = place.template read<S>(x), r = {}, y;
    if (residual) r = place.template read<S>(residual);
#pragma unroll
    for (int i = 0; i < W; i++)
        y.of[i] = batchnorm_out<S>(a.of[i], residual != nullptr, r.of[i], relu, k[i], m[i], f[i], b[i]);
    place.template write<S>(out, y);
}

// FIXED: statistics are constants, and have no part in dx.
template <class S, int W, int CHANNELS, bool FIXED>
__global__ void batchnorm_dx_vectors(const raw_of<S>* dout, const raw_of<S>* x, bool relu,
                                     const number_of<S>* shift, const number_of<S>* mean,
                                     const number_of<S>* invstd, const number_of<S>* scale,
                                     const number_of<S>* beta, const number_of<S>* constant,
                                     const number_of<S>* slope, raw_of<S>* dx, unsigned values,
                                     unsigned instance, unsigned channels, unsigned inner) {
    using T = number_of<S>;
    Place<W, CHANNELS> place(values, instance, channels, inner);
    if (place.at >= values) return;
    auto k = place.of(shift), m = place.of(mean), f = place.of(scale), b = place.of(beta);
    Vector<S, W> g = place.template read<S>(dout), a = {}, d;
    if (relu || !FIXED) a = place.template read<S>(x);
    real<T> gradient[W];
#pragma unroll
    for (int i = 0; i < W; i++)
        gradient[i] = relu ? batchnorm_relu_gradient<S>(g.of[i], a.of[i], k[i], m[i], f[i], b[i])
                           : load<S>(g.of[i]);
    if (FIXED) {
        for (int i = 0; i < W; i++) d.of[i] = store<S>(gradient[i] * real<T>(f[i]));
    } else {
        auto is = place.of(invstd), share = place.of(constant), share_x = place.of(slope);
        for (int i = 0; i < W; i++)
            d.of[i] = batchnorm_dx<S>(gradient[i], a.of[i], k[i], m[i], is[i], f[i], share[i], share_x[i]);
    }
    place.template write<S>(dx, d);
}

}  // namespace gpubn

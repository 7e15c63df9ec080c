// Group norm: in every sample the channels of a group are normalized together. The channels' moments, after
// the group's common shift, merge along the same tree (samples.cuh); instance norm is one channel a group.
// Here are its few numbers of a channel; the rest is batch norm's.

namespace gpubn {

// The middle one of the first, the central and the last value of a group: channel by channel, sample by
// sample. `first` is the group's first channel among those of all instances.
template <class S>
__device__ inline typename storage<S>::type groupnorm_shift(const raw_of<S>* x, long long first,
                                                            long long size, Shape shape) {
    using T = typename storage<S>::type;
    long long samples = shape.batch * shape.inner, central = size * samples / 2;
    Walk a(shape, first, 0), b(shape, first + central / samples, central % samples);
    Walk c(shape, first + size - 1, samples - 1);
    return middle<T>(load<S>(x[a.at]).v, load<S>(x[b.at]).v, load<S>(x[c.at]).v);
}

// A channel's share in the sums over its group: gamma * sum(g * xhat) and gamma * sum(g).
// With M values in the group: dx = (scale * g - invstd * (sum / M)) - xhat * (invstd * (sum_x / M))
template <class T>
__device__ inline T groupnorm_share(T invstd, T sum, long long values) {
    return (real<T>(invstd) * (real<T>(sum) / real<T>(values))).v;
}

}  // namespace gpubn

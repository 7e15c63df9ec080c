// The update rules, one element at a time. Scalars such as 1 - beta1 and 1 - beta1^t come from the host,
// each computed in float64 and rounded once.

namespace gpubn {

template <class T>
__device__ inline T sgd(T w, T dw, T lr) {
    using R = real<T>;
    return (R(w) - R(lr) * R(dw)).v;
}

// decay * average + (1 - decay) * value
template <class T>
__device__ inline real<T> blend(T average, real<T> value, T decay, T complement) {
    using R = real<T>;
    return R(decay) * R(average) + R(complement) * value;
}

// mhat / (sqrt(vhat) + epsilon), with mhat = m / (1 - beta1^t) and vhat = v / (1 - beta2^t)
template <class T>
__device__ inline real<T> adam_direction(real<T> m, real<T> v, T correction1, T correction2, T epsilon) {
    using R = real<T>;
    return (m / R(correction1)) / (sqrt(v / R(correction2)) + R(epsilon));
}

}  // namespace gpubn

// ReLU. A NaN stays one; where x is not above 0 the gradient is +0, whatever dout is.

namespace gpubn {

template <class T>
__device__ inline T relu_forward(T x) {
    return real<T>(x) > real<T>((T)0) || is_nan(real<T>(x)) ? x : (T)0;
}

template <class T>
__device__ inline T relu_backward(T dout, T x) {
    return real<T>(x) > real<T>((T)0) ? dout : (T)0;
}

}  // namespace gpubn

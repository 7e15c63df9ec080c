// ReLU. A NaN stays one; where x is not above 0 the gradient is +0, whatever dout is.

namespace gpubn {

template <class S>
__device__ inline raw_of<S> relu_forward(raw_of<S> x) {
    return store<S>(relu(load<S>(x)));
}

template <class S>
__device__ inline raw_of<S> relu_backward(raw_of<S> dout, raw_of<S> x) {
    real_of<S> zero = {};
    return load<S>(x) > zero ? dout : store<S>(zero);
}

}  // namespace gpubn

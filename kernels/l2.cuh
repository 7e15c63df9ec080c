// The last step of a row's sum on its own: the sum of its 256 lanes.

namespace gpubn {

template <class T>
__global__ void halve_lanes(const T* lanes, T* out) {
    real<T> total = sum_lanes(real<T>(lanes[threadIdx.x]));
    if (threadIdx.x == 0) *out = total.v;
}

}  // namespace gpubn

// Softmax loss of every row of scores x (N, C). One block takes one row.

namespace gpubn {

// The largest value of a block's lanes, given to every thread.
template <class T>
__device__ inline T max_lanes(T lane) {
    __shared__ T lanes[LANES];
    int j = threadIdx.x;
    lanes[j] = lane;
    __syncthreads();
    for (int step = LANES / 2; step > 0; step /= 2) {
        if (j < step && real<T>(lanes[j + step]) > real<T>(lanes[j])) lanes[j] = lanes[j + step];
        __syncthreads();
    }
    T largest = lanes[0];
    __syncthreads();
    return largest;
}

// losses[i] = log(sum_j exp(x_ij - max_i)) - (x_iy - max_i), y the label of row i
// dx_ij = (softmax(x)_ij - [j == y]) / N
// exp and log are the platform's, so losses agree between devices to rounding only.
template <class T>
__global__ void softmax_loss(const T* x, const long long* labels, T* losses, T* dx, long long columns,
                             long long rows) {
    using R = real<T>;
    long long row = blockIdx.x, y = labels[row];
    x += row * columns;
    dx += row * columns;
    T largest = x[0];
    for (long long j = threadIdx.x; j < columns; j += LANES)
        if (R(x[j]) > R(largest)) largest = x[j];
    R top(max_lanes(largest));
    for (long long j = threadIdx.x; j < columns; j += LANES) dx[j] = exp((R(x[j]) - top).v);
    R sum = row_sum<T>(columns, [=](long long j) { return R(dx[j]); });
    if (threadIdx.x == 0) losses[row] = (R(log(sum.v)) - (R(x[y]) - top)).v;
    for (long long j = threadIdx.x; j < columns; j += LANES)
        dx[j] = ((R(dx[j]) / sum - R((T)(j == y))) / R(rows)).v;
}

}  // namespace gpubn

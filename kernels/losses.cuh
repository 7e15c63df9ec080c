// Losses of scores x (N, C) with labels y, and the count of right answers. One block takes one row; the mean over
// rows is a column sum.

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

// losses[i] = log(sum_j exp(x_ij - max_i)) - (x_iy - max_i)
// dx_ij = (softmax(x)_ij - [j == y]) / N
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
    for (long long j = threadIdx.x; j < columns; j += LANES) dx[j] = exp<T>((R(x[j]) - top).v);
    R sum = row_sum<T>(columns, [=](long long j) { return R(dx[j]); });
    if (threadIdx.x == 0) losses[row] = (R(log<T>(sum.v)) - (R(x[y]) - top)).v;
    for (long long j = threadIdx.x; j < columns; j += LANES)
        dx[j] = ((R(dx[j]) / sum - R((T)(j == y))) / R(rows)).v;
}

// losses[i] = sum over j != y of max(0, margin_ij), margin_ij = (x_ij - x_iy) + 1
// dx_ij = [margin_ij > 0] / N, and dx_iy = -(how many such j there are) / N
template <class T>
__global__ void svm_loss(const T* x, const long long* labels, T* losses, T* dx, long long columns,
                         long long rows) {
    using R = real<T>;
    long long row = blockIdx.x, y = labels[row];
    x += row * columns;
    dx += row * columns;
    R right(x[y]), zero((T)0), one((T)1);
    auto margin = [=](long long j) {
        R m = (R(x[j]) - right) + one;
        return j == y || zero > m ? zero : m;  // a NaN stays one
    };
    R loss = row_sum<T>(columns, margin);
    // A sum of ones is exact: it counts.
    auto is_above = [=](long long j) { return real<double>((double)(margin(j) > zero)); };
    R above((long long)row_sum<double>(columns, is_above).v);
    if (threadIdx.x == 0) losses[row] = loss.v;
    for (long long j = threadIdx.x; j < columns; j += LANES)
        dx[j] = ((j == y ? zero - above : margin(j) > zero ? one : zero) / R(rows)).v;
}

// 1 where a row's first largest score is its label's, else 0. A NaN counts as the largest, as in NumPy.
template <class T>
__device__ inline long long is_correct(const T* x, long long columns, long long y) {
    using R = real<T>;
    long long best = 0;
    for (long long j = 1; j < columns; j++) {
        bool larger = R(x[j]) > R(x[best]) || is_nan(R(x[j]));
        if (larger && !is_nan(R(x[best]))) best = j;
    }
    return best == y;
}

}  // namespace gpubn

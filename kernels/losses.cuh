// Losses of scores x (N, C) with labels y, and the count of right answers. One block takes one row; the mean over
// rows is a channel's sum.

namespace gpubn {

// The largest of a block's threads' values, given to every thread.
template <class T>
__device__ inline T block_max(T value) {
    __shared__ T values[THREADS];
    int j = threadIdx.x;
    values[j] = value;
    __syncthreads();
    for (int step = THREADS / 2; step > 0; step /= 2) {
        if (j < step && real<T>(values[j + step]) > real<T>(values[j])) values[j] = values[j + step];
        __syncthreads();
    }
    T largest = values[0];
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
    for (long long j = threadIdx.x; j < columns; j += THREADS)
        if (R(x[j]) > R(largest)) largest = x[j];
    R top(block_max(largest));
    for (long long j = threadIdx.x; j < columns; j += THREADS) dx[j] = exp<T>((R(x[j]) - top).v);
    __syncthreads();  // the sum's leaves are other threads' values
    R sum = row_sum<T>(columns, [=](long long j) { return R(dx[j]); });
    if (threadIdx.x == 0) losses[row] = (R(log<T>(sum.v)) - (R(x[y]) - top)).v;
    for (long long j = threadIdx.x; j < columns; j += THREADS)
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
    for (long long j = threadIdx.x; j < columns; j += THREADS)
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

// The row order (README.md): a reduction over the D values of every row of an (N, D) matrix. The row is
// read as a matrix of 256 lanes, value j in lane j % 256. Every lane sums its values in the column
// order; then lane j takes lane j + 128, then j + 64, and so down to one.
//
// A block of 256 threads takes a row, thread j lane j.

namespace gpubn {

const int LANES = 256;

// The sum over lanes of a block, given to every thread.
template <class T>
__device__ inline real<T> sum_lanes(real<T> lane) {
    __shared__ real<T> lanes[LANES];
    int j = threadIdx.x;
    lanes[j] = lane;
    __syncthreads();
    for (int step = LANES / 2; step > 0; step /= 2) {
        if (j < step) lanes[j] = lanes[j] + lanes[j + step];
        __syncthreads();
    }
    real<T> total = lanes[0];
    __syncthreads();  // before the next sum writes here
    return total;
}

// Sum of value(j) over j = 0 .. columns - 1, in the row order, given to every thread of the block.
template <class T, class Value>
__device__ inline real<T> row_sum(long long columns, Value value) {
    using R = real<T>;
    long long steps = (columns + LANES - 1) / LANES;  // values of a lane; beyond the row they are +0
    long long leaves = (steps + 7) / 8;
    // A binary counter: level l holds the sum of 2^l leaves while bit l of the count is set.
    R level[48];
    for (long long leaf = 0; leaf < leaves; leaf++) {
        R v[8] = {};
        for (int i = 0; i < 8; i++) {
            long long j = (leaf * 8 + i) * LANES + threadIdx.x;
            if (j < columns) v[i] = value(j);
        }
        R sum = sum8(v);
        int l = 0;
        for (long long count = leaf; count & 1; count >>= 1) sum = level[l++] + sum;
        level[l] = sum;
    }
    R lane = {};
    bool started = false;
    for (int l = 0; leaves >> l; l++)
        if (leaves >> l & 1) {
            lane = started ? level[l] + lane : level[l];
            started = true;
        }
    return sum_lanes(lane);
}

}  // namespace gpubn

// The sample order (README.md): every sum runs over a binary tree that is aligned to powers of two, with
// leaves of eight. Here along the samples of each channel of an array; rows.cuh has those of rows.
//
// An array x is (instances, batch, channels, inner) in C order. A channel of an instance is one sum; its
// samples are counted along batch, then inner. So channels last (inner 1) and channels first give the same
// sample the same number, and the same bits. `channel` counts over the channels of all instances.
//
// A block of 256 threads takes COLUMNS neighbouring channels (threadIdx.x) and one aligned tile of samples,
// a whole subtree, and writes the tile's node. Launched again over the tiles' nodes until one is left.
// Since every tile is a subtree, its size is free to be tuned: bits cannot change.

namespace gpubn {

const int THREADS = 256;  // of a block
const int WIDE = 32;      // COLUMNS where channels are neighbours in memory: a warp reads 32 of them
const int LEAVES = 4;     // consecutive leaves of one thread then; where samples are neighbours, one

template <int COLUMNS>
struct Block {
    static const int groups = THREADS / COLUMNS;  // threads that share a channel: threadIdx.y
    static const int leaves = COLUMNS == 1 ? 1 : LEAVES;
};

struct Shape {
    long long batch, channels, inner;
};

// Goes through the places of a channel's samples, from one sample on.
struct Walk {
    long long at, k, inner, jump;

    __device__ Walk(Shape s, long long channel, long long sample) {
        long long instance = channel / s.channels, b = sample / s.inner;
        inner = s.inner;
        k = sample - b * s.inner;
        jump = (s.channels - 1) * s.inner;
        at = ((instance * s.batch + b) * s.channels + channel % s.channels) * s.inner + k;
    }
    __device__ void next() {
        at++;
        if (++k == inner) {
            k = 0;
            at += jump;
        }
    }
};

// A subtree's K sums. `rows` is how many samples it covers; a node of none is absent.
template <class T, int K>
struct Sums {
    real<T> sum[K];
    long long rows;

    __device__ T value(int k) const { return sum[k].v; }
};

template <class T, int K>
__device__ inline Sums<T, K> merge(Sums<T, K> left, Sums<T, K> right) {
    if (right.rows == 0) return left;
    for (int k = 0; k < K; k++) left.sum[k] = left.sum[k] + right.sum[k];
    left.rows += right.rows;
    return left;
}

// A subtree's moments, after the shift: the mean, and the mean square of the distances from it.
// The variance is carried instead of the sum of squares, since that sum overflows where it does not.
template <class T>
struct Moments {
    real<T> mean, var;
    long long rows;

    __device__ T value(int k) const { return k == 0 ? mean.v : var.v; }
};

// Chan, Golub and LeVeque 1979, in means instead of sums. Equal halves need no division.
template <class T>
__device__ inline Moments<T> merge(Moments<T> left, Moments<T> right) {
    using R = real<T>;
    if (right.rows == 0) return left;
    long long rows = left.rows + right.rows;
    if (left.rows == right.rows) {
        R half((T)0.5);
        R h = (left.mean - right.mean) * half;
        return {(left.mean + right.mean) * half, (left.var * half + right.var * half) + h * h, rows};
    }
    R u = R(left.rows) / R(rows), w = R(right.rows) / R(rows);
    R delta = right.mean - left.mean;
    return {left.mean + delta * w, (left.var * u + right.var * w) + (delta * u) * (delta * w), rows};
}

template <class R>
__device__ inline R sum8(const R* v) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// Samples of the leaf or part number `index`, where each covers `size` of `total` samples.
__device__ inline long long rows_of(long long index, long long size, long long total) {
    long long left = total - index * size;
    return left < 0 ? 0 : left < size ? left : size;
}

// The sum of a leaf's values; what lies beyond the last sample adds +0.
template <class T>
__device__ inline Sums<T, 1> sum_leaf(const real<T>* v, long long rows) {
    Sums<T, 1> node = {};
    node.rows = rows;
    node.sum[0] = sum8(v);
    return node;
}

// The moments of a leaf's values d, which are distances from the shift.
template <class T>
__device__ inline Moments<T> moments_leaf(const real<T>* d, long long rows) {
    using R = real<T>;
    Moments<T> node = {};
    node.rows = rows;
    if (rows == 0) return node;
    // Eight is a power of two: there the division is a multiplication, and exact.
    R n(rows), eighth((T)0.125), sum = sum8(d);
    node.mean = rows == 8 ? sum * eighth : sum / n;
    R square[8] = {};
    for (int i = 0; i < rows; i++) {
        R e = d[i] - node.mean;
        square[i] = (e * eighth) * e;
    }
    sum = sum8(square);
    node.var = rows == 8 ? sum : sum / (n * eighth);
    return node;
}

// --- Along the samples of channels ----------------------------------------------------------------

struct Tile {
    long long index;    // which tile of samples
    long long channel;  // which channel this thread works on; may lie beyond the last one
};

template <int COLUMNS>
__device__ inline Tile this_tile(long long channels) {
    long long blocks = (channels + COLUMNS - 1) / COLUMNS;  // per tile, side by side
    long long block = blockIdx.x;
    return {block / blocks, block % blocks * COLUMNS + threadIdx.x};
}

// The nodes of a block's groups, merged; the whole is in the first group's threads.
template <int COLUMNS, class Node>
__device__ inline Node merge_groups(Node node) {
    const int groups = Block<COLUMNS>::groups;
    __shared__ Node nodes[groups][COLUMNS];
    for (int step = 1; step < groups; step *= 2) {
        nodes[threadIdx.y][threadIdx.x] = node;
        __syncthreads();
        if (threadIdx.y % (2 * step) == 0) node = merge(node, nodes[threadIdx.y + step][threadIdx.x]);
        __syncthreads();
    }
    return node;
}

// Reduce this block's tile and write its node's K values to out (K, tiles, channels), where `channels`
// are those of all instances. `leaf(i, channel)` gives the node of leaf i, absent beyond the last sample.
template <int K, int COLUMNS, class Node, class T, class Leaf>
__device__ inline void reduce_tile(long long channels, long long tiles, T* out, Leaf leaf) {
    Tile tile = this_tile<COLUMNS>(channels);
    bool inside = tile.channel < channels;
    Node node = {};
    if (inside) {
        const int leaves = Block<COLUMNS>::leaves;
        long long first = (tile.index * Block<COLUMNS>::groups + threadIdx.y) * leaves;
        if (leaves == 1)
            node = leaf(first, tile.channel);
        else
            node = merge(merge(leaf(first, tile.channel), leaf(first + 1, tile.channel)),
                         merge(leaf(first + 2, tile.channel), leaf(first + 3, tile.channel)));
    }
    node = merge_groups<COLUMNS>(node);
    if (inside && threadIdx.y == 0)
        for (int k = 0; k < K; k++) out[(k * tiles + tile.index) * channels + tile.channel] = node.value(k);
}

// Merge parts (K, P, channels), of `part_rows` samples each and the last one of what is left of `rows`.
template <class T, int K>
__global__ void merge_sums(const T* parts, T* out, long long channels, long long tiles,
                           long long part_count, long long part_rows, long long rows) {
    reduce_tile<K, WIDE, Sums<T, K>>(channels, tiles, out, [=](long long part, long long channel) {
        Sums<T, K> node = {};
        node.rows = rows_of(part, part_rows, rows);
        if (node.rows)
            for (int k = 0; k < K; k++)
                node.sum[k] = real<T>(parts[(k * part_count + part) * channels + channel]);
        return node;
    });
}

template <class T, int K>
__global__ void merge_moments(const T* parts, T* out, long long channels, long long tiles,
                              long long part_count, long long part_rows, long long rows) {
    reduce_tile<K, WIDE, Moments<T>>(channels, tiles, out, [=](long long part, long long channel) {
        Moments<T> node = {};
        node.rows = rows_of(part, part_rows, rows);
        if (node.rows) {
            node.mean = real<T>(parts[part * channels + channel]);
            node.var = real<T>(parts[(part_count + part) * channels + channel]);
        }
        return node;
    });
}

// Sum of every channel of x.
template <class S, int COLUMNS>
__global__ void channel_sum(const raw_of<S>* x, typename storage<S>::type* out, long long channels,
                            long long tiles, long long rows, long long batch, long long per_instance,
                            long long inner) {
    using T = typename storage<S>::type;
    Shape shape = {batch, per_instance, inner};
    reduce_tile<1, COLUMNS, Sums<T, 1>>(channels, tiles, out, [=](long long leaf, long long channel) {
        real<T> v[8] = {};
        long long count = rows_of(leaf, 8, rows);
        Walk walk(shape, channel, leaf * 8);
        for (int i = 0; i < count; i++, walk.next()) v[i] = load<S>(x[walk.at]);
        return sum_leaf(v, count);
    });
}

// Sum of the squares of every channel of x.
template <class S, int COLUMNS>
__global__ void square_sum(const raw_of<S>* x, typename storage<S>::type* out, long long channels,
                           long long tiles, long long rows, long long batch, long long per_instance,
                           long long inner) {
    using T = typename storage<S>::type;
    Shape shape = {batch, per_instance, inner};
    reduce_tile<1, COLUMNS, Sums<T, 1>>(channels, tiles, out, [=](long long leaf, long long channel) {
        real<T> v[8] = {};
        long long count = rows_of(leaf, 8, rows);
        Walk walk(shape, channel, leaf * 8);
        for (int i = 0; i < count; i++, walk.next()) v[i] = load<S>(x[walk.at]) * load<S>(x[walk.at]);
        return sum_leaf(v, count);
    });
}

}  // namespace gpubn

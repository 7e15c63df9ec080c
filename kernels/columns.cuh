// The column order (README.md): a reduction over the N rows of every column of an (N, D) matrix, along
// a binary tree over the row index that is aligned to powers of two. Eight rows make a leaf.
//
// A block of 32 x 8 threads takes 32 columns (threadIdx.x) and one aligned tile of 8 * LEAVES leaves,
// a whole subtree, and writes the tile's node. Launched again over the tiles' nodes until one is left.
// Since every tile is a subtree, the tile's size is free to be tuned: bits cannot change.

namespace gpubn {

const int COLUMNS = 32;  // columns of a block: one warp reads 32 neighbours of a row
const int GROUPS = 8;    // threads of a block that share a column
const int LEAVES = 4;    // consecutive leaves of one thread

// A subtree's K sums. `rows` is how many rows it covers; a node of no rows is absent.
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

// Rows of the leaf or part number `index`, where each covers `size` of `total` rows.
__device__ inline long long rows_of(long long index, long long size, long long total) {
    long long left = total - index * size;
    return left < 0 ? 0 : left < size ? left : size;
}

struct Tile {
    long long index;   // which tile of rows
    long long column;  // which column this thread works on; may lie beyond the last one
};

__device__ inline Tile this_tile(long long columns) {
    long long blocks = (columns + COLUMNS - 1) / COLUMNS;  // per tile, side by side
    long long block = blockIdx.x;
    return {block / blocks, block % blocks * COLUMNS + threadIdx.x};
}

// Reduce this block's tile and write its node's K values to out (K, tiles, columns).
// `leaf(i)` gives the node of leaf i in this thread's column, absent beyond the last row.
template <int K, class Node, class T, class Leaf>
__device__ inline void reduce_tile(long long columns, long long tiles, T* out, Leaf leaf) {
    __shared__ Node nodes[GROUPS][COLUMNS];
    Tile tile = this_tile(columns);
    bool inside = tile.column < columns;
    Node node = {};
    if (inside) {
        long long first = (tile.index * GROUPS + threadIdx.y) * LEAVES;
        node = merge(merge(leaf(first, tile.column), leaf(first + 1, tile.column)),
                     merge(leaf(first + 2, tile.column), leaf(first + 3, tile.column)));
    }
    for (int step = 1; step < GROUPS; step *= 2) {
        nodes[threadIdx.y][threadIdx.x] = node;
        __syncthreads();
        if (threadIdx.y % (2 * step) == 0) node = merge(node, nodes[threadIdx.y + step][threadIdx.x]);
        __syncthreads();
    }
    if (inside && threadIdx.y == 0)
        for (int k = 0; k < K; k++) out[(k * tiles + tile.index) * columns + tile.column] = node.value(k);
}

// Merge parts (K, P, D), of `part_rows` rows each and the last one of what is left of `rows`.
template <class T, int K>
__global__ void merge_sums(const T* parts, T* out, long long columns, long long tiles,
                           long long part_count, long long part_rows, long long rows) {
    reduce_tile<K, Sums<T, K>>(columns, tiles, out, [=](long long part, long long column) {
        Sums<T, K> node = {};
        node.rows = rows_of(part, part_rows, rows);
        if (node.rows)
            for (int k = 0; k < K; k++)
                node.sum[k] = real<T>(parts[(k * part_count + part) * columns + column]);
        return node;
    });
}

template <class T>
__global__ void merge_moments(const T* parts, T* out, long long columns, long long tiles,
                              long long part_count, long long part_rows, long long rows) {
    reduce_tile<2, Moments<T>>(columns, tiles, out, [=](long long part, long long column) {
        Moments<T> node = {};
        node.rows = rows_of(part, part_rows, rows);
        if (node.rows) {
            node.mean = real<T>(parts[part * columns + column]);
            node.var = real<T>(parts[(part_count + part) * columns + column]);
        }
        return node;
    });
}

// Sum of every column of x (rows, columns).
template <class T>
__global__ void column_sum(const T* x, T* out, long long columns, long long tiles, long long rows) {
    reduce_tile<1, Sums<T, 1>>(columns, tiles, out, [=](long long leaf, long long column) {
        real<T> v[8] = {};  // rows beyond the last one add +0
        Sums<T, 1> node = {};
        node.rows = rows_of(leaf, 8, rows);
        for (int i = 0; i < node.rows; i++) v[i] = real<T>(x[(leaf * 8 + i) * columns + column]);
        node.sum[0] = sum8(v);
        return node;
    });
}

// Sums over the rows of dout * xhat and of dout: the gradients of gamma and beta. The statistics are one
// a column (batch norm: PER_ROW 0) or one a row (layer norm: PER_ROW 1).
template <class T, int PER_ROW>
__global__ void gradient_sums(const T* dout, const T* x, const T* shift, const T* mean, const T* invstd,
                              T* out, long long columns, long long tiles, long long rows) {
    using R = real<T>;
    reduce_tile<2, Sums<T, 2>>(columns, tiles, out, [=](long long leaf, long long column) {
        Sums<T, 2> node = {};
        node.rows = rows_of(leaf, 8, rows);
        R g[8] = {}, h[8] = {};
        for (int i = 0; i < node.rows; i++) {
            long long row = leaf * 8 + i, at = row * columns + column, c = PER_ROW ? row : column;
            g[i] = R(dout[at]);
            h[i] = g[i] * (((R(x[at]) - R(shift[c])) - R(mean[c])) * R(invstd[c]));
        }
        node.sum[0] = sum8(h);
        node.sum[1] = sum8(g);
        return node;
    });
}

}  // namespace gpubn

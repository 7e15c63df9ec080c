// The sample order (README.md): every sum runs over a binary tree that is aligned to powers of two, with
// leaves of eight. Here along the samples of each channel of an array; rows.cuh has those of rows.
//
// An array x is (instances, batch, channels, inner) in C order. A channel of an instance is one sum; its
// samples are counted along batch, then inner. So channels last (inner 1) and channels first give the same
// sample the same number, and the same bits. `channel` counts over the channels of all instances.
//
// A block of 256 threads takes some neighbouring channels (threadIdx.x) and one aligned tile of samples, a
// whole subtree. The last block to finish merges the tiles' nodes.
// Since every tile is a subtree, its size is free to be tuned: bits cannot change.

namespace gpubn {

const int THREADS = 256;  // of a block
const int WIDE = 32;      // channels that a block reads side by side where it merges parts
const int LEAVES = 4;     // consecutive parts of a thread then

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
    // `step` is one sample, or what a vector has of neighbouring ones: it divides inner.
    __device__ void next(int step = 1) {
        at += step;
        k += step;
        if (k == inner) {
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
    __device__ void set(int k, T value) { sum[k] = real<T>(value); }
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
    __device__ void set(int k, T value) { (k == 0 ? mean : var) = real<T>(value); }
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
    for (int i = 0; i < 8; i++) {  // to a constant, so that arrays lie in registers
        R e = d[i] - node.mean;
        if (i < rows) square[i] = (e * eighth) * e;
    }
    sum = sum8(square);
    node.var = rows == 8 ? sum : sum / (n * eighth);
    return node;
}

// What values that are stored as S are computed with: float or double.
template <class S>
using number_of = typename storage<S>::type;

// --- Along the samples of channels: how they lie ---------------------------------------------------

// Neighbouring values, read and written at once, by 16 bytes at the most.
template <class S, int W>
struct alignas(W * sizeof(raw_of<S>) < 16 ? W * sizeof(raw_of<S>) : 16) Vector {
    raw_of<S> of[W];
};

template <class S, int W>
__device__ inline Vector<S, W> read(const raw_of<S>* x) {
    return *reinterpret_cast<const Vector<S, W>*>(x);
}

template <class S, int W>
__device__ inline void write(raw_of<S>* x, Vector<S, W> values) {
    *reinterpret_cast<Vector<S, W>*>(x) = values;
}

struct Sizes {
    long long channels, tiles;  // of all instances; of a channel
    long long share;            // leaves of a thread
    long long rows;             // samples of a channel
    Shape shape;
};

// Samples are neighbours: a vector is W samples of a channel, which is the thread's only one.
template <int W>
struct Planes {
    static const int width = W, channels = 1;
    static const int vectors = 8 / W, samples = W;  // of a leaf; of a vector
    static const int levels = 5;                    // a thread's share is 2^levels leaves at the most
    static const int blocks = 3;                    // that a multiprocessor is to have registers for
    using Path = Walk;

    // Value i of a leaf's vector j: of which of the thread's channels, and which sample.
    __device__ static int channel(int, int) { return 0; }
    __device__ static int sample(int j, int i) { return j * W + i; }
    // A block's vectors in the order in which they are kept on chip: which one is vector j of a leaf, how
    // many there are, and where they lie in memory. `first` is where the thread's first sample lies.
    __device__ static unsigned number(long long leaf, int j) { return (unsigned)leaf * vectors + j; }
    __device__ static unsigned count(const Sizes& s) { return (unsigned)(s.rows / W); }
    __device__ static long long place(const Sizes& s, long long first, unsigned number) {
        unsigned plane = number / (unsigned)(s.shape.inner / W);
        return first + plane * ((s.shape.channels - 1) * s.shape.inner) + (long long)number * W;
    }
};

// Goes through the places of samples that lie each in a row of its own.
struct Descent {
    long long at, row;

    __device__ Descent(Shape s, long long channel, long long sample) {
        at = (channel / s.channels * s.batch + sample) * s.channels + channel % s.channels;
        row = s.channels;
    }
    __device__ void next(int) { at += row; }
};

// Channels are neighbours: a vector is a sample of W channels, all of them the thread's.
template <int W>
struct Columns {
    static const int width = W, channels = W;
    static const int vectors = 8, samples = 1;
    static const int levels = W == 1 ? 5 : W == 2 ? 4 : 3;  // fewer, for registers
    static const int blocks = 2;
    using Path = Descent;

    __device__ static int channel(int, int i) { return i; }
    __device__ static int sample(int j, int) { return j; }
    __device__ static unsigned number(long long leaf, int j) {
        return ((unsigned)leaf * 8 + j) * blockDim.x + threadIdx.x;
    }
    __device__ static unsigned count(const Sizes& s) { return (unsigned)s.rows * blockDim.x; }
    __device__ static long long place(const Sizes& s, long long first, unsigned number) {
        return first + (number / blockDim.x) * s.shape.channels;
    }
};

// Doubles take twice the registers.
template <class S, class L>
constexpr int blocks_of() {
    return sizeof(raw_of<S>) == 8 ? L::blocks - 1 : L::blocks;
}

// A leaf's vectors: where they lie, and how many samples they have.
template <class L>
struct Leaf {
    long long number, at[L::vectors];
    int rows;

    __device__ bool has(int j) const { return j * L::samples < rows; }
};

// A leaf's values, of each of the thread's channels; +0 beyond the last sample.
template <class S, class L>
struct Values {
    raw_of<S> of[L::channels][8];
};

// Vectors in shared memory, one of them left out after every 128 bytes: so threads whose leaves lie
// apart by a power of two meet in few banks.
template <class S, int W>
struct Kept {
    Vector<S, W>* vectors;

    __device__ static unsigned place(unsigned number) {
        return number + number / (unsigned)(128 / sizeof(Vector<S, W>));
    }
    __device__ Vector<S, W>& operator[](unsigned number) const { return vectors[place(number)]; }
    // What follows `count` vectors.
    __device__ Kept after(unsigned count) const { return {vectors + place(count) + 1}; }
};

template <class S, class L>
__device__ inline Values<S, L> read_leaf(const raw_of<S>* x, const Leaf<L>& leaf,
                                         Kept<S, L::width> kept = {}) {
    Values<S, L> values = {};
#pragma unroll
    for (int j = 0; j < L::vectors; j++) {
        if (!leaf.has(j)) continue;
        Vector<S, L::width> vector = read<S, L::width>(x + leaf.at[j]);
        if (kept.vectors) kept[L::number(leaf.number, j)] = vector;
        for (int i = 0; i < L::width; i++) values.of[L::channel(j, i)][L::sample(j, i)] = vector.of[i];
    }
    return values;
}

template <class S, class L>
__device__ inline void write_leaf(raw_of<S>* x, const Leaf<L>& leaf, const Values<S, L>& values) {
#pragma unroll
    for (int j = 0; j < L::vectors; j++) {
        if (!leaf.has(j)) continue;
        Vector<S, L::width> vector;
        for (int i = 0; i < L::width; i++) vector.of[i] = values.of[L::channel(j, i)][L::sample(j, i)];
        write<S, L::width>(x + leaf.at[j], vector);
    }
}

// A number of each of a thread's channels, or of the channels of a vector's values; one stands for all.
template <class T, int COUNT>
struct PerChannel {
    T of[COUNT];

    __device__ T operator[](int i) const { return of[COUNT == 1 ? 0 : i]; }
};

template <int COUNT, class T>
__device__ inline PerChannel<T, COUNT> read_channels(const T* values, long long channel) {
    PerChannel<T, COUNT> result;
    for (int c = 0; c < COUNT; c++) result.of[c] = values[channel + c];
    return result;
}

// The first one of a thread's channels, which may lie beyond the last one, and the block's place.
template <class L>
struct Block {
    long long group, tile, first, channel;  // a group is the channels that a block takes

    __device__ Block(const Sizes& s) {
        long long size = blockDim.x * L::channels, groups = (s.channels + size - 1) / size;
        tile = blockIdx.x / groups;  // groups are side by side: blocks read neighbours at a time
        group = blockIdx.x % groups;
        first = group * size;
        channel = first + threadIdx.x * L::channels;
    }
};

__device__ inline int thread_number() { return threadIdx.y * blockDim.x + threadIdx.x; }

// --- Along the samples of channels: their sums ------------------------------------------------------

// The nodes of a thread's channels.
template <class Node, int COUNT>
struct Nodes {
    Node of[COUNT];
};

template <class Node, int COUNT>
__device__ inline Nodes<Node, COUNT> merge(Nodes<Node, COUNT> left, const Nodes<Node, COUNT>& right) {
#pragma unroll
    for (int c = 0; c < COUNT; c++) left.of[c] = merge(left.of[c], right.of[c]);
    return left;
}

// A binary counter of nodes that come one after another: it holds one of 2^l leaves while bit l of their
// count is set.
template <class Result, int LEVELS>
struct Counter {
    Result held;
    Counter<Result, LEVELS - 1> above;

    // After `count` others, all as large. It gives the node of all, where they are a power of two.
    __device__ Result add(Result nodes, int count) {
        return count & 1 ? above.add(merge(held, nodes), count >> 1) : held = nodes;
    }
    // The node of `count` that were added and one more, which may be smaller or absent.
    __device__ Result total(Result nodes, int count) const {
        return above.total(count & 1 ? merge(held, nodes) : nodes, count >> 1);
    }
};

template <class Result>
struct Counter<Result, 0> {
    __device__ Result add(Result nodes, int) { return nodes; }
    __device__ Result total(Result nodes, int) const { return nodes; }
};

// The nodes of a thread's share of a tile: `nodes_of(leaf)` gives those of a leaf.
template <class Result, class L, class Function>
__device__ inline Result reduce_share(const Sizes& s, const Block<L>& block, Function nodes_of) {
    Leaf<L> leaf;
    leaf.number = (block.tile * blockDim.y + threadIdx.y) * s.share;
    if (block.channel >= s.channels || leaf.number * 8 >= s.rows) return {};
    typename L::Path path(s.shape, block.channel, leaf.number * 8);
    auto next = [&](int rows) {
        leaf.rows = rows;
#pragma unroll
        for (int j = 0; j < L::vectors; j++, path.next(L::samples)) leaf.at[j] = path.at;
        Result nodes = nodes_of(leaf);
        leaf.number++;
        return nodes;
    };
    Counter<Result, L::levels> counter;
    Result nodes = {};
    // Of full leaves the compiler knows the size, and that of the nodes which are held.
    int full = (int)rows_of(0, s.share, s.rows / 8 - leaf.number);
#pragma unroll 1
    for (int i = 0; i < full; i++) nodes = counter.add(next(8), i);
    if (full == s.share) return nodes;
    int rows = (int)rows_of(leaf.number, 8, s.rows);
    return counter.total(rows ? next(rows) : Result{}, full);
}

// The nodes of all threads that share channels, merged; the whole is in the first ones.
template <class Result>
__device__ inline Result merge_block(Result nodes) {
    __shared__ Result others[THREADS / 2];  // a thread's place is read by itself before it writes again
    Result* mine = &others[threadIdx.y / 2 * blockDim.x + threadIdx.x];
    for (int step = 1; step < blockDim.y; step *= 2) {
        if (threadIdx.y % (2 * step) == step) *mine = nodes;
        __syncthreads();
        if (threadIdx.y % (2 * step) == 0)
            nodes = merge(nodes, others[(threadIdx.y + step) / 2 * blockDim.x + threadIdx.x]);
    }
    return nodes;
}

// Whether this block is the last one of its group to come here: then it sees what the others wrote.
__device__ inline bool last_of_group(unsigned* tickets, long long group, long long tiles) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (thread_number() == 0) {
        last = atomicAdd(&tickets[group], 1u) == tiles - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// Merge the nodes of `count` channels from `first` on, in parts (K, tiles, channels), by eights: those of
// the whole come to lie at tile 0.
template <class Node, int K, class T>
__device__ inline void merge_tiles(const Sizes& s, T* parts, long long tile_rows, long long first,
                                   int count) {
    auto at = [&](int k, long long tile, long long channel) -> T& {
        return parts[(k * s.tiles + tile) * s.channels + channel];
    };
    for (long long size = 1; size < s.tiles; size *= 8) {  // of a node, in tiles
        long long wholes = (s.tiles + 8 * size - 1) / (8 * size);
        for (long long i = thread_number(); i < wholes * count; i += THREADS) {
            long long whole = i / count, channel = first + i % count;
            Node node[8] = {};
            for (int j = 0; j < 8; j++) {
                long long number = whole * 8 + j;
                node[j].rows = rows_of(number, size * tile_rows, s.rows);
                if (node[j].rows)
                    for (int k = 0; k < K; k++) node[j].set(k, at(k, number * size, channel));
            }
            for (int step = 1; step < 8; step *= 2)
                for (int j = 0; j < 8; j += 2 * step) node[j] = merge(node[j], node[j + step]);
            for (int k = 0; k < K; k++) at(k, whole * 8 * size, channel) = node[0].value(k);
        }
        __syncthreads();
    }
}

// Reduce all channels. `nodes_of(leaf)` gives the nodes of a leaf's channels, of K values each, and
// finish(channel, node) takes the node of a whole channel, once for each. Where a channel has several
// tiles, their nodes go through parts (K, tiles, channels), and tickets are 0 for every group of channels.
template <class Node, int K, class L, class T, class Function, class Finish>
__device__ inline void reduce_channels(const Sizes& s, const Block<L>& block, T* parts, unsigned* tickets,
                                       Function nodes_of, Finish finish) {
    using Result = Nodes<Node, L::channels>;
    Result nodes = merge_block(reduce_share<Result>(s, block, nodes_of));
    bool mine = threadIdx.y == 0 && block.channel < s.channels;
    if (s.tiles == 1) {
        if (mine)
            for (int c = 0; c < L::channels; c++) finish(block.channel + c, nodes.of[c]);
        return;
    }
    if (mine)
        for (int c = 0; c < L::channels; c++)
            for (int k = 0; k < K; k++)
                parts[(k * s.tiles + block.tile) * s.channels + block.channel + c] = nodes.of[c].value(k);
    if (!last_of_group(tickets, block.group, s.tiles)) return;
    int count = (int)rows_of(block.group, blockDim.x * L::channels, s.channels);
    merge_tiles<Node, K>(s, parts, 8 * blockDim.y * s.share, block.first, count);
    for (int i = thread_number(); i < count; i += THREADS) {
        Node node = {};
        node.rows = s.rows;
        for (int k = 0; k < K; k++) node.set(k, parts[k * s.tiles * s.channels + block.first + i]);
        finish(block.first + i, node);
    }
}

// Sums of each channel of `value(x)`.
template <class S, class L, class Function>
__device__ inline void sum_channels(const raw_of<S>* x, number_of<S>* parts, unsigned* tickets,
                                    number_of<S>* out, const Sizes& s, Function value) {
    using T = number_of<S>;
    using Node = Sums<T, 1>;
    auto sum = [=](const Leaf<L>& leaf) {
        Values<S, L> values = read_leaf<S, L>(x, leaf);
        Nodes<Node, L::channels> nodes;
#pragma unroll
        for (int c = 0; c < L::channels; c++) {
            real<T> v[8];
            for (int i = 0; i < 8; i++) v[i] = value(load<S>(values.of[c][i]));
            nodes.of[c] = sum_leaf(v, leaf.rows);
        }
        return nodes;
    };
    auto finish = [=](long long channel, Node node) { out[channel] = node.value(0); };
    reduce_channels<Node, 1, L>(s, Block<L>(s), parts, tickets, sum, finish);
}

template <class S, class L>
__launch_bounds__(THREADS, blocks_of<S, L>())
__global__ void channel_sum(const raw_of<S>* x, number_of<S>* out, number_of<S>* parts, unsigned* tickets,
                            long long channels, long long tiles, long long share, long long rows,
                            long long batch, long long per_instance, long long inner) {
    Sizes sizes = {channels, tiles, share, rows, {batch, per_instance, inner}};
    sum_channels<S, L>(x, parts, tickets, out, sizes, [](real_of<S> v) { return v; });
}

template <class S, class L>
__launch_bounds__(THREADS, blocks_of<S, L>())
__global__ void square_sum(const raw_of<S>* x, number_of<S>* out, number_of<S>* parts, unsigned* tickets,
                           long long channels, long long tiles, long long share, long long rows,
                           long long batch, long long per_instance, long long inner) {
    Sizes sizes = {channels, tiles, share, rows, {batch, per_instance, inner}};
    sum_channels<S, L>(x, parts, tickets, out, sizes, [](real_of<S> v) { return v * v; });
}

// --- Along the moments of parts --------------------------------------------------------------------

// Merge the moments (2, part_count, channels) of parts, of `part_rows` samples each and the last one of what is
// left of `rows`, to out (2, tiles, channels): a block takes WIDE channels, a thread LEAVES consecutive parts.
template <class T>
__global__ void merge_moments(const T* parts, T* out, long long channels, long long tiles,
                              long long part_count, long long part_rows, long long rows) {
    long long blocks = (channels + WIDE - 1) / WIDE;  // per tile, side by side
    long long tile = blockIdx.x / blocks, channel = blockIdx.x % blocks * WIDE + threadIdx.x;
    bool inside = channel < channels;
    auto part = [=](long long number) {
        Moments<T> node = {};
        node.rows = rows_of(number, part_rows, rows);
        if (node.rows) {
            node.mean = real<T>(parts[number * channels + channel]);
            node.var = real<T>(parts[(part_count + number) * channels + channel]);
        }
        return node;
    };
    Moments<T> node = {};
    if (inside) {
        long long first = (tile * blockDim.y + threadIdx.y) * LEAVES;
        node = merge(merge(part(first), part(first + 1)), merge(part(first + 2), part(first + 3)));
    }
    node = merge_block(node);
    if (inside && threadIdx.y == 0)
        for (int k = 0; k < 2; k++) out[(k * tiles + tile) * channels + channel] = node.value(k);
}

}  // namespace gpubn

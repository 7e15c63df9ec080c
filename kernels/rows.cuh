// Rows of x (N, D), in the sample order (README.md): sums along a row's values, and what layer and RMS norm
// share.
//
// A team of blockDim.x threads takes a row; a block is blockDim.y teams. The team is LANES lanes of a warp,
// or where rows are longer several warps. A thread holds PER of a row's values in registers, in chunks of V
// neighbours, each read and written at once. So the values of a row lie in a team:
//
//     warp 0: first chunks of its lanes, second chunks of its lanes, ...; warp 1: first chunks of its lanes, ...
//
// What a warp reads at once is a stretch of memory and a subtree of LANES * V values. From the leaves of the
// tree to its root lie: the values of a chunk; lanes, by shuffles; a thread's chunks; warps, through shared
// memory; and where a row has more values than a team holds, tiles of the row. A leaf of eight lies in 8 / V
// lanes.
//
// V divides D, so a chunk is in the row or beyond it as a whole. What lies beyond the row is +0 in a leaf that
// has begun, and -0 in one that has not: x + -0 is x for every x, so sums need not know what is absent.

namespace gpubn {

const int MAX_TEAM = 512;  // threads of a block: with so many each may have 128 registers
const unsigned ALL_LANES = 0xffffffffu;

template <int V_, int PER_, int LANES_>
struct Layout {
    static const int V = V_, PER = PER_, LANES = LANES_, CHUNKS = PER / V;

    __device__ static int lane() { return threadIdx.x % LANES; }
    __device__ static int warp() { return threadIdx.x / LANES; }
    __device__ static int warps() { return blockDim.x / LANES; }
    __device__ static int tile() { return blockDim.x * PER; }  // values that a team holds
    // Where chunk t of this warp's first lane begins in the team's tile, and that of this lane.
    __device__ static int stretch(int t) { return (warp() * CHUNKS + t) * (LANES * V); }
    __device__ static int place(int t) { return stretch(t) + lane() * V; }
};

// How many of the `size` values from `first` on are among the first `count`.
__device__ inline int overlap(int first, int size, int count) {
    return max(0, min(size, count - first));
}

__device__ inline int at_most(long long count, int limit) {
    return count < limit ? (int)count : limit;
}

// --- Chunks: up to 16 bytes in one access ---------------------------------------------------------

template <class E, int V>
struct alignas(V * sizeof(E) < 16 ? V * sizeof(E) : 16) Chunk {
    E value[V];
};

template <int V, class E>
__device__ inline Chunk<E, V> read_chunk(const E* from) {
    return *(const Chunk<E, V>*)from;
}

template <int V, class E>
__device__ inline void write_chunk(E* to, Chunk<E, V> chunk) {
    *(Chunk<E, V>*)to = chunk;
}

// --- Trees ----------------------------------------------------------------------------------------

template <class T>
__device__ inline real<T> absent() {
    return real<T>((T)-0.0);
}

// What stands for the values of a chunk at `place` that lies beyond the row's `count` values.
template <class T>
__device__ inline real<T> beyond(int place, int count) {
    return (place & ~7) < count ? real<T>((T)0) : absent<T>();
}

template <class T>
__device__ inline real<T> merge(real<T> left, real<T> right) {
    return left + right;
}

template <class T, int K>
struct RowSums {
    real<T> sum[K];
};

template <class T, int K>
__device__ inline RowSums<T, K> merge(RowSums<T, K> left, RowSums<T, K> right) {
    for (int k = 0; k < K; k++) left.sum[k] = left.sum[k] + right.sum[k];
    return left;
}

template <int N, class Node>
__device__ inline Node tree(const Node* nodes) {
    if constexpr (N == 1)
        return nodes[0];
    else
        return merge(tree<N / 2>(nodes), tree<N / 2>(nodes + N / 2));
}

// The sum over LANES lanes, given to each: the two sides of a sum may change places.
template <int LANES, class T>
__device__ inline real<T> lanes_sum(real<T> value) {
#pragma unroll
    for (int step = 1; step < LANES; step *= 2)
        value = value + real<T>(__shfl_xor_sync(ALL_LANES, value.v, step, LANES));
    return value;
}

// The sums of a team's values, of which `count` are in the row, given to every thread.
template <class L, class T, int K>
__device__ inline RowSums<T, K> team_sums(const real<T> (&value)[K][L::PER], int count) {
    RowSums<T, K> total;
#pragma unroll
    for (int k = 0; k < K; k++) {
        real<T> node[L::CHUNKS];
#pragma unroll
        for (int t = 0; t < L::CHUNKS; t++) {
            node[t] = absent<T>();
            if (L::stretch(t) < count)
                node[t] = lanes_sum<L::LANES>(tree<L::V>(value[k] + t * L::V));
        }
        total.sum[k] = tree<L::CHUNKS>(node);
    }
    if (blockDim.x > L::LANES) {
        __shared__ T nodes[K][MAX_TEAM / 32];
        int team = threadIdx.y * L::warps();
        if (L::lane() == 0)
            for (int k = 0; k < K; k++) nodes[k][team + L::warp()] = total.sum[k].v;
        __syncthreads();
        for (int k = 0; k < K; k++) {
            real<T> node = absent<T>();
            if (L::lane() < L::warps()) node = real<T>(nodes[k][team + L::lane()]);
            total.sum[k] = lanes_sum<L::LANES>(node);
        }
        __syncthreads();  // before the next sums are written there
    }
    return total;
}

// The moments of lanes' nodes merged, in the first lane. Every `step`th lane has one, of up to `size` values.
// `rows(after, size)` is how many of the `size` values after so many from this lane's first one are in the row.
// Where that is known to be all, the merges need neither counts nor divisions.
template <int LANES, class T, class Rows>
__device__ inline Moments<T> lanes_moments(Moments<T> node, int step, int size, Rows rows) {
#pragma unroll
    for (; step < LANES; step *= 2, size *= 2) {
        Moments<T> right = {real<T>(__shfl_down_sync(ALL_LANES, node.mean.v, step, LANES)),
                            real<T>(__shfl_down_sync(ALL_LANES, node.var.v, step, LANES)), rows(size, size)};
        node = merge(node, right);
    }
    return node;
}

// The moments of a stretch of LANES * V values, V of each lane, in the first lane. `rows` is as above, from this
// lane's leaf on; values beyond the row are +0.
template <class L, class T, class Rows>
__device__ inline Moments<T> stretch_moments(const real<T>* d, bool inside, Rows rows) {
    // A leaf lies in 8 / V lanes. As moments_leaf (samples.cuh) has it.
    using R = real<T>;
    const int V = L::V;
    R n((long long)rows(0, 8)), eighth((T)0.125), square[V];
    R sum = lanes_sum<8 / V>(tree<V>(d));
    R mean = rows(0, 8) == 8 ? sum * eighth : sum / n;
#pragma unroll
    for (int i = 0; i < V; i++) {
        R e = d[i] - mean;
        square[i] = inside ? (e * eighth) * e : R((T)0);
    }
    sum = lanes_sum<8 / V>(tree<V>(square));
    Moments<T> leaf = {mean, rows(0, 8) == 8 ? sum : sum / (n * eighth), rows(0, 8)};
    return lanes_moments<L::LANES>(leaf, 8 / V, 8, rows);
}

// The moments of a team's values d, of which `count` are in the row, given to every thread.
template <class L, class T>
__device__ inline Moments<T> team_moments(const real<T> (&d)[L::PER], int count) {
    Moments<T> node[L::CHUNKS];
    const int STRETCH = L::LANES * L::V;
    int ragged = -1;  // the chunk that begins in the row and, in some lane, ends beyond it
    real<T> last[L::V];
#pragma unroll
    for (int t = 0; t < L::CHUNKS; t++) {
        node[t] = {};
        if (L::stretch(t) + STRETCH <= count) {
            node[t] = stretch_moments<L>(d + t * L::V, true, [](int, int size) { return size; });
        } else if (L::stretch(t) < count) {
            ragged = t;
#pragma unroll
            for (int i = 0; i < L::V; i++) last[i] = d[t * L::V + i];
        }
    }
    if (ragged >= 0) {
        int place = L::place(ragged), leaf = place & ~7;
        auto rows = [=](int after, int size) { return overlap(leaf + after, size, count); };
        Moments<T> part = stretch_moments<L>(last, place < count, rows);
#pragma unroll
        for (int t = 0; t < L::CHUNKS; t++)
            if (t == ragged) node[t] = part;
    }
    Moments<T> all = tree<L::CHUNKS>(node);
    if (blockDim.x > L::LANES) {
        __shared__ Moments<T> nodes[MAX_TEAM / 32];
        if (L::lane() == 0) nodes[L::warp()] = all;
        __syncthreads();
        all = {};
        if (L::lane() < L::warps()) all = nodes[L::lane()];
        const int SIZE = L::LANES * L::PER;
        auto rows = [=](int after, int size) { return overlap(L::lane() * SIZE + after, size, count); };
        all = lanes_moments<L::LANES>(all, 1, SIZE, rows);
        __syncthreads();  // before the next moments are written there
    }
    return {real<T>(__shfl_sync(ALL_LANES, all.mean.v, 0, L::LANES)),
            real<T>(__shfl_sync(ALL_LANES, all.var.v, 0, L::LANES)), count};
}

// The node of a whole row from its tiles': `tile(start, count)` gives that of the `count` values from `start`
// on.
template <class Node, class Tile>
__device__ inline Node row_node(long long columns, int size, Tile tile) {
    // A binary counter: level l holds the node of 2^l tiles while bit l of the count is set.
    Node level[40], node;
    long long count = 0;
    for (long long start = 0; start < columns; start += size, count++) {
        node = tile(start, at_most(columns - start, size));
        if (columns <= size) return node;
        int l = 0;
        for (; count >> l & 1; l++) node = merge(level[l], node);
        level[l] = node;
    }
    int l = 0;
    while (!(count >> l & 1)) l++;
    for (node = level[l++]; count >> l; l++)
        if (count >> l & 1) node = merge(level[l], node);
    return node;
}

// Sum of value(j) over a row's j = 0 .. columns - 1, by a block of one team of THREADS, given to every thread.
template <class T, class Value>
__device__ inline real<T> row_sum(long long columns, Value value) {
    using L = Layout<8, 8, 32>;
    return row_node<real<T>>(columns, L::tile(), [=](long long start, int count) {
        real<T> v[1][8];
        for (int i = 0; i < 8; i++)
            v[0][i] = L::place(0) + i < count ? value(start + L::place(0) + i) : beyond<T>(L::place(0), count);
        return team_sums<L, T, 1>(v, count).sum[0];
    });
}

// --- Layer and RMS norm ---------------------------------------------------------------------------
//
// A Norm has its formulas: Norm::SUMS is how many of the sums of u * xhat and of u its gradients have, u
// being dout or dout * gamma; norm.row(r) has what normalizes row r, and with it xhat(x) and dx(g, xhat,
// means of the sums).

__device__ inline long long team_row() {
    return (long long)blockIdx.x * blockDim.y + threadIdx.y;
}

// u * xhat, or u: the terms of the sums.
template <class R>
__device__ inline R term(int k, R u, R xhat) {
    return k == 0 ? u * xhat : u;
}

// Fetch a thread's chunks of the `count` values from `from` on, all of them before any is used.
template <class L, class E>
__device__ inline void fetch(const E* from, int count, Chunk<E, L::V> (&chunk)[L::CHUNKS]) {
#pragma unroll
    for (int t = 0; t < L::CHUNKS; t++) {
        chunk[t] = {};
        if (L::place(t) < count) chunk[t] = read_chunk<L::V>(from + L::place(t));
    }
}

// Value j of a thread's chunks.
template <class S, int V>
__device__ inline real_of<S> value_of(const Chunk<raw_of<S>, V>* chunk, int j) {
    return load<S>(chunk[j / V].value[j % V]);
}

// The sums over a row of g * xhat, and of g.
template <class L, class T, int K>
__device__ inline RowSums<T, K> sums_of_terms(const real<T>* g, const real<T>* xhat, int count) {
    real<T> terms[K][L::PER];
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int j = 0; j < L::PER; j++) {
            int place = L::place(j / L::V);
            terms[k][j] = place < count ? term(k, g[j], xhat[j]) : beyond<T>(place, count);
        }
    return team_sums<L, T, K>(terms, count);
}

template <class T, int K>
__device__ inline RowSums<T, K> means(RowSums<T, K> of, long long columns) {
    for (int k = 0; k < K; k++) of.sum[k] = of.sum[k] / real<T>(columns);
    return of;
}

// What follows the sums along a row: `write(start, count)` for each tile, after `read(start, count)` where
// the registers held more tiles than one meanwhile.
template <class L, class Read, class Write>
__device__ inline void each_tile(long long columns, Read read, Write write) {
    for (long long start = 0; start < columns; start += L::tile()) {
        int count = at_most(columns - start, L::tile());
        if (columns > L::tile()) read(start, count);
        write(start, count);
    }
}

// A chunk of dx from those of g = dout * gamma and of xhat.
template <class S, int V, class Row, class Means>
__device__ inline void write_dx(raw_of<S>* dx, Row row, const real_of<S>* g, const real_of<S>* xhat, Means mean) {
    Chunk<raw_of<S>, V> chunk;
#pragma unroll
    for (int i = 0; i < V; i++) chunk.value[i] = store<S>(row.dx(g[i], xhat[i], mean.sum));
    write_chunk(dx, chunk);
}

// dx alone, of rows that have too many values for gradients_of_rows below.
template <class S, class L, class Norm>
__device__ inline void backward_of_rows(const raw_of<S>* dout, const raw_of<S>* x, Norm norm,
                                        const typename storage<S>::type* gamma, raw_of<S>* dx, long long rows,
                                        long long columns) {
    using T = typename storage<S>::type;
    using R = real<T>;
    const int K = Norm::SUMS, V = L::V;
    long long r = team_row();
    if (r >= rows) return;
    dout += r * columns;
    x += r * columns;
    dx += r * columns;
    auto row = norm.row(r);
    R xhat[L::PER], g[L::PER];
    auto read = [&](long long start, int count) {
        Chunk<raw_of<S>, V> x_chunk[L::CHUNKS], dout_chunk[L::CHUNKS];
        Chunk<T, V> gamma_chunk[L::CHUNKS];
        fetch<L>(x + start, count, x_chunk);
        fetch<L>(dout + start, count, dout_chunk);
        fetch<L>(gamma + start, count, gamma_chunk);
#pragma unroll
        for (int j = 0; j < L::PER; j++) {
            xhat[j] = row.xhat(value_of<S, V>(x_chunk, j));
            g[j] = value_of<S, V>(dout_chunk, j) * value_of<T, V>(gamma_chunk, j);
        }
    };
    auto sums = row_node<RowSums<T, K>>(columns, L::tile(), [&](long long start, int count) {
        read(start, count);
        return sums_of_terms<L, T, K>(g, xhat, count);
    });
    auto mean = means(sums, columns);
    each_tile<L>(columns, read, [&](long long start, int count) {
#pragma unroll
        for (int t = 0; t < L::CHUNKS; t++)
            if (L::place(t) < count)
                write_dx<S, V>(dx + start + L::place(t), row, g + t * V, xhat + t * V, mean);
    });
}

// The N sums of each of a block's teams, a power of two of them, merged; whole in the first team.
template <int N, class T>
__device__ inline void merge_teams(real<T>* sum) {
    __shared__ T sums[N][MAX_TEAM];
    int j = threadIdx.y * blockDim.x + threadIdx.x;
    for (int step = 1; step < blockDim.y; step *= 2) {
        for (int n = 0; n < N; n++) sums[n][j] = sum[n].v;
        __syncthreads();
        if (threadIdx.y % (2 * step) == 0)
            for (int n = 0; n < N; n++) sum[n] = sum[n] + real<T>(sums[n][j + step * blockDim.x]);
        __syncthreads();
    }
}

// The gradients of gamma (and beta) of a tile of rows: sums along the rows, K = Norm::SUMS of them, to parts
// (K, tiles, columns). And dx, in which case a team holds a whole row; else it takes some of the columns.
//
// A team takes a leaf, eight rows one after another, and always the same columns of them: so a thread has its
// columns' sums in registers. The next row is fetched while a row is summed. The leaves of a block's teams
// are merged at the end.
template <class S, class L, bool DX, class Norm>
__device__ inline void gradients_of_rows(const raw_of<S>* dout, const raw_of<S>* x, Norm norm,
                                         const typename storage<S>::type* gamma, raw_of<S>* dx,
                                         typename storage<S>::type* parts, unsigned tiles, long long rows,
                                         long long columns) {
    using T = typename storage<S>::type;
    using R = real<T>;
    const int K = Norm::SUMS, V = L::V, CHUNKS = L::CHUNKS, PER = L::PER;
    unsigned tile = blockIdx.x % tiles;
    long long start = (long long)(blockIdx.x / tiles) * L::tile();  // of the columns
    int count = at_most(columns - start, L::tile());
    long long first = ((long long)tile * blockDim.y + threadIdx.y) * 8;
    int leaf = first < rows ? at_most(rows - first, 8) : 0;  // rows of this team's leaf

    Chunk<raw_of<S>, V> next_x[CHUNKS], next_dout[CHUNKS];
    typename Norm::Row next;
    auto fetch_row = [&](int i) {
        int values = i < leaf ? count : 0;
        long long at = (first + i) * columns + start;
        fetch<L>(x + at, values, next_x);
        fetch<L>(dout + at, values, next_dout);
        next = norm.row(i < leaf ? first + i : 0);
    };
    fetch_row(0);
    R one[K][PER], two[K][PER], four[K][PER];  // sums of as many rows that wait for their neighbours
    int eight = 8;
    asm volatile("" : "+r"(eight));  // NVRTC unrolls the loop otherwise, whatever a pragma says: too much code
    for (int i = 0; i < eight; i++) {
        bool present = i < leaf;
        auto row = next;
        R u[PER], xhat[PER];
#pragma unroll
        for (int j = 0; j < PER; j++) {
            u[j] = value_of<S, V>(next_dout, j);
            xhat[j] = row.xhat(value_of<S, V>(next_x, j));
        }
        fetch_row(i + 1);
        if (DX) {
            Chunk<T, V> weight[CHUNKS];
            fetch<L>(gamma, count, weight);  // for each row from the nearest cache: registers are scarce
            R g[PER];
#pragma unroll
            for (int j = 0; j < PER; j++) g[j] = u[j] * value_of<T, V>(weight, j);
            auto mean = means(sums_of_terms<L, T, K>(g, xhat, count), columns);
#pragma unroll
            for (int t = 0; t < CHUNKS; t++)
                if (present && L::place(t) < count)
                    write_dx<S, V>(dx + (first + i) * columns + L::place(t), row, g + t * V, xhat + t * V, mean);
        }
        R missing = leaf > 0 ? R((T)0) : absent<T>();
#pragma unroll
        for (int k = 0; k < K; k++)
#pragma unroll
            for (int j = 0; j < PER; j++) {
                R sum = present ? term(k, u[j], xhat[j]) : missing;
                if (i % 2 == 0) {
                    one[k][j] = sum;
                    continue;
                }
                sum = one[k][j] + sum;
                if (i % 4 == 1) {
                    two[k][j] = sum;
                    continue;
                }
                sum = two[k][j] + sum;
                four[k][j] = i == 3 ? sum : four[k][j] + sum;  // at last of all eight
            }
    }
    merge_teams<K * PER>(&four[0][0]);
    if (threadIdx.y > 0) return;
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int t = 0; t < CHUNKS; t++) {
            Chunk<T, V> chunk;
#pragma unroll
            for (int j = 0; j < V; j++) chunk.value[j] = four[k][t * V + j].v;
            if (L::place(t) < count)
                write_chunk(parts + (k * (long long)tiles + tile) * columns + start + L::place(t), chunk);
        }
}

// Merge parts (planes, P, columns) to (planes, tiles, columns), MERGED parts to one. A block takes 32 columns;
// its 32 warps take up to 32 parts each, one after another, and then a column each.
const int MERGED = 1024;

template <class T>
__launch_bounds__(1024)
__global__ void merge_rows(const T* parts, T* out, long long columns, unsigned tiles, unsigned part_count) {
    using R = real<T>;
    __shared__ T nodes[32][33];  // a bank's width more, so that a column lies in 32 banks
    long long blocks = (columns + 31) / 32, column = blockIdx.x % blocks * 32 + threadIdx.x;
    unsigned plane = blockIdx.x / blocks / tiles, tile = blockIdx.x / blocks % tiles;
    unsigned share = 1;  // parts of a warp
    while (share * 32 < part_count && share * 32 < MERGED) share *= 2;
    unsigned first = tile * MERGED + threadIdx.y * share;
    parts += plane * (long long)part_count * columns;
    R level[5], node = absent<T>();
    for (int i = 0; i < share && first < part_count; i++) {
        node = absent<T>();
        if (first + i < part_count && column < columns) node = R(parts[(first + i) * columns + column]);
        // A binary counter, whose every level is a register.
        bool whole = true;
#pragma unroll
        for (int l = 0; l < 5; l++) {
            if (!whole) continue;
            whole = i >> l & 1;
            if (whole)
                node = level[l] + node;
            else
                level[l] = node;
        }
    }
    nodes[threadIdx.y][threadIdx.x] = node.v;
    __syncthreads();
    R sum = lanes_sum<32>(R(nodes[threadIdx.x][threadIdx.y]));
    column += (int)threadIdx.y - (int)threadIdx.x;
    if (threadIdx.x == 0 && column < columns)
        out[(plane * (long long)tiles + tile) * columns + column] = sum.v;
}

}  // namespace gpubn

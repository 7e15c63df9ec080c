// Inverted dropout. The mask is a function of (seed, stream, step) and the element's index alone, so that
// it is the same on every device and is computed anew in the backward pass instead of stored.

namespace gpubn {

// Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// Element i takes word i % 4 of the block with counter (i / 4 low, i / 4 high, stream, step).
__device__ inline unsigned dropout_word(unsigned long long element, unsigned long long seed,
                                        unsigned stream, unsigned step) {
    unsigned long long block = element / 4;
    unsigned c[4] = {(unsigned)block, (unsigned)(block >> 32), stream, step};
    unsigned key0 = (unsigned)seed, key1 = (unsigned)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        unsigned long long p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
        c[0] = (unsigned)(p1 >> 32) ^ c[1] ^ key0;
        c[1] = (unsigned)p1;
        c[2] = (unsigned)(p0 >> 32) ^ c[3] ^ key1;
        c[3] = (unsigned)p0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c[element % 4];
}

// x * scale where the element's word is below threshold = round(p * 2^32), else +0.
template <class S, class T>
__device__ inline raw_of<S> dropout(raw_of<S> x, unsigned long long element, T scale,
                                    unsigned long long threshold, unsigned long long seed, unsigned stream,
                                    unsigned step) {
    real<T> zero = {};
    bool kept = dropout_word(element, seed, stream, step) < threshold;
    return store<S>(kept ? load<S>(x) * real<T>(scale) : zero);
}

}  // namespace gpubn

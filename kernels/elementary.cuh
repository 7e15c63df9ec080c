// exp and log: our own, so that they are the same on every device. Additions, multiplications and fused
// multiply-adds, each rounded once; the error is below one unit in the last place, the polynomials' part in it
// far below (README.md). The same steps as in elementary_numba.py.

namespace gpubn {

__device__ inline int bits(float x) { return __float_as_int(x); }
__device__ inline long long bits(double x) { return __double_as_longlong(x); }
__device__ inline float from_bits(int x) { return __int_as_float(x); }
__device__ inline double from_bits(long long x) { return __longlong_as_double(x); }

// What exp and log need to know of a format: its bits of fraction, the bias of its exponent, and constants.
template <class T>
struct Format;

template <>
struct Format<float> {
    using Bits = int;
    static const int DIGITS = 23, BIAS = 127;
    float too_low = -104, too_high = 89;  // exp is 0 below, infinite above
    float smallest_normal = 0x1p-126f, infinity = from_bits(0x7f800000), nan = from_bits(0x7fc00000);
    float log2e = 0x1.715476p+0f, sqrt_half = 0x1.6a09e6p-1f;
    float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // an exponent times the high part is exact
    float exp_terms[6] = {0x1.a124f2p-13f, 0x1.6d4324p-10f, 0x1.1110ep-7f,
                          0x1.5554eap-5f,  0x1.555556p-3f,  0x1p-1f};
    float log_terms[4] = {0x1.ddd4dap-3f, 0x1.245c28p-2f, 0x1.9999ecp-2f, 0x1.555556p-1f};
};

template <>
struct Format<double> {
    using Bits = long long;
    static const int DIGITS = 52, BIAS = 1023;
    double too_low = -746, too_high = 710;
    double smallest_normal = 0x1p-1022, infinity = from_bits(0x7ff0000000000000ll),
           nan = from_bits(0x7ff8000000000000ll);
    double log2e = 0x1.71547652b82fep+0, sqrt_half = 0x1.6a09e667f3bcdp-1;
    double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
    double exp_terms[11] = {0x1.1f730349868cep-29, 0x1.af4de97ca4194p-26, 0x1.27e4db646b17ep-22,
                            0x1.71de0231960ebp-19, 0x1.a01a01a6d889cp-16, 0x1.a01a01abe7fe1p-13,
                            0x1.6c16c16c162d4p-10, 0x1.11111111100dcp-7,  0x1.5555555555556p-5,
                            0x1.5555555555557p-3,  0x1p-1};
    double log_terms[7] = {0x1.2b5f68a50d903p-3, 0x1.39fdcceb4bb45p-3, 0x1.7462b91b8df65p-3,
                           0x1.c71c62d5e53e0p-3, 0x1.2492492dfd86cp-2, 0x1.9999999995273p-2,
                           0x1.5555555555558p-1};
};

// terms[0] * x^(COUNT - 1) + ... + terms[COUNT - 1]
template <class T, int COUNT>
__device__ inline real<T> polynomial(const T (&terms)[COUNT], real<T> x) {
    real<T> p(terms[0]);
#pragma unroll
    for (int i = 1; i < COUNT; i++) p = fma(p, x, real<T>(terms[i]));
    return p;
}

// 2^n, for n that an exponent can hold.
template <class T>
__device__ inline real<T> power_of_two(typename Format<T>::Bits n) {
    using F = Format<T>;
    return real<T>(from_bits((n + F::BIAS) << F::DIGITS));
}

// exp(x) = 2^n * exp(r), with n the whole number nearest to x / ln(2), so that |r| <= ln(2) / 2.
template <class T>
__device__ inline T exp(T x_) {
    using R = real<T>;
    using Bits = typename Format<T>::Bits;
    const Format<T> f;
    R x(x_), low(f.too_low), high(f.too_high);
    R inside = x > low ? x : low;  // a NaN too: it comes back at the end
    if (inside > high) inside = high;
    // 1.5 * 2^DIGITS: what is added to it is rounded to a whole number, which stands in the last bits.
    R shift((T)(3ll << (Format<T>::DIGITS - 1)));
    R shifted = fma(inside, R(f.log2e), shift);
    Bits n = bits(shifted.v) - bits(shift.v);
    R whole = shifted - shift;
    R left = fma(whole, R(-f.ln2_high), inside);
    R r = fma(whole, R(-f.ln2_low), left);
    R missed = fma(whole, R(-f.ln2_low), left - r);  // by the rounding of r
    R y = R((T)1) + (r + fma(r * r, polynomial(f.exp_terms, r), missed));
    Bits half = n >> 1;  // in two steps: 2^n itself may be too large, or subnormal
    y = (y * power_of_two<T>(half)) * power_of_two<T>(n - half);
    return is_nan(x) ? x_ : y.v;
}

// log(x) = n * ln(2) + log(1 + g), with 1 + g from sqrt(1/2) to sqrt(2). With s = g / (2 + g),
// log(1 + g) = 2 * atanh(s) = g - (g^2 / 2 - s * (g^2 / 2 + z * P(z))), z = s^2.
template <class T>
__device__ inline T log(T x_) {
    using R = real<T>;
    using F = Format<T>;
    using Bits = typename F::Bits;
    const F f;
    R x(x_), zero((T)0), one((T)1), half((T)0.5), infinity(f.infinity);
    bool subnormal = R(f.smallest_normal) > x;
    R normal = subnormal ? x * power_of_two<T>(F::DIGITS) : x;
    Bits above = bits(normal.v) + (bits((T)1) - bits(f.sqrt_half));
    Bits n = (above >> F::DIGITS) - F::BIAS - (subnormal ? F::DIGITS : 0);
    R g = R(from_bits((above & (((Bits)1 << F::DIGITS) - 1)) + bits(f.sqrt_half))) - one;
    R s = g / (R((T)2) + g), z = s * s, square = half * (g * g), whole((long long)n);
    R rest = s * (square + z * polynomial(f.log_terms, z)) + whole * R(f.ln2_low);
    R y = whole * R(f.ln2_high) - ((square - rest) - g);
    if (!(x > zero)) return x != zero ? f.nan : -f.infinity;  // log of a NaN is one too
    return infinity > x ? y.v : f.infinity;
}

}  // namespace gpubn

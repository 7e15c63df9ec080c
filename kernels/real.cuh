// real<T>: a float or double whose + - * / sqrt and comparisons are IEEE 754, each correctly rounded,
// subnormals included, on CUDA and on the host alike. All arithmetic under the numerics contract goes
// through it, for two reasons:
//   * CuPy always ends NVRTC's options with -ftz=true, which flushes float32 subnormals even in the
//     intrinsics (__fadd_rn becomes add.rn.ftz.f32) and in comparisons. Inline PTX is left alone.
//   * NVRTC fuses a*b+c into one rounding by default. An instruction written with .rn is never fused.
//     What is to be rounded once says so: fma(a, b, c).
// float64 knows no flushing, so there the intrinsics are enough.

namespace gpubn {

template <class T>
struct real;

template <>
struct real<float> {
    float v;

    real() = default;  // trivial, so that it can lie in shared memory
    __device__ explicit real(float value) : v(value) {}
    __device__ explicit real(long long count) : v((float)count) {}  // an integer has no subnormals

#ifdef __CUDA_ARCH__
#define GPUBN_BINARY(op, ptx)                                                     \
    __device__ friend real operator op(real a, real b) {                          \
        float r;                                                                  \
        asm(ptx " %0, %1, %2;" : "=f"(r) : "f"(a.v), "f"(b.v));                   \
        return real(r);                                                           \
    }
#define GPUBN_COMPARE(op, ptx)                                                    \
    __device__ friend bool operator op(real a, real b) {                          \
        unsigned r;                                                               \
        asm("{ .reg .pred p; " ptx " p, %1, %2; selp.u32 %0, 1, 0, p; }"          \
            : "=r"(r) : "f"(a.v), "f"(b.v));                                      \
        return r != 0;                                                            \
    }
    GPUBN_BINARY(+, "add.rn.f32")
    GPUBN_BINARY(-, "sub.rn.f32")
    GPUBN_BINARY(*, "mul.rn.f32")
    GPUBN_BINARY(/, "div.rn.f32")
    GPUBN_COMPARE(>, "setp.gt.f32")
    GPUBN_COMPARE(!=, "setp.neu.f32")  // true where either side is NaN, as in C++
#undef GPUBN_BINARY
#undef GPUBN_COMPARE
    __device__ friend real sqrt(real a) {
        float r;
        asm("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(a.v));
        return real(r);
    }
    __device__ friend real fma(real a, real b, real c) {
        float r;
        asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(a.v), "f"(b.v), "f"(c.v));
        return real(r);
    }
#else
    friend real operator+(real a, real b) { return real(a.v + b.v); }
    friend real operator-(real a, real b) { return real(a.v - b.v); }
    friend real operator*(real a, real b) { return real(a.v * b.v); }
    friend real operator/(real a, real b) { return real(a.v / b.v); }
    friend bool operator>(real a, real b) { return a.v > b.v; }
    friend bool operator!=(real a, real b) { return a.v != b.v; }
    friend real sqrt(real a) { return real(sqrtf(a.v)); }
    friend real fma(real a, real b, real c) { return real(fmaf(a.v, b.v, c.v)); }
#endif
};

template <>
struct real<double> {
    double v;

    real() = default;
    __device__ explicit real(double value) : v(value) {}
    __device__ explicit real(long long count) : v((double)count) {}

#ifdef __CUDA_ARCH__
    __device__ friend real operator+(real a, real b) { return real(__dadd_rn(a.v, b.v)); }
    __device__ friend real operator-(real a, real b) { return real(__dsub_rn(a.v, b.v)); }
    __device__ friend real operator*(real a, real b) { return real(__dmul_rn(a.v, b.v)); }
    __device__ friend real operator/(real a, real b) { return real(__ddiv_rn(a.v, b.v)); }
    __device__ friend real sqrt(real a) { return real(__dsqrt_rn(a.v)); }
    __device__ friend real fma(real a, real b, real c) { return real(__fma_rn(a.v, b.v, c.v)); }
#else
    friend real operator+(real a, real b) { return real(a.v + b.v); }
    friend real operator-(real a, real b) { return real(a.v - b.v); }
    friend real operator*(real a, real b) { return real(a.v * b.v); }
    friend real operator/(real a, real b) { return real(a.v / b.v); }
    friend real sqrt(real a) { return real(::sqrt(a.v)); }
    friend real fma(real a, real b, real c) { return real(::fma(a.v, b.v, c.v)); }
#endif
    __device__ friend bool operator>(real a, real b) { return a.v > b.v; }
    __device__ friend bool operator!=(real a, real b) { return a.v != b.v; }
};

template <class T>
__device__ inline bool is_nan(real<T> a) {
    return a != a;
}

// The middle one of three values: the shift K that is taken from every sample before its moments.
// One far-off sample cannot become K. A NaN among the three may.
template <class T>
__device__ inline T middle(T a_, T b_, T c_) {
    real<T> a(a_), b(b_), c(c_);
    if (a > b) {
        real<T> t = a;
        a = b;
        b = t;
    }
    if (b > c) b = a > c ? a : c;
    return b.v;
}

// --- What arrays hold -----------------------------------------------------------------------------
//
// A kernel's S says how an array's values are stored: float, double, f16 or bf16. Half precision is
// widened exactly, computed with in float32, and rounded once, to nearest. Its values travel as bits.

struct f16 {};
struct bf16 {};

template <class S>
struct storage {
    using raw = S;   // as it lies in memory
    using type = S;  // as it is computed with
    __device__ static real<S> load(S value) { return real<S>(value); }
    __device__ static S store(real<S> value) { return value.v; }
};

__device__ inline unsigned float_bits(float value) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(value);
#else
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

__device__ inline float bits_float(unsigned bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

template <>
struct storage<f16> {
    using raw = unsigned short;
    using type = float;
    __device__ static real<float> load(raw half) {
        unsigned sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
        if (magnitude >= 0x7c00u) return real<float>(bits_float(sign | 0x7f800000u | magnitude << 13));
        if (magnitude >= 0x400u) return real<float>(bits_float(sign | ((magnitude << 13) + 0x38000000u)));
        // Subnormal: so many times 2**-24, which is exact.
        real<float> tiny = real<float>((long long)magnitude) * real<float>(5.9604644775390625e-08f);
        return real<float>(bits_float(sign | float_bits(tiny.v)));
    }
    __device__ static raw store(real<float> value) {
        unsigned bits = float_bits(value.v), magnitude = bits & 0x7fffffffu, half;
        if (magnitude > 0x7f800000u)
            half = 0x7e00;  // NaN
        else if (magnitude >= 0x477ff000u)
            half = 0x7c00;  // from 65,520 on the nearest is infinity
        else if (magnitude < 0x38800000u)  // subnormal: 0.5's last place is 2**-24, so the sum rounds
            half = float_bits((real<float>(bits_float(magnitude)) + real<float>(0.5f)).v) - 0x3f000000u;
        else
            half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
        return (raw)(half | (bits >> 16 & 0x8000u));
    }
};

template <>
struct storage<bf16> {
    using raw = unsigned short;
    using type = float;
    __device__ static real<float> load(raw bits) { return real<float>(bits_float((unsigned)bits << 16)); }
    __device__ static raw store(real<float> value) {
        unsigned bits = float_bits(value.v);
        if (is_nan(value)) return 0x7fc0;
        return (raw)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
    }
};

template <class S>
using raw_of = typename storage<S>::raw;
template <class S>
using real_of = real<typename storage<S>::type>;

template <class S>
__device__ inline real_of<S> load(raw_of<S> value) {
    return storage<S>::load(value);
}

template <class S>
__device__ inline raw_of<S> store(real_of<S> value) {
    return storage<S>::store(value);
}

// max(0, x); a NaN stays one.
template <class T>
__device__ inline real<T> relu(real<T> x) {
    real<T> zero((T)0);
    return x > zero || is_nan(x) ? x : zero;
}

}  // namespace gpubn

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

}  // namespace gpubn

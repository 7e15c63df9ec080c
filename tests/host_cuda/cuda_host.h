// A stand-in for CUDA C++ on the host, enough to run gpubn's kernels where there is no GPU.
//
// A kernel becomes an ordinary function. The blocks of a grid run one after another, and the threads
// of a block are fibers of one host thread that switch only where they wait for each other: at a
// barrier, a shuffle or a vote. A launch is therefore deterministic, and it can run its blocks and
// threads in ascending or descending order: a kernel that forgets a barrier gives different results
// in the two.
//
// What it does not do: cooperative groups, textures, warp matrix instructions, fast-math intrinsics,
// __device__ variables. Those are compile errors, not wrong results.
// Dynamic shared memory is declared as `extern __shared__ type name[];`, which cupy_stand_in.py makes a
// pointer to what the launch brings.
// min and max are for integers only, since CUDA's and the host's floating ones differ in NaN and -0.
//
// The device code's inline PTX stands inside `#ifdef __CUDA_ARCH__`, which is not defined here.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp refuses to leave one stack for another
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static  // one block runs at a time; see poison_shared_memory
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __grid_constant__

// ---------------------------------------------------------------------------------------------
// Vector types, with the alignment that CUDA gives them

#define HOST_CUDA_VECTORS(T, NAME)                                                        \
    struct NAME##1 { T x; };                                                              \
    struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                    \
    struct NAME##3 { T x, y, z; };                                                        \
    struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) NAME##4 { T x, y, z, w; };    \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                            \
    inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                    \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HOST_CUDA_VECTORS(signed char, char)
HOST_CUDA_VECTORS(unsigned char, uchar)
HOST_CUDA_VECTORS(short, short)
HOST_CUDA_VECTORS(unsigned short, ushort)
HOST_CUDA_VECTORS(int, int)
HOST_CUDA_VECTORS(unsigned int, uint)
HOST_CUDA_VECTORS(long long, longlong)
HOST_CUDA_VECTORS(unsigned long long, ulonglong)
HOST_CUDA_VECTORS(float, float)
HOST_CUDA_VECTORS(double, double)
#undef HOST_CUDA_VECTORS

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The stand-in's own state stays out of .bss, which poison_shared_memory overwrites.
#ifdef __ELF__
#define HOST_CUDA_STATE static __attribute__((section(".data")))
#else
#define HOST_CUDA_STATE static
#endif
HOST_CUDA_STATE uint3 threadIdx = {0, 0, 0};
HOST_CUDA_STATE uint3 blockIdx = {0, 0, 0};
HOST_CUDA_STATE dim3 blockDim;
HOST_CUDA_STATE dim3 gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------
// Fibers: a stack each, and a switch from one to another

namespace host_cuda {

constexpr size_t STACK_BYTES = 128 << 10;

// The page below a stack: an overflow faults there, and corrupts nothing.
inline size_t guard_bytes() { return size_t(sysconf(_SC_PAGESIZE)); }

// Stacks that no library uses, each beginning with the address of the next. All libraries of a process
// share one list: it may map only so many stacks, and every library's kernels need up to 1,024.
HOST_CUDA_STATE char** spare_stacks = nullptr;  // set as soon as the library is loaded

inline char* new_stack() {
    if (*spare_stacks) {
        char* stack = *spare_stacks;
        memcpy(spare_stacks, stack, sizeof stack);
        return stack;
    }
    void* memory = mmap(nullptr, guard_bytes() + STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, guard_bytes(), PROT_NONE) != 0) {
        fprintf(stderr, "host_cuda: no memory for the stack of a thread\n");
        abort();
    }
    return static_cast<char*>(memory) + guard_bytes();
}

struct Fiber {
    ucontext_t entry;  // for its first run; later switches are jumps, without system calls
    jmp_buf context;
    bool started = true;
    char* stack = nullptr;
    Fiber* next_free = nullptr;

    Fiber() = default;  // for the scheduler, which has a stack
    explicit Fiber(void (*run)()) : started(false), stack(new_stack()) {
        getcontext(&entry);
        entry.uc_stack.ss_sp = stack;
        entry.uc_stack.ss_size = STACK_BYTES;
        entry.uc_link = nullptr;
        makecontext(&entry, run, 0);
    }
    __attribute__((noinline)) void switch_to(Fiber* other) {
        if (_setjmp(context) != 0) return;
        if (other->started) _longjmp(other->context, 1);
        other->started = true;
        setcontext(&other->entry);
    }
};

}  // namespace host_cuda

// ---------------------------------------------------------------------------------------------
// The scheduler

namespace host_cuda {

enum class State : unsigned char { fresh, ready, at_block_barrier, at_warp_operation, done };
enum class WarpOperation : unsigned char { sync, shuffle, ballot };

struct Thread {
    uint3 index;
    State state;
    WarpOperation operation;
    int line;           // of the barrier or shuffle at which it waits
    unsigned mask;      // the lanes with which it waits
    unsigned source;    // the lane whose value it asks for
    uint64_t value;     // what it brings, then what it gets
    Fiber* fiber;       // its stack, while it is suspended
};

constexpr unsigned MAX_THREADS = 1024;

struct Machine {
    Thread threads[MAX_THREADS];
    Thread* order[MAX_THREADS];  // in which they run
    unsigned thread_count;
    unsigned next, end;          // what is left, in order, of the warp that is running
    Thread* current;
    Fiber* running;              // the fiber of the current thread
    Fiber scheduler;
    Fiber* free_fibers;
    void (*call)(void* kernel, void** args);
    void* kernel;
    void** args;
    char* dynamic_shared;  // of a block, and behind it a stretch that it may not touch
    size_t dynamic_bytes;
    bool failed;
    char message[512];
};

HOST_CUDA_STATE Machine* machine = nullptr;

inline void compiler_barrier() { __asm__ volatile("" ::: "memory"); }

// The first message is kept: it is the cause, and later ones are its consequences.
__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    if (machine->failed) return;
    machine->failed = true;
    va_list values;
    va_start(values, format);
    vsnprintf(machine->message, sizeof machine->message, format, values);
    va_end(values);
}

inline void make_current(Thread* thread) {
    machine->current = thread;
    threadIdx = thread->index;
}

// Returns the warp's next thread that can run, or null; a fresh one is not yet taken.
inline Thread* next_thread() {
    for (; machine->next < machine->end && !machine->failed; ++machine->next) {
        Thread* thread = machine->order[machine->next];
        if (thread->state == State::fresh) return thread;
        if (thread->state == State::ready) {
            ++machine->next;
            return thread;
        }
    }
    return nullptr;
}

// A thread that never waits runs to its end here, and the next one follows it on the same stack.
// Only a thread that waits takes the fiber with it, and the scheduler goes on with another.
inline void run_fresh_threads() {
    for (;;) {
        while (machine->next < machine->end && !machine->failed &&
               machine->order[machine->next]->state == State::fresh) {
            make_current(machine->order[machine->next++]);
            machine->call(machine->kernel, machine->args);
            machine->current->state = State::done;
        }
        Fiber* self = machine->running;
        self->next_free = machine->free_fibers;
        machine->free_fibers = self;
        self->switch_to(&machine->scheduler);
    }
}

inline Fiber* take_fiber() {
    Fiber* fiber = machine->free_fibers;
    if (fiber) {
        machine->free_fibers = fiber->next_free;
        return fiber;
    }
    return new Fiber(run_fresh_threads);
}

inline void drop_fibers() {
    while (Fiber* fiber = machine->free_fibers) {
        machine->free_fibers = fiber->next_free;
        memcpy(fiber->stack, spare_stacks, sizeof fiber->stack);
        *spare_stacks = fiber->stack;
        delete fiber;
    }
}

// Called by a thread: sleeps until the scheduler has ended what the thread waits for.
inline void wait(State state, int line) {
    compiler_barrier();
    Thread* self = machine->current;
    Fiber* fiber = machine->running;
    self->state = state;
    self->line = line;
    self->fiber = fiber;
    Thread* next = next_thread();
    if (next && next->state == State::ready) {  // straight to it, past the scheduler
        make_current(next);
        machine->running = next->fiber;
        fiber->switch_to(next->fiber);
    } else {
        fiber->switch_to(&machine->scheduler);
    }
    compiler_barrier();
}

// Runs the threads of a warp that can run until each waits or has ended.
inline void run_warp(unsigned begin, unsigned end) {
    machine->next = begin;
    machine->end = end;
    while (Thread* thread = next_thread()) {
        if (thread->state == State::fresh) {
            machine->running = take_fiber();
        } else {
            make_current(thread);
            machine->running = thread->fiber;
        }
        machine->scheduler.switch_to(machine->running);
    }
}

// Ends the warp operations whose lanes have all come. As on a GPU, lanes that have left the kernel,
// or that the block does not have, are not waited for; what is read from one of them is garbage.
inline bool release_warp(Thread* lanes, unsigned count) {
    bool any = false;
    for (unsigned first = 0; first < count; ++first) {
        const Thread leader = lanes[first];
        if (leader.state != State::at_warp_operation) continue;
        unsigned here = 0, ballot = 0;
        bool complete = true;
        for (unsigned lane = 0; lane < count; ++lane) {
            const Thread& thread = lanes[lane];
            if (!(leader.mask >> lane & 1u) || thread.state == State::done) continue;
            complete &= thread.state == State::at_warp_operation && thread.mask == leader.mask &&
                        thread.operation == leader.operation && thread.line == leader.line;
            here |= 1u << lane;
            ballot |= unsigned(thread.value != 0) << lane;
        }
        if (!complete) continue;
        uint64_t brought[warpSize];
        for (unsigned lane = 0; lane < warpSize; ++lane)
            brought[lane] = here >> lane & 1u ? lanes[lane].value : ~uint64_t(0);
        for (unsigned lane = 0; lane < count; ++lane) {
            if (!(here >> lane & 1u)) continue;
            Thread& thread = lanes[lane];
            thread.value = leader.operation == WarpOperation::ballot ? ballot : brought[thread.source];
            thread.state = State::ready;
        }
        any = true;
    }
    return any;
}

// Ends the block's barrier if every thread has come to it; false when the block has ended or cannot.
inline bool release_block() {
    unsigned done = 0, at_barrier = 0;
    const Thread* stuck = nullptr;     // at a warp operation that nothing can end
    const Thread* waiting = nullptr;   // at the block's barrier
    const Thread* elsewhere = nullptr;
    for (unsigned i = 0; i < machine->thread_count; ++i) {
        const Thread* thread = &machine->threads[i];
        if (thread->state == State::done) ++done;
        if (thread->state == State::at_warp_operation && !stuck) stuck = thread;
        if (thread->state != State::at_block_barrier) continue;
        ++at_barrier;
        if (!waiting) waiting = thread;
        if (thread->line != waiting->line && !elsewhere) elsewhere = thread;
    }
    const unsigned count = machine->thread_count;
    if (done == count) return false;
    if (stuck)
        fail("deadlock: thread (%u, %u, %u) waits in line %d for lanes of mask 0x%08x that do not come",
             stuck->index.x, stuck->index.y, stuck->index.z, stuck->line, stuck->mask);
    else if (at_barrier != count)
        fail("divergent barrier: %u of the block's %u threads wait at __syncthreads() in line %d, "
             "and %u have left the kernel", at_barrier, count, waiting->line, done);
    else if (elsewhere)
        fail("divergent barrier: some threads of the block wait at __syncthreads() in line %d, "
             "others in line %d", waiting->line, elsewhere->line);
    if (machine->failed) return false;
    for (unsigned i = 0; i < count; ++i) machine->threads[i].state = State::ready;
    return true;
}

// A block finds garbage in its shared memory: NaN as floating point, -1 as an integer. Every shared
// array is a zero-initialised static, so they are all in .bss, and nothing else that matters is.
#ifdef __ELF__
extern "C" char __bss_start[] __attribute__((visibility("hidden")));
extern "C" char _end[] __attribute__((visibility("hidden")));
inline void poison_shared_memory() {
    compiler_barrier();
    memset(__bss_start, 0xff, size_t(_end - __bss_start));
    compiler_barrier();
}
#else
inline void poison_shared_memory() {}
#endif

constexpr size_t BEHIND = 256;

template <class T>
T* dynamic_shared() { return reinterpret_cast<T*>(machine->dynamic_shared); }

inline void poison_dynamic_shared() {
    memset(machine->dynamic_shared, 0xff, machine->dynamic_bytes + BEHIND);
}

inline void check_dynamic_shared() {
    for (size_t i = 0; i < BEHIND; ++i)
        if (machine->dynamic_shared[machine->dynamic_bytes + i] != char(0xff))
            fail("a thread wrote beyond the launch's %zu bytes of shared memory", machine->dynamic_bytes);
}

inline void run_block(bool descending) {
    poison_shared_memory();
    poison_dynamic_shared();
    const unsigned count = machine->thread_count;
    for (unsigned i = 0; i < count; ++i) {
        Thread* thread = &machine->threads[i];
        thread->index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        thread->state = State::fresh;
        machine->order[descending ? count - 1 - i : i] = thread;
    }
    const unsigned warps = (count + warpSize - 1) / warpSize;
    do {
        for (unsigned w = 0; w < warps; ++w) {
            const unsigned begin = (descending ? warps - 1 - w : w) * warpSize;
            const unsigned lanes = count - begin < warpSize ? count - begin : warpSize;
            const unsigned first = descending ? count - begin - lanes : begin;
            do {
                run_warp(first, first + lanes);
                if (machine->failed) return;
            } while (release_warp(machine->threads + begin, lanes));
        }
    } while (release_block());
    check_dynamic_shared();
}

template <class... P, size_t... I>
void call_kernel(void (*kernel)(P...), void** args, std::index_sequence<I...>) {
    kernel(*static_cast<P*>(args[I])...);
}

// Like cudaLaunchKernel. Returns a message that lasts until the next launch, or null when all is well.
template <class... P>
const char* launch(void (*kernel)(P...), const unsigned* grid, const unsigned* block, void** args,
                   size_t shared_bytes, bool descending) {
    if (!machine) machine = new Machine();
    // Aligned as on a GPU; a launch that failed leaves its own behind.
    machine->dynamic_shared = static_cast<char*>(aligned_alloc(256, (shared_bytes + 511) / 256 * 256));
    machine->dynamic_bytes = shared_bytes;
    gridDim = dim3(grid[0], grid[1], grid[2]);
    blockDim = dim3(block[0], block[1], block[2]);
    machine->thread_count = block[0] * block[1] * block[2];
    machine->kernel = reinterpret_cast<void*>(kernel);
    machine->args = args;
    machine->call = [](void* function, void** values) {
        call_kernel(reinterpret_cast<void (*)(P...)>(function), values,
                    std::index_sequence_for<P...>());
    };
    machine->failed = false;
    const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    for (uint64_t k = 0; k < blocks; ++k) {
        const uint64_t b = descending ? blocks - 1 - k : k;
        blockIdx = {unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]),
                    unsigned(b / grid[0] / grid[1])};
        run_block(descending);
        if (machine->failed) {
            // The threads left suspended are forgotten, with their stacks.
            const size_t used = strlen(machine->message);
            snprintf(machine->message + used, sizeof machine->message - used, " (block (%u, %u, %u))",
                     blockIdx.x, blockIdx.y, blockIdx.z);
            machine->free_fibers = nullptr;
            return machine->message;
        }
    }
    drop_fibers();
    free(machine->dynamic_shared);
    return nullptr;
}

// Writes the kernel's parameters as NumPy writes dtypes, pointers with a star: "*f4 *u1 i8 f4".
template <class T>
void describe(char*& out, const char* end) {
    using Plain = std::remove_cv_t<std::remove_pointer_t<T>>;
    char kind = 'V';
    size_t size = 0;
    if constexpr (!std::is_void_v<Plain>) size = sizeof(Plain);
    if (std::is_same_v<Plain, bool>) kind = 'b';
    else if (std::is_floating_point_v<Plain>) kind = 'f';
    else if (std::is_integral_v<Plain>) kind = std::is_signed_v<Plain> ? 'i' : 'u';
    out += snprintf(out, end - out, "%s%c%zu ", std::is_pointer_v<T> ? "*" : "", kind, size);
}

template <class... P>
void describe_kernel(void (*)(P...), char* out, size_t bytes) {
    const char* end = out + bytes;
    *out = 0;
    (describe<P>(out, end), ...);
}

// Every thread calls it with what it brings; the result is what the operation gives it.
template <class T>
T warp_operation(WarpOperation operation, unsigned mask, T value, unsigned source, int line) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
    Thread* self = machine->current;
    const unsigned lane = unsigned(self - machine->threads) % warpSize;
    if (!(mask >> lane & 1u))
        fail("lane %u is not in its own mask 0x%08x in line %d", lane, mask, line);
    self->operation = operation;
    self->mask = mask;
    self->source = source;
    self->value = 0;
    memcpy(&self->value, &value, sizeof(T));
    wait(State::at_warp_operation, line);
    memcpy(&value, &self->value, sizeof(T));
    return value;
}

inline unsigned lane() { return unsigned(machine->current - machine->threads) % warpSize; }

}  // namespace host_cuda

// ---------------------------------------------------------------------------------------------
// Barriers, shuffles and votes. `line` is filled in by the compiler and shows in error messages.

inline void __syncthreads(int line = __builtin_LINE()) {
    host_cuda::wait(host_cuda::State::at_block_barrier, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    host_cuda::warp_operation(host_cuda::WarpOperation::sync, mask, 0, 0, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              int line = __builtin_LINE()) {
    const unsigned segment = host_cuda::lane() & ~unsigned(width - 1);
    return host_cuda::warp_operation(host_cuda::WarpOperation::shuffle, mask, value,
                                     segment | (unsigned(source) & unsigned(width - 1)), line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  int line = __builtin_LINE()) {
    const unsigned lane = host_cuda::lane(), last = lane | unsigned(width - 1);
    const unsigned source = lane ^ unsigned(lane_mask);
    return host_cuda::warp_operation(host_cuda::WarpOperation::shuffle, mask, value,
                                     source <= last ? source : lane, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   int line = __builtin_LINE()) {
    const unsigned lane = host_cuda::lane(), last = lane | unsigned(width - 1);
    return host_cuda::warp_operation(host_cuda::WarpOperation::shuffle, mask, value,
                                     lane + delta <= last ? lane + delta : lane, line);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 int line = __builtin_LINE()) {
    const unsigned lane = host_cuda::lane(), first = lane & ~unsigned(width - 1);
    return host_cuda::warp_operation(host_cuda::WarpOperation::shuffle, mask, value,
                                     lane >= first + delta ? lane - delta : lane, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return host_cuda::warp_operation(host_cuda::WarpOperation::ballot, mask,
                                     unsigned(predicate != 0), 0, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return __ballot_sync(mask, !predicate, line) == 0;
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// ---------------------------------------------------------------------------------------------
// Atomics: fibers do not interrupt each other

template <class T>
T atomicAdd(T* address, T value) { const T old = *address; *address = old + value; return old; }
template <class T>
T atomicExch(T* address, T value) { const T old = *address; *address = value; return old; }
template <class T>
T atomicMax(T* address, T value) { const T old = *address; *address = old < value ? value : old; return old; }
template <class T>
T atomicMin(T* address, T value) { const T old = *address; *address = value < old ? value : old; return old; }
template <class T>
T atomicCAS(T* address, T compare, T value) {
    const T old = *address;
    if (old == compare) *address = value;
    return old;
}

// ---------------------------------------------------------------------------------------------
// Arithmetic and bits

namespace host_cuda {
template <class To, class From>
To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &value, sizeof to);
    return to;
}
}  // namespace host_cuda

inline unsigned __float_as_uint(float x) { return host_cuda::bits<unsigned>(x); }
inline int __float_as_int(float x) { return host_cuda::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return host_cuda::bits<float>(x); }
inline float __int_as_float(int x) { return host_cuda::bits<float>(x); }
inline long long __double_as_longlong(double x) { return host_cuda::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return host_cuda::bits<double>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline double __ll2double_rn(long long x) { return double(x); }
inline float __double2float_rn(double x) { return float(x); }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
    return reversed;
}
template <class T>
T __ldg(const T* address) { return *address; }

template <class T>
std::enable_if_t<std::is_integral_v<T>, T> min(T a, T b) { return b < a ? b : a; }
template <class T>
std::enable_if_t<std::is_integral_v<T>, T> max(T a, T b) { return a < b ? b : a; }

// ---------------------------------------------------------------------------------------------
// What CuPy puts around the text of an ElementwiseKernel

namespace host_cuda {

// CuPy's float16: it widens to float for every operation and rounds where it is stored.
struct float16 {
    uint16_t data = 0;
    float16() = default;
    float16(float value) {
        const uint32_t x = bits<uint32_t>(value), magnitude = x & 0x7fffffffu;
        uint32_t half;
        if (magnitude > 0x7f800000u) half = 0x7fff;         // NaN
        else if (magnitude >= 0x477ff000u) half = 0x7c00;   // 65520 and more rounds to infinity
        else if (magnitude < 0x38800000u)                   // subnormal: the adder rounds to 2**-24
            half = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
        else half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
        data = uint16_t(half | (x >> 16 & 0x8000u));
    }
    operator float() const {
        const uint32_t sign = uint32_t(data & 0x8000u) << 16, magnitude = data & 0x7fffu;
        if (magnitude >= 0x7c00u) return bits<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
        if (magnitude >= 0x400u) return bits<float>(sign | ((magnitude << 13) + 0x38000000u));
        const float tiny = float(magnitude) * 5.9604644775390625e-08f;  // 2**-24, exact
        return sign ? -tiny : tiny;
    }
};

// An array argument as Python passes it; strides are in bytes, and 0 where the array is broadcast.
struct ArrayView {
    char* data;
    long long ndim;
    const long long* shape;
    const long long* strides;
};

template <class T>
class CArray {
    ArrayView view;
    T* element(ptrdiff_t index) const {
        char* address = view.data;
        for (long long axis = view.ndim - 1; axis > 0; --axis) {
            address += index % view.shape[axis] * view.strides[axis];
            index /= view.shape[axis];
        }
        return reinterpret_cast<T*>(view.ndim ? address + index * view.strides[0] : address);
    }

public:
    explicit CArray(const ArrayView& v) : view(v) {}
    T& operator[](ptrdiff_t index) { return *element(index); }
    const T& operator[](ptrdiff_t index) const { return *element(index); }
    const long long* shape() const { return view.shape; }
    const long long* strides() const { return view.strides; }
    ptrdiff_t size() const {
        ptrdiff_t count = 1;
        for (long long axis = 0; axis < view.ndim; ++axis) count *= view.shape[axis];
        return count;
    }
};

struct CIndexer {
    ptrdiff_t count;
    ptrdiff_t size() const { return count; }
};

}  // namespace host_cuda

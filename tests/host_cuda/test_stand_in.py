"""The stand-in itself: what it runs, what it refuses, and that NVRTC takes the same text."""

import sys

import numpy as np
import pytest

from host_cuda import cupy_stand_in, nvrtc

needs_compiler = pytest.mark.skipif(
    cupy_stand_in.compiler() is None, reason="no C++ compiler is found: set CXX"
)
needs_nvrtc = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

REDUCTION = r"""
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int offset = 16; offset > 0; offset /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

template <class T>
__global__ void __launch_bounds__(256) block_sums(const T* __restrict__ x, T* sums, long long n) {
    __shared__ T partial[8];
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    T value = warp_sum(i < n ? x[i] : T(0));
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
#ifndef NO_BARRIER
    __syncthreads();
#endif
    if (threadIdx.x < 32) {
        value = warp_sum(threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : T(0));
        if (threadIdx.x == 0) sums[blockIdx.x] = value;
    }
}
"""
DTYPES = {"float": np.float32, "double": np.float64, "int": np.int32, "unsigned": np.uint32}


@pytest.fixture
def cupy():
    with cupy_stand_in.install() as module:
        yield module


@pytest.fixture
def copies():
    """Return a function that counts the copies to the host since the test began."""
    start = cupy_stand_in.device_to_host_copies
    return lambda: cupy_stand_in.device_to_host_copies - start


def kernel(cupy, code, name="kernel", options=()):
    return cupy.RawModule(code=code, options=options).get_function(name)


def extern(body, params="float* x"):
    return f'extern "C" __global__ void kernel({params}) {{\n{body}\n}}'


def block_sums(cupy, ctype="float", options=(), n=1000):
    """Return the kernel's sums and NumPy's; small integers, so that both are exact."""
    module = cupy.RawModule(
        code=REDUCTION,
        options=options,
        name_expressions=[f"block_sums<{c}>" for c in DTYPES],
    )
    x = np.random.default_rng(1).integers(-8, 9, n).astype(DTYPES[ctype])
    blocks = -(-n // 256)
    sums = cupy.empty(blocks, x.dtype)
    launch = module.get_function(f"block_sums<{ctype}>")
    launch((blocks, 1, 1), (256, 1, 1), (cupy.asarray(x), sums, np.int64(n)))
    padded = np.concatenate([x, np.zeros(blocks * 256 - n, x.dtype)])
    return sums.get(), padded.reshape(blocks, 256).sum(1, dtype=x.dtype)


# ---------------------------------------------------------------------------------------------
# Raw kernels


@needs_compiler
@pytest.mark.parametrize("order", ["ascending", "reversed"])
@pytest.mark.parametrize("ctype", DTYPES)
def test_reduction_with_shuffles_and_shared_memory(cupy, monkeypatch, ctype, order):
    monkeypatch.setattr(cupy_stand_in, "thread_order", order)
    np.testing.assert_array_equal(*block_sums(cupy, ctype))


@needs_compiler
def test_missing_barrier_shows(cupy, monkeypatch):
    ascending, expected = block_sums(cupy, options=("-DNO_BARRIER",))
    monkeypatch.setattr(cupy_stand_in, "thread_order", "reversed")
    descending, _ = block_sums(cupy, options=("-DNO_BARRIER",))
    assert np.isnan(ascending).all()  # the first warp read shared memory that none had written
    np.testing.assert_array_equal(descending, expected)


@needs_compiler
def test_blocks_start_with_garbage_in_shared_memory(cupy):
    run = kernel(
        cupy,
        extern("__shared__ float s; if (x[0] > 0) s = 1; x[1 + blockIdx.x] = s;"),
    )
    x = cupy.asarray(np.zeros(4, np.float32))
    run((3,), (1,), (x,))
    assert np.isnan(x.get()[1:]).all()


@needs_compiler
def test_shared_memory_of_a_size_that_the_launch_says(cupy):
    body = """
    extern __shared__ uint4 memory[];
    float* y = reinterpret_cast<float*>(memory);
    if (x[0] == 0) y[threadIdx.x] = threadIdx.x;
    __syncthreads();
    x[1 + blockIdx.x * blockDim.x + threadIdx.x] = y[blockDim.x - 1 - threadIdx.x];
    """
    run = kernel(cupy, extern(body))
    x = cupy.zeros(65, np.float32)
    run((2,), (32,), (x,), shared_mem=128)
    np.testing.assert_array_equal(x.get()[1:], np.tile(np.arange(32)[::-1], 2))
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="beyond the launch's 124 bytes"):
        run((1,), (32,), (cupy.zeros(65, np.float32),), shared_mem=124)
    x = cupy.ones(65, np.float32)
    run((2,), (32,), (x,), shared_mem=128)
    assert np.isnan(x.get()[1:]).all()  # garbage at first
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="max_dynamic_shared_size_bytes"):
        run((1,), (32,), (x,), shared_mem=50_000)
    run.max_dynamic_shared_size_bytes = 50_000
    run((1,), (32,), (x,), shared_mem=50_000)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="300000 bytes"):
        run.max_dynamic_shared_size_bytes = 300_000


@needs_compiler
@pytest.mark.parametrize("order", ["ascending", "reversed"])
def test_indices(cupy, monkeypatch, order):
    monkeypatch.setattr(cupy_stand_in, "thread_order", order)
    body = """
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    __syncthreads();  // the indices are this thread's again after it
    const int thread_after = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int count = blockDim.x * blockDim.y * blockDim.z;
    x[block * count + thread] = block * count + thread_after;
    """
    x = cupy.empty(24 * 105, np.int32)
    kernel(cupy, extern(body, "int* x"))((2, 3, 4), (3, 5, 7), (x,))
    np.testing.assert_array_equal(x.get(), np.arange(24 * 105))


@needs_compiler
@pytest.mark.parametrize(("order", "step"), [("ascending", 1), ("reversed", -1)])
def test_order_of_blocks_threads_and_elements(cupy, monkeypatch, order, step):
    monkeypatch.setattr(cupy_stand_in, "thread_order", order)
    body = "x[1 + blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(&x[0], 1);"
    x = cupy.zeros(1 + 3 * 45, np.int32)
    kernel(cupy, extern(body, "int* x"))((3,), (45,), (x,))  # the last warps are not full
    np.testing.assert_array_equal(x[1:].get(), np.arange(3 * 45)[::step])
    take = cupy.ElementwiseKernel("", "T y, raw T next", "y = next[0]++", "take")
    y, following = cupy.empty(9, np.int32), cupy.zeros(1, np.int32)
    take(y, following)
    np.testing.assert_array_equal(y.get(), np.arange(9)[::step])
    monkeypatch.setattr(cupy_stand_in, "thread_order", "random")
    with pytest.raises(ValueError, match="thread_order is 'random'"):
        take(y, following)


@needs_compiler
@pytest.mark.parametrize("order", ["ascending", "reversed"])
def test_shuffles_and_votes_follow_cuda(cupy, monkeypatch, order):
    monkeypatch.setattr(cupy_stand_in, "thread_order", order)
    body = """
    const int lane = threadIdx.x;
    int* out = x + 8 * lane;
    out[0] = __shfl_sync(0xffffffffu, 100 + lane, 5);
    out[1] = __shfl_sync(0xffffffffu, 100 + lane, 1, 8);
    out[2] = __shfl_xor_sync(0xffffffffu, 100 + lane, 3);
    out[3] = __shfl_down_sync(0xffffffffu, 100 + lane, 2, 16);
    out[4] = __shfl_up_sync(0xffffffffu, 100 + lane, 2);
    out[5] = int(__ballot_sync(0xffffffffu, lane % 4 == 0));
    out[6] = __any_sync(0xffffffffu, lane == 9);
    if (lane % 2) out[7] = __shfl_xor_sync(0xaaaaaaaau, lane, 2);  // half a warp
    else out[7] = __shfl_xor_sync(0x55555555u, lane, 4);
    """
    x = cupy.empty((32, 8), np.int32)
    kernel(cupy, extern(body, "int* x"))((1,), (32,), (x,))
    lane = np.arange(32)
    expected = [
        np.full(32, 105),
        100 + lane // 8 * 8 + 1,
        100 + (lane ^ 3),
        100 + np.where(lane % 16 < 14, lane + 2, lane),
        100 + np.where(lane >= 2, lane - 2, lane),
        np.full(32, 0x11111111),
        np.ones(32),
        np.where(lane % 2, lane ^ 2, lane ^ 4),
    ]
    np.testing.assert_array_equal(x.get(), np.stack(expected, 1))


@needs_compiler
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 40) __syncthreads();", "40 of the block's 64 threads wait .* line 2"),
        (
            "if (threadIdx.x < 40) __syncthreads();\nelse __syncthreads();",
            "line 2, others in line 3",
        ),
        ("if (threadIdx.x < 9) __syncwarp(); else __syncthreads();", "deadlock: .* 0xffffffff"),
        ("__syncwarp(threadIdx.x ? ~0u : 3u);", "deadlock: .* line 2 .* mask 0x00000003"),
        ("if (threadIdx.x == 3) x[0] = __shfl_sync(1u, x[0], 0);", "lane 3 is not in its own mask"),
    ],
)
def test_divergence_is_an_error(cupy, body, message):
    run = kernel(cupy, extern(body))
    x = cupy.zeros(64, np.float32)
    for _ in range(2):  # an error leaves nothing behind
        with pytest.raises(cupy.cuda.driver.CUDADriverError, match=message):
            run((1,), (64,), (x,))
    if "else" in body:
        run((1,), (9,), (x,))  # here all threads take the same way


@needs_compiler
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (lambda cp: (cp.zeros(4), np.float32(1)), TypeError, r"argument 0 .* float64 .* \*f4"),
        (lambda cp: (cp.zeros(4, np.float32), 1), TypeError, "argument 1 .* int64 .* f4"),
        (lambda cp: (cp.zeros(4, np.float32), 1.0), TypeError, "argument 1 .* float64 .* f4"),
        (lambda cp: (cp.zeros(4, np.float32),), TypeError, "takes 2 arguments"),
        (lambda cp: (np.zeros(4, np.float32), np.float32(1)), TypeError, "Unsupported type"),
        (lambda cp: (np.float32(1), np.float32(1)), TypeError, r"argument 0 .* \*f4"),
        (lambda cp: (cp.zeros(8, np.float32)[::2], np.float32(1)), ValueError, "C-contiguous"),
    ],
)
def test_wrong_arguments(cupy, args, error, message):
    run = kernel(cupy, extern("x[0] = a;", "float* x, float a"))
    with pytest.raises(error, match=message):
        run((1,), (1,), args(cupy))


@needs_compiler
@pytest.mark.parametrize(
    ("grid", "block"),
    [((0,), (1,)), ((1, 65536), (1,)), ((1, 1, 65536), (1,)), ((1,), (1025,)), ((1,), (32, 33)),
     ((1,), (0,)), ((1,), (1, 1, 65))],
)  # fmt: skip
def test_launches_that_a_gpu_refuses(cupy, grid, block):
    run = kernel(cupy, extern("x[0] = 1;"))
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="INVALID_VALUE"):
        run(grid, block, (cupy.zeros(1, np.float32),))


@needs_compiler
def test_compile_errors_name_the_kernel(cupy):
    with pytest.raises(cupy.cuda.compiler.CompileException, match=r"kernel: (.|\n)*module:2"):
        kernel(cupy, extern("return undeclared;"))
    with pytest.raises(cupy.cuda.compiler.CompileException):
        kernel(cupy, extern("x[0] = fminf(x[0], min(x[1], 2.0f));"))
    with pytest.raises(NotImplementedError, match="__device__ int counter"):
        kernel(cupy, "__device__ int counter = 0;" + extern(""))


@needs_compiler
def test_vector_loads_null_pointers_and_raw_kernels(cupy):
    code = extern(
        "float4 v = reinterpret_cast<const float4*>(x)[threadIdx.x];\n"
        "y[threadIdx.x] = (v.x + v.y) + (v.z + v.w) + (bias ? bias[0] : 0.0f);",
        "const float* x, const float* bias, float* y",
    )
    x, y = np.arange(32, dtype=np.float32), cupy.empty(8, np.float32)
    cupy.RawKernel(code, "kernel")((1,), (8,), (cupy.asarray(x), np.uint64(0), y))
    with pytest.raises(TypeError, match="argument 1 is None"):
        cupy.RawKernel(code, "kernel")((1,), (8,), (cupy.asarray(x), None, y))
    np.testing.assert_array_equal(y.get(), x.reshape(8, 4).sum(1))


@needs_compiler
def test_a_million_threads(cupy):
    """Threads without a barrier cost a function call: a second is far above what they take."""
    run = kernel(cupy, extern("x[blockIdx.x * blockDim.x + threadIdx.x] += 1;"))
    x = cupy.zeros(1 << 20, np.float32)
    run((4096,), (256,), (x,))
    assert (x == 1).all()


# ---------------------------------------------------------------------------------------------
# Elementwise kernels


@needs_compiler
@pytest.mark.parametrize("order", ["ascending", "reversed"])
def test_elementwise_broadcasts(cupy, monkeypatch, order):
    monkeypatch.setattr(cupy_stand_in, "thread_order", order)
    scale = cupy.ElementwiseKernel(
        "T x, T gamma, float32 shift, uint8 keep, int64 n, raw T table",
        "T y",
        "y = keep ? helper(x) * gamma + (T)shift + table[i % n] : (T)_ind.size()",
        "scale",
        preamble="__device__ inline T helper(T v) { return v + 1; }",
    )
    x = np.arange(12, dtype=np.float64).reshape(3, 4)
    gamma = np.array([[2.0], [3.0], [5.0]])
    keep = np.array([1, 1, 0, 1], np.uint8)
    table = np.array([100.0, 200.0])[::-1]
    on_device = [cupy.asarray(a) for a in (x.T, gamma, keep, table)]
    y = scale(on_device[0].T, on_device[1], 0.5, on_device[2], 2, on_device[3])
    raw = np.resize(table, 12).reshape(3, 4)
    np.testing.assert_array_equal(y.get(), np.where(keep, (x + 1) * gamma + 0.5 + raw, 12))


@needs_compiler
def test_elementwise_outputs_and_sizes(cupy):
    two = cupy.ElementwiseKernel("T x", "T y, float32 z", "y = x + 1; z = x * 2", "two")
    x = cupy.arange(6, dtype=np.int32)
    y, z = two(x)
    assert (y.dtype, z.dtype) == (np.int32, np.float32)
    assert (y == x + 1).all()
    assert (z == x * 2).all()
    given = cupy.empty(6, np.int32), cupy.empty(6, np.float32)
    assert all(a is b for a, b in zip(two(x, *given), given, strict=True))
    np.testing.assert_array_equal(given[0].get(), y.get())
    assert two(cupy.zeros((0, 3), np.int32))[0].shape == (0, 3)

    fill = cupy.ElementwiseKernel("T a", "raw T y", "y[_ind.size() - 1 - i] = a + i", "fill")
    y = cupy.empty(5, np.float32)
    assert fill(1.5, y, size=5) is y
    np.testing.assert_array_equal(y.get(), [5.5, 4.5, 3.5, 2.5, 1.5])


@needs_compiler
def test_elementwise_half_rounds_as_numpy(cupy):
    narrow = cupy.ElementwiseKernel("float32 x", "float16 y", "y = x", "narrow")
    widen = cupy.ElementwiseKernel("float16 x", "float32 y", "y = x", "widen")
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(widen(cupy.asarray(every)).get(), every.astype(np.float32))
    bits = np.random.default_rng(0).integers(0x32000000, 0x48000000, 100_000).astype(np.uint32)
    x = np.concatenate([bits.view(np.float32), every.astype(np.float32)])
    x = np.concatenate([x, -x])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(narrow(cupy.asarray(x)).get(), x.astype(np.float16))


@needs_compiler
def test_elementwise_refusals(cupy):
    add = cupy.ElementwiseKernel("T x, T y", "T z", "z = x + y", "add")
    x = cupy.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match=r"y: Unsupported type <class 'numpy.ndarray'>"):
        add(x, np.zeros((2, 3), np.float32))
    with pytest.raises(TypeError, match="y is float64, expected float32"):
        add(x, cupy.zeros((2, 3)))
    with pytest.raises(ValueError, match="Out shape is mismatched"):
        add(x, 1, cupy.zeros((1, 3), np.float32))
    with pytest.raises(TypeError, match="Wrong number of arguments"):
        add(x)
    with pytest.raises(ValueError, match="Loop size is undecided"):
        add(1, 2)
    const = cupy.ElementwiseKernel("T x", "T y", "x = 1; y = x", "const_")
    with pytest.raises(cupy.cuda.compiler.CompileException, match="const_"):
        const(x)


# ---------------------------------------------------------------------------------------------
# Arrays


def test_copies_are_counted(cupy, copies):
    x = cupy.asarray(np.arange(6.0).reshape(2, 3))
    y = (x * 2 + x.mean(axis=0)).sum()
    assert isinstance(y, cupy.ndarray)
    assert y.shape == ()
    x[0] = x[1, 2]
    x += 1
    assert copies() == 0
    reads = [float, int, bool, repr, cupy.asnumpy]
    reads += [lambda a: a.get(), lambda a: a.item(), lambda a: a.tolist(), lambda a: x[x > a]]
    reads += [lambda a: list(range(a.astype(np.int64)))]
    for count, read in enumerate(reads, start=1):
        read(y)
        assert copies() == count, read


def test_arrays_do_not_mix_with_numpy(cupy):
    host, x = np.ones(3), cupy.ones(3)
    assert not isinstance(x, np.ndarray)
    for mix in (
        lambda: x + host,
        lambda: host + x,
        lambda: np.concatenate([x, host]),
        lambda: cupy.maximum(x, host),
        lambda: x.dot(host),
        lambda: np.add(host, host, out=x),
        lambda: x.__setitem__(slice(None), host),
    ):
        with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy\.ndarray'>"):
            mix()
    for convert in (np.asarray, np.array, np.ascontiguousarray, lambda a: host.__iadd__(list(a))):
        with pytest.raises(TypeError, match="Implicit conversion"):
            convert(x)
    assert isinstance(x * np.float64(2) + 1, cupy.ndarray)
    assert isinstance(np.float64(2) * x, cupy.ndarray)


def test_array_functions_stay_on_the_device(cupy, copies):
    x = cupy.arange(6, dtype=np.float32).reshape(2, 3)
    for result in (
        x[0], x[0, 1], x.T, x @ x.T, cupy.matmul(x, x.T), cupy.sqrt(x), np.sqrt(x), cupy.sum(x),
        x.argmax(), cupy.where(x > 1, x, 0), cupy.isfinite(x).all(), cupy.concatenate([x, x]),
        cupy.zeros_like(x), cupy.full((2,), x[0, 0]), cupy.linalg.norm(x), x.astype(np.float64),
        cupy.empty(3), cupy.allclose(x, x), next(iter(x)),
    ):  # fmt: skip
        assert isinstance(result, cupy.ndarray)
    assert copies() == 0
    assert x[0, 1].shape == ()
    row = x[0]
    row[...] = 7
    assert (x[0] == 7).all()  # a view
    out = cupy.empty((2, 3), np.float32)
    assert cupy.add(x, 1, out=out) is out
    assert cupy.ascontiguousarray(x) is x
    assert np.isnan(cupy.empty_like(x).get()).all()
    assert cupy.get_array_module(x) is cupy
    assert cupy.get_array_module(np.ones(1)) is np
    assert x.shape == (2, 3)
    assert len(x) == 2
    host = np.zeros((2, 3), np.float32)
    out.set(host)
    uploaded = cupy.asarray(host)
    host[:] = 1
    assert not out.any()
    assert not uploaded.any()  # copies, not views


def pinned(cupy, count):
    memory = cupy.cuda.alloc_pinned_memory(8 * count)
    host = np.ndarray(count, np.float64, buffer=memory)
    assert np.isnan(host).all()
    assert len(memory) > 8 * count  # CuPy rounds up, too
    return host


def test_copies_on_a_stream_of_its_own_come_late(cupy):
    stream, event = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Event(disable_timing=True)
    host, there = pinned(cupy, 3), cupy.zeros(3)
    pending = cupy_stand_in.pending_copies()
    host[:] = 1
    there.set(host, stream)
    stream.record(event)
    assert not there.any()
    assert not event.done
    assert not stream.done
    assert cupy_stand_in.pending_copies() == pending + 1
    host[:] = 2  # too early: the copy has not been
    cupy.cuda.Stream.null.wait_event(event)
    assert there.tolist() == [2, 2, 2]
    assert event.done
    assert stream.done

    there.set(np.full(3, 3.0), stream)  # not pinned: read at once
    stream.synchronize()
    assert there.tolist() == [3, 3, 3]
    for wait in (
        event.synchronize,
        cupy.cuda.Device().synchronize,
        cupy.cuda.runtime.deviceSynchronize,
        cupy.cuda.Stream.null.synchronize,
    ):
        host += 10
        there.set(host, stream)
        event.record(stream)
        assert there[0] < host[0]
        wait()
        assert there[0] == host[0]


def test_events_say_how_far_a_stream_had_come(cupy):
    first, second = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    host, a, b = pinned(cupy, 1), cupy.zeros(1), cupy.zeros(1)
    host[:] = 7
    a.set(host, first)
    event = first.record()
    b.set(host, first)  # after it
    second.wait_event(event)
    assert not a.any()
    second.synchronize()
    assert (a.tolist(), b.tolist()) == ([7], [0])
    cupy.cuda.Event().synchronize()  # never recorded: nothing to wait for
    second.wait_event(cupy.cuda.Event())
    second.synchronize()
    assert b.tolist() == [0]
    first.synchronize()


def test_other_streams_copy_at_once(cupy):
    host, there = pinned(cupy, 2), cupy.zeros(2)
    for value, stream in enumerate((None, cupy.cuda.Stream.null, cupy.cuda.Stream()), 1):
        host[:] = value
        there.set(host, stream)
        assert there.tolist() == [value, value]
    with pytest.raises(RuntimeError, match="non-contiguous"):
        cupy.zeros((2, 2))[:, 0].set(host)
    with pytest.raises(NotImplementedError), cupy.cuda.Stream(non_blocking=True):
        pass


def test_copies_from_the_host_and_waits_are_counted(cupy):
    host, there = np.ones(2), cupy.zeros(2)
    start = cupy_stand_in.host_to_device_copies
    for count, copy in enumerate(
        (
            lambda: cupy.asarray(host),
            lambda: cupy.array([1, 2]),
            lambda: there.set(host),
            lambda: there.set(host, cupy.cuda.Stream(non_blocking=True)),
        ),
        1,
    ):
        copy()
        assert cupy_stand_in.host_to_device_copies - start == count
    cupy.asarray(there)
    cupy.array(there)
    assert cupy_stand_in.host_to_device_copies - start == 4
    start = cupy_stand_in.synchronisations
    stream = cupy.cuda.Stream(non_blocking=True)
    stream.synchronize()
    stream.record().synchronize()
    assert cupy_stand_in.synchronisations == start  # of one stream only
    cupy.cuda.Stream.null.synchronize()
    cupy.cuda.runtime.deviceSynchronize()
    cupy.cuda.Device().synchronize()
    assert cupy_stand_in.synchronisations == start + 3


def test_memory(cupy, monkeypatch):
    monkeypatch.setattr(cupy_stand_in, "free_memory", 5)
    assert cupy.cuda.runtime.memGetInfo() == cupy.cuda.Device().mem_info == (5, 8 << 30)
    pool = cupy.get_default_memory_pool()
    assert pool.free_bytes() + pool.used_bytes() == pool.total_bytes() > 0
    assert pool.get_limit() == 0


def test_devices(cupy):
    assert cupy.cuda.is_available()
    assert cupy.cuda.runtime.getDeviceCount() == 1
    assert cupy.cuda.runtime.getDeviceProperties(0)["name"] == b"host stand-in"
    with cupy.cuda.Device(0) as device:
        assert cupy.zeros(1).device == device
    cupy.cuda.Stream.null.synchronize()
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="invalid device ordinal"):
        cupy.cuda.Device(1)
    with pytest.raises(AttributeError, match=r"no cupy\.fuse"):
        cupy.fuse  # noqa: B018 - asking for it is what raises


def test_install_restores_what_was_there():
    names = ("cupy", "cupy.cuda")
    before = {name: sys.modules.get(name) for name in names}
    with cupy_stand_in.install() as module:
        import cupy
        from cupy.cuda import runtime

        assert cupy is module
        assert runtime.getDeviceCount() == 1
    assert {name: sys.modules.get(name) for name in names} == before


# ---------------------------------------------------------------------------------------------
# NVRTC


def samples():
    """Return recorded sources of each kind."""
    start = len(cupy_stand_in.sources)
    with cupy_stand_in.install() as cupy:
        block_sums(cupy)
        kernel(cupy, extern("x[threadIdx.x] *= 2;"))
        scale = cupy.ElementwiseKernel(
            "T x, raw T y, float32 s, uint8 keep",
            "T z, int64 k",
            "z = keep ? x * s + y[0] : T(0); k = i",
            "scale",
            preamble="// before",
        )
        for dtype in (np.float32, np.float64):
            scale(cupy.ones((2, 3), dtype), cupy.ones(1, dtype), 2, 1)
        rows = cupy.ones((3, 2), np.float32).T
        scale(rows, cupy.ones(1, np.float32), 2, cupy.ones(3, np.uint8))
    return cupy_stand_in.sources[start:]


@needs_compiler
@needs_nvrtc
def test_nvrtc_compiles_every_kind_for_every_architecture():
    supported, missing = nvrtc.supported_arches()
    assert not missing, f"this NVRTC does not compile for {missing}"
    assert supported == nvrtc.ARCHES
    recorded = samples()
    assert [len(source.instances) for source in recorded] == [4, 1, 3]
    for arch in supported:
        for source in recorded:
            for ptx, cubin in nvrtc.compile_source(source, arch):
                assert f".target sm_{arch.replace('.', '')}" in ptx
                assert ".entry" in ptx
                assert cubin.startswith(b"\x7fELF")


@needs_nvrtc
def test_nvrtc_flushes_subnormals_as_under_cupy():
    ptx, _ = nvrtc.compile_ptx(extern("x[0] *= x[1];"), "9.0")
    assert "mul.ftz.f32" in ptx


@needs_nvrtc
def test_nvrtc_errors_show_the_log():
    with pytest.raises(nvrtc.NVRTCError, match=r'module.cu\(2\)(.|\n)*"undeclared" is undefined'):
        nvrtc.compile_ptx(extern("x[0] = undeclared;"), "7.5")
    plain = cupy_stand_in.Source(
        "raw", "", (), "__global__ void kernel(float* x) {}", instances=["kernel"]
    )
    with pytest.raises(nvrtc.NVRTCError, match='not extern "C"'):
        nvrtc.compile_source(plain, "7.5")


@needs_compiler
@needs_nvrtc
def test_text_and_options_are_those_of_cupy():
    """Held against the installed CuPy's own generator, which is private and may move."""
    core = pytest.importorskip("cupy._core.core")
    private = pytest.importorskip("cupy._core._kernel")
    source = samples()[-1]
    real = core.ElementwiseKernel(
        source.in_params, source.out_params, source.operation, source.name, preamble=source.preamble
    )
    array, indexer, scalar = 1, 2, 3  # CuPy's numbers for the kinds of argument
    try:
        for instance in source.instances:
            infos = [
                private._ArgInfo(scalar, object, np.dtype(a.dtype).type, 0, True, True)
                if a.ndim is None
                else private._ArgInfo(
                    array, core.ndarray, np.dtype(a.dtype).type, a.ndim, a.contiguous, True
                )
                for a in instance.arguments
            ]
            infos.append(private._ArgInfo(indexer, object, None, instance.ndim, True, True))
            letters = private._TypeMap((("T", np.dtype(instance.arguments[0].dtype).type),))
            theirs = private._get_elementwise_kernel_code(
                tuple(infos), letters, real.params, source.operation, source.name, source.preamble
            )
            headers = "".join(f"#include <{header}>\n" for header in core._cupy_header_list)
            # A CArray of newer versions names one more number, zero by default.
            theirs = (headers + theirs).replace(", 1, 0>", ", 1>")
            assert nvrtc.elementwise_code(source, instance).split() == theirs.split()
        theirs = [
            option
            for option in core.assemble_cupy_compiler_options(("-Dx",))
            if not option.startswith("-I") or "cupy" in option
        ]
    except (AttributeError, TypeError) as error:
        pytest.skip(f"CuPy's private generator has changed: {error}")
    ours = nvrtc.cupy_options(("-Dx",), "7.5")
    assert [option for option in ours if option in theirs] == theirs


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_kernels_share_their_threads_stacks(cupy):
    """A process may map some 65,000 stretches of memory; a test run loads hundreds of kernels."""

    def maps():
        with open("/proc/self/maps") as lines:
            return sum(1 for _ in lines)

    counts = []
    for i in range(6):
        body = f"__shared__ float y[256]; y[threadIdx.x] = {i}; __syncthreads(); x[0] = y[9];"
        launch = kernel(cupy, extern(body))
        launch((1, 1, 1), (256, 1, 1), (cupy.empty(1, np.float32),))
        counts.append(maps())
    assert counts[-1] - counts[0] < 256  # a library's own few

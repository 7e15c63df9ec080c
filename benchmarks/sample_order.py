"""What one order of summing for every layout costs on a CPU: ``python -m benchmarks.sample_order``.

The moments of channels first, along the tree that channels last has too, beside those along a tree
that suits vectors and would differ between layouts: value i in lane i % 128 of its 1024, lanes
halved at the end. Times are of the process on one thread, the least of several; the share is that
of the difference in a whole forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from gpubn.kernels import for_array
from gpubn.kernels.compile_numba import OPTIONS
from gpubn.kernels.threads import set_num_threads
from gpubn.layers import batchnorm_forward

SAMPLES = 1024  # of a buffer of the other tree

# (N, C, S), where N * S is a whole number of buffers: the other tree has no rests.
SHAPES = ((32, 64, 112 * 112), (32, 256, 56 * 56), (64, 256, 28 * 28), (1024, 64, 7 * 7))


@numba.njit(**OPTIONS)
def _lane_moments(d: Any, work: Any) -> Any:
    real = d.dtype.type
    eighth, half = real(0.125), real(0.5)
    mean, var, next_mean, next_var = work[0], work[1], work[2], work[3]
    w = d.shape[0] // 8
    x0, x1, x2, x3 = d[:w], d[w : 2 * w], d[2 * w : 3 * w], d[3 * w : 4 * w]
    x4, x5, x6, x7 = d[4 * w : 5 * w], d[5 * w : 6 * w], d[6 * w : 7 * w], d[7 * w :]
    for j in range(w):
        d0, d1, d2, d3, d4, d5, d6, d7 = x0[j], x1[j], x2[j], x3[j], x4[j], x5[j], x6[j], x7[j]
        m = (((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7))) * eighth
        e0, e1, e2, e3 = d0 - m, d1 - m, d2 - m, d3 - m
        e4, e5, e6, e7 = d4 - m, d5 - m, d6 - m, d7 - m
        s0, s1, s2, s3 = e0 * eighth * e0, e1 * eighth * e1, e2 * eighth * e2, e3 * eighth * e3
        s4, s5, s6, s7 = e4 * eighth * e4, e5 * eighth * e5, e6 * eighth * e6, e7 * eighth * e7
        mean[j] = m
        var[j] = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    while w > 1:
        w //= 2
        a, b, c, e = mean[:w], mean[w : 2 * w], var[:w], var[w : 2 * w]
        for j in range(w):
            h = (a[j] - b[j]) * half
            next_mean[j] = (a[j] + b[j]) * half
            next_var[j] = (c[j] * half + e[j] * half) + h * h
        mean, var, next_mean, next_var = next_mean, next_var, mean, var
    return mean[0], var[0]


@numba.njit(**OPTIONS)
def _moments_by_lane(x: Any, shift: Any, means: Any, variances: Any) -> None:
    """Write the moments of x (N, C, S) less the shift; buffers are merged one after the other."""
    work, d = np.empty((4, SAMPLES // 8), x.dtype), np.empty(SAMPLES, x.dtype)
    samples = x.shape[2]
    for c in range(x.shape[1]):
        n, s = 0, 0
        for i in range(x.shape[0] * samples // SAMPLES):
            at = 0
            while at < SAMPLES:
                run = min(samples - s, SAMPLES - at)
                source, target = x[n, c, s : s + run], d[at : at + run]
                for j in range(run):
                    target[j] = source[j] - shift[c]
                at, s = at + run, s + run
                if s == samples:
                    n, s = n + 1, 0
            mean, var = _lane_moments(d, work)
            if i == 0:
                means[c], variances[c] = mean, var
            else:
                share, delta = 1 / (i + 1), mean - means[c]
                means[c] += delta * share
                variances[c] += (var - variances[c]) * share + delta * delta * share * (1 - share)


def least(run: Callable[[], Any], times: int = 15) -> float:
    run()
    seconds = []
    for _ in range(times):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure(n: int, c: int, s: int) -> tuple[float, float, float]:
    """Return seconds of the moments in either order, and of a forward pass."""
    x = np.random.default_rng(0).standard_normal((n, c, s)).astype(np.float32)
    shift, gamma = np.zeros(c, np.float32), np.ones(c, np.float32)
    kernels, other = for_array("batchnorm", x), np.empty((2, c), np.float32)
    one = kernels.moments(x[None], shift)
    ours = least(lambda: kernels.moments(x[None], shift))
    lanes = least(lambda: _moments_by_lane(x, shift, *other))
    np.testing.assert_allclose(one, other, atol=1e-4)
    return ours, lanes, least(lambda: batchnorm_forward(x, gamma, gamma, {"mode": "train"}))


def main() -> None:
    set_num_threads(1)
    print("shape, moments along the sample order and along lanes (ms), ratio, share of a forward")
    for shape in SHAPES:
        ours, lanes, forward = measure(*shape)
        ratio, share = ours / lanes, (ours - lanes) / forward
        print(f"{shape}  {ours * 1e3:.2f}  {lanes * 1e3:.2f}  {ratio:.2f}  {share:.0%}")


if __name__ == "__main__":
    main()

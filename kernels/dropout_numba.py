"""Inverted dropout of arrays of any shape, on the CPU. The same masks and bits as dropout_cuda."""

from typing import Any

import numpy as np

from gpubn.backend import Array
from gpubn.kernels.compile_numba import compiled
from gpubn.kernels.memory import empty
from gpubn.kernels.real_numba import narrow, stored, widen
from gpubn.kernels.statistics import accumulator
from gpubn.kernels.threads_numba import split

BLOCKS = 256  # blocks of four words that are drawn together


def apply(x: Array, p: float, seed: int, stream: int, step: int, out: Array | None = None) -> Array:
    """Return ``x / p`` where the mask of ``(seed, stream, step)`` keeps an element, else 0.

    To ``out`` if given. The same call on ``dout`` is the backward pass.
    """
    out = empty(x.shape, x.dtype) if out is None else out
    threshold = np.uint64(round(p * 2**32))
    key = (np.uint64(seed), np.uint32(stream), np.uint32(step))
    flat = (array.reshape(-1) for array in stored(x, out))
    arguments = (*flat, accumulator(x).type(1 / p), threshold, *key)
    split(_apply, arguments, -(-x.size // 4), x.size)
    return out


@compiled
def _words(first: int, seed: np.uint64, stream: np.uint32, step: np.uint32, words: Any) -> None:
    """Fill ``words (4, B)`` with those of blocks ``first`` to ``first + B``.

    Philox4x32-10: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3",
    SC 2011. Words are kept in 64 bits, where their products fit.
    """
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    multiplier0, multiplier1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    key0, key1 = seed & low, seed >> half
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    for j in range(w0.shape[0]):
        block = np.uint64(first + j)
        w0[j], w1[j], w2[j], w3[j] = block & low, block >> half, np.uint64(stream), np.uint64(step)
    for _ in range(10):  # rounds outside, blocks inside: only an innermost loop is vectorised
        for j in range(w0.shape[0]):
            p0, p1 = multiplier0 * w0[j], multiplier1 * w2[j]
            w0[j], w1[j] = (p1 >> half) ^ w1[j] ^ key0, p1 & low
            w2[j], w3[j] = (p0 >> half) ^ w3[j] ^ key1, p0 & low
        key0 = (key0 + np.uint64(0x9E3779B9)) & low
        key1 = (key1 + np.uint64(0xBB67AE85)) & low


@compiled
def _apply(
    x: Any,
    out: Any,
    scale: Any,
    threshold: np.uint64,
    seed: np.uint64,
    stream: np.uint32,
    step: np.uint32,
    first: int,
    last: int,
) -> None:
    """Go through blocks ``first`` to ``last``, of four elements each and the last one of fewer."""
    zero = x.dtype.type(0)
    words = np.empty((4, BLOCKS), np.uint64)
    w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
    for block in range(first, last, BLOCKS):
        _words(block, seed, stream, step, words)
        a, b = 4 * block, min(4 * min(block + BLOCKS, last), x.shape[0])
        xb, y = x[a:b], out[a:b]
        full = (b - a) // 4
        for j in range(full):
            i = 4 * j
            y[i] = narrow(widen(xb[i]) * scale, y) if w0[j] < threshold else zero
            y[i + 1] = narrow(widen(xb[i + 1]) * scale, y) if w1[j] < threshold else zero
            y[i + 2] = narrow(widen(xb[i + 2]) * scale, y) if w2[j] < threshold else zero
            y[i + 3] = narrow(widen(xb[i + 3]) * scale, y) if w3[j] < threshold else zero
        for k in range(b - a - 4 * full):
            i = 4 * full + k
            y[i] = narrow(widen(xb[i]) * scale, y) if words[k, full] < threshold else zero

"""A function of one's own, for NumPy and CuPy, and its tests: the README's example."""

import math

import numpy as np

from gpubn.backend import namespace
from gpubn.testing import assert_parity, check_gradients

SCALE, CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu_forward(x):
    t = namespace(x).tanh(SCALE * (x + CUBIC * x * x * x))
    return 0.5 * x * (1 + t), (x, t)


def gelu_backward(dout, cache):
    x, t = cache
    slope = SCALE * (1 + 3 * CUBIC * x * x)
    return 0.5 * dout * ((1 + t) + x * (1 - t * t) * slope)


def test_far_out(xp):  # numpy, and cupy where there is a GPU
    out, _ = gelu_forward(xp.asarray([-20.0, 0.0, 20.0]))
    assert out.tolist() == [0.0, 0.0, 20.0]


def test_gradient(xp):
    x = xp.linspace(-3, 3, 12).reshape(3, 4)
    check_gradients(gelu_forward, gelu_backward, x)


def test_parity():
    x = np.random.default_rng(0).normal(size=(64, 100)).astype(np.float32)
    # tanh is the platform's, so the bits may differ: by up to four units of 2**-24 where it is
    # near 1, times x / 2.
    assert_parity(gelu_forward, x, atol=1e-6)

"""Layers without parameters."""

from __future__ import annotations

import math
import secrets
from typing import Any, NamedTuple

from gpubn import layers
from gpubn.backend import Array, namespace, scope_of
from gpubn.layers import _check
from gpubn.nn.layer import Layer, Shape


class ReLU(Layer):
    """``max(0, x)``."""

    def _forward(self, x: Array) -> tuple[Array, Any]:
        return layers.relu_forward(x)

    def _backward(self, dout: Array, cache: Any) -> Array:
        return layers.relu_backward(dout, cache)


class Dropout(Layer):
    """Drop values at random in training, and scale what is kept by ``1 / p``.

    In evaluation the output is x itself, not a copy.

    Parameters
    ----------
    p : float
        The probability of keeping a value, above 0 and at most 1.
    seed : int, optional
        Same seed, same masks, on every device. Without one it is drawn.
    stream : int
        Tells dropouts with one seed apart: give each in a network another.

    Attributes
    ----------
    seed : int
        As given, or drawn.
    step : int
        Which mask the next forward in training uses. It counts up with each, from 0. It is no part
        of the state: to go on with saved training, set it.
    """

    def __init__(self, p: float, seed: int | None = None, stream: int = 0) -> None:
        super().__init__()
        self.p = _check.number("p", p)
        if not 2**-32 <= self.p <= 1:
            raise ValueError(
                f"p is {p!r}, expected a probability of keeping of at least 2**-32 and at most 1"
            )
        self._given = seed is not None
        self.seed = secrets.randbits(64) if seed is None else _check.counter("seed", seed, 64)
        self.stream = _check.counter("stream", stream, 32)
        self.step = 0

    def _forward(self, x: Array) -> tuple[Array, Any]:
        if not self.training:
            return x, _passed(x, x.shape)
        param = {
            "p": self.p,
            "mode": "train",
            "seed": self.seed,
            "stream": self.stream,
            "step": self.step % 2**32,  # the mask's counter has 32 bits
        }
        out, cache = layers.dropout_forward(x, param)
        self.step += 1
        return out, cache

    def _backward(self, dout: Array, cache: Any) -> Array:
        if isinstance(cache, _Passed):
            return _passed_backward(dout, cache)
        return layers.dropout_backward(dout, cache)

    def _arguments(self) -> list[str]:
        arguments = [f"{self.p:g}"] + ([f"seed={self.seed}"] if self._given else [])
        return arguments + ([f"stream={self.stream}"] if self.stream else [])


class Flatten(Layer):
    """``x.reshape(N, -1)``: a view of x where its layout allows one."""

    def _forward(self, x: Array) -> tuple[Array, Any]:
        _check.array("x", x)
        if x.ndim < 2 or x.size == 0:
            raise ValueError(f"x has shape {x.shape}, expected (N, d1, ...) and at least one value")
        shape = (x.shape[0], math.prod(x.shape[1:]))
        return x.reshape(shape), _passed(x, shape)

    def _backward(self, dout: Array, cache: Any) -> Array:
        return _passed_backward(dout, cache)

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Return ``("N", D)`` where the input's shape is known."""
        return None if shape is None else ("N", math.prod(shape[1:]))


class _Passed(NamedTuple):
    """What the backward pass needs where the output is x itself, of another shape perhaps."""

    shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    empty: Array  # of x's dtype, on x's device


def _passed(x: Array, out_shape: tuple[int, ...]) -> _Passed:
    _check.array("x", x)
    with scope_of(x):
        return _Passed(x.shape, out_shape, namespace(x).empty(0, x.dtype))


def _passed_backward(dout: Array, cache: _Passed) -> Array:
    _check.like("dout", dout, cache.out_shape, cache.empty)
    return dout.reshape(cache.shape)

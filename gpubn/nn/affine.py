"""The fully connected layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpubn import backend, layers
from gpubn.backend import Array
from gpubn.layers import _check
from gpubn.nn.layer import Parametrized, Shape, changed


class Affine(Parametrized):
    """``x.reshape(N, -1) @ w + b``.

    Parameters
    ----------
    in_features, out_features : int
        D and M: x is ``(N, d1, ..., dk)`` with ``D = d1 * ... * dk``, the output ``(N, M)``.
    weight_scale : float, optional
        Standard deviation of the initial weights, by default ``sqrt(2 / D)``: He et al. 2015,
        arXiv:1502.01852. Biases start at 0.
    dtype : float32 or float64
        Of parameters and input.
    seed : int, optional
        Same seed, same weights, on every device. Random where absent.
    device : str, optional
        As for ``gpubn.use``; by default the device in force.
    reproducible : bool, optional
        Whether matrix products are to have the same bits on every device; by default as
        ``GPUBN_REPRODUCIBLE`` says, else False.

    Attributes
    ----------
    params : dict
        w ``(D, M)`` and b ``(M,)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_scale: float | None = None,
        *,
        dtype: Any = np.float32,
        seed: int | None = None,
        device: str | None = None,
        reproducible: bool | None = None,
    ) -> None:
        super().__init__(dtype, device)
        self.in_features = _check.whole("in_features", in_features)
        self.out_features = _check.whole("out_features", out_features)
        scale = (
            math.sqrt(2 / self.in_features)
            if weight_scale is None
            else _check.number("weight_scale", weight_scale)
        )
        if scale < 0:
            raise ValueError(f"weight_scale is {weight_scale!r}, expected a number of at least 0")
        self.weight_scale = None if weight_scale is None else scale
        self.seed = None if seed is None else _check.counter("seed", seed, 64)
        self.reproducible = backend.reproducible(reproducible)
        shape = (self.in_features, self.out_features)
        weights = draw_weights(np.random.default_rng(self.seed), shape, scale) if scale else None
        self._params["w"] = (
            self._full(shape, 0)
            if weights is None
            else self.device.asarray(weights.astype(self.dtype, copy=False))
        )
        self._params["b"] = self._full((self.out_features,), 0)

    def _forward(self, x: Array) -> tuple[Array, Any]:
        self._check_dtype(x, half=False)
        if x.ndim > 1 and math.prod(x.shape[1:]) != self.in_features:
            raise ValueError(
                f"x has shape {x.shape}, expected (N, d1, ...) with {self.in_features} values a "
                "sample"
            )
        params = self._params
        return layers.affine_forward(x, params["w"], params["b"], self.reproducible)

    def _backward(self, dout: Array, cache: Any) -> Array:
        dx, self._grads["w"], self._grads["b"] = layers.affine_backward(dout, cache)
        return dx

    def backward_parameters(self, dout: Array) -> None:
        """Set ``grads`` as ``backward`` does, and spare the gradient of x: a first layer's."""
        if self._cache is None:
            raise RuntimeError("Affine.backward_parameters was called before forward")
        if self.observer is not None:
            self.observer(self, "gradient", dout)
        gradients = layers.affine_parameter_gradients(dout, self._cache)
        self._grads["w"], self._grads["b"] = gradients

    def output_shape(self, shape: Shape | None) -> Shape:
        """Return ``("N", M)``."""
        return ("N", self.out_features)

    def _arguments(self) -> list[str]:
        options = {"weight_scale": (self.weight_scale, None), "seed": (self.seed, None)}
        sizes = [str(self.in_features), str(self.out_features)]
        arguments = [*sizes, *changed(options), *self._common()]
        return arguments + (["reproducible=True"] if self.reproducible else [])


def draw_weights(
    generator: np.random.Generator, shape: tuple[int, ...], scale: float
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Draw normally distributed weights, on the host: the same on every device.

    They are drawn in float64 and rounded to float32, for float64 layers too, since a few draws
    depend on the C library's log in their last bit.
    """
    return (scale * generator.standard_normal(shape)).astype(np.float32)

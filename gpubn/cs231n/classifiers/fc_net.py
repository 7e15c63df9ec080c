"""The assignment's ``cs231n.classifiers.fc_net``.

``from gpubn.cs231n.classifiers.fc_net import *`` brings the layers too, as the assignment's does,
whose notebooks count on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpubn import train
from gpubn.backend import Array
from gpubn.cs231n import layer_utils, layers
from gpubn.cs231n.layer_utils import *  # noqa: F403
from gpubn.cs231n.layers import *  # noqa: F403
from gpubn.nn.layer import Layer
from gpubn.train.parameters import Parameters

__all__ = ["FullyConnectedNet", *layers.__all__, *layer_utils.__all__]


class FullyConnectedNet(train.FullyConnectedNet):
    """``gpubn.train.FullyConnectedNet``, drawn from NumPy's global stream.

    Weights are ``weight_scale * np.random.randn(...)``, W1 first. Dropout masks are
    ``np.random.rand(...) < p``; with a ``seed`` the stream starts anew from it at each of them, as
    the assignment has it for its gradient checks. The seed is dropout's alone.
    """

    def _draw_weights(self, params: Parameters) -> None:
        for name, array in params.items():
            if name.startswith("W"):
                weights = self.weight_scale * np.random.randn(*array.shape)
                params[name] = weights.astype(self.dtype)

    def _dropout(self, index: int) -> Layer:
        return _Dropout(self.dropout_keep_ratio, self.seed)


class _Dropout(Layer):
    """Dropout by masks of the global stream."""

    def __init__(self, p: float, seed: int | None) -> None:
        super().__init__()
        self.p, self.seed = p, seed

    def _forward(self, x: Array) -> tuple[Array, Any]:
        mode = "train" if self.training else "test"
        return layers.dropout_forward(x, {"p": self.p, "mode": mode, "seed": self.seed})

    def _backward(self, dout: Array, cache: Any) -> Array:
        return layers.dropout_backward(dout, cache)

    def _arguments(self) -> list[str]:
        return [f"{self.p:g}"] + ([] if self.seed is None else [f"seed={self.seed}"])

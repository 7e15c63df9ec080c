"""Batch normalization and its relatives on NumPy and CuPy arrays, the same bits on CPU and CUDA.

``gpubn.layers`` has the layers as functions, ``gpubn.nn`` has them as objects, ``gpubn.train`` has
networks and their training, ``gpubn.testing`` reference formulas and gradient checks. ``use``
chooses the device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gpubn.backend import Device, DeviceError, current, namespace, use

if TYPE_CHECKING:
    from gpubn import layers, nn, testing, train
    from gpubn.kernels.memory import release_memory
    from gpubn.train import FullyConnectedNet, Solver

__version__ = "0.1.0"

__all__ = [
    "Device",
    "DeviceError",
    "FullyConnectedNet",
    "Solver",
    "current",
    "layers",
    "namespace",
    "nn",
    "release_memory",
    "testing",
    "train",
    "use",
]

# Loaded when first asked for, so that `import gpubn` stays quick.
_LAZY_MODULES = ("layers", "nn", "testing", "train")
_LAZY_NAMES = {
    "FullyConnectedNet": "gpubn.train",
    "Solver": "gpubn.train",
    "release_memory": "gpubn.kernels.memory",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"gpubn.{name}")
    if name in _LAZY_NAMES:
        return getattr(importlib.import_module(_LAZY_NAMES[name]), name)
    raise AttributeError(f"module 'gpubn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

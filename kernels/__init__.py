"""The kernels, in pairs: ``<op>_cuda`` (CuPy) and ``<op>_numba`` (CPU) hold the same functions.

``for_array("batchnorm", x)`` gives the module of the pair for the device that holds ``x``.
README.md beside this file is the numerics contract: the order of every reduction and rounding.
"""

if __name__ != "gpubn.kernels":
    raise ImportError(
        "this folder is the package gpubn.kernels: install gpubn and import it under that name"
    )

import importlib
from functools import cache
from types import ModuleType

from gpubn.backend import Array, is_cuda

_SUBNORMAL = 5e-324


def for_array(op: str, array: Array) -> ModuleType:
    """Return the kernels of ``op`` for the device that holds ``array``.

    Those of the CPU take a thread that flushes subnormal numbers to zero back to where it does not,
    and warn.
    """
    if is_cuda(array):
        return _load(op, "cuda")
    if _SUBNORMAL * 1.0 == 0.0:
        _load("subnormals", "numba").keep()
    return _load(op, "numba")


@cache
def _load(op: str, device: str) -> ModuleType:
    return importlib.import_module(f"gpubn.kernels.{op}_{device}")

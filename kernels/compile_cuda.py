"""Compile the .cuh text beside this file with CuPy, each kernel when it is first called."""

from functools import cache
from importlib.resources import files
from typing import Any

import cupy
import numpy as np

from gpubn.backend import Array

_C_NAMES = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}


@cache
def source(*names: str) -> str:
    """Return the text of the named .cuh files, in that order."""
    folder = files("gpubn.kernels")
    return "\n".join((folder / f"{name}.cuh").read_text("utf-8") for name in names)


@cache
def kernel(text: str, name: str, dtype: np.dtype[Any], *arguments: int) -> cupy.RawKernel:
    """Return ``name<dtype, *arguments>``, a template in ``text``."""
    instance = f"gpubn::{name}<{', '.join([_C_NAMES[dtype], *map(str, arguments)])}>"
    return cupy.RawModule(code=text, name_expressions=[instance]).get_function(instance)


def contiguous(*arrays: Array) -> tuple[Array, ...]:
    """Return the arrays in C order, copied only where they are not: kernels take pointers."""
    return tuple(cupy.ascontiguousarray(array) for array in arrays)

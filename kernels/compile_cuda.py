"""Compile the .cuh text beside this file with CuPy, each kernel when it is first called."""

import re
from functools import cache
from importlib.resources import files
from typing import Any

import cupy
import numpy as np

from gpubn.backend import Array

# How arrays of a dtype are stored: a kernel's template argument (real.cuh).
_STORAGE = {
    "float32": "float",
    "float64": "double",
    "float16": "gpubn::f16",
    "bfloat16": "gpubn::bf16",
}


@cache
def source(*names: str) -> str:
    """Return the text of the named .cuh files, in that order."""
    folder = files("gpubn.kernels")
    return "\n".join((folder / f"{name}.cuh").read_text("utf-8") for name in names)


@cache
def kernel(text: str, name: str, dtype: np.dtype[Any], *arguments: int | str) -> cupy.RawKernel:
    """Return ``name<dtype, *arguments>``, a template in ``text``."""
    instance = f"gpubn::{name}<{', '.join([_STORAGE[dtype.name], *map(str, arguments)])}>"
    return cupy.RawModule(code=text, name_expressions=[instance]).get_function(instance)


class Elementwise:
    """An ElementwiseKernel for each dtype of its arrays, half precision among them.

    Parameters of type ``S`` are values as they are stored, those of type ``T`` what is computed
    with. The operation writes ``STORED`` and ``REAL`` for the preamble's template arguments.
    """

    def __init__(
        self, in_params: str, out_params: str, operation: str, name: str, preamble: str
    ) -> None:
        self._texts = (in_params, out_params, operation)
        self._name, self._preamble = name, preamble
        self._kernels: dict[str, cupy.ElementwiseKernel] = {}

    def __call__(self, dtype: np.dtype[Any], *arguments: Any) -> None:
        """Run the kernel for arrays of ``dtype``; the outputs are among the arguments."""
        kernel = self._kernels.get(dtype.name)
        if kernel is None:
            kernel = self._kernels[dtype.name] = self._kernel(dtype)
        if dtype.itemsize == 2:
            arguments = tuple(_bits(argument, dtype) for argument in arguments)
        kernel(*arguments)

    def _kernel(self, dtype: np.dtype[Any]) -> cupy.ElementwiseKernel:
        half = dtype.itemsize == 2
        # Half precision travels as bits: CuPy has little arithmetic for bfloat16, and needs none.
        types = {"S": "uint16", "T": "float32"} if half else {"S": dtype.name, "T": dtype.name}
        words = {"STORED": _STORAGE[dtype.name], "REAL": "float" if half else _STORAGE[dtype.name]}
        in_params, out_params, operation = self._texts
        return cupy.ElementwiseKernel(
            re.sub(r"\b[ST]\b", lambda match: types[match[0]], in_params),
            re.sub(r"\b[ST]\b", lambda match: types[match[0]], out_params),
            re.sub(r"\b(STORED|REAL)\b", lambda match: words[match[0]], operation),
            f"{self._name}_{dtype.name}",
            preamble=self._preamble,
        )


def _bits(argument: Any, dtype: np.dtype[Any]) -> Any:
    stored = isinstance(argument, cupy.ndarray) and argument.dtype == dtype
    return argument.view(np.uint16) if stored else argument


def pointers(*arguments: Any) -> tuple[Any, ...]:
    """Return a raw kernel's arguments, with null pointers for those that are None.

    Releases of CuPy differ in what they make of None: to some it is no argument at all.
    """
    return tuple(np.uint64(0) if argument is None else argument for argument in arguments)


def contiguous(*arrays: Array) -> tuple[Array, ...]:
    """Return the arrays in C order, copied only where they are not: kernels take pointers."""
    return tuple(a if a.flags.c_contiguous else cupy.ascontiguousarray(a) for a in arrays)

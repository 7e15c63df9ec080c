"""PyTorch as a peer: what it is given, how it is run, and what comes back."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.checks import Float64
from gpubn.backend import Device
from gpubn.kernels.threads import get_num_threads

EAGER, COMPILED, NO_CUDNN, FUSED = "torch", "torch_compile", "torch_no_cudnn", "torch_fused"
PEERS = {
    EAGER: "eager, as it comes",
    COMPILED: "torch.compile",
    NO_CUDNN: "eager, batch norm by its own kernels instead of cuDNN's",
    FUSED: "eager, the optimizer with fused=True",
}
"""Every peer that a row may have, and what it is."""

DEFAULT = {"cpu": (EAGER, FUSED), "cuda": (EAGER, COMPILED, NO_CUDNN, FUSED)}


@dataclass(frozen=True)
class Torch:
    """PyTorch on one device, and the peers that were asked for."""

    module: Any
    device: str
    names: tuple[str, ...]

    def tensor(self, array: Any, channels_last: bool = False) -> Any:
        """Return a tensor of a NumPy array's values.

        Of images with channels last the memory stays as it is, and the axes are PyTorch's.
        """
        torch, array = self.module, np.ascontiguousarray(array)
        if array.dtype.name == "bfloat16":  # which NumPy knows by ml_dtypes, and PyTorch does not
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        tensor = tensor.to(self.device, copy=True)
        return tensor.permute(0, 3, 1, 2) if channels_last and tensor.ndim == 4 else tensor

    def array(self, tensor: Any, channels_last: bool = False) -> Float64:
        """Return a tensor's values in float64, with the axes of the array it came from."""
        values: Float64 = tensor.detach().double().cpu().numpy()
        return np.moveaxis(values, 1, -1) if channels_last and values.ndim == 4 else values

    def scope(self, name: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        """Return what makes the context in which a peer runs."""
        if name != NO_CUDNN:
            return contextlib.nullcontext
        return lambda: self.module.backends.cudnn.flags(enabled=False)

    def transformed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function as a peer runs it: compiled, or as it is."""
        if name != COMPILED:
            return function
        torch = self.module
        torch._dynamo.reset()  # every shape is compiled by itself, however many there are
        # A backward pass that may overwrite what it was given cannot be timed again and again.
        config: Any = importlib.import_module("torch._functorch.config")
        config.donated_buffer = False
        compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
        return compiled


def load(device: Device, names: Iterable[str] | None = None) -> Torch | None:
    """Return PyTorch, with as many threads as gpubn has; without it say so, and return None."""
    chosen = DEFAULT[device.kind] if names is None else tuple(names)
    if not chosen:
        return None
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        print(f"no peer is timed: PyTorch cannot be imported ({error})", flush=True)
        return None
    if device.kind == "cuda" and not torch.cuda.is_available():
        print("no peer is timed: this PyTorch cannot use CUDA", flush=True)
        return None
    torch.set_num_threads(get_num_threads())
    if device.kind == "cuda":
        torch.cuda.set_device(device.index)
    return Torch(torch, device.name, chosen)

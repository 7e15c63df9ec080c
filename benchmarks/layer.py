"""A layer at one shape, and its cases: forward, backward, and both."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.checks import Results, close
from benchmarks.harness import OURS, Case, Contestant, Setting
from benchmarks.peers import COMPILED, EAGER, Torch
from benchmarks.shapes import Shape
from gpubn import layers
from gpubn.backend import to_host

FORWARD, BACKWARD, BOTH, TEST = "forward", "backward", "forward+backward", "test"


@dataclass(frozen=True, eq=False)
class Layer:
    """What a layer is given, and what is known of its results.

    Attributes
    ----------
    op, layout : str
        What rows call it.
    name : str
        gpubn's functions are ``{name}_forward`` and ``{name}_backward``.
    inputs : tuple of array
        x and the parameters, in host memory.
    dout : array
    arguments : tuple
        Those of the forward function behind the inputs.
    gradients : tuple of str
        What the backward function returns, by name.
    passes : mapping
        For each direction to time, the reads and writes of an array of x's size.
    peer : callable
        Takes ``Torch``, returns PyTorch's function of the inputs.
    peers : tuple of str
        Which peers do it in a way of their own.
    mixed : bool
        Whether PyTorch takes float32 parameters beside half precision, as gpubn does.
    check : callable
        Takes a contestant's name and results.
    """

    op: str
    layout: str
    name: str
    inputs: tuple[Any, ...]
    dout: Any
    arguments: tuple[Any, ...]
    gradients: tuple[str, ...]
    passes: Mapping[str, int]
    peer: Callable[[Torch], Callable[..., Any]]
    check: Callable[[str, Results], None]
    peers: tuple[str, ...] = (EAGER, COMPILED)
    mixed: bool = False

    @property
    def x(self) -> Any:
        return self.inputs[0]

    @property
    def channels_last(self) -> bool:
        return self.layout == "NHWC"

    def cases(self, setting: Setting) -> Iterator[Case]:
        """Yield a case for each direction; with ``reuse``, where all its functions take ``out``."""
        for direction, passes in self.passes.items():
            missing = without_out(self.name, direction) if setting.reuse else []
            if missing:
                note(f"{self.op} {direction} is left out: no out= in {' and '.join(missing)}")
                continue
            contestants = [ours(self, direction, setting)]
            if setting.torch is not None:
                chosen = (name for name in setting.torch.names if name in self.peers)
                contestants += [peer(self, direction, name, setting.torch) for name in chosen]
            yield Case(
                self.op,
                direction,
                self.x.shape,
                self.layout,
                self.x.dtype.name,
                self.x.nbytes,
                passes,
                tuple(contestants),
                self.check,
            )


def passes(forward: int, backward: int) -> dict[str, int]:
    """Return the passes of the three directions."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def against(expected: Callable[[], Results], dtype: str) -> Callable[[str, Results], None]:
    """Return a check against what is computed once, when it is first needed."""
    once = functools.cache(expected)
    return lambda name, results: close(results, once(), dtype)


def draw(dtype: str, seed: int, *shapes: Shape) -> list[Any]:
    """Return an array of each shape, of normal values that are whole in this dtype."""
    rng = np.random.default_rng(seed)
    single = dtype != "float64"
    drawn = (rng.standard_normal(shape, np.float32 if single else np.float64) for shape in shapes)
    return [values.astype(numpy_dtype(dtype), copy=False) for values in drawn]


def parameters(dtype: str, seed: int, *shapes: Shape) -> list[Any]:
    """Return as ``draw``, but in float32 for half precision, which PyTorch may be given instead."""
    drawn = draw(dtype, seed, *shapes)
    return [a.astype(np.float32) if a.dtype.itemsize == 2 else a for a in drawn]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return a dtype by its name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        half: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return half
    return np.dtype(name)


def without_out(name: str, direction: str) -> list[str]:
    """Return which of gpubn's functions that a direction calls have no ``out`` argument."""
    needed = {FORWARD: ["forward"], TEST: ["forward"], BACKWARD: ["backward"]}
    names = (f"{name}_{part}" for part in needed.get(direction, ["forward", "backward"]))
    return [
        each for each in names if "out" not in inspect.signature(getattr(layers, each)).parameters
    ]


@functools.cache
def note(text: str) -> None:
    """Print a line, once."""
    print(text, flush=True)


def ours(layer: Layer, direction: str, setting: Setting) -> Contestant:
    """Return gpubn as a contestant."""
    device = setting.device

    def prepare() -> Callable[[], Any]:
        forward = getattr(layers, f"{layer.name}_forward")
        backward = getattr(layers, f"{layer.name}_backward")
        arguments = (*map(device.asarray, layer.inputs), *_on(device, layer.arguments))
        dout = device.asarray(layer.dout)

        def buffer() -> dict[str, Any]:
            return {"out": device.xp.empty_like(arguments[0])} if setting.reuse else {}

        for_out, for_dx = buffer(), buffer()
        if direction == BACKWARD:
            cache = forward(*arguments)[1]
            return lambda: (None, backward(dout, cache, **for_dx))
        if direction == BOTH:

            def both() -> Any:
                out, cache = forward(*arguments, **for_out)
                return out, backward(dout, cache, **for_dx)

            return both
        return lambda: (forward(*arguments, **for_out)[0], None)

    def results(value: Any) -> Results:
        return _named(layer, value, lambda array: np.asarray(to_host(array), np.float64))

    return Contestant(OURS, prepare, results)


def peer(layer: Layer, direction: str, name: str, torch: Torch) -> Contestant:
    """Return PyTorch as a contestant."""
    autograd, last = torch.module.autograd, layer.channels_last

    def prepare() -> Callable[[], Any]:
        function = _function(layer, name, torch)
        tensors = [torch.tensor(array, last) for array in layer.inputs]
        if not layer.mixed:
            tensors = [tensor.to(tensors[0].dtype) for tensor in tensors]
        dout = torch.tensor(layer.dout, last)
        if direction == TEST:
            return lambda: (function(*tensors), None)
        for tensor in tensors:
            tensor.requires_grad_()
        if direction == FORWARD:
            return lambda: (function(*tensors), None)
        if direction == BACKWARD:
            out = function(*tensors)
            return lambda: (None, autograd.grad(out, tensors, dout, retain_graph=True))

        def both() -> Any:
            out = function(*tensors)
            return out, autograd.grad(out, tensors, dout)

        return both

    def results(value: Any) -> Results:
        return _named(layer, value, lambda tensor: torch.array(tensor, last))

    return Contestant(name, prepare, results, torch.scope(name))


@functools.lru_cache(maxsize=4)
def _function(layer: Layer, name: str, torch: Torch) -> Callable[..., Any]:
    """Return a peer's function: compiled, it is so once for all directions."""
    return torch.transformed(name, layer.peer(torch))


def _named(layer: Layer, value: Any, convert: Callable[[Any], Any]) -> Results:
    """Return out and the gradients, where the direction has them, by name."""
    out, gradients = value
    named = {} if out is None else {"out": out}
    if gradients is not None:
        several = gradients if isinstance(gradients, tuple) else (gradients,)
        named |= dict(zip(layer.gradients, several, strict=True))
    return {name: convert(array) for name, array in named.items()}


def _on(device: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """Return arguments anew, with the arrays in their dicts on the device."""
    return [
        {key: device.asarray(v) if isinstance(v, np.ndarray) else v for key, v in each.items()}
        if isinstance(each, dict)
        else each
        for each in arguments
    ]

"""What all layers have in common: parameters, modes, state, and arrays of other libraries."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Self

import numpy as np

from gpubn import backend, interop
from gpubn.backend import Array, Device
from gpubn.layers import _check
from gpubn.nn import files

Shape = tuple[Any, ...]
"""An output's shape; its first entry, the number of samples, is the text "N"."""


class Layer(ABC):
    """A layer with its parameters: ``forward`` keeps what ``backward`` needs.

    A layer of your own has ``_forward(x)``, which returns the output and a cache, and
    ``_backward(dout, cache)``, which returns dx and sets ``grads``; both see NumPy and CuPy arrays
    only.

    Attributes
    ----------
    params : mapping of name to array
        By the names of ``gpubn.layers``: w, b, gamma, beta. An array assigned to a name is used as
        it is: a view of a larger buffer, say.
    grads : mapping of name to array
        The gradients of the last ``backward``, by the names of ``params``. Each backward replaces
        them; nothing is added up.
    buffers : mapping of name to array
        What is no parameter and belongs to the state: running statistics.
    training : bool
        Set by ``train`` and ``eval``; True at first.
    observer : callable or None
        Called as ``observer(layer, "output", out)`` after each forward and as
        ``observer(layer, "gradient", dout)`` before each backward, with the arrays themselves: copy
        what you keep. A ``Sequential``'s sees its ends only; its layers have their own.
    """

    def __init__(self) -> None:
        self._params: MutableMapping[str, Array] = {}
        self._grads: dict[str, Array] = {}
        self._cache: Any = None
        self.training = True
        self.observer: Callable[[Layer, str, Array], None] | None = None

    def bind(self, params: MutableMapping[str, Array]) -> None:
        """Let the layer use these parameters, arrays of its own names and shapes, from now on."""
        self._params = params

    # --- What a layer does ------------------------------------------------------------------------

    @abstractmethod
    def _forward(self, x: Array) -> tuple[Array, Any]:
        """Return the output, and a cache for ``_backward`` that is not None."""

    @abstractmethod
    def _backward(self, dout: Array, cache: Any) -> Array:
        """Return dx, and set ``grads``."""

    def forward(self, x: Any) -> Any:
        """Return the layer's output.

        Parameters
        ----------
        x : array
            NumPy or CuPy, on the layer's device, or any array with DLPack (PyTorch, JAX), which is
            not copied.

        Returns
        -------
        out : array
            Of the library that x came from.

        Raises
        ------
        ValueError, TypeError
            x does not fit.
        """
        give = interop.giver(x)
        if give is None:
            return self.forward_array(x)
        return give(self.forward_array(interop.take(x, "x")))

    def backward(self, dout: Any) -> Any:
        """Return the gradient of the last forward's x, and set ``grads``.

        Parameters
        ----------
        dout : array
            Gradient of the loss with respect to the output: its shape, dtype and device.

        Raises
        ------
        RuntimeError
            There was no forward before it.
        ValueError, TypeError
            dout does not fit.
        """
        give = interop.giver(dout)
        if give is None:
            return self.backward_array(dout)
        return give(self.backward_array(interop.take(dout, "dout")))

    def __call__(self, x: Any) -> Any:
        """Return ``forward(x)``."""
        return self.forward(x)

    def forward_array(self, x: Array) -> Array:
        """Do what ``forward`` does, for what is known to be a NumPy or CuPy array."""
        # Let go of the last cache first: its memory serves this pass, and if this one fails there
        # is no backward.
        self._cache = None
        out, self._cache = self._forward(x)
        if self.observer is not None:
            self.observer(self, "output", out)
        return out

    def predict(self, x: Any) -> Any:
        """Return what ``forward`` does in evaluation, and keep nothing: no backward can follow.

        Nor does any layer of a ``Sequential``: each one's input is let go of as soon as it has its
        output. What the last forward kept goes too. ``training`` stays as it is.
        """
        give = interop.giver(x)
        if give is None:
            return self.predict_array(x)
        return give(self.predict_array(interop.take(x, "x")))

    def predict_array(self, x: Array) -> Array:
        """Do what ``predict`` does, for what is known to be a NumPy or CuPy array."""
        self.release()
        training, self.training = self.training, False
        try:
            return self._forward(x)[0]
        finally:
            self.training = training

    def backward_array(self, dout: Array) -> Array:
        """Do what ``backward`` does, for what is known to be a NumPy or CuPy array."""
        if self._cache is None:
            raise RuntimeError(f"{type(self).__name__}.backward was called before forward")
        if self.observer is not None:
            self.observer(self, "gradient", dout)
        return self._backward(dout, self._cache)

    def release(self) -> None:
        """Let go of what the last forward kept: its memory is free, and backward needs a new one.

        The next forward does it too, and ``predict`` keeps nothing in the first place.
        """
        self._cache = None

    # --- Modes ------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Let dropout drop and batch norms use the batch's statistics, or not; return the layer."""
        self.training = _check.boolean("mode", mode)
        return self

    def eval(self) -> Self:
        """Let dropout pass all and batch norms use their running statistics; return the layer."""
        return self.train(False)

    # --- State ------------------------------------------------------------------------------------

    @property
    def params(self) -> MutableMapping[str, Array]:
        """The parameters by name."""
        return self._params

    @property
    def grads(self) -> MutableMapping[str, Array]:
        """The parameters' gradients by name, of the last ``backward``."""
        return self._grads

    @property
    def buffers(self) -> MutableMapping[str, Array]:
        """The running statistics by name."""
        return {}

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """Iterate over the layers that hold no others, each with its name: "" for this one."""
        yield prefix.removesuffix("."), self

    def state_dict(self) -> dict[str, Array]:
        """Return copies of parameters and buffers, on their device, by name.

        In a ``Sequential`` a name begins with the layer's position: "0.w", "1.running_mean".
        """
        copies = {}
        for name, (_, array) in self._state().items():
            with backend.scope_of(array):
                copies[name] = array.copy()
        return copies

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take parameters and buffers over from what ``state_dict`` returned, of any device.

        Parameters are copied into the arrays that are there.

        Raises
        ------
        ValueError, TypeError
            Names are missing or unknown, or a shape or dtype is another; nothing was changed.
        """
        _check.mapping("state", state)
        mine = self._state()
        missing = [name for name in mine if name not in state]
        unexpected = [str(name) for name in state if name not in mine]
        if missing or unexpected:
            faults = [f"has no {', '.join(missing)}"] if missing else []
            faults += [f"has {', '.join(unexpected)}"] if unexpected else []
            raise ValueError(f"state {' and '.join(faults)}, expected {', '.join(mine) or 'none'}")
        arrays = {name: interop.take(state[name], name) for name in mine}
        for name, (_, array) in mine.items():
            new = arrays[name]
            _check.array(name, new)
            if new.shape != array.shape:
                raise ValueError(f"{name} has shape {new.shape}, expected {array.shape}")
            if new.dtype != array.dtype:
                raise TypeError(f"{name} has dtype {new.dtype}, expected {array.dtype}")
            if name.rpartition(".")[2] == "num_batches" and int(backend.to_host(new)) < 0:
                raise ValueError(f"{name} is {int(new)}, expected a whole number of at least 0")
            if not getattr(array.flags, "writeable", True):
                raise ValueError(f"{name} of the layer is read-only, expected an array to write to")
        # Copies first: an array may be a view of what is written.
        copies = {name: _copy_beside(array, arrays[name]) for name, (_, array) in mine.items()}
        for name, (layer, array) in mine.items():
            own = name.rpartition(".")[2]
            if own in layer.params:
                with backend.scope_of(array):
                    array[...] = copies[name]
            else:
                layer.buffers[own] = copies[name]

    def _state(self) -> dict[str, tuple[Layer, Array]]:
        """Return every array of the state by name, with the layer that holds it."""
        return {
            f"{prefix}.{name}" if prefix else name: (layer, array)
            for prefix, layer in self.leaves()
            for name, array in (*layer.params.items(), *layer.buffers.items())
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, atomically, with a checksum."""
        arrays = {name: array for name, (_, array) in self._state().items()}
        files.atomic_write(path, files.encode("state", arrays, {}))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the state over from a file that ``save`` wrote.

        Raises
        ------
        CheckpointError
            The file is damaged, was not written by ``save``, or is of another network; nothing was
            changed.
        OSError
            The file cannot be read.
        """
        arrays, _ = files.read(path, "state")
        try:
            self.load_state_dict(arrays)
        except (ValueError, TypeError) as error:
            raise files.CheckpointError(f"{os.fspath(path)} cannot be used: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles: it belongs to one pass."""
        return self.__dict__ | {"_cache": None}

    # --- Printing ---------------------------------------------------------------------------------

    def _arguments(self) -> list[str]:
        """Return the arguments for ``repr``, those at their defaults left out."""
        return []

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Return the output's shape for an input's, as far as it is known; None where it is not."""
        return shape

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"


class Parametrized(Layer):
    """A layer with arrays of its own, on a device, of a dtype."""

    def __init__(self, dtype: Any, device: str | None) -> None:
        super().__init__()
        self.dtype = np.dtype(dtype)
        if self.dtype.name not in _check.FLOATS:
            raise TypeError(f"dtype is {self.dtype}, expected float32 or float64")
        self.device: Device = backend.current() if device is None else backend.resolve(device)

    def _full(self, shape: tuple[int, ...], value: float) -> Array:
        with self.device.scope():
            return self.device.xp.full(shape, value, self.dtype)

    def _check_dtype(self, x: Array, half: bool = True) -> None:
        """Require an array of the dtype that goes with the layer's: functions blame parameters."""
        _check.array("x", x)
        if x.dtype == self.dtype:
            return
        halves = _check.HALVES if half and self.dtype == np.float32 else ()
        if x.dtype.name not in halves:
            expected = " or ".join([", ".join((self.dtype.name, *halves[:-1])), *halves[-1:]])
            raise TypeError(
                f"x has dtype {x.dtype}, expected {expected}, as a layer of {self.dtype} takes"
            )

    def _common(self) -> list[str]:
        """Return the last arguments for ``repr``."""
        arguments = [] if self.dtype == np.float32 else [f"dtype={self.dtype.name}"]
        return arguments + ([] if self.device.kind == "cpu" else [f"device={self.device.name!r}"])


def changed(options: dict[str, tuple[Any, Any]]) -> list[str]:
    """Return the options that are not at their defaults, as text."""
    return [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]


def _copy_beside(array: Array, new: Array) -> Array:
    """Return a copy of ``new`` on the device that holds ``array``."""
    if not backend.is_cuda(array):
        return np.array(backend.to_host(new))
    with backend.scope_of(array):
        return backend.namespace(array).array(new)

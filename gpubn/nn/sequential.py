"""Layers one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Self, overload

from gpubn.backend import Array
from gpubn.nn.layer import Layer, Parametrized, Shape


class Sequential(Layer):
    """Layers one after the other; their positions are their names.

    ``net[0]`` is a layer, ``net[1:3]`` a Sequential of the same layers. ``print(net)`` shows a
    table of layers, shapes and parameters.

    Parameters
    ----------
    *layers : Layer
        May be Sequentials too. Each may be there once: a layer keeps one pass's values only.

    Attributes
    ----------
    params, grads, buffers : mapping of name to array
        Those of all layers: "0.w", "1.gamma", "2.0.w". Assigning assigns to the layer.
    """

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                kind = repr(layer) if isinstance(layer, type) else f"a {type(layer).__name__}"
                raise TypeError(f"layers[{i}] is {kind}, expected a Layer")
        self._layers = layers
        first: dict[int, str] = {}
        for name, leaf in self.leaves():
            if id(leaf) in first:
                raise ValueError(
                    f"layer {name} is layer {first[id(leaf)]} again, expected one of its own: "
                    "a layer keeps one pass's values only"
                )
            first[id(leaf)] = name

    def _forward(self, x: Array) -> tuple[Array, Any]:
        for layer in self._layers:
            x = layer.forward_array(x)
        return x, True

    def _backward(self, dout: Array, cache: Any) -> Array:
        for layer in reversed(self._layers):
            dout = layer.backward_array(dout)
        return dout

    def predict_array(self, x: Array) -> Array:
        """Do what ``predict`` does, for what is known to be a NumPy or CuPy array."""
        self.release()
        for layer in self._layers:
            x = layer.predict_array(x)
        return x

    def release(self) -> None:
        """Let go of what the last forward kept, in every layer."""
        super().release()
        for layer in self._layers:
            layer.release()

    def train(self, mode: bool = True) -> Self:
        """Set every layer to training, or to evaluation; return the Sequential."""
        super().train(mode)
        for layer in self._layers:
            layer.train(mode)
        return self

    @property
    def params(self) -> MutableMapping[str, Array]:
        """The parameters of all layers by name."""
        return _Joined(self, lambda layer: layer.params)

    @property
    def grads(self) -> MutableMapping[str, Array]:
        """The gradients of all layers' parameters by name."""
        return _Joined(self, lambda layer: layer.grads)

    @property
    def buffers(self) -> MutableMapping[str, Array]:
        """The running statistics of all layers by name."""
        return _Joined(self, lambda layer: layer.buffers)

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """Iterate over the layers that hold no others, in order, each with its name."""
        for i, layer in enumerate(self._layers):
            yield from layer.leaves(f"{prefix}{i}.")

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Layer:
        if isinstance(index, slice):
            return Sequential(*self._layers[index])
        return self._layers[index]

    def output_shape(self, shape: Shape | None) -> Shape | None:
        """Return the output's shape for an input's, as far as it is known."""
        for layer in self._layers:
            shape = layer.output_shape(shape)
        return shape

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self._layers))})"

    def __str__(self) -> str:
        return table(self)


class _Joined(MutableMapping[str, Array]):
    """The arrays of a Sequential's layers by name; an assignment goes to the layer."""

    def __init__(
        self, net: Sequential, part: Callable[[Layer], MutableMapping[str, Array]]
    ) -> None:
        self._parts = {name: part(leaf) for name, leaf in net.leaves()}

    def _part(self, name: str) -> tuple[MutableMapping[str, Array], str]:
        layer, _, own = name.rpartition(".")
        if layer not in self._parts or own not in self._parts[layer]:
            raise KeyError(f"there is no {name!r}; there are {', '.join(self) or 'none'}")
        return self._parts[layer], own

    def __getitem__(self, name: str) -> Array:
        part, own = self._part(name)
        return part[own]

    def __setitem__(self, name: str, array: Array) -> None:
        part, own = self._part(name)
        part[own] = array

    def __delitem__(self, name: str) -> None:
        raise TypeError("a network's arrays are fixed: assign to a name that is there")

    def __iter__(self) -> Iterator[str]:
        return (f"{layer}.{own}" for layer, part in self._parts.items() for own in part)

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))

    def __repr__(self) -> str:
        return repr(dict(self))


def table(net: Sequential, shape: Shape | None = None) -> str:
    """Return a table of the layers: outputs as far as they are known, parameters, and how many.

    Parameters
    ----------
    shape : tuple, optional
        Of the input, with "N" for the number of samples.
    """
    rows = [("", "layer", "output", "parameters", "count")]
    total, kinds = 0, set()
    for name, layer in net.leaves():
        shape = layer.output_shape(shape)
        params = [f"{own} {array.shape}" for own, array in layer.params.items()]
        count = sum(math.prod(array.shape) for array in layer.params.values())
        total += count
        if isinstance(layer, Parametrized):
            kinds.add(f"{layer.dtype.name} on {layer.device.name}")
        rows.append((name, repr(layer), _shape_text(shape), ", ".join(params), f"{count:,}"))
    where = f", {' and '.join(sorted(kinds))}" if kinds else ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
            + [row[-1].rjust(widths[-1])]
        )
        for row in rows
    ]
    return "\n".join([*lines, f"total: {total:,} parameters{where}"])


def _shape_text(shape: Shape | None) -> str:
    return "" if shape is None else f"({', '.join(map(str, shape))})"

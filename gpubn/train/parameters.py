"""Named parameters in one flat buffer, so that an optimizer step is one kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NoReturn

import numpy as np

from gpubn.backend import Array, Device
from gpubn.layers import _check


class Parameters(dict[str, Array]):
    """A dict of named views into one flat buffer; assigning to a name copies into the buffer.

    Parameters
    ----------
    shapes : dict of name to shape
        In the order in which names are listed.
    layout : list of str
        The same names in the order in which they lie in the buffer.
    dtype : float32 or float64
    device : Device
        Where the buffer lies.

    Attributes
    ----------
    flat : array (P,)
        The buffer: every view shares its memory.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        layout: list[str],
        dtype: np.dtype[Any],
        device: Device,
    ) -> None:
        self._shapes, self._layout, self._device = dict(shapes), layout, device
        sizes = {name: math.prod(shapes[name]) for name in layout}
        with device.scope():
            self.flat: Array = device.xp.zeros(sum(sizes.values()), dtype)
        self._starts, start = {}, 0
        for name in layout:
            self._starts[name] = start
            start += sizes[name]
        super().__init__(self.views_of(self.flat))

    def views_of(self, flat: Array) -> dict[str, Array]:
        """Return views by name into another buffer of this layout, an optimizer's state say."""
        views = {}
        for name, shape in self._shapes.items():
            start = self._starts[name]
            views[name] = flat[start : start + math.prod(shape)].reshape(shape)
        return views

    def renamed(self, names: Mapping[str, str]) -> Renamed:
        """Return some of the parameters under other names: ``names`` has new name to old."""
        return Renamed(self, names)

    def zeros_like(self) -> Parameters:
        """Return parameters of the same names and shapes, all zeros, in a buffer of their own."""
        return Parameters(self._shapes, self._layout, self.flat.dtype, self._device)

    def copy(self) -> Parameters:
        """Return a copy in a buffer of its own."""
        other = self.zeros_like()
        with self._device.scope():
            other.flat[...] = self.flat
        return other

    __copy__ = copy

    def __deepcopy__(self, memo: Any) -> Parameters:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain dict of arrays."""
        return dict, ({name: view.copy() for name, view in self.items()},)

    def __setitem__(self, name: str, array: Array) -> None:
        self._check(name, array)
        with self._device.scope():
            self[name][...] = self._device.asarray(array)

    def _check(self, name: str, array: Array) -> None:
        if name not in self:
            raise KeyError(f"there is no parameter {name!r}; there are {', '.join(self)}")
        view = self[name]
        _check.array(name, array)
        if array.dtype != view.dtype:
            raise TypeError(f"{name} has dtype {array.dtype}, expected {view.dtype}")
        if array.shape != view.shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {view.shape}")

    def update(self, *others: Any, **arrays: Array) -> None:
        """Assign several parameters; all are checked before the first is written."""
        new = dict(*others, **arrays)
        for name, array in new.items():
            self._check(name, array)
        with self._device.scope():  # copies first: an array may be a view of what is written
            copies = {name: self._device.asarray(array).copy() for name, array in new.items()}
            for name, copy in copies.items():
                self[name][...] = copy

    # dict declares overloads that also take pairs, as `update` does; they say no more than this.
    def __ior__(self, other: Any) -> Parameters:  # type: ignore[override,misc] # see above
        self.update(other)
        return self

    def _fixed(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a network's parameters are fixed: assign to a name that is there")

    __delitem__ = _fixed
    pop = _fixed
    popitem = _fixed
    clear = _fixed
    setdefault = _fixed


class Renamed(MutableMapping[str, Array]):
    """Some of the views of ``Parameters`` under other names; assigning copies into the buffer."""

    def __init__(self, params: Parameters, names: Mapping[str, str]) -> None:
        self._params, self._names = params, names

    def __getitem__(self, own: str) -> Array:
        return self._params[self._names[own]]

    def __setitem__(self, own: str, array: Array) -> None:
        if own not in self:
            raise KeyError(f"there is no parameter {own!r}; there are {', '.join(self)}")
        self._params[self._names[own]] = array

    def __delitem__(self, own: str) -> None:
        raise TypeError("a network's parameters are fixed: assign to a name that is there")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as a plain dict of arrays."""
        return dict, ({own: view.copy() for own, view in self.items()},)

"""Parameters to and from PyTorch, by the names that its modules have. PyTorch is not imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from gpubn import interop
from gpubn.backend import Array, to_host
from gpubn.layers import _check
from gpubn.nn.affine import Affine
from gpubn.nn.layer import Layer
from gpubn.nn.norms import RUNNING, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from gpubn.nn.sequential import Sequential

_NAMES = {"w": "weight", "gamma": "weight", "b": "bias", "beta": "bias"}
_NORMS = (BatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm)


class _Network(Protocol):
    """A ``FullyConnectedNet``."""

    @property
    def layers(self) -> Sequential:
        """The layers."""


class _Pair(NamedTuple):
    """An array's name there and here."""

    theirs: str
    mine: str


def from_torch_state_dict(net: Layer | _Network, state_dict: Mapping[str, Any]) -> None:
    """Take over the parameters and statistics of a PyTorch module of the same structure.

    ``Linear`` is ``Affine``, whose w is the weight transposed; ``BatchNorm1d`` to ``3d``,
    ``LayerNorm``, ``GroupNorm``, ``InstanceNorm1d`` to ``3d`` and ``RMSNorm`` are the norms here,
    gamma the weight and beta the bias; ``torch.nn.Sequential`` is ``Sequential``. A ``BatchNorm``
    with ``relu=True`` counts as two modules, a batch norm and a ``ReLU``. So a
    ``FullyConnectedNet`` is a Sequential of ``Linear, BatchNorm1d, ReLU, Dropout, Linear, ...``,
    without the modules that it has no use for. Where the state has neither weight nor bias of a
    norm, as with ``affine=False``, or no bias, as with ``bias=False``, gamma becomes 1 and beta and
    b 0, which is what such a module computes.

    Parameters
    ----------
    net : Layer or FullyConnectedNet
        Takes the values; dtypes must be its own.
    state_dict : mapping of name to array or tensor
        What ``module.state_dict()`` returned.

    Raises
    ------
    ValueError, TypeError
        Names are missing or unknown, or a shape or dtype is another; nothing was changed.

    Notes
    -----
    Values are taken as they are; what is no part of a state must be given to the layers:

    - ``eps``: RMSNorm's default there is the dtype's ``eps``, here 1e-5.
    - ``momentum`` is 1 minus PyTorch's: 0.9 here is 0.1 there. None is None.
    - PyTorch's running variance is the unbiased one, n / (n - 1) times the biased, and it is not
      rescaled: n is not known. ``BatchNorm(unbiased=True)`` goes on training as PyTorch does; the
      default, and ``FullyConnectedNet``, move towards the biased one.
    - ``num_batches_tracked`` is kept where momentum is None, and has no effect elsewhere.
    """
    _check.mapping("state_dict", state_dict)
    layer = _layer_of(net)
    arrays = {name: array for name, (_, array) in layer._state().items()}
    pairs = list(_pairs(layer))
    wanted = {pair.mine: pair.theirs for pair in pairs if pair.mine in arrays}
    known = {pair.theirs for pair in pairs}
    unexpected = [str(name) for name in state_dict if name not in known]
    absent = {mine for mine, theirs in wanted.items() if theirs not in state_dict}
    # With unknown names there, what is absent may be under one of them.
    implied = {} if unexpected else _implied(layer, absent)
    missing = [theirs for mine, theirs in wanted.items() if mine in absent - implied.keys()]
    if missing or unexpected:
        faults = [f"has no {', '.join(missing)}"] if missing else []
        faults += [f"has {', '.join(unexpected)}"] if unexpected else []
        raise ValueError(
            f"state_dict {' and '.join(faults)}, expected {', '.join(wanted.values()) or 'none'}"
        )
    state: dict[str, Array] = dict(implied)
    for mine, theirs in wanted.items():
        if mine in implied:
            continue
        value, own = interop.take(state_dict[theirs], theirs), arrays[mine]
        _check.array(theirs, value)
        shape = own.shape[::-1] if _is_transposed(mine) else own.shape
        if value.shape != shape:
            raise ValueError(f"{theirs} has shape {value.shape}, expected {shape}")
        if value.dtype != own.dtype:
            raise TypeError(f"{theirs} has dtype {value.dtype}, expected {own.dtype}")
        state[mine] = value.T if _is_transposed(mine) else value
    layer.load_state_dict(state)


def to_torch_state_dict(net: Layer | _Network) -> dict[str, NDArray[Any]]:
    """Return parameters and statistics as the state of a PyTorch module of the same structure.

    The structures are those of ``from_torch_state_dict``.

    Returns
    -------
    state_dict : dict of name to NumPy array
        Copies, in host memory: ``{name: torch.from_numpy(array) for name, array in ...}`` is what
        ``load_state_dict`` takes. The batch norms' running variances are as they are, biased
        unless ``unbiased=True``; ``num_batches_tracked`` is 0 unless momentum is None.
    """
    layer = _layer_of(net)
    arrays = {name: array for name, (_, array) in layer._state().items()}
    state = {}
    for theirs, mine in _pairs(layer):
        array = to_host(arrays[mine]) if mine in arrays else np.array(0, np.int64)
        state[theirs] = np.array(array.T if _is_transposed(mine) else array, order="C")
    return state


def _layer_of(net: Layer | _Network) -> Layer:
    return net if isinstance(net, Layer) else net.layers


def _pairs(layer: Layer, mine: str = "", theirs: str = "") -> Iterator[_Pair]:
    """Iterate over the arrays of a state; a count of batches may be there and not here."""
    if isinstance(layer, Sequential):
        position = 0
        for i, child in enumerate(layer):
            yield from _pairs(child, f"{mine}{i}.", f"{theirs}{position}.")
            position += 2 if isinstance(child, BatchNorm) and child.relu else 1
        return
    for name in layer.params:
        yield _Pair(theirs + _NAMES.get(name, name), mine + name)
    if isinstance(layer, BatchNorm):
        for name in RUNNING:
            yield _Pair(theirs + name, mine + name)
        yield _Pair(theirs + "num_batches_tracked", mine + "num_batches")


def _implied(layer: Layer, absent: set[str]) -> dict[str, NDArray[Any]]:
    """Return what modules without a weight or a bias compute with: gamma 1, beta and b 0."""
    implied, state = {}, layer._state()
    for name in absent:
        owner, array = state[name]
        own, beta = name.rpartition(".")[2], name.removesuffix("gamma") + "beta"
        if isinstance(owner, Affine):
            given = own == "b" and name.removesuffix("b") + "w" not in absent
        else:
            given = isinstance(owner, _NORMS) and (
                own == "beta" or (own == "gamma" and (beta in absent or beta not in state))
            )
        if given:
            implied[name] = np.full(array.shape, float(own == "gamma"), array.dtype)
    return implied


def _is_transposed(name: str) -> bool:
    """Tell whether an array of this name here is a matrix of weights."""
    return name.rpartition(".")[2] == "w"

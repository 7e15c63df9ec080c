"""What is done to a trained network before it is used: folding, and population statistics."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, Protocol, Self, TypeGuard, TypeVar, overload

import numpy as np

from gpubn import interop
from gpubn.backend import Array, to_host
from gpubn.layers import _check
from gpubn.nn.affine import Affine
from gpubn.nn.elementwise import ReLU
from gpubn.nn.layer import Layer, Parametrized
from gpubn.nn.norms import RUNNING, BatchNorm
from gpubn.nn.sequential import Sequential


class Network(Protocol):
    """A network that is made of layers: ``gpubn.FullyConnectedNet``."""

    @property
    def layers(self) -> Sequential:
        """The layers."""

    def as_input(self, X: Array, name: str = "X") -> Array:
        """Check a batch and bring it to the network's device and dtype."""

    def folded(self, layers: Sequential) -> Self:
        """Return a network like this one, of layers without batch norms."""


AnyNetwork = TypeVar("AnyNetwork", bound=Network)


def _layers_of(net: Any) -> Sequential:
    layers = net if isinstance(net, Sequential) else getattr(net, "layers", None)
    if not isinstance(layers, Sequential):
        raise TypeError(
            f"net is a {type(net).__name__}, expected a Sequential or a FullyConnectedNet"
        )
    return layers


# --- Folding --------------------------------------------------------------------------------------


@overload
def fold_batchnorm(net: Sequential) -> Sequential: ...
@overload
def fold_batchnorm(net: AnyNetwork) -> AnyNetwork: ...
def fold_batchnorm(net: Sequential | Network) -> Sequential | Network:
    """Return a network for evaluation, its batch norms folded into the affine layers before them.

    ``w' = w * scale`` and ``b' = (b - running_mean) * scale + beta`` with
    ``scale = gamma / sqrt(running_var + eps)``, in float64 and rounded once. Of a batch norm with
    ``relu=True`` the ReLU stays. So does a batch norm that does not directly follow an ``Affine``,
    or another that was folded: after a ReLU, a Dropout or a layer of another kind, or at the start.
    And so does one with another axis than 1 or -1, whose channels are not the affine layer's.

    Parameters
    ----------
    net : Sequential or FullyConnectedNet
        Stays as it is.

    Returns
    -------
    net : of the same type
        A Sequential in evaluation; a FullyConnectedNet with ``normalization`` None, unless it was
        "layernorm".

    Raises
    ------
    ValueError
        A batch norm has another number of channels than the affine layer before it has outputs.

    Notes
    -----
    The outputs are not those of the net's evaluation to the bit: the weights are rounded anew.
    A folded pair's output, before a ReLU, is within 8 units in the last place at the scale
    ``abs(scale) * (s + abs(b) + abs(running_mean)) + abs(beta)``, s being the scale of ``x @ w``
    (``gpubn.testing.tolerance.matmul_scale``); up to 4 were seen. That scale is far above the
    output where terms cancel: where the mean is far from 0 and the variance small. Layers that
    follow carry the difference on.
    """
    layers = _layers_of(net)
    if isinstance(net, Sequential):
        return _fold(net, None)[0].eval()
    return net.folded(_fold(layers, None)[0])


def _fold(net: Sequential, last: Affine | None) -> tuple[Sequential, Affine | None]:
    """Return the net folded, and the affine layer that its end is the output of, if any.

    ``last`` is the affine layer, a copy already, that net's input is the output of.
    """
    folded: list[Layer] = []
    for layer in net:
        if isinstance(layer, Sequential):
            inner, last = _fold(layer, last)
            folded.append(inner)
        elif _is_foldable(layer) and last is not None:
            _fold_pair(last, layer)
            if layer.relu:
                folded.append(ReLU())
                last = None
        else:
            folded.append(copy.deepcopy(layer))
            folded[-1].release()
            # Of exactly this type: a class derived from it may compute something else.
            last = folded[-1] if type(folded[-1]) is Affine else None
    return Sequential(*folded), last


def _is_foldable(layer: Layer) -> TypeGuard[BatchNorm]:
    """Tell whether a layer is a batch norm, and nothing derived from it, of an affine's outputs."""
    return type(layer) is BatchNorm and layer.axis in (1, -1)


def _fold_pair(affine: Affine, norm: BatchNorm) -> None:
    """Fold a batch norm into the affine layer before it."""
    if norm.num_channels != affine.out_features:
        raise ValueError(
            f"{norm!r} follows {affine!r}, expected {affine.out_features} channels, as there are "
            "outputs"
        )
    w, b, gamma, beta, mean, var = (
        to_host(array).astype(np.float64)
        for array in (
            *(affine.params[name] for name in ("w", "b")),
            *(norm.params[name] for name in ("gamma", "beta")),
            *(norm.buffers[name] for name in RUNNING),
        )
    )
    scale = gamma / np.sqrt(var + norm.eps)
    for name, value in (("w", w * scale), ("b", (b - mean) * scale + beta)):
        affine.params[name] = affine.device.asarray(value.astype(affine.dtype))


# --- Population statistics ------------------------------------------------------------------------


def population_statistics(net: Sequential | Network, data: Any, batch_size: int = 100) -> None:
    """Set the batch norms' running statistics to those of all the data, under the present weights.

    The procedure of Ioffe and Szegedy 2015, algorithm 2: ``running_mean`` becomes the mean of the
    batches' means and ``running_var`` that of their unbiased variances, ``m / (m - 1)`` times the
    biased ones. Running statistics of training lag behind the weights, and weigh the last batches
    most.

    Parameters
    ----------
    net : Sequential or FullyConnectedNet
        Its batch norms use the batches' statistics meanwhile, frozen ones excepted, which stay as
        they are; dropout passes all.
    data : array (N, ...)
        On the host or a device. Each sample is used once, in order; of the net's dtype where the
        net is a Sequential.
    batch_size : int
        At least 2. Batches weigh as many as they have samples: the last may be smaller, and where
        it would be a single sample, that joins the batch before.

    Raises
    ------
    ValueError, TypeError
        An argument does not fit. Then, and after any other exception, statistics are as they were.

    Notes
    -----
    Means over batches are taken in float64, on the host, and rounded once.
    """
    batch_size = _check.whole("batch_size", batch_size, least=2)
    layers = _layers_of(net)
    data = interop.take(data, "data")
    _check.array("data", data)
    if data.ndim < 2 or len(data) < 2:
        raise ValueError(f"data has shape {data.shape}, expected (N, ...) with N at least 2")
    leaves = [layer for _, layer in layers.leaves()]
    norms = [layer for layer in leaves if isinstance(layer, BatchNorm) and not layer.frozen]
    totals: list[dict[str, Any]] = [dict.fromkeys(RUNNING, 0.0) for _ in norms]
    with _batchnorm_alone_training(layers, leaves, norms):
        for start, stop in _batches(len(data), batch_size):
            batch = data[start:stop]
            if isinstance(net, Sequential):
                batch = _beside(leaves, batch)
            else:
                batch = net.as_input(batch, "data")
            for norm in norms:
                # From zeros, where momentum is 0, running statistics become the batch's own.
                norm.bn_param = {"eps": norm.eps, "momentum": 0.0, "unbiased": True}
            layers.forward_array(batch)
            for norm, total in zip(norms, totals, strict=True):
                for name in RUNNING:
                    values = to_host(norm.buffers[name]).astype(np.float64)
                    total[name] += (stop - start) * values
    for norm, total in zip(norms, totals, strict=True):
        for name in RUNNING:
            mean = (total[name] / len(data)).astype(norm.dtype)
            norm.buffers[name] = norm.device.asarray(mean)


@contextlib.contextmanager
def _batchnorm_alone_training(
    net: Sequential, leaves: list[Layer], norms: list[BatchNorm]
) -> Iterator[None]:
    """Let batch norms train, and no other layer; then put modes and statistics back."""
    modes = [layer.training for layer in leaves]
    params = [norm.bn_param for norm in norms]
    try:
        for layer in leaves:
            layer.training = isinstance(layer, BatchNorm)
        yield
    finally:
        net.release()
        for layer, mode in zip(leaves, modes, strict=True):
            layer.training = mode
        for norm, bn_param in zip(norms, params, strict=True):
            norm.bn_param = bn_param


def _batches(count: int, size: int) -> list[tuple[int, int]]:
    """Return the first sample of each batch, and the one after its last."""
    stops = [*range(size, count, size), count]
    if len(stops) > 1 and stops[-1] - stops[-2] == 1:
        del stops[-2]
    return list(zip([0, *stops[:-1]], stops, strict=True))


def _beside(leaves: list[Layer], batch: Array) -> Array:
    """Bring a batch to the device of the parameters, if there are any."""
    device = next((layer.device for layer in leaves if isinstance(layer, Parametrized)), None)
    return batch if device is None else device.asarray(batch)
